"""Domains' XML: disks, NICs, what is refused, and the standby's XML made from the primary's."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from mcft.agent import domainxml
from mcft.errors import Refused
from mcft.netbuffer import choose

DOMAINS = Path(__file__).parent / "domains"
QEMU = f"{{{domainxml.QEMU_NS}}}"


def read(name: str) -> str:
    return (DOMAINS / f"{name}.xml").read_text()


def with_device(device: str, name: str = "namespaced") -> str:
    return read(name).replace("<devices>", f"<devices>{device}", 1)


def test_disks() -> None:
    with pytest.raises(Refused, match="type 'block'"):
        domainxml.disks(read("plain"))
    in_files = read("plain").replace("type='block'", "type='file'").replace("source dev='/dev/vg0", "source file='/srv")
    found = {d.target: d for d in domainxml.disks(in_files)}
    assert list(found) == ["vda", "vdb"], "a medium that can't be written needs no replication"
    vda, vdb = found["vda"], found["vdb"]
    assert (vda.path, vda.format, vda.alias) == ("/var/lib/libvirt/images/vm1.qcow2", "qcow2", "virtio-disk0")
    assert (vda.bus, vda.cache) == ("virtio", "none")
    assert (vdb.path, vdb.format, vdb.cache) == ("/srv/vm1-data", "raw", "writethrough")


@pytest.mark.parametrize(
    "disk",
    [
        "<disk type='file' device='disk'><source file='/x'/><target dev='vdx'/><shareable/></disk>",
        "<disk type='network' device='disk'><source protocol='rbd' name='p/v'/><target dev='vdx'/></disk>",
        "<disk type='volume' device='disk'><source pool='p' volume='v'/><target dev='vdx'/></disk>",
        "<disk type='vhostuser' device='disk'><source type='unix' path='/s'/><target dev='vdx'/></disk>",
        "<disk type='nvme' device='disk'><source type='pci' namespace='1'/><target dev='vdx'/></disk>",
    ],
)
def test_disks_that_cannot_follow_are_refused_by_name(disk: str) -> None:
    with pytest.raises(Refused, match="vdx") as refused:
        domainxml.disks(with_device(disk))
    assert refused.value.code == "disk-not-protectable" and refused.value.next_step


@pytest.mark.parametrize(
    "disk",
    [
        # SCSI commands of the guest go past QEMU's block layer, and with it past the replication.
        "<disk type='block' device='lun'><source dev='/dev/sdz'/><target dev='vdx' bus='scsi'/></disk>",
        "<disk type='vhostvdpa' device='disk'><source dev='/dev/vhost-vdpa-0'/><target dev='vdx'/></disk>",
        # Writable and never replicated: not "a medium that the guest can't write".
        "<disk type='file' device='floppy'><source file='/f.img'/><target dev='vdx' bus='fdc'/></disk>",
    ],
)
def test_disks_that_would_silently_not_follow(disk: str) -> None:
    with pytest.raises(Refused):
        domainxml.disks(with_device(disk))


def test_nics() -> None:
    nics = domainxml.nics(read("plain"), vhost=True)
    assert [(n.target, n.netdev, n.model, n.vhost, n.kind) for n in nics] == [
        ("vnet0", "hostnet0", "virtio", True, "network"),
        ("vnet1", "hostnet1", "virtio", False, "bridge"),
        ("vnet2", "hostnet2", "e1000", False, "bridge"),
    ]
    assert not any(n.vhost for n in domainxml.nics(read("plain"), vhost=False))
    assert choose("auto", domainxml.nics(read("plain"), vhost=False), plug_available=False) == "filter"


def test_nics_that_changed_since_are_refused() -> None:
    """Fails if only their number is compared, or one that went is none."""
    then = domainxml.nics(read("plain"), vhost=False)
    domainxml.refuse_other_nics(then, read("plain"))
    with pytest.raises(Refused, match=rf"{then[0].target} .* was plugged"):
        domainxml.refuse_other_nics(then[1:], read("plain"))
    with pytest.raises(Refused, match=r"vnet9 .* was unplugged"):
        domainxml.refuse_other_nics([*then, replace(then[0], target="vnet9")], read("plain"))


def test_nics_that_no_buffer_can_hold_are_refused() -> None:
    nics = domainxml.nics(read("exotic"), vhost=False)
    assert [n.kind for n in nics] == ["hostdev", "vhostuser"]
    for nic in nics:
        with pytest.raises(Refused, match="can't be buffered"):
            choose("auto", [nic], plug_available=False)
    with pytest.raises(Refused, match="vhost-net"):
        choose("filter", domainxml.nics(read("plain"), vhost=True), plug_available=False)
    assert choose("none", nics, plug_available=False) == "none"


def test_plain_domains_are_protectable() -> None:
    for name in ("plain", "namespaced"):
        domainxml.refuse_unprotectable(read(name))


def test_host_device_is_refused() -> None:
    with pytest.raises(Refused, match="VFIO"):
        domainxml.refuse_unprotectable(read("exotic"))


@pytest.mark.parametrize(
    "device",
    [
        "<hostdev mode='subsystem' type='usb'/>",
        "<filesystem type='mount'><driver type='virtiofs'/></filesystem>",
        "<shmem name='s'/>",
        "<tpm model='tpm-tis'><backend type='emulator'/></tpm>",
    ],
)
def test_devices_whose_state_stays_behind_are_refused(device: str) -> None:
    with pytest.raises(Refused) as refused:
        domainxml.refuse_unprotectable(with_device(device))
    assert refused.value.code == "device-not-protectable"


def args(xml: str) -> list[str]:
    found = ET.fromstring(xml).findall(f"./{QEMU}commandline/{QEMU}arg")
    return [a.get("value", "") for a in found]


def test_standby_waits_for_a_stream_and_keeps_the_rest() -> None:
    made = domainxml.standby(read("namespaced"), {"sda": "/other/vm2.img"})
    assert args(made) == ["-fw_cfg", "name=opt/site,string=a&b", "-incoming", "defer"]
    root = ET.fromstring(made)
    assert len(root.findall(f"./{QEMU}commandline")) == 1
    assert [e.get("name") for e in root.findall(f"./{QEMU}commandline/{QEMU}env")] == ["QEMU_AUDIO_DRV"]
    assert "xmlns:qemu=" in made, "libvirt looks for its own prefix's namespace"
    source = root.find("./devices/disk/source")
    assert source is not None and source.get("file") == "/other/vm2.img"


def test_standby_of_a_domain_without_the_namespace() -> None:
    made = domainxml.standby(read("plain"), {"vda": "/a.qcow2", "vdb": "/dev/vg1/b"})
    assert args(made) == ["-incoming", "defer"]
    sources = [e.attrib for e in ET.fromstring(made).findall("./devices/disk/source")]
    assert [s.get("file") or s.get("dev") for s in sources] == ["/a.qcow2", "/dev/vg1/b", "/srv/iso/install.iso"]
    assert "dev" in sources[1] and "file" not in sources[1], "a block device stays one"
    assert ET.fromstring(made).findtext("uuid") == ET.fromstring(read("plain")).findtext("uuid")


def test_moved_changes_paths_and_nothing_else() -> None:
    before, after = ET.fromstring(read("plain")), ET.fromstring(domainxml.moved(read("plain"), {"vda": "/a"}))
    source = after.find("./devices/disk/source")
    assert source is not None and source.get("file") == "/a"
    source.set("file", "/var/lib/libvirt/images/vm1.qcow2")
    assert ET.canonicalize(ET.tostring(before)) == ET.canonicalize(ET.tostring(after))
    assert args(domainxml.moved(read("plain"), {})) == []


def test_machine_for_the_probe_is_the_type_alone() -> None:
    os_type = ET.fromstring(domainxml.machine(read("exotic")))
    assert [e.tag for e in os_type] == ["type"] and os_type[0].get("machine") == "q35"
    assert domainxml.machine("<domain/>") == "<os><type>hvm</type></os>"
