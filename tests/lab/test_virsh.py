"""Colleagues who type `virsh` at a protected guest: what is refused, what works, and a take-over that is whole afterwards.

`docs/living-with-mcft.md` has a row for each of these.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from watching import Load
from world import H1, H2, HOSTS, protect, restore, until

DISK = "/var/lib/libvirt/images/extra.img"
NIC = "bridge br0 --model virtio --live"

REFUSED = (
    "blockresize vm1 vda 128M",
    f"attach-disk vm1 {DISK} vdb --live",
    f"attach-interface vm1 {NIC}",
    "detach-interface vm1 bridge --live",
    "detach-disk vm1 vda --live",
    "save vm1 /root/vm1.save",
    "managedsave vm1",
    "snapshot-create-as vm1 internal",
    "blockcommit vm1 vda --active --wait",
    "migrate vm1 --live qemu+tcp://host2/system",
    "domrename vm1 vm2",
)
HARMLESS = ("suspend vm1", "dommemstat vm1", "domblkinfo vm1 vda", "domblkstat vm1 vda", "dumpxml vm1")
EITHER = ("resume vm1",)  # refused while a checkpoint is under way, without effect otherwise


@pytest.fixture
def extra_disk() -> None:
    H1.sh(f"truncate -s 8M {DISK}")


@pytest.fixture
def snapshots(fresh_world: None) -> Iterator[None]:
    """vm1 is another domain afterwards, its disk an overlay: it all goes."""
    yield
    restore(thorough=True)
    for host in HOSTS:
        host.sh("rm -f /var/lib/libvirt/images/vm1.s?*")


def virsh(line: str) -> tuple[int, str]:
    done = H1.run("virsh", *line.split(), check=False, timeout=60)
    return done.returncode, (done.stdout + done.stderr).strip()


def take_snapshot() -> None:
    code, said = virsh("snapshot-create-as vm1 s1 --disk-only --atomic --no-metadata")
    assert code == 0, said


def test_what_virsh_does_to_a_protected_guest(load: Load, extra_disk: None) -> None:
    """Fails if one of them ends the protection, or changes the guest in a way that its standby does not follow."""
    protect(H1)
    instance = H1.status()["instance"]
    load.flowing()
    for line in REFUSED:
        code, said = virsh(line)
        assert code != 0, f"virsh {line}: {said}"
    for line in HARMLESS:
        code, said = virsh(line)
        assert code == 0, f"virsh {line}: {said}"
    for line in EITHER:
        virsh(line)
    assert (H1.state(), H1.status()["instance"]) == ("protected", instance)
    load.goes_on()
    H1.kill_qemu()
    H2.await_state("active")
    load.goes_on()
    load.finished()


def test_an_external_snapshot_is_followed(snapshots: None, load: Load) -> None:
    """`snapshot-create-as --disk-only` slides its overlay under mcft's quorum: what the guest writes is on both sides still."""
    protect(H1)
    load.flowing()
    take_snapshot()
    load.goes_on()
    assert H1.state() == "protected"
    H1.kill_qemu()
    H2.await_state("active")
    load.goes_on()
    load.finished()


def test_unprotect_after_an_external_snapshot_keeps_the_overlay(snapshots: None, load: Load) -> None:
    """Fails if the undo puts the node back that libvirt no longer calls the disk: later writes would bypass the overlay."""
    protect(H1)
    load.flowing()
    take_snapshot()
    H1.mcft("unprotect", "vm1")
    load.goes_on()
    overlay = H1.sh("virsh domblklist vm1 | awk '$1 == \"vda\" { print $2 }'").strip()
    used = int(H1.sh(f"stat -c %b {overlay}"))
    until(lambda: int(H1.sh(f"stat -c %b {overlay}")) > used, 30, "the guest's writes go to the overlay")
    load.finished()
