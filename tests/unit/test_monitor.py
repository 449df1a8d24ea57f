"""The added monitor: lines, and a client against a FAKE QMP server (`gatelab.FakeQmp`, it is not QEMU)."""

from __future__ import annotations

import json
import select
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gatelab import PATIENCE_S, FakeQmp, until
from hypothesis import given, settings
from hypothesis import strategies as st

from mcft import monitor as monitor_module
from mcft.monitor import Lines, Monitor, MonitorGone

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


# ---- lines ----


@settings(max_examples=40, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=5), json_values, max_size=3), max_size=6), st.data())
def test_lines_cut_anywhere(messages: list[dict[str, Any]], data: st.DataObject) -> None:
    ends = st.sampled_from([b"\r\n", b"\n", b"\n\r\n"])
    stream = b"".join(json.dumps(m).encode() + data.draw(ends) for m in messages)
    lines, got = Lines(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        got += lines.feed(stream[:size])
        stream = stream[size:]
    assert got == messages


@pytest.mark.parametrize("line", [b"garbage\n", b"{\n", b'{"a": 1}\n\xff\xfe\n'])
def test_what_is_not_qmp_ends_the_connection(line: bytes) -> None:
    with pytest.raises(MonitorGone):
        Lines().feed(line)


def test_endless_line_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "MAX_LINE_BYTES", 100)
    lines = Lines()
    lines.feed(b"x" * 90)
    with pytest.raises(MonitorGone):
        lines.feed(b"x" * 20)


# ---- the client ----


@pytest.fixture
def qmp(tmp_path: Path) -> Iterator[FakeQmp]:
    made = FakeQmp(tmp_path / "qmp")
    yield made
    made.close()


@pytest.fixture
def client(qmp: FakeQmp) -> Iterator[Monitor]:
    made = Monitor(qmp.path)
    made.connect(PATIENCE_S)
    until(lambda: qmp.connections == 1)
    yield made
    made.close()


def read(client: Monitor, count: int, log: list[Any]) -> None:
    """Read until the log has count entries: events go in as their names."""
    while len(log) < count:
        assert client.sock is not None
        assert select.select([client.sock], [], [], PATIENCE_S)[0], f"nothing more came after {log}"
        for message in client.receive():
            event = client.dispatch(message, 42.0)
            if event is not None:
                log.append(event["event"])


@pytest.mark.parametrize("oob", [True, False])
def test_oob_is_used_where_it_is_offered(tmp_path: Path, oob: bool) -> None:
    qmp = FakeQmp(tmp_path / "qmp", oob=oob)
    client = Monitor(qmp.path)
    client.connect(PATIENCE_S)
    until(lambda: qmp.connections == 1)
    assert client.oob is oob and qmp.enabled == (["oob"] if oob else [])
    client.send("yank", {"instances": []}, oob=True)
    client.send("stop")
    until(lambda: len(qmp.commands) == 2)
    assert ("exec-oob" in qmp.commands[0]) is oob and "execute" in qmp.commands[1]
    client.close()
    qmp.close()


def test_nobody_there_and_refused_negotiation(tmp_path: Path) -> None:
    with pytest.raises(MonitorGone):
        Monitor(str(tmp_path / "none")).connect(PATIENCE_S)
    qmp = FakeQmp(tmp_path / "qmp", refuse_capabilities=True)
    client = Monitor(qmp.path)
    with pytest.raises(MonitorGone, match="refused"):
        client.connect(PATIENCE_S)
    assert client.sock is None
    qmp.close()


def test_events_and_replies_keep_qemus_order(qmp: FakeQmp, client: Monitor) -> None:
    log: list[Any] = []
    qmp.event("STOP", "colo")
    client.send("query-status", None, lambda reply: log.append(reply["return"]["status"]))
    until(lambda: qmp.commands)
    qmp.event("RESUME", "running")
    client.send("query-status", None, lambda reply: log.append(reply["return"]["status"]))
    until(lambda: len(qmp.commands) == 2)
    qmp.event("SHUTDOWN")
    read(client, 5, log)
    assert log == ["STOP", "colo", "RESUME", "running", "SHUTDOWN"]
    assert client.last_reply_ms == 42.0 and client.unanswered == 0


def test_each_reply_goes_to_its_caller(qmp: FakeQmp, client: Monitor) -> None:
    log: list[Any] = []
    qmp.answers["cont"] = RuntimeError("no")
    for command in ("stop", "cont", "query-status"):
        client.send(command, None, lambda reply, command=command: log.append((command, "error" in reply)))
    read(client, 3, log)
    assert log == [("stop", False), ("cont", True), ("query-status", False)]


def test_silence_is_an_answer_that_is_owed(qmp: FakeQmp, client: Monitor) -> None:
    """Fails if a monitor that nobody asks counts as one that does not answer: a quiet stream is no hung QEMU."""
    assert client.silent_ms(1_000_000.0) == 0.0
    qmp.hold_replies.add("query-status")
    client.send("query-status", None, lambda _reply: None)
    assert client.silent_ms(1_000_400.0) == 400.0


def test_events_do_not_count_as_replies(qmp: FakeQmp, client: Monitor) -> None:
    """A QEMU whose main loop hangs may still emit events from its threads; the hang is told by the silent replies."""
    qmp.event("STOP")
    read(client, 1, [])
    assert client.last_reply_ms == float("-inf")


def test_half_a_line_waits(qmp: FakeQmp, client: Monitor) -> None:
    qmp.raw(b'{"event": "ST')
    assert client.sock is not None and select.select([client.sock], [], [], PATIENCE_S)[0]
    assert client.receive() == [] and client.receive() == []
    qmp.raw(b'OP", "timestamp": {}}\n')
    log: list[Any] = []
    read(client, 1, log)
    assert log == ["STOP"]


def test_end_of_file_answers_every_waiting_caller(qmp: FakeQmp, client: Monitor) -> None:
    qmp.hold_replies = {"stop", "cont"}
    log: list[Any] = []
    client.send("stop", None, log.append)
    client.send("cont", None, log.append)
    client.send("cont")
    until(lambda: len(qmp.commands) == 3)
    qmp.drop_client()
    with pytest.raises(MonitorGone):
        read(client, 1, [])
    assert log == [] and client.unanswered == 2
    client.close()
    assert [reply["error"]["class"] for reply in log] == ["MonitorGone", "MonitorGone"]
    assert client.unanswered == 0 and client.sock is None
    client.close()
    assert len(log) == 2, "each caller is answered once"
    with pytest.raises(MonitorGone):
        client.receive()


def test_commands_wait_while_qemu_does_not_read(qmp: FakeQmp, client: Monitor) -> None:
    log: list[Any] = []
    for _ in range(2000):
        client.send("stop", {"padding": "x" * 500}, log.append)
    while client.wants_write:
        assert client.sock is not None
        select.select([client.sock], [client.sock], [], PATIENCE_S)
        client.flush()
        for message in client.receive():
            client.dispatch(message, 0.0)
    read_until = len(log)
    while read_until < 2000:
        assert client.sock is not None and select.select([client.sock], [], [], PATIENCE_S)[0]
        for message in client.receive():
            client.dispatch(message, 0.0)
        read_until = len(log)
    until(lambda: len(qmp.commands) == 2000)


def test_a_failed_command_is_not_sent_later(qmp: FakeQmp, client: Monitor) -> None:
    """Its caller was told that it failed. A `cont` or `stop` that comes through later acts behind everybody's back."""
    client.close()
    with pytest.raises(MonitorGone):
        client.send("cont")
    client.connect(PATIENCE_S)
    until(lambda: qmp.connections == 2)
    log: list[Any] = []
    client.send("query-status", None, log.append)
    while not log:
        assert client.sock is not None and select.select([client.sock], [], [], PATIENCE_S)[0]
        for message in client.receive():
            client.dispatch(message, 0.0)
    until(lambda: qmp.commands)  # the fake writes it down after its reply
    assert [c["execute"] for c in qmp.commands] == ["query-status"]


def test_a_failed_command_is_answered_once(client: Monitor) -> None:
    """`send` raised, so its caller knows; close() must not answer it a second time (a task would go on twice)."""
    log: list[Any] = []
    client.close()
    with pytest.raises(MonitorGone):
        client.send("stop", None, log.append)
    client.close()
    assert log == []
