"""`mcft forget --local`: mcft is broken, I want my VM. Neither the other host nor the agent is needed."""

from __future__ import annotations

import random
from typing import Any

import snapshot
from watching import Load
from world import H1, H2, Host, guest_answers, pause, protect, until


def forgotten(host: Host) -> None:
    """Everything done, nothing of mcft's left in the domain, and it is nobody's protection any more."""
    done = host.mcft("forget", "vm1", "--local", "--yes", timeout=120)
    assert "NOT done" not in done.stdout, done.stdout
    until(host.answers, 20, f"{host}: the agent is back")
    assert not host.status()


def left(before: dict[str, Any]) -> list[str]:
    """What differs on h1; labels of an older copy of vm1 are forgotten as well."""
    return [line for line in snapshot.diff(before, snapshot.take(H1)) if not line.startswith("gone: file /var/lib/mcft/labels/")]


def test_the_peer_gone_and_the_agent_down(load: Load) -> None:
    """The muted guest talks again, its host is as before `protect`. Fails if one thing of mcft's stays behind."""
    before = snapshot.take(H1)
    protect(H1)
    load.flowing()
    H1.sh("systemctl stop mcft-agent")
    H2.power_off()
    try:
        forgotten(H1)
        load.goes_on()
        load.unhurt()
        until(lambda: not left(before), 20, lambda: str(left(before)))
    finally:
        H2.power_on()


def test_right_after_a_take_over(load: Load, moments: random.Random) -> None:
    """At any moment of a take-over: refused while only the agent can finish it, and else no write is lost.

    Fails if overlays that are not committed are removed, or if the guest that took over is taken for a copy.
    """
    protect(H1)
    load.flowing()
    H1.kill_qemu()
    until(lambda: H2.state() in ("taking-over", "active"), 10, "h2 takes over")
    pause(moments.uniform(0.0, 0.15))
    H2.sh("systemctl kill -s KILL mcft-agent; systemctl stop mcft-agent")
    done = H2.mcft("forget", "vm1", "--local", "--yes", check=False, timeout=120)
    if done.returncode == 4:
        assert "is being taken over here" in done.stderr
        H2.await_took_over()
    else:
        assert done.returncode == 0 and "NOT done" not in done.stdout, done
    load.goes_on()
    load.unhurt()
    nodes = H2.sh("""virsh qemu-monitor-command vm1 '{"execute":"query-named-block-nodes"}'""")
    assert done.returncode == 4 or "mcft-" not in nodes
    H2.run("virsh", "destroy", "vm1")
    if done.returncode == 0:
        H2.run("virsh", "start", "vm1")
        until(guest_answers, 30, "the guest answers from its disk alone")
