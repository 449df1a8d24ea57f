"""The peer's side of `mcft check`, and what its `prepare` refuses before anything is made.

The primary's agent sends what it would send for `prepare`; this one answers with what it has and with every refusal that
`prepare` would raise, and makes nothing. `refuse_unfit` is the same checks for `prepare` itself.
libvirt: `virConnectGetDomainCapabilities`, `virConnectCompareHypervisorCPU`, `virNetworkLookupByName`.
"""

from __future__ import annotations

import asyncio
import os
import time
import xml.etree.ElementTree as ET
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from mcft.agent import diskfiles, domainxml, mccheck, model, rdma
from mcft.agent.findings import Findings
from mcft.agent.qemuprobe import QemuProbe, trustworthy
from mcft.api import Finding
from mcft.engines import mc
from mcft.errors import Failed, McftError, Refused
from mcft.units import format_bytes

if TYPE_CHECKING:  # so that it can be tested without libvirt
    from mcft.agent.core import Core

# What a QEMU takes beside its guest's memory: its own heap, video memory, buffers of migration and of disks.
OVERHEAD_BYTES = 256 << 20
_UNITS = {"b": 1, "bytes": 1, "KB": 10**3, "k": 2**10, "KiB": 2**10, "MB": 10**6, "M": 2**20, "MiB": 2**20, "GB": 10**9}
_UNITS |= {"G": 2**30, "GiB": 2**30, "TB": 10**12, "T": 2**40, "TiB": 2**40}
INCOMPATIBLE = 0  # VIR_CPU_COMPARE_INCOMPATIBLE


class Ask(msgspec.Struct, frozen=True):
    """id: of this check (peers ask on several links at once). prepare: as for the verb `prepare`, without keys and ports."""

    id: str
    prepare: model.Prepare


class Found(msgspec.Struct, frozen=True):
    """What the peer says. versions: of its libvirt and of the QEMU that the copy would get; time_s: its wall clock."""

    host: str
    findings: list[Finding] = []
    versions: dict[str, str] = {}
    time_s: float = 0.0
    lan_check: bool = True
    cpu: str = ""
    cpu_flags: str = ""


@dataclass
class Scene:
    """One domain that would come, and the host to which."""

    core: Core
    peer: str
    request: model.Prepare

    def __post_init__(self) -> None:
        self.root = ET.fromstring(self.request.xml)
        self.site, self.host = self.core.site, self.core.site.config.name
        self.capabilities = ET.Element("none")
        self.kvm = self.root.get("type") == "kvm"

    def of_domain(self) -> tuple[str | None, str | None, str | None, str | None]:
        """(emulator, arch, machine, virttype), as libvirt wants them."""
        os_type = self.root.find("./os/type")
        kind = {} if os_type is None else os_type.attrib
        return self.root.findtext("./devices/emulator"), kind.get("arch"), kind.get("machine"), self.root.get("type")


async def look(core: Core, peer: str, ask: Ask) -> Found:
    """Everything `prepare` would refuse, and what this host has. Raises nothing that a check could say."""
    scene, findings, site = Scene(core, peer, ask.prepare), Findings(), core.site
    request = ask.prepare
    await findings.tried(core.may_receive(peer, request, core.lives.get(request.uuid)))
    proof = site.hook.prove(scene.host, domainxml.machine(request.persistent_xml))
    await findings.tried(proof, "hook", f"libvirt calls mcft's hook on {scene.host}")
    probe = QemuProbe(scene.of_domain()[0] or "", old=request.engine == "mc")
    for work in (*(check(scene) for check in (*FITS, breakable, overwrite)), engine(scene, probe)):
        if (finding := await findings.tried(work)) is not None:
            findings.found.append(finding)
    versions = dict(site.versions) | ({"qemu": probe.version} if probe.version else {})
    model_name, flags = host_cpu()
    return Found(scene.host, findings.found, versions, time.time(), bool(site.config.lan_check), model_name, flags)


async def refuse_unfit(core: Core, peer: str, request: model.Prepare) -> None:
    """Raises: Refused for a copy that this host can't run. Nothing was made yet."""
    scene = Scene(core, peer, request)
    for check in FITS:
        await check(scene)


def refuse_remote_libvirt(host: str, uri: str, engine: str) -> None:
    """Raises: Refused for a way to libvirt that carries no descriptors, where the engine hands some over to QEMU."""
    if engine != "mc" and urlsplit(uri).scheme.partition("+")[2] not in ("", "unix"):
        raise Refused(
            "libvirt-uri", f"{host} speaks to libvirt by {uri}",
            "with stock QEMU mcft hands descriptors over, and only libvirt's own socket carries them",
            "set [agent] libvirt_uri to qemu:///system or qemu+unix:///system?socket=PATH",
        )  # fmt: skip


async def way_to_libvirt(scene: Scene) -> Finding:
    """Whether this host's libvirt is reached as the engine needs it."""
    uri = scene.site.config.libvirt_uri
    refuse_remote_libvirt(scene.host, uri, scene.request.engine)
    return Finding("ok", "libvirt", f"{scene.host} speaks to libvirt by {uri}")


async def machine(scene: Scene) -> Finding:
    """Whether this host has the emulator, the machine type and KVM."""
    emulator, arch, kind, virttype = scene.of_domain()
    if emulator and not os.path.exists(emulator):
        raise Refused(
            "no-emulator", f"{scene.host} has no {emulator}", "the domain names it as its QEMU",
            f"install that QEMU on {scene.host}",
        )  # fmt: skip
    try:
        text = await scene.site.host.call(lambda conn: str(conn.getDomainCapabilities(emulator, arch, kind, virttype, 0)))
    except Failed as error:
        if error.code != "libvirt":
            raise
        raise Refused(
            "no-machine", f"{scene.host} can't run a machine {kind} with {'KVM' if scene.kvm else virttype}", error.message,
            f"install the same QEMU on {scene.host}, or give the domain a machine type that both have",
        ) from None  # fmt: skip
    scene.capabilities = ET.fromstring(text)
    return Finding("ok", "machine", f"{scene.host} has machine type {kind}{' and KVM' if scene.kvm else ''}")


async def cpu(scene: Scene) -> Finding:
    """Whether the domain's CPU can be given there."""
    element = scene.root.find("./cpu")
    if (why := lacks_cpu(element, scene.capabilities)) and scene.kvm:
        raise _no_cpu(scene, why)
    if scene.kvm and element is not None and element.get("mode") == "custom":
        wanted = ET.tostring(element, encoding="unicode")
        emulator, arch, kind, virttype = scene.of_domain()

        def compare(conn: Any) -> int:
            return int(conn.compareHypervisorCPU(emulator, arch, kind, virttype, wanted, 0))

        if await scene.site.host.call(compare) == INCOMPATIBLE:
            raise _no_cpu(scene, "its CPU lacks features of the domain's CPU model")
    return Finding("ok", "cpu", f"{scene.host} can give the CPU {cpu_name(element)}")


def _no_cpu(scene: Scene, why: str) -> Refused:
    return Refused(
        "no-cpu", f"{scene.host} can't give the guest its CPU {cpu_name(scene.root.find('./cpu'))}", why,
        "choose a CPU model that both hosts have (virsh hypervisor-cpu-baseline) and start the guest anew",
    )  # fmt: skip


def lacks_cpu(element: ET.Element | None, capabilities: ET.Element) -> str:
    """Empty, or why domain capabilities do not offer this `<cpu>`. Pure."""
    if element is None or element.get("mode") is None:
        return ""
    mode = capabilities.find(f"./cpu/mode[@name='{element.get('mode')}']")
    if mode is None or mode.get("supported") != "yes":
        return f"libvirt does not offer the mode '{element.get('mode')}' there"
    name = (element.findtext("model") or "").strip()
    if element.get("mode") != "custom" or not name:
        return ""
    offered = {(m.text or "").strip(): m.get("usable") for m in mode.iterfind("model")}
    if name not in offered:
        return "its QEMU does not know that model"
    return "its CPU lacks features of that model" if offered[name] == "no" else ""


def cpu_name(element: ET.Element | None) -> str:
    """As people call it."""
    if element is None:
        return "QEMU's default"
    return (element.findtext("model") or "").strip() or element.get("mode") or "QEMU's default"


async def networks(scene: Scene) -> Finding:
    """Whether each NIC's bridge or network is there."""
    wanted = nic_sources(scene.root)
    missing = [f"bridge {name}" for kind, name in wanted if kind == "bridge" and not os.path.exists(f"/sys/class/net/{name}")]
    for name in [name for kind, name in wanted if kind == "network"]:
        if not await _network_runs(scene, name):
            missing.append(f"running network '{name}'")
    if missing:
        raise Refused(
            "no-network", f"{scene.host} has no {' and no '.join(missing)}", "NICs of the domain are on it",
            f"make it on {scene.host} under the same name, in the same LAN",
        )  # fmt: skip
    there = ", ".join(f"{kind} {name}" for kind, name in wanted) or "no network, as none is needed"
    return Finding("ok", "networks", f"{scene.host} has {there}")


async def _network_runs(scene: Scene, name: str) -> bool:
    try:
        return bool(await scene.site.host.call(lambda conn: conn.networkLookupByName(name).isActive()))
    except McftError as error:
        if "not found" in str(error).lower():
            return False
        raise


def nic_sources(root: ET.Element) -> list[tuple[str, str]]:
    """(bridge or network, name) that a domain's NICs need, each once. Pure."""
    found: dict[tuple[str, str], None] = {}
    for element in root.iterfind("./devices/interface"):
        kind, source = element.get("type", ""), element.find("source")
        if kind in ("bridge", "network") and source is not None and source.get(kind):
            found[(kind, source.get(kind, ""))] = None
    return list(found)


async def memory(scene: Scene) -> Finding:
    """Twice the guest's memory, and QEMU's own, beside what the standbys that are here may still take."""
    ram, huge = ram_bytes(scene.root), scene.root.find("./memoryBacking/hugepages") is not None
    with open("/proc/meminfo", encoding="ascii") as file:
        info = meminfo(file.read())
    if huge and info.get("HugePages_Free", 0) * info.get("Hugepagesize", 0) < ram:
        raise Refused(
            "no-memory", f"{scene.host} has too few free huge pages for a copy of {format_bytes(ram)}",
            "the domain is backed by them", f"on {scene.host}: raise vm.nr_hugepages",
        )  # fmt: skip
    need = ram * (1 if huge else 2) + OVERHEAD_BYTES
    free = info.get("MemAvailable", 0) - promised_memory(scene)
    what = f"{format_bytes(max(free, 0))} of memory free, and the copy takes up to {format_bytes(need)}"
    if free < need:
        raise Refused(
            "no-memory", f"{scene.host} has {what}",
            "a checkpoint is kept beside the guest's memory: twice that, and QEMU's own",
            f"free memory on {scene.host}, or give the guest less",
        )  # fmt: skip
    return Finding("ok", "memory", f"{scene.host} has {what}")


def promised_memory(scene: Scene) -> int:
    """What the other standbys of this host have not taken yet and may."""
    total = 0
    for life in scene.core.lives.values():
        if life.body.role == "standby" and life.body.uuid != scene.request.uuid and life.qemu_alive():
            try:
                with open(f"/proc/{life.body.qemu_pid}/statm", encoding="ascii") as file:
                    resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            except OSError:
                continue
            total += max(2 * ram_bytes(ET.fromstring(life.body.xml)) + OVERHEAD_BYTES - resident, 0)
    return total


def ram_bytes(root: ET.Element) -> int:
    """A domain's memory. Pure."""
    element = root.find("./memory")
    if element is None:
        return 0
    return int(element.text or 0) * _UNITS.get(element.get("unit", "KiB"), 2**10)


def meminfo(text: str) -> dict[str, int]:
    """/proc/meminfo; bytes where it says kB. Pure."""
    rows = (line.replace(":", "").split() for line in text.splitlines())
    return {row[0]: int(row[1]) * (1024 if row[2:] == ["kB"] else 1) for row in rows if len(row) >= 2}


async def files(scene: Scene) -> Finding:
    """Whether the files are there that libvirt opens for the copy and that nobody sends: firmware, kernel, media."""
    wanted = domainxml.files_at_the_same_path(scene.request.xml, scene.request.disk_paths)
    for path, what in wanted.items():
        if not os.path.exists(path):
            medium = what.startswith("the medium")
            raise Refused(
                "no-file", f"{scene.host} has no {path}", f"the domain names it as {what}",
                "copy it there, or eject it (virsh change-media)" if medium else f"install the same package on {scene.host}",
            )  # fmt: skip
    return Finding("ok", "files-there", f"{scene.host} has {', '.join(wanted) or 'no file of the domain, as none is needed'}")


async def room(scene: Scene) -> Finding:
    """Space for the disks, beside what the standbys that are here may still write."""
    pools, place_of = await scene.site.host.pools(), diskfiles.paths(scene.request)
    need: dict[int, tuple[int, int]] = {}  # device → (what is taken beforehand or at once, what it may grow to)
    folder_of: dict[int, str] = {}
    for disk in scene.request.disks:
        path = place_of[disk.target]
        diskfiles.refuse_unmounted(pools, path, scene.host)
        folder = existing(os.path.dirname(path))
        device = os.stat(folder).st_dev
        folder_of[device] = folder
        file = scene.request.files.get(disk.target, model.DiskFile())
        at_once, most = diskfiles.needs(disk, file, scene.site.config.reserve)
        freed = os.stat(path).st_blocks * 512 if os.path.exists(path) else 0
        before = need.get(device, (0, 0))
        need[device] = before[0] + at_once - freed, before[1] + most - freed
    for device, (at_once, most) in need.items():
        place = os.statvfs(folder_of[device])
        free = place.f_bavail * place.f_frsize - promised_room(scene, device)
        what = f"{format_bytes(max(free, 0))} free in {folder_of[device]}"
        if free < at_once:
            raise Refused(
                "no-room", f"{scene.host} has {what}", f"the disks take {format_bytes(at_once)} of it",
                "make room, or put them elsewhere (--disk TARGET=PATH)",
            )  # fmt: skip
        if free < most:
            reason = f"the disks may grow from {format_bytes(at_once)} to {format_bytes(most)}; a full disk ends the protection"
            return Finding("warning", "room", f"{scene.host} has {what}", reason, "make room before they grow")
    total = format_bytes(max(sum(most for _, most in need.values()), 0))
    return Finding("ok", "room", f"{scene.host} has room for the disks: {total} at most")


def promised_room(scene: Scene, device: int) -> int:
    """What the other standbys' disks on this file system have not taken yet and may."""
    total = 0
    for life in scene.core.lives.values():
        for disk in life.body.disks if life.body.role == "standby" and life.body.uuid != scene.request.uuid else []:
            if os.path.exists(disk.path) and (stat := os.stat(disk.path)).st_dev == device:
                total += max(disk.size_bytes - stat.st_blocks * 512, 0)
    return total


def existing(folder: str) -> str:
    """The folder, or the nearest above it that is there."""
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder) or "/"
    return folder


async def overwrite(scene: Scene) -> Finding:
    """Whether the disks' files may be made, and both sides agree on TLS. Raises what the copy's own step would."""
    copy = scene.core.would_be_standby(scene.request, scene.peer)
    for target, path in diskfiles.paths(scene.request).items():
        if os.path.exists(path):
            await copy.may_overwrite(target, path)
    tls = "encrypted" if copy.body.tls else "in the clear"
    return Finding("ok", "files", f"the disks' files may be written on {scene.host}; checkpoints and disk blocks go {tls}")


async def engine(scene: Scene, probe: QemuProbe) -> Finding:
    """Ask that QEMU itself, without a machine. Raises: Refused as the copy would be."""
    if not trustworthy(probe.path):
        why = "only a file that root alone can write is started for that"
        return Finding("warning", "engine-there", f"the QEMU of {scene.host} was not asked whether it can follow", why)
    async with probe:
        if refusal := await mccheck.unsupported(probe, scene.request.engine, scene.request.mc):
            raise Refused("engine", f"{scene.host} can't follow {scene.request.domain}", refusal)
    return Finding("ok", "engine-there", f"the QEMU of {scene.host}, {probe.version}, can follow")


async def breakable(scene: Scene) -> Finding | None:
    """Whether a dead stream of engine mc can be broken there."""
    finding = await asyncio.to_thread(mccheck.kernel_finding) if scene.request.engine == "mc" else None
    return finding and Finding("warning", "sock-destroy", f"{scene.host}: {finding[0]}", *finding[1:])


async def transport(scene: Scene) -> Finding | None:
    """Whether engine mc's checkpoints can travel that way. Raises: Refused ("no-rdma")."""
    if scene.request.engine == "mc":
        mc.refuse_transport(scene.request.mc, scene.host)
    return None


async def rdma_keepalive(scene: Scene) -> Finding | None:
    """Whether keepalives can go by RDMA, where the primary has it."""
    return await rdma.look(scene.request, scene.site.config)


def host_cpu(path: str = "/proc/cpuinfo") -> tuple[str, str]:
    """(model name, its flags sorted) of the host's first CPU."""
    found: dict[str, str] = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
            if not line.strip():
                break
    return found.get("model name", ""), " ".join(sorted(found.get("flags", "").split()))


FITS: tuple[Callable[[Scene], Awaitable[Finding | None]], ...] = (
    way_to_libvirt, machine, files, cpu, networks, memory, room, rdma_keepalive, transport
)  # fmt: skip
