"""Standby XML of domains as real tools make them, compared with what was read and accepted once.

`domains/made-*.xml`: virt-install's domains (Debian; Fedora with UEFI on a libvirt network; Windows 10 with virtio and UEFI; UEFI
with secure boot, virtio-scsi and e1000e) and one after `virsh snapshot-create-as --disk-only`, as libvirt 11.3 dumped them
running (`virsh dumpxml --migratable`). MCFT_GOLDEN=update writes `golden/` anew: read the difference.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from mcft.agent import domainxml

HERE = Path(__file__).parent
MADE = sorted(path.stem for path in (HERE / "domains").glob("made-*.xml"))
OPTIONAL = " startupPolicy='optional'"
ELSEWHERE = {"vda": "/srv/there.img", "sda": "/srv/there.img"}


def standby(name: str) -> str:
    return domainxml.standby((HERE / "domains" / f"{name}.xml").read_text(), ELSEWHERE)


@pytest.mark.parametrize("name", MADE)
def test_golden(name: str) -> None:
    golden, made = HERE / "golden" / f"{name}.xml", standby(name)
    if os.environ.get("MCFT_GOLDEN") == "update":
        golden.write_text(f"{made}\n")
    assert made == golden.read_text().rstrip("\n"), f"read what differs; if it is right: MCFT_GOLDEN=update ({golden.name})"


@pytest.mark.parametrize("name", MADE)
def test_only_what_must_differs(name: str) -> None:
    """The guest must see the same machine. Fails if a device, an address or a NIC's MAC is changed or lost."""
    before = ET.fromstring((HERE / "domains" / f"{name}.xml").read_text())
    after = ET.fromstring(standby(name))
    for root in (before, after):
        for disk in root.iterfind("./devices/disk"):
            for tag in ("source", "backingStore"):
                for element in disk.findall(tag):
                    disk.remove(element)
    commandline = after.find(f"{{{domainxml.QEMU_NS}}}commandline")
    assert commandline is not None and [arg.get("value") for arg in commandline] == ["-incoming", "defer"]
    after.remove(commandline)
    assert flat(before) == flat(after)


def flat(root: ET.Element) -> list[tuple[str, dict[str, str], str]]:
    return [(element.tag, dict(element.attrib), (element.text or "").strip()) for element in root.iter()]


def test_a_chain_is_one_file_there() -> None:
    """Fails if the copy would want the primary's backing files: libvirt would not start it, or on stale ones."""
    made = standby("made-chain")
    assert "backingStore" not in made and "base" not in made
    moved = domainxml.moved((HERE / "domains" / "made-chain.xml").read_text(), ELSEWHERE)
    assert "backingStore" not in moved


def test_files_that_nobody_sends() -> None:
    xml = (HERE / "domains" / "made-secure.xml").read_text()
    assert list(domainxml.files_at_the_same_path(xml, {})) == ["/usr/share/OVMF/OVMF_CODE_4M.secboot.fd"]
    drive = "<disk type='file' device='cdrom'><source file='/iso'{}/><target dev='sdz'/></disk>"
    with_iso = xml.replace("<devices>", f"<devices>{drive.format('')}", 1)
    assert domainxml.files_at_the_same_path(with_iso, {})["/iso"] == "the medium in its cdrom sdz"
    assert "/there.iso" in domainxml.files_at_the_same_path(with_iso, {"sdz": "/there.iso"})
    optional = xml.replace("<devices>", f"<devices>{drive.format(OPTIONAL)}", 1)
    assert "/iso" not in domainxml.files_at_the_same_path(optional, {})
