"""Arbiter `etcd`: both losses without a hand; and an etcd that is away, slow, without quorum, wiped, or has gone back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from arbiters import Etcd, etcd_arbiter
from watching import Load
from world import H1, H2, HOSTS, NOT_AGAIN, Host, apart, configured, guest_answers, now, protect, together, until

Measure = Callable[[str, float], float]


@pytest.fixture(scope="module")
def arbitrating(the_lab: None) -> Iterator[Etcd]:
    with etcd_arbiter() as made:
        yield made


@pytest.fixture
def etcd(arbitrating: Etcd, fresh_world: None) -> Etcd:
    if not arbitrating.healthy():
        arbitrating.stop()
        arbitrating.start()
    return arbitrating


def trouble(word: str) -> None:
    """Until both hosts say that the arbiter can't decide, and why."""
    for host in (H1, H2):
        until(lambda host=host: _said(host, word), 15, f"{host}: its arbiter can't decide: {word}")  # type: ignore[misc]
    done = H1.mcft("status", "--check", check=False)
    assert done.returncode == 1 and "its arbiter (etcd) can't decide" in done.stdout, done


def _said(host: Host, word: str) -> bool:
    arbiter = host.status()["arbiter"]
    return not arbiter["reachable"] and word in (arbiter["reason"] or "")


def asked_since(host: Host, at_s: float) -> bool:
    """Whether etcd has answered this host since then."""
    age_ms = host.status()["arbiter"]["last_ok_age_ms"]
    return age_ms is not None and now() - age_ms / 1000 > at_s + 0.1


def test_loss_of_the_standbys_host(etcd: Etcd, load: Load, measure: Measure) -> None:
    """The standby's host dies: the primary goes on alone; it returns: protected again. Nobody types anything.

    Fails if the primary never claims, or claims and does not open; or if what returns is not taken as a standby.
    """
    protect(H1)
    assert H1.status()["arbiter"]["kind"] == "etcd"
    load.flowing()
    at_s = H2.power_off()
    H1.await_state("solo", timeout=10)
    load.goes_on()
    gap = measure("beacon's gap, loss of the standby's host, etcd (target 1 s)", load.observer.gap(at_s))
    assert gap < 3.0, f"{gap:.3f} s without a beacon"
    H2.power_on()
    H1.await_state("protected", timeout=60)
    load.goes_on()
    load.finished()


def test_loss_of_the_primarys_host(etcd: Etcd, load: Load, measure: Measure) -> None:
    """The primary's host dies: take-over; it returns and becomes the standby. Nobody types anything.

    Fails if the standby takes without etcd's consent being asked for (no claim in the key), or never gets it; if the new primary
    protects back by another arbiter than the one that was typed.
    """
    protect(H1)
    load.flowing()
    at_s = H1.power_off()
    H2.await_took_over(timeout=15)
    load.goes_on()
    gap = measure("beacon's gap, loss of the primary's host, etcd (target 0.6 s)", load.observer.gap(at_s))
    assert gap < 3.0, f"{gap:.3f} s without a beacon"
    assert '"owner":"standby"' in etcd.ctl("get --prefix /mcft --print-value-only")
    H1.power_on()
    H2.await_state("protected", timeout=60)
    assert H1.status()["role"] == "standby" and H2.status()["arbiter"]["kind"] == "etcd"
    load.goes_on()
    load.finished()


def test_of_two_hosts_that_lost_each_other_one_goes_on(etcd: Etcd, load: Load) -> None:
    """Both live, both reach etcd, neither the other: exactly one wins, whoever it is, and the other gives way.

    Fails if the key is written instead of compared: then both win.
    """
    protect(H1)
    load.flowing()
    apart()
    until(lambda: {H1.state(), H2.state()} & {"solo", "active"}, 20, "one of them goes on")
    solo, active = H1.state() == "solo", H2.state() == "active"
    assert solo != active, (H1.status(), H2.status())
    together()
    load.goes_on()
    (H2 if solo else H1).await_lost()
    load.finished()


def test_planned_switch(etcd: Etcd, load: Load) -> None:
    """The standby makes etcd's transaction; nobody opposes it. Fails if a switch forgets the arbiter, or waits for silence."""
    with configured(H2, NOT_AGAIN):
        protect(H1)
        load.flowing()
        assert "host2" in H1.mcft("failover", "vm1").stdout
        H2.await_state("active", timeout=10)
        assert '"owner":"standby"' in etcd.ctl("get --prefix /mcft --print-value-only")
        load.goes_on()
        load.finished()


def test_away_when_it_is_needed(etcd: Etcd, load: Load) -> None:
    """etcd is killed: the guest notices nothing, `status --check` does. A loss just then waits for its restart.

    Fails if a dead etcd is shown as well, or if the primary goes on without it.
    """
    protect(H1)
    load.flowing()
    etcd.kill()
    trouble("")
    assert H1.state() == "protected"
    H2.power_off()
    H1.await_state("muted", timeout=10)
    until(lambda: "can't be reached" in H1.status()["reason"], 10, lambda: f"h1 says why: {H1.status()['reason']}")
    assert H1.state() == "muted"
    etcd.start()
    H1.await_state("solo", timeout=15)
    load.goes_on()
    load.finished()


def test_answering_after_the_timeout(etcd: Etcd, load: Load) -> None:
    """etcd stands still: claims are sent and not answered. Then it carries all of them out: one claim, and it is ours.

    Fails if a claim whose answer came too late is taken for refused (the guest stays muted), or is made under another id.
    """
    protect(H1)
    load.flowing()
    etcd.signal("STOP")
    H2.power_off()
    H1.await_state("muted", timeout=10)
    until(lambda: "has not answered" in H1.status()["reason"], 15, lambda: f"h1 says why: {H1.status()['reason']}")
    etcd.signal("CONT")
    H1.await_state("solo", timeout=20)
    load.goes_on()
    load.finished()


def test_the_agent_dies_with_a_claim_under_way(etcd: Etcd, load: Load) -> None:
    """SIGKILL of the primary's agent once its claim was sent and before its answer. Its next life resolves that very claim.

    Fails if the claim id is not durable before it is sent: then the key holds an id that nobody knows, and vm1 is muted.
    """
    protect(H1)
    load.flowing()
    etcd.signal("STOP")
    H2.power_off()
    H1.await_state("muted", timeout=10)
    until(lambda: "has not answered" in H1.status()["reason"], 15, lambda: f"h1 says why: {H1.status()['reason']}")
    H1.kill_unit("mcft-agent")
    etcd.signal("CONT")
    H1.await_state("solo", timeout=30)
    load.goes_on()
    load.finished()


@pytest.mark.parametrize("how", ["wiped", "restored", "deleted"])
def test_an_etcd_that_forgot(how: str, etcd: Etcd, load: Load) -> None:
    """Wiped, on an old backup, or without the key: unknown, and it says so. Nobody goes on by it; by the operator's word, yes.

    Fails if a missing key is made, or a revision below the highest seen accepted.
    """
    protect(H1)
    load.flowing()
    if how == "wiped":
        etcd.wipe()
        etcd.start()
    elif how == "deleted":
        etcd.ctl("del --prefix /mcft")
    else:
        etcd.backup()
        for n in range(3):
            etcd.ctl(f"put /x {n}")
        at_s = now()
        for host in (H1, H2):
            until(lambda host=host: asked_since(host, at_s), 10, f"{host} has seen what came after the backup")  # type: ignore[misc]
        etcd.restore()
    trouble("missing" if how == "deleted" else "went back")
    H2.power_off()
    H1.await_state("muted", timeout=10)
    refused = H1.mcft("solo", "vm1", "--yes", check=False)
    assert refused.returncode == 4 and "--peer-is-off" in refused.stderr, refused
    assert H1.state() == "muted"
    H1.mcft("solo", "vm1", "--peer-is-off", "--yes")
    load.goes_on()
    load.finished()


def test_cold_start_without_the_standby(etcd: Etcd) -> None:
    """Both hosts lose power, only h1 returns: etcd says that nobody had gone on, so `mcft start` needs no operator's word.

    Fails if a start claims nothing (h2 may take over later), or if `fence`'s or nobody's answer would do.
    """
    protect(H1)
    for host in HOSTS:
        host.freeze(True)  # at the same instant: neither sees the other go
    with ThreadPoolExecutor() as pool:
        list(pool.map(Host.power_off, HOSTS))
    for host in HOSTS:
        host.freeze(False)
    H1.power_on()
    until(H1.answers, 20, "h1: the agent answers")
    started = H1.mcft("start", "vm1", timeout=60)
    assert "host1" in started.stdout, started
    assert '"owner":"primary"' in etcd.ctl("get --prefix /mcft --print-value-only")
    until(guest_answers, 60, "the guest answers")
