"""mcft's own processes and libvirtd die: the guest's traffic, the checkpoints and the protection do not notice.

Each test watches with all three observers. `QUIET_S` without a beacon is what an ordinary epoch never needs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from watching import Load
from world import GATE, H1, H2, HOSTS, LIBVIRTD, Host, now, pause, protect, until

QUIET_S = 0.8  # an epoch at 100 ms and its pause, on a machine whose two cores emulate two guests
WATCH_S = 2.0
Measure = Callable[[str, float], float]
ON_EITHER_SIDE = pytest.mark.parametrize("host", HOSTS, ids=("primary", "standby"))
AGENT = "mcft-agent"


def generation() -> int:
    return int(H1.status()["generation"])


def still_protected(before: int) -> None:
    """No take-over, no solo in between, and checkpoints go on."""
    for host in HOSTS:
        host.await_state("protected", timeout=10)
    assert generation() == before, "the generation changed: somebody took over or went solo"
    acknowledged = H1.status()["checkpoints"]["acknowledged"]
    until(lambda: H1.status()["checkpoints"]["acknowledged"] > acknowledged, 5, "checkpoints go on")
    until(lambda: H1.status()["survives_host_loss"], 5, "vm1 survives a host's loss")


def back(host: Host, unit: str, old: int) -> None:
    until(lambda: host.main_pid(unit) not in (0, old), 15, f"{host}: systemd has restarted {unit}")


@ON_EITHER_SIDE
@pytest.mark.parametrize("how", ["kill", "restart"])
def test_agent(host: Host, how: str, load: Load, measure: Measure) -> None:
    """Agent down = packets flow and checkpoints go on.

    Fails if the agent's end takes its gate along, if its start closes what the gate holds, or if a standby's
    agent that starts again voids what is armed.
    """
    protect(H1)
    before = generation()
    load.flowing()
    old = host.main_pid(AGENT)
    at_s = now()
    if how == "kill":
        host.kill_unit(AGENT)
    else:
        host.run("systemctl", "restart", AGENT)
    back(host, AGENT, old)
    until(host.answers, 15, f"{host}: the agent answers")
    pause(WATCH_S)
    still_protected(before)
    side = "primary" if host is H1 else "standby"
    gap = measure(f"beacon's gap, agent of the {side}: {how}", load.observer.gap(at_s))
    assert gap < QUIET_S, f"{gap:.3f} s without a beacon though only an agent was away"
    load.finished()


@ON_EITHER_SIDE
def test_failure_while_the_agent_is_away(host: Host, load: Load, measure: Measure) -> None:
    """The gate closes, or claims, by itself; the decision waits for its agent, and is then made.

    Fails if a verdict that no agent heard is forgotten, or if the starting agent gives up what its gate has claimed.
    """
    protect(H1)
    load.flowing()
    host.kill_unit(AGENT)
    at_s = H1.kill_qemu()
    H2.await_took_over(timeout=20)
    load.goes_on()
    measure(f"client's gap, agent of the {'primary' if host is H1 else 'standby'} away", load.observer.gap(at_s))
    H1.await_lost(20)
    load.finished()


@ON_EITHER_SIDE
def test_gate(host: Host, load: Load, measure: Measure) -> None:
    """A dead gate leaves everything held; systemd's new one goes on from the state file.

    Fails if the buffer opens when its owner dies, if a restarted one releases an older stream's epochs, or stays muted.
    """
    protect(H1)
    before = generation()
    load.flowing()
    for _time in range(3):
        old = host.main_pid(GATE)
        at_s = host.kill_unit(GATE)
        back(host, GATE, old)
        load.goes_on()
        measure(
            f"beacon's gap, gate of the {'primary' if host is H1 else 'standby'} killed", load.observer.gap(at_s, 5)
        )
    still_protected(before)
    load.unhurt()
    load.finished()


def test_take_over_after_both_gates_died(load: Load) -> None:
    """Restarted gates are as good as the first: a failure afterwards still ends in a take-over without a loss.

    Fails if a restarted standby's gate never counts as armed, or if the primary's released without a whole checkpoint.
    """
    protect(H1)
    load.flowing()
    for host in HOSTS:
        old = host.main_pid(GATE)
        host.kill_unit(GATE)
        back(host, GATE, old)
    load.goes_on()
    H1.kill_qemu()
    H2.await_took_over(timeout=20)
    load.goes_on()
    load.finished()


def test_failure_while_the_standbys_gate_is_away(load: Load) -> None:
    """The primary dies while nobody on the standby listens to keepalives: still a take-over, once the gate is back.

    Fails if a primary whose QEMU is dead asks the standby to give up, or if the standby does so: then nobody runs.
    """
    protect(H1)
    load.flowing()
    H2.kill_unit(GATE)
    H1.kill_qemu()
    H2.await_took_over(timeout=20)
    load.goes_on()
    H1.await_lost(20)
    load.finished()


@ON_EITHER_SIDE
@pytest.mark.parametrize("how", ["kill", "restart"])
def test_libvirtd(host: Host, how: str, load: Load, measure: Measure) -> None:
    """libvirtd down = nothing is noticed, by the guest or by the protection.

    Fails if the data path goes through libvirt, or if a lost connection to it is taken for the end of the domain.
    """
    protect(H1)
    before = generation()
    load.flowing()
    old = host.main_pid(LIBVIRTD)
    at_s = now()
    if how == "kill":
        host.kill_unit(LIBVIRTD)
    else:
        host.run("systemctl", "restart", LIBVIRTD)
    back(host, LIBVIRTD, old)
    until(lambda: "vm1" in host.sh("virsh -q list", check=False), 15, f"{host}: {LIBVIRTD} knows vm1 again")
    pause(WATCH_S)
    still_protected(before)
    side = "primary" if host is H1 else "standby"
    gap = measure(f"beacon's gap, libvirtd of the {side}: {how}", load.observer.gap(at_s))
    assert gap < QUIET_S, f"{gap:.3f} s without a beacon though only libvirtd was away"
    load.finished()


@ON_EITHER_SIDE
def test_failure_without_libvirtd(host: Host, load: Load) -> None:
    """A take-over needs no libvirtd until the guest talks again.

    Fails if the resume or the opening of the NICs waits for libvirt.
    """
    protect(H1)
    load.flowing()
    host.kill_unit(LIBVIRTD)
    H1.kill_qemu()
    H2.await_took_over(timeout=20)
    load.goes_on()
    load.finished()


def test_standbys_qemu_killed(load: Load, measure: Measure) -> None:
    """The standby's copy dies: the primary goes on alone, soon, and protects again by itself.

    Fails if the primary waits for a checkpoint that nobody loads, or if it opens before `given-up`.
    """
    protect(H1)
    load.flowing()
    pause(0.5)
    at_s = H2.kill_qemu()
    H1.await_state("solo", timeout=10)
    load.goes_on()
    gap = measure("beacon's gap, the standby's QEMU killed (target 200 ms)", load.observer.gap(at_s))
    assert gap < 1.0, f"{gap:.3f} s without a beacon"
    H1.await_state("protected", timeout=60)
    measure("until protected again, the standby's QEMU killed", now() - at_s)
    load.goes_on()
    load.finished()
