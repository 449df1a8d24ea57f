"""What status says: never that all is well when it is not."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcft import api
from mcft.agent import statusview
from mcft.agent.model import Body
from mcft.diskreplica import Disk
from mcft.gate.core import Gate
from mcft.generations import Kind, Ledger
from mcft.netbuffer import Nic

STATES = get_args(api.State)
QUANTILES = {"p50": 4.0, "p99": 9.0}
PRIMARY_GATE: dict[str, Any] = {
    "role": "primary", "disk_error": "", "verdict": None, "lease": True, "acknowledged": 5, "rate_hz": 9.9,
    "last_ack_age_ms": 40.0, "pause_ms": QUANTILES, "buffer": "filter", "released_epochs": 4, "merged_epochs": 0,
    "hold_ms": QUANTILES, "links": [{"link": "10.99.0.2", "age_ms": 21.04, "missed": 0}],
    "nics": [{"target": "vnet0", "held_packets": 3, "held_bytes": 412, "dropped": 0, "ifb": "mcft-vnet0"}],
}  # fmt: skip
STANDBY_GATE: dict[str, Any] = {
    "role": "standby", "disk_error": "", "verdict": None, "alarm": "", "lan_away": "", "loads": 5, "last_load_age_ms": 40.0,
    "links": [],
}  # fmt: skip


def body(state: str = "protected", role: str = "primary", **fields: Any) -> Body:
    made = Body("u", "vm1", "p", 3, role, "host2", state=state, **fields)  # type: ignore[arg-type]
    made.disks = [Disk("vda", "virtio-disk0", "libvirt-1", 1, "/x", "raw", True)] if fields.get("disks") else []
    return made


def view(made: Body, gate: dict[str, Any], running: bool = True, *kinds: Kind) -> api.Protection:
    ledger = Ledger("p", made.role, 3)
    if made.state == "protected" and not kinds:
        kinds = (Kind.PREPARING, Kind.ARMING, Kind.PROTECTED) if made.role == "primary" else (Kind.PREPARING, Kind.ARMED)
    for kind in kinds:
        ledger.append(kind, 4 if kind is Kind.SPOKEN else 3)
    return statusview.protection(made, ledger, gate, None, None, {}, running, "host1")


@pytest.mark.parametrize("state", STATES)
def test_states_that_need_somebody_say_what_to_type(state: str) -> None:
    step = view(body(state), PRIMARY_GATE).next_step
    if state in ("preparing", "syncing", "resyncing", "protected", "taking-over"):
        assert step is None, "it goes on by itself"
    else:
        assert step and "vm1" in step and ("mcft " in step or "virsh " in step)


def test_a_copy_that_failed_is_not_told_to_protect() -> None:
    """The two ways out of an arbiter that can't tell any more are the operator's word here or there.

    Fails if a standby in `failed` is told what a primary would be (`mcft protect` is refused there).
    """
    undecidable = view(body("failed", "standby", arbiter_trouble="etcd went back to revision 3"), {}).next_step or ""
    assert "mcft failover vm1 --force --peer-is-off" in undecidable and "mcft solo vm1 --peer-is-off" in undecidable
    assert "mcft --host host2 status vm1" in (view(body("failed", "standby"), {}).next_step or "")


def test_lost_names_this_host_for_the_way_back() -> None:
    assert "--to host1" in (view(body("lost"), {}).next_step or "")


def test_all_is_well() -> None:
    seen = view(body(), PRIMARY_GATE)
    assert seen.survives_host_loss and seen.output_flowing and seen.unsafe == [] and seen.reason is None
    assert seen.keepalive == [api.LinkStatus("udp", "10.99.0.2", 21.0, 0)]
    assert seen.network.nics[0].ifb == "mcft-vnet0"
    assert seen.network.nics[0].held_packets == 3 and seen.checkpoints.acknowledged == 5
    assert view(body(role="standby"), STANDBY_GATE).survives_host_loss


@pytest.mark.parametrize("role", ["primary", "standby"])
@pytest.mark.parametrize("changes", [{"disk_error": "vda"}, {"verdict": {"act": "break", "reason": "x"}}, None])
def test_no_gate_a_disk_error_a_verdict_survive_nothing(role: str, changes: dict[str, Any] | None) -> None:
    gate = PRIMARY_GATE if role == "primary" else STANDBY_GATE
    assert not view(body(role=role), {} if changes is None else {**gate, **changes}).survives_host_loss


def test_a_standby_that_must_not_take_over_is_no_help() -> None:
    """Its primary is silent and its own LAN too, say. Fails if `status --check` calls that a survivor, or tells no reason."""
    for key in ("alarm", "lan_away"):
        seen = view(body(role="standby"), {**STANDBY_GATE, key: "this host's own LAN does not answer"})
        assert not seen.survives_host_loss and "own LAN does not answer" in str(seen.reason)
    ledger = Ledger("p", "primary", 3)
    for kind in (Kind.PREPARING, Kind.ARMING, Kind.PROTECTED):
        ledger.append(kind, 3)
    seen = statusview.protection(body(), ledger, PRIMARY_GATE, None, None, {}, True, "host1", standbys_lan="its LAN is away")
    assert not seen.survives_host_loss and seen.output_flowing and "its LAN is away" in str(seen.reason)


def test_no_lease_or_no_load_survives_nothing() -> None:
    assert not view(body(), {**PRIMARY_GATE, "lease": False}).survives_host_loss
    assert not view(body(), {**PRIMARY_GATE, "lease": False}).output_flowing
    assert not view(body(role="standby"), {**STANDBY_GATE, "loads": 0}).survives_host_loss


@pytest.mark.parametrize("newest", [Kind.RESIGNED, Kind.LOST, Kind.DIED])
def test_a_record_is_ahead_of_the_state(newest: Kind) -> None:
    """A planned switch, the agent killed behind `lost`: for the rest of the lease it still said that output flows here."""
    seen = view(body(), PRIMARY_GATE, True, Kind.PREPARING, Kind.ARMING, Kind.PROTECTED, newest)
    assert not seen.output_flowing and not seen.survives_host_loss
    assert not view(body(), {**PRIMARY_GATE, "closed": True}).output_flowing


def test_gate_that_is_away_is_said() -> None:
    seen = view(body(), {})
    assert "gate" in (seen.reason or "") and not seen.output_flowing


def test_unbuffered_is_unsafe() -> None:
    nic = Nic("vnet0", "52:54:00:00:00:01", "hostnet0", "virtio", False, "bridge")
    seen = view(body(buffer="none", nics=[nic]), PRIMARY_GATE)
    assert seen.unsafe and not seen.survives_host_loss
    promoted = body(state="active", buffer="none", nics=[nic])
    assert not statusview.protection(promoted, Ledger("p", "standby", 3), {}, None, None, {}, True, "host2").unsafe


def test_muted_is_not_flowing() -> None:
    assert not view(body("muted"), PRIMARY_GATE).output_flowing
    assert not view(body("solo"), {}, False).output_flowing, "nobody sends where no guest runs"
    alone = [Kind.PREPARING, Kind.ARMING, Kind.PROTECTED, Kind.SOLO, Kind.SPOKEN]
    assert view(body("failed"), {}, True, *alone).output_flowing, "given up trying to protect it again: it talks to the world"
    assert not view(body("failed"), {}, True, Kind.PREPARING).output_flowing, "an undo goes on, and what it set up may hold"
    assert not view(body(role="standby"), STANDBY_GATE).output_flowing


@given(
    st.sampled_from(STATES), st.sampled_from(["primary", "standby"]), st.booleans(), st.sampled_from(["auto", "none"]),
    st.sampled_from([{}, {"lease": False}, {"disk_error": "x"}, {"verdict": {"act": "died"}}, {"loads": 0}]),
    st.booleans(),
)  # fmt: skip
def test_survives_only_while_protected_and_whole(
    state: str, role: str, running: bool, asked: str, changes: dict[str, Any], gate_there: bool
) -> None:
    base = PRIMARY_GATE if role == "primary" else STANDBY_GATE
    seen = view(body(state, role, buffer_asked=asked), {**base, **changes} if gate_there else {}, running)
    if seen.survives_host_loss:
        assert state == "protected" and gate_there and not seen.unsafe
        assert not changes or (role == "standby") == ("lease" in changes) or "loads" in changes
    if seen.output_flowing:
        assert running and role == "primary" and state not in ("muted", "lost", "stopped", "failed")


def test_generation_rises_only_once_the_winner_has_spoken() -> None:
    way = [Kind.PREPARING, Kind.ARMING, Kind.PROTECTED, Kind.SOLO]
    assert view(body("muted"), {}, True, *way).generation == 3
    assert view(body("solo"), {}, True, *way, Kind.SPOKEN).generation == 4


def test_disk_error_is_shown_at_the_disk() -> None:
    assert view(body(disks=True), {**PRIMARY_GATE, "disk_error": "vda"}).disks[0].state == "error"
    assert view(body(disks=True), PRIMARY_GATE).disks[0].state == "replicating"


def test_what_the_gate_says_is_what_is_read() -> None:
    """The keys above are the gate's own: a renamed one would silently become "not protected"."""
    import inspect

    from mcft.gate.primary import Primary
    from mcft.gate.standby import Standby

    source = "".join(inspect.getsource(c.status) for c in (Gate, Primary, Standby))
    for key in {*PRIMARY_GATE, *STANDBY_GATE}:
        assert f'"{key}"' in source


def test_a_dead_guest_whose_peer_is_silent_is_not_sent_to_solo() -> None:
    step = statusview.next_step(body("muted"), "host1", running=False)
    assert step is not None and "mcft start vm1" in step and "solo" not in step


@pytest.mark.parametrize("state", ["solo", "active", "unprotected"])
def test_maintenance_is_what_keeps_it_without_a_standby(state: str) -> None:
    step = statusview.next_step(body(state), "host1", in_maintenance="host2")
    assert step is not None and "on host2: mcft maintenance off" in step
