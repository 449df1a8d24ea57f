"""When the kernel is told the lease's end, by a primary's gate of stand-ins. The kernel itself: `tests/lab/test_taplease.py`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import mcft.gate.filter
from mcft.failover import Act, Verdict
from mcft.gate.primary import Primary

T_MS, MARGIN_MS = 300.0, 20.0
FOR_EVER, OVER = float("inf"), float("-inf")


class Kernel:
    """`TapLease`, writing down what it is told."""

    stands = True

    def __init__(self) -> None:
        self.told = [FOR_EVER]

    def until(self, at_ms: float) -> None:
        self.told.append(at_ms)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(mcft.gate.filter, "TapLease", Kernel)
    state = SimpleNamespace(buffer="filter", mode="hold", loss_ms=T_MS, nics=[], record="protected", g=1, yank=[])
    session = SimpleNamespace(sent_ms=lambda echo: float(echo), counter=0)
    return SimpleNamespace(state=state, session=session, persist=lambda: None, say=lambda: None)


def primary(gate: Any) -> tuple[Primary, list[float]]:
    side = Primary(gate)
    side.started()
    return side, side.output.lease.told  # type: ignore[attr-defined]


def hear(side: Primary, echo: int, *, record: str = "armed", claiming: bool = False) -> None:
    """A keepalive of the standby's, which echoes the one that was sent at `echo` ms."""
    word = SimpleNamespace(role="standby", g=1, record=record, claiming=claiming, loads=0)
    side.on_heard(SimpleNamespace(word=word, echo=echo), 0.0)  # type: ignore[arg-type]


def test_a_gate_that_starts_anew_lets_nothing_out_before_its_first_lease(gate: Any) -> None:
    side, told = primary(gate)
    assert told[-1] == OVER
    hear(side, 5000)
    assert told[-1] == 5000 + T_MS - MARGIN_MS


def test_the_kernel_knows_the_lease_before_anything_leaves_by_it(gate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a release comes first: on a slow host QEMU would be faster, and its packets be dropped."""
    side, told = primary(gate)
    known: list[float] = []
    monkeypatch.setattr(side, "_apply", lambda actions, now_ms: known.append(told[-1]))
    hear(side, 5000)
    assert known == [5000 + T_MS - MARGIN_MS]


@pytest.mark.parametrize("word", [{"claiming": True}, {"record": "given-up"}])
def test_a_lease_that_is_taken_back_ends_at_once(gate: Any, word: Any) -> None:
    side, told = primary(gate)
    hear(side, 5000)
    hear(side, 5050, **word)
    assert told[-1] == OVER


def test_once_closed_no_keepalive_opens_it(gate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    side, told = primary(gate)
    hear(side, 5000)
    side.obey(Verdict(Act.DIED, "test"), 0.0)
    assert told[-1] == OVER
    hear(side, 5050)
    assert told[-1] == OVER


def test_what_may_speak_has_no_end(gate: Any) -> None:
    """Fails if a keepalive that comes late gives an end to what was opened: the guest would fall silent for ever."""
    side, told = primary(gate)
    hear(side, 5000)
    side._on_open({"because": "solo"}, lambda _answer: None)
    assert told[-1] == FOR_EVER
    hear(side, 5050)
    assert told[-1] == FOR_EVER
