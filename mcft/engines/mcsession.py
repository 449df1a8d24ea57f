"""PURE: a micro-checkpointed stream as its two gates see it. Fed with replies, events and time; no I/O.

`Leader`: the primary's QEMU says little: a RESUME when a capture is over, `checkpoints` when asked. It turns them into what
`commit.py` wants and says when to ask next: a tenth of the delay (5 ms at least) while an acknowledgement is awaited that lets
something leave, and not at all while none can come.

`take_over`: the standby's side. Its monitor is dead from the first checkpoint on and nothing is asked of it. A take-over
breaks its socket first (after a silent loss it would wait in recv for up to 70 s), awaits `paused`, resumes, reads back.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from mcft.commit import Action, AskCount, CommitGate
from mcft.engines.mc import Progress, progress

MIN_POLL_MS = 5.0
LEARN_ANEW = 3
PAUSED_POLL_MS = 5.0
RUNNING_POLL_MS = 5.0
GIVE_UP_MS = 80_000.0  # QEMU's own patience with a silent stream is 70 s
RUNS_WITHIN_MS = 10_000.0


@dataclass(frozen=True, slots=True)
class Ticket:
    """One `query-migrate` on its way. epoch: of the newest barrier when it was sent."""

    epoch: int
    sent_ms: float


@dataclass
class Leader:
    """One stream on its primary. delay_ms may be changed at any time."""

    delay_ms: float
    commit: CommitGate
    now: Progress = field(default_factory=lambda: Progress("none", None, {}))
    resumes: int = 0
    polls: int = 0
    _epoch: int = 0
    _asked: Ticket | None = None
    _at_once: bool = True
    _awaits_ack: bool = True
    _awaits_since_ms: float = float("-inf")  # the first RESUME without its acknowledgement
    _sign_ms: float = 0.0  # of the newest RESUME or rise
    _polled_ms: float = float("-inf")
    _checkpointing: bool = False
    _resumes_read: int = -1  # how many RESUMEs there were at the last reading
    _one_short: int = 0
    _at_rest: int | None = None  # the counter less the RESUMEs while no acknowledgement is missing; None: not learned yet

    @property
    def interval_ms(self) -> float:
        return max(MIN_POLL_MS, self.delay_ms / 10)

    def due_ms(self) -> float:
        """From when on `query-migrate` should be sent; infinite while one is unanswered."""
        if self._asked is not None or self.commit.dead:
            return float("inf")
        if self._at_once:
            return self._polled_ms
        if self._awaits_ack:  # an acknowledgement takes some ms from its RESUME
            return max(self._polled_ms, self._awaits_since_ms) + self.interval_ms
        # At rest nothing can rise before the next capture. Should its RESUME be lost, asking goes on all the same.
        return max(self._sign_ms + self.delay_ms + 2 * self.interval_ms, self._polled_ms + self.interval_ms)

    def ask(self, now_ms: float) -> Ticket:
        """`query-migrate` is being sent now (all barriers that were wanted are set)."""
        self._asked, self._at_once, self._polled_ms = Ticket(self._epoch, now_ms), False, now_ms
        self.polls += 1
        return self._asked

    def answered(self, ticket: Ticket, answer: dict[str, Any] | None, now_ms: float) -> list[Action]:
        """Its reply came; None: an error (the agent or libvirt was away), nothing was learned."""
        if ticket is not self._asked:
            return []  # of before a reconnection
        self._asked = None
        if answer is None:
            return []
        before, self.now = self.now, progress(answer)
        if self.now.ended or (self._checkpointing and self.now.status == "none"):
            self.commit.stream_died(f"migration {self.now.status}")
            return []
        if self.now.status != "checkpointing" or self.now.checkpoints is None:
            return []
        self._checkpointing = True
        rose = before.checkpoints is not None and self.now.checkpoints > before.checkpoints
        if rose:
            self._sign_ms = now_ms
        actions = self.commit.counter_read(self.now.checkpoints, ticket.epoch, now_ms)
        self._awaits_ack = self._worth_asking(self.now.checkpoints, rose)
        return self._noted(actions)

    def _worth_asking(self, count: int, rose: bool) -> bool:
        """Whether an acknowledgement can come before the next RESUME that lets something leave.

        One is missing while the counter is further behind the RESUMEs than at rest. What rest is shows a rise between two
        readings without a RESUME, or a time from RESUME to RESUME without one; a RESUME that was lost, or somebody else's,
        changes it. Two acknowledgements are wanted behind a barrier and a capture begins only after the one before it: the
        first of them is not asked for.
        """
        behind = count - self.resumes
        if rose and self._resumes_read == self.resumes:
            self._at_rest = behind
        elif self._at_rest is not None and behind > self._at_rest:
            self._at_rest = None
        self._resumes_read = self.resumes
        if self._at_rest is None:
            return True
        missing, wanted = behind < self._at_rest, self.commit.covering_count
        if wanted is None or count + 1 < wanted:
            return False
        # At rest one short of what is wanted: the first reading had the barrier's own, or a lost RESUME made rest look lower.
        self._one_short += not missing
        if self._one_short >= LEARN_ANEW:
            self._at_rest, self._one_short = None, 0
        return missing or self._at_rest is None

    def resume_seen(self, now_ms: float) -> list[Action]:
        """A RESUME: a capture is over (or somebody continued the guest, which does no harm: a barrier too many)."""
        if self._at_rest is None and self._resumes_read == self.resumes and self.now.checkpoints is not None:
            self._at_rest = self.now.checkpoints - self.resumes
        self.resumes += 1
        if not self._awaits_ack:
            self._awaits_ack, self._awaits_since_ms = True, now_ms
        self._sign_ms = now_ms
        return self._noted(self.commit.capture_seen(now_ms))

    def reconnected(self) -> None:
        """Whoever carries our questions is new: what was asked will not be answered."""
        self._asked, self._at_once, self._awaits_ack, self._at_rest = None, True, True, None

    def _noted(self, actions: list[Action]) -> list[Action]:
        for action in actions:
            if isinstance(action, AskCount):
                self._epoch, self._at_once = action.epoch, True
        return actions


@dataclass(frozen=True, slots=True)
class Break:
    """Destroy the stream's socket on this host."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One command to the standby's monitor; its reply object comes back."""

    command: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Look again after ms."""

    ms: float


@dataclass(frozen=True, slots=True)
class Clock:
    """Tell the time: now, in ms, comes back."""


Take = Generator[Break | Ask | Wait | Clock, Any, str]


def take_over() -> Take:
    """Returns empty once the guest was read back as running, else why it does not run. The generation is won already."""
    start_ms = yield Clock()
    yield Break()
    while True:
        status = _status((yield Ask("query-status")))
        now_ms = yield Clock()
        if status in ("paused", "running"):
            break
        if status == "inmigrate" and now_ms - start_ms > RUNS_WITHIN_MS:
            return "the copy has loaded no checkpoint"
        if now_ms - start_ms > GIVE_UP_MS:
            return f"the copy's monitor does not answer ({status or 'silent'})"
        yield Wait(PAUSED_POLL_MS)
    while status != "running":
        yield Ask("cont")
        status = _status((yield Ask("query-status")))
        now_ms = yield Clock()
        if status != "running":
            if now_ms - start_ms > GIVE_UP_MS + RUNS_WITHIN_MS or status not in ("paused", ""):
                return f"the copy does not run: {status or 'its monitor is silent'}"
            yield Wait(RUNNING_POLL_MS)
    return ""


def _status(reply: dict[str, Any]) -> str:
    return str(reply.get("return", {}).get("status", "")) if isinstance(reply.get("return"), dict) else ""
