"""What the simulation found in mcft, each as the few faults that show it (`docs/correctness.md`, track record)."""

from __future__ import annotations

import pytest

from tests.sim import play
from tests.sim.faults import Fault
from tests.sim.run import one


def holds(faults: list[Fault], seeds: range = range(1, 7)) -> None:
    """These faults in worlds of several seeds: no violation in any."""
    for seed in seeds:
        world, found = one(seed, [faults])
        play.over(world)
        assert found is None, f"seed {seed}: {found}"


def test_going_solo_while_libvirtd_is_away_leaves_nothing_half_undone() -> None:
    """libvirtd was away just when a primary that had gone solo took its set-up down; nobody tried again, and its disks kept
    mcft's nodes: protecting it anew was refused for ever.

    Fails if `Deciding.adopt_won` does not look at `dismantling`.
    """
    holds([Fault(100.0, "libvirtd away", 0, 900.0), Fault(110.0, "kill QEMU", 1)])


def test_a_take_over_is_cleaned_up_though_libvirtd_was_away() -> None:
    """libvirtd was away while the new primary waited for its overlays' commit: taken for the end of it, nobody came back.

    Fails if `Life.commit_online` returns on any error.
    """
    holds([Fault(100.0, "mcft failover", 0), Fault(200.0, "libvirtd away", 1, 300.0)])
    holds([Fault(100.0, "mcft failover", 0), Fault(140.0, "libvirtd away", 1, 900.0)])


@pytest.mark.parametrize("kind", ["kill the gate", "kill the agent", "kill QEMU", "power", "freeze the host", "cut a link"])
@pytest.mark.parametrize("host", [0, 1])
def test_one_fault_is_survived(kind: str, host: int) -> None:
    """Any single one of these: mended, the guest talks and is protected again.

    Fails if a decision is not gone on with from its records (`Life.carry_through`).
    """
    holds([Fault(50.0, kind, host, 400.0)], range(1, 3))
