"""The API's own types: what agents, gates' owners, the CLI and scripts exchange as JSON.

One definition for server, client and renderer. Fields are only ever added, each with a default, so that
versions N and N-1 read each other (msgspec ignores unknown fields). Units are in the names.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from mcft.errors import BY_EXIT_CODE, Failed, unforeseen

API_VERSION = 1

State = Literal[
    "preparing", "syncing", "protected", "muted", "solo", "resyncing", "taking-over", "active",
    "lost", "stopped", "unprotected", "failed",
]  # fmt: skip
Role = Literal["primary", "standby"]
BufferChoice = Literal["auto", "plug", "filter", "none", "qemu"]
EngineChoice = Literal["auto", "mc", "colo"]
Transport = Literal["tcp", "unix", "rdma"]
ArbiterKind = Literal["standby", "etcd", "fence"]


class ErrorBody(msgspec.Struct, frozen=True):
    """An error as the API carries it (`errors.McftError`); exit_code is what the CLI ends with."""

    code: str
    message: str
    reason: str = ""
    next_step: str = ""
    exit_code: int = 1


class Quantiles(msgspec.Struct, frozen=True):
    """Median and 99th percentile over the last minute or so; None before the first sample."""

    p50: float | None = None
    p99: float | None = None


class Checkpoints(msgspec.Struct, frozen=True):
    acknowledged: int = 0
    rate_hz: float = 0.0
    last_ack_age_ms: float | None = None
    pause_ms: Quantiles = Quantiles()


class NicStatus(msgspec.Struct, frozen=True):
    target: str
    held_packets: int = 0
    held_bytes: int = 0
    dropped: int = 0
    ifb: str = ""


class Network(msgspec.Struct, frozen=True):
    buffer: str = "none"
    released_epochs: int = 0
    merged_epochs: int = 0
    hold_ms: Quantiles = Quantiles()
    nics: list[NicStatus] = []


class DiskStatus(msgspec.Struct, frozen=True):
    target: str
    state: str
    progress: float = 1.0


class LinkStatus(msgspec.Struct, frozen=True):
    """One keepalive path. kind: "udp" or "rdma". age_ms: since the peer's newest accepted keepalive on it (None: never).

    detail: what is wrong with an RDMA connection, the adapter's word included; empty while it stands.
    """

    kind: str
    link: str
    age_ms: float | None = None
    missed: int = 0
    detail: str = ""


class ArbiterStatus(msgspec.Struct, frozen=True):
    """Who decides which side goes on, as this host sees it. reason: why it can't decide now; peer_reachable: the other host's
    word (None: not known)."""

    kind: str = "standby"
    reachable: bool = True
    last_ok_age_ms: float | None = None
    reason: str | None = None
    peer_reachable: bool | None = None


class Versions(msgspec.Struct, frozen=True):
    mcft: str = ""
    qemu: str = ""
    libvirt: str = ""
    peer: dict[str, str] = {}


class JobBody(msgspec.Struct, frozen=True):
    """A long act. state: running, done, failed, cancelled. progress: 0.0 to 1.0 or None where unknown."""

    id: str
    kind: str
    domain: str
    state: Literal["running", "done", "failed", "cancelled"]
    step: str = ""
    progress: float | None = None
    started: str = ""
    finished: str | None = None
    result: str = ""
    error: ErrorBody | None = None


class EventBody(msgspec.Struct, frozen=True):
    """One line of the journal of a protection. id rises; time is RFC 3339 UTC."""

    id: int
    time: str
    domain: str
    kind: str
    text: str
    level: Literal["info", "warning", "alarm"] = "info"


class McOptions(msgspec.Struct, frozen=True):
    """Engine `mc`: its transport and its capabilities for RDMA (`docs/engines.md`)."""

    transport: Transport = "tcp"
    rdma_copy: bool = False
    rdma_keepalive: bool = False
    rdma_pin_all: bool = False


class McStatus(msgspec.Struct, frozen=True):
    """Engine `mc` on its primary. capabilities: those that are on. statistics: of the last checkpoint, as QEMU names them.

    Times in ms (`xmit-time`, `log-dirty-time`, `migration-bitmap-time`, `ram-copy-time`, `downtime`), rates in Mbit/s (`mbps`,
    `copy-mbps`). monitor: how QEMU is asked: "libvirt" (through the agent) or the path of the domain's second monitor.
    """

    transport: Transport = "tcp"
    capabilities: list[str] = []
    checkpoints: int | None = None
    statistics: dict[str, float] = {}
    monitor: str = "libvirt"


class Protection(msgspec.Struct, frozen=True):
    """One protection as this host sees it; the object of `mcft status --json` (documented in docs/api.md)."""

    domain: str
    uuid: str
    instance: str
    role: Role
    peer: str
    engine: str
    state: State
    reason: str | None = None
    next_step: str | None = None
    guest_running: bool = False
    output_flowing: bool = False
    survives_host_loss: bool = False
    unsafe: list[str] = []
    generation: int = 0
    arbiter: ArbiterStatus = ArbiterStatus()
    tls: bool = False
    delay_ms: int = 100
    period_ms: int = 100
    mode: str = "periodic"
    since: str = ""
    checkpoints: Checkpoints = Checkpoints()
    network: Network = Network()
    disks: list[DiskStatus] = []
    keepalive: list[LinkStatus] = []
    versions: Versions = Versions()
    job: JobBody | None = None
    last_event: EventBody | None = None
    mc: McStatus | None = None


class Status(msgspec.Struct, frozen=True):
    """maintenance: nothing is protected from this host or to it until `mcft maintenance off`."""

    host: str
    protections: list[Protection] = []
    version: int = API_VERSION
    maintenance: bool = False


class Events(msgspec.Struct, frozen=True):
    host: str
    events: list[EventBody] = []
    version: int = API_VERSION


# ---- operators' requests (unix socket, or TLS for a peer named as operator) ----


class ProtectRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """POST /v1/protections → JobBody. disks: target → path on the standby; overwrite: paths that may be.

    delay_ms, arbiter: None: as configured. engine, netbuffer: "auto": as configured, and then by asking QEMU and the kernel.
    rdma_device: a device's name, "auto" or "off"; empty: as the configuration says.
    mc: engine `mc`'s options, None for those of the configuration. experimental: what nobody could try may be used.
    What was not said is not sent: an older agent knows no `null` for the delay.
    """

    domain: str
    to: str
    delay_ms: int | None = None
    engine: EngineChoice = "auto"
    netbuffer: BufferChoice = "auto"
    disks: dict[str, str] = {}
    overwrite: list[str] = []
    key: str = ""
    rdma_device: str = ""
    arbiter: ArbiterKind | None = None
    mc: McOptions | None = None
    experimental: bool = False


class ActRequest(msgspec.Struct, frozen=True):
    """POST /v1/protections/{domain}/{unprotect|failover|solo|start} → JobBody. key: idempotency key.

    accept_lost_data: for `start`, where nobody can tell any more which side went on.
    """

    force: bool = False
    peer_is_off: bool = False
    key: str = ""
    accept_lost_data: bool = False


class MaintenanceRequest(msgspec.Struct, frozen=True):
    """POST /v1/maintenance → JobBody. for_shutdown: only until this host's next boot (off: end only such a one)."""

    on: bool
    for_shutdown: bool = False
    key: str = ""


class SetRequest(msgspec.Struct, frozen=True):
    """POST /v1/protections/{domain}/set → Protection."""

    delay_ms: int | None = None


class PeerBody(msgspec.Struct, frozen=True):
    name: str
    addresses: list[str]
    reachable: bool = False
    mcft: str = ""
    detail: str = ""
    maintenance: bool = False


class Peers(msgspec.Struct, frozen=True):
    host: str
    peers: list[PeerBody] = []


# ---- mcft check ----


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at. refusal: `protect` would end with exit_code because of it; warning: it would go."""

    level: Literal["ok", "warning", "refusal"]
    code: str
    message: str
    reason: str = ""
    next_step: str = ""
    exit_code: int = 0


class Prediction(msgspec.Struct, frozen=True):
    """What protection would cost this guest, from one second of its memory's changes. None: not known.

    limit_bytes_per_s: what the link carries, limit_is: why so ("rep0", "max_bandwidth", "assumed"). standing: share of
    the time in which the guest stands still.
    """

    delay_ms: int
    dirty_bytes_per_s: int | None = None
    pause_ms: float | None = None
    added_latency_ms: float | None = None
    worst_latency_ms: float | None = None
    bandwidth_bytes_per_s: int | None = None
    limit_bytes_per_s: int = 0
    limit_is: str = ""
    standing: float | None = None
    verdict: Literal["good", "costly", "bad", "unknown"] = "unknown"
    text: str = ""


class Check(msgspec.Struct, frozen=True):
    """POST /v1/check (a ProtectRequest) → what `protect` would say. exit_code: 0 if it would go, else what it would end with."""

    host: str
    domain: str
    uuid: str
    peer: str
    exit_code: int = 0
    findings: list[Finding] = []
    prediction: Prediction | None = None
    version: int = API_VERSION


def error_body(error: Exception) -> ErrorBody:
    """Any exception as the API carries it; what is not an `McftError` is ours to mend and says so."""
    said = unforeseen(error)
    return ErrorBody(said.code, said.message, said.reason, said.next_step, said.exit_code)


def raise_error(body: ErrorBody) -> None:
    """The other direction: raise what an agent answered."""
    raise BY_EXIT_CODE.get(body.exit_code, Failed)(body.code, body.message, body.reason, body.next_step)
