"""PURE: arbiter `standby`: the standby's own `taken(g)` is the win; the primary can only be given the generation.

Asks nobody. What it costs: a primary whose standby is silent can't know whether that one took over, and stays muted
until the standby gives up or an operator decides.
"""

from __future__ import annotations

from mcft.arbiter.base import Ask, Intent, Standing


def may_claim(side: str) -> str:
    """Empty, or why this side never claims by this arbiter."""
    return "" if side == "standby" else "with arbiter 'standby' only the standby decides"


class StandbyClaim:
    """The standby's claim is won as soon as it is durable. The primary's can't be made (`may_claim`)."""

    def __init__(self, intent: Intent) -> None:
        self.intent = intent
        refused = may_claim(intent.side)
        self.standing = Standing.UNKNOWN if refused else Standing.OPEN
        self.reason = refused
        self._withdrawn = False

    def made_durable(self) -> None:
        if self.standing is Standing.OPEN and not self._withdrawn:
            self.standing = Standing.WON

    def next(self, now_ms: float) -> Ask | None:
        return None

    @property
    def wake_ms(self) -> float:
        return float("inf")

    def answered(self, ask: Ask, reply: object, now_ms: float) -> None:
        raise AssertionError("arbiter 'standby' asks nobody")

    def no_answer(self, ask: Ask, *, sent: bool, now_ms: float) -> None:
        raise AssertionError("arbiter 'standby' asks nobody")

    def withdraw(self) -> bool:
        self._withdrawn = self.standing is Standing.OPEN
        return self._withdrawn
