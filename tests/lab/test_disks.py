"""The standby's disk, read from outside, against what the guest itself reads: block for block."""

from __future__ import annotations

import random

from world import H1, H2, IMAGE, Host, guest, pause, protect, until


def image_sum(host: Host) -> str:
    return host.sh(f"sha256sum {IMAGE}").split()[0]


def quiet_sum() -> str:
    """The disk as the guest reads it, once the guest's own file system has nothing left to write."""
    sums = [guest("sum", "vda", timeout=60)]

    def settled() -> bool:
        sums.append(guest("sum", "vda", timeout=60))
        return sums[-1] == sums[-2]

    until(settled, 30, "two sums of the guest's disk are equal")
    return sums[-1]


def stopped_writer() -> None:
    """The guest's disk writer ends; everything it wrote is as it remembers."""
    stopped = guest("writer", "stop", timeout=40)
    assert " bad=0 err=0" in stopped, stopped
    check = guest("writer", "check", timeout=40)
    assert "good=1024 bad=0" in check, check


def test_disk_is_whole_after_a_clean_end(moments: random.Random) -> None:
    """The guest writes during the whole set-up and under protection; after a clean end both disks are equal.

    Fails if a write falls between the copy and the replication, or if a replicated write is lost or goes elsewhere.
    """
    assert guest("writer", "start", "1").startswith("writer run=1")
    protect(H1)
    pause(moments.uniform(1.0, 3.0))
    stopped_writer()
    seen = quiet_sum()
    # `solo` ends the standby but leaves its disk there; `unprotect` would remove it.
    H1.mcft("solo", "vm1")
    until(lambda: H2.qemu_pid() is None, 10, "h2: no QEMU of vm1")
    assert image_sum(H2) == seen, "the standby's disk is not what the guest reads"
    assert image_sum(H1) == guest("sum", "vda", timeout=60)


def test_disk_is_whole_after_a_take_over(moments: random.Random) -> None:
    """The writer goes on through a take-over; the guest finds every block as it remembers, and the file outside agrees.

    Fails if the standby's disk is ahead of or behind its memory, or if committing the overlays loses or adds a block.
    """
    protect(H1)
    assert guest("writer", "start", "1").startswith("writer run=1")
    pause(moments.uniform(0.5, 2.0))
    H1.kill_qemu()
    H2.await_took_over(timeout=15)
    pause(moments.uniform(0.2, 1.0))
    stopped_writer()
    H2.await_committed()
    assert quiet_sum() == image_sum(H2)
    # And further: the other way, with a disk on h1 that the first failure left stale.
    protect(H2)
    assert guest("writer", "start", "1").startswith("writer run=1")
    pause(moments.uniform(0.5, 2.0))
    H2.kill_qemu()
    H1.await_took_over(timeout=15)
    stopped_writer()
    assert H1.sh("ls /var/lib/libvirt/images").split()[0] == "vm1.img"
