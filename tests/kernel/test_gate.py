"""The gate's real process on a real plug, between a FAKE QMP server, a FAKE peer and a dummy process as QEMU (`gatelab`)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from frames import Wire, nic, sh

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from gatelab import AgentEnd, GateLab, protected, until


@pytest.fixture
def gate(wire: Wire) -> Iterator[GateLab]:
    with GateLab("primary", nics=[nic("vnet0")], buffer="plug", record="preparing") as lab:
        yield lab


def solo_opens_without_a_trace(agent: AgentEnd, wire: Wire, epoch: int) -> None:
    """Packets pass, and nothing of mcft's is left."""
    agent.ask("update", record="solo")
    agent.ask("open", because="solo")
    agent.ask("detach")
    sent = wire.send(epoch, 6)
    assert wire.comes(6) == sent and "mcft" not in sh("ip link; tc qdisc")


def test_output_waits_for_its_acknowledgement_and_unprotect_takes_all_away(wire: Wire, gate: GateLab) -> None:
    """Fails if the gate drives the filter instead, or does not watch its lease, or leaves pieces behind."""
    agent = protected(gate)
    first = wire.send(0, 12)
    gate.qmp.event("STOP", "colo")
    until(lambda: gate.qmp.sent("query-status"), "no marker behind the STOP")
    second = wire.send(1, 12)
    assert wire.arrived() == []
    gate.qmp.event("RESUME", "running")
    assert wire.comes(12) == first
    status = agent.status_when(lambda s: s["acknowledged"] == 1 and s["nics"][0]["held_packets"] == 12)
    assert status["buffer"] == "plug" and status["released_epochs"] == 1
    gate.kill_gate()  # what is held stays; a new gate can't know how much of it is marked, and drops it
    third = wire.send(2, 6)
    assert wire.arrived() == []
    agent = gate.start()
    agent.status_when(lambda s: s["lease"])
    fourth = wire.send(3, 6)
    assert wire.arrived() == []
    gate.qmp.checkpoint()
    gate.qmp.checkpoint()
    assert wire.comes(6) == fourth and not set(second + third) & set(fourth)
    solo_opens_without_a_trace(agent, wire, 4)


def test_tampering_closes_the_gate_and_solo_opens_it_without_a_trace(wire: Wire, gate: GateLab) -> None:
    """Fails if the gate does not listen, or solo can't open what was tampered with."""
    agent = protected(gate)
    wire.send(0, 5)
    sh("tc qdisc replace dev mcft-vnet0 root pfifo")
    note = agent.note("verdict")
    assert note["act"] == "break" and "changed by somebody else" in note["reason"] and "mcft-vnet0" in note["reason"]
    wire.arrived()  # what came between the deed and its notice can't be called back
    with pytest.raises(OSError):  # the tap is down
        wire.send(1, 5)
    gate.qmp.event("STOP", "colo")
    gate.qmp.event("RESUME", "running")
    status = agent.ask("status")
    assert status["closed"] and status["buffer_broken"] and wire.arrived() == []
    assert "state DOWN" in sh("ip link show vnet0")
    solo_opens_without_a_trace(agent, wire, 2)


def test_what_is_said_while_the_gate_is_closed_waits(wire: Wire, gate: GateLab) -> None:
    """`unprotect`: the stream is broken, the standby is asked to give up, and vm1 talks all the while. Nobody changed anything.

    Fails if the gate sets the tap down: every packet of that time would be lost. Or if it lets one out before it may.
    """
    agent = protected(gate)
    said = wire.send(0, 6)
    agent.ask("yank")
    gate.qmp.event("COLO_EXIT", reason="error")
    said += wire.send(1, 6)
    assert agent.status_when(lambda s: s["closed"]) and wire.arrived() == []
    said += wire.send(2, 6)
    agent.ask("update", record="solo")
    agent.ask("open", because="solo")
    assert wire.comes(18) == said
    solo_opens_without_a_trace(agent, wire, 3)


def test_a_buffer_that_was_changed_before_the_hold_refuses_it(wire: Wire, gate: GateLab) -> None:
    """Fails if `hold` believes that it holds: everything would leave unbuffered."""
    agent = gate.start()
    agent.ask("attach")
    sh("tc filter del dev vnet0 ingress")
    assert "changed" in agent.note("alarm")["reason"]
    with pytest.raises(RuntimeError, match="does not hold"):
        agent.ask("hold")
    agent.ask("open")
    agent.ask("detach")
    assert "mcft" not in sh("ip link; tc qdisc")


def test_qemus_end_is_no_tampering(wire: Wire, gate: GateLab) -> None:
    """Its tap goes before its process is known dead. Fails if that counts as somebody's doing."""
    agent = protected(gate)
    os.close(wire.fds.pop("vnet0"))
    gate.kill_qemu()
    assert agent.note("verdict")["act"] == "died"
