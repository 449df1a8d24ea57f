"""The RDMA keepalive of two real gates on rxe: what it sees, and how soon, beside UDP in the same run."""

from __future__ import annotations

from fabric import Fabric
from pair import Pair


def test_both_directions(fabric: Fabric) -> None:
    with Pair() as pair:
        pair.connected()
        print(pair.primary.status()["links"], pair.standby.status()["links"])
