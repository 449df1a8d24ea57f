"""Scenery for the gate's tests: a FAKE QMP server, a FAKE peer gate, a dummy process as QEMU, the agent's end.

Nothing here is QEMU; what is real is the code under test (`mcft.monitor`, `python -m mcft.gate`).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from mcft.gate.loop import boottime_ms
from mcft.gate.state import GateState, LinkSpec, load, paths, process_start, save
from mcft.keepalive import Heard, Session, Word
from mcft.netbuffer import Nic

PATIENCE_S = 30.0
T = 800.0  # the loss time of these tests: long, so that a busy machine's own stalls are none
UUID = "11111111-2222-3333-4444-555555555555"
NIC = Nic("vnet0", "52:54:00:00:00:01", "hostnet0", "virtio", False, "bridge")
ROOT = Path(__file__).resolve().parents[2]

_changed = threading.Condition()


def changed() -> None:
    with _changed:
        _changed.notify_all()


def until(condition: Callable[[], Any], what: str = "") -> Any:
    """Wait for what the fakes' threads see; each of their steps wakes us."""
    with _changed:
        assert _changed.wait_for(condition, PATIENCE_S), f"never: {what or condition}"
        return condition()


class FakeQmp:
    """A FAKE of QEMU's monitor, one client at a time, in a thread. Records every command; answers by `answers`."""

    def __init__(self, path: Path, *, oob: bool = True, refuse_capabilities: bool = False) -> None:
        self.path, self.oob, self.refuse_capabilities = str(path), oob, refuse_capabilities
        self.commands: list[dict[str, Any]] = []
        self.times: list[float] = []  # when each arrived, CLOCK_BOOTTIME in ms
        self.connections = 0
        self.connected_ms = 0.0
        self.status = "running"
        self.answers: dict[str, Any] = {}  # command -> what it returns, or an Exception for an error
        self.mute = False  # accepts, and says nothing: a QEMU whose main loop hangs
        self.hold_replies: set[str] = set()  # commands that are not answered
        self.objects: list[str] = []
        self.chardevs: list[str] = ["charserial0"]
        self.colo_mode = "secondary"  # what `query-colo-status` says; a broken stream ends it
        self.says_exit = True  # a COLO_EXIT event comes with that end
        self.fds: dict[str, socket.socket] = {}
        self.stamp_ms = 1000  # of the next events
        self._client: socket.socket | None = None
        self._lock = threading.RLock()
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(self.path)
        self._server.listen(2)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            with contextlib.suppress(OSError):
                self._talk(client)
            client.close()
            self._client = None

    def _write(self, client: socket.socket, *bodies: dict[str, Any]) -> None:
        with self._lock:
            client.sendall(b"".join(json.dumps(body).encode() + b"\r\n" for body in bodies))

    def _talk(self, client: socket.socket) -> None:
        if self.mute:
            client.recv(1)
            return
        self._write(client, {"QMP": {"version": {}, "capabilities": ["oob"] if self.oob else []}})
        rest, fds = b"", []
        while True:
            data, ancillary, _, _ = client.recvmsg(1 << 16, socket.CMSG_SPACE(64))
            for level, kind, payload in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds += list(memoryview(payload).cast("i"))
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._command(client, json.loads(line), fds)

    def _command(self, client: socket.socket, message: dict[str, Any], fds: list[int]) -> None:
        name, arguments = message.get("execute") or message["exec-oob"], message.get("arguments", {})
        if name == "qmp_capabilities":
            if self.refuse_capabilities:
                self._write(client, {"error": {"class": "GenericError", "desc": "no"}})
                return
            self._client = client
            self.connected_ms = boottime_ms()
            self.enabled = arguments.get("enable", [])
            self._write(client, {"return": {}})
            self.connections += 1
            changed()
            return
        arrived_ms = boottime_ms()
        if name == "getfd":
            self.fds[arguments["fdname"]] = socket.socket(fileno=fds.pop(0))
        if name == "object-add":
            self.objects.append(arguments["id"])
        if name == "object-del":
            self.objects.remove(arguments["id"])
        if name == "chardev-add":
            self.chardevs.append(arguments["id"])
        if name == "chardev-remove":
            self.chardevs.remove(arguments["id"])
        made = {
            "query-status": {"status": self.status, "running": self.status == "running"},
            "qom-list": [{"name": o} for o in self.objects],
            "query-chardev": [{"label": c} for c in self.chardevs],
            "query-colo-status": {"mode": self.colo_mode, "last-mode": "none", "reason": "none"},
        }.get(name, {})
        made = self.answers.get(name, made)
        if name not in self.hold_replies:
            if isinstance(made, Exception):
                self._write(client, {"error": {"class": "GenericError", "desc": str(made)}, "id": message["id"]})
            else:
                self._write(client, {"return": made, "id": message["id"]})
        if name == "yank" and self.says_exit:
            self.end_colo()
        # Recorded last: whoever sees a command here may write an event behind its reply.
        self.times.append(arrived_ms)
        self.commands.append(message)
        changed()

    def event(self, name: str, status: str | None = None, **data: Any) -> None:
        """Write an event; status: what QEMU's `query-status` says from then on."""
        with self._lock:
            if status is not None:
                self.status = status
            assert self._client is not None
            stamp = {"seconds": self.stamp_ms // 1000, "microseconds": self.stamp_ms % 1000 * 1000}
            self._write(self._client, {"event": name, "data": data, "timestamp": stamp})

    def end_colo(self) -> None:
        """QEMU's COLO thread has left its loop: no load is under way, none begins."""
        with self._lock:
            self.colo_mode = "none"
            self.event("COLO_EXIT", mode="secondary", reason="error")

    def raw(self, data: bytes) -> None:
        with self._lock:
            assert self._client is not None
            self._client.sendall(data)

    def drop_client(self) -> None:
        """The connection breaks; QEMU lives."""
        with self._lock:
            assert self._client is not None
            self._client.shutdown(socket.SHUT_RDWR)

    def sent(self, name: str) -> list[dict[str, Any]]:
        return [c for c in self.commands if name in (c.get("execute"), c.get("exec-oob"))]

    def time_of(self, name: str) -> float:
        """When the first of these commands arrived."""
        index = next(i for i, c in enumerate(self.commands) if name in (c.get("execute"), c.get("exec-oob")))
        return self.times[index]

    def checkpoint(self, ran_ms: int = 0, stood_ms: int = 0) -> None:
        """STOP, the marker answered `colo`, RESUME: a whole checkpoint as the primary's monitor shows it, and its stamps."""
        before = len(self.sent("query-status"))
        self.stamp_ms += ran_ms
        self.event("STOP", "colo")
        until(lambda: len(self.sent("query-status")) > before, "no marker came")
        self.stamp_ms += stood_ms
        self.event("RESUME", "running")

    def close(self) -> None:
        self._server.close()
        if self._client is not None:
            with contextlib.suppress(OSError):
                self._client.shutdown(socket.SHUT_RDWR)


class FakePeer:
    """A FAKE of the other gate: the real `Session`, a word that the test sets, in a thread."""

    def __init__(self, key: bytes, pid: bytes, word: Word, interval_ms: float = 25.0) -> None:
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind(("127.0.0.1", 0))
        self.sock.setblocking(False)
        self.port = self.sock.getsockname()[1]
        self.session, self.word, self.interval_ms = Session(key, pid), word, interval_ms
        self.talking = True
        self.heard: list[Heard] = []
        self.heard_ms: list[float] = []
        self.armed_until_ms = float("-inf")  # the newest lease that the heard words gave us, with no margin
        self.gate_port = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self, gate_port: int) -> None:
        self.gate_port = gate_port
        self._thread.start()

    def _run(self) -> None:
        next_ms = boottime_ms()
        while not self._stop.is_set():
            now = boottime_ms()
            if now >= next_ms:
                next_ms = now + self.interval_ms
                if self.talking:
                    with contextlib.suppress(OSError):
                        self.sock.sendto(self.session.next(self.word, now), ("127.0.0.1", self.gate_port))
                    changed()
            select.select([self.sock], [], [], max(0.0, next_ms - now) / 1000)
            with contextlib.suppress(OSError):
                while True:
                    heard = self.session.accept(self.sock.recv(2048), "lo", boottime_ms())
                    if heard is None:
                        continue
                    self.heard_ms.append(boottime_ms())
                    self.heard.append(heard)
                    sent = self.session.sent_ms(heard.echo)
                    if heard.word.record == "armed" and not heard.word.claiming and sent is not None:
                        self.armed_until_ms = max(self.armed_until_ms, sent)
                    changed()

    @property
    def last(self) -> Word:
        return self.heard[-1].word if self.heard else Word()

    def next(self) -> Word:
        """What the gate says from now on: the second keepalive to come, for the first may be on its way already."""
        count = len(self.heard) + 2
        until(lambda: len(self.heard) >= count, "no keepalive comes")
        return self.last

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self.sock.close()


class AgentEnd:
    """One connection of an agent to the gate's control socket."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE_S)
        self.sock.connect(path)
        self.file = self.sock.makefile("rb")
        self.notes: list[dict[str, Any]] = []
        self._serial = 0

    def post(self, do: str, **fields: Any) -> int:
        self._serial += 1
        self.sock.sendall(json.dumps({"id": self._serial, "do": do, **fields}).encode() + b"\n")
        return self._serial

    def answer(self, ident: int) -> Any:
        """The answer to one request; notes on the way are kept. Raises: RuntimeError where the gate refused."""
        while True:
            message = json.loads(self.file.readline())
            if "note" in message:
                self.notes.append(message)
            elif message["id"] == ident:
                if "error" in message:
                    raise RuntimeError(message["error"])
                return message["ok"]

    def ask(self, do: str, **fields: Any) -> Any:
        return self.answer(self.post(do, **fields))

    def note(self, kind: str) -> dict[str, Any]:
        """The first note of this kind, waited for."""
        while not (found := [n for n in self.notes if n["note"] == kind]):
            message = json.loads(self.file.readline())
            if "note" in message:
                self.notes.append(message)
        return found[0]

    def status_when(self, condition: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """Ask until the status is so (each question is a round trip through the gate's loop)."""
        end = boottime_ms() + PATIENCE_S * 1000
        while not condition(status := self.ask("status")):
            assert boottime_ms() < end, status
        found: dict[str, Any] = status
        return found

    def close(self) -> None:
        self.file.close()
        self.sock.close()


class GateLab:
    """One real gate process between a fake QEMU monitor, a dummy process and a fake peer."""

    def __init__(self, role: str, **state: Any) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="g-")  # short: a unix socket's path has 107 bytes
        tmp = Path(self._folder.name)
        self.run_dir = tmp / "run"
        (self.run_dir / "gate").mkdir(parents=True)
        self.qmp = FakeQmp(tmp / "qmp")
        self.qemu = subprocess.Popen(["sleep", "1000"])
        key, pid = os.urandom(32), os.urandom(16)
        other = "standby" if role == "primary" else "primary"
        word = Word(other, 3, "armed" if other == "standby" else "protected", "running", closed=other == "standby")
        self.peer = FakePeer(key, pid, word)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        start = process_start(self.qemu.pid)
        assert start is not None
        # Loopback answers pings where we may send them; elsewhere the carrier of any NIC must do.
        lan = ["127.0.0.1"] if os.geteuid() == 0 else []
        self.state = GateState(
            UUID, "vm1", pid.hex(), 3, role, key.hex(), str(tmp / "qmp"), self.qemu.pid, start,
            [LinkSpec("127.0.0.1", port, "127.0.0.1", self.peer.port)], lan_check=lan, loss_ms=T, **state,
        )  # fmt: skip
        self.state_path, self.socket_path = paths(str(self.run_dir), UUID)
        save(self.state_path, self.state)
        self.peer.start(port)
        self.gate: subprocess.Popen[bytes] | None = None
        self.agents: list[AgentEnd] = []

    def start(self) -> AgentEnd:
        """Start (or restart) the gate and connect to it once it is ready."""
        connections = self.qmp.connections
        address = self.run_dir / "notify"
        address.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            ready.bind(str(address))
            ready.settimeout(PATIENCE_S)
            self.gate = subprocess.Popen(
                [sys.executable, "-m", "mcft.gate", UUID],
                cwd=ROOT,
                env={**os.environ, "MCFT_RUN_DIR": str(self.run_dir), "NOTIFY_SOCKET": str(address)},
            )
            assert b"READY" in ready.recv(100)
        if self.qemu.poll() is None:
            until(lambda: self.qmp.connections > connections, "the gate did not connect to the monitor")
        return self.agent()

    def agent(self) -> AgentEnd:
        """Another connection; the gate has accepted it (notes go to those only)."""
        self.agents.append(AgentEnd(self.socket_path))
        self.agents[-1].ask("status")
        return self.agents[-1]

    def kill_gate(self) -> None:
        assert self.gate is not None
        self.gate.kill()
        self.gate.wait()

    def kill_qemu(self) -> None:
        self.qemu.kill()
        self.qemu.wait()

    def saved(self) -> GateState:
        return load(self.state_path)

    def ends(self, serial: int) -> tuple[socket.socket, socket.socket]:
        """QEMU's ends of the first NIC's pair of the serial-th attach: (out, in)."""
        out, inn = self.qmp.fds[f"mcft-net0-{serial}-fdo"], self.qmp.fds[f"mcft-net0-{serial}-fdi"]
        inn.setblocking(True)
        inn.settimeout(PATIENCE_S)
        return out, inn

    def __enter__(self) -> GateLab:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for agent in self.agents:
            agent.close()
        if self.gate is not None:
            self.kill_gate()
        self.kill_qemu()
        self.peer.close()
        self.qmp.close()
        self._folder.cleanup()


def arrived(sock: socket.socket) -> bytes:
    """What has arrived by now, without waiting."""
    data = b""
    while select.select([sock], [], [], 0)[0] and (part := sock.recv(1 << 16)):
        data += part
    return data


def protected(lab: GateLab) -> AgentEnd:
    """A primary's gate that holds, is armed and has a lease."""
    agent = lab.start()
    assert agent.ask("attach") == {"attached": ["vnet0"]}
    agent.ask("hold")
    agent.ask("update", record="protected")
    agent.status_when(lambda s: s["lease"])
    return agent
