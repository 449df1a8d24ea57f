"""The agent's half of an arbiter: what is on disk before what is sent; and etcd's JSON gateway, against one of our own."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from mcft.agent import arbitration, etcdhttp, fenceagent, model
from mcft.agent.arbitration import Arbiters, Arbitration
from mcft.agent.etcdhttp import EtcdHttp, NoReply
from mcft.arbiter.base import Intent, Standing
from mcft.arbiter.etcd import Create, Key, Read, Seen, Swap, Word
from mcft.arbiter.fence import Monitor, Off, Power, Status
from mcft.config import Config, Etcd, FenceDevice
from mcft.errors import Failed, Refused
from mcft.generations import Kind, Ledger

KEY = "/mcft/u/p"


class Gateway:
    """etcd's JSON gateway, as far as mcft speaks it. fail: how many requests to answer with an error; stall: none is answered."""

    def __init__(self) -> None:
        self.keys: dict[str, tuple[str, int]] = {}
        self.revision, self.token, self.password = 5, "", ""
        self.asked: list[str] = []
        self.stall: asyncio.Event | None = None
        self.errors: list[tuple[int, dict[str, Any]]] = []

    async def start(self) -> str:
        app = web.Application()
        app.add_routes([web.post("/v3/{path:.*}", self._serve)])
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        if self.stall:
            self.stall.set()
        await self._runner.cleanup()

    async def _serve(self, request: web.Request) -> web.Response:
        path, body = request.match_info["path"], await request.json()
        self.asked.append(path)
        if path == "auth/authenticate":
            if body["password"] != self.password:
                return web.json_response({"error": "authentication failed", "code": 3}, status=400)
            self.token = f"t{len(self.asked)}"
            return web.json_response({"header": self._header(), "token": self.token})
        if self.password and request.headers.get("Authorization") != self.token:
            return web.json_response({"error": "etcdserver: invalid auth token", "code": 16}, status=401)
        if self.errors:
            status, error = self.errors.pop(0)
            return web.json_response(error, status=status)
        answer = self._txn(body) if path == "kv/txn" else self._range(body)
        if self.stall:
            await self.stall.wait()
        return web.json_response(answer)

    def _header(self) -> dict[str, str]:
        return {"cluster_id": "77", "member_id": "1", "revision": str(self.revision), "raft_term": "2"}

    def _range(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["serializable"] is False
        name = base64.b64decode(body["key"]).decode()
        answer: dict[str, Any] = {"header": self._header()}
        if name in self.keys:
            value, mod = self.keys[name]
            answer |= {"count": "1", "kvs": [{"value": base64.b64encode(value.encode()).decode(), "mod_revision": str(mod)}]}
        return answer

    def _txn(self, body: dict[str, Any]) -> dict[str, Any]:
        def holds(row: dict[str, Any]) -> bool:
            value, mod = self.keys.get(base64.b64decode(row["key"]).decode(), ("", 0))
            if row["target"] == "VALUE":
                return base64.b64decode(row["value"]).decode() == value
            return int(row["mod_revision" if row["target"] == "MOD" else "create_revision"]) == mod

        if not all(holds(row) for row in body["compare"]):
            read = self._range(body["failure"][0]["request_range"])
            return {"header": self._header(), "responses": [{"response_range": read}]}
        put = body["success"][0]["request_put"]
        self.revision += 1
        self.keys[base64.b64decode(put["key"]).decode()] = (base64.b64decode(put["value"]).decode(), self.revision)
        return {"header": self._header(), "succeeded": True, "responses": [{"response_put": {}}]}


@pytest_asyncio.fixture
async def gateway() -> AsyncIterator[Gateway]:
    made = Gateway()
    made.url = await made.start()  # type: ignore[attr-defined]
    yield made
    await made.stop()


@pytest_asyncio.fixture
async def etcd(gateway: Gateway) -> AsyncIterator[EtcdHttp]:
    made = EtcdHttp(Etcd((gateway.url,)))  # type: ignore[attr-defined]
    yield made
    await made.close()


# ---- the gateway ----


@pytest.mark.asyncio
async def test_the_three_questions(etcd: EtcdHttp) -> None:
    assert (await etcd.ask(Read(KEY), 1000)).value is None
    assert (await etcd.ask(Create(KEY, "a"), 1000)).succeeded
    again = await etcd.ask(Create(KEY, "b"), 1000)
    assert (again.succeeded, again.value) == (False, "a")
    read = await etcd.ask(Read(KEY), 1000)
    assert (read.cluster_id, read.revision, read.value, read.mod_revision) == ("77", 6, "a", 6)
    assert not (await etcd.ask(Swap(KEY, "a", 5, "c"), 1000)).succeeded, "another revision"
    assert not (await etcd.ask(Swap(KEY, "b", 6, "c"), 1000)).succeeded, "another value"
    assert (await etcd.ask(Swap(KEY, "a", 6, "c"), 1000)).succeeded


@pytest.mark.asyncio
async def test_a_refused_connection_was_not_sent_and_a_silent_etcd_was(gateway: Gateway, etcd: EtcdHttp) -> None:
    """Fails if a question that may still be carried out counts as never asked."""
    gateway.stall = asyncio.Event()
    with pytest.raises(NoReply) as error:
        await etcd.ask(Create(KEY, "a"), 300)
    assert error.value.sent and gateway.keys
    closed = EtcdHttp(Etcd(("http://127.0.0.1:1",)))
    with pytest.raises(NoReply) as error:
        await closed.ask(Create(KEY, "a"), 300)
    assert not error.value.sent
    await closed.close()


@pytest.mark.asyncio
async def test_the_next_endpoint_is_asked_and_remembered(gateway: Gateway) -> None:
    made = EtcdHttp(Etcd(("http://127.0.0.1:1", gateway.url)))  # type: ignore[attr-defined]
    assert (await made.ask(Read(KEY), 1000)).revision == 5
    assert made._first == 1
    await made.close()


@pytest.mark.asyncio
async def test_an_error_of_etcds_is_no_answer(gateway: Gateway, etcd: EtcdHttp) -> None:
    """A time-out inside etcd may have been carried out; a refusal was not. Fails if either is taken for the other."""
    timed_out = {"error": "etcdserver: request timed out", "code": 14}
    gateway.errors = [(503, timed_out), (403, {"error": "permission denied", "code": 7})]
    for sent in (True, False):
        with pytest.raises(NoReply) as error:
            await etcd.ask(Create(KEY, "a"), 500)
        assert error.value.sent is sent


@pytest.mark.asyncio
async def test_a_token_is_got_and_renewed(gateway: Gateway, tmp_path: Path) -> None:
    """Fails if an etcd that was restarted, and knows no token any more, is not asked for another."""
    gateway.password = "secret"
    (tmp_path / "pw").write_text("secret\n")
    url = gateway.url  # type: ignore[attr-defined]
    made = EtcdHttp(Etcd((url,), user="mcft", password_file=tmp_path / "pw"))
    assert (await made.ask(Create(KEY, "a"), 1000)).succeeded
    gateway.token = "forgotten"
    assert (await made.ask(Read(KEY), 1000)).value == "a"
    await made.close()
    (tmp_path / "pw").write_text("wrong")
    wrong = EtcdHttp(Etcd((url,), user="mcft", password_file=tmp_path / "pw"))
    with pytest.raises(NoReply, match="user mcft") as error:
        await wrong.ask(Read(KEY), 1000)
    assert not error.value.sent
    await wrong.close()


def test_what_is_not_etcds_is_no_answer() -> None:
    headers: list[dict[str, str]] = [{}, {"cluster_id": "1", "revision": "x"}, {"cluster_id": "1", "revision": "1"}]
    for answer in ({}, *({"header": header} for header in headers)):
        with pytest.raises(NoReply):
            etcdhttp.parse(Swap(KEY, "a", 1, "b"), answer)


def test_a_password_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="password"):
        EtcdHttp(Etcd(("http://127.0.0.1:1",), user="m", password_file=tmp_path / "none"))


# ---- a protection's arbiter ----


class FakeLife:
    """saved: copies of the body as it was on disk each time; asks: what was sent, with what was on disk then."""

    def __init__(self, site: Any, kind: Any = "etcd", side: Any = "standby") -> None:
        self.body = model.Body("u", "vm1", "p", 3, side, "host2", arbiter=kind)
        self.ledger = Ledger("p", side, 3)
        for record in (Kind.PREPARING, Kind.ARMED) if side == "standby" else (Kind.PREPARING, Kind.ARMING):
            self.ledger.append(record)
        self.site = site
        self.saved: list[model.Body] = []
        self.events: list[str] = []
        self.arbiter = Arbitration(self)  # type: ignore[arg-type]

    async def save(self) -> None:
        self.saved.append(copy.deepcopy(self.body))

    def event(self, _kind: str, text: str, _level: str = "") -> None:
        self.events.append(text)


class Sent:
    """An etcd that checks, at each question, what is on disk."""

    def __init__(self) -> None:
        self.lives: list[FakeLife] = []
        self.key = Word("armed-n", 3, "primary").text(), 8
        self.revision = 8
        self.lose = 0
        self.refuse = 0
        self.questions: list[Any] = []

    async def ask(self, _kind: str, _peer: str, ask: Any) -> Any:
        self.questions.append(ask.what)
        if isinstance(ask.what, Swap):
            for life in self.lives:
                disk = life.saved[-1]
                if disk.claim is not None and disk.claim.id in ask.what.put:
                    break
            else:
                raise AssertionError("a claim was sent whose id is on nobody's disk")
        if self.refuse:
            self.refuse -= 1
            raise NoReply("refused", sent=False)
        store = SimpleNamespace(cluster="c", revision=self.revision, keys={KEY: self.key} if self.key[0] else {})
        from test_arbiter_etcd import Store

        real = Store("c", store.revision, store.keys)
        reply = real.do(ask.what)
        self.key, self.revision = real.keys.get(ask.what.key, ("", 0)), real.revision
        if self.lose:
            self.lose -= 1
            raise NoReply("lost", sent=True)
        return reply


def made(sent: Sent, side: str = "standby") -> FakeLife:
    site = SimpleNamespace(arbiters=sent, config=Config(name="host1"))
    life = FakeLife(site, side=side)
    life.body.arbiter_key, life.body.arbiter_seen = Key(KEY, *sent.key), Seen("c", 8)
    sent.lives.append(life)
    return life


@pytest.mark.asyncio
async def test_the_claim_id_is_on_disk_before_it_is_sent() -> None:
    """Fails if a claim is handed to the socket before its id is durable (the fake etcd looks at the disk)."""
    sent = Sent()
    life = made(sent)
    assert await life.arbiter.claim() is Standing.WON
    assert life.saved[0].claim is not None


@pytest.mark.asyncio
async def test_a_restarted_agent_goes_on_with_the_same_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = Sent()
    sent.lose = 1
    life = made(sent)
    monkeypatch.setattr(arbitration, "LOOK_EVERY_S", 0.01)
    task = asyncio.create_task(life.arbiter.claim())
    while not sent.questions:
        await asyncio.sleep(0.001)
    task.cancel()
    again = made(sent)
    again.body = copy.deepcopy(life.saved[-1])
    again.saved = list(life.saved)
    assert again.arbiter.pending and not await again.arbiter.withdraw()
    assert await again.arbiter.claim() is Standing.WON


@pytest.mark.asyncio
async def test_of_two_lives_one_wins() -> None:
    sent = Sent()
    lives = [made(sent, side) for side in ("primary", "standby")]
    standings = [await life.arbiter.claim() for life in lives]
    assert standings == [Standing.WON, Standing.LOST]


@pytest.mark.asyncio
async def test_a_claim_that_was_never_sent_is_given_back() -> None:
    """Fails if a standby whose etcd is away could not give up when its primary asks."""
    sent = Sent()
    sent.refuse = 1000
    life = made(sent)
    task = asyncio.create_task(life.arbiter.claim())
    while not sent.questions:
        await asyncio.sleep(0.001)
    while not await life.arbiter.withdraw():
        await asyncio.sleep(0.001)
    assert await task is None and life.saved[-1].claim is None and not life.arbiter.pending


@pytest.mark.asyncio
async def test_unknown_stays_and_is_said() -> None:
    sent = Sent()
    life = made(sent)
    sent.key = "", 0
    assert await life.arbiter.claim() is Standing.UNKNOWN
    assert "missing" in life.arbiter.may_claim() and life.saved[-1].arbiter_trouble
    assert not life.arbiter.pending, "every question was answered: nothing of it can win"


@pytest.mark.asyncio
async def test_a_host_without_that_arbiter_refuses() -> None:
    arbiters = Arbiters(Config(name="host1"))
    await arbiters.refuse_unfit("standby", "host2")
    for kind, where in (("etcd", r"\[etcd\]"), ("fence", r"\[fence.host2\]")):
        with pytest.raises(Refused) as refused:
            await arbiters.refuse_unfit(kind, "host2")
        assert refused.value.code == "no-arbiter" and where.replace("\\", "") in refused.value.reason


# ---- fence agents ----


def script(tmp_path: Path, body: str) -> FenceDevice:
    path = tmp_path / "fence_test"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return FenceDevice("fence_test", (("ip", "1.2.3.4"), ("plug", "h2")))


@pytest.mark.asyncio
async def test_a_fence_agent_gets_its_options_on_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    device = script(tmp_path, f"cat > {tmp_path}/said; exit 2")
    assert (await fenceagent.ask(device, Status(), 5000)).state == "off"
    assert (tmp_path / "said").read_text() == "ip=1.2.3.4\nplug=h2\naction=status\n"


@pytest.mark.parametrize(
    ("what", "code", "state"),
    [(Status(), 0, "on"), (Status(), 2, "off"), (Status(), 1, "unknown"), (Off(), 0, "on"), (Off(), 2, "unknown"),
     (Off(), 1, "unknown"), (Monitor(), 0, "on"), (Monitor(), 2, "unknown")],
)  # fmt: skip
def test_only_status_says_off(what: Any, code: int, state: str) -> None:
    """Fails if an `off` that succeeded is taken for a host that is off."""
    assert fenceagent.power(what, code, "").state == state
    assert isinstance(fenceagent.power(what, code, ""), Power)


@pytest.mark.asyncio
async def test_a_fence_agent_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(NoReply) as error:
        await fenceagent.ask(script(tmp_path, "exec sleep 60"), Off(), 200)
    assert error.value.sent
    with pytest.raises(NoReply) as error:
        await fenceagent.ask(FenceDevice("fence_none"), Off(), 200)
    assert not error.value.sent and "not installed" in str(error.value)


def test_json_of_a_word_is_always_the_same() -> None:
    assert json.loads(Word("a", 1, "primary").text()) == {"claim": "a", "g": 1, "owner": "primary"}


# ---- fence, as the simulation taught it ----


class Device:
    """A fence device: h2 is on until it is shot."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.off = False

    async def ask(self, _kind: str, _peer: str, ask: Any) -> Power:
        self.asked.append(type(ask.what).__name__)
        self.off = self.off or isinstance(ask.what, Off)
        return Power("off" if self.off and isinstance(ask.what, Status) else "on")


def fencing(side: str = "primary", alive: bool = True) -> tuple[FakeLife, Device]:
    device = Device()
    config = Config(name="host1", fence={"host2": FenceDevice("fence_test", (), 0)})
    life = FakeLife(SimpleNamespace(arbiters=device, config=config), "fence", side)
    life.qemu_alive = lambda: alive  # type: ignore[attr-defined]
    return life, device


async def yes() -> bool:
    return True


async def no() -> bool:
    return False


@pytest.mark.asyncio
async def test_a_host_that_speaks_again_is_not_shot() -> None:
    """Fails if an `off` is sent although the reason for it is over."""
    life, device = fencing()
    assert await life.arbiter.claim(silent=no) is None
    assert not device.asked and not life.arbiter.pending and life.saved[-1].claim is None
    assert await life.arbiter.claim(silent=yes) is Standing.WON and device.asked == ["Off", "Status"]


@pytest.mark.asyncio
async def test_a_fencing_does_not_outlive_the_host_that_began_it() -> None:
    """A standby in its delay was shot by the primary; it boots, and shoots the winner (the simulation's seed 5009).

    Fails if a claim that was begun before this host was off goes on after it.
    """
    for alive in (True, False):
        life, device = fencing("standby", alive)
        life.body.claim = Intent("i", "standby", 3)
        await life.arbiter.forget_if_void()
        assert life.arbiter.pending is alive and not device.asked
