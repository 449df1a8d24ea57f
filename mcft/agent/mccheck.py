"""What engine `mc` needs of a domain and of its host: each a refusal of `protect` and a finding of `check`.

Seen on that QEMU: it replicates no disk, so a host-side disk that the guest writes is output without commit; virtio-net's control
queue breaks its stream unless `ctrl_guest_offloads` is off; it has no TLS for its stream and no redirector filter.
"""

from __future__ import annotations

import itertools
import os
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

from mcft import api, netbuffer, sockbreak
from mcft.agent import buffers, mcnet, model
from mcft.agent.domainxml import QEMU_NS
from mcft.config import Config
from mcft.engines import mc
from mcft.engines.colo import Colo
from mcft.errors import Failed, Refused
from mcft.qmp_passthrough import Executor

if TYPE_CHECKING:  # so that it can be tested without libvirt
    from mcft.agent.protection import Primary

OFFLOADS = "ctrl_guest_offloads"


async def choose_engine(qmp: Executor, asked: api.EngineChoice, config: Config) -> api.EngineChoice:
    """In the request, or else in the configuration, or else by asking QEMU, never by its version. Raises: QmpError."""
    if asked == "auto":
        asked = config.engine
    if asked != "auto":
        return asked
    return "mc" if await mc.offers(qmp) else "colo"


async def refuse(life: Primary, live: str, config: Config) -> None:
    """Everything that can be refused beforehand. Raises: Refused; changes nothing."""
    for refusal in [*disk_refusals(live), *await nic_refusals(live, life.qmp)]:
        raise refusal
    refuse_tls(config)
    mc.refuse_transport(life.body.mc, config.name)


def disk_refusals(live: str) -> list[Refused]:
    """A Refused ("mc-disk") for each host-side disk that the guest can write."""
    refusals = []
    for element in ET.fromstring(live).iterfind("./devices/disk"):
        if element.find("readonly") is not None or element.get("device") in ("cdrom",):
            continue
        target = element.find("target")
        name = "?" if target is None else target.get("dev", "?")
        refusals.append(
            Refused(
                "mc-disk", f"disk {name} is a disk of the host's that the guest writes, and engine mc does not replicate disks",
                "what it wrote after the last checkpoint would be there before the standby wrote it",
                "let the guest mount its storage itself (iSCSI, NFS), make the disk read-only, or use a QEMU with engine colo",
            )
        )  # fmt: skip
    return refusals


async def nic_refusals(live: str, qmp: Executor | None) -> list[Refused]:
    """A Refused ("mc-offloads") for each virtio NIC whose control queue would break the stream."""
    root = ET.fromstring(live)
    if f"{OFFLOADS}=off" in " ".join(arguments(root)):
        return []
    refusals = []
    for element in root.iterfind("./devices/interface"):
        model, alias = element.find("model"), element.find("alias")
        if model is None or not model.get("type", "").startswith("virtio") or alias is None:
            continue
        if qmp is not None and await _is_off(qmp, alias.get("name", "")):
            continue
        refusals.append(
            Refused(
                "mc-offloads", f"NIC {alias.get('name')} is virtio with {OFFLOADS} on, which breaks this QEMU's stream",
                "its standby would end with 'Missing section footer for …/virtio-net'",
                f"start the domain with <qemu:arg value='-global'/><qemu:arg value='virtio-net-pci.{OFFLOADS}=off'/>",
            )
        )  # fmt: skip
    return refusals


async def _is_off(qmp: Executor, alias: str) -> bool:
    try:
        return not await qmp.execute("qom-get", path=f"/machine/peripheral/{alias}", property=OFFLOADS)
    except Failed:
        return False


def arguments(root: ET.Element) -> list[str]:
    """The domain's `<qemu:commandline>`, in order."""
    return [arg.get("value", "") for arg in root.iterfind(f"{{{QEMU_NS}}}commandline/{{{QEMU_NS}}}arg")]


def second_monitor(live: str) -> str:
    """The path of a QMP monitor that the domain was started with for mcft (`docs/engines.md`), if it is there; else empty.

    Either `-qmp unix:PATH,server…`, or `-chardev socket,id=mcft-mon,path=PATH,…` with `-mon chardev=mcft-mon,…`.
    """
    words = arguments(ET.fromstring(live))
    for before, word in itertools.pairwise(words):
        parts = word.split(",")
        if before == "-qmp" and word.startswith("unix:"):
            path = parts[0].removeprefix("unix:")
        elif before == "-chardev" and parts[0] == "socket" and "id=mcft-mon" in parts:
            path = next((part.removeprefix("path=") for part in parts if part.startswith("path=")), "")
        else:
            continue
        return path if os.path.exists(path) else ""
    return ""


def refuse_tls(config: Config) -> None:
    """Raises: Refused ("mc-no-tls") where the configuration wants encrypted streams."""
    if config.tls == "required":
        raise Refused(
            "mc-no-tls", "[tls] streams is \"required\", and engine mc's QEMU sends its checkpoints in the clear",
            "it is older than TLS for migration", "on a private link, on both hosts: [tls] streams = \"off\"",
        )  # fmt: skip


async def choose_buffer(asked: api.BufferChoice, body: model.Body) -> netbuffer.Way:
    """mcft's own plug, none by name, or QEMU's own. Raises: Refused: this QEMU has no redirector filter."""
    nics = body.nics
    if asked == "qemu":
        await mcnet.refuse(nics, body.arbiter, body.qemu_pid)
        return "qemu"
    if asked == "filter":
        raise Refused("no-filter", "engine mc's QEMU has no redirector filter", "it is older", "use --netbuffer plug")
    if asked == "none" or not nics:
        return "none"
    try:
        return await buffers.choose("plug", nics)
    except Refused as refusal:
        if refusal.code != "no-plug":
            raise
        raise Refused(
            "no-plug", "engine mc has no network buffer but plug, which is not possible here", refusal.reason,
            "load its modules, or accept unbuffered output with --netbuffer none",
        ) from None  # fmt: skip


async def unsupported(qmp: Executor, engine: str, options: api.McOptions) -> str:
    """As the engine says, for a peer's QEMU. Raises: QmpError."""
    if engine == "mc":
        return await mc.Mc(options).unsupported(qmp)
    return await Colo().unsupported(qmp)  # type: ignore[arg-type]  # it only executes


def kernel_finding() -> tuple[str, str, str] | None:
    """(what, why, what to do) if a stream can't be broken on this host; None if it can."""
    if not (why := sockbreak.why_not()):
        return None
    return (
        "after a silent loss of the other host, QEMU here would wait for 70 s", why,
        "use a kernel with CONFIG_INET_DIAG_DESTROY=y",
    )  # fmt: skip
