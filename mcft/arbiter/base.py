"""PURE: what every arbiter is to the two sides: one small contract, without I/O and without a clock.

A side that wants generation g makes an `Intent`, makes it durable, and only then feeds the `Claim`: `next` says what to
ask, the caller sends that and hands back what came of it (`answered`, or `no_answer` with whether it may have been sent),
until the claim's standing is no longer OPEN. A `Watch` does the same for ever and knows how the arbiter is. Times are
CLOCK_BOOTTIME in milliseconds, given as arguments. The rules are `protocol.md`'s, "The end of a generation".
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, Protocol

import msgspec

Side = Literal["primary", "standby"]


class Standing(StrEnum):
    """What became of a claim. OPEN: not resolved yet. UNKNOWN: the arbiter can't tell; only an operator gets out of it."""

    OPEN = "open"
    WON = "won"
    LOST = "lost"
    UNKNOWN = "unknown"


class Intent(msgspec.Struct, frozen=True):
    """One side's wish to own g + 1. id: random, the claim's own. Durable before anything of it is sent."""

    id: str
    side: Side
    g: int


@dataclass(frozen=True, slots=True)
class Ask:
    """One question to the arbiter. number: rises; what: the arbiter's own request; timeout_ms: how long to wait."""

    number: int
    what: Any
    timeout_ms: float


class Claim(Protocol):
    """A claim of one generation. At most one `Ask` is outstanding; `next` gives none before `made_durable`."""

    intent: Intent
    standing: Standing
    reason: str

    def made_durable(self) -> None:
        """The intent (and that the claim may be sent) is on disk."""

    def next(self, now_ms: float) -> Ask | None:
        """What to ask now; None: nothing, look again at `wake_ms` or after the outstanding answer."""

    @property
    def wake_ms(self) -> float:
        """When `next` may have something, if nothing else happens."""

    def answered(self, ask: Ask, reply: Any, now_ms: float) -> None:
        """The arbiter's answer to that very question."""

    def no_answer(self, ask: Ask, *, sent: bool, now_ms: float) -> None:
        """None came in time. sent: it may have reached the arbiter, and may still act."""

    def withdraw(self) -> bool:
        """The reason for the claim is over. True: nothing of it can win any more, as if it had never been made."""


class Watch(Protocol):
    """How the arbiter is, seen from here; asked at `wake_ms`, in the way of a `Claim`."""

    last_ok_ms: float | None
    trouble: str  # why it can't decide any more, whatever it answers from now on
    said: str  # why its newest answer was none; empty after a good one

    def next(self, now_ms: float) -> Ask | None: ...
    @property
    def wake_ms(self) -> float: ...
    def answered(self, ask: Ask, reply: Any, now_ms: float) -> None: ...
    def no_answer(self, ask: Ask, *, sent: bool, now_ms: float) -> None: ...
    def reachable(self, now_ms: float) -> bool: ...
