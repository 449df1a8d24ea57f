"""How far apart checkpoints must be for the guest to run between them.

QEMU's `x-checkpoint-delay` is a period, of which a checkpoint's own time is a part: the timer is armed again as one begins
(`colo_checkpoint_notify_timer`), and if it fires before that one's end, the next begins at once. A standby that needs longer
than the delay to load (its host is busy, or the guest changes much memory) would leave the guest on the primary no time at
all, though every checkpoint is acknowledged and everybody calls it protected.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

WINDOW = 9  # checkpoints that are looked at; their medians count, so that one long pause (a host that froze) is none
LEAST_SHARE = 0.25  # of the time, which the guest runs: below, the period is stretched
PAUSES = 2.0  # periods that were stretched are this many pauses long: the guest runs half the time
RELIEF = 0.25  # of the period, which checkpoints take: below, what was stretched comes back
MOST_MS = 2000.0  # not stretched further: a loss would be seen that much later, and answers wait for it
STEP_MS = 10.0


@dataclass(frozen=True, slots=True)
class Change:
    """period_ms: the right one. Why: what a checkpoint takes (pause_ms), and the guest's share of the time (0 to 1)."""

    period_ms: float
    pause_ms: float
    share: float


class Pace:
    """Fed with the times of QEMU's STOP and RESUME; says which period (ms) would be right, where it should change.

    asked_ms: the operator's delay, below which a period never is. period_ms: QEMU's now.
    """

    def __init__(self, asked_ms: float, period_ms: float) -> None:
        self.asked_ms, self.period_ms = asked_ms, period_ms
        self._rounds: deque[tuple[float, float]] = deque(maxlen=WINDOW)  # ran, stood
        self._resumed_ms = 0.0

    def checkpoint(self, stop_ms: float, resume_ms: float) -> Change | None:
        """One checkpoint's pause, by QEMU's clock (ms)."""
        if 0 < self._resumed_ms <= stop_ms <= resume_ms:
            self._rounds.append((stop_ms - self._resumed_ms, resume_ms - stop_ms))
        self._resumed_ms = resume_ms
        if len(self._rounds) < WINDOW:
            return None
        ran_ms, pause_ms = (sorted(times)[WINDOW // 2] for times in zip(*self._rounds, strict=True))
        share = ran_ms / max(ran_ms + pause_ms, 1e-9)
        wanted_ms = self._wanted_ms(pause_ms, share)
        if wanted_ms == self.period_ms:
            return None
        self._rounds.clear()  # what is seen next is judged by itself
        return Change(wanted_ms, pause_ms, share)

    def _wanted_ms(self, pause_ms: float, share: float) -> float:
        right_ms = math.ceil(PAUSES * pause_ms / STEP_MS) * STEP_MS
        if share < LEAST_SHARE:
            return max(self.period_ms, min(right_ms, MOST_MS))
        if self.period_ms > self.asked_ms and pause_ms < RELIEF * self.period_ms:
            return max(self.asked_ms, min(right_ms, self.period_ms))
        return self.period_ms
