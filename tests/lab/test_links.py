"""Single links are cut, and the standby's host is lost: what the primary does, and what everybody who looks can see."""

from __future__ import annotations

import json
from collections.abc import Callable

from test_disks import stopped_writer
from watching import Load
from world import H1, H2, configured, guest, link, now, pause, protect, until

Measure = Callable[[str, float], float]


def test_replication_link_cut(load: Load, measure: Measure) -> None:
    """The checkpoints' link is cut while the LAN lives: the primary goes solo, and is protected again after.

    Fails if the standby takes over though it hears the primary, or if QEMU hangs in a checkpoint that nobody yanks.
    """
    protect(H1)
    load.flowing()
    pause(0.5)
    at_s = link("rep", "down")
    H1.await_state("solo", timeout=15)
    load.goes_on()
    gap = measure("beacon's gap, replication link cut (target 500 ms)", load.observer.gap(at_s))
    assert gap < 2.0, f"{gap:.3f} s without a beacon"
    up_s = link("rep", "up")
    H1.await_state("protected", timeout=60)
    measure("until protected again, replication link back", now() - up_s)
    load.goes_on()
    load.finished()


def test_lan_of_the_standby_cut(load: Load) -> None:
    """Only keepalives go over the standby's LAN link: nothing happens without it, but that standby must not take over.

    Fails if one silent link counts as the peer's silence, or if either side says meanwhile that a host's loss is survived.
    """
    protect(H1)
    load.flowing()
    generation, at_s = H1.status()["generation"], now()
    link("lan:h2", "down")
    pause(3.0)
    assert load.observer.gap(at_s) < 0.8
    for host in (H1, H2):
        until(lambda host=host: not host.status()["survives_host_loss"], 15, f"{host} knows that h2 must not take over")
        status = host.status()
        assert status["state"] == "protected" and "own LAN is away" in status["reason"], status
    assert H1.mcft("status", "--check", check=False).returncode == 1
    assert H1.status()["generation"] == generation
    link("lan:h2", "up")
    load.goes_on()
    for host in (H1, H2):
        until(lambda host=host: host.status()["survives_host_loss"], 15, f"{host}: the loss of a host is survived again")
    load.finished()


def test_lan_of_the_primary_cut(load: Load) -> None:
    """A primary without its LAN cable is not lost: nothing happens until the operator switches, and then nobody lost a byte.

    Fails if the cut alone makes a take-over, or if `mcft failover` needs the LAN.
    """
    protect(H1)
    load.flowing()
    link("lan:h1", "down")
    pause(1.5)
    assert (H1.state(), H2.state()) == ("protected", "protected")
    H1.mcft("failover", "vm1")
    until(lambda: H2.status().get("role") == "primary", 10, "vm1 runs on h2")  # protected again by then, perhaps
    load.goes_on()
    link("lan:h1", "up")
    load.finished()


def tap_drops() -> str:
    """What h1's guests said to a tap that did not take it."""
    return H1.sh("cat /sys/class/net/vnet*/statistics/rx_dropped")


def test_standbys_host_off_mutes_and_everybody_can_see_it(load: Load, measure: Measure) -> None:
    """Without an arbiter the primary can't know who went on: muted, on every surface, until the operator's word.

    Fails if the primary goes on by itself, if one surface calls it well, if `solo` does not open, or if what it undoes closes
    again what it opened: thousands of packets that were held are lost then.
    """
    protect(H1)
    load.flowing()
    H2.power_off()
    status = H1.await_state("muted", timeout=15)
    assert "mcft solo vm1" in (status["next_step"] or ""), status["next_step"]
    assert not status["output_flowing"] and not status["survives_host_loss"]
    text = H1.mcft("status", "vm1").stdout
    assert "MUTED" in text and "mcft solo vm1" in text, text
    shown = json.loads(H1.mcft("status", "vm1", "--json").stdout)["protections"][0]
    assert shown["state"] == "muted" and "mcft solo vm1" in shown["next_step"]
    check = H1.mcft("status", "--check", check=False)
    assert check.returncode == 1 and "muted" in check.stdout, check
    assert any("muted" in event["text"] for event in H1.events()), H1.events()
    refused = H1.mcft("solo", "vm1", "--yes", check=False)
    assert refused.returncode == 4 and "--peer-is-off" in refused.stderr, refused
    heard = load.observer.ask("last")
    pause(1.0)
    assert load.observer.ask("last") == heard, "something of a muted guest was heard"
    dropped = tap_drops()
    at_s = now()
    H1.mcft("solo", "vm1", "--peer-is-off", "--yes")
    assert H1.state() == "solo"
    measure("from `mcft solo` to the first beacon", load.observer.hears(10, at_s) - at_s)
    load.goes_on()
    assert tap_drops() == dropped, "what was held met a tap that was down"
    # The override is not undone behind the operator's back: the returned host is no standby until it is asked for.
    H2.power_on()
    until(H2.answers, 20, "h2: the agent answers")
    until(lambda: H2.state() in ("lost", "stopped", ""), 20, f"h2 knows that its copy is void ({H2.status()})")
    assert H2.qemu_pid() is None
    load.finished()


def test_a_protect_is_cancelled_after_the_standbys_host_vanished() -> None:
    """Its disks follow already, its memory is still being copied, the guest writes; nothing of the host's end is heard.

    Fails if what is under way to it is waited for, the guest standing, until TCP gives up (a quarter of an hour).
    """
    with configured(H1, "printf '\n[protect]\nmax_bandwidth = \"1MiB\"\n' >> $file"):
        assert guest("writer", "start", "1").startswith("writer run=1")
        try:
            H1.mcft("protect", "vm1", "--to", "host2", "--no-wait")
            copying = "copy the memory and switch over"
            until(lambda: ((H1.status() or {}).get("job") or {}).get("step") == copying, 30, "the memory is being copied")
            H2.power_off()
            pause(1.0)  # so that writes are under way to it
            H1.mcft("unprotect", "vm1", timeout=60)
            written = _written()
            until(lambda: _written() > written + 50, 10, "the guest goes on writing")
            assert "running" in H1.sh("virsh domstate vm1")
        finally:
            stopped_writer()


def _written() -> int:
    return int(guest("writer", "status").split(" n=")[1].split()[0])
