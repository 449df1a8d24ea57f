"""The RDMA keepalive without RDMA: its memory, which device serves, the gate's end of it (on FAKE verbs), the agents' part.

What the adapter itself does is tested on rxe, in `tests/rdma`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gatelab import GateLab
from hypothesis import given
from hypothesis import strategies as st

from mcft import rdmadevices
from mcft.agent import model, rdma
from mcft.config import Config
from mcft.errors import Failed, Refused
from mcft.gate import rdma as gate_rdma
from mcft.gate.control import Denied
from mcft.gate.loop import Loop, boottime_ms
from mcft.gate.state import LinkSpec, RdmaSpec
from mcft.keepalive import DATAGRAM_BYTES, Session, Word
from mcft.rdma import INBOX_AT, OUTBOX_AT, REGION_BYTES, RETRIES, SLOT_BYTES, SLOTS, Inbox, Outbox, ack_timeout

# ---- memory ----


def region() -> memoryview:
    return memoryview(bytearray(REGION_BYTES))


@given(st.floats(50, 10_000))
def test_retries_end_within_half_the_loss_time(loss_ms: float) -> None:
    """7 retries would be endless."""
    assert 0 < RETRIES < 7
    total_ms = (RETRIES + 1) * 4.096e-3 * 2 ** ack_timeout(loss_ms)
    assert loss_ms / 8 < total_ms <= loss_ms / 2


def test_the_layout_keeps_the_inbox_apart() -> None:
    assert INBOX_AT + DATAGRAM_BYTES <= OUTBOX_AT and DATAGRAM_BYTES <= SLOT_BYTES
    assert OUTBOX_AT + SLOTS * SLOT_BYTES <= REGION_BYTES


def test_an_inbox_gives_each_datagram_once() -> None:
    inbox = Inbox(region())
    assert inbox.take() is None, "nothing was written yet"
    first = bytes([1]) * DATAGRAM_BYTES
    inbox.memory[:DATAGRAM_BYTES] = first
    assert inbox.take() == first and inbox.take() is None
    inbox.clear()
    assert inbox.take() is None
    inbox.memory[:DATAGRAM_BYTES] = first
    assert inbox.take() == first, "after another connection it is news"


@given(st.integers(1, DATAGRAM_BYTES - 1), st.integers(0, 2**32))
def test_a_torn_read_is_never_believed(at: int, loads: int) -> None:
    """Half of one keepalive and half of the next, cut anywhere."""
    key, pid = bytes(32), bytes(16)
    ours, theirs = Session(key, pid), Session(key, pid)
    theirs.accept(ours.next(Word(), 0), "udp", 0)
    old = theirs.next(Word("standby", 3, "armed", loads=loads), 1)
    assert ours.accept(old, "rdma", 1) is not None
    new = theirs.next(Word("standby", 3, "lost", "gone", loads=loads + 1), 2)
    torn = new[:at] + old[at:]
    if torn not in (old, new):
        assert ours.accept(torn, "rdma", 2) is None


def test_a_slot_that_is_under_way_is_left_alone() -> None:
    outbox = Outbox(region())
    places = [outbox.put(bytes([n])) for n in range(SLOTS)]
    assert len(set(places)) == SLOTS and outbox.put(b"x") is None and outbox.flying == SLOTS
    outbox.acknowledged(1)
    assert outbox.put(b"x") == places[0] and outbox.put(b"y") is None
    outbox.reset()
    assert outbox.flying == 0 and outbox.put(b"z") is not None


# ---- devices, from a FAKE sysfs ----


def sysfs(tmp_path: Path, **states: str) -> Path:
    """rxa: 10.7.0.1 (RoCE v1 and v2) and fe80::1; rxb: 10.7.0.2."""
    gids = {"rxa": ["fe80::1", "::ffff:10.7.0.1", "::ffff:10.7.0.1"], "rxb": ["fe80::2", "::ffff:10.7.0.2"]}
    types = {"rxa": ["RoCE v2", "IB/RoCE v1", "RoCE v2"], "rxb": ["RoCE v2", "RoCE v2"]}
    for device, rows in gids.items():
        port = tmp_path / "class/infiniband" / device / "ports/1"
        (port / "gids").mkdir(parents=True)
        (port / "gid_attrs/types").mkdir(parents=True)
        (port / "link_layer").write_text("Ethernet\n")
        (port / "state").write_text(states.get(device, "4: ACTIVE") + "\n")
        for index, gid in enumerate(rows):
            (port / "gids" / str(index)).write_text(gid + "\n")
            (port / "gid_attrs/types" / str(index)).write_text(types[device][index] + "\n")
        (port / "gids/9").write_text("0000:0000:0000:0000:0000:0000:0000:0000\n")
    return tmp_path


def test_the_device_with_the_address_is_found(tmp_path: Path) -> None:
    tree = sysfs(tmp_path)
    assert rdmadevices.find("10.7.0.1", sysfs=tree) == rdmadevices.Port("rxa", 1, 2, "::ffff:10.7.0.1")
    assert rdmadevices.find("10.7.0.2", "rxb", tree).gid_index == 1
    assert rdmadevices.find("fe80::1", sysfs=tree).gid_index == 0


@pytest.mark.parametrize(
    ("address", "device", "code", "words"),
    [
        ("10.7.0.1", "mlx5_0", "no-rdma-device", "there is no RDMA device 'mlx5_0'. RDMA devices here: rxa, rxb"),
        ("10.7.0.1", "rxb", "rdma-no-address", "RDMA device rxb has not the address 10.7.0.1"),
        ("10.7.0.9", "auto", "rdma-no-address", "no RDMA device here has the address 10.7.0.9"),
        ("10.7.0.2", "auto", "rdma-down", "rxb port 1 is DOWN"),
    ],
)
def test_a_device_that_does_not_serve_is_named(tmp_path: Path, address: str, device: str, code: str, words: str) -> None:
    with pytest.raises(Refused) as caught:
        rdmadevices.find(address, device, sysfs(tmp_path, rxb="1: DOWN"))
    assert caught.value.code == code and words in str(caught.value)


def test_a_host_without_any(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="this host has no RDMA device"):
        rdmadevices.find("10.7.0.1", sysfs=tmp_path)


# ---- the gate's end, on FAKE verbs ----


class Two:
    """A primary's and a standby's end on one loop, and the exchange that the agents would carry."""

    def __init__(self, devices: tuple[str, str] = ("auto", "auto")) -> None:
        self.loop = Loop(lambda _commands, _done: None)
        self.notes: list[dict[str, Any]] = []
        self.hints = 0
        specs = [RdmaSpec(device, "10.7.0.1", "10.7.0.2") for device in devices]
        self.primary, self.standby = (
            gate_rdma.RdmaLink(self.loop, spec, 300.0, self._note, leads=not n, on_error=self._hint)
            for n, spec in enumerate(specs)
        )
        self.links = (self.primary, self.standby)
        for link in self.links:
            link.start()

    def _note(self, kind: str, **fields: Any) -> None:
        self.notes.append({"note": kind, **fields})

    def _hint(self) -> None:
        self.hints += 1

    def until(self, condition: Any) -> Any:
        end_ms = boottime_ms() + 20_000
        while not (found := condition()):
            assert boottime_ms() < end_ms, [link.detail(0) for link in self.links]
            for link in self.links:
                link.tick(boottime_ms())
            self.loop.turn(lambda _now: None)
        return found

    def ask(self, link: gate_rdma.RdmaLink, do: str, **fields: Any) -> Any:
        """Raises: Denied."""
        got: list[Any] = []
        link.handlers()[do](fields, got.append)
        self.until(lambda: got)
        if isinstance(got[0], Exception):
            raise got[0]
        return got[0]

    def connect(self) -> None:
        self.until(lambda: any(n["note"] == "rdma-wanted" for n in self.notes))
        self.until(lambda: self.standby.state != "starting")
        offer = self.ask(self.primary, "rdma-offer")
        answer = self.ask(self.standby, "rdma-accept", offer=offer)
        self.ask(self.primary, "rdma-connect", offer=answer)
        self.notes.clear()

    def close(self) -> None:
        for link in self.links:
            link.close()


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    monkeypatch.setattr(gate_rdma, "MODULE", "fake_verbs")
    yield


def test_both_ends_hear_each_other(fakes: None) -> None:
    two = Two()
    try:
        assert not two.primary.send(b"x"), "it is not connected"
        two.connect()
        for a, b in ((two.primary, two.standby), (two.standby, two.primary)):
            assert a.send(bytes([7]) * DATAGRAM_BYTES)
            assert two.until(b.receive) == [bytes([7]) * DATAGRAM_BYTES] and b.receive() == []
            assert a.detail(0) == "" and a.connections == 1
    finally:
        two.close()


def test_the_adapters_word_is_a_hint_and_asks_for_a_new_connection(fakes: None) -> None:
    two = Two()
    try:
        two.connect()
        two.ask(two.standby, "rdma-accept", offer={})  # its queue pair is another one now
        two.primary.send(bytes(DATAGRAM_BYTES))
        two.until(lambda: two.hints)
        assert two.primary.state == "idle" and two.primary.failing(boottime_ms()) == "RETRY_EXC_ERR" and two.primary.errors == 1
        two.connect()
        assert two.primary.failing(boottime_ms()) == "" and two.primary.connections == 2
    finally:
        two.close()


def test_a_verbs_process_that_ends_is_started_anew(fakes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_rdma, "RESTART_MS", 10.0)
    two = Two()
    try:
        two.connect()
        assert two.standby._process is not None
        two.standby._process.kill()
        two.until(lambda: two.standby.reason == "its verbs process ended")
        two.until(lambda: two.standby.state == "idle")
        two.primary.send(bytes(DATAGRAM_BYTES))  # only who writes notices
        two.connect()
    finally:
        two.close()


def test_a_connection_that_fails_is_told_and_wanted_again(fakes: None) -> None:
    two = Two(("auto", "broken"))
    try:
        two.until(lambda: all(link.state == "idle" for link in two.links))
        offer = two.ask(two.primary, "rdma-offer")
        with pytest.raises(Denied, match="no RDMA device 'broken'"):
            two.ask(two.standby, "rdma-accept", offer=offer)
        two.ask(two.primary, "rdma-connect", error="host2: there is no RDMA device 'broken'")
        assert "no RDMA device 'broken'" in two.primary.detail(boottime_ms())
        two.notes.clear()
        two.until(lambda: two.notes)
        assert two.notes[0]["reason"].startswith("host2")
    finally:
        two.close()


def test_without_pyverbs_nothing_is_tried_again(fakes: None) -> None:
    two = Two(("absent", "auto"))
    try:
        two.until(lambda: two.primary.state == "absent")
        with pytest.raises(Denied, match="pyverbs"):
            two.ask(two.primary, "rdma-offer")
        assert "pyverbs" in two.primary.detail(0)
    finally:
        two.close()


def test_a_gate_whose_host_has_no_rdma_goes_on_by_udp() -> None:
    """The real verbs process: without pyverbs, or without such a device. Fails if the gate says nothing, or waits for it."""
    spec = RdmaSpec("mcft-none", "127.0.0.1", "127.0.0.1")
    with GateLab("primary", buffer="none", rdma=spec) as lab:
        agent = lab.start()
        status = agent.status_when(lambda s: s["links"][0]["age_ms"] is not None and s["peer"]["record"] == "armed")
        row = status["links"][1]
        assert row["kind"] == "rdma" and row["age_ms"] is None and row["detail"]
        if not rdmadevices.verbs_installed():
            agent.status_when(lambda s: "pyverbs can't be imported" in s["links"][1]["detail"])
        with pytest.raises(RuntimeError):
            agent.ask("rdma-accept", offer={})
        assert agent.ask("status")["verdict"] is None


# ---- the agents' part ----


def serving(monkeypatch: pytest.MonkeyPatch, *addresses: str, verbs: bool = True) -> None:
    def find(address: str, device: str = "auto", sysfs: Path = Path()) -> rdmadevices.Port:
        if address not in addresses:
            raise Refused("rdma-no-address", f"no RDMA device has {address}")
        return rdmadevices.Port("rxa", 1, 1, address)

    monkeypatch.setattr(rdmadevices, "find", find)
    monkeypatch.setattr(rdmadevices, "verbs_installed", lambda: verbs)


PAIRS = [("10.1.0.1", "10.1.0.2"), ("10.2.0.1", "10.2.0.2")]


def test_the_first_link_with_a_device_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    serving(monkeypatch, "10.2.0.1")
    assert asyncio.run(rdma.choose("auto", PAIRS)) == RdmaSpec("auto", "10.2.0.1", "10.2.0.2")
    assert asyncio.run(rdma.choose("off", PAIRS)) is None


def test_auto_does_without_and_a_name_insists(monkeypatch: pytest.MonkeyPatch) -> None:
    serving(monkeypatch)
    assert asyncio.run(rdma.choose("auto", PAIRS)) is None
    with pytest.raises(Refused, match=r"10\.1\.0\.1"):
        asyncio.run(rdma.choose("rxa", PAIRS))
    serving(monkeypatch, "10.1.0.1", verbs=False)
    assert asyncio.run(rdma.choose("auto", PAIRS)) is None
    with pytest.raises(Refused, match="pyverbs"):
        asyncio.run(rdma.choose("rxa", PAIRS))


def wish(address: str, *, must: bool) -> model.Prepare:
    return model.Prepare(
        "u", "vm1", "p", 1, "k", 100, "colo", 300.0, "", "", False, [], [], rdma_address=address, rdma_required=must
    )


@pytest.mark.parametrize(
    ("config", "verbs", "words"),
    [
        (Config(name="host2"), True, "host2 has no RDMA keepalive to offer. no RDMA device has 10.9.0.2"),
        (Config(name="host2"), False, "its Python lacks pyverbs"),
        (Config(name="host2", rdma_device="off"), True, 'rdma_device = "off"'),
    ],
)
def test_a_peer_without_it(monkeypatch: pytest.MonkeyPatch, config: Config, verbs: bool, words: str) -> None:
    serving(monkeypatch, "10.1.0.2", verbs=verbs)
    with pytest.raises(Refused) as caught:
        asyncio.run(rdma.look(wish("10.9.0.2", must=True), config))
    assert caught.value.code == "peer-no-rdma" and words in str(caught.value)
    finding = asyncio.run(rdma.look(wish("10.9.0.2", must=False), config))
    assert finding is not None and finding.level == "warning"
    assert asyncio.run(rdma.look(wish("", must=False), config)) is None


def test_the_standbys_end_is_for_the_address_that_the_primary_means(monkeypatch: pytest.MonkeyPatch) -> None:
    serving(monkeypatch, "10.2.0.2")
    links = [LinkSpec("10.1.0.2", 1, "10.1.0.1", 1), LinkSpec("10.2.0.2", 1, "10.2.0.1", 1)]
    found = asyncio.run(rdma.choose_here(wish("10.2.0.2", must=True), Config(name="host2"), links))
    assert found == RdmaSpec("auto", "10.2.0.2", "10.2.0.1")


def test_an_older_peer_says_nothing_of_it() -> None:
    spec = RdmaSpec("rxa", "10.1.0.1", "10.1.0.2")
    prepared = model.Prepared("10.1.0.2", 1, 2, 3)
    assert rdma.settle(spec, "auto", prepared, "host2") is None
    with pytest.raises(Refused, match="host2 has no RDMA keepalive"):
        rdma.settle(spec, "rxa", prepared, "host2")


class FakeLife:
    """FAKE: a life whose gate and peer answer from lists."""

    def __init__(self, peer: Any) -> None:
        self.body = SimpleNamespace(uuid="u", pid="p", g=1, domain="vm1", peer="host2")
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.events: list[tuple[str, str]] = []
        self.gate = SimpleNamespace(ask=self._gate)
        self.site = SimpleNamespace(ask=self._peer, spawn=lambda work, name: asyncio.ensure_future(work))
        self._answer = peer

    async def _gate(self, do: str, timeout_s: float = 1.0, **fields: Any) -> Any:
        self.asked.append((do, fields))
        return {"qpn": 1}

    async def _peer(self, peer: str, verb: str, body: Any, reply: Any, timeout_s: float) -> Any:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer

    def event(self, kind: str, text: str, level: str = "info") -> None:
        self.events.append((level, text))


async def test_an_exchange_is_carried_and_told_once() -> None:
    life = FakeLife(model.RdmaAnswer({"qpn": 2}))
    exchange = rdma.Exchange(life)  # type: ignore[arg-type]
    for _ in range(2):
        exchange.wanted("not connected yet", 10.0)
        exchange.wanted("not connected yet", 10.0)  # one at a time
        await asyncio.sleep(0.01)
    assert life.asked == 2 * [("rdma-offer", {}), ("rdma-connect", {"offer": {"qpn": 2}})]
    assert life.events == [("info", "RDMA keepalive with host2 stands")]


async def test_an_exchange_that_fails_is_brought_to_the_gate() -> None:
    life = FakeLife(Failed("gate-refused", "the gate refused: no device"))
    exchange = rdma.Exchange(life)  # type: ignore[arg-type]
    for down_ms in (10.0, 2500.0, 5000.0):
        exchange.wanted("RETRY_EXC_ERR", down_ms)
        await asyncio.sleep(0.01)
    assert life.asked[1] == ("rdma-connect", {"error": "the gate refused: no device."})
    assert life.events == [("warning", "no RDMA keepalive with host2: RETRY_EXC_ERR; UDP goes on")]
