"""The added QMP monitor: one connection, replies and events in the order in which QEMU wrote them.

QEMU 11.1 takes a monitor while it runs (`chardev-add` + `object-add monitor-qmp`). Its socket is handed over by
descriptor, so only root reaches its path. It serves one client at a time. Out-of-band execution is negotiated
(`qmp_capabilities enable: ["oob"]`), because `yank` must be answered while QEMU's main loop hangs in a dead stream.

`Lines` is the sans-IO half; `Monitor` adds the non-blocking socket for the gate's loop. Specification:
QEMU `docs/interop/qmp-spec.rst`.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
MAX_LINE_BYTES = 64 * 1024 * 1024
# A write that one of the copies missed (QEMU: qapi/block-core.json): replication and quorum say it by these alone.
DISK_ERRORS = ("QUORUM_FAILURE", "QUORUM_REPORT_BAD", "BLOCK_IO_ERROR")


def stamp_ms(event: Message) -> float:
    """When QEMU wrote this event, ms of CLOCK_REALTIME."""
    stamp = event["timestamp"]
    return float(stamp["seconds"] * 1000 + stamp["microseconds"] / 1000)


class MonitorGone(ConnectionError):
    """QEMU closed the monitor, or it can't be reached."""


@dataclass
class Lines:
    """Bytes in, parsed QMP messages out."""

    _rest: bytes = b""

    def feed(self, data: bytes) -> list[Message]:
        """Raises: MonitorGone for what is not QMP (a broken line can't be resynchronised)."""
        *lines, rest = (self._rest + data).split(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            raise MonitorGone("a QMP line is longer than 64 MiB")
        self._rest = rest
        try:
            return [json.loads(line) for line in lines if line.strip()]
        except ValueError as error:
            raise MonitorGone(f"not QMP: {error}") from None


Reply = Callable[[Message], None]


@dataclass
class Monitor:
    """One client of the added monitor. `open` and `negotiate`, or `connect`; then `receive` whenever the socket is readable."""

    path: str
    sock: socket.socket | None = None
    oob: bool = False
    last_reply_ms: float = float("-inf")
    _owed_from_ms: float = float("-inf")
    _lines: Lines = field(default_factory=Lines)
    _replies: dict[str, Reply] = field(default_factory=dict)
    _serial: int = 0
    _unsent: bytearray = field(default_factory=bytearray)
    _opening: socket.socket | None = None  # connected, not negotiated yet
    _early: list[Message] = field(default_factory=list)  # came right behind the negotiation's reply

    def open(self) -> socket.socket:
        """Connect without waiting; `negotiate` whenever this socket is readable. Raises: MonitorGone.

        A QEMU whose main loop hangs accepts and says nothing: nobody may block for its greeting.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            sock.connect(self.path)
        except OSError as error:
            sock.close()
            raise MonitorGone(f"monitor {self.path}: {error}") from None
        # Nothing that was meant for an earlier connection is sent or read on this one.
        self.close()
        self._opening = sock
        return sock

    def negotiate(self) -> bool:
        """Take the greeting, ask for out-of-band execution; True once commands can be sent. Raises: MonitorGone."""
        if self._opening is None:
            return self.sock is not None
        messages = self._lines.feed(_read(self._opening))
        while messages:
            message = messages.pop(0)
            if "QMP" in message:
                self.oob = "oob" in message["QMP"].get("capabilities", [])
                enable = {"enable": ["oob"]} if self.oob else {}
                line = json.dumps({"execute": "qmp_capabilities", "arguments": enable}).encode() + b"\n"
                try:
                    self._opening.sendall(line)  # the first bytes on a fresh socket: there is room
                except OSError as error:
                    raise MonitorGone(str(error)) from None
            elif "error" in message:
                raise MonitorGone(f"QMP negotiation refused: {message['error'].get('desc')}")
            elif "return" in message:
                self.sock, self._opening, self._early = self._opening, None, messages
                return True
        return False

    def connect(self, timeout_s: float = 2.0) -> None:
        """Connect and negotiate, blocking; for those without a loop. Raises: MonitorGone."""
        sock = self.open()
        deadline_s = time.monotonic() + timeout_s
        try:
            while not self.negotiate():
                if not select.select([sock], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
                    raise MonitorGone(f"monitor {self.path}: no greeting within {timeout_s:g} s")
        except MonitorGone:
            self.close()
            raise

    def encode(
        self, command: str, arguments: Message | None = None, on_reply: Reply | None = None, *, oob: bool = False
    ) -> bytes:
        """The line of one command; its reply will go to on_reply."""
        self._serial += 1
        ident = f"g{self._serial}"
        if on_reply is not None:
            self._replies[ident] = on_reply
        message: Message = {("exec-oob" if oob and self.oob else "execute"): command, "id": ident}
        if arguments:
            message["arguments"] = arguments
        return json.dumps(message, separators=(",", ":")).encode() + b"\n"

    def send(
        self, command: str, arguments: Message | None = None, on_reply: Reply | None = None, *, oob: bool = False
    ) -> None:
        """Queue and send one command. Raises: MonitorGone."""
        if self.sock is None:
            raise MonitorGone("not connected")
        self._unsent += self.encode(command, arguments, on_reply, oob=oob)
        try:
            self.flush()
        except MonitorGone:
            self._replies.pop(f"g{self._serial}", None)  # whoever sends is told by the exception alone
            raise

    def flush(self) -> None:
        """Send what is queued as far as the socket takes it. Raises: MonitorGone."""
        if self.sock is None:
            raise MonitorGone("not connected")
        try:
            while self._unsent:
                del self._unsent[: self.sock.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError as error:
            raise MonitorGone(str(error)) from None

    @property
    def connected(self) -> bool:
        """Whether commands can be sent."""
        return self.sock is not None

    def silent_ms(self, now_ms: float) -> float:
        """How long QEMU has owed an answer without giving any. Asked often: what is owed counts from the first look at it."""
        if not self._replies:
            self._owed_from_ms = now_ms
        return now_ms - max(self.last_reply_ms, self._owed_from_ms)

    @property
    def wants_write(self) -> bool:
        """Whether a command still waits for room in the socket."""
        return bool(self._unsent)

    def receive(self) -> list[Message]:
        """All messages that wait, in QEMU's order; give each to `dispatch` before looking at the next.

        Raises: MonitorGone at the end of the stream (what came before it was returned by an earlier call).
        """
        if self.sock is None:
            raise MonitorGone("not connected")
        if self._early:
            early, self._early = self._early, []
            return early
        return self._lines.feed(_read(self.sock))

    def dispatch(self, message: Message, now_ms: float) -> Message | None:
        """An event is returned; a reply is given to whoever sent its command (None is returned)."""
        if "event" in message:
            return message
        self.last_reply_ms = now_ms
        on_reply = self._replies.pop(str(message.get("id")), None)
        if on_reply is not None:
            on_reply(message)
        return None

    @property
    def unanswered(self) -> int:
        """Commands whose reply has not come."""
        return len(self._replies)

    def close(self) -> None:
        """Let go of the socket; every waiting caller gets an error reply."""
        for sock in (self.sock, self._opening):
            if sock is not None:
                sock.close()
        self.sock = self._opening = None
        self._early = []
        waiting, self._replies = self._replies, {}
        self._unsent.clear()
        self._lines = Lines()
        for on_reply in waiting.values():
            on_reply({"error": {"class": "MonitorGone", "desc": "the monitor closed"}})


def _read(sock: socket.socket) -> bytes:
    """What waits in a non-blocking socket, empty if nothing does. Raises: MonitorGone at the end of the stream."""
    try:
        data = sock.recv(1 << 20)
    except BlockingIOError:
        return b""
    except OSError as error:
        raise MonitorGone(str(error)) from None
    if not data:
        raise MonitorGone("end of file")
    return data
