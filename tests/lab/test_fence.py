"""Arbiter `fence`: the other host verified off. The lab's fence agent pulls a host's plug (`arbiters.Bmc`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from arbiters import Bmc, fence_arbiter
from watching import Load
from world import H1, H2, apart, now, protect, together, until

Measure = Callable[[str, float], float]


@pytest.fixture(scope="module")
def fencing(the_lab: None) -> Iterator[Bmc]:
    with fence_arbiter() as made:
        yield made


@pytest.fixture
def bmc(fencing: Bmc, fresh_world: None) -> Bmc:
    fencing.mode = "good"
    fencing.log.clear()
    return fencing


def test_loss_of_the_standbys_host(bmc: Bmc, load: Load, measure: Measure) -> None:
    """A standby's host that is silent is switched off, and verified off; then the primary goes on. Back: protected again.

    Fails if the primary stays muted, or opens before `status` has said off.
    """
    protect(H1)
    load.flowing()
    at_s = H2.power_off()
    H1.await_state("solo", timeout=15)
    assert bmc.log[-2:] == ["off h2", "status h2"], bmc.log
    load.goes_on()
    measure("beacon's gap, loss of the standby's host, fence", load.observer.gap(at_s))
    H2.power_on()
    H1.await_state("protected", timeout=60)
    load.finished()


def test_loss_of_the_primarys_host(bmc: Bmc, load: Load, measure: Measure) -> None:
    """The standby waits its delay, switches the primary's host off, and takes over. Back: the standby.

    Fails if the standby takes without having asked for the other host's power.
    """
    protect(H1)
    load.flowing()
    at_s = H1.power_off()
    H2.await_took_over(timeout=20)
    assert bmc.log[-2:] == ["off h1", "status h1"], bmc.log
    load.goes_on()
    gap = measure("beacon's gap, loss of the primary's host, fence (delay 2 s)", load.observer.gap(at_s))
    assert gap > 2.0, "the standby did not wait"
    H1.power_on()
    H2.await_state("protected", timeout=60)
    assert H1.status()["role"] == "standby"
    load.finished()


def test_all_links_between_two_live_hosts_cut(bmc: Bmc, load: Load) -> None:
    """Both see the other silent, both are alive: the primary shoots first, and only one host is left.

    Fails if both shoot, or the wrong one first.
    """
    protect(H1)
    load.flowing()
    at_s = now()
    apart()
    H1.await_state("solo", timeout=20)
    until(lambda: not H2.on, 5, "h2 is off")
    assert bmc.offs() == ["off h2"], bmc.log
    together()
    load.goes_on()
    load.observer.gap(at_s)
    load.finished()


@pytest.mark.parametrize("mode", ["lies", "vague"])
def test_unverified_is_not_fenced(mode: str, bmc: Bmc, load: Load) -> None:
    """An `off` that says ok and does nothing, or a `status` that can't tell: nobody goes on. Once it works, one does: whose
    next attempt comes first.

    Fails if an `off` is believed.
    """
    protect(H1)
    load.flowing()
    bmc.mode = mode  # type: ignore[assignment]
    apart()
    H1.await_state("muted", timeout=15)
    until(lambda: sum(line == "status h2" for line in bmc.log) >= 3, 20, "the primary asked for h2's power three times")
    assert H1.state() == "muted" and H2.on and H2.state() != "active", (H1.status(), H2.status())
    bmc.mode = "good"
    until(lambda: not (H1.on and H2.on), 30, "one host is off")
    winner = H1 if H1.on else H2
    until(lambda: winner.state() in ("solo", "active"), 20, f"{winner} goes on")
    together()
    load.goes_on()
    load.finished()


def test_a_dead_qemu_is_no_reason_to_shoot(bmc: Bmc, load: Load) -> None:
    """The primary's QEMU dies, its host lives and says so: taken over at once, and nobody is switched off.

    Fails if a host with other guests is shot for one dead QEMU.
    """
    protect(H1)
    load.flowing()
    H1.kill_qemu()
    H2.await_took_over(timeout=15)
    load.goes_on()
    assert not bmc.offs(), bmc.log
    H2.await_state("protected", timeout=60)
    load.finished()


def test_a_silent_fence_device_shows(bmc: Bmc) -> None:
    """The agent's own check: `status` shows it, `status --check` fails with a line.

    Fails if a fence device that is away is found out only when a host is lost.
    """
    protect(H1)
    assert H1.status()["arbiter"]["reachable"]
    until(lambda: H1.mcft("status", "--check", check=False).returncode == 0, 10, "all is well by h1's and by h2's word")
    H1.sh("mv /usr/local/sbin/fence_lab /usr/local/sbin/fence_away")
    try:
        H1.run("systemctl", "restart", "mcft-agent")
        until(H1.answers, 20, "h1: the agent answers")
        until(lambda: H1.status().get("arbiter", {}).get("reason"), 20, "h1: the arbiter's trouble shows")
        done = H1.mcft("status", "--check", check=False)
        assert done.returncode == 1 and "its arbiter (fence) can't decide: the fence agent" in done.stdout, done
    finally:
        H1.sh("mv /usr/local/sbin/fence_away /usr/local/sbin/fence_lab; systemctl restart mcft-agent")
        until(H1.answers, 20, "h1: the agent answers")
