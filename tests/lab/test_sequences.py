"""Sequences that nobody thought of: what operators and virsh do to two domains, in any order, one thing after the other.

After each step what must always hold is looked at: at most one host lets a domain's guest speak, at most one disk is the
truth, and every write that was ever acknowledged is there. At the end both domains are home, and nothing of mcft's is left.
MCFT_SEED repeats a run.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable

import snapshot
from conftest import EVIDENCE, SEED
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from world import H1, H2, HOSTS, Host, other, redis, until

HOME = {"vm1": H1, "vm2": H2}
MOVING = ("preparing", "syncing", "resyncing", "muted", "taking-over")
UNHEARD_OF = (0, 1, 3, 4)  # every refusal has its exit code; 2, 5 and 6 would be a bug here


def leader(domain: str) -> Host | None:
    """Where its guest runs, if it does: a copy that follows does not count."""
    found = [host for host in HOSTS if host.qemu_pid(domain) and host.status(domain).get("role") != "standby"]
    assert len(found) <= 1, f"{domain} runs on both hosts"
    return found[0] if found else None


def mcft(host: Host, *words: str) -> int:
    done = host.mcft(*words, check=False, timeout=120)
    assert done.returncode in UNHEARD_OF and "Traceback" not in done.stderr, done
    return done.returncode


def virsh(host: Host, *words: str) -> None:
    host.run("virsh", *words, check=False, timeout=60)


def protect(domain: str, host: Host) -> None:
    mcft(host, "protect", domain, "--to", other(host).name)


def kill_qemu(domain: str, host: Host) -> None:
    """Only of a protected guest: any other would be lost as every guest is."""
    pid = host.qemu_pid(domain)
    if host.state(domain) == "protected" and pid:
        os.kill(host._pid_outside(pid), signal.SIGKILL)
        until(lambda: leader(domain) is other(host), 20, f"{domain} goes on on {other(host)}")


def destroy(domain: str, host: Host) -> None:
    virsh(host, "destroy", domain)
    until(lambda: host.qemu_pid(domain) is None, 10, f"{domain} is gone from {host}")


def kill_agent(domain: str, host: Host) -> None:
    host.kill_unit("mcft-agent")
    until(host.answers, 20, f"{host}: the agent is back")


def maintenance(domain: str, host: Host) -> None:
    mcft(host, "maintenance", "on")
    mcft(host, "maintenance", "off")


def refused(domain: str, host: Host) -> None:
    """What a migration that does not end forbids, and what a host without a peer's libvirt can't do anyway."""
    for words in (["managedsave", "--running", domain], ["migrate", domain, "--live", "qemu+tcp://nowhere/system"]):
        if host.state(domain) == "protected":
            virsh(host, *words)


ACTIONS: dict[str, Callable[[str, Host], object]] = {
    "protect": protect,
    "protect again": protect,
    "unprotect": lambda domain, host: mcft(host, "unprotect", domain),
    "failover": lambda domain, host: mcft(host, "failover", domain),
    "failover from there": lambda domain, host: mcft(other(host), "failover", domain),
    "solo": lambda domain, host: mcft(host, "solo", domain, "--yes"),
    "delay": lambda domain, host: mcft(host, "set", domain, "--delay", "50ms"),
    "maintenance": maintenance,
    "virsh reset": lambda domain, host: virsh(host, "reset", domain),
    "virsh destroy": destroy,
    "virsh suspend, resume": lambda domain, host: [virsh(host, word, domain) for word in ("suspend", "resume")],
    "refused": refused,
    "kill -9 of QEMU": kill_qemu,
    "kill -9 of the agent": kill_agent,
    "kill -9 of the standby's agent": lambda domain, host: kill_agent(domain, other(host)),
}


def started(domain: str) -> bool:
    """mcft says where it belongs; one that is not protected any more is started where it is defined."""
    known = [host for host in HOSTS if host.state(domain)]
    if known:
        return mcft(known[0], "start", domain) == 0
    defined = [host for host in HOSTS if host.run("virsh", "dominfo", domain, check=False).returncode == 0]
    return defined[0].run("virsh", "start", domain, check=False).returncode == 0


class World:
    """The two domains and every write that was acknowledged."""

    def __init__(self) -> None:
        self.written: dict[str, int] = dict.fromkeys(HOME, 0)
        for domain in HOME:
            until(lambda domain=domain: redis(domain, "del", "list").isdigit(), 30, f"redis of {domain} begins anew")

    def settled(self) -> None:
        """Nothing is under way, and each domain runs somewhere: one that was ended is started where it belongs."""

        def still() -> bool:
            statuses = [host.status(domain) for host in HOSTS for domain in HOME]
            return not any(s.get("state") in MOVING or s.get("job") for s in statuses)

        until(still, 90, lambda: str([(h, d, h.state(d)) for h in HOSTS for d in HOME]))
        for domain in HOME:
            if leader(domain) is None:
                until(lambda domain=domain: started(domain), 60, f"{domain} is started where it belongs")
        until(still, 90, "what was started is settled")

    def holds(self, said: str) -> None:
        """What must hold whatever was done."""
        for domain in HOME:
            assert leader(domain) is not None, f"{said}: {domain} runs nowhere"
            speaking = [h for h in HOSTS if h.status(domain).get("output_flowing")]
            assert len(speaking) <= 1, f"{said}: {domain} speaks on {speaking}"
            labels = [h.sh(f"cat /var/lib/mcft/labels/$(virsh domuuid {domain})/* 2>/dev/null", check=False) for h in HOSTS]
            assert sum(label.startswith("truth") for label in labels) <= 1, (said, labels)
            kept = until(lambda domain=domain: redis(domain, "llen", "list"), 60, f"{said}: redis of {domain} answers")
            assert int(kept) == self.written[domain], f"{said}: {domain} lost acknowledged writes"
            assert int(redis(domain, "rpush", "list", said, wait_s=20)) == self.written[domain] + 1
            self.written[domain] += 1


def bring_home(domain: str, home: Host) -> None:
    host = leader(domain)
    assert host is not None
    if host is not home:
        if host.state(domain) != "protected":
            until(lambda: mcft(host, "protect", domain, "--to", home.name) == 0, 60, f"{domain} is protected to {home}")
        assert mcft(host, "failover", domain) == 0
        until(lambda: leader(domain) is home, 20, f"{domain} is home")
    until(lambda: mcft(home, "unprotect", domain) == 0, 60, f"{domain} is unprotected")


STEP = st.tuples(st.sampled_from(sorted(HOME)), st.sampled_from(sorted(ACTIONS)))


@seed(SEED)
@settings(
    max_examples=8 if EVIDENCE else 2, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(steps=st.lists(STEP, min_size=1, max_size=12 if EVIDENCE else 5))
def test_any_sequence(vm2: None, steps: list[tuple[str, str]]) -> None:
    """Fails at the first step after which a write is missing, two guests speak, a domain is nowhere, or an exit code is wrong."""
    world = World()
    routes = {host: snapshot.take(host)["routes"] for host in HOSTS}
    for domain in HOME:
        protect(domain, HOME[domain])
    for number, (domain, action) in enumerate(steps):
        host = leader(domain)
        assert host is not None
        ACTIONS[action](domain, host)
        world.settled()
        world.holds(f"after step {number} of {steps[: number + 1]}")
    for domain, home in HOME.items():
        bring_home(domain, home)
    world.settled()
    world.holds(f"home again after {steps}")
    for host in HOSTS:
        left = snapshot.take(host)
        assert "mcft" not in json.dumps({key: value for key, value in left.items() if key.startswith("qemu ")}), left
        assert left["routes"] == routes[host] and not [unit for unit in left["units"] if "mcft-gate" in unit], left["units"]
