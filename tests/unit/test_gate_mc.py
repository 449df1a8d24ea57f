"""The gate with engine `mc`: its real process; a FAKE agent carries its commands to a FAKE QEMU, on the control socket."""

from __future__ import annotations

import json
import lzma
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from gatelab import NIC, PATIENCE_S, ROOT, UUID, AgentEnd, GateLab, changed, until

from mcft import sockbreak
from mcft.gate.announce import frame
from mcft.gate.qemu import LAST_WORDS_MS
from mcft.gate.state import save
from mcft.keepalive import Word


class McAgent:
    """A FAKE agent and QEMU in one: answers the gate's commands in a thread; `capture`, `acknowledge` are what QEMU does."""

    def __init__(self, path: str) -> None:
        self.end = AgentEnd(path)
        self.asked: list[str] = []
        self.acks, self.status = 0, "running"
        self.migration: dict[str, Any] = {"status": "checkpointing"}
        self.silent = False
        self._lock = threading.Lock()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        try:
            for line in self.end.file:
                message = json.loads(line)
                if message.get("note") == "command":
                    self._command(message)
        except (OSError, ValueError):
            return

    def _command(self, note: dict[str, Any]) -> None:
        with self._lock:
            self.asked.append(note["execute"])
            reply: dict[str, Any] = {"return": {}}
            if note["execute"] == "query-migrate":
                reply = {"return": dict(self.migration)}
                if self.migration["status"] == "checkpointing":
                    reply["return"]["mc"] = {"checkpoints": max(0, self.acks - 1), "xmit-time": 3}
            elif note["execute"] == "query-status":
                reply = {"return": {"status": self.status}}
            elif note["execute"] == "cont":
                self.status = "running"
            if not self.silent:
                self.end.post("reply", n=note["n"], reply=reply)
        changed()

    def event(self, name: str, **data: Any) -> None:
        now = time.time()
        stamp = {"seconds": int(now), "microseconds": int(now % 1 * 1e6)}
        self.end.post("event", event={"event": name, "data": data, "timestamp": stamp})

    def checkpoint(self) -> None:
        self.event("RESUME")
        with self._lock:
            self.acks += 1


class McLab(GateLab):
    """`GateLab` without a monitor: the gate is ready before an agent is there."""

    def __init__(self, role: str, **state: Any) -> None:
        super().__init__(role, engine="mc", **state)
        self.state.monitor = ""
        save(self.state_path, self.state)

    def start(self) -> AgentEnd:
        address = self.run_dir / "notify"
        address.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            ready.bind(str(address))
            ready.settimeout(PATIENCE_S)
            environment = {**os.environ, "MCFT_RUN_DIR": str(self.run_dir), "NOTIFY_SOCKET": str(address)}
            self.gate = subprocess.Popen([sys.executable, "-m", "mcft.gate", UUID], cwd=ROOT, env=environment)
            assert b"READY" in ready.recv(100)
        self.mc = McAgent(self.socket_path)
        return self.agent()


@pytest.fixture
def primary() -> Iterator[McLab]:
    with McLab("primary", nics=[NIC], buffer="none", delay_ms=50.0) as lab:
        yield lab
        lab.mc.end.sock.close()


@pytest.fixture
def standby() -> Iterator[McLab]:
    with McLab("standby", record="armed", mode="closed", buffer="none") as lab:
        yield lab
        lab.mc.end.sock.close()


def protected(lab: McLab) -> AgentEnd:
    agent = lab.start()
    agent.ask("hold")
    agent.ask("update", record="protected")
    agent.status_when(lambda s: s["lease"])
    return agent


def test_an_epoch_leaves_two_acknowledgements_later(primary: McLab) -> None:
    agent = protected(primary)
    primary.mc.checkpoint()
    agent.status_when(lambda s: s["mc"]["checkpoints"] == 0)
    assert agent.ask("status")["acknowledged"] == 0
    for _ in range(4):
        before = primary.mc.acks
        primary.mc.checkpoint()
        agent.status_when(lambda s, n=before: s["mc"]["checkpoints"] == n)
    status = agent.status_when(lambda s: s["acknowledged"] >= 1)
    assert status["released_epochs"] >= 1 and status["rule"] == "counter" and status["mc"]["xmit-time"] == 3
    until(lambda: primary.peer.last.acks >= 1, "the keepalive does not say it")


def test_nothing_is_released_while_nothing_is_acknowledged(primary: McLab) -> None:
    agent = protected(primary)
    for _ in range(5):
        primary.mc.event("RESUME")
    agent.status_when(lambda s: s["mc"]["resumes"] == 5 and s["mc"]["polls"] > 10)
    assert agent.ask("status")["released_epochs"] == 0


def test_a_failed_migration_closes(primary: McLab) -> None:
    agent = protected(primary)
    primary.mc.checkpoint()
    primary.mc.migration = {"status": "failed"}
    primary.mc.event("RESUME")
    status = agent.status_when(lambda s: s["verdict"])
    assert status["verdict"]["act"] == "break" and status["closed"] and "failed" in status["stream_dead"]


def test_without_its_agent_it_is_blind_and_decides_nothing(primary: McLab) -> None:
    """Fails if the time without an agent counts as a silent monitor or as a stream without progress."""
    agent = protected(primary)
    primary.mc.checkpoint()
    agent.status_when(lambda s: s["mc"]["checkpoints"] is not None)
    primary.mc.end.file.close()
    primary.mc.end.sock.shutdown(socket.SHUT_RDWR)
    agent.sock.shutdown(socket.SHUT_RDWR)
    time.sleep(0.3)  # nothing is waited for: nothing must happen
    status = primary.agent().ask("status")
    assert status["verdict"] is None and not status["closed"]
    assert status["stream_age_ms"] < 200


def test_a_power_off_whose_event_comes_late_is_no_death(primary: McLab) -> None:
    """That QEMU aborts behind its SHUTDOWN; libvirt's event may come after its end was seen."""
    agent = protected(primary)
    primary.kill_qemu()
    agent.note("qemu-ended")
    primary.mc.event("SHUTDOWN")
    primary.mc.end.post("last-words")
    assert agent.status_when(lambda s: s["verdict"])["verdict"]["act"] == "ended"


def test_a_death_without_a_word_is_one(primary: McLab) -> None:
    agent = protected(primary)
    primary.kill_qemu()
    primary.mc.end.post("last-words")
    assert agent.status_when(lambda s: s["verdict"])["verdict"]["act"] == "died"


STOPPED = {0: "Shutdown", 1: "Destroyed", 5: "Failed"}  # VIR_DOMAIN_EVENT_STOPPED_*
EVENTS = {4: "Resumed", 5: "Stopped", 6: "Shutdown"}  # VIR_DOMAIN_EVENT_*


def words_of_an_end(name: str) -> list[tuple[float, str, str]]:
    """(seconds after the standby saw its stream end, event, detail) of what libvirt said of the source, in a recorded run."""
    with lzma.open(ROOT / "tests" / "replay" / "transcripts" / f"{name}.jsonl.xz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    said: list[tuple[float, str, str, str]] = []
    for text in (row["msg"] for row in rows if row.get("dir") in ("libvirt-event", "client")):
        if found := re.match(r".* (\d+):(\d+):([\d.]+)\+0000: event 'lifecycle' for domain '(\w+)': (\w+) (\w+)", text):
            hour, minute, second, *words = found.groups()
            said.append((int(hour) * 3600 + int(minute) * 60 + float(second), *words))
        elif found := re.match(r"EV \(([\d.]+), '(\w+)', 'lifecycle', (\d), (\d)\)", text):  # 70, 71: in libvirt's numbers
            at, who, event, detail = found.groups()
            said.append((float(at), who, EVENTS.get(int(event), ""), STOPPED.get(int(detail), "")))
    ended = max(at for at, who, event, _ in said if (who, event) == ("dst", "Resumed"))
    return [(at - ended, event, detail) for at, who, event, detail in said if who == "src" and event in ("Shutdown", "Stopped")]


@pytest.mark.parametrize(
    ("name", "act"),
    [
        ("62-libvirt-events-src-kill", "died"), ("64-libvirt-destroy-src", "ended"),
        ("65-libvirt-monitor-call-to-dst-blocks", "died"), ("67-libvirt-guest-poweroff", "ended"),
        ("69-libvirt-src-qemu-sigstop", "ended"), ("70-libvirt-client11-unix", "ended"), ("71-libvirt-client11-tcp", "ended"),
    ],
)  # fmt: skip
def test_what_libvirt_said_of_an_end(primary: McLab, name: str, act: str) -> None:
    """libvirt 7.0's own words, in their order, behind QEMU's end. 69: a stopped QEMU, destroyed, has none of its own.

    Fails if the gate does not wait as long as libvirt took, or does not hear `destroyed`.
    """
    words = words_of_an_end(name)
    assert [event for _, event, _ in words][-1] == "Stopped" and words[-1][0] * 1000 < LAST_WORDS_MS
    agent = protected(primary)
    primary.kill_qemu()
    agent.note("qemu-ended")
    for _, event, detail in words:
        assert agent.ask("status")["verdict"] is None
        if event == "Shutdown":
            primary.mc.event("SHUTDOWN")
        else:
            primary.mc.end.post("last-words", destroyed=detail == "Destroyed")
    assert agent.status_when(lambda s: s["verdict"])["verdict"]["act"] == act


def test_a_destroyed_domain_is_none_although_its_shutdown_never_came(primary: McLab) -> None:
    """`virsh destroy` of a QEMU that hangs ends with SIGKILL: libvirt's own word is all there is. Its order does not matter."""
    agent = protected(primary)
    primary.mc.end.post("last-words", destroyed=True)
    primary.kill_qemu()
    assert agent.status_when(lambda s: s["verdict"])["verdict"]["act"] == "ended"


def test_libvirts_word_is_waited_for(primary: McLab) -> None:
    """Recorded under libvirt 7.0 (64, 70, 71): SHUTDOWN and `destroyed` 1.6 s after the standby saw its stream end.

    Fails if a death is believed before that: the standby would take over what its operator has destroyed.
    """
    agent = protected(primary)
    primary.kill_qemu()
    agent.note("qemu-ended")
    time.sleep(0.8)
    status = agent.ask("status")
    assert status["own_qemu"] == "running" and status["verdict"] is None
    primary.mc.event("SHUTDOWN")
    primary.mc.end.post("last-words", destroyed=True)
    assert agent.status_when(lambda s: s["verdict"])["verdict"]["act"] == "ended"


def test_an_agent_that_leaves_meanwhile_has_no_word(primary: McLab) -> None:
    agent = protected(primary)
    primary.kill_qemu()
    agent.note("qemu-ended")
    for end in (agent, primary.mc.end):
        end.sock.shutdown(socket.SHUT_RDWR)
    assert primary.agent().status_when(lambda s: s["verdict"])["verdict"]["act"] == "died"


def test_a_planned_switch_closes_behind_a_release(primary: McLab) -> None:
    agent = protected(primary)
    ident = agent.post("switch")

    def closed(status: dict[str, Any]) -> bool:
        primary.mc.checkpoint()
        time.sleep(0.02)  # QEMU's own pace
        return bool(status["closed"])

    primary.agent().status_when(closed)
    assert agent.answer(ident)["acknowledged"] >= 1
    assert agent.ask("status")["closed"]


def test_a_standby_that_follows_is_asked_nothing(standby: McLab) -> None:
    """Not at its start, not late, not at the gate's restart. Fails if any command is sent before taken(g)."""
    agent = standby.start()
    standby.peer.word = Word("primary", 3, "protected", "running", False, acks=7)
    agent.status_when(lambda s: s["loads"] == 7)
    standby.kill_gate()
    agent = standby.start()
    time.sleep(0.4)  # nothing is waited for: nothing must happen
    assert standby.mc.asked == []


def test_take_over_awaits_paused_and_resumes(standby: McLab) -> None:
    agent = standby.start()
    standby.mc.status = "inmigrate"
    agent.ask("claim")
    agent.ask("update", record="taken")
    ident = agent.post("take", peer_closed=True)
    until(lambda: standby.mc.asked.count("query-status") >= 2, "paused is awaited")
    assert "cont" not in standby.mc.asked
    standby.mc.status = "paused"
    assert agent.answer(ident)["running"]
    assert standby.mc.asked.count("cont") == 1 and standby.mc.asked[-1] == "query-status"


def test_silence_alone_is_a_claim(standby: McLab) -> None:
    """Its stream can't be seen: fails if it waits for an overdue checkpoint at a long delay."""
    agent = standby.start()
    agent.ask("update", record="armed", delay_ms=10_000.0)
    agent.status_when(lambda s: s["peer"]["record"] == "protected")
    standby.peer.talking = False
    assert agent.status_when(lambda s: s["verdict"])["verdict"]["act"] == "claim"


@pytest.mark.skipif(os.geteuid() != 0 or bool(sockbreak.why_not()), reason="root, and a kernel with CONFIG_INET_DIAG_DESTROY")
def test_a_stream_is_broken_from_outside() -> None:
    """A child in recv, as a deaf standby is. Fails if another connection of the same port's peer is broken too."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = "import socket,sys; s=socket.create_connection(('127.0.0.1',int(sys.argv[1]))); s.recv(1)"
        child = subprocess.Popen([sys.executable, "-c", code, str(port)], stderr=subprocess.PIPE)
        far, _ = server.accept()
        with far, socket.create_connection(("127.0.0.1", port)) as mine, server.accept()[0]:
            assert sockbreak.break_stream(child.pid, port) == 1
            assert b"ConnectionAbortedError" in child.communicate(timeout=PATIENCE_S)[1]
            assert sockbreak.break_stream(child.pid, port) == 0
            mine.settimeout(0.05)
            with pytest.raises(TimeoutError):
                mine.recv(1)


def test_the_announcement_is_a_rarp_in_the_guests_name() -> None:
    sent = frame("52:54:00:00:00:10")
    assert len(sent) == 60 and sent[:6] == b"\xff" * 6 and sent[6:12] == bytes.fromhex("525400000010")
    assert sent[12:14] == b"\x80\x35" and sent[20:22] == b"\x00\x03"
