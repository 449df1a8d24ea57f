"""What the primary's agent does with a verdict of its gate, by itself: without libvirt, a store or a peer."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from mcft.agent.decisions import Deciding
from mcft.failover import BUFFER_BROKEN


class Decided(Deciding):
    """Remembers what it said and how it went on."""

    def __init__(self) -> None:  # the real one wants a whole site
        self.body: Any = SimpleNamespace(domain="vm1", peer="host2", manual="", quick_return=False)
        self.said: list[tuple[str, str, str]] = []
        self.resolved: list[str] = []

    def event(self, kind: str, text: str, level: Any = "info") -> None:
        self.said.append((kind, text, level))

    async def _resolve(self, reason: str) -> None:
        self.resolved.append(reason)


@pytest.mark.parametrize("what", ["a qdisc of mcft-vnet0 was deleted", "mcft-vnet0 was set down"])
def test_a_buffer_that_somebody_changed_is_told_and_not_protected_again_by_itself(what: str) -> None:
    """Fails if `_note_buffer` is not called, leaves `manual` empty (it would be protected again at once, and changed again),
    or does not say what was changed and what to type."""
    life, reason = Decided(), f"{BUFFER_BROKEN}: {what}"
    asyncio.run(life._after({"act": "break", "reason": reason}))
    assert life.resolved == [reason] and life.body.manual == reason
    (alarm,) = [text for kind, text, level in life.said if (kind, level) == ("buffer", "alarm")]
    assert what in alarm and "mcft protect vm1 --to host2" in alarm


def test_any_other_broken_stream_is_protected_again_by_itself() -> None:
    """Fails if every verdict counts as somebody's doing."""
    life = Decided()
    asyncio.run(life._after({"act": "break", "reason": "the stream is dead: COLO_EXIT"}))
    assert life.body.manual == "" and life.body.quick_return and [kind for kind, _, _ in life.said] == ["verdict"]
