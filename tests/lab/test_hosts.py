"""Hosts come back, and hosts change places on purpose."""

from __future__ import annotations

from collections.abc import Callable

from watching import Load, settled, verified
from world import GATE, H1, H2, LIBVIRTD, NOT_AGAIN, configured, guest, guest_answers, lab, now, other, pause, protect, until

Measure = Callable[[str, float], float]
# (Without its CPU, which libvirt 7.0 does not know.)
DEFINE = "sed '/<cpu/d' /opt/mcft/lab/vm1.xml > /run/backup.xml && virsh -q define /run/backup.xml"


def test_a_returning_primary_starts_no_second_instance(load: Load) -> None:
    """The old primary boots again: it knows that it lost, and neither autostart nor a hand can start its stale copy.

    Fails if the hook lets a stale instance through, or if autostart stays on while protected.
    """
    with configured(H2, NOT_AGAIN):  # (a boot within 3 s is no gap: h1 would be protected to at once)
        H1.sh("virsh -q autostart vm1")
        protect(H1)
        assert "disable" in H1.sh("virsh dominfo vm1 | grep Autostart"), "autostart must be off while protected"
        load.flowing()
        H1.power_off()
        H2.await_took_over(timeout=15)
        load.goes_on()
        H1.power_on()
        H1.await_lost(30)
        text = H1.mcft("status", "vm1").stdout
        assert "LOST" in text and "host2" in text, text
        assert H1.qemu_pid() is None
        # As if an operator had the definition from a backup. The image is still there. (mcft takes away at a boot what it
        # finds defined.)
        until(lambda: H1.run("virsh", "dominfo", "vm1", check=False).returncode != 0, 10, "the boot's taking away is done")
        H1.sh(DEFINE)
        refused = H1.run("virsh", "start", "vm1", check=False)
        assert refused.returncode != 0 and "hook" in refused.stderr.lower(), refused
        H1.sh("virsh -q autostart vm1")
        H1.power_off()
        H1.power_on()
        H1.await_lost(30)
        pause(1.0)
        assert H1.qemu_pid() is None, "autostart started the stale copy"
        # And its new owner has it, with autostart as it was.
        assert "enable" in H2.sh("virsh dominfo vm1 | grep Autostart")
        load.goes_on()
        load.finished()


def test_a_host_that_was_frozen(load: Load) -> None:
    """Every process of the primary's host stands still, and goes on after the take-over: nobody hears a word of it any more.

    Fails if what lay in QEMU's socket just then, or in the gate, is said after the lease's end. (By chance only: once in 20 or so
    without the kernel's look at it, `tests/lab/test_taplease.py`. That it looks here is asserted.)
    """
    primary = H1
    for _ in range(3):
        protect(primary)
        load.flowing()
        assert "bpf_link" in primary.sh(f"ls -l /proc/{primary.main_pid(GATE)}/fd")
        standby = other(primary)
        primary.freeze(True)
        try:
            standby.await_took_over(timeout=15)
            load.goes_on()
        finally:
            primary.freeze(False)
        primary.await_lost(30)
        load.goes_on()
        load.unhurt()
        primary = standby
    protect(primary)
    load.finished()


def test_planned_switch_there_and_back(load: Load, measure: Measure) -> None:
    """`mcft failover` under load, both ways: nothing visible is lost, and every block of the disk is as written.

    Fails if the last checkpoint is not the guest's last word, or if the old primary's guest goes on after it resigned.
    """
    assert guest("writer", "start", "5").startswith("writer run=1")
    assert guest("dirty", "2") == "ok"
    protect(H1)
    load.flowing()
    for source, target in ((H1, H2), (H2, H1)):
        old, at_s = source.qemu_pid(), now()
        done = source.mcft("failover", "vm1")
        assert target.name in done.stdout, done
        target.await_took_over(timeout=10)
        load.goes_on()
        measure("client's gap, planned switch", load.observer.gap(at_s))
        source.await_lost(20)
        assert source.qemu_pid() != old  # (it may be the new copy's: protected back by itself)
        load.unhurt()
        protect(target)
    report = load.finished()
    measure("beacons not heard in two planned switches (1 ms each)", report["missing"] / 1000)
    assert guest("dirty", "0") == "ok"
    stopped = guest("writer", "stop", timeout=40)
    assert " bad=0 err=0" in stopped, stopped
    assert "bad=0" in guest("writer", "check", timeout=40)


def test_switch_is_refused_without_a_standby() -> None:
    """Fails if `failover` of an unprotected or unknown domain does something else than say so."""
    refused = H1.mcft("failover", "vm1", check=False)
    assert refused.returncode == 3, refused
    until(lambda: lab("guest", "say", "ping").stdout.strip() == "pong", 5, "the guest answers")


def test_overlays_of_a_cut_off_take_over_are_committed_offline(load: Load) -> None:
    """The host that took over loses its guest before its overlays are committed: the disk alone is wrong, and does not start.

    Fails if the hook lets it start, or if an acknowledged write is missing once the agent has dealt with the chain: QEMU
    had committed it long ago here, and committing it once more puts old blocks over newer ones (912 writes, 32 lost).
    """
    protect(H1)
    load.flowing()
    H2.sh(f"systemctl kill --kill-whom=main --signal=STOP {LIBVIRTD}")  # the agent can't learn that QEMU has committed
    try:
        H1.kill_qemu()
        H2.await_took_over()
        load.goes_on()
        load.unhurt()
        load.writer.ask("finish")
        settled(load.writer)
        assert H2.sh("cat /var/lib/mcft/labels/*/vda").startswith("chain(")
        H2.sh("systemctl stop --no-block mcft-agent; systemctl kill --signal=KILL mcft-agent; systemctl stop mcft-agent")
        H2.kill_qemu()
    finally:  # or no later test could speak to this host
        H2.sh(f"systemctl kill --signal=CONT {LIBVIRTD}")

    def defined() -> bool:
        H2.sh(DEFINE, check=False)
        return H2.run("virsh", "domstate", "vm1", check=False).stdout.strip() == "shut off"

    until(defined, 20, "h2: libvirt knows that vm1 is gone")
    refused = H2.run("virsh", "start", "vm1", check=False)
    assert refused.returncode != 0 and "hook" in refused.stderr.lower(), refused
    H2.sh("systemctl start mcft-agent")
    until(lambda: H2.sh("cat /var/lib/mcft/labels/*/vda").startswith("truth "), 30, "h2: the chain is committed offline")
    assert "mcft-" not in H2.sh("ls /var/lib/libvirt/images")
    H2.sh("virsh -q start vm1")
    until(guest_answers, 60, "the guest answers from its disk alone")
    assert guest("fsck").startswith("rc=0"), guest("fsck")
    assert verified(load.writer) > 0
