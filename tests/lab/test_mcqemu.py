"""The trace check: the stand-in for the micro-checkpointing QEMU (`tests/mcqemu`) against recorded runs of the real one."""

from __future__ import annotations

import sys

import pytest
import world

sys.path.insert(0, str(world.REPO / "tests" / "mcqemu"))
import compare
import scenarios

PLAYER = "/opt/mcft/tests/mcqemu/scenarios.py"
# Where a recorded run went on with what COLO can't show: the part before is compared.
PLAYED_UNTIL = {"11-commands-during-mc": "human-monitor-command"}


@pytest.fixture(autouse=True)
def fresh_world(the_lab: None) -> None:
    """No domain and no agent is touched, so none is restored."""


@pytest.mark.parametrize("name", scenarios.PLAYED)
def test_as_recorded(name: str) -> None:
    """The same scenario, the same statuses, events, silences, errors and exits; the counter never more than 3 behind.

    Fails if, say, `source.py` lets QEMU's own STOP out at each checkpoint or shows all that is acknowledged (not one less),
    or `destination.py` leaves the monitor alive while it follows.
    """
    done = world.H1.run("/usr/bin/python3", "-B", PLAYER, name, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    real = compare.until_command(compare.recorded(name), PLAYED_UNTIL.get(name, ""))
    assert compare.differences(compare.parsed(done.stdout), real) == []
