"""The gate's end of its RDMA keepalive: a link like the UDP ones (`send`, `receive`), and the state of its connection.

The queue pairs are set up over the agents' TLS connection: the primary's gate asks for it by a note as long as it is not
connected, its agent fetches an offer here, takes it to the other agent, and brings the answer back (`agent/rdma.py`).
"""

from __future__ import annotations

import mmap
import os
import selectors
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from mcft.gate.control import Answer, Denied
from mcft.gate.loop import Loop, boottime_ms
from mcft.gate.state import RdmaSpec
from mcft.rdma import REGION_BYTES, WRITE, Inbox, Spec

FIRST_WANT_MS, LONGEST_WANT_MS = 100.0, 2000.0
MODULE = "mcft.gate.verbs"  # a process of its own
RESTART_MS = 1000.0
HINT_MS = 10000.0  # an adapter's word that is older says nothing of now
EXCHANGE_MS = 5000.0  # an agent that fetched an offer and never came back: another may


class Note(Protocol):
    """`Control.note`."""

    def __call__(self, kind: str, **fields: Any) -> None: ...


class RdmaLink:
    """States: starting (its process is not ready), idle (not connected), up, absent (this Python has no pyverbs: for good).

    on_error: called when the adapter says that a write did not arrive; leads: this side asks for the connection.
    """

    def __init__(
        self, loop: Loop, spec: RdmaSpec, loss_ms: float, note: Note, *, leads: bool, on_error: Callable[[], None]
    ) -> None:
        self.name = f"rdma {spec.peer}"
        self.peer = spec.peer
        self.state = "starting"
        self.reason = "its verbs process is starting"
        self.error, self.error_ms = "", float("-inf")
        self.connections = self.errors = 0
        self._loop, self._spec, self._loss_ms, self._note = loop, spec, loss_ms, note
        self._leads, self._on_error = leads, on_error
        self._memory = os.memfd_create("mcft-rdma", os.MFD_CLOEXEC)  # 4 KiB that two processes share
        os.ftruncate(self._memory, REGION_BYTES)
        self.inbox = Inbox(memoryview(mmap.mmap(self._memory, REGION_BYTES)))
        self._sock: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ending: list[subprocess.Popen[bytes]] = []
        self._waiting: deque[Answer] = deque()
        self._idle_since_ms = boottime_ms()
        self._want_every_ms = FIRST_WANT_MS
        self._want_at_ms = self._restart_at_ms = float("-inf")

    # ---- the verbs process ----

    def start(self) -> None:
        """Start it; `tick` starts it again whenever it ends. A host that can't even do that goes on by UDP."""
        try:
            self._start()
        except OSError as error:
            self.reason = f"its verbs process can't be started: {error}"
            self._restart_at_ms = boottime_ms() + RESTART_MS

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        spec = msgspec.json.encode(Spec(self._spec.device, self._spec.local, self._loss_ms)).decode()
        with theirs:
            fds = (theirs.fileno(), self._memory)
            safe = ["-P"] if sys.flags.safe_path else []
            words = [sys.executable, *safe, "-m", MODULE, str(fds[0]), str(fds[1]), spec]
            self._process = subprocess.Popen(words, pass_fds=fds, stdin=subprocess.DEVNULL)
        ours.setblocking(False)
        self._sock = ours
        self._loop.watch(ours, selectors.EVENT_READ, lambda _events: self._read())

    def tick(self, now_ms: float) -> None:
        """With every keepalive: start the process anew where it ended; ask the agent for a connection, less and less often."""
        self._ending = [process for process in self._ending if process.poll() is None]
        if self._process is None and self.state != "absent" and now_ms > self._restart_at_ms:
            self.start()
        elif self.state == "idle" and self._leads and now_ms > self._want_at_ms:
            self._want_at_ms = now_ms + self._want_every_ms
            self._want_every_ms = min(2 * self._want_every_ms, LONGEST_WANT_MS)
            self._note("rdma-wanted", reason=self.reason, down_ms=now_ms - self._idle_since_ms)

    def _read(self) -> None:
        if self._sock is None:
            return
        try:
            packet = self._sock.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            self._process_ended()
            return
        body = msgspec.json.decode(packet)
        if "down" in body:
            self.errors += 1
            self.error, self.error_ms = body["down"], boottime_ms()
            self._idle(body["down"])
            self._on_error()
        elif "ready" in body:
            self.state, self.reason = "idle", "not connected yet"
        elif "absent" in body:
            self.state, self.reason = "absent", body["absent"]
        elif self._waiting:
            answer = self._waiting.popleft()
            answer(Denied(body["error"]) if "error" in body else body["ok"])

    def _process_ended(self) -> None:
        self._drop_process()
        if self.state == "absent":
            return
        self._idle("its verbs process ended")
        self.state, self.reason = "starting", "its verbs process ended"
        self._restart_at_ms = boottime_ms() + RESTART_MS

    def _drop_process(self) -> None:
        if self._sock is not None:
            self._loop.forget(self._sock)
            self._sock.close()
            self._sock = None
        waiting, self._waiting = self._waiting, deque()
        for answer in waiting:
            answer(Denied("the verbs process ended"))
        if self._process is not None:
            # Never waited for: a process that the kernel holds in an adapter's driver would hold the gate with it.
            self._process.kill()
            self._ending.append(self._process)
            self._process = None

    def close(self) -> None:
        """The gate ends."""
        self._drop_process()
        os.close(self._memory)

    # ---- a link ----

    def send(self, datagram: bytes) -> bool:
        """False where it can't leave now."""
        if self.state != "up" or self._sock is None:
            return False
        try:
            self._sock.send(WRITE + datagram)
        except OSError:
            return False
        return True

    def receive(self) -> list[bytes]:
        """The newest datagram that the other host wrote here, if it is a new one. A glance at memory."""
        found = self.inbox.take() if self.state == "up" else None
        return [] if found is None else [found]

    # ---- connecting ----

    def _idle(self, reason: str) -> None:
        if self.state in ("absent", "starting"):
            return
        if self.state == "up":
            self._idle_since_ms, self._want_every_ms = boottime_ms(), FIRST_WANT_MS
            self._want_at_ms = float("-inf")
        self.state, self.reason = "idle", reason

    def handlers(self) -> dict[str, Callable[[dict[str, Any], Answer], None]]:
        """The agent's requests."""
        return {"rdma-offer": self._on_offer, "rdma-connect": self._on_connect, "rdma-accept": self._on_accept}

    def _on_offer(self, _request: dict[str, Any], answer: Answer) -> None:
        """Where the other side would write: a fresh queue pair, the old one is gone."""
        if self.state == "up":
            raise Denied("it is connected already")
        self._idle("being connected")
        self._want_at_ms = boottime_ms() + EXCHANGE_MS
        self._ask({"do": "open"}, answer)

    def _on_connect(self, request: dict[str, Any], answer: Answer) -> None:
        """The other side's answer to our offer; or why there is none."""
        if "error" in request:
            self._failed(request["error"])
            answer({})
            return
        self._ask({"do": "connect", "offer": request["offer"]}, self._connected(answer))

    def _on_accept(self, request: dict[str, Any], answer: Answer) -> None:
        """The other side's offer: a fresh queue pair, connected to it, is our answer."""
        self._idle("being connected")
        self._ask({"do": "accept", "offer": request["offer"]}, self._connected(answer))

    def _connected(self, answer: Answer) -> Answer:
        def done(result: Any) -> None:
            if isinstance(result, Exception):
                self._failed(str(result))
            else:
                self.state, self.reason = "up", ""
                self.connections += 1
            answer(result)

        return done

    def _failed(self, reason: str) -> None:
        self._idle(reason)
        self._want_at_ms = boottime_ms() + self._want_every_ms

    def _ask(self, body: dict[str, Any], answer: Answer) -> None:
        if self._sock is None or self.state in ("absent", "starting"):
            raise Denied(self.reason)
        try:
            self._sock.send(msgspec.json.encode(body))
        except OSError as error:
            raise Denied(f"the verbs process does not take requests: {error}") from None
        self._waiting.append(answer)

    def failing(self, now_ms: float) -> str:
        """What the adapter said lately of a write of ours that did not arrive; empty since the connection stands again."""
        return self.error if self.state != "up" and now_ms - self.error_ms < HINT_MS else ""

    def detail(self, now_ms: float) -> str:
        """For `status`: empty while all is well."""
        since = f", {self.error} {(now_ms - self.error_ms) / 1000:.1f} s ago" if self.error and self.reason != self.error else ""
        return "" if self.state == "up" else f"{self.reason}{since}"
