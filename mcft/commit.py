"""PURE: which epochs may leave (output commit). No I/O, no clock: fed with events and time, answers actions.

One `CommitGate` exists per (protection instance, generation, checkpoint stream). The network buffer outside
obeys its actions: `SetBarrier` ends the open epoch, `Release` lets everything before the barrier out. At most one
barrier is outstanding, because the kernel's plug qdisc counts no more; what would have been a second barrier
merges into the next epoch.

An epoch may leave when a checkpoint *captured after its barrier was set* is acknowledged, and the lease holds. That is one
gate for every engine; what differs is the answer to three questions (`protocol.md`, "Acknowledgement and release"):

| rule | what is a capture | what is an acknowledgement | which barrier does it cover |
|---|---|---|---|
| `marker` (engine `colo`) | a STOP | a RESUME whose marker said `colo` | one whose marker was answered before that RESUME |
| `count` (`colo`, late markers) | a STOP | the standby's count of loads rose | one behind which c was read, at c + 2 |
| `counter` (engine `mc`) | a RESUME, or the counter rose | `checkpoints` rose (it is acknowledged - 1) | the same: at c + 2 |

None of them compares clocks:

* **marker** (engine `colo`): behind the STOP of a capture a `query-status` goes down the same monitor connection. Only if its
  reply says `colo` *before* the RESUME is that RESUME a checkpoint's, and only a barrier whose marker was answered
  before that RESUME is covered by it.
* **count**, **counter**: barrier set, then a counter of acknowledged checkpoints is read = c; at counter ≥ c + 2 one whole
  checkpoint was captured and acknowledged after the barrier, for capture k + 1 starts only after acknowledgement k.
  `counter` belongs to one `migrate`: it never falls, and one that does is another stream's, so this one is dead.

Sources: QEMU `migration/colo.c` (STOP and RESUME around a checkpoint); Cully et al., Remus (NSDI 2008).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Rule = Literal["marker", "count", "counter"]
LATE_MARKERS_BEFORE_COUNTING = 2
PAUSED_RETRY_MS = 5.0


@dataclass(frozen=True, slots=True)
class SetBarrier:
    """End the open epoch here: what the guest sent so far is epoch `epoch`."""

    epoch: int


@dataclass(frozen=True, slots=True)
class SendMarker:
    """Send `query-status` down the monitor connection whose STOP was just read; answer with `marker_answered`.

    after_ms: how long to wait before sending (an operator paused the guest; asking at once would be a busy loop).
    """

    capture: int
    after_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class AskCount:
    """Ask for the count (of the standby's loads, or `checkpoints`) *from now on*; answer with `count_read` as answers come in.

    What was asked before this action must not answer it: its reading may be older than the barrier.
    """

    epoch: int


@dataclass(frozen=True, slots=True)
class Release:
    """Let out everything before the barrier of `epoch`, now."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """The standby holds a whole checkpoint whose capture followed the hold. count: how many so far."""

    count: int


Action = SetBarrier | SendMarker | AskCount | Release | Acknowledged


@dataclass(slots=True)
class _Barrier:
    epoch: int
    set_ms: float
    marker: int  # the capture whose marker went out behind this barrier
    marker_answered: bool = False
    count_at: int | None = None  # first count read after the barrier
    covered: bool = False  # acknowledged; leaves as soon as the lease allows


@dataclass
class CommitStats:
    """Counters for status; hold_ms is the time from a barrier to its release."""

    acknowledged: int = 0
    captures: int = 0
    foreign_resumes: int = 0
    late_markers: int = 0
    released_epochs: int = 0
    merged_epochs: int = 0
    waits_for_lease: int = 0


@dataclass
class CommitGate:
    """Decides barriers and releases for one stream. loss_ms is T, margin_ms covers clocks' drift and the send."""

    loss_ms: float
    margin_ms: float = 20.0
    on_hold_ms: Callable[[float], None] | None = None
    stats: CommitStats = field(default_factory=CommitStats)
    rule: Rule = "marker"
    _holding: bool = False
    _dead: str = ""
    _epoch: int = 0
    _capture: int = 0  # rises with every STOP
    _in_capture: bool = False
    _confirmed: bool = False  # the capture under way answered `colo`
    _late_running: int = 0
    _barrier: _Barrier | None = None
    _lease_until_ms: float = float("-inf")
    _counter: int = -1  # rule `counter`: the newest reading

    # ---- what happened ----

    def hold(self) -> None:
        """The buffer holds from now on. Captures that began before don't count, nor do their answers."""
        self._holding, self._in_capture, self._confirmed = True, False, False

    def stop_seen(self, now_ms: float) -> list[Action]:
        """A STOP on the monitor: a capture began, or an operator paused the guest; the marker will tell."""
        if self._dead or not self._holding:
            return []
        self._capture += 1
        self._in_capture, self._confirmed = True, False
        self.stats.captures += 1
        actions: list[Action] = []
        if self._barrier is None:
            self._epoch += 1
            self._barrier = _Barrier(self._epoch, now_ms, self._capture)
            actions.append(SetBarrier(self._epoch))
            if self.rule == "count":
                actions.append(AskCount(self._epoch))
        else:
            self.stats.merged_epochs += 1
        actions.append(SendMarker(self._capture))
        return actions

    def capture_seen(self, now_ms: float) -> list[Action]:
        """Rule `counter`: a RESUME, so a capture has just ended; what the guest sent up to now is an epoch."""
        if self._dead or not self._holding:
            return []
        self.stats.captures += 1
        if self._barrier is not None:
            self.stats.merged_epochs += 1
            return []
        return self._set_counted_barrier(now_ms)

    def _set_counted_barrier(self, now_ms: float) -> list[Action]:
        self._epoch += 1
        self._barrier = _Barrier(self._epoch, now_ms, self._capture)
        return [SetBarrier(self._epoch), AskCount(self._epoch)]

    def counter_read(self, count: int, epoch_asked: int, now_ms: float) -> list[Action]:
        """Rule `counter`: `checkpoints` as a `query-migrate` said it that was *sent* after `AskCount(epoch_asked)`.

        A rise without a RESUME (an event may be lost) is a capture's sign too.
        """
        if self._dead or not self._holding:
            return []
        if count < self._counter:
            self.stream_died(f"the counter fell from {self._counter} to {count}: another migrate")
            return []
        rise = count - self._counter if self._counter >= 0 else 0
        self._counter = count
        barrier = self._barrier
        if barrier is None:
            # The rise that releases an epoch comes with its barrier still there: a RESUME was missed.
            actions = self._set_counted_barrier(now_ms) if rise else []
            return [*actions, *self._more_acknowledged(rise)]
        if barrier.covered or not self._two_more(barrier, count, epoch_asked):
            return self._more_acknowledged(rise)
        barrier.covered = True
        acknowledged = self._more_acknowledged(rise if self.stats.acknowledged else 1, first=True)
        return [*self._release_if_allowed(now_ms), *acknowledged]

    def _more_acknowledged(self, rise: int, *, first: bool = False) -> list[Action]:
        """Rule `counter`: nothing counts before the first checkpoint whose capture followed the hold."""
        if not rise or not (first or self.stats.acknowledged):
            return []
        self.stats.acknowledged += rise
        return [Acknowledged(self.stats.acknowledged)]

    def marker_answered(self, capture: int, status: str, now_ms: float) -> list[Action]:
        """The reply to the marker of `capture`: status is `query-status`' (`colo` inside a checkpoint)."""
        barrier = self._barrier
        if barrier is not None and barrier.marker == capture:
            barrier.marker_answered = True
        if self._in_capture and capture == self._capture:
            if status == "colo":
                self._confirmed = True
                self._late_running = 0
                self.rule = "marker"
                return []
            if status == "paused":
                return [SendMarker(capture, PAUSED_RETRY_MS)]
        elif capture == self._capture and not self._in_capture:
            return self._marker_was_late(now_ms)
        return []

    def _marker_was_late(self, now_ms: float) -> list[Action]:
        self.stats.late_markers += 1
        self._late_running += 1
        if self._late_running < LATE_MARKERS_BEFORE_COUNTING or self.rule == "count":
            return []
        self.rule = "count"
        barrier = self._barrier
        return [AskCount(barrier.epoch)] if barrier is not None and not barrier.covered else []

    def resume_seen(self, now_ms: float) -> list[Action]:
        """A RESUME on the monitor: an acknowledgement only if the capture's marker said `colo` before it."""
        confirmed, was_in_capture = self._confirmed, self._in_capture
        self._in_capture, self._confirmed = False, False
        if self._dead or not self._holding:
            return []
        if not (was_in_capture and confirmed):
            self.stats.foreign_resumes += 1
            return []
        self.stats.acknowledged += 1
        barrier = self._barrier
        if barrier is not None and barrier.marker_answered:
            barrier.covered = True
        return [*self._release_if_allowed(now_ms), Acknowledged(self.stats.acknowledged)]

    def count_read(self, count: int, epoch_asked: int, now_ms: float) -> list[Action]:
        """A count of acknowledged checkpoints that was read *after* `AskCount(epoch_asked)` went out."""
        barrier = self._barrier
        if self._dead or barrier is None or barrier.covered or not self._two_more(barrier, count, epoch_asked):
            return []
        barrier.covered = True
        self.stats.acknowledged += 1
        return [*self._release_if_allowed(now_ms), Acknowledged(self.stats.acknowledged)]

    @staticmethod
    def _two_more(barrier: _Barrier, count: int, epoch_asked: int) -> bool:
        """Whether two acknowledgements came since the first count that was read behind this barrier."""
        if barrier.epoch != epoch_asked:
            return False
        if barrier.count_at is None or count < barrier.count_at:
            barrier.count_at = count
            return False
        return count >= barrier.count_at + 2

    def lease_renewed(self, sent_ms: float, now_ms: float) -> list[Action]:
        """The standby echoed `armed(g)` to the keepalive that was sent at sent_ms (our clock)."""
        self._lease_until_ms = max(self._lease_until_ms, sent_ms + self.loss_ms - self.margin_ms)
        return self._release_if_allowed(now_ms)

    def lease_withdrawn(self) -> None:
        """The standby says `claiming`, or anything but `armed(g)`: no release until it says armed again."""
        self._lease_until_ms = float("-inf")

    def stream_died(self, reason: str) -> None:
        """COLO_EXIT, a disk error, our own yank: nothing is acknowledged on this stream any more. Sticky."""
        self._dead = self._dead or reason
        if self._barrier is not None and not self._barrier.covered:
            self._barrier.marker_answered = False

    def monitor_reconnected(self) -> None:
        """A new monitor connection voids all markers; an uncovered barrier waits for a marker of its own again."""
        self._in_capture, self._confirmed = False, False
        if self._barrier is not None and not self._barrier.covered:
            # Its marker will never be answered; the next capture's marker follows the barrier too.
            self._barrier.marker = self._capture + 1
            self._barrier.marker_answered = False

    # ---- what is so ----

    @property
    def lease_until_ms(self) -> float:
        """The end of the lease; -inf where there is none."""
        return self._lease_until_ms

    def lease_holds(self, now_ms: float) -> bool:
        """Whether a release is allowed now. Exclusive at the end: the standby may act at that very instant."""
        return now_ms < self._lease_until_ms

    @property
    def dead(self) -> str:
        """Why this stream can't acknowledge any more; empty while it can."""
        return self._dead

    @property
    def outstanding(self) -> bool:
        """Whether a barrier waits for its acknowledgement or its lease."""
        return self._barrier is not None

    @property
    def covering_count(self) -> int | None:
        """Rules `count` and `counter`: the reading that will cover the outstanding barrier; None: none, or unknown yet."""
        barrier = self._barrier
        return None if barrier is None or barrier.covered or barrier.count_at is None else barrier.count_at + 2

    @property
    def in_capture(self) -> bool:
        """Whether a STOP was seen and its RESUME not yet."""
        return self._in_capture

    def _release_if_allowed(self, now_ms: float) -> list[Action]:
        barrier = self._barrier
        if barrier is None or not barrier.covered:
            return []
        if not self.lease_holds(now_ms):
            self.stats.waits_for_lease += 1
            return []
        self._barrier = None
        self.stats.released_epochs += 1
        if self.on_hold_ms is not None:
            self.on_hold_ms(now_ms - barrier.set_ms)
        return [Release(barrier.epoch)]
