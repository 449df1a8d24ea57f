"""The kernel's plug under a guest on KVM with vhost-net, where QEMU's own filter can't hold a packet: `make test-kvm`.

The processor under this KVM is emulated, so that a checkpoint takes a third of a second there, and T is some seconds.
"""

from __future__ import annotations

from test_takeover import pieces, protected_by_plug
from watching import Load
from world import H1, H2, until


def test_a_power_loss_under_kvm_and_vhost(load: Load) -> None:
    """The outside observer, an open connection and acknowledged writes.

    Fails if the plug misses what vhost's kernel thread sends, or the standby's packets leave before its take-over.
    """
    opened = H1.sh("ls -l /proc/$(pidof qemu-system-x86_64)/fd")
    assert "/dev/vhost-net" in opened and "kvm-vm" in opened, opened
    protected_by_plug(H1)
    load.goes_on(8)
    held = H1.status()["network"]
    at_s = H1.power_off()
    H2.await_took_over(timeout=30)
    load.goes_on()
    print(f"power loss under KVM: the client's gap {load.observer.gap(at_s, 120):.2f} s; before: {held}")
    load.unhurt()
    load.finished()
    H1.power_on()
    H1.await_lost(40)
    until(lambda: "mcft-" not in pieces(H1), 20, "no piece of the lost guest's buffer is left")
