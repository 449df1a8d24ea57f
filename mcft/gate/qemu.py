"""This host's QEMU as its gate knows it: a process, and a monitor whose connection comes back by itself."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any, Protocol

from mcft.failover import Qemu
from mcft.gate.control import Answer, Control
from mcft.gate.loop import Commands, Loop, Task, Until, boottime_ms
from mcft.gate.relay import Relay
from mcft.gate.state import GateState, process_start
from mcft.monitor import DISK_ERRORS, Message, Monitor, MonitorGone, stamp_ms

RECONNECT_MS = 20.0
CONNECT_MS = 2000.0
LAST_WORDS_MS = 3000.0  # why QEMU ended comes through libvirt: after its own end in 1.4 to 1.7 s (recorded, libvirt 7.0)


class Told(Protocol):
    """Who is told of it. Times are CLOCK_BOOTTIME in ms."""

    def monitor_connected(self) -> None: ...
    def on_event(self, event: Message, now_ms: float) -> None: ...
    def decide(self, now_ms: float) -> None: ...


class OwnQemu:
    """`watch` and `connect` once, `read` at every turn. condition: running, shutdown (its guest's or a signal's word) or gone."""

    def __init__(self, state: GateState, loop: Loop, control: Control, told: Told) -> None:
        self.monitor = Monitor(state.monitor) if state.monitor else Relay(control=control)
        self.condition: Qemu = "unknown"
        self.ended = False  # the process is dead, whatever it said before
        self.shutdown_ms: float | None = None
        self.shutdown_reason = ""
        self.event_lag_ms = 0.0
        self._state, self._loop, self._control, self._told = state, loop, control, told
        self._pidfd = -1
        self._stopped = False  # libvirt's last word of it has come
        self._opening: socket.socket | None = None
        self._monitor_since_ms = float("inf")

    def handlers(self) -> dict[str, Callable[[dict[str, Any], Answer], None]]:
        """The agent's requests that are about QEMU."""
        return {"qmp": self._qmp, "event": self._missed_event, "reply": self._relayed, "last-words": self._last_words}

    # ---- its process ----

    def watch(self) -> None:
        """Know of its end the moment it ends."""
        with contextlib.suppress(OSError):
            self._pidfd = os.pidfd_open(self._state.qemu_pid)
        if self._pidfd < 0 or self._is_dead():
            self._forget_process()
            if self._state.role == "primary":
                self._await_last_words()
            else:
                self.condition, self.ended = "gone", True
            return
        self.condition = "running"
        self._loop.watch(self._pidfd, selectors.EVENT_READ, lambda _events: self._qemu_ended())

    def _forget_process(self) -> None:
        if self._pidfd >= 0:
            self._loop.forget(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _qemu_ended(self) -> None:
        """The process is dead: everything that it wrote before is read first, then it counts as gone."""
        self._forget_process()
        self.read()
        relayed = isinstance(self.monitor, Relay) and self.monitor.connected
        unheard = bool(self._state.monitor) and self._monitor_since_ms == float("inf")
        if self._state.role == "primary" and (relayed or unheard) and not self._stopped:
            if unheard:
                self.condition = "unknown"
            self._await_last_words()
        else:
            self._count_as_ended()

    def _await_last_words(self) -> None:
        """Why it ended, nobody here has heard: by engine `mc`, or because no gate was there. libvirt has; the agent asks it.
        Until then, and for 3 s at most, it does not count as gone: the other side would take over at once."""
        self._control.note("qemu-ended")
        self._loop.after(LAST_WORDS_MS, self._count_as_ended)

    def _count_as_ended(self) -> None:
        if not self.ended:
            self.ended = True
            self.condition = "shutdown" if self.shutdown_ms is not None else "gone"
            self._told.decide(boottime_ms())

    # ---- its monitor ----

    def until_connected(self) -> Until:
        """For tasks that need the monitor: at most 2 s, and not for a dead QEMU."""
        return Until(lambda: self.monitor.connected or self.condition != "running", boottime_ms() + CONNECT_MS)

    def connect(self) -> None:
        """Again and again while QEMU runs, until it is there; without a monitor of the gate's own, nothing."""
        if not self._state.monitor or self.condition != "running" or self._opening is not None or self.monitor.connected:
            return
        try:
            self._opening = self.monitor.open()
        except MonitorGone:
            self._loop.after(RECONNECT_MS, self.connect)
            return
        self._loop.watch(self._opening, selectors.EVENT_READ, lambda _events: self._negotiate())

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
        self._told.monitor_connected()
        self.read()

    def _monitor_ready(self, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            try:
                self.monitor.flush()
            except MonitorGone:
                self._monitor_lost()
                return
            self._watch_monitor()
        if events & selectors.EVENT_READ:
            self.read()

    def _watch_monitor(self) -> None:
        if self.monitor.sock is not None:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.monitor.wants_write else 0)
            self._loop.watch(self.monitor.sock, wanted, self._monitor_ready)

    def read(self) -> None:
        """Take up all that it has said by now."""
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
                self._loop.forget(sock)
        self._opening = None
        self.monitor.close()
        if process_start(self._state.qemu_pid) != self._state.qemu_start:
            self._qemu_ended()
        else:
            self._loop.after(RECONNECT_MS, self.connect)

    def _event(self, event: Message, now_ms: float) -> None:
        name, data = event["event"], event.get("data") or {}
        self.event_lag_ms = time.time() * 1000 - stamp_ms(event)
        if name == "SHUTDOWN" and self.shutdown_ms is None:
            self.shutdown_ms, self.shutdown_reason = now_ms, str(data.get("reason", ""))
            self.condition = "shutdown"
        elif name == "SHUTDOWN" and str(data.get("reason", "")).startswith("guest-"):
            # The guest's own word counts before and after a signal's: libvirt ends QEMU by one, and `virsh destroy` may cross it.
            self.shutdown_reason = str(data["reason"])
        elif name == "RESET" and self.shutdown_ms is not None and not self.ended:
            self.shutdown_ms, self.shutdown_reason, self.condition = None, "", "running"
        self._told.on_event(event, now_ms)
        if name not in ("STOP", "RESUME"):
            self._control.note("qemu", event=name, data=data)
        if name in ("SHUTDOWN", "COLO_EXIT", *DISK_ERRORS):
            self._told.decide(now_ms)

    def send(self, wanted: Commands, done: Callable[[list[Message]], None]) -> None:
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

    # ---- by way of the agent ----

    def agent_changed(self, there: bool) -> None:
        if there and self.condition == "unknown" and not self.ended:
            self._control.note("qemu-ended")
        if isinstance(self.monitor, Relay) and there:
            self._told.monitor_connected()
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
            self.shutdown_ms, self.condition = boottime_ms(), "shutdown"
        if self._is_dead():
            self._count_as_ended()
        answer({})

    def _is_dead(self) -> bool:
        return process_start(self._state.qemu_pid) != self._state.qemu_start

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

        self._loop.spawn(send())
