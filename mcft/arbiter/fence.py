"""PURE: arbiter `fence`: a generation is won when the other host is *verified* off: `off`, then `status` says off.

An `off` that reports success is not believed, a `status` that fails says nothing. A host that is known to have let go
of the generation (its `resigned(g)`, or its QEMU dead with the gate closed) is not shot at: that word is the win, as such
a side never claims itself. Two hosts that both see the other silent would shoot each other: the standby waits
`delay_ms` longer than the primary, in which the primary's `off` reaches it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mcft.arbiter.base import Ask, Intent, Standing

OFF_TIMEOUT_MS, STATUS_TIMEOUT_MS = 60000.0, 20000.0
RETRY_MS = 1000.0
WATCH_EVERY_MS, WATCH_AGAIN_MS = 300000.0, 30000.0
WATCH_TIMEOUT_MS = 20000.0
SILENT_MS = WATCH_EVERY_MS + WATCH_AGAIN_MS


@dataclass(frozen=True, slots=True)
class Off:
    """The fence agent's action `off`. Its reply is only that it ended; whatever it says is verified by `Status`."""


@dataclass(frozen=True, slots=True)
class Status:
    """Action `status`. Reply: Power."""


@dataclass(frozen=True, slots=True)
class Monitor:
    """Action `monitor`: can the device be talked to. Reply: Power with the agent's words."""


@dataclass(frozen=True, slots=True)
class Power:
    """What a fence agent said. state: of the other host ("unknown": it failed); text: its words for people."""

    state: Literal["on", "off", "unknown"]
    text: str = ""


class FenceClaim:
    """One side's claim. See `base.Claim`. Never LOST: who is shot does not see it."""

    def __init__(
        self, intent: Intent, *, now_ms: float, delay_ms: float = 0.0, let_go: str = "", sent_before: bool = False
    ) -> None:
        """delay_ms: the standby's longer patience. let_go: the other side's word that it will never claim this generation.
        sent_before: an agent that died since may have begun an `off`; it is resolved by `status`."""
        self.intent, self.standing, self.reason = intent, Standing.OPEN, let_go
        self._let_go = bool(let_go)
        self._durable = self._withdrawn = False
        self._delay_ms = delay_ms if intent.side == "standby" else 0.0
        self._wake_ms = now_ms + (0.0 if sent_before else self._delay_ms)
        self._unresolved = sent_before  # an `off` was sent, and no `status` has answered since
        self._out: Ask | None = None
        self._number = 0

    def made_durable(self) -> None:
        self._durable = True
        if self._let_go and self.standing is Standing.OPEN and not self._withdrawn:
            self.standing = Standing.WON

    def next(self, now_ms: float) -> Ask | None:
        if not self._durable or self.standing is not Standing.OPEN or self._out is not None or now_ms < self._wake_ms:
            return None
        if self._withdrawn and not self._unresolved:
            return None
        self._number += 1
        if self._unresolved:
            self._out = Ask(self._number, Status(), STATUS_TIMEOUT_MS)
        else:
            self._out, self._unresolved = Ask(self._number, Off(), OFF_TIMEOUT_MS), True
        return self._out

    @property
    def wake_ms(self) -> float:
        return self._wake_ms if self.standing is Standing.OPEN else float("inf")

    def answered(self, ask: Ask, reply: Power, now_ms: float) -> None:
        self._out = None
        if self.standing is not Standing.OPEN or isinstance(ask.what, Off):
            return
        if reply.state == "off":
            self.standing, self.reason = Standing.WON, "the other host is verified off"
        elif reply.state == "on":
            # Resolved: that `off` did nothing. A new one, unless nobody wants it any more.
            self._unresolved, self.reason = False, "the other host is still on after `off`"
            # With the same difference, or a device that comes back for both lets both shoot.
            self._wake_ms = now_ms + RETRY_MS + self._delay_ms
        else:
            self.reason, self._wake_ms = f"the fence agent can't tell: {reply.text}", now_ms + RETRY_MS

    def no_answer(self, ask: Ask, *, sent: bool, now_ms: float) -> None:
        self._out = None
        if isinstance(ask.what, Off) and not sent:
            self._unresolved = False
        self.reason, self._wake_ms = "the fence agent did not end in time", now_ms + RETRY_MS

    def withdraw(self) -> bool:
        """No new `off` from now on. True once none is unresolved."""
        if self.standing is Standing.OPEN:
            self._withdrawn = True
        return self._withdrawn and not self._unresolved and self._out is None and self.standing is Standing.OPEN


class FenceWatch:
    """`monitor` every 5 minutes; 30 s after one that failed."""

    def __init__(self) -> None:
        self.trouble = ""
        self.last_ok_ms: float | None = None
        self.said = "not asked yet"
        self._out: Ask | None = None
        self._number, self._wake_ms = 0, float("-inf")

    def next(self, now_ms: float) -> Ask | None:
        if self._out is not None or now_ms < self._wake_ms:
            return None
        self._number += 1
        self._out = Ask(self._number, Monitor(), WATCH_TIMEOUT_MS)
        return self._out

    @property
    def wake_ms(self) -> float:
        return self._wake_ms

    def answered(self, ask: Ask, reply: Power, now_ms: float) -> None:
        self._out = None
        if reply.state == "unknown":
            self.said, self._wake_ms = reply.text or "the fence agent failed", now_ms + WATCH_AGAIN_MS
            return
        self.last_ok_ms, self.said, self._wake_ms = now_ms, "", now_ms + WATCH_EVERY_MS

    def no_answer(self, ask: Ask, *, sent: bool, now_ms: float) -> None:
        self._out, self._wake_ms = None, now_ms + WATCH_AGAIN_MS
        self.said = "the fence agent did not end in time"

    def reachable(self, now_ms: float) -> bool:
        """The newest check was a good one."""
        return not self.said and self.last_ok_ms is not None and now_ms - self.last_ok_ms <= SILENT_MS
