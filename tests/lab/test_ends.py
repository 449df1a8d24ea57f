"""Ends and beginnings of a protected guest: rebooted, shut down, destroyed. Intended ends are no losses."""

from __future__ import annotations

import contextlib
import subprocess

import pytest
from watching import Observer
from world import H1, H2, guest, guest_answers, now, protect, until


def power_off() -> None:
    """The guest's own shutdown; its answer may stay behind, as the checkpoint that would let it go never comes."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        guest("poweroff", timeout=3)


def asked(verb: str) -> None:
    """libvirt refuses ("domain is not running") in the moments in which a checkpoint lets the guest stand."""
    until(lambda: H1.run("virsh", verb, "vm1", "--mode", "acpi", check=False).returncode == 0, 10, f"virsh {verb}")


def take_overs() -> int:
    return sum("runs here now" in e["text"] for e in H2.events())


def uptime_s() -> float:
    return float(guest("uptime", timeout=10).split()[0])


def ended() -> bool:
    """Nothing of vm1 runs anywhere, and the side that led it says so."""
    return "stopped" in (H1.state(), H2.state()) and H1.qemu_pid() is None and H2.qemu_pid() is None


def has_booted_again() -> bool:
    """It may answer once more before it goes down, and be gone when it is asked for its uptime."""
    try:
        return guest_answers() and uptime_s() < 30
    except (AssertionError, subprocess.TimeoutExpired):
        return False


@pytest.mark.parametrize("way", ["guest", "virsh reboot", "virsh reset"])
def test_a_reboot_is_protected_through(observer: Observer, way: str) -> None:
    """Protected before and after, and the standby follows the rebooted guest: it takes it over.

    `virsh reboot` by ACPI is the guest's own shutdown, upon which libvirt resets its QEMU. Fails if that is taken for an end.
    """
    observer.hears()
    before = take_overs()
    protect(H1)
    instance = H1.status()["instance"]
    if way == "virsh reset":
        H1.run("virsh", "reset", "vm1")
    elif way == "virsh reboot":
        # The lab's guest has no acpid: libvirt notes what it asked for, the guest then does what acpid would do.
        asked("reboot")
        power_off()
    else:
        guest("reboot")
    until(lambda: has_booted_again() or (way == "virsh reboot" and ended()), 60, "the guest has booted again")
    if way == "virsh reboot" and ended():
        # libvirt kills a QEMU whose fake reboot fails in a checkpoint: `docs/living-with-mcft.md` says so.
        H1.mcft("start", "vm1")
        until(has_booted_again, 60, "the guest was started again")
        return
    assert take_overs() == before
    if way == "virsh reboot":
        # The copy may run ahead into the guest's power-off: its libvirt ends it, and vm1 is protected again by itself.
        H1.await_state("protected", timeout=40)
    assert H1.state() == "protected"
    assert H1.status()["instance"] == instance or way == "virsh reboot"
    at_s = now()
    H1.kill_qemu()
    H2.await_took_over()
    observer.hears(20, after_s=at_s)
    assert uptime_s() > 0


@pytest.mark.parametrize("way", ["guest", "virsh shutdown", "virsh destroy"])
def test_an_intended_end_is_no_loss(way: str) -> None:
    """`stopped` on the primary, nothing runs on the standby; started again it is protected again. Fails at a take-over."""
    before = take_overs()
    protect(H1)
    if way == "virsh destroy":
        H1.run("virsh", "destroy", "vm1")
    else:
        if way == "virsh shutdown":
            asked("shutdown")
        power_off()
    H1.await_state("stopped")
    until(lambda: H2.qemu_pid() is None, 20, "the copy is gone")
    assert H1.qemu_pid() is None
    assert take_overs() == before
    # The hook refuses until the standby has said that it let go.
    until(lambda: H1.run("virsh", "start", "vm1", check=False).returncode == 0, 10, "vm1 may start again")
    H1.await_state("protected", timeout=90)
    until(guest_answers, 30, "the guest answers")
