"""Domains as they are: disks on every bus, backing chains, iothreads, an empty CD-ROM, NICs on bridges and on a network."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator

import pytest
from conftest import EVIDENCE
from watching import Load
from world import H1, H2, HOSTS, NOT_AGAIN, Host, configured, guest, now, protect, redefined

FOLDER = "/var/lib/libvirt/images"
NAMES = ("vdb", "sda", "sdb", "vdc")
DISKS = f"""
<iothreads>1</iothreads>
<devices>
  <controller type='scsi' index='0' model='virtio-scsi'/>
  <disk type='file' device='disk'>
    <driver name='qemu' type='qcow2' cache='none' discard='unmap'/><source file='{FOLDER}/vdb.qcow2'/>
    <backingStore type='file'><format type='qcow2'/><source file='{FOLDER}/vdb.base'/><backingStore/></backingStore>
    <target dev='vdb' bus='virtio'/>
  </disk>
  <disk type='file' device='disk'>
    <driver name='qemu' type='raw' cache='none' iothread='1'/><source file='{FOLDER}/vdc.img'/>
    <target dev='vdc' bus='virtio'/>
  </disk>
  <disk type='file' device='disk'>
    <driver name='qemu' type='raw' cache='none'/><source file='{FOLDER}/sda.img'/><target dev='sda' bus='sata'/>
  </disk>
  <disk type='file' device='disk'>
    <driver name='qemu' type='raw' cache='none' discard='unmap'/><source file='{FOLDER}/sdb.img'/><target dev='sdb' bus='scsi'/>
  </disk>
  <disk type='file' device='cdrom'><target dev='sdc' bus='sata'/><readonly/></disk>
  <interface type='bridge'>
    <mac address='52:54:00:00:00:11'/><source bridge='br0'/><model type='virtio'/><driver name='qemu'/><rom enabled='no'/>
  </interface>
  <interface type='network'>
    <mac address='52:54:00:00:00:12'/><source network='lan'/><model type='virtio'/><driver name='qemu'/><rom enabled='no'/>
  </interface>
</devices>
"""
NETWORK = "<network><name>lan</name><forward mode='bridge'/><bridge name='br0'/></network>"


def make_files(host: Host) -> None:
    host.sh(
        f"cd {FOLDER} && rm -f vdb.* vdc.img sda.img sdb.img && truncate -s 16M vdc.img sda.img sdb.img &&"
        " qemu-img create -q -f qcow2 vdb.base 16M && qemu-img create -q -f qcow2 -b vdb.base -F qcow2 vdb.qcow2"
    )


@pytest.fixture
def many(fresh_world: None) -> Iterator[None]:
    """vm1 with all of DISKS besides its own; afterwards vm1 as it was."""
    definition = ET.fromstring(H1.run("virsh", "dumpxml", "vm1", "--inactive").stdout)
    plain = ET.tostring(definition, encoding="unicode")
    more = ET.fromstring(f"<more>{DISKS}</more>")
    iothreads, extra = more.find("iothreads"), more.find("devices")
    devices = definition.find("devices")
    assert iothreads is not None and extra is not None and devices is not None
    definition.insert(4, iothreads)
    devices.extend(list(extra))
    try:
        make_files(H1)
        for host in HOSTS:
            host.sh(f'echo "{NETWORK}" > /run/lan.xml && virsh -q net-define /run/lan.xml && virsh -q net-start lan')
        redefined(ET.tostring(definition, encoding="unicode"))
        yield
    finally:
        for host in HOSTS:
            if host.status():
                host.mcft("unprotect", "vm1", check=False)
        for host in HOSTS:
            host.run("virsh", "destroy", "vm1", check=False)
            host.run("virsh", "undefine", "vm1", check=False)
            host.mcft("forget", "vm1", "--local", "--yes", check=False)
            host.sh(f"cd {FOLDER} && rm -f vdb.* vdc.img* sda.img* sdb.img* vm1.img*")
            host.sh("virsh -q net-destroy lan; virsh -q net-undefine lan; rm -f /run/lan.xml", check=False)
        H1.sh(f"truncate -s 64M {FOLDER}/vm1.img")
        redefined(plain)


def fill(seed: int) -> None:
    for position, name in enumerate(NAMES):
        assert guest("fill", name, "4", str(seed * 10 + position), timeout=40).startswith("ok")


def nodes_of_ours(host: Host) -> list[str]:
    return [n["node-name"] for n in host.qmp("query-named-block-nodes") if n["node-name"].startswith("mcft-")]


def ports_of_the_bridge(host: Host) -> set[str]:
    """The taps on br0 that are up."""
    return set(host.sh("ip -br link show master br0 up | awk '$1 ~ /^vnet/ { print $1 }'").split())


def sums() -> dict[str, str]:
    return {name: guest("sum", name, timeout=40) for name in NAMES}


@pytest.fixture
def not_again(fresh_world: None) -> Iterator[None]:
    with configured(H2, NOT_AGAIN):
        yield


def test_every_disk_and_nic_of_a_domain(many: None, not_again: None, load: Load) -> None:
    """Each disk's content comes along, what is written under protection included; every NIC is held.

    Fails if one disk is copied and not replicated, if a chain (also one that the XML spells out) or an iothread is in the
    way, if the second NIC is a hole, if a peer without the NIC's network is not refused, or if that NIC is not plugged in there.
    """
    fill(1)
    H2.sh("virsh -q net-destroy lan")
    refused = H1.mcft("protect", "vm1", "--to", "host2", check=False)
    assert refused.returncode == 4 and "running network 'lan'" in refused.stderr, refused.stderr
    H2.sh("virsh -q net-start lan")
    protect(H1, timeout=90)
    held = [nic["target"] for nic in H1.status()["network"]["nics"]]
    assert len(held) == 3 and set(held) <= ports_of_the_bridge(H1), held
    assert sorted(d["target"] for d in H1.status()["disks"]) == sorted(["vda", *NAMES])
    load.flowing()
    fill(2)
    written = sums()
    H1.kill_qemu()
    H2.await_took_over(timeout=20)
    load.goes_on()
    assert sums() == written
    H2.await_committed()
    # (The guest calls its sd disks as it finds them, which need not be the XML's order.)
    outside = H2.sh(f"cd {FOLDER} && sha256sum sda.img sdb.img vdc.img").split()[::2]
    assert sorted(outside) == sorted(written[name] for name in ("sda", "sdb", "vdc"))
    assert not nodes_of_ours(H2)
    assert len(ports_of_the_bridge(H2)) == 3
    load.finished()


def test_and_back_to_as_it_was(many: None) -> None:
    """Fails if unprotecting leaves a node on one of the disks, or if the guest does not survive it."""
    fill(3)
    before = sums()
    protect(H1, timeout=90)
    H1.mcft("unprotect", "vm1")
    assert sums() == before
    assert not nodes_of_ours(H1)
    assert not H2.sh(f"ls {FOLDER}").split()


@pytest.fixture
def big(fresh_world: None) -> Iterator[None]:
    """vm1 with 3 GiB of memory; afterwards as it was."""
    definition = ET.fromstring(H1.run("virsh", "dumpxml", "vm1", "--inactive").stdout)
    plain = ET.tostring(definition, encoding="unicode")
    for tag in ("memory", "currentMemory"):
        element = definition.find(tag)
        assert element is not None
        element.text = str(3 << 20)  # KiB, as libvirt dumps it
    try:
        redefined(ET.tostring(definition, encoding="unicode"))
        yield
    finally:
        for host in HOSTS:
            host.sh("virsh -q destroy vm1; virsh -q undefine vm1; mcft forget vm1 --local --yes", check=False)
            host.sh(f"rm -f {FOLDER}/vm1.img*")
        H1.sh(f"truncate -s 64M {FOLDER}/vm1.img")
        redefined(plain)


@pytest.mark.skipif(not EVIDENCE, reason="three times 3 GiB of memory")
def test_some_gib_of_memory(big: None, not_again: None, load: Load, measure: Callable[[str, float], float]) -> None:
    """Protected while it changes its memory, and taken over. Fails if the size of the memory alone lengthens a checkpoint
    so that the set-up's deadlines or the keepalives' are missed."""
    assert guest("dirty", "20") == "ok"
    load.flowing()
    begun_s = now()
    protect(H1, timeout=180)
    measure("protect, 3 GiB, 20 MiB/s dirty", now() - begun_s)
    pauses = H1.status()["checkpoints"]["pause_ms"]
    measure("pause of a checkpoint, 3 GiB, 20 MiB/s dirty (p50)", pauses["p50"] / 1000)
    H1.kill_qemu()
    H2.await_took_over(timeout=30)
    load.goes_on()
    assert guest("dirty", "0") == "ok"
    load.finished()
