"""A failover that can't be refuses before anybody is asked. Site and life are FAKES; `acts` and the ledger are real."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mcft import api
from mcft.agent.acts import Acts
from mcft.agent.standby import Standby
from mcft.errors import Refused
from mcft.generations import Kind, Ledger, Record


@pytest.mark.parametrize("recorded", [True, False])
async def test_a_copy_that_is_not_whole_is_not_taken_over_and_nobody_is_asked(recorded: bool) -> None:
    """The operator may already have switched the good host off for it; the answer says where the good one is.

    Fails if `Acts._failover` asks the other host, or claims, first.
    """
    life: Any = object.__new__(Standby)
    records = [Record(3, kind) for kind in (Kind.PREPARING, Kind.ARMED, *([Kind.NOT_WHOLE] if recorded else []))]
    life.ledger = Ledger("p", "standby", 3, records)
    life.body = SimpleNamespace(role="standby", domain="vm1", peer="host1", reason="this copy is not whole: BLOCK_IO_ERROR")
    life._broken = "" if recorded else "BLOCK_IO_ERROR"
    core: Any = SimpleNamespace(site=SimpleNamespace())  # whoever asks anybody meets an AttributeError
    job: Any = SimpleNamespace(step=lambda _text: None)
    with pytest.raises(Refused) as refused:
        await Acts(core)._failover(life, api.ActRequest(force=True, peer_is_off=True), job)
    assert refused.value.code == "not-whole" and "mcft start vm1" in refused.value.next_step
