"""Two domains: each host the other's standby, or one host with two standbys' hosts; and then that host is gone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conftest import EVIDENCE
from watching import Load
from world import H1, H2, SPARE, Host, configured, guest, lab, protect, redis, until


def flows(host: Host, domain: str) -> bool:
    return bool(host.status(domain).get("output_flowing"))


def test_each_the_others_standby_and_one_host_dies(vm2: None, load: Load) -> None:
    """vm1 goes to h2; vm2, whose standby died, is muted until the operator's word, and goes on there with all it had.

    Fails if one protection's ports, gates, taps or memory are in the other's way, if what ends one ends the other, or if
    vm2 says a word before it may.
    """
    protect(H1)
    assert H2.mcft("protect", "vm2", "--to", "host1").returncode == 0
    H2.await_state("protected", domain="vm2")
    load.flowing()
    assert redis("vm2", "set", "before", "1") == "OK"
    ends = [H1.qemu_pid("vm1"), H1.qemu_pid("vm2"), H2.qemu_pid("vm1"), H2.qemu_pid("vm2")]
    assert all(ends) and H1.state() == H2.state("vm2") == "protected"
    H1.power_off()
    H2.await_took_over(timeout=20)
    load.goes_on()
    H2.await_state("muted", domain="vm2")
    assert not flows(H2, "vm2") and not redis("vm2", "set", "held", "1")
    assert H2.mcft("solo", "vm2", check=False).returncode == 4
    H2.mcft("solo", "vm2", "--peer-is-off", "--yes")
    H2.await_state("solo", domain="vm2")
    until(lambda: redis("vm2", "get", "before") == "1", 20, "vm2's redis answers, with what it had acknowledged")
    assert H2.qemu_pid("vm2") == ends[3] and guest("@vm2", "ping") == "pong"
    H2.await_took_over()
    load.finished()


@pytest.fixture
def third_host() -> Iterator[None]:
    """host3 is on, and host1 knows it as a peer; afterwards it is off."""
    SPARE.power_on()
    try:
        until(SPARE.answers, 20, "h3: the agent answers")
        with configured(H1, "printf '\\n[peers.host3]\\naddresses = [\"10.99.0.3\", \"10.77.0.3\"]\\n' >> $file"):
            yield
    finally:
        SPARE.power_off()


@pytest.mark.skipif(not EVIDENCE, reason="the long version of the above: a third host boots")
def test_one_host_with_two_peers(third_host: None, load: Load) -> None:
    """vm1 follows to host2, vm2 to host3; host1 dies, and each goes on where its copy was, with all it had.

    Fails if one peer's link, ports or records are taken for the other's.
    """
    lab("vm", "start", "h1", "vm2")
    try:
        protect(H1)
        assert H1.mcft("protect", "vm2", "--to", "host3", check=False).returncode == 0
        H1.await_state("protected", domain="vm2")
        assert {p["name"] for p in H1.api("/v1/peers")["peers"]} == {"host2", "host3"}
        load.flowing()
        assert redis("vm2", "set", "before", "1") == "OK"
        H1.power_off()
        H2.await_took_over()
        SPARE.await_took_over(domain="vm2")
        load.goes_on()
        until(lambda: redis("vm2", "get", "before") == "1", 20, "vm2's redis answers on h3, with what it had acknowledged")
        assert H2.qemu_pid("vm2") is None and SPARE.qemu_pid("vm1") is None
        load.finished()
    finally:
        if not H1.on:
            H1.power_on()
        until(H1.answers, 20, "h1: the agent answers")
        for host in (H1, SPARE):
            host.sh("virsh -q destroy vm2; mcft forget vm2 --local --yes", check=False)
        lab("vm", "clean", "vm2")
