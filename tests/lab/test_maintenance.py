"""A host is emptied on purpose: `mcft maintenance`, and the same when it shuts down."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from watching import Load
from world import H1, H2, HOSTS, Host, lab, other, protect, until


@pytest.fixture(autouse=True)
def no_maintenance_afterwards() -> Iterator[None]:
    yield
    for host in HOSTS:
        if host.on:
            host.mcft("maintenance", "off", check=False)


def in_maintenance(host: Host) -> bool:
    return bool((host.api("/v1/status") or {}).get("maintenance"))


def alarms(host: Host, after: int) -> list[str]:
    return [e["text"] for e in host.events() if e["id"] > after and (e["level"] == "alarm" or "muted" in e["text"])]


def newest(host: Host) -> int:
    return max((e["id"] for e in host.events()), default=0)


def test_what_leads_here_goes_to_its_standby(load: Load) -> None:
    """A planned switch, and nothing is protected to this host until `off`, over a reboot as well.

    Fails if clients notice, if host2 protects to host1 again, or if the reboot ends it.
    """
    protect(H1)
    load.flowing()
    done = H1.mcft("maintenance", "on")
    assert "vm1 runs on host2" in done.stdout, done
    H2.await_took_over()
    load.goes_on()
    assert H1.qemu_pid() is None
    H1.power_off()
    H1.power_on()
    until(lambda: in_maintenance(H1), 20, "host1 is still in maintenance after its reboot")
    assert "MAINTENANCE" in H1.mcft("status").stdout
    H2.await_committed()
    refused = H2.mcft("protect", "vm1", "--to", "host1", check=False)
    assert refused.returncode == 4 and "host1 is in maintenance" in refused.stderr, refused
    until(lambda: "host1: mcft maintenance off" in (H2.status()["next_step"] or ""), 5, "host2 knows")
    H1.mcft("maintenance", "off")
    assert not in_maintenance(H1)
    protect(H2)
    load.finished()


def test_what_follows_here_is_let_go_and_comes_back() -> None:
    """host1 goes on alone without an alarm; what runs there without a standby can't be emptied away; `off` and it is back.

    Fails if vm1 is muted on the way, if somebody has to type `solo` or `protect`, or if exit 0 claims that host1 is free.
    """
    protect(H1)
    before = newest(H1)
    done = H2.mcft("maintenance", "on")
    assert "vm1 goes on alone on host1" in done.stdout, done
    assert H1.state() == "solo" and H2.qemu_pid() is None
    assert alarms(H1, before) == []
    stuck = H1.mcft("maintenance", "on", check=False)
    assert stuck.returncode == 1 and "vm1" in stuck.stderr and "no standby" in stuck.stderr, stuck
    assert in_maintenance(H1) and H1.qemu_pid() is not None
    for host in HOSTS:
        assert host.mcft("maintenance", "off").returncode == 0
    H1.await_state("protected", timeout=60)


@pytest.mark.parametrize("goes", [H1, H2], ids=str)
def test_a_shutdown_is_maintenance_until_the_next_boot(goes: Host, load: Load) -> None:
    """`systemctl poweroff`: vm1 is handed over, or let go, before libvirtd, gates and network end; clients notice nothing.

    Fails without the unit's order (the gate goes first: a loss, not a switch), or if maintenance outlives the boot.
    """
    protect(H1)
    before = newest(other(goes))
    load.flowing()
    goes.run("systemctl", "poweroff", check=False)
    until(lambda: not goes.on, 60, f"{goes} has shut down")
    if goes is H1:
        H2.await_took_over()
        assert any("planned switch" in e["text"] for e in H2.events()), H2.events()
    else:
        assert H1.state() == "solo"
        assert alarms(H1, before) == []
    load.goes_on()
    lab("power", goes.key, "on")
    until(goes.answers, 20, f"{goes}: the agent answers")
    assert not in_maintenance(goes)
    load.goes_on()
    load.finished()
