"""An agent or a gate dies at a record, or at what its agent asked of it: the story ends as it would have without that.

`mcft/faults.py` ends the process before or after the point, once; systemd starts it again. MCFT_EVIDENCE=1 runs every
point, the default run some of them, others each time (MCFT_SEED repeats them).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from conftest import EVIDENCE, SEED
from watching import Load
from world import H1, H2, HOSTS, UUID, Host, guest_answers, now, protect, until

IN_CI = 4
DIED = "/run/mcft-died"
AGENT, GATE = "mcft-agent", "mcft-gate@"

# story: the points that it passes: (host, unit, what).
POINTS: dict[str, list[tuple[Host, str, str]]] = {
    "protect": [
        (H1, AGENT, "record preparing"),
        (H1, AGENT, "record arming"),
        (H1, AGENT, "record protected"),
        (H2, AGENT, "record preparing"),
        (H2, AGENT, "record armed"),
        (H1, GATE, "hold"),
        (H1, GATE, "update arming"),
        (H1, GATE, "update protected"),
        (H2, GATE, "update armed"),
    ],
    "primary's QEMU killed": [
        (H1, AGENT, "record died"),
        (H2, AGENT, "record taken"),
        (H2, AGENT, "record spoken"),
        (H1, AGENT, "record lost"),
        (H2, GATE, "update taken"),
        (H2, GATE, "take"),
        (H2, GATE, "speak"),
    ],
    "standby's QEMU killed": [
        (H2, AGENT, "record given-up"),
        (H1, AGENT, "record solo"),
        (H1, AGENT, "record spoken"),
        (H1, GATE, "update solo"),
        (H1, GATE, "open"),
    ],
    "planned switch": [
        (H1, GATE, "switch"),
        (H1, AGENT, "record resigned"),
        (H1, GATE, "update resigned"),
        (H2, AGENT, "record taken"),
        (H2, GATE, "take"),
        (H2, AGENT, "record spoken"),
        (H1, AGENT, "record lost"),
    ],
}
CASES = [
    (story, host, unit, f"{moment} {what}")
    for story, points in POINTS.items()
    for host, unit, what in points
    for moment in ("before", "after")
]
if not EVIDENCE:
    CASES = random.Random(f"{SEED} records").sample(CASES, IN_CI)


@contextmanager
def dying(host: Host, unit: str, point: str) -> Iterator[None]:
    """That process dies at this point, once (`mcft/faults.py`)."""
    drop_in = f"/run/systemd/system/{unit}.service.d/die-at.conf"
    restart = "systemctl restart mcft-agent" if unit == AGENT else "true"
    host.sh(
        f"rm -f {DIED}; mkdir -p {drop_in.rpartition('/')[0]} && "
        f"printf '[Service]\\nEnvironment=\"MCFT_DIE_AT={point},{DIED}\"\\n' > {drop_in} && systemctl daemon-reload && {restart}"
    )
    until(host.answers, 20, f"{host}: the agent answers")
    try:
        yield
    finally:
        host.sh(f"rm -f {drop_in}; systemctl daemon-reload")


def flows_once(load: Load) -> None:
    """One guest, on one host, heard and answering; nothing taken back, nothing acknowledged lost."""
    load.goes_on(40)
    load.unhurt()
    assert guest_answers()
    free = [host for host in HOSTS if host.status().get("output_flowing")]
    assert len(free) == 1, [(host.key, host.status()) for host in HOSTS]


def has_died(host: Host) -> bool:
    return host.run("test", "-e", DIED, check=False).returncode == 0


def story_protect(host: Host, unit: str, point: str) -> Host:
    """Protected in the end, or undone; then it can be protected."""
    with dying(host, unit, point):
        H1.mcft("protect", "vm1", "--to", "host2", check=False, timeout=120)
        assert has_died(host), f"{host} never came to: {point}"
        until(lambda: host.answers() and H1.state() in ("", "protected", "solo"), 40, lambda: f"it settles: {H1.status()}")
    protect(H1)
    return H1


def story_primary(host: Host, unit: str, point: str) -> Host:
    with dying(host, unit, point):
        protect(H1)
        H1.kill_qemu()
        H2.await_state("active", "protected", timeout=40)
        until(lambda: H2.status().get("role") == "primary", 20, "h2 leads")
        H1.await_lost()
        assert has_died(host), f"{host} never came to: {point}"
    return H2


def story_standby(host: Host, unit: str, point: str) -> Host:
    with dying(host, unit, point):
        protect(H1)
        before = int(H1.status()["generation"])
        H2.kill_qemu()
        until(lambda: has_died(host), 40, f"{host} comes to: {point}")
        until(lambda: int(H1.status().get("generation", 0)) > before, 40, lambda: f"h1 owns it: {H1.status()}")
    return H1


def story_switch(host: Host, unit: str, point: str) -> Host:
    """Either side in the end; a switch that was cut off says so, and can be asked for again."""
    with dying(host, unit, point):
        protect(H1)
        done = H1.mcft("failover", "vm1", check=False, timeout=90)
        assert has_died(host), f"{host} never came to: {point}; {done}"
        return until(
            lambda: next((h for h in HOSTS if h.status().get("role") == "primary" and h.status()["output_flowing"]), None),
            40, lambda: f"somebody leads: {[h.status() for h in HOSTS]}",
        )  # fmt: skip


STORIES: dict[str, Callable[[Host, str, str], Host]] = {
    "protect": story_protect,
    "primary's QEMU killed": story_primary,
    "standby's QEMU killed": story_standby,
    "planned switch": story_switch,
}


@pytest.mark.parametrize(("story", "host", "unit", "point"), CASES, ids=lambda value: str(value).replace(" ", "-"))
def test_a_process_dies_at_a_record(story: str, host: Host, unit: str, point: str, load: Load) -> None:
    """One guest flows in the end, all that was acknowledged is there, and it can be (or is) protected again.

    Fails if an act comes before its record, or if what a record promises is not gone on with after a restart.
    """
    load.flowing()
    at_s = now()
    leader = STORIES[story](host, unit, point)
    flows_once(load)
    assert leader.status()["uuid"] == UUID
    protect(leader, timeout=60)
    flows_once(load)
    load.finished()
    assert now() - at_s < 200
