"""Stands in for what a host has besides mcft: kernel, systemd, libvirtd, QEMUs, start markers and their hook."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mcft.errors import Failed, NotFound, Refused
from mcft.gate.state import paths
from tests.sim.disk import Image, Moment, Overlay
from tests.sim.qemu import Qemu
from tests.sim.world import Host, Proc, Violation

if TYPE_CHECKING:
    from tests.sim.agents import AgentProc

UUID = "11111111-2222-3333-4444-555555555555"
DOMAIN = "vm1"
DISK = "/images/vm1.img"
RUN = "/run/mcft"
STATE = "/var/lib/mcft"
XML = f"""<domain type='kvm'><name>{DOMAIN}</name><uuid>{UUID}</uuid><os><type arch='x86_64'>hvm</type></os><devices>
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{DISK}'/><target dev='vda' bus='virtio'/>
<alias name='virtio-disk0'/></disk><interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/>
<target dev='vnetN'/><model type='virtio'/><alias name='net0'/></interface></devices></domain>"""
ADDRESSES = {"host1": ("10.0.0.1", "192.168.0.1"), "host2": ("10.0.0.2", "192.168.0.2")}
DESTROYED, SHUTDOWN, FAILED = 1, 0, 5  # virDomainEventStoppedDetailType


@dataclass
class Domain:
    name: str
    definition: str = ""  # persistent; empty: transient
    autostart: bool = False
    qemu: Qemu | None = None
    detail: int = FAILED
    xml: str = ""


class Machine:
    """See the module's text."""

    def __init__(self, host: Host) -> None:
        self.host, self.world = host, host.world
        self.sockets: dict[str, Any] = {}
        self.udp: dict[tuple[str, int], Any] = {}
        self.pidfds: dict[int, Proc] = {}
        self.taps: dict[str, bool] = {}
        self.silenced: set[str] = set()
        self.tap_leases: dict[str, Any] = {}
        self.open_overlays: dict[str, Overlay] = {}
        self.domains: dict[str, Domain] = {}
        self.gates: dict[str, Any] = {}
        self.agent: AgentProc | None = None
        self.lan_up = True
        self.heard_at = self.awake_since = 0.0  # the last keepalive; the last stall
        self.newest: dict[bytes, int] = {}  # nonce of a gate → its newest counter that came in
        self.disk_fails = False
        self.qemu_hangs = False
        self.libvirt_down_until = 0.0
        self.store_fails = False
        self.records: dict[str, Any] = {"protection": {}, "record": [], "generation": {}, "meta": {}}
        self.kernel: Proc

    # ---- power ----

    def power_on(self) -> None:
        host, world = self.host, self.world
        host.up, host.frozen = True, False
        host.boot += 1
        host.booted_at = world.now
        self.kernel = Proc(host, "kernel")
        world.note(host.name, f"boots ({host.boot})")
        world.at(200.0 + world.rng.random() * 800.0, self.kernel, self.start_agent)

    def power_off(self) -> None:
        host = self.host
        if not host.up:
            return
        host.up, host.frozen = False, False
        self.world.note(host.name, "has no power")
        for proc in list(host.procs):
            proc.kill()
        for overlay in self.open_overlays.values():
            if not overlay.flushed and self.world.rng.random() < 0.5:
                overlay.lost = True
        host.files.power_lost()
        for domain in self.domains.values():
            domain.qemu = None
        self.domains = {uuid: domain for uuid, domain in self.domains.items() if domain.definition}
        self.sockets, self.udp, self.pidfds, self.taps, self.silenced, self.gates = {}, {}, {}, {}, set(), {}
        self.tap_leases = {}
        self.open_overlays = {}
        self.agent = None
        self.qemu_hangs, self.libvirt_down_until = False, 0.0

    # ---- systemd ----

    def start_agent(self) -> None:
        from tests.sim.agents import AgentProc

        if self.agent is None or not self.agent.alive:
            self.agent = AgentProc(self.host)
            self.agent.on_death.append(self._agent_gone)

    def _agent_gone(self) -> None:
        if self.host.up:
            self.world.at(300.0 + self.world.rng.random() * 700.0, self.kernel, self.start_agent)

    def start_gate(self, uuid: str, ready: Callable[[], None] = lambda: None) -> None:
        from tests.sim.gates import GateProc

        state_path, _ = paths(RUN, uuid)
        running = self.gates.get(uuid)
        if running is not None and running.alive:
            ready()
        elif state_path in self.host.files.held:
            self.gates[uuid] = GateProc(self.host, uuid, ready)

    def gate_gone(self, proc: Any) -> None:
        """Restart=always, unless it ended by `quit`."""
        if self.host.up and not proc.quit:
            self.world.at(100.0 + self.world.rng.random() * 50.0, self.kernel, self.start_gate, proc.uuid)

    async def run(self, *argv: str, **_: Any) -> str:
        """`mcft.agent.process.run`."""
        import asyncio

        await asyncio.sleep(0.002 + self.world.rng.random() * 0.01)
        if argv[0] == "systemctl":
            return await self._systemctl(*argv[1:])
        assert argv[0] == "qemu-img", argv
        files = self.host.files
        if argv[1] == "create":
            path = argv[-2]
            files.put(path, Overlay() if ".mcft-" in path and not path.endswith("-new") else Image(fresh=True))
        elif argv[1] == "commit":
            self._commit_offline(argv[-1], argv[-2])
        return ""

    def _commit_offline(self, active: str, disk: str) -> None:
        files = self.host.files
        hidden = active.removesuffix("active") + "hidden"
        image = files.held[disk]
        for path in (active, hidden):
            overlay = files.held[path]
            if overlay.lost:
                image.torn = f"{path} was not flushed before the power went"
            elif overlay.content is not None:
                image.write(overlay.content)
                break
        if image.torn == "committing":
            image.torn = ""
        files.drop(active)

    async def _systemctl(self, verb: str, *argv: str) -> str:
        import asyncio

        uuid = argv[-1].removeprefix("mcft-gate@").removesuffix(".service")
        gate = self.gates.get(uuid)
        if verb == "start":
            done = asyncio.Event()
            self.world.at(20.0 + self.world.rng.random() * 40.0, self.kernel, self.start_gate, uuid, done.set)
            try:
                await asyncio.wait_for(done.wait(), 20.0)
            except TimeoutError:
                raise Failed("command", "the gate does not start") from None
        elif verb == "stop" and gate is not None:
            gate.quit = True
            gate.kill()
        elif verb == "show":
            return "active" if gate is not None and gate.alive else "inactive"
        return ""

    # ---- QEMUs ----

    def qemus(self) -> list[Qemu]:
        return [domain.qemu for domain in self.domains.values() if domain.qemu is not None and domain.qemu.proc.alive]

    def monitor_of(self, qemu: Qemu) -> str:
        path = f"{RUN}/monitor/{qemu.uuid}.sock"
        self.sockets[path] = qemu
        return path

    def qemu_at(self, path: str) -> Qemu | None:
        found = self.sockets.get(path)
        return found if isinstance(found, Qemu) and found.proc.alive and found.monitor_path else None

    def pidfd(self, proc: Proc) -> int:
        fd = 100 + len(self.pidfds)
        while fd in self.pidfds:
            fd += 1
        self.pidfds[fd] = proc
        from tests.sim.gates import waiting_for

        waiting_for(self.host, proc, fd)
        return fd

    def heard_event(self, qemu: Qemu, message: dict[str, Any]) -> None:
        """libvirt's own monitor: SHUTDOWN ends QEMU, disks' errors go to the agent."""
        name = message["event"]
        if name == "SHUTDOWN":
            domain = self.domains.get(qemu.uuid)
            if domain is not None:
                domain.detail = SHUTDOWN
            if self.agent is not None and self.world.now >= self.libvirt_down_until:
                by = 1 if message["data"].get("guest") else 2  # virDomainEventShutdownDetailType
                self.world.at(0.5, self.agent, self.agent.lifecycle, qemu.uuid, "shutdown", by)
            self.world.at(2.0 + self.world.rng.random() * 30.0, self.kernel, qemu.proc.kill)
        if name.startswith(("QUORUM", "BLOCK_IO")) and self.world.now >= self.libvirt_down_until and self.agent is not None:
            self.world.at(1.0, self.agent, self.agent.disk_event, qemu.uuid, message)

    def qemu_ended(self, qemu: Qemu) -> None:
        if self.host.up:
            self.world.at(1.0 + self.world.rng.random() * 20.0, self.kernel, self._reap, qemu)

    def _reap(self, qemu: Qemu) -> None:
        domain = self.domains.get(qemu.uuid)
        if domain is None or domain.qemu is not qemu:
            return
        domain.qemu = None
        detail, domain.detail = domain.detail, FAILED
        if not domain.definition:
            del self.domains[qemu.uuid]
        if self.agent is not None and self.world.now >= self.libvirt_down_until:
            self.world.at(0.5, self.agent, self.agent.lifecycle, qemu.uuid, "stopped", detail)

    def banned(self, uuid: str) -> bool:
        return str(self.host.files.held.get(f"{STATE}/start/{uuid}", "")).startswith("banned")

    def boot_guest(self, uuid: str) -> Qemu:
        """A start from the disk: what `virsh start` does once the hook has said yes."""
        domain = self.domains[uuid]
        root = ET.fromstring(domain.xml)
        source = root.find("./devices/disk/source")
        assert source is not None
        path = source.get("file", "")
        image = self.host.files.held.get(path)
        if not isinstance(image, Image):
            raise Failed("libvirt", f"cannot access storage file {path}")
        self.world.oracle.boots(self.host, image)
        at = image.content or Moment(0, 0)
        qemu = Qemu(self.host, uuid, domain.name, incoming=False, state=Moment(self.world.history.fork(at), at.n), path=path)
        domain.qemu, domain.detail = qemu, FAILED
        self.taps[qemu.tap] = True
        self.silenced.discard(qemu.tap)
        qemu.runstate = "running"
        if self.agent is not None:
            self.world.at(0.5, self.agent, self.agent.lifecycle, uuid, "started", 0)
        return qemu


class SimLibvirt:
    """`libvirt_bridge.LibvirtHost`: each call takes a while, and fails while the daemon is away."""

    def __init__(self, host: Host) -> None:
        self._host, self._machine, self._world = host, host.machine, host.world

    async def _turn(self, least_ms: float = 0.3) -> None:
        import asyncio

        await asyncio.sleep((least_ms + self._world.rng.random() * 2.0) / 1000)
        if self._world.now < self._machine.libvirt_down_until:
            raise Failed("libvirt", "libvirt: the daemon is away")

    def _domain(self, name: str) -> tuple[str, Domain]:
        for uuid, domain in self._machine.domains.items():
            if name in (uuid, domain.name):
                return uuid, domain
        raise NotFound("no-such-domain", f"no domain '{name}' on this host")

    async def info(self, name: str) -> Any:
        from mcft.libvirt_bridge import DomainInfo

        await self._turn()
        uuid, domain = self._domain(name)
        qemu = domain.qemu
        return DomainInfo(
            domain.name, uuid, qemu is not None, qemu is not None and qemu.runstate == "paused", bool(domain.definition),
            domain.autostart, qemu.proc.pid if qemu is not None else 0,
        )  # fmt: skip

    async def find(self, name: str) -> Any:
        try:
            return await self.info(name)
        except NotFound:
            return None

    async def xml(self, uuid: str, *, inactive: bool = False, migratable: bool = False) -> str:
        await self._turn()
        _, domain = self._domain(uuid)
        return re.sub("vnet[N01]", f"vnet{self._host.number}", domain.definition if inactive else domain.xml)

    async def create_paused(self, xml: str) -> Any:
        await self._turn(40.0)
        self._hook()
        if UUID in self._machine.domains and self._machine.domains[UUID].qemu is not None:
            raise Failed("libvirt", "domain is already active")
        known = self._machine.domains.get(UUID)
        domain = Domain(DOMAIN, known.definition if known else "", xml=xml)
        self._machine.domains[UUID] = domain
        source = ET.fromstring(xml).find("./devices/disk/source")
        assert source is not None
        if "-incoming" not in xml:
            raise Violation("the model", "a copy that does not wait for its stream")
        domain.qemu = Qemu(self._host, UUID, DOMAIN, incoming=True, state=Moment(0, 0), path=source.get("file", ""))
        self._machine.taps[domain.qemu.tap] = True
        return await self.info(UUID)

    def _hook(self) -> None:
        if self._machine.banned(UUID) and f"{RUN}/token/{UUID}" not in self._host.files.held:
            raise Refused("hook-refused", "libvirt's hook refused this start", "mcft: vm1 may not start here")

    async def start_domain(self, uuid: str) -> None:
        await self._turn(40.0)
        _, domain = self._domain(uuid)
        if domain.qemu is not None:
            return
        self._hook()
        domain.xml = domain.definition
        self._machine.boot_guest(uuid)

    async def create(self, xml: str) -> None:
        await self._turn(40.0)
        self._hook()
        self._machine.domains[UUID] = Domain(DOMAIN, xml=xml)
        self._machine.boot_guest(UUID)

    async def define(self, xml: str) -> None:
        await self._turn()
        domain = self._machine.domains.setdefault(UUID, Domain(DOMAIN))
        domain.definition = xml
        domain.xml = domain.xml or xml

    async def undefine(self, uuid: str) -> None:
        await self._turn()
        _, domain = self._domain(uuid)
        domain.definition = ""
        if domain.qemu is None:
            del self._machine.domains[uuid]

    async def set_autostart(self, uuid: str, on: bool) -> None:
        await self._turn()
        self._domain(uuid)[1].autostart = on

    async def destroy(self, uuid: str) -> None:
        await self._turn()
        found = self._machine.domains.get(uuid)
        if found is not None and found.qemu is not None:
            found.detail = DESTROYED
            found.qemu.proc.kill()
            await self._turn(25.0)

    async def qmp(self, uuid: str, command: dict[str, Any], fds: Any = (), timeout_s: float = 15.0) -> Any:
        import asyncio

        await self._turn()
        _, domain = self._domain(uuid)
        qemu = domain.qemu
        if qemu is None:
            raise Failed("libvirt", "libvirt: Requested operation is not valid: domain is not running")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        agent = self._machine.agent
        assert agent is not None

        def answered(reply: dict[str, Any]) -> None:
            self._world.at(0.2, agent, lambda: None if future.done() else future.set_result(reply))

        def gone() -> None:
            self._world.at(1.0, agent, lambda: None if future.done() else
                           future.set_exception(Failed("libvirt", "libvirt: the domain ended")))  # fmt: skip

        qemu.proc.on_death.append(gone)
        self._world.at(0.2, qemu.proc, lambda: qemu.command(command["execute"], command.get("arguments", {}), answered))
        try:
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise Failed("libvirt-timeout", "libvirt did not answer") from None
        finally:
            if gone in qemu.proc.on_death:
                qemu.proc.on_death.remove(gone)

    async def pools(self) -> list[Any]:
        return []

    async def versions(self) -> dict[str, str]:
        await self._turn()
        return {"libvirt": "11.3.0", "qemu": "11.1.3"}
