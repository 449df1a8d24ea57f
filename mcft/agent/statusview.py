"""A protection as people and scripts see it: body, records and the gate's word, put into `api.Protection`. Pure."""

from __future__ import annotations

from typing import Any

from mcft import api
from mcft.agent import mcnet
from mcft.agent.model import Body
from mcft.engines import mc
from mcft.generations import Kind, Ledger

FLOWING = ("protected", "solo", "active", "unprotected", "preparing", "syncing", "resyncing")


def next_step(body: Body, host: str, running: bool = True, in_maintenance: str = "") -> str | None:
    """One line of what to type in this state; None where there is nothing to do. in_maintenance: the name of such a host."""
    vm, peer = body.domain, body.peer
    if in_maintenance and body.state in ("solo", "active", "unprotected"):
        return f"on {in_maintenance}: mcft maintenance off (then it is protected again by itself)"
    if body.state == "muted" and body.role == "primary" and not running:
        return f"bring {peer} back, then: mcft start {vm}"
    if body.state == "failed" and body.role == "standby":
        if body.arbiter_trouble:
            off = f"if {peer} is certainly off: mcft failover {vm} --force --peer-is-off"
            return f"{off}; or switch this host off, and on {peer}: mcft solo {vm} --peer-is-off"
        return f"mcft events {vm}; it goes on on {peer}: mcft --host {peer} status {vm}"
    again = "not by itself" if body.manual else f"by itself once {peer} answers for long enough"
    started = f"then mcft protect {vm} --to {peer}" if body.manual else "it is protected again by itself"
    return {
        "muted": f"if {peer} is certainly off: mcft solo {vm} --peer-is-off; otherwise bring {peer} or its link back",
        "solo": f"mcft protect {vm} --to {peer} ({again})",
        "active": f"mcft protect {vm} --to {peer} ({again})",
        "lost": f"{vm} is {peer}'s now; to make this host its standby, there: mcft protect {vm} --to {host}",
        "stopped": f"mcft start {vm} ({started}), or mcft unprotect {vm}",
        "failed": f"mcft events {vm}; then mcft protect {vm} --to {peer} or mcft unprotect {vm}",
        "unprotected": f"mcft protect {vm} --to {peer}",
    }.get(body.state)


def protection(
    body: Body, ledger: Ledger, gate: dict[str, Any], job: api.JobBody | None, last: api.EventBody | None,
    versions: dict[str, str], guest_running: bool, host: str, maintenance: bool = False, peer_maintenance: bool = False,
    arbiter: api.ArbiterStatus = api.ArbiterStatus(),  # noqa: B008
    standbys_lan: str = "",
) -> api.Protection:  # fmt: skip
    """gate: the gate's `status`, or {} if there is none or it does not answer. standbys_lan: on the primary, the other agent's
    word that its standby must not take over now."""
    primary = body.role == "primary"
    g = ledger.owned if ledger.spoken else body.g
    agreed = ledger.newest in (Kind.PROTECTED, Kind.ARMED) and not (primary and gate.get("closed"))
    alone = ledger.spoken or ledger.newest is Kind.ENDED
    # What forbids a take-over now, though the copy is whole.
    forbidden = standbys_lan if primary else gate.get("alarm", "") or gate.get("lan_away", "")
    whole = body.state == "protected" and agreed and not gate.get("disk_error") and gate.get("verdict") is None and not forbidden
    following = whole and bool(gate) and (gate.get("lease") if primary else gate.get("loads", 0) > 0)
    # (A standby's body names no buffer, and keeps that when its copy is promoted.)
    unbuffered = primary and ledger.side == "primary" and body.buffer == "none" and body.nics
    unsafe = ["output leaves unbuffered (--netbuffer none)"] if unbuffered else []
    if primary and body.buffer == "qemu" and body.engine == "mc":
        unsafe.append(mcnet.UNSAFE)
    # Both sides need it: the primary when the standby is lost, the standby when the primary is.
    decides = arbiter.reachable and arbiter.peer_reachable is not False
    in_maintenance = host if maintenance else body.peer if peer_maintenance else ""
    reason = body.reason or None
    if body.state == "protected" and not gate:
        reason = "the gate does not answer; systemd restarts it"
    elif body.state == "protected" and forbidden:
        reason = f"the standby can't take over now: {forbidden}"
    return api.Protection(
        domain=body.domain, uuid=body.uuid, instance=body.pid, role=body.role, peer=body.peer, engine=body.engine,
        state=body.state, reason=reason, next_step=next_step(body, host, guest_running, in_maintenance),
        guest_running=guest_running, output_flowing=primary and guest_running and _flows(body, gate, agreed=agreed, alone=alone),
        survives_host_loss=bool(following) and not unsafe and decides, unsafe=unsafe, generation=g, arbiter=arbiter,
        tls=body.tls, delay_ms=body.delay_ms, period_ms=round(gate.get("period_ms", body.delay_ms)), since=body.since,
        checkpoints=_checkpoints(gate), network=_network(body, gate), disks=_disks(body, gate),
        keepalive=[_link(row) for row in gate.get("links", [])],
        versions=_versions(versions, body),
        job=job, last_event=last, mc=_mc(body, gate) if body.engine == "mc" else None,
    )  # fmt: skip


def _mc(body: Body, gate: dict[str, Any]) -> api.McStatus:
    """What QEMU last said, in its own names. Capabilities are shown while checkpoints flow: they are off before and after."""
    said = gate.get("mc", {})
    on = body.capabilities if said else []
    numbers = {name: said[name] for name in (*mc.STATISTICS, "downtime") if name in said}
    return api.McStatus(body.mc.transport, on, said.get("checkpoints"), numbers, body.second_monitor or "libvirt")


def _flows(body: Body, gate: dict[str, Any], *, agreed: bool, alone: bool) -> bool:
    """agreed: as far as records and gate say, both sides are still protected; the state may lag behind a decision.

    alone: by its records it runs without a standby.
    """
    if body.state == "failed":  # without a standby; or its set-up is not undone yet, and may hold
        return alone
    return body.state in FLOWING and (body.state != "protected" or (agreed and bool(gate.get("lease"))))


def _link(row: dict[str, Any]) -> api.LinkStatus:
    return api.LinkStatus(row.get("kind", "udp"), row["link"], _rounded(row["age_ms"]), row["missed"], row.get("detail", ""))


def _versions(ours: dict[str, str], body: Body) -> api.Versions:
    return api.Versions(ours.get("mcft", ""), ours.get("qemu", ""), ours.get("libvirt", ""), body.peer_versions)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _checkpoints(gate: dict[str, Any]) -> api.Checkpoints:
    if gate.get("role") == "standby":
        return api.Checkpoints(acknowledged=gate["loads"], last_ack_age_ms=gate["last_load_age_ms"] if gate["loads"] else None)
    if not gate:
        return api.Checkpoints()
    return api.Checkpoints(
        gate["acknowledged"], gate["rate_hz"], gate["last_ack_age_ms"], api.Quantiles(**gate["pause_ms"])
    )  # fmt: skip


def _network(body: Body, gate: dict[str, Any]) -> api.Network:
    if "nics" not in gate:
        return api.Network(buffer=body.buffer, nics=[api.NicStatus(n.target) for n in body.nics])
    return api.Network(
        gate["buffer"], gate["released_epochs"], gate["merged_epochs"], api.Quantiles(**gate["hold_ms"]),
        [api.NicStatus(**nic) for nic in gate["nics"]],
    )  # fmt: skip


def _disks(body: Body, gate: dict[str, Any]) -> list[api.DiskStatus]:
    word = {"protected": "replicating", "syncing": "copying", "preparing": "waiting", "muted": "held"}.get(body.state, "alone")
    return [api.DiskStatus(d.target, "error" if gate.get("disk_error") else word) for d in body.disks]
