"""`make sim-exhaustive`: every interleaving up to a depth, of the pure rules in small worlds.

Five worlds, each with the product's own decision code as its sides:

* *commit*: `CommitGate` between QEMU's monitor, the buffer, the lease and a standby that may claim; *lease* and *counting*
  are the same with less in them, so that they are walked deeper.
* *records*: two `Ledger`s with the rules of `generations.py`, messages that come late, twice, never or in any order, and ends
  of either side's agent and QEMU between any two acts.
* *etcd*: two `EtcdClaim`s and an etcd, requests and answers lost, late or carried out after the timeout, agents that end.

A state that was seen before is not walked again; what counts is how many different ones there are. 1: a counter-example, told
as the list of moves that leads to it.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from mcft import generations
from mcft.commit import AskCount, CommitGate, CommitStats, Release, SendMarker, SetBarrier
from mcft.generations import IllegalRecord, Kind, Ledger

T, MARGIN = 3.0, 1.0  # the lease, in the commit world's ticks


class Broken(Exception):
    """A counter-example's last word."""


class Small(Protocol):
    def key(self) -> Any: ...
    def moves(self) -> Iterator[tuple[str, Callable[[Any], None]]]: ...
    def clone(self) -> Any: ...
    def check(self) -> None: ...


@dataclass
class Explored:
    states: int = 0
    transitions: int = 0
    depth: int = 0
    whole: bool = False
    broken: str = ""
    path: tuple[str, ...] = ()


def explore(start: Small, depth: int, within_s: float = 1e9) -> Explored:
    """Breadth first, so that a counter-example is a shortest one."""
    found = Explored(states=1)
    seen = {start.key()}
    layer: list[tuple[Small, Any]] = [(start, None)]
    end = time.monotonic() + within_s
    while layer and found.depth < depth:
        found.depth += 1
        following: list[tuple[Small, Any]] = []
        for state, path in layer:
            if time.monotonic() > end:
                found.depth -= 1
                return found
            for name, move in state.moves():
                after = state.clone()
                found.transitions += 1
                try:
                    move(after)
                    after.check()
                except (Broken, AssertionError) as error:
                    found.broken, found.path = str(error), _unrolled((name, path))
                    return found
                key = after.key()
                if key not in seen:
                    seen.add(key)
                    found.states += 1
                    following.append((after, (name, path)))
        layer = following
    found.whole = not layer
    return found


def _unrolled(path: Any) -> tuple[str, ...]:
    names = []
    while path is not None:
        names.append(path[0])
        path = path[1]
    return tuple(reversed(names))


# ---- commit ----


@dataclass
class CommitWorld:
    """A guest that counts, QEMU, the order of its monitor, a buffer, keepalives, and a standby."""

    gate: CommitGate = field(default_factory=lambda: CommitGate(loss_ms=T, margin_ms=MARGIN))
    packets: int = 2  # that the guest may still send
    captures: int = 2
    operators: int = 1
    ticks: int = 4
    breaks: int = 1
    claims: bool = True
    now: float = 0.0
    sent: int = 0  # newest packet
    status: str = "running"
    captured: int = -1
    copy: int = 0  # what the standby has loaded
    loads: int = 0
    monitor: tuple[tuple[str, int, str], ...] = ()  # what QEMU wrote, not read yet
    markers: tuple[int, ...] = ()  # asked, not handled yet
    open: int = 0  # newest packet in the open epoch
    held: int = 0
    out: int = 0
    echoes: tuple[float, ...] = ()  # `armed` echoes under way: when the keepalive had been sent
    echoed: float = -9.0  # newest armed echo that left
    claiming: bool = False
    taken: bool = False
    count_asked: int = 0
    count_answers: tuple[tuple[int, int], ...] = ()

    def clone(self) -> CommitWorld:
        gate = copy.copy(self.gate)
        gate.stats = CommitStats(acknowledged=self.gate.stats.acknowledged)
        gate._barrier = copy.copy(self.gate._barrier)
        return replace(self, gate=gate)

    def key(self) -> Any:
        g, b = self.gate, self.gate._barrier
        barrier = None if b is None else (b.epoch, b.marker, b.marker_answered, b.count_at, b.covered)
        inside = (g.rule, g._dead, g._epoch, g._capture, g._in_capture, g._confirmed, g._late_running, barrier, g._lease_until_ms)
        return (inside, self.packets, self.captures, self.operators, self.ticks, self.breaks,
                self.now, self.sent, self.status, self.captured,
                self.copy, self.loads, self.monitor, self.markers, self.open, self.held, self.out, self.echoes, self.echoed,
                self.claiming, self.taken, self.count_asked, self.count_answers)  # fmt: skip

    def check(self) -> None:
        if self.out > self.copy:
            raise Broken(f"packet {self.out} is out, the standby has {self.copy}")

    def moves(self) -> Iterator[tuple[str, Callable[[CommitWorld], None]]]:
        if self.status == "running" and self.packets:
            yield "the guest sends", CommitWorld._send
        if self.status == "running" and self.captures:
            yield "QEMU captures", CommitWorld._capture
        if self.status == "colo":
            yield "the standby has loaded", CommitWorld._loaded
        if self.status == "running" and self.operators:
            yield "virsh suspend", CommitWorld._suspend
        if self.status == "paused":
            yield "virsh resume", CommitWorld._resume
        if self.markers:
            yield "QEMU answers the marker", CommitWorld._answer
        if self.monitor:
            yield f"the gate reads {self.monitor[0][0]}", CommitWorld._read
        if self.ticks:
            yield "time passes", CommitWorld._tick
        if self.claims and not self.claiming and self.echoed < self.now:
            yield "the standby echoes armed", CommitWorld._echo
        if self.echoes:
            yield "the echo arrives", CommitWorld._echo_arrives
        if self.claims and not self.claiming:
            yield "the standby claims", CommitWorld._claim
        if self.claiming and not self.taken and self.now >= self.echoed + T:
            yield "the standby takes over", CommitWorld._take
        if self.count_asked:
            yield "the standby's gate tells its count", CommitWorld._count
        if self.count_answers:
            yield "the count arrives", CommitWorld._count_arrives
        if self.breaks and (self.monitor or self.markers):
            yield "the monitor breaks", CommitWorld._reconnect

    def _send(self) -> None:
        self.packets -= 1
        self.sent += 1
        self.open = self.sent

    def _capture(self) -> None:
        self.captures -= 1
        self.status, self.captured = "colo", self.sent
        self.monitor += (("STOP", 0, ""),)

    def _loaded(self) -> None:
        if self.taken:
            return
        self.copy, self.loads, self.status = self.captured, self.loads + 1, "running"
        self.monitor += (("RESUME", 0, ""),)

    def _suspend(self) -> None:
        self.operators -= 1
        self.status = "paused"
        self.monitor += (("STOP", 0, ""),)

    def _resume(self) -> None:
        self.status = "running"
        self.monitor += (("RESUME", 0, ""),)

    def _answer(self) -> None:
        self.monitor += (("reply", self.markers[0], self.status),)
        self.markers = self.markers[1:]

    def _read(self) -> None:
        (what, number, status), self.monitor = self.monitor[0], self.monitor[1:]
        if what == "STOP":
            self._apply(self.gate.stop_seen(self.now))
        elif what == "RESUME":
            self._apply(self.gate.resume_seen(self.now))
        else:
            self._apply(self.gate.marker_answered(number, status, self.now))

    def _apply(self, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, SetBarrier):
                self.held, self.open = max(self.held, self.open), 0
            elif isinstance(action, SendMarker):
                self.markers += (action.capture,)
            elif isinstance(action, Release):
                self.out, self.held = max(self.out, self.held), 0
                if self.taken:
                    raise Broken("a release after the standby took over")
            elif isinstance(action, AskCount):
                self.count_asked = action.epoch

    def _tick(self) -> None:
        self.ticks -= 1
        self.now += 1

    def _echo(self) -> None:
        # The keepalive that it answers left at most a moment before: the worst for us is now.
        self.echoed = self.now
        self.echoes += (self.now,)

    def _echo_arrives(self) -> None:
        sent, self.echoes = self.echoes[0], self.echoes[1:]
        self._apply(self.gate.lease_renewed(sent, self.now))

    def _claim(self) -> None:
        self.claiming = True

    def _take(self) -> None:
        self.taken = True

    def _count(self) -> None:
        self.count_answers += ((self.loads, self.count_asked),)
        self.count_asked = 0

    def _count_arrives(self) -> None:
        (count, epoch), self.count_answers = self.count_answers[0], self.count_answers[1:]
        self._apply(self.gate.count_read(count, epoch, self.now))

    def _reconnect(self) -> None:
        self.breaks -= 1
        self.monitor, self.markers = (), ()
        self.gate.monitor_reconnected()


def commit_world() -> CommitWorld:
    """A little of everything."""
    world = CommitWorld()
    world.gate.hold()
    return world


def lease_world() -> CommitWorld:
    """One checkpoint, and time."""
    world = CommitWorld(packets=1, captures=1, operators=0, breaks=0, ticks=6)
    world.gate.hold()
    return world


def counting_world() -> CommitWorld:
    """Markers come late: by loads. The lease holds."""
    world = CommitWorld(packets=3, captures=4, operators=0, breaks=0, ticks=0, claims=False)
    world.gate.hold()
    world.gate.rule = "count"
    world.gate.lease_renewed(1e6, 0.0)
    return world


# ---- records ----


@dataclass
class RecordsWorld:
    """The two agents' order of acts around the real ledgers and rules. Acts and answers come after their record."""

    primary: tuple[str, ...] = ("preparing",)
    standby: tuple[str, ...] = ("preparing",)
    primary_next: tuple[str, ...] = ()  # records of g + 1
    standby_next: tuple[str, ...] = ()
    messages: frozenset[tuple[str, ...]] = frozenset()
    gate: str = "hold"  # the primary's: hold, closed, open
    runs: bool = False  # the copy
    primary_qemu: bool = True
    standby_qemu: bool = True
    stream: bool = True
    resolving: bool = False
    claiming: bool = False
    crashes: int = 2
    losses: int = 2

    def clone(self) -> RecordsWorld:
        return replace(self)

    def key(self) -> Any:
        return (self.primary, self.standby, self.primary_next, self.standby_next, self.messages, self.gate, self.runs,
                self.primary_qemu, self.standby_qemu, self.stream, self.resolving, self.claiming, self.crashes,
                self.losses)  # fmt: skip

    def ledger(self, side: generations.Side) -> Ledger:
        own, following = (self.primary, self.primary_next) if side == "primary" else (self.standby, self.standby_next)
        rows = [(1, k) for k in own] + [(3, "spoken") if k == "spoken3" else (2, k) for k in following]
        return Ledger.load("pid", side, 1, rows)

    def _write(self, side: generations.Side, kind: Kind, g: int = 1) -> bool:
        try:
            self.ledger(side).check(kind, g)
        except IllegalRecord:
            return False
        word = "spoken3" if g == 3 else kind.value
        if side == "primary":
            if g == 1:
                self.primary += () if word in self.primary else (word,)
            else:
                self.primary_next += () if word in self.primary_next else (word,)
        elif g == 1:
            self.standby += () if word in self.standby else (word,)
        else:
            self.standby_next += () if word in self.standby_next else (word,)
        return True

    def check(self) -> None:
        given_back = "resigned" in self.standby_next
        if "solo" in self.primary and "taken" in self.standby and not given_back:
            raise Broken("solo(1) and taken(1)")
        if "taken" in self.standby and "given-up" in self.standby:
            raise Broken("taken(1) and given-up(1)")
        if self.gate == "open" and self.primary_qemu and self.runs:
            raise Broken("two run free")
        armed = "arming" in self.primary
        if self.gate == "open" and armed and not {"solo", "ended"} & set(self.primary) and "taken" not in self.primary_next:
            raise Broken("the buffer is open after arming without a win")
        if self.runs and "armed" not in self.standby:
            raise Broken("an unarmed copy runs")
        if self.runs and "taken" not in self.standby:
            raise Broken("a copy runs without taken(1)")

    def moves(self) -> Iterator[tuple[str, Callable[[RecordsWorld], None]]]:
        primary, standby = self.ledger("primary"), self.ledger("standby")
        if primary.newest is Kind.PREPARING and self.gate == "hold":
            yield "primary: arming(1), ARM", RecordsWorld._arm
            yield "primary: the set-up fails, undone", RecordsWorld._undo
        if primary.newest in (Kind.ARMING, Kind.PROTECTED, Kind.DIED) and not self.resolving:
            yield "primary: a verdict: closed, resolving", RecordsWorld._verdict
        if self.resolving and not primary.won and primary.newest is not Kind.LOST:
            yield "primary: asks to give up", RecordsWorld._ask
        if primary.newest is Kind.LOST and self.resolving:
            yield "primary: asks how it goes there", RecordsWorld._ask_state
        if primary.won and not primary.spoken:
            yield "primary: spoken, opens", RecordsWorld._open
        if self.standby_qemu and not self.claiming and standby.newest is Kind.ARMED:
            yield "standby: claims", RecordsWorld._claim
        if self.claiming:
            yield "standby: taken(1)", RecordsWorld._taken
        if standby.newest is Kind.TAKEN and not standby.resigned_win and not standby.spoken:
            yield "standby: goes on with what it took", RecordsWorld._go_on
        for message in sorted(self.messages):
            yield f"{message[0]} arrives", lambda w, m=message: w._arrives(m, once=True)  # type: ignore[misc]
            yield f"{message[0]} arrives, and once more later", lambda w, m=message: w._arrives(m, once=False)  # type: ignore[misc]
            if self.losses:
                yield f"{message[0]} is lost", lambda w, m=message: w._lost(m)  # type: ignore[misc]
        if self.crashes:
            yield "primary: the agent ends and comes back", RecordsWorld._primary_back
            yield "standby: the agent ends and comes back", RecordsWorld._standby_back
        if self.primary_qemu and self.crashes:
            yield "primary: QEMU is gone", RecordsWorld._primary_dies
        if self.standby_qemu and self.crashes:
            yield "standby: QEMU is gone", RecordsWorld._standby_dies

    # the primary's acts

    def _arm(self) -> None:
        self._write("primary", Kind.ARMING)
        self.messages |= {("ARM",)}

    def _undo(self) -> None:
        if not generations.may_open_primary(self.ledger("primary")):
            self.gate = "open"

    def _verdict(self) -> None:
        self.gate, self.stream, self.resolving = "closed", False, True

    def _ask(self) -> None:
        self.messages |= {("give-up?", "runs" if self.primary_qemu else "gone")}

    def _ask_state(self) -> None:
        self.messages |= {("state?",)}

    def _open(self) -> None:
        owned = self.ledger("primary").owned
        self._write("primary", Kind.SPOKEN, owned)
        if self.primary_qemu:
            self.gate = "open"

    def _primary_back(self) -> None:
        """What only the memory knew is gone; the gate goes on."""
        self.crashes -= 1
        ledger = self.ledger("primary")
        undecided = ledger.newest in (Kind.ARMING, Kind.PROTECTED, Kind.DIED)
        if ledger.newest is Kind.PREPARING:
            self._undo()
        elif undecided and not self.primary_qemu:
            if ledger.newest in (Kind.ARMING, Kind.PROTECTED):
                self._write("primary", Kind.DIED)
            self.resolving = True
        elif undecided and (ledger.newest is not Kind.PROTECTED or self.gate == "closed"):
            self._verdict()
        elif ledger.newest is Kind.LOST:
            self.resolving = True

    def _primary_dies(self) -> None:
        self.crashes -= 1
        self.primary_qemu = self.stream = False
        if self.gate == "hold":
            self.gate = "closed"

    # the standby's acts

    def _claim(self) -> None:
        if not generations.may_take(self.ledger("standby")):
            self.claiming = True

    def _taken(self) -> None:
        self.claiming = False
        if self.ledger("standby").newest is Kind.ARMED:
            self._write("standby", Kind.TAKEN)

    def _go_on(self) -> None:
        if self.standby_qemu:
            if self._write("standby", Kind.SPOKEN, 2):
                self.runs = True
        else:
            self._write("standby", Kind.RESIGNED, 2)

    def _standby_back(self) -> None:
        self.crashes -= 1
        self.claiming = False

    def _standby_dies(self) -> None:
        self.crashes -= 1
        self.standby_qemu = self.stream = self.runs = False

    # messages

    def _lost(self, message: tuple[str, ...]) -> None:
        self.losses -= 1
        self.messages -= {message}

    def _arrives(self, message: tuple[str, ...], *, once: bool) -> None:
        if once:
            self.messages -= {message}
        standby = self.ledger("standby")
        if message[0] == "ARM":
            if self.standby_qemu and self.stream and not generations.may_arm(standby):
                self._write("standby", Kind.ARMED)
            self.messages |= {("armed!", str(self.ledger("standby").newest))}
        elif message[0] == "give-up?":
            self._give_up(message[1] == "runs")
            self.messages |= {self._records()}
        elif message[0] == "state?":
            self.messages |= {self._records()}
        elif message[0] == "armed!":
            if message[1] == "armed" and self.ledger("primary").newest is Kind.ARMING and not self.resolving:
                self._write("primary", Kind.PROTECTED)
        elif message[0] == "records":
            self._learn(Ledger.load("pid", "standby", 1, [(int(w[0]), w[1:]) for w in message[1:]]))

    def _records(self) -> tuple[str, ...]:
        return ("records", *(f"{r.g}{r.kind.value}" for r in self.ledger("standby").records))

    def _give_up(self, runs: bool) -> None:
        standby = self.ledger("standby")
        if standby.newest in (Kind.TAKEN, Kind.GIVEN_UP, Kind.LOST, Kind.ENDED):
            return
        if not runs and standby.newest is Kind.ARMED and self.standby_qemu:
            self.claiming = True
            return
        refusal = generations.may_give_up(
            standby, own_qemu_gone=not self.standby_qemu, stream_dead=True, claim_under_way=self.claiming
        )
        if not refusal and self._write("standby", Kind.GIVEN_UP):
            self.standby_qemu = self.stream = False

    def _learn(self, theirs: Ledger) -> None:
        primary = self.ledger("primary")
        if not self.resolving or primary.won:
            return
        if primary.newest is Kind.LOST:
            if theirs.resigned_win:
                self._write("primary", Kind.TAKEN, 2)
            return
        verdict = generations.verdict_on_peer_records(primary, theirs)
        if verdict == "solo":
            self._write("primary", Kind.SOLO)
        elif verdict == "lost":
            self._write("primary", Kind.LOST)


# ---- etcd ----


def etcd_world() -> Small | None:
    """None where the product has no arbiters yet."""
    try:
        from tests.sim.smalletcd import EtcdWorld
    except ImportError:
        return None
    return EtcdWorld()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.exhaustive")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each world; only whole layers count")
    parser.add_argument("names", nargs="*", help="commit, lease, counting, records, etcd (default: all)")
    parser.add_argument("--depth", type=int, default=40)
    asked = parser.parse_args()
    worlds: dict[str, Small | None] = {
        "commit": commit_world(), "lease": lease_world(), "counting": counting_world(), "records": RecordsWorld(),
        "etcd": etcd_world(),
    }  # fmt: skip
    broken = False
    for name, start in worlds.items():
        if start is None or (asked.names and name not in asked.names):
            continue
        began = time.monotonic()
        found = explore(start, asked.depth, asked.seconds)
        how = "all there is" if found.whole else "every interleaving to this depth"
        print(f"{name:8} depth {found.depth:3} ({how}): {found.states} states, {found.transitions} transitions, "
              f"{time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
        if found.broken:
            broken = True
            print(f"COUNTER-EXAMPLE: {found.broken}")
            for number, move in enumerate(found.path, 1):
                print(f"  {number:2}. {move}")
    return 1 if broken else 0


if __name__ == "__main__":
    from tests.sim import exhaustive  # the small worlds know its classes by this name

    sys.exit(exhaustive.main())
