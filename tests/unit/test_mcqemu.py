"""The parts of the stand-in for the micro-checkpointing QEMU that need no QEMU: its command line, and the trace check itself."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "mcqemu"))
import commandline
import compare
import surface

RUNS = sorted(path.name.removesuffix(".jsonl.xz") for path in compare.RECORDED.glob("*.jsonl.xz"))
PLAIN = "13-dst-kill"


def test_a_probe_is_passed_through() -> None:
    """Fails if libvirt's probing of the emulator is stood in for: it would see no QEMU that it accepts."""
    for probe in (["-S", "-machine", "none,accel=tcg", "-qmp", "unix:/x,server=on,wait=off", "-daemonize"], ["-version"]):
        line = commandline.read(probe)
        assert line.arguments == probe and not line.monitored


def test_libvirts_monitor_is_taken_and_replaced() -> None:
    """Fails if QEMU keeps the socket that libvirt talks to, or another descriptor is lost on the way."""
    words = "-name guest=vm1,debug-threads=on -S -chardev socket,id=charmonitor,fd=27,server=on,wait=off"
    words += " -mon chardev=charmonitor,id=monitor,mode=control -no-shutdown -netdev tap,fd=29,id=hostnet0 -incoming defer"
    line = commandline.read(words.split())
    assert (line.fds, line.paths, line.incoming, line.name) == ([27], [], "defer", "vm1")
    assert not line.autostart and line.stays
    assert line.arguments == words.replace("fd=27,server=on,wait=off", "fd=@MONITOR@").split()


def test_a_plain_monitor_and_uri() -> None:
    """Fails if a standby started without -S would be started by QEMU itself, or QEMU listens before the capabilities are set."""
    line = commandline.read(["-qmp", "unix:/a,server,nowait", "-incoming", "tcp:0:1"])
    assert line.paths == ["/a"] and line.incoming == "tcp:0:1" and line.autostart
    assert "tcp:0:1" not in line.arguments and "-S" in line.arguments and "charmonitor" in " ".join(line.arguments)


def test_capabilities_are_set_as_a_whole() -> None:
    """Fails if the good half of a list with a bad capability is taken."""
    rows = [{"capability": "mc", "state": True}, {"capability": "mc-foo", "state": True}]
    assert surface.capabilities_asked({"capabilities": rows}) == "Invalid parameter 'mc-foo'"
    assert surface.capabilities_asked({"capabilities": rows[:1]}) == {"mc": True}


@pytest.mark.parametrize("name", RUNS)
def test_recorded_runs_keep_the_rules(name: str) -> None:
    """Fails if the trace check asks of the stand-in what the real QEMU did not keep itself."""
    assert compare.broken_rules(compare.recorded(name)) == []


@pytest.mark.parametrize("name", RUNS)
def test_a_run_equals_itself(name: str) -> None:
    """Fails if the shape depends on anything but the lines."""
    assert compare.differences(compare.recorded(name), compare.recorded(name)) == []


def events(rows: list[compare.Row], name: str) -> list[int]:
    return [n for n, row in enumerate(rows) if row.get("dir") == "in" and row["msg"].get("event") == name]


def described(rows: list[compare.Row]) -> list[compare.Row]:
    return [row for row in rows if row.get("dir") == "in" and "mc" in (row["msg"].get("return") or [])]


DRIFTS = ["a stop more", "no resume", "resume twice", "counter ahead", "counter back", "migration", "field"]


@pytest.mark.parametrize("what", DRIFTS)
def test_drift_is_noticed(what: str) -> None:
    """Fails if the trace check lets one of these pass."""
    real = compare.recorded(PLAIN)
    rows = copy.deepcopy(real)
    resumes = events(rows, "RESUME")
    if what == "a stop more":
        rows.insert(resumes[5], copy.deepcopy(rows[events(rows, "STOP")[0]]))
    elif what == "no resume":
        del rows[resumes[5]]
    elif what == "resume twice":
        rows.insert(resumes[5], copy.deepcopy(rows[resumes[5]]))
    elif what == "counter ahead":
        described(rows)[20]["msg"]["return"]["mc"]["checkpoints"] += 2
    elif what == "counter back":
        described(rows)[20]["msg"]["return"]["mc"]["checkpoints"] -= 2
    elif what == "migration":
        rows[resumes[0]]["msg"]["event"] = "MIGRATION"
    elif what == "field":
        for row in described(rows):
            del row["msg"]["return"]["mc"]["copy-mbps"]
    assert compare.differences(rows, real)


@pytest.mark.parametrize("what", ["answered", "error", "state", "status", "exit"])
def test_another_ending_is_noticed(what: str) -> None:
    """Fails if the trace check lets one of these pass."""
    name = {"answered": "01-basic-tcp", "error": "11-commands-during-mc", "exit": "02b-delay-zero-running"}.get(what, PLAIN)
    real = compare.recorded(name)
    rows = copy.deepcopy(real)
    for row in rows:
        said = row.get("msg")
        if what == "answered" and row.get("dir") == "mark" and str(said).startswith("no reply"):
            row["dir"] = "log"
        elif what == "error" and row.get("dir") == "in" and "error" in said:
            said["error"]["desc"] = "busy"
        elif what == "state" and row.get("dir") == "in" and (said.get("return") or {}) and "singlestep" in said["return"]:
            said["return"]["status"] = "paused"
        elif what == "status" and said == {"return": {"status": "failed"}}:
            said["return"]["status"] = "completed"
        elif what == "exit" and row.get("exit") == -8:
            row["exit"] = 0
    assert rows != real and compare.differences(rows, real)
