"""The command line against a fake agent: what is asked, what is printed, and every exit code."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import fake_agent
import msgspec
import pytest
from fake_agent import HOLD, PROTECTED, FakeAgent, changed, job, status

from mcft import api, cli, errors

ROOT = Path(__file__).parents[2]


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAgent]:
    monkeypatch.setenv("MCFT_SOCKET", str(tmp_path / "s"))
    with fake_agent.on_socket(tmp_path / "s") as fake:
        yield fake


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: exit code, stdout, stderr."""

    def runner(*args: str) -> tuple[int, str, str]:
        try:
            code = cli.main(list(args))
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return runner


# ---- check ----


@pytest.mark.parametrize("code", [0, 4, 5])
def test_check_asks_what_protect_would_and_exits_as_it_would(agent: FakeAgent, run: Run, code: int) -> None:
    found = [api.Finding("warning", "arbiter", "if host2 dies")]
    if code:
        found.append(api.Finding("refusal", "x", "no", exit_code=code))
    agent.say("POST /v1/check", api.Check("host1", "vm1", "u", "host2", code, found))
    exit_code, out, err = run("check", "vm1", "--to", "host2", "--disk", "vda=/a", "--delay", "50ms")
    assert (exit_code, err) == (code, "")
    assert ("would be refused" if code else "would go") in out and "if host2 dies" in out
    _, _, body = agent.asked[0]
    assert (body["domain"], body["to"], body["delay_ms"], body["disks"]) == ("vm1", "host2", 50, {"vda": "/a"})
    exit_code, out, _ = run("check", "vm1", "--to", "host2", "--json")
    assert exit_code == code and json.loads(out)["findings"][0]["code"] == "arbiter"


def test_check_of_what_nobody_has(agent: FakeAgent, run: Run) -> None:
    agent.refuse("POST /v1/check", errors.NotFound("no-such-domain", "no domain 'vm9'"), 404)
    code, out, err = run("check", "vm9", "--to", "host2")
    assert (code, out) == (3, "") and "vm9" in err
    assert run("check", "vm1", "--to", "host2", "--disk", "vda")[0] == 2
    assert run("check", "vm1")[0] == 2


# ---- protect ----


def test_protect_waits_shows_steps_and_says_what_the_arbiter_means(agent: FakeAgent, run: Run) -> None:
    agent.say("POST /v1/protections", job(step="check")).say("GET /v1/status", status(PROTECTED))
    agent.say("GET /v1/jobs/j1", job(step="copy", progress=0.5), job("done", result="vm1 is protected"))
    code, out, err = run(
        "protect", "vm1", "--to", "host2", "--delay", "50ms", "--engine", "colo", "--netbuffer", "plug",
        "--disk", "vda=/a", "--disk", "vdb=/b=c", "--overwrite", "/a", "--rdma-device", "mlx5_0", "--arbiter", "etcd",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert out.splitlines()[:3] == ["protect vm1: check", "protect vm1: copy 50%", "vm1 is protected"]
    assert "if host2 dies" in out
    _, _, body = agent.asked[0]
    assert re.fullmatch("[0-9a-f]{32}", body.pop("key"))
    assert body == {
        "domain": "vm1", "to": "host2", "delay_ms": 50, "engine": "colo", "netbuffer": "plug",
        "disks": {"vda": "/a", "vdb": "/b=c"}, "overwrite": ["/a"], "rdma_device": "mlx5_0", "arbiter": "etcd",
    }  # fmt: skip


def test_protect_again_says_already(agent: FakeAgent, run: Run) -> None:
    agent.say("POST /v1/protections", job("done", result="vm1 is protected already"))
    agent.say("GET /v1/status", status(PROTECTED))
    code, out, _ = run("protect", "vm1", "--to", "host2")
    assert code == 0
    assert "already" in out


def test_protected_stays_protected_when_the_status_cannot_be_asked_for(agent: FakeAgent, run: Run) -> None:
    agent.say("POST /v1/protections", job("done"))
    assert run("protect", "vm1", "--to", "host2") == (0, "vm1 is protected\n", "")


def test_no_wait_returns_when_accepted(agent: FakeAgent, run: Run) -> None:
    agent.say("POST /v1/protections", job())
    code, out, _ = run("protect", "vm1", "--to", "host2", "--no-wait")
    assert code == 0
    assert "accepted" in out
    assert agent.routes() == ["POST /v1/protections"]


def test_a_timeout_ends_the_waiting_only(agent: FakeAgent, run: Run) -> None:
    agent.say("POST /v1/protections", job(step="copy disks"))
    code, _, err = run("protect", "vm1", "--to", "host2", "--timeout", "0s")
    assert code == 6
    assert "still goes on" in err


def test_a_failed_set_up_ends_with_its_own_error(agent: FakeAgent, run: Run) -> None:
    error = api.ErrorBody("disk-full", "host2 has no space for vda", "3 GiB are missing", "free some", 4)
    agent.say("POST /v1/protections", job("failed", error=error))
    assert run("protect", "vm1", "--to", "host2") == (
        4, "", "mcft: host2 has no space for vda. 3 GiB are missing. free some.\n",
    )  # fmt: skip


def test_a_cancelled_job_has_failed(agent: FakeAgent, run: Run) -> None:
    agent.say("POST /v1/protections", job("cancelled"))
    code, _, err = run("protect", "vm1", "--to", "host2")
    assert code == 1
    assert "was cancelled" in err


def test_ctrl_c_detaches_and_says_how_to_cancel(agent: FakeAgent) -> None:
    agent.say("POST /v1/protections", job()).say("GET /v1/jobs/j1", HOLD)
    command = [sys.executable, "-m", "mcft.cli", "protect", "vm1", "--to", "host2"]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a background job ignores
    )  # fmt: skip
    assert [agent.arrivals.get(timeout=20), agent.arrivals.get(timeout=20)][1] == "GET /v1/jobs/j1"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "goes on" in err
    assert "mcft unprotect vm1" in err
    assert "Traceback" not in err


# ---- acts ----


def test_unprotect(agent: FakeAgent, run: Run) -> None:
    agent.say("POST /v1/protections/vm1/unprotect", job("done", kind="unprotect"))
    assert run("unprotect", "vm1") == (0, "vm1 is not protected\n", "")


@pytest.mark.parametrize("verb", ["failover", "solo"])
def test_without_an_override_nobody_is_asked(agent: FakeAgent, run: Run, verb: str) -> None:
    agent.say(f"POST /v1/protections/vm1/{verb}", job("done", kind=verb, result="done so"))
    assert run(verb, "vm1") == (0, "done so\n", "")
    assert agent.asked[0][2]["force"] is False


@pytest.mark.parametrize("verb", ["failover", "solo"])
@pytest.mark.parametrize("option", ["--force", "--peer-is-off"])
def test_an_override_without_a_terminal_needs_yes(agent: FakeAgent, run: Run, verb: str, option: str) -> None:
    agent.say(f"POST /v1/protections/vm1/{verb}", job("done", kind=verb))
    code, _, err = run(verb, "vm1", option)
    assert code == 2
    assert "--yes" in err
    assert agent.asked == []
    assert run(verb, "vm1", option, "--yes")[0] == 0
    body = agent.asked[0][2]
    assert (body["force"], body["peer_is_off"]) == (option == "--force", option == "--peer-is-off")


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 1)])
def test_an_override_at_a_terminal_shows_the_stake_and_asks(agent: FakeAgent, answer: str, code: int) -> None:
    agent.say("GET /v1/status", status(changed(state="muted")))
    agent.say("POST /v1/protections/vm1/solo", job("done", kind="solo"))
    ended, seen = at_terminal(["solo", "vm1", "--peer-is-off"], {"Go on?": answer})
    assert ended == code
    assert "vm1 is muted on host1" in seen
    assert "powered off" in seen
    assert ("POST /v1/protections/vm1/solo" in agent.routes()) == (code == 0)


def test_start_needs_no_word_but_for_lost_data(agent: FakeAgent, run: Run) -> None:
    agent.say("POST /v1/protections/vm1/start", job("done", kind="start", result="vm1 runs on host2"))
    assert run("start", "vm1") == (0, "vm1 runs on host2\n", "")
    assert agent.asked[0][2]["accept_lost_data"] is False
    assert run("start", "vm1", "--accept-lost-data")[0] == 2
    assert len(agent.asked) == 1
    assert run("start", "vm1", "--accept-lost-data", "--yes")[0] == 0
    assert agent.asked[1][2]["accept_lost_data"] is True


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 1)])
def test_lost_data_at_a_terminal_shows_the_stake_and_asks(agent: FakeAgent, answer: str, code: int) -> None:
    agent.say("GET /v1/status", status(changed(state="muted", reason="asking who went on")))
    agent.say("POST /v1/protections/vm1/start", job("done", kind="start"))
    ended, seen = at_terminal(["start", "vm1", "--accept-lost-data"], {"Go on?": answer})
    assert ended == code
    assert "vm1 is muted on host1" in seen and "is lost" in seen
    assert ("POST /v1/protections/vm1/start" in agent.routes()) == (code == 0)


@pytest.mark.parametrize(("words", "on", "for_shutdown"), [(["on"], True, False), (["off", "--for-shutdown"], False, True)])
def test_maintenance(agent: FakeAgent, run: Run, words: list[str], on: bool, for_shutdown: bool) -> None:
    agent.say("POST /v1/maintenance", job("done", kind="maintenance", result="so it is"))
    assert run("maintenance", *words) == (0, "so it is\n", "")
    body = agent.asked[0][2]
    assert (body["on"], body["for_shutdown"]) == (on, for_shutdown)
    assert run("maintenance", "perhaps")[0] == 2


def test_maintenance_that_could_not_empty_the_host(agent: FakeAgent, run: Run) -> None:
    error = api.ErrorBody("maintenance-left", "host1 is in maintenance, but not free: vm2: it is solo here")
    agent.say("POST /v1/maintenance", job("failed", kind="maintenance", error=error))
    code, _, err = run("maintenance", "on")
    assert code == 1 and "vm2" in err


def test_set(agent: FakeAgent, run: Run) -> None:
    agent.say("POST /v1/protections/vm1/set", changed(delay_ms=50))
    assert run("set", "vm1", "--delay", "50ms") == (0, "vm1: a checkpoint every 50ms\n", "")
    assert agent.asked[0][2] == {"delay_ms": 50}


# ---- looking ----


def test_status_of_all_and_of_one(agent: FakeAgent, run: Run) -> None:
    agent.say("GET /v1/status", status(PROTECTED, changed(domain="vm2")))
    code, out, _ = run("status")
    assert code == 0
    assert out.startswith("vm1  PROTECTED")
    assert "\n\nvm2  PROTECTED" in out
    assert run("status", "vm1")[0] == 0
    assert agent.asked[1][1] == {"domain": "vm1"}


def test_status_of_an_unknown_domain_is_3(agent: FakeAgent, run: Run) -> None:
    agent.say("GET /v1/status", status())
    code, out, err = run("status", "vm9")
    assert (code, out) == (3, "")
    assert "vm9" in err


def test_status_json_is_the_agents_own_object(agent: FakeAgent, run: Run) -> None:
    agent.say("GET /v1/status", msgspec.json.encode(status(PROTECTED))[:-1] + b',"moon":"full"}')
    _, out, _ = run("status", "--json")
    assert json.loads(out) == {**msgspec.to_builtins(status(PROTECTED)), "moon": "full"}


def test_status_check(agent: FakeAgent, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    exposed = changed(domain="vm2", state="solo", survives_host_loss=False)
    agent.say("GET /v1/status", status(PROTECTED), status(PROTECTED, exposed))
    assert run("status", "--check")[0] == 0
    assert run("status", "--check")[:2] == (1, "vm2: does not survive the loss of a host: solo\n")
    code, out, _ = run("status", "--check", "--json")
    assert code == 1
    assert len(json.loads(out)["protections"]) == 2
    monkeypatch.setenv("MCFT_SOCKET", "/nonexistent/s")
    code, out, err = run("status", "--check")
    assert (code, out) == (5, "")
    assert "systemctl status mcft-agent" in err


def test_status_watch_needs_a_terminal(agent: FakeAgent, run: Run) -> None:
    assert run("status", "--watch")[0] == 2
    assert run("status", "--watch", "--json")[0] == 2


def test_status_watch_ends_when_the_agent_does(agent: FakeAgent) -> None:
    agent.say("GET /v1/status", status(PROTECTED))
    agent.refuse("GET /v1/status", errors.Unreachable("gone", "the agent is gone"), 502)
    code, seen = at_terminal(["status", "--watch"], {})
    assert code == 5
    assert "PROTECTED" in seen
    assert "the agent is gone" in seen


def test_wait(agent: FakeAgent, run: Run) -> None:
    agent.say("GET /v1/status", status(PROTECTED))
    assert run("wait", "vm1", "--for", "solo,protected") == (0, "vm1: protected\n", "")
    assert run("wait", "vm1", "--for", "solo", "--timeout", "0s")[0] == 6


def test_wait_for_what_failed_or_does_not_exist(agent: FakeAgent, run: Run) -> None:
    agent.say("GET /v1/status", status(changed(state="failed", reason="why")), status())
    assert run("wait", "vm1")[0] == 1
    assert run("wait", "vm1")[0] == 3


def test_events_for_people_and_for_programs(agent: FakeAgent, run: Run) -> None:
    event = api.EventBody(1, "2026-01-01T00:00:00Z", "vm1", "k", "x")
    agent.say("GET /v1/events", api.Events("host1", [event, event]))
    assert run("events", "vm1")[1].splitlines() == ["2026-01-01T00:00:00Z  vm1  k  x"] * 2
    lines = run("events", "--json")[1].splitlines()
    assert [msgspec.json.decode(line, type=api.EventBody) for line in lines] == [event, event]


def test_events_follow(agent: FakeAgent, run: Run) -> None:
    first, second = (api.EventBody(n, "t", "vm1", "k", f"event {n}") for n in (1, 2))
    agent.say("GET /v1/events", api.Events("host1", [first]), api.Events("host1", [second]))
    agent.refuse("GET /v1/events", errors.Refused("no", "enough"), 409)
    code, out, _ = run("events", "--follow")
    assert code == 4
    assert [line.rsplit("  ")[-1] for line in out.splitlines()] == ["event 1", "event 2"]


def test_peer_list(agent: FakeAgent, run: Run) -> None:
    agent.say("GET /v1/peers", api.Peers("host1", [api.PeerBody("host2", ["192.0.2.2"], True, "0.1.0")]))
    assert "host2  answers" in run("peer", "list")[1]


# ---- without an agent ----


def test_forget_is_local_and_confirmed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[str] = []

    class Room:
        @staticmethod
        def forget_local(domain: str) -> list[str]:
            forgotten.append(domain)
            return ["opened its network"]

    monkeypatch.setitem(sys.modules, "mcft.agent.forget", Room)  # type: ignore[arg-type]
    assert run("forget", "vm1", "--yes")[0] == 2
    assert run("--host", "host2", "forget", "vm1", "--local", "--yes")[0] == 2
    assert run("forget", "vm1", "--local")[0] == 2
    assert forgotten == []
    assert run("forget", "vm1", "--local", "--yes") == (0, "opened its network\n", "")
    assert forgotten == ["vm1"]


def test_agent_gets_the_configurations_path(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Room:
        @staticmethod
        def main(path: Path, *, must_exist: bool) -> int:
            assert path == Path("/x.toml") and must_exist, "by a name that is mistyped a host would start without peers"
            return 7

    monkeypatch.setitem(sys.modules, "mcft.agent.main", Room)  # type: ignore[arg-type]
    assert run("--config", "/x.toml", "agent")[0] == 7


# ---- words, codes, speed ----


@pytest.mark.parametrize("verb", ["wait", "status", "unprotect", "failover", "events"])
def test_an_empty_name_is_nobodys(run: Run, verb: str) -> None:
    """`mcft wait "$VM"`, VM not set. Fails if that waits for the first protection of all."""
    code, _, err = run(verb, "")
    assert code == 2 and "empty" in err


def test_bytes_that_are_no_text_are_told_of(run: Run) -> None:
    """Fails with a traceback: they can neither be sent nor shown."""
    code, _, err = run("status", "\udcff")
    assert code == 2 and "UTF-8" in err


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["protect", "vm1", "--to", "h", "--delay", "100"], "say 100ms"),
        (["protect", "vm1", "--to", "h", "--delay", "9ms"], "10ms to 10s"),
        (["protect", "vm1"], "--to"),
        (["protect", "vm1", "--to", "h", "--engine", "xen"], "colo"),
        (["protect", "vm1", "--to", "h", "--disk", "vda"], "--disk vda="),
        (["protect", "vm1", "--to", "h", "--disk", "a=/a", "--disk", "a=/b"], "twice"),
        (["set", "vm1"], "--delay"),
        (["wait", "vm1", "--for", "protectd"], "protected"),
        (["wait", "vm1", "--timeout", "60"], "say 60s"),
        (["bogus"], "bogus"),
        (["--config", "/nonexistent/x", "status"], "does not exist"),
        ([], "Commands:"),
        (["peer"], "list"),
    ],
)
def test_usage_errors_are_2_on_stderr(run: Run, args: list[str], word: str) -> None:
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert word in err


def test_an_unknown_host_is_3(run: Run, tmp_path: Path) -> None:
    (tmp_path / "c").write_text('[peers.host2]\naddresses = ["192.0.2.2"]')
    code, _, err = run("--config", str(tmp_path / "c"), "--host", "host9", "status")
    assert code == 3
    assert "host2" in err


def test_this_hosts_own_name_is_its_socket(agent: FakeAgent, run: Run, tmp_path: Path) -> None:
    agent.say("GET /v1/status", status())
    (tmp_path / "c").write_text('name = "host1"')
    assert run("--config", str(tmp_path / "c"), "--host", "host1", "status")[0] == 0


def test_version(run: Run) -> None:
    assert re.fullmatch(r"mcft [0-9.]+\n", run("--version")[1])


def test_a_status_imports_nothing_slow() -> None:
    """rich, aiohttp and asyncio each cost more than all of `mcft status --json` does."""
    slow = {"rich", "aiohttp", "asyncio", "libvirt", "tomllib"}
    script = f"import sys, mcft.cli; print(*{slow} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, text=True).strip() == ""


def test_the_man_page_has_every_command_and_option() -> None:
    page = (ROOT / "man" / "mcft.1").read_text().replace("\\-", "-")
    for path, command in _commands(cli.cli, "mcft"):
        assert path in page
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert all(name in page for name in parameter.opts), (path, parameter.opts)


def _commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    yield path, group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def at_terminal(args: list[str], answers: dict[str, str]) -> tuple[int, str]:
    """Run mcft on a pseudo-terminal, type an answer at each prompt; its exit code and all it showed."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "mcft.cli", *args]
    process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True)
    os.close(theirs)
    seen, waiting = "", dict(answers)
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not piece:
            break
        seen += piece.decode(errors="replace")
        for prompt in [prompt for prompt in waiting if prompt in seen]:
            os.write(ours, waiting.pop(prompt).encode() + b"\n")
    os.close(ours)
    return process.wait(timeout=20), seen.replace("\r\n", "\n")
