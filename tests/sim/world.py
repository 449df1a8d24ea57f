"""Stands in for time, the machine and the cables: one queue of events, two hosts, two links, all chances from one seed.

A *step* is one event taken from the queue: a datagram that arrives, a turn of a gate's loop, a callback of an agent's loop, a
message of QEMU's, a guest's tick, a fault. Everything that a process does belongs to a `Proc`: a dead one's events are
dropped without running any of its code (SIGKILL, power loss), a halted one's are kept until it goes on (SIGSTOP, a frozen host).
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.sim.files import Files
    from tests.sim.machine import Machine


class Here:
    """Whose code runs now; the patched clocks, files and processes of the product ask this."""

    host: Host
    world: World


here = Here()


class Violation(AssertionError):
    """An invariant that does not hold. kind: which one."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind, self.text = kind, text
        # The product may catch it as any exception: the world remembers the first.
        here.world.found = here.world.found or self


class Proc:
    """What can die or stand still: a process, a host's kernel, a daemon."""

    __slots__ = ("alive", "deferred", "halted", "halted_at", "host", "name", "on_death", "pid", "start")

    def __init__(self, host: Host, name: str) -> None:
        self.host, self.name = host, name
        self.alive, self.halted = True, 0
        self.deferred: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self.on_death: list[Callable[[], None]] = []
        host.procs.append(self)
        self.pid, self.start = host.next_pid()
        self.halted_at = 0.0
        if host.frozen:
            self.halt()

    def kill(self) -> None:
        """SIGKILL: nothing of its own code runs any more; the kernel tells who waits for its end."""
        if not self.alive:
            return
        self.alive = False
        self.deferred.clear()
        if self in self.host.procs:
            self.host.procs.remove(self)
        told, self.on_death = self.on_death, []
        for tell in told:
            tell()

    def halt(self) -> None:
        if not self.halted:
            self.halted_at = self.host.world.now
        self.halted += 1

    def go_on(self) -> None:
        self.halted -= 1
        if not self.halted:
            if self.name == "gate" and self.host.world.now - self.halted_at > 99.0:  # T/3: a stall
                self.host.machine.awake_since = self.host.world.now
            deferred, self.deferred = self.deferred, []
            for call, arguments in deferred:
                self.host.world.at(0.0, self, call, *arguments)


class Host:
    """One of the two machines. Its clocks are its own; what is not on its disk goes with its power."""

    def __init__(self, world: World, name: str, number: int) -> None:
        self.world, self.name, self.number = world, name, number
        self.procs: list[Proc] = []
        self.frozen = False
        self.deaf = False  # frozen, and what comes in meanwhile is lost
        self.up = False
        self.boot = 0
        self.rate = 1.0
        self.wall_ms = 1.7e12
        self.booted_at = 0.0
        self._pid = 1000 * (number + 1)
        self.other: Host
        self.files: Files
        self.machine: Machine

    def next_pid(self) -> tuple[int, int]:
        self._pid += 1
        return self._pid, int(self.world.now) + 7

    def boottime_ms(self) -> float:
        return 5000.0 + (self.world.now - self.booted_at) * self.rate

    def process(self, pid: int) -> Proc | None:
        return next((proc for proc in self.procs if proc.pid == pid), None)

    def freeze(self) -> None:
        if not self.frozen:
            self.frozen = True
            for proc in self.procs:
                proc.halt()

    def thaw(self) -> None:
        """The kernel first: what came in meanwhile waits in the sockets before any process looks."""
        self.deaf = False
        if self.frozen:
            self.frozen = False
            for proc in sorted(self.procs, key=lambda proc: proc.name != "kernel"):
                proc.go_on()


class Link:
    """One cable between the hosts: number 0 replication, 1 LAN. Each direction fails by itself."""

    def __init__(self) -> None:
        self.up = [True, True]  # by sending host
        self.loss = self.double = 0.0
        self.late_ms = 0.0
        self.waiting: list[tuple[int, Callable[[], None]]] = []  # TCP's retransmissions: (sending host, what arrives)

    @property
    def clean(self) -> bool:
        return self.up == [True, True] and not (self.loss or self.double or self.late_ms)


class World:
    """See the module's text. trace: keep what happened as lines (time, who, what)."""

    def __init__(self, seed: int, *, trace: bool = False) -> None:
        self.rng = random.Random(seed)
        self.seed, self.now, self.steps = seed, 0.0, 0
        self.queue: list[tuple[float, int, Proc, Callable[..., None], tuple[Any, ...]]] = []
        self._order = 0
        self.over = False
        self.found: Violation | None = None
        self.trace: list[str] | None = [] if trace else None
        self.counts: dict[str, int] = {}
        self.slow_monitor_ms = self.slow_store_ms = self.double_calls = 0.0
        self.slow_commit = 1.0
        self.auto_protect = True
        self.arbiter = "standby"
        self.release_is_kernels = False  # as with plug: at once; else QEMU comes to it when it can, and the tap has a lease
        self.mended = 0
        self.moments: dict[str, list[Callable[[Host], None]]] = {"record": [], "commit": [], "committed": [], "acknowledged": []}
        self.fence_works, self.fence_lies = [True, True], False
        self.hosts = [Host(self, "host1", 0), Host(self, "host2", 1)]
        self.hosts[0].other, self.hosts[1].other = self.hosts[1], self.hosts[0]
        self.links = [Link(), Link()]
        self.outside = Proc(Host(self, "outside", 2), "world")
        here.world, here.host = self, self.hosts[0]

    def note(self, who: str, what: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.now:10.2f}  {who:<14} {what}")

    def count(self, kind: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def at(self, delay_ms: float, proc: Proc, call: Callable[..., None], *arguments: Any) -> None:
        """Let proc do this in delay_ms."""
        self._order += 1
        heapq.heappush(self.queue, (self.now + delay_ms, self._order, proc, call, arguments))

    def run(self, until_ms: float) -> None:
        """Everything that is due until then."""
        queue, pop = self.queue, heapq.heappop
        while queue and queue[0][0] <= until_ms:
            at, _, proc, call, arguments = pop(queue)
            if not proc.alive:
                continue
            if proc.halted:
                proc.deferred.append((call, arguments))
                continue
            self.now = at
            here.host = proc.host
            self.steps += 1
            call(*arguments)
            if self.found is not None:
                raise self.found
        self.now = max(self.now, until_ms)

    def moment(self, kind: str, host: Host) -> None:
        """Something has just happened there that a fault waits for."""
        if waiting := self.moments[kind]:
            self.moments[kind] = []
            for call in waiting:
                self.at(0.0, self.outside, call, host)

    # ---- the cables ----

    def datagram(self, number: int, sender: Host, call: Callable[[bytes], None], data: bytes) -> None:
        """UDP: lost where the cable is cut when it leaves or arrives; perhaps doubled, late, overtaken."""
        link, rng = self.links[number], self.rng
        if not link.up[sender.number] or (link.loss and rng.random() < link.loss) or sender.other.deaf:
            return
        times = 2 if link.double and rng.random() < link.double else 1
        for _ in range(times):
            delay = 0.1 + rng.random() * 0.4
            if link.late_ms and rng.random() < 0.3:
                delay += rng.random() * link.late_ms
            self.at(delay, sender.other.machine.kernel, self._arrive, link, sender, call, data)

    def _arrive(self, link: Link, sender: Host, call: Callable[[bytes], None], data: bytes) -> None:
        if link.up[sender.number]:
            call(data)

    def stream(self, number: int, sender: Host, call: Callable[[], None], receiver: Proc) -> None:
        """TCP: arrives whole, if late; while the cable is cut (either way: no acknowledgement comes back) it waits."""
        link = self.links[number]
        if not (link.up[0] and link.up[1]):
            link.waiting.append((sender.number, lambda: self.stream(number, sender, call, receiver)))
            return
        delay = 0.1 + self.rng.random() * 0.4
        if link.loss and self.rng.random() < link.loss:
            delay += 200.0 * self.rng.random()
        self.at(delay, receiver, self._stream_arrive, number, sender, call, receiver)

    def _stream_arrive(self, number: int, sender: Host, call: Callable[[], None], receiver: Proc) -> None:
        link = self.links[number]
        if link.up[0] and link.up[1]:
            call()
        else:
            link.waiting.append((sender.number, lambda: self.stream(number, sender, call, receiver)))

    def cut(self, number: int, directions: tuple[bool, bool]) -> None:
        """directions: which of the two still carry."""
        link = self.links[number]
        link.up = list(directions)
        if link.up == [True, True]:
            waiting, link.waiting = link.waiting, []
            for _, again in waiting:
                self.at(self.rng.random() * 200.0, self.outside, again)
