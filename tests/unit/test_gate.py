"""The gate: its real process between a FAKE QMP server, a FAKE peer and a dummy process as QEMU (`gatelab`).

And the lease between the two gates' real halves, in a simulated network, with restarts: whatever the primary may
still release by must be over before the standby may act.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from gatelab import NIC, AgentEnd, FakeQmp, GateLab, T, arrived, protected, until
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from msgspec import structs

import mcft.gate.lan as lan_module
import mcft.gate.standby as standby_module
from mcft.commit import CommitGate
from mcft.gate.core import Gate
from mcft.gate.loop import Commands, Loop, Until, boottime_ms
from mcft.gate.pace import WINDOW
from mcft.gate.qemu import OwnQemu
from mcft.gate.standby import Standby
from mcft.gate.state import GateState, LinkSpec, process_start, save
from mcft.keepalive import Session, Word
from mcft.monitor import Monitor

LOSS_MS = 300.0  # of the simulated lease below


def frame(payload: bytes) -> bytes:
    return struct.pack("!II", len(payload), 12) + payload


@pytest.fixture
def primary() -> Iterator[GateLab]:
    with GateLab("primary", nics=[NIC]) as lab:
        yield lab


@pytest.fixture
def standby() -> Iterator[GateLab]:
    with GateLab("standby", record="armed", mode="closed", buffer="none") as lab:
        yield lab


# ---- primary ----


def test_output_waits_for_its_acknowledgement(primary: GateLab) -> None:
    agent = protected(primary)
    out, inn = primary.ends(1)
    out.sendall(frame(b"first"))
    primary.qmp.event("STOP", "colo")
    until(lambda: primary.qmp.sent("query-status"), "no marker behind the STOP")
    out.sendall(frame(b"second"))
    assert agent.ask("status")["nics"][0]["held_packets"] >= 1 and arrived(inn) == b""
    primary.qmp.event("RESUME", "running")
    assert inn.recv(1000) == frame(b"first")
    status = agent.status_when(lambda s: s["acknowledged"] == 1 and s["nics"][0]["held_packets"] == 1)
    assert status["released_epochs"] == 1 and arrived(inn) == b""
    assert agent.note("acknowledged")["count"] == 1
    until(lambda: primary.peer.last.acks == 1, "the keepalive does not say it")


def test_checkpoints_that_leave_the_guest_no_time_are_told(primary: GateLab) -> None:
    """QEMU begins the next one at once where one took longer than the delay. Fails if the guest may stand still unnoticed."""
    agent = protected(primary)
    for _ in range(WINDOW + 1):
        primary.qmp.checkpoint(ran_ms=5, stood_ms=300)
    note = agent.note("pace")
    assert note["period_ms"] == 600 and note["pause_ms"] == 300 and note["share"] < 0.02, note
    agent.ask("update", period_ms=600.0)
    assert primary.saved().every_ms == agent.ask("status")["period_ms"] == 600 and primary.saved().delay_ms == 100
    for _ in range(WINDOW + 1):
        primary.qmp.checkpoint(ran_ms=580, stood_ms=20)
    agent.notes.clear()
    assert agent.note("pace")["period_ms"] == 100


def test_foreign_resume_releases_nothing(primary: GateLab) -> None:
    agent = protected(primary)
    out, inn = primary.ends(1)
    out.sendall(frame(b"x"))
    primary.qmp.event("STOP", "paused")
    until(lambda: len(primary.qmp.sent("query-status")) >= 2, "paused: asked again")
    primary.qmp.event("RESUME", "running")
    agent.status_when(lambda s: s["foreign_resumes"] == 1)
    assert agent.ask("status")["acknowledged"] == 0 and arrived(inn) == b""
    primary.qmp.event("STOP", "colo")
    agent.ask("qmp", commands=[{"execute": "query-version"}])  # (behind the marker; another look at `paused` may be on its way)
    primary.qmp.event("RESUME", "running")
    assert inn.recv(1000) == frame(b"x")


def test_without_a_lease_the_acknowledged_epoch_waits(primary: GateLab) -> None:
    agent = protected(primary)
    out, inn = primary.ends(1)
    primary.peer.word = Word("standby", 3, "preparing", "running", True)
    agent.status_when(lambda s: not s["lease"])
    out.sendall(frame(b"x"))
    primary.qmp.checkpoint()
    agent.status_when(lambda s: s["acknowledged"] == 1)
    assert agent.ask("status")["waits_for_lease"] >= 1 and arrived(inn) == b""
    primary.peer.word = Word("standby", 3, "armed", "running", True)
    assert inn.recv(1000) == frame(b"x")


def test_armed_word_of_another_generation_gives_no_lease(primary: GateLab) -> None:
    primary.peer.word = Word("standby", 2, "armed", "running", True)
    agent = primary.start()
    agent.ask("attach")
    agent.ask("hold")
    sent = primary.peer.session.counter
    until(lambda: primary.peer.heard and primary.peer.heard[-1].echo > sent + 2, "the gate believes and echoes us")
    status = agent.ask("status")
    assert status["peer"]["record"] == "armed" and not status["lease"]


def test_claiming_standby_breaks_the_stream(primary: GateLab) -> None:
    agent = protected(primary)
    primary.peer.word = Word("standby", 3, "armed", "running", True, claiming=True)
    note = agent.note("verdict")
    assert note["act"] == "break" and "claims" in note["reason"]
    until(lambda: primary.qmp.sent("yank"))
    assert all("exec-oob" in c for c in primary.qmp.sent("yank"))
    until(lambda: primary.peer.last.closed)
    assert primary.saved().mode == "closed"


@pytest.mark.parametrize("reasons", [("host-signal", "guest-shutdown"), ("guest-shutdown", "host-signal")])
def test_the_guests_own_word_counts_among_several(primary: GateLab, reasons: tuple[str, str]) -> None:
    """libvirt ends QEMU by a signal behind a guest's shutdown, and `virsh destroy` may cross one.

    Fails if the first reason alone is kept (a guest that was shut down was taken over).
    """
    agent = protected(primary)
    for reason in reasons:
        primary.qmp.event("SHUTDOWN", guest=reason.startswith("guest"), reason=reason)
    agent.status_when(lambda s: s["own_qemu"] == "shutdown")
    primary.qemu.kill()
    note = agent.note("verdict")
    assert (note["act"], note["shutdown"]) == ("ended", "guest-shutdown")
    assert agent.ask("status")["shutdown"] == "guest-shutdown"


def test_a_gate_that_stood_still_believes_its_own_qemu_first(primary: GateLab) -> None:
    """The guest shut itself down meanwhile, and the standby claims because of the silence.

    Fails if what the other side says is decided upon before QEMU's own words are read.
    """
    agent = protected(primary)
    assert primary.gate is not None
    os.kill(primary.gate.pid, signal.SIGSTOP)
    primary.qmp.event("SHUTDOWN", guest=True, reason="guest-shutdown")
    primary.qemu.kill()
    primary.qemu.wait()
    primary.peer.word = Word("standby", 3, "armed", "running", True, claiming=True)
    said = primary.peer.session.counter
    until(lambda: primary.peer.session.counter > said + 2)
    os.kill(primary.gate.pid, signal.SIGCONT)
    note = agent.note("verdict")
    assert (note["act"], note["shutdown"]) == ("ended", "guest-shutdown"), note


def test_dead_qemu_is_said_at_once(primary: GateLab) -> None:
    agent = protected(primary)
    out, inn = primary.ends(1)
    out.sendall(frame(b"x"))
    primary.kill_qemu()
    assert agent.note("verdict")["act"] == "died"
    until(lambda: (primary.peer.last.qemu, primary.peer.last.closed) == ("gone", True))
    assert arrived(inn) == b""
    assert not [h for h in primary.peer.heard if h.word.qemu == "gone" and not h.word.closed]


def test_a_shutdown_whose_qemu_is_reset_is_a_reboot(primary: GateLab) -> None:
    """`virsh reboot` by ACPI: the guest shuts down, libvirt resets its QEMU and goes on. Nothing ends."""
    agent = protected(primary)
    primary.qmp.event("SHUTDOWN", "shutdown", guest=True, reason="guest-shutdown")
    until(lambda: primary.peer.last.qemu == "shutdown")
    primary.qmp.event("RESET", guest=False, reason="host-qmp-system-reset")
    primary.qmp.event("RESUME", "running")
    until(lambda: primary.peer.last.qemu == "running")
    primary.qmp.checkpoint()
    agent.status_when(lambda s: s["acknowledged"] and s["verdict"] is None and not s["closed"])


def test_guests_shutdown_is_not_a_death(primary: GateLab) -> None:
    agent = protected(primary)
    primary.qmp.event("SHUTDOWN", "shutdown", guest=True, reason="guest-shutdown")
    primary.qmp.event("SHUTDOWN", "shutdown", guest=False, reason="host-signal")  # libvirt, as its XML says destroy
    primary.kill_qemu()
    note = agent.note("verdict")
    assert (note["act"], note["shutdown"]) == ("ended", "guest-shutdown")
    until(lambda: (primary.peer.last.qemu, primary.peer.last.closed) == ("shutdown", True))
    agent.ask("status")
    assert not [h for h in primary.peer.heard if h.word.qemu == "gone"]


@pytest.mark.parametrize("event", ["QUORUM_REPORT_BAD", "QUORUM_FAILURE", "BLOCK_IO_ERROR", "COLO_EXIT"])
def test_errors_break_the_stream_before_anything_else_is_acknowledged(primary: GateLab, event: str) -> None:
    agent = protected(primary)
    out, inn = primary.ends(1)
    primary.qmp.checkpoint()
    agent.status_when(lambda s: s["acknowledged"] == 1)
    out.sendall(frame(b"x"))
    primary.qmp.event(event, **{"node-name": "mcft-n-vda", "reason": "error"})
    primary.qmp.event("STOP", "colo")
    primary.qmp.event("RESUME", "running")
    note = agent.note("verdict")
    assert note["act"] == "break" and event in note["reason"], note
    agent.status_when(lambda s: s["closed"])
    assert agent.ask("status")["acknowledged"] == 1 and arrived(inn) == b""
    with pytest.raises(RuntimeError):
        agent.ask("open", because="protected")


def test_disk_error_before_the_first_capture_counts_too(primary: GateLab) -> None:
    """Between the hold and the first STOP, or right after a gate's restart: the error is as sticky as any."""
    agent = protected(primary)
    primary.qmp.event("QUORUM_REPORT_BAD", **{"node-name": "mcft-n-vda"})
    assert "disk error" in agent.note("verdict")["reason"]


def test_an_error_of_the_primarys_own_disk_ends_its_qemu(primary: GateLab) -> None:
    """The quorum told the guest that the write is done; only the standby's disk has it. So the standby goes on.

    Fails if the guest goes on here, on a disk without the write.
    """
    agent = protected(primary)
    out, inn = primary.ends(1)
    out.sendall(frame(b"x"))
    primary.qmp.event("QUORUM_REPORT_BAD", **{"node-name": "libvirt-1-storage", "error": "No space left on device"})
    note = agent.note("verdict")
    assert note["act"] == "died" and "the primary's own disk" in note["reason"] and "No space left" in note["reason"]
    until(lambda: (primary.peer.last.qemu, primary.peer.last.closed) == ("gone", True))
    assert arrived(inn) == b""


def test_an_error_of_the_primarys_own_disk_counts_while_it_is_muted_too(primary: GateLab) -> None:
    """The stream is over, but its replication node is still a child of the quorum, and swallows writes."""
    agent = protected(primary)
    primary.qmp.event("COLO_EXIT", reason="error")
    assert agent.note("verdict")["act"] == "break"
    primary.qmp.event("QUORUM_REPORT_BAD", **{"node-name": "mcft-r-vda", "error": "Input/output error"})
    agent.ask("status")
    assert primary.peer.next().qemu == "running"
    primary.qmp.event("QUORUM_REPORT_BAD", **{"node-name": "libvirt-1-storage", "error": "Input/output error"})
    until(lambda: primary.peer.last.qemu == "gone")


def test_a_primary_that_is_solo_leaves_its_disks_errors_to_the_guest(primary: GateLab) -> None:
    """A quorum with one child hides nothing: the guest's own policy has the word."""
    agent = protected(primary)
    primary.qmp.event("COLO_EXIT", reason="error")
    agent.note("verdict")
    agent.ask("update", record="solo")
    agent.ask("open", because="solo")
    primary.qmp.event("QUORUM_REPORT_BAD", **{"node-name": "libvirt-1-storage", "error": "Input/output error"})
    agent.ask("status")
    until(lambda: primary.peer.last.record == "solo")
    assert primary.peer.next().qemu == "running"


def test_silent_standby_with_an_overdue_stream(primary: GateLab) -> None:
    agent = protected(primary)
    primary.peer.talking = False
    note = agent.note("verdict")
    assert note["act"] == "break" and "silent on every link" in note["reason"]


def test_opening_needs_given_up_or_a_win(primary: GateLab) -> None:
    agent = protected(primary)
    out, inn = primary.ends(1)
    out.sendall(frame(b"x"))
    with pytest.raises(RuntimeError, match="given-up or a win"):
        agent.ask("open")
    with pytest.raises(RuntimeError, match="still holds"):
        agent.ask("detach")
    assert arrived(inn) == b""
    agent.ask("open", because="given-up")
    assert inn.recv(1000) == frame(b"x")
    agent.ask("detach")
    assert primary.qmp.objects == [] and primary.qmp.chardevs == ["charserial0"]


def test_what_was_held_for_long_is_said_before_the_guest_is_stopped_for_the_detach(primary: GateLab) -> None:
    """QEMU takes its time. Fails if the filters go meanwhile (what it has not taken is lost), or the guest stands for it."""
    agent = protected(primary)
    out, inn = primary.ends(1)
    out.sendall(frame(b"x"))
    agent.ask("open", because="given-up")
    with ThreadPoolExecutor() as pool:
        detached = pool.submit(agent.ask, "detach")
        primary.peer.next()
        assert not primary.qmp.sent("stop") and not primary.qmp.sent("object-del")
        assert inn.recv(1000) == frame(b"x")
        detached.result(10)
    assert primary.qmp.sent("stop") and primary.qmp.objects == []


def test_a_loss_before_anything_is_held_mutes_nobody(primary: GateLab) -> None:
    """The first copy breaks while all passes: nothing was promised. Fails if the taps go down over the whole undo, or if that
    gate would hold for a stream that is over."""
    agent = primary.start()
    agent.ask("attach")
    out, inn = primary.ends(1)
    primary.qmp.event("COLO_EXIT", reason="error")
    assert agent.note("verdict")["act"] == "break"
    assert agent.ask("status")["mode"] == "pass"
    out.sendall(frame(b"on it goes"))
    assert inn.recv(1000) == frame(b"on it goes")
    until(lambda: primary.qmp.sent("yank"), "the stream is broken")
    with pytest.raises(RuntimeError, match="over already"):
        agent.ask("hold")


def test_a_yank_closes_what_holds_and_nothing_that_passes(primary: GateLab) -> None:
    """An undo breaks the stream after the guest went on alone. Fails if it is muted for that: with its taps down, what was
    released and QEMU has not said yet is lost."""
    agent = protected(primary)
    out, inn = primary.ends(1)
    agent.ask("yank")
    assert agent.ask("status")["mode"] == "closed"
    out.sendall(frame(b"held"))
    agent.ask("open", because="given-up")
    agent.ask("yank")
    assert agent.ask("status")["mode"] == "pass"
    assert inn.recv(1000) == frame(b"held")
    out.sendall(frame(b"on it goes"))
    assert inn.recv(1000) == frame(b"on it goes")
    until(lambda: len(primary.qmp.sent("yank")) >= 2, "the stream is broken all the same")


def test_restarted_gate_releases_nothing_of_the_old_ones(primary: GateLab) -> None:
    agent = protected(primary)
    out, inn = primary.ends(1)
    out.sendall(frame(b"held by the dead one"))
    primary.qmp.event("STOP", "colo")
    until(lambda: primary.qmp.sent("query-status"))
    agent.status_when(lambda s: s["nics"][0]["held_packets"] == 1)
    primary.kill_gate()
    assert inn.recv(1000) == b"", "QEMU's end is closed, and nothing came before that"
    agent = primary.start()
    agent.status_when(lambda s: s["attached"] and "mcft-net0-2-in" in primary.qmp.objects)
    until(lambda: not [o for o in primary.qmp.objects if "-1-" in o], "the old pair is taken away")
    status = agent.ask("status")
    assert status["mode"] == "hold" and status["record"] == "protected"
    adds = {c["arguments"]["id"]: c["arguments"] for c in primary.qmp.sent("object-add")}
    assert adds["mcft-net0-2-in"]["position"] == "id=mcft-net0-1-out", "the new pair is in front of the old one"
    out, inn = primary.ends(2)
    out.sendall(frame(b"new"))
    agent.status_when(lambda s: s["lease"])
    primary.qmp.checkpoint()
    assert inn.recv(1000) == frame(b"new")


def test_gate_restarted_while_closed_stays_closed(primary: GateLab) -> None:
    agent = protected(primary)
    agent.ask("close", reason="test")
    primary.kill_gate()
    agent = primary.start()
    assert agent.ask("status")["closed"]
    until(lambda: primary.peer.last.closed)
    agent.status_when(lambda s: "mcft-net0-2-in" in primary.qmp.objects)
    out, inn = primary.ends(2)
    out.sendall(frame(b"x"))
    primary.qmp.event("STOP", "colo")
    primary.qmp.event("RESUME", "running")
    agent.ask("qmp", commands=[{"execute": "query-status"}])
    assert arrived(inn) == b""
    assert agent.ask("status")["acknowledged"] == 0


@pytest.mark.parametrize(("intended", "act", "word"), [(False, "died", "gone"), (True, "ended", "shutdown")])
def test_gate_restarted_over_a_dead_qemu_says_what_libvirt_heard(primary: GateLab, intended: bool, act: str, word: str) -> None:
    """Why it ended only libvirt has heard. Fails if "gone" is said before: the other side would raise a guest that shut down."""
    protected(primary)
    primary.kill_gate()
    primary.kill_qemu()
    agent = primary.start()
    agent.note("qemu-ended")
    until(lambda: primary.peer.last.qemu == "unknown")
    assert agent.ask("status")["verdict"] is None
    agent.post("last-words", destroyed=intended)
    assert agent.status_when(lambda s: s["verdict"])["verdict"]["act"] == act
    until(lambda: (primary.peer.last.qemu, primary.peer.last.closed) == (word, True))


def test_gate_restarted_over_a_dead_qemu_without_an_agent_says_so_by_itself(primary: GateLab) -> None:
    protected(primary)
    primary.kill_gate()
    primary.kill_qemu()
    agent = primary.start()
    assert agent.status_when(lambda s: s["verdict"])["verdict"]["act"] == "died"
    until(lambda: (primary.peer.last.qemu, primary.peer.last.closed) == ("gone", True))


def test_two_agents_at_once_and_one_after_the_other(primary: GateLab) -> None:
    one = protected(primary)
    two = primary.agent()
    assert two.ask("status")["record"] == "protected"
    one.close()
    primary.agents.remove(one)
    three = primary.agent()
    primary.qmp.event("COLO_EXIT", reason="error")
    assert two.note("verdict")["act"] == three.note("verdict")["act"] == "break"
    with pytest.raises(RuntimeError, match="knows no request"):
        three.ask("take")


def test_another_instances_agent_opens_nothing(primary: GateLab) -> None:
    """An agent that goes on with an older instance of the domain finds this gate by the uuid alone.

    Fails if its `solo` is taken for this one's: both hosts' guests would speak.
    """
    agent = protected(primary)
    with pytest.raises(RuntimeError, match="another instance"):
        agent.ask("open", because="solo", pid="0" * 32)
    assert primary.saved().mode == "hold"
    assert agent.ask("status", pid=primary.saved().pid)["record"] == "protected"


def test_qmp_of_the_agent_and_quit(primary: GateLab) -> None:
    agent = primary.start()
    commands = [{"execute": "query-status"}, {"execute": "cont"}]
    primary.qmp.answers["cont"] = RuntimeError("no")
    replies = agent.ask("qmp", commands=commands)
    assert replies[0]["return"]["status"] == "running" and replies[1]["error"]["desc"] == "no"
    assert agent.ask("quit") == {}
    assert primary.gate is not None and primary.gate.wait(10) == 0


def test_switch_hands_over_a_standing_guest(primary: GateLab) -> None:
    agent = protected(primary)
    ident = agent.post("switch")
    until(lambda: primary.qmp.sent("migrate-set-parameters"))
    out, inn = primary.ends(1)
    out.sendall(frame(b"last"))
    primary.qmp.event("STOP", "colo")
    until(lambda: primary.qmp.sent("query-status"), "no marker")
    primary.qmp.event("RESUME", "paused")  # what `query-status` will find behind the gate's own `stop`
    assert agent.answer(ident)["stopped"] is True
    assert inn.recv(1000) == frame(b"last")
    assert agent.ask("status")["closed"] and primary.saved().mode == "closed"


def test_qemu_that_dies_in_a_planned_switch_is_said_at_once(primary: GateLab) -> None:
    agent = protected(primary)
    agent.post("switch")
    until(lambda: primary.qmp.sent("migrate-set-parameters"))
    primary.kill_qemu()
    until(lambda: primary.peer.last.qemu == "gone")
    died_ms = boottime_ms()
    until(lambda: primary.peer.last.closed)
    assert boottime_ms() - died_ms < 3 * T


def test_keepalives_go_on_while_the_monitor_of_a_hung_qemu_is_connected_again(primary: GateLab) -> None:
    protected(primary)
    primary.qmp.mute = True
    primary.qmp.drop_client()
    before = boottime_ms()
    until(lambda: boottime_ms() > before + 3 * T and primary.peer.heard[-1].counter)
    count = len(primary.peer.heard)
    until(lambda: len(primary.peer.heard) > count + 3)
    gaps = [b - a for a, b in itertools.pairwise(t for t in primary.peer.heard_ms if t >= before)]
    assert max(gaps) < T, "the standby would take it for the primary's loss"


def test_a_stream_that_stands_makes_the_gate_ask(primary: GateLab) -> None:
    """Fails if nothing tells a QEMU that hangs from one whose checkpoints merely stopped."""
    protected(primary)
    asked = len(primary.qmp.sent("query-status"))
    until(lambda: len(primary.qmp.sent("query-status")) > asked + 3, "QEMU is asked although nothing happens")


def disk_error(age_ms: float) -> dict[str, Any]:
    seconds, micros = divmod(int((time.time() * 1000 - age_ms) * 1000), 1_000_000)
    stamp = {"seconds": seconds, "microseconds": micros}
    return {"event": "QUORUM_REPORT_BAD", "data": {"node-name": "mcft-n-vda", "type": "write"}, "timestamp": stamp}


def test_a_disk_error_that_the_dead_gate_missed_is_learnt_from_libvirt(primary: GateLab) -> None:
    """Fails if a copy that missed a write while the gate was away may still take over."""
    agent = protected(primary)
    primary.kill_gate()
    event = disk_error(age_ms=0)
    agent = primary.start()
    assert agent.ask("event", event=event) == {"missed": True}
    assert agent.note("verdict")["act"] == "break"
    assert agent.ask("status")["disk_error"]


def test_what_the_gate_saw_itself_is_not_told_again(primary: GateLab) -> None:
    """libvirt tells later: by then the stream may be over, and such errors are its end's, not the disk's."""
    agent = protected(primary)
    assert agent.ask("event", event=disk_error(age_ms=-5)) == {"missed": False}
    assert not agent.ask("status")["disk_error"]


# ---- standby ----


def test_a_standby_whose_load_is_late_is_woken_again_and_again(standby: GateLab) -> None:
    """Fails if QEMU's main loop may sleep on a request that has come, or if a hung one is asked without end."""
    standby.start()
    standby.qmp.event("RESUME", "running")
    until(lambda: len(standby.qmp.sent("query-status")) >= 2, "woken, and woken again")
    standby.qmp.hold_replies.add("query-status")
    standby.qmp.event("RESUME", "running")
    until(lambda: len(standby.qmp.sent("stop")) == 2)
    asked = len(standby.qmp.sent("query-status"))
    counter = standby.peer.session.peer_counter
    until(lambda: standby.peer.session.peer_counter > counter + 8)
    assert len(standby.qmp.sent("query-status")) <= asked + 1


def test_a_copy_that_took_over_is_not_woken(standby: GateLab) -> None:
    """Fails if the waking goes on behind a take-over: a guest of its own needs none."""
    agent = standby.start()
    agent.ask("update", record="taken")
    agent.ask("take", peer_closed=True)
    agent.ask("qmp", commands=[{"execute": "query-version"}])  # (a command is counted after its reply)
    asked = len(standby.qmp.sent("query-status"))
    counter = standby.peer.session.peer_counter
    until(lambda: standby.peer.session.peer_counter > counter + 8)
    assert len(standby.qmp.sent("query-status")) == asked


def test_standby_stops_the_guest_after_each_load(standby: GateLab) -> None:
    agent = standby.start()
    standby.qmp.event("RESUME", "running")
    until(lambda: len(standby.qmp.sent("stop")) == 1)
    standby.qmp.event("RESUME", "running")
    until(lambda: len(standby.qmp.sent("stop")) == 2)
    assert agent.status_when(lambda s: s["loads"] == 2)["last_load_age_ms"] < 10000
    until(lambda: standby.peer.last.loads == 2)


def test_standby_claims_at_silence_and_never_says_armed_again(standby: GateLab) -> None:
    agent = standby.start()
    until(lambda: standby.peer.last.record == "armed" and standby.peer.heard[-1].echo)
    standby.peer.talking = False
    note = agent.note("verdict")
    assert note["act"] == "claim" and "silent on every link" in note["reason"]
    until(lambda: standby.peer.last.claiming)
    count = len(standby.peer.heard)
    standby.peer.talking = True
    until(lambda: len(standby.peer.heard) > count + 10)
    assert all(h.word.claiming for h in standby.peer.heard[count:])
    assert standby.saved().claiming


def test_standby_claims_when_the_primarys_qemu_is_gone(standby: GateLab) -> None:
    agent = standby.start()
    until(lambda: standby.peer.last.record == "armed")
    standby.peer.word = Word("primary", 3, "protected", "gone", closed=True)
    assert agent.note("verdict")["act"] == "claim"


def test_silence_of_one_link_alone_is_no_claim() -> None:
    """The replication link is dead from the start and no load comes, but the peer talks on the other link."""
    with GateLab("standby", record="armed", mode="closed", buffer="none") as lab:
        lab.state.links.insert(0, LinkSpec("127.0.0.1", 0, "127.0.0.2", 9))
        save(lab.state_path, lab.state)
        agent = lab.start()
        until(lambda: lab.peer.last.record == "armed")
        status = agent.status_when(lambda s: s["stream_age_ms"] > 3 * T)
        assert status["verdict"] is None and status["alarm"] == "" and not lab.peer.next().claiming
        assert [row["age_ms"] is None for row in status["links"]] == [True, False]


def test_unarmed_standby_never_claims(standby: GateLab) -> None:
    agent = standby.start()
    agent.ask("update", record="preparing")
    until(lambda: standby.peer.last.record == "preparing")
    agent.status_when(lambda s: s["links"][0]["age_ms"] is not None)
    standby.peer.word = Word("primary", 3, "protected", "gone", closed=True)
    standby.peer.talking = False
    agent.status_when(lambda s: (s["links"][0]["age_ms"] or 0) > 2 * T and s["stream_age_ms"] > 2 * T)
    assert agent.ask("status")["verdict"] is None and not standby.peer.next().claiming


def test_copy_with_a_disk_error_alarms_and_never_claims(standby: GateLab) -> None:
    agent = standby.start()
    until(lambda: standby.peer.last.record == "armed")
    standby.qmp.event("BLOCK_IO_ERROR", **{"node-name": "vda"})
    assert "not whole" in agent.note("alarm")["reason"]
    standby.peer.word = Word("primary", 3, "protected", "gone", closed=True)
    agent.status_when(lambda s: s["peer"]["qemu"] == "gone")
    assert agent.ask("status")["verdict"] is None and not standby.peer.next().claiming


def test_a_stream_that_ended_while_the_primary_lives_leaves_no_whole_copy(standby: GateLab) -> None:
    """Seen in the lab with EIO from the copy's disk: COLO_EXIT and nothing else, memory loaded, the disk's part not.

    Fails if such a copy takes over when the primary is lost later.
    """
    agent = standby.start()
    until(lambda: standby.peer.last.record == "armed")
    standby.qmp.event("COLO_EXIT", reason="error")
    assert "half loaded" in agent.note("not-whole")["reason"]
    standby.peer.word = Word("primary", 3, "protected", "gone", closed=True)
    assert "not whole" in agent.note("alarm")["reason"]
    assert agent.ask("status")["verdict"] is None


def test_a_stream_that_ended_with_its_primary_leaves_a_whole_copy(standby: GateLab) -> None:
    """COLO_EXIT comes some ms before the keepalive that says why."""
    agent = standby.start()
    until(lambda: standby.peer.last.record == "armed")
    standby.qmp.event("COLO_EXIT", reason="error")
    heard = len(standby.peer.heard)
    until(lambda: len(standby.peer.heard) >= heard + 2)  # keepalives that still say "running" crossed meanwhile
    standby.peer.word = Word("primary", 3, "protected", "gone", closed=True)
    assert agent.note("verdict")["act"] == "claim"
    assert not agent.ask("status")["disk_error"]


@pytest.mark.parametrize("died", [False, True])
def test_a_stream_that_ended_here_leaves_no_whole_copy_though_the_primary_is_silent(died: bool) -> None:
    """No keepalive tells an error inside a load from the primary's death. The kernel does: who died has closed its end.

    Fails if `Standby.on_event` does not look at the stream's socket (seeds 20761 and 20936: a half loaded copy took over), or if
    a copy whose primary died does not claim.
    """
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as primarys,
        listener.accept()[0],
        GateLab("standby", record="armed", mode="closed", buffer="none", stream_port=listener.getsockname()[1]) as lab,
    ):
        agent = lab.start()
        until(lambda: lab.peer.last.record == "armed")
        if died:
            primarys.close()
        lab.qmp.event("COLO_EXIT", reason="error")
        if died:
            lab.peer.word = Word("primary", 3, "protected", "gone", closed=True)
            assert agent.note("verdict")["act"] == "claim" and not agent.ask("status")["disk_error"]
        else:
            assert "though the primary's end of it is open" in agent.note("not-whole")["reason"]
            lab.peer.word = Word("primary", 3, "protected", "gone", closed=True)
            assert "not whole" in agent.note("alarm")["reason"] and agent.ask("status")["verdict"] is None


def test_taking_needs_taken(standby: GateLab) -> None:
    agent = standby.start()
    agent.ask("claim")
    with pytest.raises(RuntimeError, match="taken"):
        agent.ask("take")
    assert not standby.qmp.sent("cont")


def take(lab: GateLab, agent: AgentEnd, **fields: Any) -> None:
    """Take over; QEMU says RESUME at `cont`, as it does once it runs again."""
    ident = agent.post("take", **fields)
    until(lambda: lab.qmp.sent("cont"), "no cont")
    lab.qmp.event("RESUME", "running")
    assert agent.answer(ident)["running"] is True


def test_the_lease_is_over_before_the_copy_runs(standby: GateLab) -> None:
    standby.qmp.status = "colo"
    agent = standby.start()
    until(lambda: standby.peer.last.record == "armed" and standby.peer.heard[-1].echo)
    agent.ask("claim")
    agent.ask("update", record="taken")
    take(standby, agent)
    assert standby.qmp.time_of("cont") >= standby.peer.armed_until_ms + T
    names = [c.get("execute") or c["exec-oob"] for c in standby.qmp.commands]
    order = [names.index(n) for n in ("yank", "nbd-server-stop", "stop", "x-colo-lost-heartbeat", "cont")]
    assert order == sorted(order), "every disk is flushed before the overlay is committed, and then it runs"
    standby.qmp.event("RESUME", "running")
    stops = len(standby.qmp.sent("stop"))
    agent.ask("qmp", commands=[{"execute": "query-status"}])
    assert len(standby.qmp.sent("stop")) == stops, "a guest that took over is not stopped at its RESUME"


def replication_over(node: str) -> list[dict[str, Any]]:
    """What QEMU says of its block graph: after the commit of an overlay, replication is over libvirt's own node."""
    return [{"node-name": "mcft-r-vda", "children": [{"child": "file", "node-name": node}]}]


def won_with_an_overlay(standby: GateLab, tmp_path: Path) -> tuple[AgentEnd, Path]:
    """taken(g) is durable; vda has an overlay that QEMU has not committed."""
    active = tmp_path / "active"
    active.write_text("x")
    state = standby.saved()
    state.overlays = {"vda": str(active)}
    save(standby.state_path, state)
    standby.qmp.status, standby.qmp.answers["query-named-block-nodes"] = "colo", replication_over("mcft-a-vda")
    agent = standby.start()
    until(lambda: standby.peer.last.record == "armed" and standby.peer.heard[-1].echo)
    agent.ask("claim")
    agent.ask("update", record="taken")
    assert not standby.qmp.sent("query-named-block-nodes")
    return agent, active


def test_an_overlay_that_qemu_has_committed_is_removed(standby: GateLab, tmp_path: Path) -> None:
    """QEMU resumes the copy by itself after a failover: it is stopped until the overlay is committed, and its name gone.

    Fails if the overlay stays (committing it again later would undo what the guest wrote since), goes before its time, or if
    the guest writes meanwhile.
    """
    agent, active = won_with_an_overlay(standby, tmp_path)
    ident = agent.post("take")
    until(lambda: standby.qmp.sent("query-named-block-nodes"))
    stops = len(standby.qmp.sent("stop"))
    standby.qmp.event("RESUME", "running")
    until(lambda: len(standby.qmp.sent("stop")) == stops + 1)
    asked = len(standby.qmp.sent("query-named-block-nodes"))
    until(lambda: len(standby.qmp.sent("query-named-block-nodes")) > asked + 1)
    assert active.exists() and not standby.qmp.sent("cont")
    standby.qmp.answers["query-named-block-nodes"] = replication_over("libvirt-1-storage")
    until(lambda: standby.qmp.sent("cont"))
    assert not active.exists() and not standby.saved().overlays
    standby.qmp.event("RESUME", "running")
    assert agent.answer(ident)["running"] is True


def test_a_commit_that_takes_long_is_not_waited_for(standby: GateLab, tmp_path: Path) -> None:
    """A slow disk, or one that fails: the guest runs after 2 s, and the overlay goes when it is committed, not before."""
    agent, active = won_with_an_overlay(standby, tmp_path)
    take(standby, agent)
    assert active.exists()
    standby.qmp.answers["query-named-block-nodes"] = replication_over("libvirt-1-storage")
    until(lambda: not active.exists())
    until(lambda: not standby.saved().overlays)


def test_closed_primary_need_not_be_waited_for(standby: GateLab) -> None:
    standby.qmp.status = "colo"
    agent = standby.start()
    until(lambda: standby.peer.last.record == "armed" and standby.peer.heard[-1].echo)
    standby.peer.word = Word("primary", 3, "protected", "gone", closed=True)
    agent.note("verdict")
    agent.ask("update", record="taken")
    began = boottime_ms()
    take(standby, agent)
    assert standby.qmp.time_of("cont") < began + T


def test_the_last_checkpoint_is_loaded_before_the_copy_runs(standby: GateLab) -> None:
    """A whole checkpoint may wait in the socket when its primary dies: QEMU loads it even after the yank.

    A `cont` before the end of that load ran a guest whose memory was then written over (seen in the lab: it rebooted).
    """
    standby.qmp.status, standby.qmp.says_exit = "colo", False
    agent = standby.start()
    until(lambda: standby.peer.last.record == "armed" and standby.peer.heard[-1].echo)
    agent.ask("claim")
    agent.ask("update", record="taken")
    ident = agent.post("take", peer_closed=True)
    until(lambda: standby.qmp.sent("yank"))
    standby.qmp.event("RESUME", "running")  # the load's end, as QEMU tells it: frozen once more
    until(lambda: standby.qmp.sent("stop"))
    agent.ask("status")
    assert not standby.qmp.sent("cont")
    standby.qmp.end_colo()
    until(lambda: standby.qmp.sent("cont"))
    standby.qmp.event("RESUME", "running")
    assert agent.answer(ident)["running"] is True


def test_a_missed_end_of_the_stream_is_asked_for(standby: GateLab) -> None:
    """A gate restarted in the middle missed COLO_EXIT: `query-colo-status` tells; until it does, nothing runs."""
    standby.qmp.status, standby.qmp.says_exit = "colo", False
    agent = standby.start()
    agent.ask("claim")
    agent.ask("update", record="taken")
    ident = agent.post("take", peer_closed=True)
    until(lambda: len(standby.qmp.sent("query-colo-status")) > 2)
    assert not standby.qmp.sent("cont")
    standby.qmp.colo_mode = "none"
    until(lambda: standby.qmp.sent("cont"))
    standby.qmp.event("RESUME", "running")
    assert agent.answer(ident)["running"] is True


def test_a_stream_that_ended_inside_a_checkpoint_while_the_gate_was_dead_leaves_no_whole_copy(standby: GateLab) -> None:
    """COLO_EXIT came while no gate looked, and QEMU still says `colo`: a load that failed looks just like that.

    Fails if `Standby._take` resumes such a copy.
    """
    standby.qmp.status, standby.qmp.says_exit = "colo", False
    standby.start()
    until(lambda: standby.peer.last.record == "armed")
    standby.kill_gate()
    agent = standby.start()
    agent.ask("claim")
    agent.ask("update", record="taken")
    with pytest.raises(RuntimeError, match="not whole"):
        agent.answer(agent.post("take", peer_closed=True))
    assert not standby.qmp.sent("cont") and agent.ask("status")["disk_error"]


def test_a_copy_that_is_going_is_left_alone(standby: GateLab) -> None:
    """SIGTERM has come (`virsh destroy`), and it may still be loading: no COLO_EXIT will tell that load's end.

    Fails if a take-over ends replication in it.
    """
    standby.qmp.says_exit = False
    agent = standby.start()
    agent.ask("claim")
    agent.ask("update", record="taken")
    standby.qmp.event("SHUTDOWN", "shutdown", guest=False, reason="host-signal")
    with pytest.raises(RuntimeError, match="QEMU is gone"):
        agent.ask("take", peer_closed=True)
    assert not standby.qmp.sent("x-colo-lost-heartbeat")


def test_restarted_standby_waits_t_after_its_start(standby: GateLab) -> None:
    """It does not know what its dead predecessor echoed last, and has heard nobody since."""
    standby.qmp.status = "colo"
    agent = standby.start()
    until(lambda: standby.peer.last.record == "armed" and standby.peer.heard[-1].echo)
    standby.kill_gate()
    standby.peer.talking = False
    agent = standby.start()
    agent.ask("claim")
    agent.ask("update", record="taken")
    take(standby, agent)
    # It connects right behind its start; half of T is for a busy machine in between.
    assert standby.qmp.time_of("cont") >= standby.qmp.connected_ms + T / 2


def test_standby_restarted_after_taken_waits_too(standby: GateLab) -> None:
    standby.qmp.status = "colo"
    agent = standby.start()
    until(lambda: standby.peer.last.record == "armed" and standby.peer.heard[-1].echo)
    agent.ask("claim")
    agent.ask("update", record="taken")
    standby.kill_gate()
    standby.peer.talking = False
    agent = standby.start()
    take(standby, agent)
    assert standby.qmp.time_of("cont") >= standby.qmp.connected_ms + T / 2


def test_gate_restarted_after_a_take_over_leaves_the_guest_alone(standby: GateLab) -> None:
    """The gate is upgraded or crashes while the overlays are committed; then an operator pauses and continues."""
    standby.qmp.status = "colo"
    agent = standby.start()
    agent.ask("claim")
    agent.ask("update", record="taken")
    take(standby, agent, peer_closed=True)
    standby.kill_gate()
    agent = standby.start()
    stops = len(standby.qmp.sent("stop"))
    standby.qmp.event("RESUME", "running")
    agent.ask("qmp", commands=[{"execute": "query-status"}])  # behind whatever the gate sent at the RESUME
    agent.ask("qmp", commands=[{"execute": "query-status"}])
    assert len(standby.qmp.sent("stop")) == stops


def test_restarted_following_standby_stops_a_guest_that_ran_ahead(standby: GateLab) -> None:
    standby.start()
    standby.kill_gate()
    standby.qmp.status = "running"
    standby.start()
    until(lambda: standby.qmp.sent("stop"), "the load that nobody saw is stopped")


def test_disk_error_survives_the_gate(standby: GateLab) -> None:
    agent = standby.start()
    standby.qmp.event("BLOCK_IO_ERROR", **{"node-name": "vda"})
    agent.note("alarm")
    standby.kill_gate()
    agent = standby.start()
    assert agent.ask("status")["disk_error"]


def test_giving_up_breaks_the_stream_first(standby: GateLab) -> None:
    agent = standby.start()
    assert agent.ask("break") == {"own_qemu": "running"}
    until(lambda: standby.qmp.sent("yank"))
    assert agent.ask("status")["stream_dead"]


def test_unclaim_watches_again(standby: GateLab) -> None:
    agent = standby.start()
    until(lambda: standby.peer.last.record == "armed")
    agent.ask("claim")
    until(lambda: standby.peer.last.claiming)
    agent.ask("unclaim")
    until(lambda: not standby.peer.last.claiming)
    standby.peer.word = Word("primary", 3, "protected", "gone", closed=True)
    assert agent.note("verdict")["act"] == "claim"


# ---- the lease, in a simulated network ----


class Clock:
    now = 0.0


class Lease(RuleBasedStateMachine):
    """The primary's lease (real `Session`, real `CommitGate`) and the standby's `earliest_ms` (real `Standby`).

    Datagrams are lost, late and doubled at will; either gate restarts at will. At no time may a lease that the primary
    holds, or could still get by a datagram that is under way, reach beyond what the standby would wait for.
    """

    @initialize()
    def start(self) -> None:
        Clock.now = 1000.0
        self.key, self.pid = bytes(32), bytes(16)
        self.state = GateState("u", "vm1", self.pid.hex(), 3, "standby", self.key.hex(), "", 1, 1, [], record="armed")
        self.to_standby: list[bytes] = []
        self.to_primary: list[bytes] = []
        self.restart_primary()
        self.restart_standby()

    def holds(self) -> None:
        """The safety property, and its reason: an expired lease comes before the earliest act."""
        earliest = self.standby.earliest_ms()
        for commit in self.commits:
            assert commit._lease_until_ms <= earliest, (
                f"a lease runs until {commit._lease_until_ms:.0f}, the standby may act from {earliest:.0f} on"
            )

    @rule()
    def restart_primary(self) -> None:
        """The old process is gone, so is its lease."""
        self.primary = Session(self.key, self.pid)
        self.commits = [CommitGate(LOSS_MS, LOSS_MS / 15)]

    @rule()
    def restart_standby(self) -> None:
        self.session = Session(self.key, self.pid)
        qemu = SimpleNamespace(monitor=SimpleNamespace(sock=None))
        gate = SimpleNamespace(state=self.state, session=self.session, persist=lambda: None, qemu=qemu)
        self.standby = Standby(cast(Gate, gate))
        self.standby.started()

    @rule(ms=st.sampled_from([1.0, 50.0, 110.0, 300.0]))
    def time_passes(self, ms: float) -> None:
        Clock.now += ms

    @rule()
    def primary_sends(self) -> None:
        self.to_standby.append(self.primary.next(Word("primary", 3, "protected", "running"), Clock.now))

    @rule()
    def standby_sends(self) -> None:
        self.standby.before_send(Clock.now)
        word = Word("standby", 3, self.state.record, "running", True, self.state.claiming)
        self.to_primary.append(self.session.next(word, Clock.now))

    @precondition(lambda self: self.to_standby)
    @rule(at=st.integers(0, 5), keep=st.booleans())
    def standby_hears(self, at: int, keep: bool) -> None:
        at %= len(self.to_standby)
        self.session.accept(self.to_standby[at], "l", Clock.now)
        if not keep:
            del self.to_standby[at]

    @precondition(lambda self: self.to_primary)
    @rule(at=st.integers(0, 5), keep=st.booleans())
    def primary_hears(self, at: int, keep: bool) -> None:
        at %= len(self.to_primary)
        heard = self.primary.accept(self.to_primary[at], "l", Clock.now)
        if not keep:
            del self.to_primary[at]
        if heard is None:
            return
        if heard.word.record != "armed" or heard.word.claiming:
            self.commits[0].lease_withdrawn()
        elif heard.echo and (sent := self.primary.sent_ms(heard.echo)) is not None:
            self.commits[0].lease_renewed(sent, Clock.now)
        self.holds()

    @rule()
    def both_talk(self) -> None:
        """A whole exchange in both directions, so that the search has proven peers to begin with."""
        self.primary_sends()
        self.standby_hears(len(self.to_standby) - 1, False)
        self.standby_sends()
        self.primary_hears(len(self.to_primary) - 1, False)

    @rule()
    def claim_and_take(self) -> None:
        self.state.claiming, self.state.record = True, "taken"
        self.holds()


Lease.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@pytest.mark.usefixtures("simulated_time")
class TestLease(Lease.TestCase):  # type: ignore[misc, name-defined]
    """See `Lease`."""


@pytest.fixture
def simulated_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby_module, "boottime_ms", lambda: Clock.now)


# ---- the LAN ----


def echo_reply(sequence: int) -> bytes:
    """As a raw socket shows it: the IP header first."""
    request = lan_module.echo_request(lan_module._IDENT, sequence)
    return b"\x45" + bytes(19) + b"\0" + request[1:]


class FakeRaw:
    """A FAKE raw socket with replies that wait in it."""

    def __init__(self) -> None:
        self.waiting: list[bytes] = []
        self.sent: list[tuple[bytes, str]] = []

    def sendto(self, packet: bytes, to: tuple[str, int]) -> None:
        self.sent.append((packet, to[0]))

    def recvfrom(self, _size: int) -> tuple[bytes, tuple[str, int]]:
        if not self.waiting:
            raise BlockingIOError
        return self.waiting.pop(0), ("10.0.0.1", 0)


def lan_check() -> tuple[lan_module.LanCheck, FakeRaw]:
    raw = FakeRaw()
    loop = Loop(lambda _wanted, _done: None)
    return lan_module.LanCheck(loop, ["10.0.0.1"], _sock=cast(Any, raw)), raw


def test_a_lan_that_is_away_is_known_before_it_is_needed() -> None:
    """Asked once a second. Fails if one lost answer counts, a LAN that is back stays away, or a stall of ours is its silence."""
    lan, raw = lan_check()
    now = boottime_ms()
    for second in range(5):
        lan.in_peace(now + 1000 * second)
        lan.in_peace(now + 1000 * second + 500)
    assert len(raw.sent) == 5 and not lan.away
    lan.in_peace(now + 5000)
    assert "own LAN is away: no answer from 10.0.0.1" in lan.away
    lan.forget()
    lan.in_peace(now + 60_000)
    assert lan.away, "a stall of ours does not bring it back"
    raw.waiting.append(echo_reply(lan._sequence))
    lan._answered()
    lan.in_peace(now + 61_000)
    assert not lan.away
    lan.in_peace(now + 200_000)
    assert not lan.away, "what was not asked meanwhile is no silence"


def test_an_answer_of_before_the_loss_is_none() -> None:
    """The LAN answered a question of peace, then this host was cut off. Fails if it may take over by that answer."""
    lan, raw = lan_check()
    lan.in_peace(boottime_ms())
    raw.waiting.append(echo_reply(lan._sequence))
    lan._answered()
    now = boottime_ms()
    assert not lan.ok(now, 300.0)
    lan.ask(now + 100.0)
    late = echo_reply(lan._sequence)
    lan.peer_spoke()
    raw.waiting.append(late)
    lan._answered()
    assert not lan.ok(boottime_ms(), 300.0), "asked in a silence that was none"
    lan.ask(now + 200.0)
    raw.waiting.append(echo_reply(lan._sequence))
    lan._answered()
    assert lan.ok(boottime_ms(), 300.0)


def test_lan_must_have_answered_since_the_peer_fell_silent() -> None:
    lan, raw = lan_check()
    now = boottime_ms()
    assert not lan.ok(now, 100.0)
    lan.ask(now)
    lan.ask(now + 1)
    assert len(raw.sent) == 1, "at most every 25 ms"
    raw.waiting = [echo_reply(1)]
    lan._answered()
    assert lan.ok(boottime_ms(), 100.0)
    assert not lan.ok(boottime_ms() + 500.0, 100.0), "an answer of before the silence"


def test_answers_that_waited_through_our_stall_do_not_count() -> None:
    lan, raw = lan_check()
    lan.ask(boottime_ms())
    raw.waiting = [echo_reply(1)]  # came while we slept; the LAN may have gone since
    woke_ms = boottime_ms()
    lan.forget()
    lan._answered()
    now = boottime_ms()
    assert not lan.ok(now, now - woke_ms), "the silence starts anew, and nothing was asked since"


# ---- the loop, and the gate's commands when the monitor is gone ----


def test_a_turn_waits_no_longer_than_until_the_next_loss_by_time() -> None:
    """Fails if a silence that has lasted T is noticed by the next keepalive only."""
    now_ms, latest = boottime_ms(), [float("inf")]
    loop = Loop(lambda _wanted, _done: None, lambda: latest[0])
    assert loop.timeout_ms() == 1000.0
    loop.after(500.0, lambda: None)
    assert 400.0 < loop.timeout_ms() <= 500.0
    latest[0] = now_ms + 300.0
    assert loop.timeout_ms() <= 300.0
    latest[0] = now_ms - 1.0
    assert loop.timeout_ms() == 0.0


def test_when_silence_and_a_missing_load_count_for_more(standby: GateLab) -> None:
    state = structs.replace(standby.state, record="armed", links=[], delay_ms=100)
    gate = Gate(state, str(standby.run_dir), Standby)
    now_ms = boottime_ms()
    assert now_ms < gate.loop.latest_ms() <= now_ms + T + 0.1, "T of silence comes before delay + T without a load"
    gate.silence._floor_ms = now_ms - T - 1.0
    assert now_ms + T < gate.loop.latest_ms() <= now_ms + state.delay_ms + T + 0.1
    gate.side._load_ms = now_ms - state.delay_ms - T - 1.0  # type: ignore[attr-defined]
    assert gate.loop.latest_ms() == float("inf"), "nothing more comes by time alone: no turn after turn for it"
    state.record = "preparing"
    gate.side._load_ms = now_ms  # type: ignore[attr-defined]
    assert gate.loop.latest_ms() <= now_ms + state.delay_ms + T + 0.1


def test_tasks_wait_for_replies_and_conditions() -> None:
    sent: list[Any] = []
    loop = Loop(lambda wanted, done: sent.append((wanted, done)))
    log: list[Any] = []
    state = {"ready": False}

    def task() -> Any:
        log.append((yield Commands([("stop", {})])))
        log.append((yield Until(lambda: state["ready"], boottime_ms() + 10000)))
        log.append((yield Until(lambda: False, boottime_ms() - 1)))

    loop.spawn(task())
    assert sent[0][0].commands == [("stop", {})] and log == []
    sent[0][1]([{"return": {}}])
    loop.turn(lambda _now: None)
    assert log == [[{"return": {}}]]
    state["ready"] = True
    loop.turn(lambda _now: None)
    loop.turn(lambda _now: None)
    assert log == [[{"return": {}}], True, False]


def test_each_task_goes_on_once_when_the_monitor_is_gone(tmp_path: Path) -> None:
    """QEMU died, the loop has not noticed yet: a task's commands fail, and then the monitor closes."""
    qmp = FakeQmp(tmp_path / "qmp")
    monitor = Monitor(qmp.path)
    monitor.connect(10.0)
    own = SimpleNamespace(monitor=monitor, _watch_monitor=lambda: None)
    assert monitor.sock is not None
    until(lambda: qmp.connections == 1)
    monitor.sock.close()
    log: list[Any] = []
    OwnQemu.send(cast(OwnQemu, own), Commands([("stop", {}), ("cont", {})]), log.append)
    monitor.close()
    qmp.close()
    assert len(log) == 1


def test_process_start_tells_a_pid_that_was_reused() -> None:
    import os
    import subprocess

    start = process_start(os.getpid())
    assert start is not None and process_start(os.getpid()) == start
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert process_start(gone.pid) is None


def test_a_gate_imports_what_its_side_needs() -> None:
    """While one is dead every packet is held. Fails if colo's pays for engine mc (asyncio with it), which doubles its start."""
    code = (
        "import sys; from mcft.gate.__main__ import _side; from mcft.gate.state import GateState\n"
        "_side(GateState('u', 'vm1', 'p', 1, 'primary', 'k', '', 1, 1, [])); print([*sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not [name for name in ("asyncio", "aiohttp", "libvirt", "rich", "mcft.engines.mc") if f"'{name}'" in loaded]


def test_plug_imports_what_it_needs_of_pyroute2() -> None:
    """Fails if the whole of it is imported (0.16 s), or if who wants the whole afterwards does not get it."""
    code = (
        "import sys; import mcft.gate.plug; few = len(sys.modules); assert 'pyroute2.ndb' not in sys.modules\n"
        "from pyroute2 import IPRoute; from pyroute2.netlink.rtnl.tcmsg import tcmsg; from mcft import plugwire\n"
        "assert tcmsg is plugwire.tcmsg and few < len(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
