"""What an operator asked of `protect` outlives a take-over: the new primary protects back by the same words."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from mcft import api
from mcft.agent import copy, model
from mcft.agent.again import Again
from mcft.agent.protection import Primary
from mcft.config import Config, Peer
from mcft.diskreplica import Disk
from mcft.errors import NotFound, Unreachable
from mcft.generations import Kind, Ledger

ASKED = model.Asked("colo", "filter", "off", "etcd", True)


def disk(target: str, path: str) -> Disk:
    return Disk(target, "/machine/0", "libvirt-1-format", 1 << 20, path, "raw", False)


def standby(asked: model.Asked = ASKED) -> model.Body:
    """host2's body, as host1's request makes it."""
    request = model.Prepare(
        "u", "vm1", "p", 1, "k", 100, "colo", 300.0, "", "", False, [disk("vda", "/a/vm1.img"), disk("vdb", "/a/more.img")], [1],
        disk_paths={"vda": "/b/vm1.img"}, arbiter="etcd", asked=asked,
    )  # fmt: skip
    peer = Peer("host1", ("10.1.0.1",))
    config = Config(name="host2", tls="off", listen_addresses=("10.1.0.2",), peers={"host1": peer})
    read = msgspec.json.decode(msgspec.json.encode(request), type=model.Prepare)
    return copy.make_body(read, config, "host1")


def again(body: model.Body, side: Any) -> api.ProtectRequest:
    """What the agent asks of itself when it protects again."""
    asked: list[api.ProtectRequest] = []

    async def now(request: api.ProtectRequest, _job: Any) -> str:
        asked.append(request)
        return ""

    def start(_kind: str, _domain: str, work: Any) -> None:
        with pytest.raises(StopIteration):
            work(None).send(None)

    core: Any = SimpleNamespace(site=SimpleNamespace(jobs=SimpleNamespace(start=start)), protecting=SimpleNamespace(now=now))
    life: Any = SimpleNamespace(body=body, ledger=Ledger("p", side, 1), event=lambda *_words: None)
    Again(core)._start(life)
    return asked[0]


def test_a_new_primary_protects_back_as_it_was_asked_on_the_other_host() -> None:
    """Fails if an arbiter that was typed is gone after the first take-over (found by chaos: `etcd` became `standby`)."""
    request = again(standby(), "standby")
    assert (request.arbiter, request.engine, request.netbuffer, request.experimental) == ("etcd", "colo", "filter", True)
    assert request.rdma_device == "off"


def test_the_way_back_leads_to_where_the_disks_are_there() -> None:
    """Fails if the old primary would get its copy at the path of the new one's, beside its own old disk."""
    body = standby()
    assert again(body, "standby").disks == {"vda": "/a/vm1.img"}
    assert again(body, "primary").disks == {"vda": "/b/vm1.img"}


def test_the_name_of_a_device_is_not_carried_to_another_host() -> None:
    assert standby(model.Asked(rdma_device="mlx5_0")).rdma_asked == ""
    assert standby(model.Asked(rdma_device="auto")).rdma_asked == "auto"


def test_an_older_primary_says_nothing_of_it() -> None:
    """Version N-1 sends no `asked`. Fails if that is an error."""
    body = standby(model.Asked())
    assert (body.arbiter_asked, body.engine_asked, body.buffer_asked) == (None, "auto", "auto")


def primary(ask: Any) -> tuple[Any, list[str]]:
    """A protected primary, its gate and QEMU at once with what they are told; what it says."""
    said: list[str] = []

    async def nothing(*_words: Any, **_named: Any) -> None: ...

    async def qmp(_commands: Any) -> list[dict[str, Any]]:
        return [{"return": {"x-checkpoint-delay": 250}}]

    life: Any = object.__new__(Primary)
    life._pacing = asyncio.Lock()
    life.body = SimpleNamespace(
        uuid="u", pid="p", g=1, domain="vm1", peer="host2", state="protected", engine="colo", delay_ms=100
    )
    life.site = SimpleNamespace(ask=ask)
    life.save, life.gate = nothing, SimpleNamespace(ask=nothing, qmp=qmp)
    life.event = lambda _kind, text, _level="": said.append(text)
    return life, said


async def test_a_new_delay_is_told_to_the_standby() -> None:
    """Fails if only the primary knows it: after a take-over the guest had the old one back."""
    told: list[Any] = []

    async def ask(peer: str, verb: str, words: Any, *_more: Any) -> model.Answer:
        told.append((peer, verb, words.delay_ms, words.pid))
        return model.Answer("armed")

    life, said = primary(ask)
    await life.set_delay(250)
    assert told == [("host2", "set-delay", 250, "p")] and life.body.delay_ms == 250 and not said


async def test_a_period_is_stretched_on_both_sides_and_the_delay_stays_as_asked() -> None:
    """Fails if the standby's watcher does not know it, or the guest had it as its delay after a take-over."""
    told: list[Any] = []

    async def ask(_peer: str, _verb: str, words: Any, *_more: Any) -> model.Answer:
        told.append((words.delay_ms, words.period_ms))
        return model.Answer("armed")

    life, said = primary(ask)
    life.ledger = SimpleNamespace(newest=Kind.PROTECTED)
    await life.keep_pace(250, 125.0, 0.03)
    assert told == [(100, 250)] and life.body.delay_ms == 100
    assert said == ["a checkpoint takes 125 ms, and the guest ran 3% of the time: one every 250 ms now, not 100 ms"]


async def test_periods_take_turns_on_their_way_to_the_standby() -> None:
    """The standby has not heard of a stretched period yet when `mcft set --delay` comes, and another word of the gate's.

    Fails if one overtakes another: the standby's watcher would go by the older. Nor may a word from before a longer delay count.
    """
    told, heard = [], asyncio.Event()

    async def ask(_peer: str, _verb: str, words: Any, *_more: Any) -> model.Answer:
        if words.period_ms == 250:
            await heard.wait()
        told.append((words.delay_ms, words.period_ms))
        return model.Answer("armed")

    life, _ = primary(ask)
    life.ledger = SimpleNamespace(newest=Kind.PROTECTED)
    asked = [life.keep_pace(250, 125.0, 0.03), life.set_delay(300), life.keep_pace(240, 120.0, 0.4)]
    tasks = [asyncio.create_task(one) for one in asked]
    for _ in range(20):
        await asyncio.sleep(0)  # as far as each can come
    assert not told
    heard.set()
    await asyncio.gather(*tasks, return_exceptions=True)  # (this QEMU says 250 whatever it is set to)
    assert told == [(100, 250), (300, 0)] and life.body.delay_ms == 300


async def test_a_period_stays_where_the_standby_can_not_be_told() -> None:
    async def ask(*_words: Any) -> model.Answer:
        raise Unreachable("peer", "host2 did not answer (set-delay)")

    life, said = primary(ask)
    life.ledger, life.gate = SimpleNamespace(newest=Kind.PROTECTED), None  # whoever asks the gate now fails
    await life.keep_pace(250, 125.0, 0.03)
    assert not said


async def test_a_standby_that_can_not_be_told_leaves_the_delay_as_it_was() -> None:
    async def ask(*_words: Any) -> model.Answer:
        raise Unreachable("peer", "host2 did not answer (set-delay)")

    life, _ = primary(ask)
    with pytest.raises(Unreachable):
        await life.set_delay(250)
    assert life.body.delay_ms == 100


async def test_an_older_standby_is_told_of_in_an_event() -> None:
    async def ask(*_words: Any) -> model.Answer:
        raise NotFound("no-such-verb", "this agent knows no 'set-delay'")

    life, said = primary(ask)
    await life.set_delay(250)
    assert life.body.delay_ms == 250 and "does not know the new delay" in said[0]
