"""The RDMA keepalive of two real gates on rxe: what it sees, and how soon, beside UDP in the same run.

The reader judges: the counter that the peer writes into this host's memory. What the adapter says of our own writes is a
hint. Both stand in `status`, and the verdict still wants silence on every link.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fabric import A, B, End, Fabric, sh
from pair import Pair, Side, T, until

from mcft import rdmadevices
from mcft.agent.rdma import choose
from mcft.errors import REFUSED, Refused
from mcft.gate.loop import boottime_ms

EVIDENCE = bool(os.environ.get("MCFT_EVIDENCE"))
GROWS_S = float(os.environ.get("MCFT_RDMA_S", "600" if EVIDENCE else "3"))


def seen(side: Side, since_ms: float, want: set[str], errors_before: int) -> dict[str, float]:
    """ms from an event to each sign wanted: "adapter" (its word), "rdma" and "udp" (a loss time of silence), "verdict".

    By the gate's own clock readings, so that a test that is itself held up does not spoil them; the verdict's is ours.
    """
    found: dict[str, float] = {}
    end_ms = boottime_ms() + 30_000
    while not want <= set(found):
        assert boottime_ms() < end_ms, (want - set(found), found, side.status())
        status = side.status()
        now_ms = boottime_ms() - since_ms
        for row in status["links"]:
            if row["age_ms"] is not None and row["age_ms"] > T:
                found.setdefault(row.get("kind", "udp"), now_ms - row["age_ms"] + T)
            if row.get("errors", 0) > errors_before:
                found.setdefault("adapter", now_ms - row["error_age_ms"])
        if status["verdict"]:
            found.setdefault("verdict", now_ms)
        time.sleep(0.005)
    return {name: at for name, at in found.items() if name in want}


def tell(what: str, found: dict[str, float]) -> None:
    ages = ", ".join(f"{name} {at:.0f} ms ({at / T:.2f} T)" for name, at in sorted(found.items(), key=lambda item: item[1]))
    print(f"\n{what}: {ages}", flush=True)


def resources() -> dict[str, int]:
    """Queue entries and memory regions that the kernel keeps for anybody."""
    return {kind: len(sh(f"rdma resource show {kind}").splitlines()) for kind in ("qp", "cq", "mr", "pd")}


# ---- bad input: refused with a sentence, nothing made (no gate runs yet) ----


def refusal(device: str, pairs: list[tuple[str, str]] | None = None) -> Refused:
    with pytest.raises(Refused) as caught:
        asyncio.run(choose(device, pairs or [(A.address, B.address)]))
    assert caught.value.exit_code == REFUSED
    return caught.value


def test_a_device_that_does_not_serve_is_refused(fabric: Fabric) -> None:
    """Fails if any of these gets an RDMA keepalive, or words that do not name the device."""
    before = resources()
    assert "there is no RDMA device 'mlx9_0'. RDMA devices here: rxa, rxb" in str(refusal("mlx9_0"))
    assert "RDMA device rxb has not the address 10.7.0.1" in str(refusal("rxb"))
    found = asyncio.run(choose("rxa", [("192.0.2.1", "192.0.2.2"), (A.address, B.address)]))
    assert found is not None and (found.device, found.local, found.peer) == ("rxa", A.address, B.address)
    auto = asyncio.run(choose("auto", [("0.0.0.0", B.address)]))
    assert auto is not None and auto.local == A.address and asyncio.run(choose("off", [(A.address, B.address)])) is None
    assert rdmadevices.find(B.address).device == "rxb"
    fabric.down(A)
    assert refusal("rxa").code == "rdma-down" and "rxa port 1 is DOWN" in str(refusal("rxa"))
    assert asyncio.run(choose("auto", [(A.address, B.address)])) is None
    assert resources() == before


# ---- two gates ----


def test_the_lease_may_rest_on_rdma_alone_if_both_directions_live(fabric: Fabric) -> None:
    """No UDP datagram arrives. Fails if the region carries less than the datagram, or a write counts without its echo."""
    with Pair(udp=False) as pair:
        pair.connected()
        status = until(lambda: (s := pair.primary.status())["lease"] and s, pair.primary.status)
        assert status["peer"]["record"] == "armed" and status["links"][0]["age_ms"] is None
        pair.standby.signal(signal.SIGSTOP, gate_only=True)
        until(lambda: not pair.primary.status()["lease"], pair.primary.status)
        assert not pair.primary.rdma()["detail"], "the other adapter goes on taking writes"


@pytest.fixture(scope="module")
def lasting(wire: Fabric) -> Iterator[Pair]:
    """One pair for all that it has to survive."""
    with Pair() as pair:
        yield pair


@pytest.fixture
def pair(fabric: Fabric, lasting: Pair) -> Pair:
    """It, connected."""
    lasting.connected()
    return lasting


@pytest.mark.parametrize("gone", [A, B], ids=["the primary's", "the standby's"])
def test_device_removed_costs_nothing_but_itself(fabric: Fabric, pair: Pair, gone: End) -> None:
    """Fails if the loss of the device is taken for the peer's, if nobody says which side has none, or if the new one is not
    used."""
    other = pair.standby if gone is A else pair.primary
    errors = other.rdma()["errors"]
    fabric.remove_device(gone)
    found = seen(other, boottime_ms(), {"adapter", "rdma"}, errors)
    tell(f"device {gone.device} removed", found)
    words = f"no RDMA device here has the address {gone.address}"  # the standby's refusal reaches the primary
    until(lambda: words in pair.primary.rdma()["detail"], pair.primary.rdma)
    for side in pair.sides:
        status = side.status()
        assert status["verdict"] is None and status["links"][0]["age_ms"] < T
    fabric.mend()
    pair.connected()


def test_thirty_percent_lost(fabric: Fabric, pair: Pair) -> None:
    """A queue pair may break and stands again by itself; nobody is taken for lost. Fails without connecting again."""
    before = pair.standby.rdma()
    fabric.loss(30)
    worst: dict[str, float] = {"rdma": 0.0, "udp": 0.0}
    end_ms = boottime_ms() + (60_000 if EVIDENCE else 8_000)
    while boottime_ms() < end_ms:
        status = pair.standby.status()
        assert status["verdict"] is None, status
        for row in status["links"]:
            worst[row.get("kind", "udp")] = max(worst[row.get("kind", "udp")], row["age_ms"])
        time.sleep(0.02)
    row = pair.standby.rdma()
    tell("worst age with 30 % lost", worst)
    again, errors = row["connections"] - before["connections"], row["errors"] - before["errors"]
    print(f"connected anew {again} times after {errors} errors", flush=True)
    fabric.mend()
    pair.connected()


def test_its_verbs_process_may_die(pair: Pair) -> None:
    """Fails if the gate goes with it, or does not start it anew."""
    before = pair.standby.rdma()["connections"]
    os.kill(pair.standby.processes()[1], signal.SIGKILL)
    until(lambda: pair.standby.rdma()["connections"] > before, pair.standby.rdma)
    pair.connected()


def test_a_killed_process_is_told_by_the_adapter_first(pair: Pair) -> None:
    """Fails if the retries are endless (7), the adapter's word alone brings the verdict, or a gate keeps a queue pair whose
    peer is gone. The gate alone is killed: its verbs process has to go by itself."""
    errors, verbs = pair.standby.rdma()["errors"], pair.primary.processes()[1]
    pair.primary.kill()
    found = seen(pair.standby, boottime_ms(), {"adapter", "rdma", "udp", "verdict"}, errors)
    tell("killed", found)
    assert "RDMA: RETRY_EXC_ERR" in pair.standby.status()["verdict"]["reason"], "the adapter's word came first"
    assert found["verdict"] >= max(found["udp"], found["rdma"]), "the verdict wants silence"
    assert not Path(f"/proc/{verbs}").exists(), "the verbs process outlives its gate"
    pair.primary.start()
    pair.connected()


def test_a_stopped_process_is_lost_though_writes_to_it_succeed(pair: Pair) -> None:
    """Fails if the writer's success counts instead of the reader's age."""
    errors = pair.standby.rdma()["errors"]
    pair.primary.signal(signal.SIGSTOP)
    try:
        found = seen(pair.standby, boottime_ms(), {"rdma", "udp", "verdict"}, errors)
        tell("stopped", found)
        assert pair.standby.rdma()["errors"] == errors and not pair.standby.rdma()["detail"]
        verdict = pair.standby.status()["verdict"]
        assert verdict["act"] == "claim" and "silent on every link" in verdict["reason"]
    finally:
        pair.primary.signal(signal.SIGCONT)
    pair.connected()


def test_connected_again_after_the_standbys_restart(pair: Pair) -> None:
    """Fails if the primary's gate keeps a queue pair whose peer is gone, and writes nowhere."""
    pair.standby.kill()
    pair.standby.start()
    pair.connected()


def test_link_down(fabric: Fabric, pair: Pair) -> None:
    """The standby's own carrier goes. Fails if its adapter's errors are not read, or it does not connect again."""
    errors = pair.primary.rdma()["errors"]
    fabric.down(B)
    found = seen(pair.primary, boottime_ms(), {"adapter", "rdma", "udp"}, errors)
    tell("link down", found)
    assert found["adapter"] < found["udp"]
    fabric.mend()
    pair.connected()


def test_nothing_grows(fabric: Fabric, pair: Pair) -> None:
    """Queue entries, memory regions and memory, over many keepalives and connections. Fails if an old queue pair is kept."""

    def again() -> None:
        """The same processes, another connection."""
        before = pair.primary.rdma()["connections"], pair.standby.rdma()["connections"]
        fabric.loss(100)
        until(lambda: pair.primary.rdma()["detail"] and pair.standby.rdma()["detail"], pair.primary.rdma)
        fabric.loss(0)
        until(lambda: pair.primary.rdma()["connections"] > before[0], pair.primary.rdma)
        pair.connected()

    def memory_kib() -> list[int]:
        """Each side's gate and verbs process."""
        return [kib for side in pair.sides for kib in side.memory_kib()]

    again()  # whatever is made once
    then, memory, files = resources(), memory_kib(), [side.files() for side in pair.sides]
    begun_ms, rounds, connections = boottime_ms(), 0, pair.primary.rdma()["connections"]
    while boottime_ms() < begun_ms + (GROWS_S * 1000) or rounds < 3:
        if rounds < 3 or rounds % 10 == 0:
            again()
        if rounds % 30 == 0:
            print(f"\nafter {(boottime_ms() - begun_ms) / 1000:.0f} s: {memory_kib()} KiB", end="", flush=True)
        rounds += 1
        time.sleep(1.0)
    connections = pair.primary.rdma()["connections"] - connections
    grown = [now - before for now, before in zip(memory_kib(), memory, strict=True)]
    print(f"\n{then} then, {resources()} now, after {connections} connections; memory grew by {grown} KiB", flush=True)
    assert resources() == then and max(grown) < 1024
    more = [side.files() - before for side, before in zip(pair.sides, files, strict=True)]
    assert max(more) <= 1, "more than an agent's connection, which comes and goes"


@pytest.mark.evidence
def test_what_it_costs(fabric: Fabric) -> None:
    """20 keepalives a second each way: CPU of both processes with it, and of the gate alone without."""
    spent: dict[str, float] = {}
    for name, device in (("udp and rdma", "auto"), ("udp", "")):
        with Pair(devices=(device, device), loss_ms=300.0) as pair:
            if device:
                until(lambda: pair.primary.rdma()["connections"], pair.primary.rdma)
            before, at_ms = pair.primary.cpu_ms(), boottime_ms()
            time.sleep(20.0 if EVIDENCE else 6.0)
            spent[name] = (pair.primary.cpu_ms() - before) / (boottime_ms() - at_ms) * 100
    print("\nCPU of one core: " + ", ".join(f"{name} {share:.1f} %" for name, share in spent.items()), flush=True)
    assert spent["udp and rdma"] < 4 * spent["udp"] + 5
