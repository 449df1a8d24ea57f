"""The only importer of libvirt: connections, domains, XML, lifecycle events, and the monitor passthrough's raw call.

Every call runs in a bounded pool of threads with a deadline, never on the event loop; libvirt's own event loop has a
thread of its own and hands over with `call_soon_threadsafe`. A daemon that was restarted is connected to anew.
Python bindings: `libvirt`, `libvirt_qemu` (distribution's python3-libvirt, or PyPI's libvirt-python >= 8.2).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import libvirt
import libvirt_qemu

from mcft.errors import Failed, NotFound, Refused
from mcft.libvirt_unit import daemon_unit
from mcft.monitor import DISK_ERRORS

log = logging.getLogger("mcft.libvirt")
T = TypeVar("T")
Lifecycle = Callable[[str, str, int], None]
QemuEvent = Callable[[str, dict[str, Any]], None]
DISK_EVENTS = f"^({'|'.join(DISK_ERRORS)})$"
WATCHED_EVENTS = "^(RESUME|STOP|SHUTDOWN|RESET)$"
REGEX = 1  # VIR_CONNECT_DOMAIN_QEMU_MONITOR_EVENT_REGISTER_REGEX
# A domain's start: libvirt asks a new QEMU some hundred questions, which takes a slow host more than a minute.
START_S = 60.0  # so long, whether libvirtd answers or not
START_MOST_S = 240.0
LIVENESS_EVERY_S = 5.0
# libvirt's client library 9.0 (Debian 12's; not 11.3) may let a call lie while another one of this connection waits, until
# something else is sent (Fedora, 9.7.0-4: "I/O stall when multiple threads issue RPC calls"): a second, not the usual five.
KEEPALIVE_S, KEEPALIVES = 1, 15
WITH_FILES = 8_002_000  # libvirt's version that has virDomainQemuMonitorCommandWithFiles
EVENTS = ("defined", "undefined", "started", "suspended", "resumed", "stopped", "shutdown", "pmsuspended", "crashed")
_event_thread: threading.Thread | None = None


@dataclass(frozen=True, slots=True)
class DomainInfo:
    """A domain as libvirt sees it. qemu_pid: 0 unless it runs."""

    name: str
    uuid: str
    running: bool  # has a QEMU, be it paused
    paused: bool
    persistent: bool
    autostart: bool
    qemu_pid: int


@dataclass(frozen=True, slots=True)
class Pool:
    """A storage pool. target: its folder; mounted: the folder is another file system, there only while it is active."""

    name: str
    target: str
    active: bool
    mounted: bool


def _run_events() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


def _start_events() -> None:
    """libvirt's default event loop: once per process, before the first connection."""
    global _event_thread
    if _event_thread is None:
        libvirt.virEventRegisterDefaultImpl()
        libvirt.registerErrorHandler(lambda _context, _error: None, None)  # errors come as exceptions; stderr stays clean
        _event_thread = threading.Thread(target=_run_events, name="libvirt-events", daemon=True)
        _event_thread.start()


class LibvirtHost:
    """One host's libvirt. on_lifecycle(uuid, event, detail) and on_disk_event(uuid, QMP event) are called on the asyncio loop."""

    def __init__(self, uri: str, on_lifecycle: Lifecycle | None = None) -> None:
        self.uri = uri
        self._on_lifecycle = on_lifecycle
        self.on_disk_event: QemuEvent | None = None
        self.on_watched_event: QemuEvent | None = None
        self._watched: dict[str, int | None] = {}  # uuid → its registration on this connection
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="libvirt")
        self._lock = threading.Lock()
        self._conn: Any = None
        self._handles: tuple[Any, dict[str, Any]] = (None, {})  # of a connection: uuid → its domain
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Begin; a daemon that does not answer yet is connected to when it is first needed."""
        self._loop = asyncio.get_running_loop()
        _start_events()
        try:
            await self.call(lambda conn: conn.getLibVersion())
        except Failed as error:
            log.warning("libvirt does not answer yet: %s", error)

    async def keep_connected(self) -> None:
        """For ever: connect again after the daemon's restart, so that lifecycle events are not missed for long."""
        while True:
            try:
                await self.call(lambda conn: conn.getLibVersion(), timeout_s=5)
            except Failed as error:
                log.debug("libvirt: %s", error)
            await asyncio.sleep(2)

    def _connection(self) -> Any:
        with self._lock:
            if self._conn is not None and self._conn.isAlive():
                return self._conn
            self._conn, conn = None, libvirt.open(self.uri)
            conn.setKeepAlive(KEEPALIVE_S, KEEPALIVES)
            conn.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._lifecycle, None)
            libvirt_qemu.qemuMonitorEventRegister(conn, None, DISK_EVENTS, self._disk_event, None, REGEX)
            for uuid in self._watched:
                self._watched[uuid] = self._register(conn, uuid)
            self._conn = conn  # only one that hears its events
            return conn

    def _register(self, conn: Any, uuid: str) -> int | None:
        try:
            domain = conn.lookupByUUIDString(uuid)
            args = (conn, domain, WATCHED_EVENTS, self._watched_event, None, REGEX)
            return int(libvirt_qemu.qemuMonitorEventRegister(*args))
        except libvirt.libvirtError as error:
            log.warning("events of %s can't be watched: %s", uuid, error)
            return None

    async def watch(self, uuid: str) -> None:
        """Hand on this domain's RESUME, STOP, SHUTDOWN and RESET from now on, over the daemon's restarts too. Idempotent."""

        def work(conn: Any) -> None:
            with self._lock:
                if self._watched.get(uuid) is None:
                    self._watched[uuid] = self._register(conn, uuid)

        await self.call(work)

    async def unwatch(self, uuid: str) -> None:
        """No more of them. Idempotent."""

        def work(conn: Any) -> None:
            with self._lock:
                callback = self._watched.pop(uuid, None)
            if callback is not None:
                libvirt_qemu.qemuMonitorEventDeregister(conn, callback)

        try:
            await self.call(work)
        except Failed as error:
            log.info("events of %s: %s", uuid, error)

    def _lifecycle(self, _conn: Any, domain: Any, event: int, detail: int, _opaque: Any) -> None:
        if self._loop is not None and self._on_lifecycle is not None:
            name = EVENTS[event] if event < len(EVENTS) else str(event)
            self._loop.call_soon_threadsafe(self._on_lifecycle, domain.UUIDString(), name, detail)

    def _disk_event(self, _conn: Any, domain: Any, event: str, seconds: int, micros: int, details: str, _opaque: Any) -> None:
        if self._loop is not None and self.on_disk_event is not None:
            stamp = {"seconds": seconds, "microseconds": micros}
            message = {"event": event, "data": json.loads(details or "{}"), "timestamp": stamp}
            self._loop.call_soon_threadsafe(self.on_disk_event, domain.UUIDString(), message)

    def _watched_event(self, _c: Any, domain: Any, event: str, seconds: int, micros: int, details: str, _opaque: Any) -> None:
        if self._loop is not None and self.on_watched_event is not None:
            stamp = {"seconds": seconds, "microseconds": micros}
            message = {"event": event, "data": json.loads(details or "{}"), "timestamp": stamp}
            self._loop.call_soon_threadsafe(self.on_watched_event, domain.UUIDString(), message)

    async def answers(self, timeout_s: float = 2.0) -> bool:
        """Whether the daemon itself does: a call that needs no domain."""
        try:
            await self.call(lambda conn: conn.getLibVersion(), timeout_s)
        except Failed:
            return False
        return True

    async def _start(self, work: Callable[[Any], T]) -> T:
        """`call` of what starts a domain: waited for as long as the daemon answers beside it.

        Raises: as `call`; the daemon's silence counts from START_S on, START_MOST_S is the end.
        """
        starting = asyncio.ensure_future(self.call(work, START_MOST_S))
        try:
            done, _ = await asyncio.wait({starting}, timeout=START_S)
            while not done:
                if not await self.answers(LIVENESS_EVERY_S) and not starting.done():
                    raise _timed_out(START_S)
                done, _ = await asyncio.wait({starting}, timeout=LIVENESS_EVERY_S)
            return starting.result()
        finally:
            starting.cancel()

    async def call(self, work: Callable[[Any], T], timeout_s: float = 15.0) -> T:
        """Run work(connection) in the pool.

        Raises: Failed ("libvirt"), NotFound ("no-such-domain"), Failed ("libvirt-timeout") after timeout_s.
        """
        try:
            return await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(self._pool, self._try, work), timeout_s)
        except TimeoutError:
            raise _timed_out(timeout_s) from None
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                raise NotFound("no-such-domain", "no such domain on this host", str(error), "virsh list --all") from None
            raise Failed("libvirt", f"libvirt: {error}") from None

    def _try(self, work: Callable[[Any], T]) -> T:
        conn = None
        try:
            conn = self._connection()
            return work(conn)
        except libvirt.libvirtError as error:
            broken = ("INTERNAL_ERROR", "RPC", "SYSTEM_ERROR", "NO_CONNECT")
            if error.get_error_code() not in [getattr(libvirt, f"VIR_ERR_{name}") for name in broken]:
                raise
            if conn is not None and _reaches_daemon(conn):
                raise
            with self._lock:
                if self._conn is conn:
                    self._conn = None
            return work(self._connection())

    # ---- domains ----

    @staticmethod
    def _find(conn: Any, name_or_uuid: str) -> Any:
        if len(name_or_uuid) == 36 and name_or_uuid.count("-") == 4:
            return conn.lookupByUUIDString(name_or_uuid)
        return conn.lookupByName(name_or_uuid)

    def _handle(self, conn: Any, uuid: str) -> Any:
        """To ask its monitor only: the daemon knows it by its uuid, whatever became of it since. Spares a call each time."""
        known = self._handles  # read once: another thread may have a newer connection's meanwhile
        if known[0] is not conn:
            known = self._handles = (conn, {})
        handles = known[1]
        if uuid not in handles:
            handles[uuid] = self._find(conn, uuid)
        return handles[uuid]

    async def info(self, name_or_uuid: str) -> DomainInfo:
        """Raises: NotFound."""

        def work(conn: Any) -> DomainInfo:
            domain = self._find(conn, name_or_uuid)
            active = bool(domain.isActive())
            state = domain.state()[0] if active else libvirt.VIR_DOMAIN_SHUTOFF
            persistent = bool(domain.isPersistent())
            return DomainInfo(
                domain.name(), domain.UUIDString(), active, state == libvirt.VIR_DOMAIN_PAUSED, persistent,
                bool(domain.autostart()) if persistent else False, qemu_pid(domain.name(), domain.UUIDString()) if active else 0,
            )  # fmt: skip

        try:
            return await self.call(work)
        except NotFound as error:
            raise NotFound("no-such-domain", f"no domain '{name_or_uuid}' on this host", "", error.next_step) from None

    async def find(self, name_or_uuid: str) -> DomainInfo | None:
        """`info`, or None."""
        try:
            return await self.info(name_or_uuid)
        except NotFound:
            return None

    async def xml(self, uuid: str, *, inactive: bool = False, migratable: bool = False) -> str:
        """The domain's XML, with secrets."""
        flags = libvirt.VIR_DOMAIN_XML_SECURE
        flags |= libvirt.VIR_DOMAIN_XML_INACTIVE if inactive else 0
        flags |= libvirt.VIR_DOMAIN_XML_MIGRATABLE if migratable else 0
        return str(await self.call(lambda conn: self._find(conn, uuid).XMLDesc(flags)))

    async def create_paused(self, xml: str) -> DomainInfo:
        """Start a transient domain, paused (virDomainCreateXML, VIR_DOMAIN_START_PAUSED). Raises: Failed, Refused."""

        def work(conn: Any) -> str:
            try:
                return str(conn.createXML(xml, libvirt.VIR_DOMAIN_START_PAUSED).UUIDString())
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_HOOK_SCRIPT_FAILED:
                    raise Refused("hook-refused", "libvirt's hook refused this start", str(error)) from None
                raise

        return await self.info(await self._start(work))

    async def start_domain(self, uuid: str) -> None:
        """Start a defined domain (virDomainCreate); one that runs is fine. Raises: Failed, Refused ("hook-refused")."""

        def work(conn: Any) -> None:
            try:
                self._find(conn, uuid).create()
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_HOOK_SCRIPT_FAILED:
                    raise Refused("hook-refused", "libvirt's hook refused this start", str(error)) from None
                if error.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID:
                    raise

        await self._start(work)

    async def create(self, xml: str) -> None:
        """Start a transient domain (virDomainCreateXML). Raises: Failed."""
        await self._start(lambda conn: conn.createXML(xml, 0))

    async def define(self, xml: str) -> None:
        """Make (or replace) the persistent definition; a running transient domain becomes persistent by it."""
        await self.call(lambda conn: conn.defineXML(xml))

    async def undefine(self, uuid: str) -> None:
        """Forget the persistent definition; NVRAM and the like are kept, a running domain goes on (transient)."""
        flags = libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM | libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
        await self.call(lambda conn: self._find(conn, uuid).undefineFlags(flags))

    async def set_autostart(self, uuid: str, on: bool) -> None:
        """For a persistent domain."""
        await self.call(lambda conn: self._find(conn, uuid).setAutostart(1 if on else 0))

    async def destroy(self, uuid: str) -> None:
        """End its QEMU at once; an ended one is fine."""

        def work(conn: Any) -> None:
            try:
                self._find(conn, uuid).destroyFlags(0)
            except libvirt.libvirtError as error:
                if error.get_error_code() not in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
                    raise

        await self.call(work, timeout_s=30)

    async def resume(self, uuid: str) -> None:
        """virDomainResume: libvirt's own locks and state go along. Raises: Failed."""
        await self.call(lambda conn: self._find(conn, uuid).resume(), timeout_s=60)

    async def qmp(self, uuid: str, command: dict[str, Any], fds: Sequence[int] = (), timeout_s: float = 15.0) -> Any:
        """One QMP command through the passthrough; the whole reply object. fds go along (`getfd`)."""

        def work(conn: Any) -> str:
            domain = self._handle(conn, uuid)
            if fds and (why := _no_files(conn)):
                raise Failed("old-libvirt", "this libvirt can't hand descriptors to QEMU", why, "bring it up to date")
            if fds:
                # The binding wants file objects' descriptors as a list; QEMU gets duplicates.
                return _text(libvirt_qemu.qemuMonitorCommandWithFiles(domain, json.dumps(command), list(fds), 0))
            return _text(libvirt_qemu.qemuMonitorCommand(domain, json.dumps(command), 0))

        return json.loads(await self.call(work, timeout_s))

    async def pools(self) -> list[Pool]:
        """The storage pools of folders; none where libvirt has no storage driver."""

        def work(conn: Any) -> list[Pool]:
            found = []
            for pool in conn.listAllStoragePools(0):
                root = ET.fromstring(pool.XMLDesc(0))
                target, mounted = root.findtext("./target/path") or "", root.get("type") in ("fs", "netfs")
                if mounted or root.get("type") == "dir":
                    found.append(Pool(pool.name(), target, bool(pool.isActive()), mounted))
            return found

        try:
            return await self.call(work)
        except Failed as error:
            log.warning("libvirt's storage pools can't be listed: %s", error)
            return []

    async def refresh_pool(self, name: str) -> None:
        """Let a pool see what was made or removed in its folder (virStoragePoolRefresh). Raises: Failed."""
        await self.call(lambda conn: conn.storagePoolLookupByName(name).refresh(0), timeout_s=60)

    async def versions(self) -> dict[str, str]:
        """{"libvirt": "11.3.0", "qemu": "11.1.3"} of the daemon and its default emulator."""

        return await self.call(lambda conn: {"libvirt": _version(conn.getLibVersion()), "qemu": _version(conn.getVersion())})


def _reaches_daemon(conn: Any) -> bool:
    """Not isAlive alone: behind virtproxyd a connection outlives the one to virtqemud, and fails for ever (seen with 11.3)."""
    try:
        return bool(conn.isAlive()) and conn.getLibVersion() > 0
    except libvirt.libvirtError:
        return False


def _version(number: int) -> str:
    return f"{number // 1000000}.{number // 1000 % 1000}.{number % 1000}"


def _timed_out(timeout_s: float) -> Failed:
    why = f"libvirt did not answer within {timeout_s:g} s"
    return Failed("libvirt-timeout", why, "", f"look at: systemctl status {daemon_unit()}")


def _no_files(conn: Any) -> str:
    """Empty, or why descriptors can't go along: the daemon is asked, for an old one says "unknown procedure: 7"."""
    if not hasattr(libvirt_qemu, "qemuMonitorCommandWithFiles"):
        return "its Python binding is older than 8.2"
    daemon = int(conn.getLibVersion())
    return f"{daemon_unit()} is {_version(daemon)}, and 8.2 is the first that does" if daemon < WITH_FILES else ""


def _text(answer: Any) -> str:
    return str(answer[0] if isinstance(answer, tuple) else answer)


def qemu_pid(name: str, uuid: str, run_dir: str = "/run/libvirt/qemu") -> int:
    """The pid of a running domain's QEMU, from libvirt's pid file, checked against its command line; 0 if none."""
    try:
        with open(os.path.join(run_dir, f"{name}.pid"), encoding="ascii") as file:
            pid = int(file.read())
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return pid if uuid.encode() in file.read() else 0
    except (OSError, ValueError):
        return 0
