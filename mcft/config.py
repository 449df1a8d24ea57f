"""`/etc/mcft/mcft.toml` → `Config`: read once, checked whole, frozen.

Every key has a default, so an absent file is a valid configuration (of a host that protects nothing yet).
What is misspelled or misplaced is refused with file, key and what to write: a configuration that is half
understood would show only when a host dies. `packaging/mcft.toml` documents every key.
"""

from __future__ import annotations

import socket
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from mcft import configvalues as read
from mcft.api import ArbiterKind, BufferChoice, EngineChoice, McOptions, Transport
from mcft.errors import NotFound, Usage

DEFAULT_PATH = Path("/etc/mcft/mcft.toml")
DEFAULT_PORT = 16520

StreamTls = Literal["off", "opportunistic", "required"]
Reserve = Literal["used", "full"]

ARBITERS = get_args(ArbiterKind)


@dataclass(frozen=True)
class Peer:
    """Another host's agent. addresses: the first is the replication link, all of them carry keepalives."""

    name: str
    addresses: tuple[str, ...]
    port: int = DEFAULT_PORT


@dataclass(frozen=True)
class Etcd:
    """The etcd that arbitrates. endpoints: URLs, http or https; cert, key: of a client certificate, if etcd wants one."""

    endpoints: tuple[str, ...] = ()
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    user: str = ""
    password_file: Path | None = None
    prefix: str = "/mcft"


@dataclass(frozen=True)
class FenceDevice:
    """How one other host is switched off. delay_ms: how much longer a standby of that host waits before it does."""

    agent: str
    options: tuple[tuple[str, str], ...] = ()
    delay_ms: int = 5000


@dataclass(frozen=True)
class Config:
    """One host's configuration; times in milliseconds, bandwidth in bytes per second (0: no limit)."""

    name: str = field(default_factory=socket.gethostname)
    listen_addresses: tuple[str, ...] = ("0.0.0.0",)
    listen_port: int = DEFAULT_PORT
    peers: dict[str, Peer] = field(default_factory=dict)
    ports: tuple[int, int] = (16530, 16629)
    loss_ms: int = 300
    rdma_device: str = "auto"
    auto_protect: bool = True
    delay_ms: int = 100
    engine: EngineChoice = "auto"
    netbuffer: BufferChoice = "auto"
    buffer_limit_bytes: int = 0  # per NIC; 0: as the buffer thinks fit
    max_bandwidth_bytes: int = 10 * 2**30
    reprotect_after_ms: int = 60_000
    reprotect_after_restart_ms: int = 60_000
    arbiter: ArbiterKind = "standby"
    etcd: Etcd = Etcd()
    fence: dict[str, FenceDevice] = field(default_factory=dict)
    operators: tuple[str, ...] = ()
    pki_dir: Path = Path("/etc/pki")
    qemu_pki_dir: Path = Path("/etc/pki/qemu")
    state_dir: Path = Path("/var/lib/mcft")
    run_dir: Path = Path("/run/mcft")
    libvirt_uri: str = "qemu:///system"
    socket_group: str = "libvirt"
    tls: StreamTls = "required"
    lan_check: tuple[str, ...] = ()
    reserve: Reserve = "used"
    mc: McOptions = field(default_factory=McOptions)

    @property
    def socket_path(self) -> Path:
        """Where this host's agent listens for its operators."""
        return self.run_dir / "agent.sock"

    @property
    def ca_cert(self) -> Path:
        """libvirt's own PKI files serve the agents as well; so for the four that follow."""
        return self.pki_dir / "CA" / "cacert.pem"

    @property
    def client_cert(self) -> Path:
        return self.pki_dir / "libvirt" / "clientcert.pem"

    @property
    def client_key(self) -> Path:
        return self.pki_dir / "libvirt" / "private" / "clientkey.pem"

    @property
    def server_cert(self) -> Path:
        return self.pki_dir / "libvirt" / "servercert.pem"

    @property
    def server_key(self) -> Path:
        return self.pki_dir / "libvirt" / "private" / "serverkey.pem"

    def peer(self, name: str) -> Peer:
        """The peer of that name; `NotFound` names those that exist."""
        try:
            return self.peers[name]
        except KeyError:
            known = (
                f"configured peers: {', '.join(sorted(self.peers))}"
                if self.peers
                else "no peer is configured"
            )
            raise NotFound(
                "no-such-peer", f'no peer is named "{name}"', known, f"add [peers.{name}] to {DEFAULT_PATH}"
            ) from None


def load(path: Path = DEFAULT_PATH, *, must_exist: bool = False) -> Config:
    """Read and check a configuration file.

    must_exist: whoever named the file wants it read; the default path may be absent. Raises `Usage`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if must_exist:
            raise Usage("no-config", f"the configuration {path} does not exist") from None
        return Config()
    except (OSError, UnicodeDecodeError) as error:
        raise Usage("bad-config", f"the configuration {path} cannot be read", str(error)) from error
    return parse(text, str(path))


def parse(text: str, origin: str = str(DEFAULT_PATH)) -> Config:
    """Check a configuration's text; origin is what refusals call the file. Raises `Usage`."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Usage("bad-config", f"{origin} is not valid TOML: {error}") from error

    values: dict[str, Any] = {}
    top = _Table(document, "", origin)
    top.take(values, "name", "name", read.name)

    listen = top.table("listen")
    listen.take(values, "listen_addresses", "addresses", read.listen_addresses)
    listen.take(values, "listen_port", "port", read.port)

    top.table("ports").take(values, "ports", "range", read.port_range)
    keepalive = top.table("keepalive")
    keepalive.take(values, "loss_ms", "loss", read.loss)
    keepalive.take(values, "rdma_device", "rdma_device", read.rdma_device)

    protect = top.table("protect")
    protect.take(values, "auto_protect", "auto", read.flag)
    protect.take(values, "delay_ms", "delay", read.delay)
    protect.take(values, "engine", "engine", read.one_of(get_args(EngineChoice)))
    protect.take(values, "netbuffer", "netbuffer", read.one_of(get_args(BufferChoice)))
    protect.take(values, "buffer_limit_bytes", "buffer_limit", read.buffer_limit)
    protect.take(values, "max_bandwidth_bytes", "max_bandwidth", read.bandwidth)

    reprotect = top.table("reprotect")
    reprotect.take(values, "reprotect_after_ms", "after", read.reprotect_after)
    reprotect.take(values, "reprotect_after_restart_ms", "after_restart", read.reprotect_after)

    top.table("disks").take(values, "reserve", "reserve", read.one_of(get_args(Reserve)))
    top.table("lan").take(values, "lan_check", "check", read.peer_addresses)
    top.table("arbiter").take(values, "arbiter", "kind", read.one_of(ARBITERS))
    values["etcd"] = _etcd(top.table("etcd"))
    values["fence"] = _fence(top.table("fence"))

    options: dict[str, Any] = {}
    mc = top.table("mc")
    mc.take(options, "transport", "transport", read.one_of(get_args(Transport)))
    for name in ("rdma_copy", "rdma_keepalive", "rdma_pin_all"):
        mc.take(options, name, name, read.flag)
    values["mc"] = McOptions(**options)

    agent = top.table("agent")
    agent.take(values, "libvirt_uri", "libvirt_uri", read.word)
    agent.take(values, "state_dir", "state_dir", read.directory)
    agent.take(values, "run_dir", "run_dir", read.directory)
    agent.take(values, "socket_group", "socket_group", read.word)
    agent.take(values, "operators", "operators", read.names)

    tls = top.table("tls")
    tls.take(values, "pki_dir", "pki_dir", read.directory)
    tls.take(values, "qemu_pki_dir", "qemu_pki_dir", read.directory)
    tls.take(values, "tls", "streams", read.one_of(get_args(StreamTls)))

    values["peers"] = _peers(top.table("peers"))
    values.setdefault("operators", tuple(values["peers"]))
    top.finish()
    return _consistent(Config(**values), top)


class _Table:
    """One TOML table that is emptied key by key; what is left at the end is unknown."""

    def __init__(self, raw: dict[str, Any], path: str, origin: str) -> None:
        self._left, self._path, self._origin = dict(raw), path, origin
        self._known: list[str] = []
        self._tables: list[_Table] = []

    def take(self, values: dict[str, Any], attribute: str, key: str, read: Callable[[Any], Any]) -> None:
        """Move a key, if it is there, into values; read raises ValueError with what to write."""
        self._known.append(key)
        if key not in self._left:
            return
        raw = self._left.pop(key)
        try:
            values[attribute] = read(raw)
        except (ValueError, Usage) as error:
            self.refuse(key, error.message if isinstance(error, Usage) else str(error))

    def table(self, key: str) -> _Table:
        self._known.append(key)
        raw = self._left.pop(key, {})
        if not isinstance(raw, dict):
            self.refuse(key, f"must be a table: write [{self._name(key)}] on a line of its own")
        table = _Table(raw, self._name(key), self._origin)
        self._tables.append(table)
        return table

    def untaken(self) -> list[str]:
        return list(self._left)

    def finish(self) -> None:
        """Refuse what nobody took, here and in every table below."""
        for key in self._left:
            self.refuse(key, f"is not a key that mcft knows; here it knows {', '.join(self._known)}")
        for table in self._tables:
            table.finish()

    def refuse(self, key: str, what: str) -> NoReturn:
        raise Usage("bad-config", f"{self._origin}: {self._name(key)}: {what}")

    def _name(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key


def _peers(tables: _Table) -> dict[str, Peer]:
    peers: dict[str, Peer] = {}
    for name in tables.untaken():
        table = tables.table(name)
        try:
            read.name(name)
        except ValueError as error:
            tables.refuse(name, str(error))
        values: dict[str, Any] = {}
        table.take(values, "addresses", "addresses", read.peer_addresses)
        table.take(values, "port", "port", read.port)
        if "addresses" not in values:
            tables.refuse(
                name, 'needs its addresses: write addresses = ["192.0.2.2"], the replication link first'
            )
        peers[name] = Peer(name=name, **values)
    return peers


def _etcd(table: _Table) -> Etcd:
    values: dict[str, Any] = {}
    table.take(values, "endpoints", "endpoints", read.endpoints)
    for key in ("ca", "cert", "key", "password_file"):
        table.take(values, key, key, read.directory)
    table.take(values, "user", "user", read.word)
    table.take(values, "prefix", "prefix", read.word)
    if ("cert" in values) != ("key" in values):
        table.refuse("cert", "goes with key: name both files, or neither")
    if ("user" in values) != ("password_file" in values):
        table.refuse("user", "goes with password_file: name both, or neither")
    return Etcd(**values)


def _fence(tables: _Table) -> dict[str, FenceDevice]:
    devices: dict[str, FenceDevice] = {}
    for name in tables.untaken():
        table = tables.table(name)
        values: dict[str, Any] = {}
        table.take(values, "agent", "agent", read.fence_agent)
        table.take(values, "delay_ms", "delay", read.fence_delay)
        table.take(values, "options", "options", read.options)
        if "agent" not in values:
            tables.refuse(name, 'needs its fence agent: write agent = "fence_ipmilan"')
        devices[name] = FenceDevice(**values)
    return devices


def _consistent(config: Config, top: _Table) -> Config:
    """Checks between keys; each key alone is sound by now."""
    if config.arbiter == "etcd" and not config.etcd.endpoints:
        top.refuse("arbiter.kind", 'is "etcd": name its endpoints, [etcd] endpoints = ["https://192.0.2.3:2379"]')
    if config.arbiter == "fence" and (without := sorted(set(config.peers) - set(config.fence))):
        top.refuse("arbiter.kind", f'is "fence": say how {without[0]} is switched off, in [fence.{without[0]}]')
    if strangers := sorted(set(config.fence) - set(config.peers)):
        top.refuse(f"fence.{strangers[0]}", f"is no peer: write [peers.{strangers[0]}] too, or take it away")
    if config.name in config.peers:
        top.refuse(f"peers.{config.name}", "is this host itself (see name): write the other host's name")
    first, last = config.ports
    taken: dict[tuple[str, int], str] = {}
    for peer in config.peers.values():
        for address in peer.addresses:
            other = taken.setdefault((address, peer.port), peer.name)
            if other != peer.name:
                top.refuse(f"peers.{peer.name}.addresses", f"{address} belongs to peer {other} already")
    if first <= config.listen_port <= last:
        top.refuse("ports.range", f"contains the agent's own port {config.listen_port}: move one of them")
    return config
