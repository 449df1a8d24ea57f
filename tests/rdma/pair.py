"""Two real gates (`python -m mcft.gate`) with their RDMA keepalives, and what stands in for the rest.

FAKE are QEMU's monitors, the dummy processes as QEMUs, and the two agents: a thread that carries the gates' offers from one
to the other as the agents do over TLS.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fabric import A, B, End

from mcft.gate.loop import boottime_ms
from mcft.gate.state import GateState, LinkSpec, RdmaSpec, paths, process_start, save

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from gatelab import ROOT, UUID, AgentEnd, FakeQmp

T = 2000.0  # the loss time: long, as this VM's code is slow; detection is told in ratios
PATIENCE_S = 60.0


class Side:
    """One gate, its monitor and its dummy QEMU."""

    def __init__(
        self, role: str, here: End, there: End, pid: bytes, key: bytes, ports: tuple[int, int], device: str, loss_ms: float
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="g-", dir="/run")
        tmp = Path(self._folder.name)
        (tmp / "run/gate").mkdir(parents=True)
        self.run_dir, self.here, self.role = tmp / "run", here, role
        self.qmp = FakeQmp(tmp / "qmp")
        self.qemu = subprocess.Popen(["sleep", "10000"])
        start = process_start(self.qemu.pid)
        assert start is not None
        copy = role == "standby"
        self.state = GateState(
            UUID, "vm1", pid.hex(), 3, role, key.hex(), str(tmp / "qmp"), self.qemu.pid, start,
            [LinkSpec(here.address, ports[0], there.address, ports[1])], record="preparing",
            mode="closed" if copy else "pass", buffer="none", loss_ms=loss_ms, delay_ms=100.0,
            rdma=RdmaSpec(device, here.address, there.address) if device else None,
        )  # fmt: skip
        self.state_path, self.socket_path = paths(str(self.run_dir), UUID)
        save(self.state_path, self.state)
        self.gate: subprocess.Popen[bytes] | None = None
        self.agent: AgentEnd | None = None
        self.armed = False

    def start(self) -> None:
        """Until it is ready."""
        self.begin()()

    def begin(self) -> Callable[[], None]:
        """Start the gate; what is returned waits until it is ready."""
        address = self.run_dir / "notify"
        address.unlink(missing_ok=True)
        ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        ready.bind(str(address))
        ready.settimeout(PATIENCE_S)
        environ = {**os.environ, "MCFT_RUN_DIR": str(self.run_dir), "NOTIFY_SOCKET": str(address)}
        self.gate = subprocess.Popen([sys.executable, "-m", "mcft.gate", UUID], cwd=ROOT, env=environ)

        def wait() -> None:
            with ready:
                assert b"READY" in ready.recv(100)
            self.agent = AgentEnd(self.socket_path)

        return wait

    def arm(self) -> None:
        """As its agent does once armed(g) is durable."""
        assert self.agent is not None
        self.agent.ask("update", record="armed")
        self.armed = True

    def status(self) -> dict[str, Any]:
        assert self.agent is not None
        found: dict[str, Any] = self.agent.ask("status")
        return found

    def rdma(self) -> dict[str, Any]:
        return next(row for row in self.status()["links"] if row.get("kind") == "rdma")

    def cpu_ms(self) -> float:
        """What the gate and its verbs process have taken so far."""
        fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self.processes()]
        return sum(int(f[11]) + int(f[12]) for f in fields) * 1000 / os.sysconf("SC_CLK_TCK")

    def memory_kib(self) -> list[int]:
        """Resident, of each."""
        return [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4 for pid in self.processes()]

    def files(self) -> int:
        """Open, of both."""
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.processes())

    def hears_by_rdma(self) -> bool:
        row = self.rdma()
        return not row["detail"] and row["age_ms"] is not None and row["age_ms"] < self.state.loss_ms

    def processes(self) -> list[int]:
        """The gate and its verbs process."""
        assert self.gate is not None
        children = Path(f"/proc/{self.gate.pid}/task/{self.gate.pid}/children").read_text().split()
        return [self.gate.pid, *map(int, children)]

    def signal(self, number: int, *, gate_only: bool = False) -> None:
        pids = self.processes()
        for pid in pids[:1] if gate_only else pids:
            os.kill(pid, number)

    def kill(self) -> None:
        """As the OOM killer does: the gate alone; its verbs process has to go by itself."""
        if self.gate is not None:
            self.gate.kill()
            self.gate.wait()
            self.gate = None

    def close(self) -> None:
        if self.agent is not None:
            self.agent.close()
        if self.gate is not None:
            with suppress(OSError):
                self.signal(signal.SIGCONT)
            self.kill()
        self.qemu.kill()
        self.qemu.wait()
        self.qmp.close()
        self._folder.cleanup()


class Pair:
    """A primary on `A`; a standby on `B`, armed once both hear each other."""

    _port = 17000

    def __init__(self, *, devices: tuple[str, str] = ("auto", "auto"), loss_ms: float = T, udp: bool = True) -> None:
        """devices: as `RdmaSpec` has them, "" for a side without RDMA; udp: False sends those datagrams where nobody listens."""
        Pair._port += 3
        listen, to = Pair._port, Pair._port if udp else Pair._port + 1
        pid, key = os.urandom(16), os.urandom(32)
        self.primary = Side("primary", A, B, pid, key, (listen, to), devices[0], loss_ms)
        self.standby = Side("standby", B, A, pid, key, (listen, to), devices[1], loss_ms)
        self.sides = (self.primary, self.standby)
        self.refusals: list[str] = []  # why an exchange failed
        self._stop = threading.Event()

    def __enter__(self) -> Pair:
        for wait in [side.begin() for side in self.sides]:
            wait()
        threading.Thread(target=self._agents, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for side in self.sides:
            side.close()

    def _agents(self) -> None:
        """FAKE: for every `rdma-wanted` of the primary's gate, one exchange. Gates come and go."""
        while not self._stop.is_set():
            with suppress(OSError, ValueError, RuntimeError):
                ours = AgentEnd(self.primary.socket_path)
                while not self._stop.is_set():
                    ours.note("rdma-wanted")
                    self._exchange(ours)
                    ours.notes.clear()
            time.sleep(0.05)

    def _exchange(self, ours: AgentEnd) -> None:
        try:
            offer = ours.ask("rdma-offer")
            theirs = AgentEnd(self.standby.socket_path)
            theirs.sock.settimeout(20.0)
            try:
                answer = theirs.ask("rdma-accept", offer=offer)
            finally:
                theirs.close()
            ours.ask("rdma-connect", offer=answer)
        except (OSError, ValueError, RuntimeError) as error:
            self.refusals.append(str(error))
            ours.ask("rdma-connect", error=str(error))

    def connected(self) -> None:
        """Both directions alive, by RDMA."""
        for side in self.sides:
            until(side.hears_by_rdma, lambda: (self.primary.rdma(), self.standby.rdma(), self.refusals))
        assert self.standby.agent is not None
        if not self.standby.armed:
            self.standby.arm()  # before, its silence would count
        elif self.standby.status()["verdict"]:
            self.standby.agent.ask("unclaim")  # as its agent does when the primary turns out to live


def until(condition: Callable[[], Any], say: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
    """Ask the gates again and again (each question is a round trip through a gate's loop)."""
    end = boottime_ms() + patience_s * 1000
    while not (found := condition()):
        assert boottime_ms() < end, say()
        time.sleep(0.05)  # two slow CPUs, and the gates need them
    return found
