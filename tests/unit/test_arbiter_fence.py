"""The rules of arbiters `fence` and `standby`."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from mcft.arbiter.base import Ask, Intent, Standing
from mcft.arbiter.fence import FenceClaim, FenceWatch, Monitor, Off, Power, Status
from mcft.arbiter.standby import StandbyClaim

G = 3


def claim(side: str = "primary", **more: Any) -> FenceClaim:
    made = FenceClaim(Intent("i", side, G), now_ms=0.0, **more)  # type: ignore[arg-type]
    made.made_durable()
    return made


def ask_of(made: FenceClaim, now_ms: float) -> Ask:
    ask = made.next(now_ms)
    assert ask is not None
    return ask


def shot(made: FenceClaim, state: Any, now_ms: float = 0.0) -> None:
    """`off`, then `status` with this answer."""
    off = ask_of(made, now_ms)
    assert isinstance(off.what, Off)
    made.answered(off, Power("on"), now_ms)
    status = ask_of(made, now_ms)
    assert isinstance(status.what, Status)
    made.answered(status, Power(state, "words"), now_ms)


def test_off_and_verified_off_is_a_win() -> None:
    made = claim()
    shot(made, "off")
    assert made.standing is Standing.WON


def test_unverified_is_not_fenced() -> None:
    """Fails if an `off` that reports success is believed, or a `status` that fails."""
    made = claim()
    off = ask_of(made, 0.0)
    made.answered(off, Power("off", "Success: Powered OFF"), 0.0)
    assert made.standing is Standing.OPEN
    made.answered(ask_of(made, 0.0), Power("unknown", "connection timed out"), 0.0)
    assert made.standing is Standing.OPEN and "can't tell" in made.reason
    again = ask_of(made, 1000.0)
    assert isinstance(again.what, Status), "first what became of the attempt, then another"
    made.answered(again, Power("off"), 1000.0)
    assert made.standing is Standing.WON


def test_still_on_is_shot_again_after_a_second() -> None:
    made = claim()
    shot(made, "on")
    assert made.standing is Standing.OPEN and made.next(500.0) is None
    shot(made, "off", 1000.0)
    assert made.standing is Standing.WON


def test_the_standby_waits_longer() -> None:
    """Fails if both hosts shoot at the same time: then both are off."""
    made = claim("standby", delay_ms=5000.0)
    assert made.next(4999.0) is None and isinstance(ask_of(made, 5000.0).what, Off)
    assert isinstance(ask_of(claim("primary", delay_ms=5000.0), 0.0).what, Off)


def test_the_standby_waits_longer_for_each_attempt() -> None:
    """Fails if a fence device that was broken for both hosts lets both shoot once it works (seen in the lab)."""
    for side, wait_ms in (("primary", 1000.0), ("standby", 6000.0)):
        made = claim(side, delay_ms=5000.0)
        shot(made, "on", 5000.0)
        assert made.next(5000.0 + wait_ms - 1) is None and isinstance(ask_of(made, 5000.0 + wait_ms).what, Off)


def test_who_let_go_is_not_shot() -> None:
    """Fails if a host is switched off because one guest's QEMU died there."""
    made = FenceClaim(Intent("i", "standby", G), now_ms=0.0, delay_ms=5000.0, let_go="its QEMU is gone")
    assert made.standing is Standing.OPEN, "not before it is durable"
    made.made_durable()
    assert made.standing is Standing.WON and made.next(1e9) is None


def test_nothing_is_shot_before_the_intent_is_durable() -> None:
    made = FenceClaim(Intent("i", "primary", G), now_ms=0.0)
    assert made.next(1e9) is None


def test_after_a_withdrawal_no_new_off() -> None:
    """Fails if a host that answers again is shot, or if an attempt that was made is forgotten unresolved."""
    waiting = claim("standby", delay_ms=5000.0)
    assert waiting.withdraw() and waiting.next(1e9) is None
    made = claim()
    off = ask_of(made, 0.0)
    assert not made.withdraw()
    made.answered(off, Power("on"), 0.0)
    assert not made.withdraw(), "that `off` may have worked"
    made.answered(ask_of(made, 0.0), Power("on"), 0.0)
    assert made.withdraw() and made.next(1e9) is None


def test_a_withdrawn_attempt_that_worked_is_a_win() -> None:
    made = claim()
    off = ask_of(made, 0.0)
    made.withdraw()
    made.answered(off, Power("on"), 0.0)
    made.answered(ask_of(made, 0.0), Power("off"), 0.0)
    assert made.standing is Standing.WON and not made.withdraw()


def test_after_a_crash_the_attempt_is_resolved_by_status_first() -> None:
    made = claim(sent_before=True)
    assert isinstance(ask_of(made, 0.0).what, Status)


def test_an_agent_that_was_never_started_shot_nobody() -> None:
    made = claim()
    made.no_answer(ask_of(made, 0.0), sent=False, now_ms=0.0)
    assert made.withdraw()
    made = claim()
    made.no_answer(ask_of(made, 0.0), sent=True, now_ms=0.0)
    assert not made.withdraw() and isinstance(ask_of(made, 1000.0).what, Status)


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.sampled_from(["on", "off", "unknown", "hang", "refuse", "withdraw"]), max_size=20))
def test_a_win_is_always_a_status_that_said_off(script: list[str]) -> None:
    made, now, verified, offs = claim(), 0.0, False, 0
    withdrawn = False
    for act in script:
        now += 2000.0
        if act == "withdraw":
            made.withdraw()
            withdrawn = True
            continue
        if (ask := made.next(now)) is None:
            continue
        assert not (withdrawn and isinstance(ask.what, Off)), "a new off after the withdrawal"
        offs += isinstance(ask.what, Off)
        if act in ("hang", "refuse"):
            made.no_answer(ask, sent=act == "hang", now_ms=now)
            continue
        made.answered(ask, Power(act), now)  # type: ignore[arg-type]
        verified = verified or (isinstance(ask.what, Status) and act == "off")
        assert (made.standing is Standing.WON) == verified
    assert offs or made.standing is Standing.OPEN


def test_the_watch_asks_every_five_minutes_and_sooner_after_a_failure() -> None:
    watch = FenceWatch()
    ask = watch.next(0.0)
    assert ask and isinstance(ask.what, Monitor) and not watch.reachable(0.0)
    watch.answered(ask, Power("on"), 0.0)
    assert watch.reachable(1.0) and watch.next(299_999.0) is None
    ask = watch.next(300_000.0)
    assert ask
    watch.answered(ask, Power("unknown", "login failed"), 300_000.0)
    assert not watch.reachable(300_001.0) and watch.said == "login failed"
    ask = watch.next(330_000.0)
    assert ask
    watch.no_answer(ask, sent=True, now_ms=330_000.0)
    assert not watch.reachable(330_001.0)


def test_standby_claims_by_its_own_record_and_the_primary_never() -> None:
    made = StandbyClaim(Intent("i", "standby", G))
    assert made.standing is Standing.OPEN and made.next(0.0) is None
    made.made_durable()
    assert made.standing is Standing.WON
    refused = StandbyClaim(Intent("i", "primary", G))
    refused.made_durable()
    assert refused.standing is Standing.UNKNOWN and "only the standby" in refused.reason
