"""When checkpoints are put further apart, and when they come back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mcft.gate.pace import LEAST_SHARE, MOST_MS, WINDOW, Change, Pace


def fed(pace: Pace, ran_ms: float, stood_ms: float, times: int = WINDOW + 1, at_ms: float = 1000.0) -> list[Change]:
    """What it says to so many equal checkpoints; each change is obeyed by nobody."""
    said = []
    for number in range(times):
        stop_ms = at_ms + number * (ran_ms + stood_ms)
        said.append(pace.checkpoint(stop_ms, stop_ms + stood_ms))
    return [change for change in said if change]


def test_a_guest_that_has_time_is_left_alone() -> None:
    assert fed(Pace(100, 100), 75, 25, 100) == []


def test_pauses_longer_than_the_delay_stretch_it_to_twice_their_length() -> None:
    """As QEMU does it: the timer has fired meanwhile, so the next checkpoint begins at once."""
    assert fed(Pace(100, 100), 4, 333) == [Change(670, 333, 4 / 337)]


def test_what_is_not_obeyed_is_said_again_after_as_many_checkpoints() -> None:
    assert len(fed(Pace(100, 100), 4, 333, 3 * WINDOW + 1)) == 3


def test_one_long_pause_is_none() -> None:
    pace = Pace(100, 100)
    assert fed(pace, 80, 20) == [] and fed(pace, 10, 5000, 1, 5000) == [] and fed(pace, 80, 20, 20, 10400) == []


def test_what_was_stretched_comes_back() -> None:
    assert [c.period_ms for c in fed(Pace(100, 660), 640, 20)] == [100]
    assert [c.period_ms for c in fed(Pace(100, 1600), 1500, 100)] == [200]
    assert fed(Pace(100, 660), 400, 260) == []


def test_never_beyond_the_limit_nor_below_what_was_asked_for() -> None:
    assert [c.period_ms for c in fed(Pace(100, 100), 1, 5000)] == [MOST_MS]
    assert fed(Pace(100, MOST_MS), 1, 5000) == []
    assert fed(Pace(5000, 5000), 1, 6000) == []
    assert [c.period_ms for c in fed(Pace(500, 2000), 1900, 1)] == [500]


def test_stamps_that_go_back_count_for_nothing() -> None:
    """QEMU stamps events by the wall clock, which may be set."""
    pace = Pace(100, 100)
    for number in range(50):
        at_ms = 1e6 - number * 1000
        assert pace.checkpoint(at_ms, at_ms + 300) is None


@given(st.floats(10, 1500), st.floats(0.5, 5000))
def test_it_settles(asked_ms: float, pause_ms: float) -> None:
    """A QEMU that obeys, and whose checkpoints take the same each time: after a few changes none is wanted any more."""
    pace, at_ms, changes = Pace(asked_ms, asked_ms), 1000.0, 0
    for _ in range(20 * WINDOW):
        change = pace.checkpoint(at_ms, at_ms + pause_ms)
        at_ms += max(pause_ms + 1, pace.period_ms)
        if change:
            changes += 1
            pace = Pace(asked_ms, change.period_ms)
    assert changes <= 2
    assert (pace.period_ms - pause_ms) / pace.period_ms >= LEAST_SHARE or pace.period_ms >= MOST_MS
