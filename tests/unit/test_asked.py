"""What an operator asked of `protect` outlives a take-over: the new primary protects back by the same words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from mcft import api
from mcft.agent import copy, model
from mcft.agent.again import Again
from mcft.config import Config, Peer
from mcft.diskreplica import Disk
from mcft.generations import Ledger

ASKED = model.Asked("colo", "filter", "off", "etcd", True)


def disk(target: str, path: str) -> Disk:
    return Disk(target, "/machine/0", "libvirt-1-format", 1 << 20, path, "raw", False)


def standby(asked: model.Asked = ASKED) -> model.Body:
    """host2's body, as host1's request makes it."""
    request = model.Prepare(
        "u", "vm1", "p", 1, "k", 100, "colo", 300.0, "", "", False, [disk("vda", "/a/vm1.img"), disk("vdb", "/a/more.img")], [1],
        disk_paths={"vda": "/b/vm1.img"}, arbiter="etcd", asked=asked,
    )  # fmt: skip
    peer = Peer("host1", ("10.1.0.1",))
    config = Config(name="host2", tls="off", listen_addresses=("10.1.0.2",), peers={"host1": peer})
    read = msgspec.json.decode(msgspec.json.encode(request), type=model.Prepare)
    return copy.make_body(read, config, "host1")


def again(body: model.Body, side: Any) -> api.ProtectRequest:
    """What the agent asks of itself when it protects again."""
    asked: list[api.ProtectRequest] = []

    async def now(request: api.ProtectRequest, _job: Any) -> str:
        asked.append(request)
        return ""

    def start(_kind: str, _domain: str, work: Any) -> None:
        with pytest.raises(StopIteration):
            work(None).send(None)

    core: Any = SimpleNamespace(site=SimpleNamespace(jobs=SimpleNamespace(start=start)), protecting=SimpleNamespace(now=now))
    life: Any = SimpleNamespace(body=body, ledger=Ledger("p", side, 1), event=lambda *_words: None)
    Again(core)._start(life)
    return asked[0]


def test_a_new_primary_protects_back_as_it_was_asked_on_the_other_host() -> None:
    """Fails if an arbiter that was typed is gone after the first take-over (found by chaos: `etcd` became `standby`)."""
    request = again(standby(), "standby")
    assert (request.arbiter, request.engine, request.netbuffer, request.experimental) == ("etcd", "colo", "filter", True)
    assert request.rdma_device == "off"


def test_the_way_back_leads_to_where_the_disks_are_there() -> None:
    """Fails if the old primary would get its copy at the path of the new one's, beside its own old disk."""
    body = standby()
    assert again(body, "standby").disks == {"vda": "/a/vm1.img"}
    assert again(body, "primary").disks == {"vda": "/b/vm1.img"}


def test_the_name_of_a_device_is_not_carried_to_another_host() -> None:
    assert standby(model.Asked(rdma_device="mlx5_0")).rdma_asked == ""
    assert standby(model.Asked(rdma_device="auto")).rdma_asked == "auto"


def test_an_older_primary_says_nothing_of_it() -> None:
    """Version N-1 sends no `asked`. Fails if that is an error."""
    body = standby(model.Asked())
    assert (body.arbiter_asked, body.engine_asked, body.buffer_asked) == (None, "auto", "auto")
