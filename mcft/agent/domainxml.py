"""A domain's XML: which disks and NICs it has, what of it can't be protected, and the standby's XML made from it.

libvirt: https://libvirt.org/formatdomain.html. Aliases (`virtio-disk0`, `net0`) name QEMU's devices; netdev ids are
`host` + the NIC's alias.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from dataclasses import dataclass

from mcft.errors import Refused
from mcft.netbuffer import Nic

QEMU_NS = "http://libvirt.org/schemas/domain/qemu/1.0"
ET.register_namespace("qemu", QEMU_NS)
UNPROTECTABLE = {
    "hostdev": "a passed-through host device (VFIO)",
    "filesystem": "a shared file system (virtiofs, 9p)",
    "shmem": "shared memory",
    "tpm": "a TPM",
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
    found = []
    for element in ET.fromstring(xml).iterfind("./devices/disk"):
        target = _attribute(element, "target", "dev")
        if element.find("readonly") is not None or element.get("device") == "cdrom":
            continue
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
        found.append(
            XmlDisk(
                target, _attribute(element, "alias", "name"), path, _attribute(element, "driver", "type") or "raw",
                _attribute(element, "target", "bus"), _attribute(element, "driver", "cache"),
            )
        )
    return found


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
    root = ET.fromstring(xml)
    for tag, what in UNPROTECTABLE.items():
        if root.find(f"./devices/{tag}") is not None:
            raise Refused(
                "device-not-protectable", f"the domain has {what}", "its state can't be carried to a standby", "remove it first"
            )


def machine(xml: str) -> str:
    """`<os><type …/></os>` alone, for a probe domain that must never boot."""
    os_type = ET.fromstring(xml).find("./os/type")
    text = ET.tostring(os_type, encoding="unicode").strip() if os_type is not None else "<type>hvm</type>"
    return f"<os>{text}</os>"


def standby(migratable_xml: str, disk_paths: dict[str, str]) -> str:
    """The copy's XML: the primary's, with the standby's paths, waiting for a stream (`-incoming defer`)."""
    root = ET.fromstring(migratable_xml)
    _move_disks(root, disk_paths)
    commandline = root.find(f"{{{QEMU_NS}}}commandline")
    if commandline is None:
        commandline = ET.SubElement(root, f"{{{QEMU_NS}}}commandline")
    for value in ("-incoming", "defer"):
        ET.SubElement(commandline, f"{{{QEMU_NS}}}arg", value=value)
    return ET.tostring(root, encoding="unicode")


def moved(persistent_xml: str, disk_paths: dict[str, str]) -> str:
    """The persistent definition for the other host: the same with that host's paths."""
    root = ET.fromstring(persistent_xml)
    _move_disks(root, disk_paths)
    return ET.tostring(root, encoding="unicode")


def _move_disks(root: ET.Element, disk_paths: dict[str, str]) -> None:
    for element in root.iterfind("./devices/disk"):
        path = disk_paths.get(_attribute(element, "target", "dev"))
        source = element.find("source")
        if path and source is not None:
            for key in ("file", "dev"):
                if key in source.attrib:
                    source.set(key, path)


def _attribute(element: ET.Element, tag: str, name: str) -> str:
    child = element.find(tag)
    return "" if child is None else child.get(name, "")
