"""The standby's answer to ARM. Gate, store and QEMU are FAKES; `Standby.arm` and the ledger are real."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from mcft.agent.standby import Standby
from mcft.generations import Kind, Ledger, Record


async def test_given_up_while_its_gate_was_away_it_is_not_protected() -> None:
    """Its gate died as it was told `armed`; until it was back the primary had undone the protecting, and this side given up.

    Fails if `arm` goes on all the same: "it is protected" refused every later `protect` (seen in the lab).
    """
    life: Any = object.__new__(Standby)
    life.ledger = Ledger("p", "standby", 3, [Record(3, Kind.PREPARING)])
    states: list[str] = []

    async def record(kind: Kind) -> None:
        life.ledger.append(kind)

    async def insist(do: str, **_fields: Any) -> None:
        life.ledger.append(Kind.GIVEN_UP)

    async def ask(do: str, _timeout_s: float) -> dict[str, str]:
        return {"stream_dead": "", "disk_error": ""}

    async def follow(_key: Any, _seen: Any) -> str:
        return ""

    life.record, life.to_state, life.qemu_alive = record, states.append, lambda: True
    life.gate = SimpleNamespace(ask=ask, insist=insist)
    life.arbiter = SimpleNamespace(follow=follow)
    answer = await life.arm(SimpleNamespace(key=None, seen=None))
    assert answer.kind == "given-up" and states == []
