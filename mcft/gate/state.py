"""What a gate must know to start by itself: written by the agent before the gate, then by the gate alone.

It lives in the run directory (tmpfs): a reboot forgets it, and nothing of it is needed after one.
"""

from __future__ import annotations

import os

import msgspec

from mcft.netbuffer import Mode, Nic, Way


class LinkSpec(msgspec.Struct, frozen=True):
    """One keepalive path; the first of a list is the replication link."""

    local: str
    local_port: int
    peer: str
    peer_port: int


class RdmaSpec(msgspec.Struct, frozen=True):
    """The RDMA keepalive's path: our device ("auto": the one with our address), our address and the peer's."""

    device: str
    local: str
    peer: str


class GateState(msgspec.Struct):
    """pid: 32 hex digits; key: 64 hex digits; qemu_start: clock ticks since boot (/proc/PID/stat field 22).

    yank: instances for QEMU's `yank`. silenced: interfaces that `speak` sets up and frees of mcft's drop filter.
    limit_bytes: what the buffer holds per NIC at most; 0: as the buffer itself thinks fit.
    tcg: the guest runs without KVM (`engines/tcg.py`). monitor: empty where the agent carries commands and events (`relay.py`).
    period_ms: between checkpoints, where they were stretched beyond the delay (`pace.py`).
    stream_port: of the checkpoint stream on the standby's host, by which its socket is known; 0: not known.
    """

    uuid: str
    domain: str
    pid: str
    g: int
    role: str
    key: str
    monitor: str
    qemu_pid: int
    qemu_start: int
    links: list[LinkSpec]
    record: str = "preparing"
    mode: Mode = "pass"
    buffer: Way = "filter"
    attached: bool = False
    nics: list[Nic] = []
    silenced: list[str] = []
    overlays: dict[str, str] = {}  # a standby's: disk → its `active` overlay, until QEMU has committed it after a take-over
    yank: list[dict[str, str]] = []
    loss_ms: float = 300.0
    delay_ms: float = 100.0
    period_ms: float = 0.0
    lan_check: list[str] = []
    claiming: bool = False
    disk_error: str = ""
    serial: int = 0
    limit_bytes: int = 0
    tcg: bool = False
    rdma: RdmaSpec | None = None
    engine: str = "colo"
    stream_port: int = 0

    @property
    def every_ms(self) -> float:
        """Between checkpoints now."""
        return max(self.delay_ms, self.period_ms)


def paths(run_dir: str, uuid: str) -> tuple[str, str]:
    """The state file and the control socket of a gate."""
    return os.path.join(run_dir, "gate", f"{uuid}.json"), os.path.join(run_dir, "gate", f"{uuid}.sock")


def load(path: str) -> GateState:
    """Raises: OSError, msgspec.ValidationError."""
    with open(path, "rb") as file:
        return msgspec.json.decode(file.read(), type=GateState)


def save(path: str, state: GateState) -> None:
    """Replace the file in one step, so that a gate killed while writing finds the old one or the new one."""
    fresh = f"{path}.new"
    with open(fresh, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(msgspec.json.encode(state))
    os.replace(fresh, path)


def process_start(pid: int) -> int | None:
    """The start time of a process in clock ticks since boot; None if there is none (or only its zombie)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rsplit(b")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])
