"""A gate: monitor, keepalives and watcher of one protection on one host; its side decides the rest."""

from __future__ import annotations

import errno
import os
import selectors
import socket
import struct
import time
from collections.abc import Callable
from typing import Any, Protocol

from mcft.failover import Act, Qemu, Settings, Silence, Verdict, View, decide
from mcft.gate.control import Answer, Control, Denied
from mcft.gate.lan import LanCheck
from mcft.gate.loop import Commands, Loop, Task, Until, boottime_ms
from mcft.gate.rdma import RdmaLink
from mcft.gate.relay import Relay
from mcft.gate.state import GateState, paths, process_start, save
from mcft.keepalive import Heard, Link, Session, Word
from mcft.monitor import DISK_ERRORS, Message, Monitor, MonitorGone, stamp_ms

RECONNECT_MS = 20.0
CONNECT_MS = 2000.0
LAST_WORDS_MS = 3000.0  # why QEMU ended comes through libvirt: after its own end in 1.4 to 1.7 s (recorded, libvirt 7.0)
ASK_OVERDUE_MS = 1000.0
WATCHED = ("preparing", "arming", "armed", "protected")


class Side(Protocol):
    """What is different on the two sides. Times are CLOCK_BOOTTIME in ms."""

    def started(self) -> None: ...
    def monitor_connected(self) -> None: ...
    def on_event(self, event: Message, now_ms: float) -> None: ...
    def on_heard(self, heard: Heard, now_ms: float) -> None: ...
    def before_send(self, now_ms: float) -> None: ...
    def obey(self, verdict: Verdict, now_ms: float) -> None: ...
    def stream_age_ms(self, now_ms: float) -> float: ...
    def stream_dead(self) -> str: ...
    def counts(self) -> tuple[int, int]: ...
    def closed(self) -> bool: ...
    def handlers(self) -> dict[str, Callable[[dict[str, Any], Answer], None]]: ...
    def status(self, now_ms: float) -> dict[str, Any]: ...


class Gate:
    """Everything both sides share. `run` returns when the agent says `quit`."""

    def __init__(self, state: GateState, run_dir: str, make_side: Callable[[Gate], Side]) -> None:
        self.state = state
        self.state_path, control_path = paths(run_dir, state.uuid)
        self.loop = Loop(self.send_commands)
        self.control = Control(control_path, self.loop, self._request)
        self.monitor = Monitor(state.monitor) if state.monitor else Relay(control=self.control)
        self.control.on_agent = self._agent_changed
        self.session = Session(bytes.fromhex(state.key), bytes.fromhex(state.pid))
        self.links: list[Link] = []
        self.own_qemu: Qemu = "unknown"
        self.own_ended = False  # the process is dead, whatever it said before
        self.disk_error = state.disk_error
        self.buffer_broken = ""  # why the network buffer can't be trusted any more
        self.peer: Word = Word()
        self.shutdown_ms: float | None = None
        self.shutdown_reason = ""
        self.peer_shutdown_ms: float | None = None
        self.verdict: Verdict | None = None
        self.switching = False  # a planned switch is under way: the stream's end is our own doing
        self.started_ms = boottime_ms()
        self.event_lag_ms = 0.0
        self.silence = Silence(state.loss_ms, self.started_ms)
        self.lan = LanCheck(self.loop, state.lan_check)
        self.rdma = self._rdma_link()
        self._pidfd = -1
        self._stopped = False  # libvirt's last word of it has come
        self._opening: socket.socket | None = None
        self._monitor_since_ms = float("inf")
        self._alarmed = ""
        self._last_send_ms = float("-inf")
        self.side = make_side(self)
        self._handlers: dict[str, Callable[[dict[str, Any], Answer], None]] = {
            "status": lambda request, answer: answer(self.status()),
            "update": self._update,
            "qmp": self._qmp,
            "event": self._missed_event,
            "reply": self._relayed,
            "last-words": self._last_words,
            "quit": self._quit,
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
        self._watch_process()
        self.side.started()
        self._connect_monitor()
        if self.rdma:
            self.rdma.start()
            self._rdma_timer()
        self._keepalive_timer()
        self.loop.spawn(self._say_ready(ready))

    def _say_ready(self, ready: Callable[[], None]) -> Task:
        yield self.until_connected()
        ready()

    def until_connected(self) -> Until:
        """For tasks that need the monitor: at most 2 s, and not for a dead QEMU."""
        return self.wait(lambda: self.monitor.connected or self.own_qemu != "running", CONNECT_MS)

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
            self.loop.watch(link.sock, selectors.EVENT_READ, self._receiver(link))

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
        return Settings(self.state.loss_ms, self.state.delay_ms, sees_stream=self.state.engine != "mc")

    # ---- QEMU: its process and its monitor ----

    def _watch_process(self) -> None:
        if process_start(self.state.qemu_pid) != self.state.qemu_start:
            self.own_qemu, self.own_ended = "gone", True
            return
        self.own_qemu = "running"
        try:
            self._pidfd = os.pidfd_open(self.state.qemu_pid)
        except OSError:
            self.own_qemu, self.own_ended = "gone", True
            return
        self.loop.watch(self._pidfd, selectors.EVENT_READ, lambda _events: self._qemu_ended())

    def _qemu_ended(self) -> None:
        """The process is dead: everything that it wrote before is read first, then it counts as gone."""
        if self._pidfd >= 0:
            self.loop.forget(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        self._read_monitor()
        awaited = isinstance(self.monitor, Relay) and self.monitor.connected and self.state.role == "primary"
        if awaited and not self._stopped:
            self.control.note("qemu-ended")
            self.loop.after(LAST_WORDS_MS, self._count_as_ended)
        else:
            self._count_as_ended()

    def _count_as_ended(self) -> None:
        if not self.own_ended:
            self.own_ended = True
            self.own_qemu = "shutdown" if self.shutdown_ms is not None else "gone"
            self._decide(boottime_ms())

    def _connect_monitor(self) -> None:
        if not self.state.monitor or self.own_qemu != "running" or self._opening is not None or self.monitor.connected:
            return
        try:
            self._opening = self.monitor.open()
        except MonitorGone:
            self.loop.after(RECONNECT_MS, self._connect_monitor)
            return
        self.loop.watch(self._opening, selectors.EVENT_READ, lambda _events: self._negotiate())

    def _negotiate(self) -> None:
        assert self._opening is not None
        try:
            if not self.monitor.negotiate():
                return
        except MonitorGone:
            self._monitor_lost()
            return
        self._opening = None
        self.monitor.last_reply_ms = self._monitor_since_ms = boottime_ms()
        self._watch_monitor()
        self.side.monitor_connected()
        self._read_monitor()

    def _monitor_ready(self, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            try:
                self.monitor.flush()
            except MonitorGone:
                self._monitor_lost()
                return
            self._watch_monitor()
        if events & selectors.EVENT_READ:
            self._read_monitor()

    def _watch_monitor(self) -> None:
        if self.monitor.sock is not None:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.monitor.wants_write else 0)
            self.loop.watch(self.monitor.sock, wanted, self._monitor_ready)

    def _read_monitor(self) -> None:
        if self.monitor.sock is None:
            return
        now_ms = boottime_ms()
        try:
            for message in self.monitor.receive():
                event = self.monitor.dispatch(message, now_ms)
                if event is not None:
                    self._event(event, now_ms)
        except MonitorGone:
            self._monitor_lost()

    def _monitor_lost(self) -> None:
        for sock in (self.monitor.sock, self._opening):
            if sock is not None:
                self.loop.forget(sock)
        self._opening = None
        self.monitor.close()
        if process_start(self.state.qemu_pid) != self.state.qemu_start:
            self._qemu_ended()
        else:
            self.loop.after(RECONNECT_MS, self._connect_monitor)

    def _event(self, event: Message, now_ms: float) -> None:
        name, data = event["event"], event.get("data") or {}
        self.event_lag_ms = time.time() * 1000 - stamp_ms(event)
        if name == "SHUTDOWN" and self.shutdown_ms is None:
            self.shutdown_ms, self.shutdown_reason = now_ms, str(data.get("reason", ""))
            self.own_qemu = "shutdown"
        elif name == "SHUTDOWN" and str(data.get("reason", "")).startswith("guest-"):
            # The guest's own word counts before and after a signal's: libvirt ends QEMU by one, and `virsh destroy` may cross it.
            self.shutdown_reason = str(data["reason"])
        elif name == "RESET" and self.shutdown_ms is not None and not self.own_ended:
            self.shutdown_ms, self.shutdown_reason, self.own_qemu = None, "", "running"
        self.side.on_event(event, now_ms)
        if name not in ("STOP", "RESUME"):
            self.control.note("qemu", event=name, data=data)
        if name in ("SHUTDOWN", "COLO_EXIT", *DISK_ERRORS):
            self._decide(now_ms)

    def send_commands(self, wanted: Commands, done: Callable[[list[Message]], None]) -> None:
        """Send all, hand over all replies. A dead monitor answers every one with an error."""
        replies: dict[int, Message] = {}
        count = len(wanted.commands)
        if not count:
            done([])
            return

        def collect(index: int) -> Callable[[Message], None]:
            def on_reply(reply: Message) -> None:
                if index in replies:
                    return
                replies[index] = reply
                if len(replies) == count:
                    done([replies[i] for i in range(count)])

            return on_reply

        try:
            if wanted.fds and self.monitor.sock is not None:
                self._send_fds(wanted.fds, wanted.commands[0], collect(0))
                rest = list(enumerate(wanted.commands))[1:]
            else:
                rest = list(enumerate(wanted.commands))
            for index, (name, arguments) in rest:
                self.monitor.send(name, arguments, collect(index), oob=wanted.oob)
            self._watch_monitor()
        except MonitorGone as error:
            for index in range(count):
                if index not in replies:
                    collect(index)({"error": {"class": "MonitorGone", "desc": str(error)}})

    def _send_fds(self, fds: tuple[int, ...], command: tuple[str, dict[str, Any]], on_reply: Callable[[Message], None]) -> None:
        """`getfd` takes its descriptor as ancillary data of the bytes of the command."""
        assert self.monitor.sock is not None
        if self.monitor.wants_write:
            raise MonitorGone("the monitor is congested")
        line = self.monitor.encode(command[0], command[1], on_reply)
        try:
            sent = socket.send_fds(self.monitor.sock, [line], list(fds))
        except OSError as error:
            raise MonitorGone(str(error)) from None
        if sent != len(line):
            raise MonitorGone("the monitor took half a command")

    # ---- keepalives ----

    def word(self) -> Word:
        """What we say of ourselves now."""
        loads, acks = self.side.counts()
        return Word(
            self.state.role, self.state.g, self.state.record, self.own_qemu, self.side.closed(), self.state.claiming, loads, acks
        )  # fmt: skip

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

    def _keepalive_timer(self) -> None:
        self.loop.after(self.state.loss_ms / 6, self._keepalive_timer)
        if len(self.links) < len(self.state.links):
            self.open_links()
        now_ms = boottime_ms()
        if self.rdma:
            self.rdma.tick(now_ms)
        self._ask_if_overdue(now_ms)
        self.say()

    def _ask_if_overdue(self, now_ms: float) -> None:
        """A QEMU that hangs is told from a stream that stands by a question: without checkpoints nothing else asks one."""
        watched = self.state.role == "primary" and self.state.record in WATCHED and not isinstance(self.monitor, Relay)
        overdue = watched and self.side.stream_age_ms(now_ms) > self.state.delay_ms + ASK_OVERDUE_MS
        if overdue and self.monitor.connected and not self.monitor.unanswered:
            self.send_commands(Commands([("query-status", {})]), lambda _replies: None)

    def _rdma_link(self) -> RdmaLink | None:
        if self.state.rdma is None:
            return None
        return RdmaLink(
            self.loop, self.state.rdma, self.state.loss_ms, self.control.note,
            leads=self.state.role == "primary", on_error=lambda: self._decide(boottime_ms()),
        )  # fmt: skip

    def _rdma_timer(self) -> None:
        """Nobody wakes us when the other host's adapter has written: our memory is looked at, twice per keepalive."""
        self.loop.after(self.state.loss_ms / 12, self._rdma_timer)
        assert self.rdma is not None
        self._receive(self.rdma)

    def _receiver(self, link: Link) -> Callable[[int], None]:
        return lambda _events: self._receive(link)

    def _receive(self, link: Link | RdmaLink) -> None:
        datagrams = link.receive()
        now_ms = boottime_ms()  # after the reading: an arrival may be taken for later than it was, never for earlier
        for datagram in datagrams:
            heard = self.session.accept(datagram, link.name, now_ms)
            if heard is None or heard.word.role == self.state.role:
                continue
            self.silence.heard(link.name, now_ms)
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
                self._decide(now_ms)

    # ---- watching ----

    def _turn(self, now_ms: float) -> None:
        """Every turn, before its sockets are read. A stall of our own restarts the silence after they are drained."""
        if self.silence.tick(now_ms):
            self.lan.forget()
            self.control.note("stalled", count=self.silence.stalls)
        self._read_monitor()  # first: what our QEMU said is the cause of what the other side says by now
        for link in self.links:
            self._receive(link)
        if self.rdma:
            self._receive(self.rdma)
        self._read_monitor()
        self._decide(boottime_ms())

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
            own_qemu=self.own_qemu,
            own_ended=self.own_ended,
            shutdown_for_ms=0.0 if self.shutdown_ms is None else now_ms - self.shutdown_ms,
            stream_dead=self.side.stream_dead(),
            stream_age_ms=self.side.stream_age_ms(now_ms),
            monitor_silent_ms=self.monitor.silent_ms(now_ms),
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

    def _decide(self, now_ms: float) -> None:
        """Decide until the first verdict that ends the watching; that one stands until the agent acts."""
        if self.verdict is not None or self.state.record not in WATCHED:
            return
        if self.switching and self.own_qemu not in ("gone", "shutdown"):
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
        self.control.note("verdict", act=verdict.act.value, reason=verdict.reason, shutdown=self.shutdown_reason)

    # ---- the agent's requests ----

    def _request(self, do: str, request: dict[str, Any], answer: Answer) -> None:
        handler = self._handlers.get(do)
        if handler is None:
            raise Denied(f"this gate ({self.state.role}) knows no request '{do}'")
        handler(request, answer)

    def _update(self, request: dict[str, Any], answer: Answer) -> None:
        """Facts that the agent has made durable (record) or learned (delay_ms, yank); written down here too."""
        for name in ("record", "delay_ms", "yank", "silenced", "lan_check", "stream_port"):
            if name in request:
                setattr(self.state, name, request[name])
        self.lan.addresses = list(self.state.lan_check)
        self.persist()
        self.say()
        answer({})

    def _agent_changed(self, there: bool) -> None:
        if isinstance(self.monitor, Relay) and there:
            self.side.monitor_connected()
        elif isinstance(self.monitor, Relay):
            self.monitor.agent_left()
            if self._is_dead():  # whoever comes next has heard no more than we
                self._count_as_ended()

    def _relayed(self, request: dict[str, Any], answer: Answer) -> None:
        """The reply to a command that the agent carried to libvirt."""
        if isinstance(self.monitor, Relay):
            self.monitor.answered(request["n"], request["reply"], boottime_ms())  # (nobody waits for an answer to an answer)

    def _last_words(self, request: dict[str, Any], answer: Answer) -> None:
        """libvirt says that the domain has stopped, and whether by its own doing: every event of it came before.

        Or it does not answer, and nothing more will come.
        """
        self._stopped = True
        if request.get("destroyed") and self.shutdown_ms is None:
            self.shutdown_ms, self.own_qemu = boottime_ms(), "shutdown"
        if self._is_dead():
            self._count_as_ended()
        answer({})

    def _is_dead(self) -> bool:
        return process_start(self.state.qemu_pid) != self.state.qemu_start

    def _missed_event(self, request: dict[str, Any], answer: Answer) -> None:
        """A disk's error as libvirt's monitor saw it: acted upon if we were not connected when QEMU wrote it."""
        event = request["event"]
        age_ms = time.time() * 1000 - stamp_ms(event)
        missed = self.monitor.sock is None or boottime_ms() - age_ms < self._monitor_since_ms
        if missed:
            self._event(event, boottime_ms())
        answer({"missed": missed})

    def _qmp(self, request: dict[str, Any], answer: Answer) -> None:
        """Commands for the added monitor, pipelined; the replies as QEMU gave them."""
        commands = [(c["execute"], c.get("arguments", {})) for c in request["commands"]]

        def send() -> Task:
            yield self.until_connected()
            answer((yield Commands(commands, oob=bool(request.get("oob")))))

        self.loop.spawn(send())

    def _quit(self, request: dict[str, Any], answer: Answer) -> None:
        answer({})
        self.loop.running = False

    def wait(self, condition: Callable[[], bool], timeout_ms: float) -> Until:
        """For tasks: wait for a condition, at most timeout_ms from now."""
        return Until(condition, boottime_ms() + timeout_ms)

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
        interval_ms = self.state.loss_ms / 6
        return {
            "pid": self.state.pid, "g": self.state.g, "role": self.state.role, "record": self.state.record,
            "own_qemu": self.own_qemu, "shutdown": self.shutdown_reason,
            "disk_error": self.disk_error, "claiming": self.state.claiming,
            "buffer_broken": self.buffer_broken, "closed": self.side.closed(), "stream_dead": self.side.stream_dead(),
            "stream_age_ms": self.side.stream_age_ms(now_ms), "event_lag_ms": self.event_lag_ms,
            "monitor": self.monitor.connected, "oob": self.monitor.oob, "stalls": self.silence.stalls,
            "peer": {"record": self.peer.record, "qemu": self.peer.qemu, "claiming": self.peer.claiming,
                     "closed": self.peer.closed, "loads": self.peer.loads, "acks": self.peer.acks},
            "links": [{"link": name, "age_ms": age, "missed": 0 if age is None else max(0, int(age / interval_ms) - 1)}
                      for name, age in ages.items()] + self._rdma_status(now_ms, interval_ms),
            "verdict": None if self.verdict is None else
                       {"act": self.verdict.act.value, "reason": self.verdict.reason, "shutdown": self.shutdown_reason},
            "alarm": self._alarmed,
            **self.side.status(now_ms),
        }  # fmt: skip


def set_link(ifname: str, *, up: bool) -> None:
    """RTM_NEWLINK with or without IFF_UP, one message on a fresh socket. Raises: OSError (rtnetlink(7))."""
    index = socket.if_nametoindex(ifname)
    _rtnetlink(16, struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, int(up), 1))


def remove_drop_filter(ifname: str) -> None:
    """Take away the ingress qdisc that silenced this interface, with its filters. Raises: OSError (tc(8), RTM_DELQDISC)."""
    index = socket.if_nametoindex(ifname)
    try:
        _rtnetlink(37, struct.pack("=BxxxiIII", socket.AF_UNSPEC, index, 0xFFFF0000, 0xFFFFFFF1, 0))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EINVAL):
            raise


def _rtnetlink(kind: int, body: bytes) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as sock:
        sock.settimeout(1.0)
        sock.sendall(struct.pack("=IHHII", 16 + len(body), kind, 5, 1, 0) + body)  # NLM_F_REQUEST | NLM_F_ACK
        (code,) = struct.unpack_from("=i", sock.recv(4096), 16)
        if code:
            raise OSError(-code, os.strerror(-code))
