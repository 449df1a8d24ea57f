"""What an agent keeps of a protection, and what agents say to each other about it (all msgspec, JSON on disk and wire)."""

from __future__ import annotations

from typing import Any

import msgspec

from mcft.api import ArbiterKind, BufferChoice, EngineChoice, McOptions, Role, State
from mcft.arbiter.base import Intent
from mcft.arbiter.etcd import Key, Seen
from mcft.config import StreamTls
from mcft.diskreplica import Disk
from mcft.gate.state import LinkSpec, RdmaSpec
from mcft.generations import Ledger, Side
from mcft.netbuffer import Nic, Way

VOID_STATES = ("", "lost", "stopped", "unprotected", "failed")  # of a side that holds nothing of the protection any more


class Body(msgspec.Struct):
    """One protection on one host, as stored. pid: the instance; g: its generation; key: of the keepalives' MAC.

    xml: the persistent definition as it was before mcft; standby_disks: target → path on the standby.
    built: names of the set-up's steps that were begun, so that an agent which died in between can undo them.
    peer_mig_port, peer_nbd_port: the standby's. origin: why this instance was made ("operator", "again").
    """

    uuid: str
    domain: str
    pid: str
    g: int
    role: Role
    peer: str
    state: State = "preparing"
    reason: str = ""
    engine: EngineChoice = "colo"
    engine_asked: EngineChoice = "auto"
    buffer_asked: BufferChoice = "auto"
    buffer: Way = "filter"
    delay_ms: int = 100
    since: str = ""
    key: str = ""
    xml: str = ""
    persistent: bool = True
    autostart: bool = False
    disks: list[Disk] = []
    nics: list[Nic] = []
    disk_paths: dict[str, str] = {}
    paths_back: dict[str, str] = {}  # a standby's: target → its path on the primary's host, where it is another
    overwrite: list[str] = []
    created_files: list[str] = []
    built: list[str] = []
    links: list[LinkSpec] = []
    mig_port: int = 0
    nbd_port: int = 0
    qemu_pid: int = 0
    qemu_start: int = 0
    boot_id: str = ""
    overlays_g: int = 0  # generation of overlays that may still have to be committed or removed
    manual: str = ""  # why it is not protected again by itself (override, disk error…)
    failures: int = 0
    next_try_boottime_ms: float = 0.0
    dismantling: bool = False  # solo, and what was set up for the standby is not all taken away yet
    quick_return: bool = False  # the standby was lost by a bare restart of its QEMU or link
    peer_versions: dict[str, str] = {}
    previous: str = ""  # the body that this instance would replace: put back if the set-up is undone
    copy_lost: bool = False
    tcg: bool = False  # the guest runs without KVM
    tls: bool = False  # checkpoints and disk blocks are encrypted
    route_changed: bool = False  # mcft set `quickack` on the route to the peer
    nvram: str = ""  # file of the firmware's variables on this host
    rdma: RdmaSpec | None = None  # the RDMA keepalive, where both sides have one
    rdma_asked: str = ""  # --rdma-device; empty: as the configuration says
    arbiter: ArbiterKind = "standby"  # of this instance; changed only with a new one
    arbiter_asked: ArbiterKind | None = None
    arbiter_key: Key = Key()  # `etcd`: as it was when armed
    arbiter_seen: Seen = Seen()
    arbiter_trouble: str = ""  # why it can't decide any more, until an operator arms anew
    claim: Intent | None = None  # begun, perhaps sent, not resolved
    mc: McOptions = McOptions()
    capabilities: list[str] = []  # what engine mc turned on, as its QEMU spells it
    second_monitor: str = ""  # of a domain with engine mc that was started with one
    stream_path: str = ""  # transport unix: where the standby's QEMU listens
    experimental: bool = False


class Hello(msgspec.Struct, frozen=True):
    """Who an agent is. boot_id: of its host; maintenance: nothing is protected to it or from it."""

    host: str = ""
    mcft: str = ""
    qemu: str = ""
    libvirt: str = ""
    boot_id: str = ""
    maintenance: bool = False
    arbiters: dict[str, str] = {}  # instance → why its arbiter can't decide, as seen from there; "": it can
    lans: dict[str, str] = {}  # instance whose standby is there → why that must not take over now: its own LAN is away


class About(msgspec.Struct, frozen=True):
    """A question about one domain (and one instance of it, where pid is given)."""

    uuid: str
    pid: str = ""
    g: int = 0
    domain: str = ""
    detail: str = ""
    qemu_runs: bool = True


class Arm(About, frozen=True):
    """ARM. key, seen: of the arbiter `etcd`, as the primary has just read it back."""

    key: Key = Key()
    seen: Seen = Seen()


class SetDelay(About, frozen=True):
    """`mcft set --delay`, told to the standby: its watcher goes by it, and its body takes it along.

    period_ms: what QEMU goes by for now, where mcft has stretched the delay (`gate/pace.py`); for the watcher alone.
    told_at_ms: by the primary's clock since its boot: on two links an older word may arrive after a newer one.
    """

    delay_ms: int = 100
    period_ms: int = 0
    told_at_ms: float = 0.0


class Records(msgspec.Struct, frozen=True):
    """All that one side knows of a domain. records: [(side, g, kind)] of instance pid in the order of writing."""

    host: str
    uuid: str
    highest_g: int = 0
    pid: str = ""
    g: int = 0
    role: str = ""
    state: str = ""
    records: list[tuple[str, int, str]] = []
    running: bool = False
    defined: bool = False
    qemu_alive: bool = False
    protections: int = 0
    copy_lost: bool = False  # the standby's QEMU was gone before it was asked to give up
    maintenance: bool = False


class DiskFile(msgspec.Struct, frozen=True):
    """A file of the domain, as the primary has it. taken_bytes: with its backing chain; user, group: names, as libvirt will
    give it back when the guest ends."""

    taken_bytes: int = 0
    user: str = "root"
    group: str = "root"
    mode: int = 0o600


class Nvram(msgspec.Struct, frozen=True):
    """The firmware's variables. data: zlib; sha256: of what was packed, hexadecimal."""

    path: str
    data: bytes
    sha256: str
    file: DiskFile = DiskFile()


class Asked(msgspec.Struct, frozen=True):
    """What an operator asked of `protect`: after a take-over the new primary protects back by the same words."""

    engine: EngineChoice = "auto"
    netbuffer: BufferChoice = "auto"
    rdma_device: str = ""
    arbiter: ArbiterKind | None = None
    experimental: bool = False


class Prepare(msgspec.Struct, frozen=True):
    """What a standby needs to build its copy. links: as the *standby* sees them (local is its own address).

    files: target → its disk's file; nvram: None for a guest without.
    """

    uuid: str
    domain: str
    pid: str
    g: int
    key: str
    delay_ms: int
    engine: str
    loss_ms: float
    xml: str
    persistent_xml: str
    autostart: bool
    disks: list[Disk]
    primary_ports: list[int]
    disk_paths: dict[str, str] = {}
    overwrite: list[str] = []
    proof_g: int = 0
    qemu: str = ""
    buffer: str = "filter"
    tls: StreamTls = "off"  # what the primary asks for, its own certificates being there
    files: dict[str, DiskFile] = {}
    nvram: Nvram | None = None
    rdma_address: str = ""  # the standby's, on the link where the primary has an RDMA device; empty: none is wanted
    rdma_required: bool = False
    arbiter: str = "standby"
    mc: McOptions = McOptions()
    asked: Asked = Asked()


class Prepared(msgspec.Struct, frozen=True):
    """Where the standby waits."""

    address: str
    mig_port: int
    nbd_port: int
    keepalive_port: int
    versions: dict[str, str] = {}
    tls: bool = False
    rdma: bool = False
    arbiter: str = "standby"  # that it goes by; an older mcft knows no other
    stream_path: str = ""


class RdmaOffer(msgspec.Struct, frozen=True):
    """How to reach the queue pair of the primary's gate (`rdma.Offer`)."""

    about: About
    offer: dict[str, Any]


class RdmaAnswer(msgspec.Struct, frozen=True):
    """The same of the standby's gate, connected to it."""

    offer: dict[str, Any]


class Answer(msgspec.Struct, frozen=True):
    """A record that stands, in answer to ARM, give-up, TAKE; detail: why it is not the one that was asked for."""

    kind: str
    g: int = 0
    detail: str = ""


def peer_ledger(records: Records) -> Ledger:
    """A peer's answer as a ledger of its side."""
    side: Side = "primary" if records.role == "primary" else "standby"
    return Ledger.load(records.pid, side, records.g, [(g, kind) for s, g, kind in records.records if s == side])


def encode(body: Any) -> bytes:
    return msgspec.json.encode(body)
