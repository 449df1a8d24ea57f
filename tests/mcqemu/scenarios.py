"""Plays recorded scenarios against the stand-in (not the micro-checkpointing QEMU): `scenarios.py NAME` prints the run's lines.

The recorded runs' own steps, shorter; the guest is firmware that finds nothing to boot. Needs QEMU 11.1 and the standard
library only, so it runs inside a lab host. The output has the recorded runs' format.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

EMULATOR = os.path.join(os.path.dirname(os.path.abspath(__file__)), "emulator")
MACHINE = ["-M", "pc,accel=tcg", "-cpu", "qemu64", "-m", "64", "-nodefaults", "-display", "none", "-net", "none"]
START_S = time.monotonic()
FOLDER = f"/tmp/mcqemu-{os.getpid()}"
MC = ("mc", "mc-net-disable", "mc-disk-disable")
LOCK = threading.Lock()


STARTED: list[Qemu] = []


def log(**row: Any) -> None:
    with LOCK:
        print(json.dumps({"t": round(time.monotonic() - START_S, 4), **row}), flush=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Qemu:
    """One emulator and its monitor. Its lines are logged as they come."""

    def __init__(self, side: str, *arguments: str) -> None:
        self.side, path = side, os.path.join(FOLDER, side)
        argv = [EMULATOR, *MACHINE, "-name", side, "-qmp", f"unix:{path},server,nowait", *arguments]
        log(side=side, dir="argv", msg=" ".join(argv))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # an earlier one's, which a child of it may still listen on
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        STARTED.append(self)
        self.path, self.replies = path, queue.Queue[dict[str, Any]]()
        self.sock = connect(path)
        self._greeted, self.ended, self.resumes = threading.Event(), threading.Event(), 0
        threading.Thread(target=self._read, daemon=True).start()
        assert self._greeted.wait(10), f"{side}: no greeting"
        assert self.execute("qmp_capabilities") == {"return": {}}

    def _read(self) -> None:
        try:
            for line in self.sock.makefile():
                message = json.loads(line)
                log(side=self.side, dir="in", msg=message)
                if "QMP" in message:
                    self._greeted.set()
                elif "event" in message:
                    self.resumes += message["event"] == "RESUME"
                else:
                    self.replies.put(message)
        except OSError:
            pass
        log(side=self.side, dir="eof", msg="QMP socket closed")
        self.replies.put({})
        self.ended.set()

    def execute(self, command: str, wait_s: float = 10.0, **arguments: Any) -> dict[str, Any]:
        """The reply, {} without one in time."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self.send({"execute": command, **({"arguments": named} if named else {})}, wait_s)

    def send(self, message: dict[str, Any], wait_s: float = 10.0) -> dict[str, Any]:
        log(side=self.side, dir="out", msg=message)
        try:
            self.sock.sendall(json.dumps(message).encode())
            return self.replies.get(timeout=wait_s)
        except queue.Empty:
            log(side=self.side, dir="mark", msg=f"no reply in {wait_s:g}s")
        except OSError as error:
            log(side=self.side, dir="mark", msg=f"send failed: {error}")
        return {}

    def migration(self) -> dict[str, Any]:
        said: dict[str, Any] = self.execute("query-migrate").get("return", {})
        return said

    def status(self) -> str:
        return str(self.execute("query-status").get("return", {}).get("status"))

    def kill(self, number: int = signal.SIGKILL) -> None:
        log(side=self.side, dir="mark", msg=f"signal {signal.Signals(number).name}")
        self.process.send_signal(number)

    def exit_code(self) -> int:
        """Of one that ends by itself; all that its monitor said is logged before what comes next is."""
        code = self.process.wait(5)
        assert self.ended.wait(5), f"{self.side}: its monitor outlives it"
        return code

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        code = self.process.wait(10)
        self.ended.wait(5)
        log(side=self.side, dir="log", msg=[], exit=code)


def connect(path: str) -> socket.socket:
    deadline_s = time.monotonic() + 20
    while True:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(path)
            return sock
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)


def until(condition: Callable[[], object], what: str, wait_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited in vain: {what}"
        time.sleep(0.02)


def pair(*extra: str, listen: int | None = None) -> tuple[Qemu, Qemu, int]:
    port = listen or free_port()
    dst = Qemu("dst", "-incoming", f"tcp:127.0.0.1:{port}", *extra)
    src = Qemu("src")
    time.sleep(0.3)  # the firmware's own work; the recorded runs waited for a guest
    return src, dst, port


def set_up(src: Qemu, speed_bytes: int = 1_000_000_000, delay_ms: int | None = None) -> None:
    assert src.execute("migrate-set-capabilities", capabilities=[{"capability": n, "state": True} for n in MC]) == {"return": {}}
    if delay_ms is not None:
        src.execute("migrate-set-mc-delay", value=delay_ms)
    src.execute("migrate_set_speed", value=speed_bytes)


def protect(src: Qemu, port: int, **settings: int) -> None:
    set_up(src, **settings)
    assert src.execute("migrate", uri=f"tcp:127.0.0.1:{port}") == {"return": {}}
    until(lambda: src.migration().get("status") == "checkpointing", "checkpointing")


def checkpoints(src: Qemu, number: int) -> None:
    """Poll until the counter is so far."""
    until(lambda: src.migration().get("mc", {}).get("checkpoints", -1) >= number, f"{number} checkpoints")


def failed(src: Qemu) -> None:
    until(lambda: src.migration().get("status") == "failed", "failed")
    assert src.status() == "running"


def basic() -> None:
    src, dst, port = pair()
    for side in (src, dst):
        for command in ("query-version", "query-migrate-capabilities", "query-status", "query-migrate"):
            side.execute(command)
    protect(src, port)
    for _ in range(2):
        dst.execute("query-migrate", wait_s=0.5)
    dst.execute("query-status", wait_s=0.5)
    checkpoints(src, 15)
    src.status()
    src.process.kill()
    until(lambda: dst.replies.qsize() >= 3, "queued replies")
    while not dst.replies.empty():
        dst.replies.get()
    dst.status()


def delay_input() -> None:
    src = Qemu("src", "-S")
    src.execute("migrate-set-mc-delay", value=100)
    src.execute("migrate-set-mc-delay", value=0)
    assert src.exit_code() == -signal.SIGFPE
    STARTED.remove(src)  # the recorded run has no such line for this one
    src = Qemu("src", "-S")
    for value in (-1, 10, 1, 10**12, 2**63 - 1, 2**63, "100", "abc", 100.5, 100.0, True, None, [1]):
        src.execute("migrate-set-mc-delay", value=value)
    for arguments in ({}, {"value": 1, "x": 2}, {"delay": 5}):
        src.send({"execute": "migrate-set-mc-delay", "arguments": arguments})
    src.execute("human-monitor-command", command_line="migrate-set-mc-delay 5")
    for rows in ([("mc-foo", True)], [("mc", "on")], [("mc", True), ("mc-foo", True)]):
        src.execute("migrate-set-capabilities", capabilities=[{"capability": n, "state": s} for n, s in rows])
    src.execute("query-migrate-capabilities")
    for name in ("mc-rdma-copy", "rdma-keepalive", "rdma-pin-all", "mc-ppc-cheat-tce", "mc-disk-disable", "mc-net-disable", "mc"):
        src.execute("migrate-set-capabilities", capabilities=[{"capability": name, "state": True}])
    src.execute("migrate_cancel")
    src.execute("migrate-cancel")
    for uri in ("foo:bar", "tcp:127.0.0.1", "tcp:127.0.0.1:9", "unix:/w/nope.sock", "rdma:127.0.0.1:4444"):
        src.execute("migrate", uri=uri)
        until(lambda: src.migration().get("status") == "failed", "failed")
    src.execute("migrate-incoming", uri="tcp:127.0.0.1:4444")


def delay_zero() -> None:
    src, dst, port = pair()
    protect(src, port)
    checkpoints(src, 5)
    src.execute("migrate-set-mc-delay", value=0, wait_s=2)
    until(lambda: dst.resumes, "take-over")
    dst.status()


def delay_change() -> None:
    src, _dst, port = pair()
    protect(src, port)
    for value in (100, 200, 500, 100):
        src.execute("migrate-set-mc-delay", value=value)
        seen = src.migration()["mc"]["checkpoints"]
        checkpoints(src, seen + 5 * 100 // value + 2)


def delay_negative() -> None:
    src, _dst, port = pair()
    protect(src, port)
    checkpoints(src, 5)
    src.execute("migrate-set-mc-delay", value=-1)
    time.sleep(0.5)
    stalled = src.migration()["mc"]["checkpoints"]
    src.execute("migrate-set-mc-delay", value=100)
    time.sleep(0.7)
    assert src.migration()["mc"]["checkpoints"] == stalled
    src.status()


def commands_during() -> None:
    src, _dst, port = pair()
    protect(src, port)
    for name in ("mc", "mc-net-disable"):
        src.execute("migrate-set-capabilities", capabilities=[{"capability": name, "state": False}])
    src.execute("migrate", uri=f"tcp:127.0.0.1:{port}")
    src.execute("migrate_set_speed", value=1_000_000_000)
    checkpoints(src, 5)
    src.execute("migrate_cancel")
    checkpoints(src, 12)


def source_killed_standby_held() -> None:
    src, dst, port = pair("-S")
    protect(src, port)
    checkpoints(src, 10)
    src.kill()
    dst.status()
    dst.migration()
    time.sleep(0.5)
    dst.execute("cont")
    dst.status()


def standby_killed() -> None:
    src, dst, port = pair()
    protect(src, port)
    checkpoints(src, 10)
    dst.kill()
    failed(src)
    port = free_port()
    dst2 = Qemu("dst2", "-incoming", f"tcp:127.0.0.1:{port}")
    src.execute("query-migrate-capabilities")
    src.execute("migrate", uri=f"tcp:127.0.0.1:{port}")
    checkpoints(src, 10)
    src.status()
    src.kill()
    until(lambda: dst2.resumes, "take-over")
    dst2.status()


def standby_told_to_quit() -> None:
    src, dst, port = pair()
    protect(src, port)
    checkpoints(src, 5)
    fresh = socket.socket(socket.AF_UNIX)
    fresh.settimeout(0.5)
    fresh.connect(dst.path)
    try:
        greeting = fresh.recv(1)
    except TimeoutError:
        greeting = b""
    assert not greeting, "a deaf monitor greets nobody"
    dst.execute("quit", wait_s=0.5)
    checkpoints(src, 12)
    dst.kill(signal.SIGTERM)
    checkpoints(src, 20)
    assert dst.process.poll() is None
    src.kill()
    dst.exit_code()


def source_stopped() -> None:
    src, _dst, port = pair()
    protect(src, port, delay_ms=500)
    checkpoints(src, 1)
    src.execute("stop")
    src.status()
    until(lambda: src.status() == "running", "the next checkpoint")
    src.migration()


def source_paused() -> None:
    port = free_port()
    Qemu("dst", "-incoming", f"tcp:127.0.0.1:{port}")
    src = Qemu("src", "-S")
    protect(src, port)
    checkpoints(src, 10)
    src.status()


def cancelled_first_pass() -> None:
    src, dst, port = pair()
    set_up(src, speed_bytes=10_000)
    src.execute("migrate", uri=f"tcp:127.0.0.1:{port}")
    until(lambda: src.migration().get("status") == "active", "active")
    src.execute("migrate_cancel")
    until(lambda: src.migration().get("status") == "cancelled", "cancelled")
    dst.exit_code()
    src.status()


def source_killed_first_pass() -> None:
    src, dst, port = pair()
    set_up(src, speed_bytes=10_000)
    src.execute("migrate", uri=f"tcp:127.0.0.1:{port}")
    until(lambda: src.migration().get("status") == "active", "active")
    dst.status()
    dst.migration()
    src.kill()
    dst.exit_code()


def standby_killed_first_pass() -> None:
    src, dst, port = pair()
    set_up(src, speed_bytes=10_000)
    src.execute("migrate", uri=f"tcp:127.0.0.1:{port}")
    until(lambda: src.migration().get("status") == "active", "active")
    dst.kill()
    failed(src)


def reprotect() -> None:
    src, dst, port = pair()
    protect(src, port)
    checkpoints(src, 10)
    src.kill()
    until(lambda: dst.resumes, "take-over")
    dst.status()
    dst.migration()
    port = free_port()
    dst2 = Qemu("dst2", "-incoming", f"tcp:127.0.0.1:{port}")
    dst.execute("query-migrate-capabilities")
    protect(dst, port)
    checkpoints(dst, 10)
    dst.kill()
    until(lambda: dst2.resumes, "take-over")
    dst2.status()


def quit_queued() -> None:
    src, dst, port = pair("-S")
    protect(src, port)
    checkpoints(src, 5)
    dst.execute("quit", wait_s=0.5)
    src.kill()
    dst.exit_code()


def hang() -> None:
    os.makedirs("/run/mcqemu", exist_ok=True)
    src, dst, port = pair("-S")
    with open("/run/mcqemu/src.hang", "w"):
        pass
    set_up(src)
    src.execute("migrate", uri=f"tcp:127.0.0.1:{port}")
    until(lambda: not src.execute("query-migrate", wait_s=2), "the hang")
    src.execute("query-migrate", wait_s=2)
    src.kill()
    dst.status()
    dst.migration()
    dst.execute("cont")
    dst.status()


class Relay(threading.Thread):
    """A link that can be cut without a word: while it is, nothing is read or written, and nothing is closed."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port, self._to, self.whole = self.listener.getsockname()[1], port, threading.Event()
        self.whole.set()
        self.start()

    def run(self) -> None:
        near, _ = self.listener.accept()
        far = socket.create_connection(("127.0.0.1", self._to))
        for one, other in ((near, far), (far, near)):
            threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        while data := one.recv(1 << 16):
            self.whole.wait()
            other.sendall(data)


def partition_heals() -> None:
    src, _dst, port = pair()
    relay = Relay(port)
    protect(src, relay.port)
    checkpoints(src, 10)
    relay.whole.clear()
    time.sleep(0.3)
    frozen = src.migration()["mc"]["checkpoints"]
    for _ in range(20):
        time.sleep(0.1)
        assert src.migration()["mc"]["checkpoints"] == frozen
    src.status()
    relay.whole.set()
    checkpoints(src, frozen + 10)


PLAYED: dict[str, Callable[[], None]] = {
    "01-basic-tcp": basic,
    "02-mc-delay-input": delay_input,
    "02b-delay-zero-running": delay_zero,
    "03-delay-running": delay_change,
    "04-delay-negative-running": delay_negative,
    "11-commands-during-mc": commands_during,
    "12b-src-kill-dst-S": source_killed_standby_held,
    "13-dst-kill": standby_killed,
    "16-dst-quit-sigterm": standby_told_to_quit,
    "18-src-stop-cont": source_stopped,
    "21-cancel-active": cancelled_first_pass,
    "21b-src-kill-active": source_killed_first_pass,
    "21c-dst-kill-active": standby_killed_first_pass,
    "22-reprotect": reprotect,
    "25c-src-paused": source_paused,
    "32-dstS-queued-quit": quit_queued,
    "40-partition-mute-10s-heal": partition_heals,
    "90-src-hang-zero-dirty-then-kill-dst-S": hang,
}


def main(name: str) -> None:
    os.makedirs(FOLDER)
    log(note=f"the stand-in plays {name}", scenario=name)
    try:
        PLAYED[name]()
        log(summary="the end")
    finally:
        for qemu in STARTED:
            qemu.end()
        shutil.rmtree(FOLDER)


if __name__ == "__main__":
    main(sys.argv[1])
