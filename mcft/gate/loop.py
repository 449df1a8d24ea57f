"""One plain `selectors` loop with timers, and generators as its only kind of task. Nothing here knows what a gate is.

A task is a generator that yields what it waits for: `Commands` (sent down the monitor in one go; the list of replies
comes back), `Until` (a condition, looked at every turn, with a deadline; True or False comes back).
"""

from __future__ import annotations

import heapq
import itertools
import selectors
import socket
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

IDLE_MS = 1000.0


def boottime_ms() -> float:
    """CLOCK_BOOTTIME in milliseconds: it goes on while the host sleeps, and never steps."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) / 1e6


@dataclass(frozen=True, slots=True)
class Commands:
    """QMP commands, (name, arguments) each, sent without waiting in between."""

    commands: list[tuple[str, dict[str, Any]]]
    fds: tuple[int, ...] = ()
    oob: bool = False


@dataclass(frozen=True, slots=True)
class Until:
    """Wait until the condition holds, at most until deadline_ms."""

    condition: Callable[[], bool]
    deadline_ms: float


Task = Generator[Commands | Until, Any, Any]


@dataclass
class Loop:
    """`run` until `stop`; `after` for timers; `watch` for sockets; `spawn` for tasks."""

    send_commands: Callable[[Commands, Callable[[list[dict[str, Any]]], None]], None]
    latest_ms: Callable[[], float] = lambda: float("inf")  # by when to turn, where neither timer nor socket will tell
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    running: bool = True
    _timers: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _order: Any = field(default_factory=itertools.count)
    _waiting: list[tuple[Until, Task]] = field(default_factory=list)

    def watch(self, sock: socket.socket | int, events: int, handler: Callable[[int], None]) -> None:
        """Call handler(events) when the socket is ready; watching it again changes what is watched."""
        try:
            self.selector.modify(sock, events, handler)
        except KeyError:
            self.selector.register(sock, events, handler)

    def forget(self, sock: socket.socket | int) -> None:
        """Stop watching; unknown sockets are fine."""
        try:
            self.selector.unregister(sock)
        except (KeyError, ValueError):
            return

    def after(self, delay_ms: float, call: Callable[[], None]) -> int:
        """Call once, delay_ms from now; what `cancel` wants to know."""
        number: int = next(self._order)
        heapq.heappush(self._timers, (boottime_ms() + delay_ms, number, call))
        return number

    def cancel(self, number: int) -> None:
        """That call is not made; fine if it was."""
        self._timers = [timer for timer in self._timers if timer[1] != number]
        heapq.heapify(self._timers)

    def spawn(self, task: Task) -> None:
        """Start a task at once; it runs up to its first wait."""
        self._step(task, None)

    def _step(self, task: Task, value: Any) -> None:
        while True:
            try:
                wanted = task.send(value)
            except StopIteration:
                return
            if isinstance(wanted, Commands):
                self.send_commands(wanted, lambda replies: self._step(task, replies))
                return
            if not wanted.condition():
                self._waiting.append((wanted, task))
                return
            value = True

    def timeout_ms(self) -> float:
        """How long the next turn may wait for a socket."""
        if self._waiting:
            return 1.0
        due_ms = min(self._timers[0][0] if self._timers else float("inf"), self.latest_ms())
        return min(IDLE_MS, max(0.0, due_ms - boottime_ms()))

    def turn(self, on_turn: Callable[[float], None]) -> None:
        """Wait for the next thing, then let everything that is due happen."""
        ready = self.selector.select(self.timeout_ms() / 1000)
        on_turn(boottime_ms())
        for key, events in ready:
            key.data(events)
        now = boottime_ms()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()
        waiting, self._waiting = self._waiting, []
        for until, task in waiting:
            if until.condition():
                self._step(task, True)
            elif now >= until.deadline_ms:
                self._step(task, False)
            else:
                self._waiting.append((until, task))
