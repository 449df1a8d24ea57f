"""Engine `mc` on real domains: libvirt, gates, agents are real; QEMU is the stand-in (`tests/mcqemu`: its first line says so).

A guest without a disk of the host's. This machine's kernel has no plug, and that QEMU no filter, so nothing is buffered here
(`--netbuffer none`): what leaves when is shown by the replays (`tests/replay`), who goes on and how fast by these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from mcworld import TLS_OFF, definition, without_tls
from world import H1, H2, HOSTS, REPO, configured, guest_answers, lab, link, now, protect, redefined, until

pytestmark = pytest.mark.skipif(not (REPO / "tests/mcqemu/emulator").exists(), reason="the stand-in is not in this tree")


@pytest.fixture
def mc_guest(fresh_world: None) -> Iterator[None]:
    """vm1 runs on h1 by the stand-in; afterwards by the lab's QEMU again."""
    with configured(H1, TLS_OFF), configured(H2, TLS_OFF):
        try:
            redefined(definition())
            yield
        finally:
            for host in HOSTS:
                if not host.on:
                    host.power_on()
            link("rep", "up")
            for host in HOSTS:
                host.sh("mcft forget vm1 --local --yes; virsh -q destroy vm1; virsh -q undefine vm1", check=False)
            lab("vm", "start", "h1")


def follow() -> None:
    protect(H1, "--engine", "mc", "--netbuffer", "none", "--delay", "100ms")


def test_protect_set_and_let_go(mc_guest: None) -> None:
    """Chosen by asking QEMU; its statistics shown; the delay changed; nothing left. Fails if `auto` took colo."""
    refused = H1.mcft("protect", "vm1", "--to", "host2", check=False)
    assert refused.returncode == 4, refused.stderr
    follow()
    shown = H1.status()
    assert (shown["engine"], shown["mc"]["transport"], shown["mc"]["monitor"]) == ("mc", "tcp", "libvirt")
    assert {"mc", "mc-net-disable", "mc-disk-disable"} <= set(shown["mc"]["capabilities"])
    assert {"xmit-time", "ram-copy-time", "downtime"} <= set(shown["mc"]["statistics"])
    H1.mcft("set", "vm1", "--delay", "400ms")
    until(lambda: 1.0 < H1.status()["checkpoints"]["rate_hz"] < 3.5, 15, "its checkpoints come at the new delay")
    H1.mcft("unprotect", "vm1")
    assert guest_answers() and H2.qemu_pid() is None
    assert {row["state"] for row in H1.qmp("query-migrate-capabilities") if row["capability"].startswith("mc")} == {False}


@pytest.mark.parametrize("loss", ["kill", "power"])
def test_take_over(mc_guest: None, loss: str, measure: Callable[[str, float], float]) -> None:
    """The primary's QEMU killed, or its host's power cut; protected back afterwards. Fails if the copy resumed by itself."""
    follow()
    until(lambda: H2.status()["survives_host_loss"], 10, "the standby is whole")
    at_s = H1.kill_qemu() if loss == "kill" else H1.power_off()
    until(guest_answers, 30, "the guest answers on host2")
    measure(f"mc: guest answers after {loss}", now() - at_s)
    assert H2.await_state("active")["guest_running"]
    if loss == "power":
        H1.power_on()
        without_tls(H1)
    protect(H2, "--engine", "mc", "--netbuffer", "none")
    H2.mcft("unprotect", "vm1")


def test_partition(mc_guest: None) -> None:
    """Both links cut: the standby breaks its deaf QEMU's socket and goes on; the other side loses when they are back.

    Fails without SOCK_DESTROY: that QEMU would wait for 70 s.
    """
    follow()
    began_s = now()
    link("rep", "down")
    link("lan:h1", "down")
    H2.await_state("active", timeout=15)
    assert now() - began_s < 20
    link("lan:h1", "up")
    link("rep", "up")
    H1.await_lost()
    assert H1.qemu_pid() is None and guest_answers()


def test_planned_switch(mc_guest: None) -> None:
    follow()
    H1.mcft("failover", "vm1")
    assert H2.await_state("active")["guest_running"] and H1.qemu_pid() is None
    assert guest_answers()


def test_a_power_off_is_no_take_over(mc_guest: None) -> None:
    follow()
    H1.sh("virsh -q destroy vm1")
    H1.await_state("stopped")
    until(lambda: H2.qemu_pid() is None, 20, "the copy is gone")
