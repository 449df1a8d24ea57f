"""The files under the standby's copy: space, holes, owner and mode, libvirt's storage pools; the firmware's variables."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator

import pytest
from conftest import EVIDENCE
from test_check import check, codes
from watching import Load
from world import H1, H2, HOSTS, IMAGE, NOT_AGAIN, Host, configured, guest_answers, protect, redefined, until

FOLDER = "/var/lib/libvirt/images"
POOL = f"{FOLDER}/pool"
THERE = f"{POOL}/vm1.img"
WHOLE = 64 << 20
GRANULE = 64 << 10  # `drive-mirror` copies this much whole where the guest writes 4 KiB while it is copied
VARS = "/var/lib/libvirt/qemu/nvram/vm1_VARS.fd"


def taken(host: Host, path: str) -> int:
    """Bytes that a file takes on its file system."""
    return int(host.sh(f"stat -c %b {path}")) * 512


@pytest.fixture
def pool(fresh_world: None) -> Iterator[None]:
    """A storage pool `lab` on h2; vm1's file on h1 with a mode of its own."""
    H2.sh(f"mkdir -p {POOL} && virsh -q pool-create-as lab dir --target {POOL}")
    H1.sh(f"chmod 640 {IMAGE}")
    try:
        yield
    finally:
        if H1.status():
            H1.mcft("unprotect", "vm1", check=False)
        H2.sh(f"virsh -q pool-destroy lab; rm -rf {POOL}", check=False)
        H1.sh(f"chmod 644 {IMAGE}")


def test_a_copy_in_a_storage_pool(pool: None) -> None:
    """libvirt knows the copy as a volume of the right size; it is as sparse as the primary's, with its owner and mode.

    Fails if the pool is not refreshed after making or removing the file, if the copy fills the holes, or if what libvirt
    gives back at the end is not what it was given (`trusted.libvirt.security.dac`: the owner it remembers).
    """
    protect(H1, "--disk", f"vda={THERE}")
    assert H2.sh("virsh -q vol-list lab").split() == ["vm1.img", THERE]
    assert "64.00 MiB" in H2.sh("virsh vol-info --pool lab vm1.img | grep Capacity")
    assert taken(H2, THERE) <= taken(H1, IMAGE) + 16 * GRANULE < WHOLE // 2
    assert H2.sh(f"stat -c '%a %U' {THERE}").split() == H1.sh(f"stat -c '%a %U' {IMAGE}").split() == ["640", "libvirt-qemu"]
    remembered = f"python3 -c \"import os; print(os.getxattr('{THERE}', 'trusted.libvirt.security.dac'))\""
    assert "+0:+0" in H2.sh(remembered)
    H1.mcft("unprotect", "vm1")
    assert not H2.sh("virsh -q vol-list lab").split() and not H2.sh(f"ls {POOL}").split()


def test_what_was_asked_outlives_a_take_over(pool: None) -> None:
    """Taken over at another path, protected back by itself: onto the old primary's own file; the delay as it was set.

    Fails if the new primary asks for a copy at its own path there (`Body.paths_back`), or the standby is not told of the delay.
    """
    protect(H1, "--disk", f"vda={THERE}")
    H1.mcft("set", "vm1", "--delay", "150ms")
    H1.kill_qemu()
    H2.await_took_over()
    assert H2.await_state("protected", timeout=60)["delay_ms"] == 150
    assert IMAGE in H1.sh("virsh -q domblklist vm1") and not H1.sh(f"ls {POOL} 2>/dev/null || :").strip()
    H2.mcft("failover", "vm1")
    H1.await_state("protected", timeout=60)
    assert THERE in H2.sh("virsh -q domblklist vm1")


@pytest.mark.skipif(not EVIDENCE, reason="two restarts of an agent")
def test_space_taken_beforehand(pool: None) -> None:
    """Fails if `reserve = "full"` leaves the copy thin, or if the copying gives back what was reserved."""
    with configured(H2, "printf '\\n[disks]\\nreserve = \"full\"\\n' >> $file"):
        protect(H1, "--disk", f"vda={THERE}")
        assert taken(H2, THERE) >= WHOLE
        H1.mcft("unprotect", "vm1")


def test_too_little_space_is_refused_by_both(pool: None) -> None:
    """Fails if only `check` counts, if `protect` says it in other words, or if something is left by the refusal."""
    H2.sh(f"mkdir {POOL}/small && mount -t tmpfs -o size=32m tmpfs {POOL}/small")
    try:
        where = ("--disk", f"vda={POOL}/small/vm1.img")
        code, answer = check(*where)
        assert code == 4 and codes(answer, "refusal") == {"no-room"}
        done = H1.mcft("protect", "vm1", "--to", "host2", *where, check=False)
        said = next(f for f in answer["findings"] if f["code"] == "no-room")
        assert done.returncode == 4 and said["message"] in done.stderr, done.stderr
        assert not H2.sh(f"ls -A {POOL}/small").split()
    finally:
        H2.sh(f"umount {POOL}/small")


# ---- UEFI ----


@pytest.fixture
def uefi(fresh_world: None) -> Iterator[None]:
    """vm1 booted by OVMF with variables of its own; afterwards vm1 as it was."""
    plain = H1.run("virsh", "dumpxml", "vm1", "--inactive").stdout
    definition = ET.fromstring(plain)
    firmware = definition.find("os")
    assert firmware is not None
    loader = ET.SubElement(firmware, "loader", readonly="yes", type="pflash")
    loader.text = "/usr/share/OVMF/OVMF_CODE_4M.fd"
    ET.SubElement(firmware, "nvram", template="/usr/share/OVMF/OVMF_VARS_4M.fd").text = VARS
    try:
        redefined(ET.tostring(definition, encoding="unicode"), boot_s=120)
        yield
    finally:
        for host in HOSTS:
            if host.status():
                host.mcft("unprotect", "vm1", check=False)
        for host in HOSTS:
            host.sh("virsh -q destroy vm1; virsh -q undefine vm1 --nvram; mcft forget vm1 --local --yes", check=False)
            host.sh(f"rm -f {VARS} {FOLDER}/vm1.img*")
        H1.sh(f"truncate -s 64M {IMAGE}")
        redefined(plain, boot_s=120)


def variables(host: Host) -> list[str]:
    """The sum of the file of the firmware's variables."""
    return host.sh(f"sha256sum {VARS}").split()[:1]


@pytest.mark.skipif(not EVIDENCE, reason="the firmware is slow without KVM")
def test_a_guest_with_uefi(uefi: None, load: Load) -> None:
    """Its variables come along, it goes on there, and boots there by them; `unprotect` leaves none where none were.

    Fails if the copy starts on the template's variables, or if its file stays after an undo.
    """
    assert variables(H1) != H1.sh("sha256sum /usr/share/OVMF/OVMF_VARS_4M.fd").split()[:1], "the firmware wrote nothing"
    _, answer = check()
    assert "unbuffered-nvram" in codes(answer, "warning") and "files-there" in codes(answer, "ok")
    protect(H1, timeout=90)
    assert variables(H2) == variables(H1)
    H1.mcft("unprotect", "vm1")
    assert not H2.sh(f"ls {VARS} || :").split()
    with configured(H2, NOT_AGAIN):
        protect(H1, timeout=90)
        load.flowing()
        # QEMU has them in memory, and writes the file anew with the next checkpoint that it loads.
        H2.sh(f"printf spoilt | dd of={VARS} conv=notrunc bs=1 seek=300000")
        until(lambda: variables(H2) == variables(H1), 10, "the variables on h2 are those of the guest again")
        H1.kill_qemu()
        H2.await_took_over(timeout=20)
        load.goes_on()
        assert variables(H2) == variables(H1)
        H2.await_committed()
        load.finished()
        H2.mcft("unprotect", "vm1")
        H2.run("virsh", "reset", "vm1")
        until(lambda: not guest_answers(), 10, "the guest goes down")
        until(guest_answers, 120, "the guest boots by its firmware on h2")
