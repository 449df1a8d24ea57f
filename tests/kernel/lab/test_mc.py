"""Engine `mc` with the kernel's plug, seen from outside: what the replays decide on paper holds for a client's connection.

libvirt, agents, gates, plug and guest are real; QEMU is a stand-in (`tests/mcqemu`: its first line says so). A guest without a
disk of the host's. MCFT_SEED repeats the random moments.

`make test-mc-plug`, in the VM, under KVM: 12 minutes, so not part of `make test`. In user-mode Linux (`make test-uml`, which is)
the story ends with the first kill and protecting back: its kernel, Debian's, lacks CONFIG_INET_DIAG_DESTROY, so a stream can't
be broken there, and the copy whose primary lost its power, or was cut off, waits in it for 70 s and longer.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator

import pytest
import world
from mcworld import EMULATOR, TRACES, definition, traced, without_tls
from test_takeover import SEED, pieces
from watching import Load, watching
from world import H1, H2, HOSTS, Host, link, other, pause, protect, redefined, until

sys.path.insert(0, str(world.REPO / "tests" / "mcqemu"))
import compare

where = [H1]  # on which host vm1 runs
moments = random.Random(SEED)


@pytest.fixture(scope="module")
def seen(the_lab: None) -> Iterator[Load]:
    """vm1 runs by the stand-in, and one client watches it through all tests here."""
    print("MCFT_SEED =", SEED)
    began_s = world.now()
    for host in HOSTS:
        without_tls(host)
        traced(host)
        # libvirt asks a new emulator what it can, which takes half a minute and more over there: not within a protect.
        host.sh(f"virsh -q domcapabilities --emulatorbin {EMULATOR} --virttype qemu > /dev/null", timeout=200)
    redefined(definition())
    print(f"vm1 is ready after {world.now() - began_s:.0f} s")
    with watching() as load:
        yield load
    for host in HOSTS:
        host.sh("mcft forget vm1 --local --yes; virsh -q destroy vm1; virsh -q undefine vm1", check=False)


def follow(primary: Host) -> None:
    """Engine and buffer are `auto`: both are found by asking."""
    protect(primary, "--delay", "100ms", timeout=60)
    status = primary.status()
    assert (status["engine"], status["network"]["buffer"]) == ("mc", "plug"), status


def went_on(load: Load, old: Host, at_s: float, what: str) -> None:
    """The other host has it, nothing that the client heard was taken back, the connection lives; and protected back."""
    new = other(old)
    new.await_took_over(timeout=30)
    load.goes_on()
    print(f"{what}: the client's gap {load.observer.gap(at_s, 60):.2f} s, {new.status()['reason']}")
    load.unhurt()
    if not old.on:
        old.power_on()
        without_tls(old)
    link("rep", "up")
    link(f"lan:{old.key}", "up")
    old.await_lost(40)
    until(lambda: "mcft-" not in pieces(old), 20, f"{old}: no piece of the lost guest's buffer is left")
    where[0] = new
    follow(new)
    load.goes_on()


def trace(host: Host, side: str) -> list[compare.Row]:
    """The newest trace of a stand-in of that side on this host."""
    text = host.sh(f"cat $(grep -l '\"side\": \"{side}\"' -r {TRACES} | xargs ls -t | head -1)")
    return compare.parsed(text)


def test_protect_and_set(seen: Load) -> None:
    """Chosen by asking QEMU, plug by asking the kernel; packets leave by the counter; the delay is changed on the way.

    Fails if `auto` takes colo, or if the counter's rule releases nothing.
    """
    follow(H1)
    seen.goes_on()
    H1.mcft("set", "vm1", "--delay", "300ms")
    before = int(H1.status()["network"]["released_epochs"])
    until(lambda: int(H1.status()["network"]["released_epochs"]) > before + 3, 20, "epochs are released at the new delay")
    H1.mcft("set", "vm1", "--delay", "100ms")
    seen.goes_on()


def test_killed_and_protected_back(seen: Load) -> None:
    """kill -9 right after an epoch was heard, the worst moment for one released too early.

    Fails if `commit.py` releases at RESUME (captured, not acknowledged), or if the copy resumes by itself.
    """
    old = where[0]
    at_s = old.kill_qemu(seen.observer.release_begins)
    went_on(seen, old, at_s, "kill")
    rows = trace(old, "src")
    assert compare.broken_rules(rows) == []
    assert compare.shape(rows).statuses["src"][-1] == "checkpointing"


def test_power_loss(seen: Load) -> None:
    """The plug pulled. Fails if the stream's socket is not broken locally: that QEMU would wait for 70 s."""
    old = where[0]
    pause(moments.uniform(0.5, 3.0))
    went_on(seen, old, old.power_off(), "power loss")


def test_partition(seen: Load) -> None:
    """Every link of the primary is cut: the other goes on, this one is mute and learns that it lost. Fails if it spoke."""
    old = where[0]
    pause(moments.uniform(0.5, 3.0))
    at_s = link(f"lan:{old.key}", "down")  # (first: a lost replication link alone makes the standby give up)
    link("rep", "down")
    went_on(seen, old, at_s, "partition")
    assert other(old).status()["generation"] > 1


def test_the_standby_dies(seen: Load) -> None:
    """QEMU says `failed` and runs on, alone, and is protected again: a new `migrate`, whose counter starts anew.

    Fails if the counter of before counts for the new stream: all that waits would leave unacknowledged.
    """
    leader = where[0]
    other(leader).kill_qemu()
    until(lambda: leader.state() != "protected", 20, "the loss is seen")
    seen.goes_on()
    leader.await_state("protected", timeout=90)
    seen.goes_on()
    seen.unhurt()
    began_s = time.monotonic()
    leader.mcft("unprotect", "vm1", timeout=120)
    print(f"unprotect {time.monotonic() - began_s:.1f} s")
    assert H2.qemu_pid() is None or H1.qemu_pid() is None
    seen.goes_on()
    seen.finished()
