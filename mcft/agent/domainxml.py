"""A domain's XML: which disks and NICs it has, what of it can't be protected, and the standby's XML made from it.

libvirt: https://libvirt.org/formatdomain.html. Aliases (`virtio-disk0`, `net0`) name QEMU's devices; netdev ids are
`host` + the NIC's alias.
"""

from __future__ import annotations

import io
import os
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass

from mcft.errors import Refused
from mcft.netbuffer import Nic

QEMU_NS = "http://libvirt.org/schemas/domain/qemu/1.0"
ET.register_namespace("qemu", QEMU_NS)
# Where → what. The first that fits an element names it. A NIC or disk of these kinds moves guest memory past QEMU.
UNPROTECTABLE = {
    "devices/hostdev[@type='mdev']": "a mediated host device (mdev)",
    "devices/hostdev[@type='usb']": "a passed-through USB device",
    "devices/hostdev": "a passed-through host device (VFIO)",
    "devices/interface[@type='hostdev']": "a passed-through NIC (VFIO)",
    "devices/interface[@type='vhostuser']": "a vhost-user NIC",
    "devices/interface[@type='vdpa']": "a vDPA NIC",
    "devices/filesystem": "a shared file system (virtiofs, 9p)",
    "devices/shmem": "shared memory",
    "devices/tpm": "a TPM",
    "devices/lease": "a lease (its disks are locked by a lock manager)",
    "devices/video/driver[@name='vhostuser']/..": "a vhost-user GPU",
    "devices/video/model/acceleration[@accel3d='yes']/../..": "a GPU with 3D acceleration (virgl)",
    "launchSecurity": "memory that its CPU encrypts (SEV, TDX)",
    "os/nvram[@type='block']": "firmware variables (NVRAM) on a block device",
    "os/nvram[@type='network']": "firmware variables (NVRAM) on network storage",
}
# Where → (code, what): output that no buffer holds. Consoles that are a serial port's other name are listed as that.
OUTPUTS = {
    "devices/serial": ("serial", "a serial port"),
    "devices/parallel": ("parallel", "a parallel port"),
    "devices/console": ("console", "a console"),
    "devices/channel[@type='unix']/target[@name='org.qemu.guest_agent.0']/..": ("guest-agent", "the guest agent"),
    "devices/channel": ("channel", "a channel"),
    "devices/vsock": ("vsock", "a vsock"),
    "devices/graphics": ("display", "a display"),
    "devices/redirdev": ("usb-redirection", "a redirected USB device"),
    "os/nvram": ("nvram", "the firmware's variables (NVRAM)"),
}


@dataclass(frozen=True, slots=True)
class XmlDisk:
    """A `<disk>` with a medium that the guest can write. alias: of the running device."""

    target: str
    alias: str
    path: str
    format: str
    bus: str
    cache: str


def disks(xml: str) -> list[XmlDisk]:
    """The writable disks. Raises: Refused ("disk-not-protectable") for one that can't follow."""
    return [disk for element in ET.fromstring(xml).iterfind("./devices/disk") if (disk := _writable(element)) is not None]


def disk_refusals(xml: str) -> list[Refused]:
    """All that `disks` would refuse, not only the first."""
    refusals = []
    for element in ET.fromstring(xml).iterfind("./devices/disk"):
        try:
            _writable(element)
        except Refused as refusal:
            refusals.append(refusal)
    return refusals


def _writable(element: ET.Element) -> XmlDisk | None:
    """One `<disk>`; None if its guest can't write it."""
    target = _attribute(element, "target", "dev")
    if _read_only(element):
        return None
    if element.get("device", "disk") != "disk":
        raise Refused(
            "disk-not-protectable", f"disk {target} is a {element.get('device')}", "its writes can't be replicated",
            "detach it, or make it read-only",
        )  # fmt: skip
    path = _attribute(element, "source", "file")
    if element.find("shareable") is not None:
        raise Refused("disk-not-protectable", f"disk {target} is shareable", "another domain may write it", "give it to one")
    if not path:
        raise Refused(
            "disk-not-protectable",
            f"disk {target} is of type '{element.get('type')}' and can't be replicated",
            "in this version only disks in files can",
            "detach it, or move it to a file",
        )
    return XmlDisk(
        target, _attribute(element, "alias", "name"), path, _attribute(element, "driver", "type") or "raw",
        _attribute(element, "target", "bus"), _attribute(element, "driver", "cache"),
    )  # fmt: skip


def nics(xml: str, vhost: bool) -> list[Nic]:
    """The NICs of a running domain. vhost: whether its QEMU has /dev/vhost-net open."""
    found = []
    for element in ET.fromstring(xml).iterfind("./devices/interface"):
        alias = _attribute(element, "alias", "name")
        model = _attribute(element, "model", "type")
        by_qemu = _attribute(element, "driver", "name") == "qemu"
        found.append(
            Nic(
                _attribute(element, "target", "dev"), _attribute(element, "mac", "address"), f"host{alias}", model,
                vhost and model.startswith("virtio") and not by_qemu, element.get("type", ""),
            )
        )
    return found


def refuse_other_nics(before: list[Nic], xml: str) -> None:
    """A NIC plugged since the buffer was attached would speak unbuffered; one unplugged is still the standby's.

    Raises: Refused ("nics-changed").
    """
    then, now = {(nic.target, nic.mac) for nic in before}, {(nic.target, nic.mac) for nic in nics(xml, vhost=False)}
    if then != now:
        what = [f"{target} ({mac}) was plugged" for target, mac in sorted(now - then)]
        what += [f"{target} ({mac}) was unplugged" for target, mac in sorted(then - now)]
        raise Refused(
            "nics-changed", f"the NICs changed while the domain was being protected: {', '.join(what)}",
            "they are part of what is protected", "protect it again, with the NICs as they are now",
        )  # fmt: skip


def uses_vhost(qemu_pid: int) -> bool:
    """Whether this QEMU has /dev/vhost-net open (libvirt's choice for virtio NICs, not shown in its XML)."""
    folder = f"/proc/{qemu_pid}/fd"
    for name in os.listdir(folder):
        try:
            if os.readlink(os.path.join(folder, name)) == "/dev/vhost-net":
                return True
        except OSError:
            continue
    return False


def refuse_unprotectable(xml: str) -> None:
    """Raises: Refused ("device-not-protectable") naming the first device whose state can't be carried over."""
    for refusal in unprotectable(xml):
        raise refusal


def unprotectable(xml: str) -> list[Refused]:
    """All that `refuse_unprotectable` would refuse, not only the first."""
    root, seen, refusals = ET.fromstring(xml), set(), []
    for where, what in UNPROTECTABLE.items():
        for element in root.iterfind(where):
            if element not in seen:
                seen.add(element)
                why = "its state can't be carried to a standby"
                refusals.append(Refused("device-not-protectable", f"the domain has {what}", why, "remove it first"))
    return refusals


def outputs(xml: str) -> list[tuple[str, str]]:
    """What leaves the guest unbuffered: (code, what) for each kind of it, once."""
    root, seen, found = ET.fromstring(xml), set(), {}
    for where, (code, what) in OUTPUTS.items():
        for element in root.iterfind(where):
            # libvirt shows the first serial port as a console once more.
            twice = element.tag == "console" and _attribute(element, "target", "type") not in ("virtio", "sclp", "xen")
            if element not in seen and element.get("type") != "null" and not twice:
                seen.add(element)
                found[code] = what
    return list(found.items())


def nvram(xml: str) -> str:
    """The file of the firmware's variables; empty if there is none."""
    element = ET.fromstring(xml).find("./os/nvram")
    if element is None:
        return ""
    return _attribute(element, "source", "file") or (element.text or "").strip()


def files_at_the_same_path(xml: str, disk_paths: dict[str, str]) -> dict[str, str]:
    """Path → what it is, of files that the copy opens and nobody makes: firmware, kernel, media that are only read."""
    root, found = ET.fromstring(xml), {}
    for tag, what in (("loader", "its firmware"), ("kernel", "its kernel"), ("initrd", "its initrd"), ("dtb", "its device tree")):
        if path := (root.findtext(f"./os/{tag}") or "").strip():
            found[path] = what
    for element in root.iterfind("./devices/disk"):
        target = _attribute(element, "target", "dev")
        path = disk_paths.get(target) or _attribute(element, "source", "file")
        optional = _attribute(element, "source", "startupPolicy") in ("optional", "requisite")
        if path and _read_only(element) and not optional:
            found[path] = f"the medium in its {element.get('device', 'disk')} {target}"
    return found


def machine(xml: str) -> str:
    """`<os><type …/></os>` alone, for a probe domain that must never boot."""
    os_type = ET.fromstring(xml).find("./os/type")
    text = ET.tostring(os_type, encoding="unicode").strip() if os_type is not None else "<type>hvm</type>"
    return f"<os>{text}</os>"


def standby(migratable_xml: str, disk_paths: dict[str, str]) -> str:
    """The copy's XML: the primary's, with the standby's paths, waiting for a stream (`-incoming defer`)."""
    root = _parsed(migratable_xml)
    _move_disks(root, disk_paths)
    commandline = root.find(f"{{{QEMU_NS}}}commandline")
    if commandline is None:
        commandline = ET.SubElement(root, f"{{{QEMU_NS}}}commandline")
    for value in ("-incoming", "defer"):
        ET.SubElement(commandline, f"{{{QEMU_NS}}}arg", value=value)
    return ET.tostring(root, encoding="unicode")


def moved(persistent_xml: str, disk_paths: dict[str, str]) -> str:
    """The persistent definition for the other host: the same with that host's paths."""
    root = _parsed(persistent_xml)
    _move_disks(root, disk_paths)
    return ET.tostring(root, encoding="unicode")


def _parsed(xml: str) -> ET.Element:
    """The XML, to be written with the prefixes that it came with (a tool's metadata has its own)."""
    for _, (prefix, uri) in ET.iterparse(io.StringIO(xml), ("start-ns",)):
        if prefix and not re.fullmatch(r"ns\d+", prefix):  # those are ElementTree's own
            ET.register_namespace(prefix, uri)
    return ET.fromstring(xml)


def _move_disks(root: ET.Element, disk_paths: dict[str, str]) -> None:
    for element in root.iterfind("./devices/disk"):
        path = disk_paths.get(_attribute(element, "target", "dev"))
        source = element.find("source")
        if path and source is not None:
            for key in ("file", "dev"):
                if key in source.attrib:
                    source.set(key, path)
        # After a snapshot libvirt writes the chain down; the copy's disk is one file, whatever the chain here.
        chain = element.find("backingStore")
        if chain is not None and len(chain) and not _read_only(element):
            element.remove(chain)


def _read_only(disk: ET.Element) -> bool:
    return disk.find("readonly") is not None or disk.get("device") == "cdrom"


def _attribute(element: ET.Element, tag: str, name: str) -> str:
    child = element.find(tag)
    return "" if child is None else child.get(name, "")
