"""Both sides of mcft over one played stream: the real engine, commit rule, session, watcher and take-over; links are perfect.

What is not real: QEMU (the player), the gates' loop and sockets (here: one clock), keepalives (an exchange every T/6 while the
link is up). What both sides do is written into `acts`, in order, in the words of `expected.toml`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from player import Silent, Stream

from mcft.commit import Acknowledged, Action, CommitGate, Release, SetBarrier
from mcft.engines.mc import Mc, progress
from mcft.engines.mcsession import Ask, Break, Clock, Leader, Take, Ticket, Wait, take_over
from mcft.failover import Act, Settings, View, decide
from mcft.qmp_passthrough import wire
from mcft.streams import Endpoint

T_MS = 300.0
KEEPALIVE_MS = T_MS / 6
FIRST_CHECKPOINT_MS = 10_000.0
AFTER_MS = 1_500.0  # how long is looked on behind the run's last word
Mutate = Callable[[int, dict[str, Any], float], list[tuple[float, dict[str, Any] | None]]]


def faithful(_n: int, answer: dict[str, Any], _now_ms: float) -> list[tuple[float, dict[str, Any] | None]]:
    """Every reply once, at once."""
    return [(0.0, answer)]


class Played:
    """The engine's executor."""

    def __init__(self, stream: Stream, side: str) -> None:
        self.stream, self.side = stream, side

    async def execute(self, command: str, **arguments: Any) -> Any:
        return self.stream.ask(self.side, command, wire(arguments))


@dataclass
class Rig:
    stream: Stream
    mutate: Mutate = faithful
    event: Callable[[int], float | None] = lambda _n: 0.0  # RESUME n → how late it comes (ms); None: never
    watch_only: bool = False  # the run was set up as mcft never does it: looked at from its `migrate` on
    acts: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    released: int = 0
    acknowledged: int = 0
    polled_ms: list[float] = field(default_factory=list)

    def polls_until(self, at_ms: float) -> int:
        return sum(1 for t in self.polled_ms if t <= at_ms)

    def run(self) -> Rig:
        self.delay_ms = self.stream.delay_ms()
        self.commit = CommitGate(T_MS, T_MS / 15, rule="counter")
        self.leader = Leader(self.delay_ms, self.commit)
        self.now_ms = self.stream.now_s * 1000
        self.armed = self.closed = self.claiming = self.over = False
        self.source_qemu = self.standby_qemu = "running"
        self.shutdown_ms = self.peer_shutdown_ms = 0.0
        self.last_word: str = ""
        self.barriers: dict[int, float] = {}
        self.replies: list[tuple[float, Ticket, dict[str, Any] | None]] = []
        self.resumes: list[float] = []
        self.n_reply = self.n_resume = 0
        self.unanswered_ms = float("inf")
        self.exchanged_ms = self.heard_ms = self.now_ms
        self.take: Take | None = None
        self.take_at_ms = self.take_due_ms = float("inf")
        self.take_value: Any = None
        self.truth_ms = [t * 1000 for t in self.stream.acknowledged_s()]
        self.holding = False
        self._set_up()
        self.ack_ms = self.now_ms
        self.begin_ms = self.now_ms
        end_ms = self.stream.end_s * 1000 + AFTER_MS
        while not self.over and self.now_ms < end_ms:
            self._turn()
        return self

    # ---- set-up ----

    def _set_up(self) -> None:
        if self.watch_only:
            self.stream.now_s = max(self.stream.now_s, self.stream.begin_s)
        else:
            engine, played = Mc(), Played(self.stream, self.stream.source)
            assert asyncio.run(engine.unsupported(played)) == ""  # type: ignore[arg-type]
            unix = self.stream.uri.startswith("unix:")
            there = Endpoint("/m.sock", 0, transport="unix") if unix else Endpoint("127.0.0.1", 4444)
            asyncio.run(engine.start(played, there, self.delay_ms, 1 << 30))
        self.now_ms = self.stream.now_s * 1000

    # ---- one turn of both gates ----

    def _turn(self) -> None:
        due_ms = self.leader.due_ms() if not self.closed else float("inf")
        steps = [self.exchanged_ms + KEEPALIVE_MS, max(due_ms, self.now_ms), self.stream.next_line_s() * 1000, self.take_due_ms,
                 *(at for at, _, _ in self.replies), *self.resumes]  # fmt: skip
        self.now_ms = max(self.now_ms + 0.001, min(steps))
        self.stream.now_s = self.now_ms / 1000
        self._events()
        for at in [r for r in self.replies if r[0] <= self.now_ms]:
            self.replies.remove(at)
            self._answered(at[1], at[2])
        while self.resumes and self.resumes[0] <= self.now_ms:
            self.resumes.pop(0)
            self._obey(self.leader.resume_seen(self.now_ms))
        if not self.closed and self.source_qemu == "running" and self.leader.due_ms() <= self.now_ms:
            self._poll()
        if self.now_ms >= self.exchanged_ms + KEEPALIVE_MS:
            self._keepalives()
        if self.take_due_ms <= self.now_ms:
            self._take()
        self._decide_primary()
        self._decide_standby()
        if not self.armed and not self.closed and self.now_ms - self.begin_ms > FIRST_CHECKPOINT_MS + self._first_pass_ms():
            self._do("protect fails: no checkpoint")
            self._break_source()
            self.over = True

    def _first_pass_ms(self) -> float:
        return 0.0 if self.holding else 600_000.0 if not self._hangs() else 0.0

    def _hangs(self) -> bool:
        return self.now_ms - self.unanswered_ms > FIRST_CHECKPOINT_MS

    def _events(self) -> None:
        for _, side, name in self.stream.events(self.stream.now_s):
            if side == self.stream.source:
                if name == "RESUME":
                    late = self.event(self.n_resume)
                    self.n_resume += 1
                    if late is not None:
                        self.resumes = sorted([*self.resumes, self.now_ms + late])
                elif name == "SHUTDOWN" and self.source_qemu == "running":
                    self.source_qemu, self.shutdown_ms = "shutdown", self.now_ms
                elif name == "EOF":
                    self.source_qemu = "shutdown" if self.source_qemu == "shutdown" else "gone"
                    self.source_ended = True
            elif side == self.stream.standby:
                if name == "EOF":
                    self.standby_qemu = "gone"
                elif name == "RESUME" and self.take is None and not self.stream.held_back:
                    pass  # the run's standby resumed by itself, having no -S; mcft's can't

    source_ended = False

    def _poll(self) -> None:
        ticket = self.leader.ask(self.now_ms)
        self.polled_ms.append(self.now_ms)
        self.unanswered_ms = min(self.unanswered_ms, self.now_ms)
        try:
            answer = self.stream.ask(self.stream.source, "query-migrate")
        except Silent:
            return
        self.n_reply += 1
        for late, said in self.mutate(self.n_reply, answer, self.now_ms):
            self.replies.append((self.now_ms + late, ticket, said))
        self.replies.sort(key=lambda row: row[0])

    def _answered(self, ticket: Ticket, answer: dict[str, Any] | None) -> None:
        self.unanswered_ms = float("inf")
        if answer is not None and progress(answer).status == "checkpointing" and not self.holding:
            self.holding = True
            self.commit.hold()
            self.begin_ms = self.now_ms
        self._obey(self.leader.answered(ticket, answer, self.now_ms))
        if answer is not None and progress(answer).ended and not self.armed and not self.closed:
            self._do("protect fails: the migration failed")
            self.over = True

    def _obey(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, SetBarrier):
                assert not self.barriers, "two barriers outstanding"
                self.barriers[action.epoch] = self.now_ms
            elif isinstance(action, Release):
                self._check(self.barriers.pop(action.epoch))
                self.released += 1
            elif isinstance(action, Acknowledged):
                self.acknowledged, self.ack_ms = action.count, self.now_ms
                if not self.armed and not self.closed:
                    self.armed = True
                    self._do("armed")

    def _check(self, set_ms: float) -> None:
        """A release needs a capture that began after the barrier; the next begins with an acknowledgement at the earliest."""
        acks = self.truth_ms
        if not any(acks[k - 1] >= set_ms and acks[k] <= self.now_ms for k in range(1, len(acks))):
            self.leaks.append(f"barrier of {set_ms:.1f} released at {self.now_ms:.1f}")
        if self.closed:
            self.leaks.append(f"released at {self.now_ms:.1f} by a closed gate")

    # ---- the two watchers ----

    def _keepalives(self) -> None:
        self.exchanged_ms = self.now_ms
        if self.stream.cut(self.stream.now_s):
            return
        self.heard_ms = self.now_ms
        if self.armed and not self.claiming and self.standby_qemu == "running":
            self._obey(self.commit.lease_renewed(self.now_ms - 1.0, self.now_ms))

    def _view(self, role: str) -> View:
        silent_ms = self.now_ms - self.heard_ms
        primary = role == "primary"
        return View(
            role="primary" if primary else "standby", armed=self.armed,
            own_qemu=self.source_qemu if primary else self.standby_qemu,  # type: ignore[arg-type]
            own_ended=self.source_ended if primary else False,
            shutdown_for_ms=self.now_ms - self.shutdown_ms if self.shutdown_ms else 0.0,
            stream_dead=self.commit.dead if primary else "", stream_age_ms=self.now_ms - self.ack_ms,
            monitor_silent_ms=max(0.0, self.now_ms - self.unanswered_ms), disk_error="",
            silent_ms=silent_ms, stream_silent_ms=silent_ms,
            peer_qemu=self.standby_qemu if primary else self.source_qemu if silent_ms < T_MS else "running",  # type: ignore[arg-type]
            peer_closed=self.closed, peer_shutdown_for_ms=self.now_ms - self.shutdown_ms if self.shutdown_ms else 0.0,
            peer_claiming=primary and self.claiming and silent_ms < T_MS, lan_ok=True,
            peer_record="armed" if self.armed else "preparing",
        )  # fmt: skip

    @property
    def settings(self) -> Settings:
        return Settings(T_MS, self.delay_ms, sees_stream=False)

    def _decide_primary(self) -> None:
        if self.closed or (not self.armed and self.source_qemu == "running"):
            return
        verdict = decide(self._view("primary"), self.settings)
        if verdict.act is Act.WAIT:
            return
        if not self.armed:
            self._do(f"protect fails: {verdict.reason}")
            self.over = True
            return
        self.closed = True
        self.commit.stream_died(verdict.reason)
        self._do(f"primary {verdict.act.value}: {_plain(verdict.reason)}")
        if verdict.act is Act.BREAK:
            self._break_source()
        elif verdict.act is Act.HUNG:
            self.source_qemu, self.source_ended = "gone", True
            self.stream.broken_s = self.stream.now_s
        elif verdict.act is Act.ENDED:
            self.over = True

    def _break_source(self) -> None:
        """The gate destroys its socket, and the agent asks the standby to give up: QEMU says `failed`, the guest runs."""
        self.stream.broken_s = min(self.stream.broken_s, self.stream.now_s)
        self.over = self.over or not self.stream.cut(self.stream.now_s)
        if self.source_qemu == "running" and not self.stream.silent(self.stream.source, self.stream.now_s):
            assert self.stream.ask(self.stream.source, "query-migrate").get("status") == "failed"

    def _decide_standby(self) -> None:
        if self.claiming or not self.armed or self.over:
            return
        verdict = decide(self._view("standby"), self.settings)
        if verdict.act is Act.CLAIM:
            self.claiming = True
            self._do(f"standby claim: {_plain(verdict.reason)}")
            self.take, self.take_due_ms = take_over(), self.now_ms + (0.0 if self.closed else T_MS)
        elif verdict.act is Act.ALARM and self.last_word != verdict.reason:
            self.last_word = verdict.reason
            self._do(f"standby alarm: {_plain(verdict.reason)}")

    def _take(self) -> None:
        assert self.take is not None
        self.take_due_ms = float("inf")
        try:
            while True:
                wanted = self.take.send(self.take_value)
                self.take_value = None
                if isinstance(wanted, Clock):
                    self.take_value = self.now_ms
                elif isinstance(wanted, Break):
                    self.stream.broken_s = min(self.stream.broken_s, self.stream.now_s)
                    self._do("break the socket")
                elif isinstance(wanted, Ask):
                    self.take_value = self._ask_standby(wanted.command)
                elif isinstance(wanted, Wait):
                    self.take_due_ms = self.now_ms + wanted.ms
                    return
        except StopIteration as end:
            self._do("taken" if not end.value else f"not taken: {end.value}")
            self.over = True

    def _ask_standby(self, command: str) -> dict[str, Any]:
        try:
            answer = self.stream.ask(self.stream.standby, command)
        except Silent:
            self._do(f"{command}: silent")
            return {}
        status = answer.get("status", "") if isinstance(answer, dict) else ""
        self._do(f"{command}: {status}" if status else command)
        return {"return": answer}

    def _do(self, what: str) -> None:
        if not self.acts or self.acts[-1] != what:
            self.acts.append(what)


def _plain(reason: str) -> str:
    """Without its figures."""
    return " ".join(word for word in reason.split() if not word.replace(".", "").isdigit())
