"""`expected.toml` was first written down from what mcft did. Here it is held against `derived.py`, which knows no mcft."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from derived import Facts, facts

EXPECTED: dict[str, dict[str, Any]] = tomllib.loads((Path(__file__).parent / "expected.toml").read_text(encoding="utf-8"))
TO_A_STANDBY = ("break the socket", "query-status: running", "query-status: paused", "cont", "taken")


def of(key: str) -> tuple[dict[str, Any], Facts]:
    name, _, index = key.partition("#")
    return EXPECTED[key], facts(name, int(index or 1) - 1)


@pytest.mark.parametrize("key", EXPECTED)
def test_what_leaves(key: str) -> None:
    """Two acknowledgements for each epoch at least; none counts that QEMU can't have shown, and none is forgotten.

    Fails if a number in `expected.toml` is what a rule that releases at c + 1 would bring.
    """
    expected, run = of(key)
    assert expected["released"] * 2 <= run.most
    # The first that counts is at c + 2, c being the counter at the hold; from there each rise counts (sentences 1 and 3).
    assert expected["acknowledged"] <= max(0, run.most - 1)
    if expected["acknowledged"]:
        # Where the run recorded no RESUME, a barrier is set only when the counter was seen to rise.
        assert expected["acknowledged"] >= run.least - (2 if run.resumes else 4)
        # The price of knowing the counter by asking: an epoch leaves after four acknowledgements at most (1 ms: asked every 5).
        assert expected["released"] * 4 >= run.least


@pytest.mark.parametrize("key", EXPECTED)
def test_what_is_armed(key: str) -> None:
    """Where acknowledgements counted, and nowhere else (sentence 6); else `protect` fails and nobody takes over."""
    expected, run = of(key)
    acts = expected["acts"]
    armed = acts[:1] == ["armed"]
    assert armed == (expected["acknowledged"] > 0)
    if not run.checkpointing or run.most < 2:
        assert not armed
    if run.checkpointing and run.as_ours and run.least >= 8:
        assert armed
    if not armed:
        assert not any(act.startswith("standby") or act in TO_A_STANDBY for act in acts)


@pytest.mark.parametrize("key", EXPECTED)
def test_who_goes_on(key: str) -> None:
    """Fails if a take-over is expected of a power-off, of a dead standby or of nothing; or none of a death, a hang or a cut."""
    expected, run = of(key)
    acts = expected["acts"]
    if acts[:1] != ["armed"]:
        return
    claims = [act for act in acts if act.startswith("standby claim")]
    assert bool(claims) == run.takes_over
    assert ("taken" in acts) == run.takes_over
    if run.source_ended and run.shut_down:
        assert "primary ended: the guest shut down" in acts
    if run.standby_ended_first and not run.cut:
        assert acts[-1].startswith("primary break")


@pytest.mark.parametrize("key", EXPECTED)
def test_how_it_takes_over(key: str) -> None:
    """In this order: the claim, the socket, the questions, `cont` where it is held back, read back; and nothing else is sent."""
    expected, run = of(key)
    acts = expected["acts"]
    if "taken" not in acts:
        return
    asked = acts[acts.index("break the socket") :]
    assert any(act.startswith("standby claim") for act in acts[: acts.index("break the socket")])
    by_itself = ["break the socket", "query-status: running", "taken"]
    held_back = ["break the socket", "query-status: paused", "cont", "query-status: running", "taken"]
    assert asked == (held_back if run.held_back else by_itself)


@pytest.mark.parametrize("key", EXPECTED)
def test_which_are_only_watched(key: str) -> None:
    """Those, and only those, that were set up as mcft never would (sentence 11)."""
    expected, run = of(key)
    assert expected.get("watched", False) == (not run.as_ours)
