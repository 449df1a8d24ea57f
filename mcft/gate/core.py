"""A gate: keepalives and watcher of one protection on one host, with its QEMU (`qemu.py`); its side decides the rest."""

from __future__ import annotations

import selectors
from collections.abc import Callable
from typing import Any, Protocol

from mcft.failover import Act, Settings, Silence, Verdict, View, decide
from mcft.gate.control import Answer, Control, Denied
from mcft.gate.lan import LanCheck
from mcft.gate.loop import Commands, Loop, Task, Until, boottime_ms
from mcft.gate.qemu import OwnQemu
from mcft.gate.rdma import RdmaLink
from mcft.gate.relay import Relay
from mcft.gate.state import GateState, paths, save
from mcft.keepalive import Heard, Link, Session, Word
from mcft.monitor import Message

ASK_OVERDUE_MS = 1000.0
WATCHED = ("preparing", "arming", "armed", "protected")
KEEPALIVES = 6  # in each T
AFTER_MS = 0.01  # behind an instant at which a comparison still says no
EARLY = 0.8  # of the time between two: from then on the primary's goes with the turn that reads the standby's


class Side(Protocol):
    """What is different on the two sides. Times are CLOCK_BOOTTIME in ms; nothing here waits."""

    def started(self) -> None:
        """This gate begins, perhaps where a dead one left off (`state.mode`); before any event."""

    def monitor_connected(self) -> None:
        """The monitor is there (again): events may have been missed since it was last."""

    def on_event(self, event: Message, now_ms: float) -> None:
        """One QMP event, in the order in which QEMU wrote it among its replies."""

    def on_heard(self, heard: Heard, now_ms: float) -> None:
        """One accepted keepalive of the other side's gate."""

    def delay_changed(self) -> None:
        """Checkpoints come at another pace from now on (`state.every_ms`)."""

    def before_send(self, now_ms: float) -> None:
        """A keepalive is about to leave: what it echoes is what the other side may rest on."""

    def obey(self, verdict: Verdict, now_ms: float) -> None:
        """The one verdict that ends the watching: do at once what can't wait for the agent."""

    def stream_age_ms(self, now_ms: float) -> float:
        """Since the last checkpoint that was acknowledged (primary) or loaded (standby)."""
        ...

    def stream_dead(self) -> str:
        """How QEMU, or we, ended the stream; empty while it may go on."""
        ...

    def counts(self) -> tuple[int, int]:
        """Checkpoints loaded and acknowledged on this stream."""
        ...

    def closed(self) -> bool:
        """Whether nothing that the guest says leaves."""
        ...

    def handlers(self) -> dict[str, Callable[[dict[str, Any], Answer], None]]:
        """This side's requests of the agent: word → what answers it, now or later. Each may raise Denied."""
        ...

    def status(self, now_ms: float) -> dict[str, Any]:
        """This side's part of what `status` shows."""
        ...


class Gate:
    """Everything both sides share. `run` returns when the agent says `quit`."""

    def __init__(self, state: GateState, run_dir: str, make_side: Callable[[Gate], Side]) -> None:
        self.state = state
        self.state_path, control_path = paths(run_dir, state.uuid)
        self.loop = Loop(lambda wanted, done: self.qemu.send(wanted, done), self._loss_by_time_ms)
        self.control = Control(control_path, self.loop, self._request)
        self.qemu = OwnQemu(state, self.loop, self.control, self)
        self.control.on_agent = self.qemu.agent_changed
        self.session = Session(bytes.fromhex(state.key), bytes.fromhex(state.pid))
        self.links: list[Link] = []
        self.disk_error = state.disk_error
        self.buffer_broken = ""  # why the network buffer can't be trusted any more
        self.peer: Word = Word()
        self.peer_shutdown_ms: float | None = None
        self.verdict: Verdict | None = None
        self.switching_until_ms = float("-inf")  # a planned switch is under way: the stream's end is our own doing
        self.started_ms = boottime_ms()
        self.silence = Silence(state.loss_ms, self.started_ms)
        self.lan = LanCheck(self.loop, state.lan_check)
        self.rdma = self._rdma_link()
        self._alarmed = ""
        self._last_send_ms = float("-inf")
        self._keepalive = 0  # the number of its timer
        self._in_hand = self._undecided = False  # datagrams were read, not weighed yet; and a decision waits for that
        self.side = make_side(self)
        self._handlers: dict[str, Callable[[dict[str, Any], Answer], None]] = {
            "status": lambda request, answer: answer(self.status()),
            "update": self._update,
            "quit": self._quit,
            **self.qemu.handlers(),
            **(self.rdma.handlers() if self.rdma else {}),
            **self.side.handlers(),
        }

    # ---- life ----

    def run(self, ready: Callable[[], None]) -> None:
        """Open everything, say ready, and turn until told to quit."""
        self.start(ready)
        while self.loop.running:
            self.loop.turn(self._turn)
        for link in self.links:
            link.sock.close()
        if self.rdma:
            self.rdma.close()

    def start(self, ready: Callable[[], None]) -> None:
        """Open everything; ready is called once the monitor is there too."""
        self.open_links()
        self.control.listen()
        self.qemu.watch()
        self.side.started()
        self.qemu.connect()
        if self.rdma:
            self.rdma.start()
            self._rdma_timer()
        self._keepalive_timer()
        self.loop.spawn(self._say_ready(ready))

    def _say_ready(self, ready: Callable[[], None]) -> Task:
        yield self.qemu.until_connected()
        ready()

    def open_links(self) -> None:
        """A link that can't be opened now (address missing) counts as silent; it is tried again with the timer."""
        for spec in self.state.links:
            if any(link.name == spec.peer for link in self.links):
                continue
            try:
                link = Link.open(spec.local, spec.local_port, spec.peer, spec.peer_port)
            except OSError:
                continue
            self.links.append(link)
            self.loop.watch(link.sock, selectors.EVENT_READ, lambda _events: None)  # (`_turn` has read it)

    def wait(self, condition: Callable[[], bool], timeout_ms: float) -> Until:
        """For tasks: wait for a condition, at most timeout_ms from now."""
        return Until(condition, boottime_ms() + timeout_ms)

    def persist(self) -> None:
        """Write the state file (tmpfs); a restarted gate goes on from it."""
        save(self.state_path, self.state)

    def saw_disk_error(self, what: str) -> None:
        """Sticky, also over a restart of this gate."""
        if not self.disk_error:
            self.disk_error = self.state.disk_error = what
            self.persist()

    @property
    def settings(self) -> Settings:
        return Settings(self.state.loss_ms, self.state.every_ms, sees_stream=self.state.engine != "mc")

    # ---- told by our QEMU ----

    def monitor_connected(self) -> None:
        self.side.monitor_connected()

    def on_event(self, event: Message, now_ms: float) -> None:
        self.side.on_event(event, now_ms)

    # ---- keepalives ----

    def word(self) -> Word:
        """What we say of ourselves now."""
        loads, acks = self.side.counts()
        state, qemu = self.state, self.qemu.condition
        return Word(state.role, state.g, state.record, qemu, self.side.closed(), state.claiming, loads, acks)

    def say(self) -> None:
        """One datagram on every link, now."""
        now_ms = boottime_ms()
        self._last_send_ms = now_ms
        self.side.before_send(now_ms)
        datagram = self.session.next(self.word(), now_ms)
        for link in self.links:
            link.send(datagram)
        if self.rdma:
            self.rdma.send(datagram)

    @property
    def _interval_ms(self) -> float:
        """Between two keepalives, at most."""
        return self.state.loss_ms / KEEPALIVES

    def _keepalive_timer(self) -> None:
        # The standby is a little faster, so that the primary, which has more to do, wakes once for both (`_receive`).
        leads = self.state.role == "primary"
        self._keepalive = self.loop.after(self._interval_ms if leads else 0.95 * self._interval_ms, self._keepalive_timer)
        if len(self.links) < len(self.state.links):
            self.open_links()
        now_ms = boottime_ms()
        if self.rdma:
            self.rdma.tick(now_ms)
        self._ask_if_overdue(now_ms)
        self._look_at_lan(now_ms)
        self.say()

    def _look_at_lan(self, now_ms: float) -> None:
        """A standby whose LAN is away must not take over: the agents are to know that while both hosts live."""
        if self.state.role != "standby" or self.state.record != "armed":
            return
        before = self.lan.away
        self.lan.in_peace(now_ms)
        if self.lan.away != before:
            self.control.note("lan", away=self.lan.away)

    def _ask_if_overdue(self, now_ms: float) -> None:
        """A QEMU that hangs is told from a stream that stands by a question: without checkpoints nothing else asks one."""
        watched = self.state.role == "primary" and self.state.record in WATCHED and not isinstance(self.qemu.monitor, Relay)
        overdue = watched and self.side.stream_age_ms(now_ms) > self.state.every_ms + ASK_OVERDUE_MS
        if overdue and self.qemu.monitor.connected and not self.qemu.monitor.unanswered:
            self.qemu.send(Commands([("query-status", {})]), lambda _replies: None)

    def _rdma_link(self) -> RdmaLink | None:
        if self.state.rdma is None:
            return None
        return RdmaLink(
            self.loop, self.state.rdma, self.state.loss_ms, self.control.note,
            leads=self.state.role == "primary", on_error=lambda: self.decide(boottime_ms()),
        )  # fmt: skip

    def _rdma_timer(self) -> None:
        """Nobody wakes us when the other host's adapter has written: our memory is looked at, twice per keepalive."""
        self.loop.after(self._interval_ms / 2, self._rdma_timer)
        assert self.rdma is not None
        self._receive(self.rdma)

    def _receive(self, link: Link | RdmaLink) -> None:
        datagrams = link.receive()
        if datagrams:
            # Also after a stall in the midst of a turn: its words are the cause of what the other side says. Nothing is decided
            # by them before these datagrams are weighed: the other side is not silent.
            self._in_hand = True
            self.qemu.read()
            self._in_hand = False
        now_ms = boottime_ms()  # after the reading: an arrival may be taken for later than it was, never for earlier
        for datagram in datagrams:
            heard = self.session.accept(datagram, link.name, now_ms)
            if heard is None or heard.word.role == self.state.role:
                continue
            self.silence.heard(link.name, now_ms)
            self.lan.peer_spoke()
            changed = (heard.word.qemu, heard.word.closed, heard.word.claiming) != (
                self.peer.qemu, self.peer.closed, self.peer.claiming
            )  # fmt: skip
            self.peer = heard.word
            if heard.word.qemu != "shutdown":
                self.peer_shutdown_ms = None
            elif self.peer_shutdown_ms is None:
                self.peer_shutdown_ms = now_ms
            self.side.on_heard(heard, now_ms)
            if changed:
                self.decide(now_ms)
            if self.state.role == "primary" and now_ms - self._last_send_ms > EARLY * self._interval_ms:
                self.loop.cancel(self._keepalive)
                self._keepalive_timer()
        if self._undecided:
            self.decide(now_ms)

    # ---- watching ----

    def _turn(self, now_ms: float) -> None:
        """Every turn, before its sockets are read. A stall of our own restarts the silence after they are drained."""
        if self.silence.tick(now_ms):
            self.lan.forget()
            self.control.note("stalled", count=self.silence.stalls)
        for link in self.links:
            self._receive(link)
        if self.rdma:
            self._receive(self.rdma)
        self.qemu.read()
        self.decide(boottime_ms())

    def view(self, now_ms: float) -> View:
        """What we see, for `failover.decide`."""
        first = self.state.links[0].peer if self.state.links else None
        silent_ms = self.silence.silent_ms(now_ms)
        hint = self.rdma.failing(now_ms) if self.rdma else ""
        if silent_ms > self.state.loss_ms / 3 or hint:
            self.lan.ask(now_ms)
        return View(
            role="primary" if self.state.role == "primary" else "standby",
            armed=self.state.record in ("armed", "protected"),
            own_qemu=self.qemu.condition,
            own_ended=self.qemu.ended,
            shutdown_for_ms=0.0 if self.qemu.shutdown_ms is None else now_ms - self.qemu.shutdown_ms,
            stream_dead=self.side.stream_dead(),
            stream_age_ms=self.side.stream_age_ms(now_ms),
            monitor_silent_ms=self.qemu.monitor.silent_ms(now_ms),
            disk_error=self.disk_error,
            buffer_broken=self.buffer_broken,
            silent_ms=silent_ms,
            stream_silent_ms=self.silence.silent_ms(now_ms, first),
            peer_qemu=self.peer.qemu if self.peer.g == self.state.g else "unknown",  # type: ignore[arg-type]
            peer_closed=self.peer.closed,
            peer_shutdown_for_ms=0.0 if self.peer_shutdown_ms is None else now_ms - self.peer_shutdown_ms,
            peer_claiming=self.peer.claiming,
            peer_record=self.peer.record if self.peer.g == self.state.g else "",
            lan_ok=self.lan.ok(now_ms, silent_ms),
            rdma_silent_ms=self.silence.silent_ms(now_ms, self.rdma.name) if self.rdma and self.rdma.connections else None,
            rdma_error=hint,
        )

    def _loss_by_time_ms(self) -> float:
        """When silence, or a checkpoint that does not come, will next count for more: of that no socket wakes us."""
        if self.verdict is not None or self.state.record not in WATCHED:
            return float("inf")
        now_ms = boottime_ms()
        silent_ms, stream_ms = self.silence.silent_ms(now_ms), self.side.stream_age_ms(now_ms)
        left_ms = (self.state.loss_ms - silent_ms, self.settings.overdue_ms - stream_ms)
        return min((now_ms + left + AFTER_MS for left in left_ms if left + AFTER_MS > 0), default=float("inf"))

    def decide(self, now_ms: float) -> None:
        """Decide until the first verdict that ends the watching; that one stands until the agent acts."""
        self._undecided = self._in_hand
        if self._in_hand:
            return
        if self.verdict is not None or self.state.record not in WATCHED:
            return
        if now_ms < self.switching_until_ms and self.qemu.condition not in ("gone", "shutdown"):
            return
        verdict = decide(self.view(now_ms), self.settings)
        if verdict.act is Act.WAIT:
            self._alarmed = ""
            return
        if verdict.act is Act.ALARM:
            if self._alarmed != verdict.reason:
                self._alarmed = verdict.reason
                self.control.note("alarm", reason=verdict.reason)
            return
        self.verdict = verdict
        self.side.obey(verdict, now_ms)
        self.say()
        self.control.note("verdict", act=verdict.act.value, reason=verdict.reason, shutdown=self.qemu.shutdown_reason)

    # ---- the agent's requests ----

    def _request(self, do: str, request: dict[str, Any], answer: Answer) -> None:
        if request.get("pid", self.state.pid) != self.state.pid:
            raise Denied(f"this gate is of another instance ({self.state.pid}) of {self.state.domain}")
        handler = self._handlers.get(do)
        if handler is None:
            raise Denied(f"this gate ({self.state.role}) knows no request '{do}'")
        handler(request, answer)

    def _update(self, request: dict[str, Any], answer: Answer) -> None:
        """Facts that the agent has made durable (record) or learned (delay_ms, period_ms, yank); written down here too."""
        every_ms = self.state.every_ms
        for name in ("record", "delay_ms", "period_ms", "yank", "silenced", "lan_check", "stream_port"):
            if name in request:
                setattr(self.state, name, request[name])
        self.lan.addresses = list(self.state.lan_check)
        if self.state.every_ms != every_ms:
            self.side.delay_changed()
        self.persist()
        self.say()
        answer({})

    def _quit(self, request: dict[str, Any], answer: Answer) -> None:
        answer({})
        self.loop.running = False

    def _rdma_status(self, now_ms: float, interval_ms: float) -> list[dict[str, Any]]:
        if self.rdma is None:
            return []
        heard_ms = self.silence.links.get(self.rdma.name)
        age_ms = None if heard_ms is None else now_ms - heard_ms
        missed = 0 if age_ms is None else max(0, int(age_ms / interval_ms) - 1)
        return [{"kind": "rdma", "link": self.rdma.peer, "age_ms": age_ms, "missed": missed, "detail": self.rdma.detail(now_ms),
                 "connections": self.rdma.connections, "errors": self.rdma.errors,
                 "error_age_ms": now_ms - self.rdma.error_ms if self.rdma.errors else None}]  # fmt: skip

    def status(self) -> dict[str, Any]:
        """All that the agent shows of us."""
        now_ms = boottime_ms()
        ages = {link.peer: now_ms - self.silence.links[link.peer] if link.peer in self.silence.links else None
                for link in self.state.links}  # fmt: skip
        interval_ms = self._interval_ms
        return {
            "pid": self.state.pid, "g": self.state.g, "role": self.state.role, "record": self.state.record,
            "own_qemu": self.qemu.condition, "shutdown": self.qemu.shutdown_reason,
            "disk_error": self.disk_error, "claiming": self.state.claiming,
            "buffer_broken": self.buffer_broken, "closed": self.side.closed(), "stream_dead": self.side.stream_dead(),
            "stream_age_ms": self.side.stream_age_ms(now_ms), "event_lag_ms": self.qemu.event_lag_ms,
            "period_ms": self.state.every_ms,
            "monitor": self.qemu.monitor.connected, "oob": self.qemu.monitor.oob, "stalls": self.silence.stalls,
            "peer": {"record": self.peer.record, "qemu": self.peer.qemu, "claiming": self.peer.claiming,
                     "closed": self.peer.closed, "loads": self.peer.loads, "acks": self.peer.acks},
            "links": [{"link": name, "age_ms": age, "missed": 0 if age is None else max(0, int(age / interval_ms) - 1)}
                      for name, age in ages.items()] + self._rdma_status(now_ms, interval_ms),
            "verdict": None if self.verdict is None else
                       {"act": self.verdict.act.value, "reason": self.verdict.reason, "shutdown": self.qemu.shutdown_reason},
            "alarm": self._alarmed, "lan_away": self.lan.away,
            **self.side.status(now_ms),
        }  # fmt: skip
