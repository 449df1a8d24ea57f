"""Protecting again by itself: when, and what a failed try leaves. Core, site and lives are FAKES; `Again` is real."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from mcft.agent import again, maintenance, model
from mcft.agent.again import Again
from mcft.errors import Failed, Unreachable

MINUTE = 60_000.0


class World:
    """One solo protection, its peer answering for 100 s."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ms = 1_000_000.0
        monkeypatch.setattr(again, "boottime_ms", lambda: self.now_ms)
        self.peer = SimpleNamespace(carries_since=900.0)
        config = SimpleNamespace(auto_protect=True, reprotect_after_restart_ms=500.0, reprotect_after_ms=30_000.0)
        site = SimpleNamespace(
            config=config, maintenance=False, jobs=SimpleNamespace(running=lambda _domain: None), peer=lambda _name: self.peer
        )
        self.again = Again(SimpleNamespace(site=site, lives={}))  # type: ignore[arg-type]
        self.body = SimpleNamespace(
            domain="vm1", role="primary", state="solo", manual="", overlays_g=0, dismantling=False, quick_return=False,
            peer="host2", next_try_boottime_ms=0.0, failures=0,
        )  # fmt: skip
        self.said: list[str] = []

    @property
    def life(self) -> Any:
        async def save() -> None: ...

        def to_state(state: str, _reason: str) -> None:
            self.body.state = state

        return SimpleNamespace(
            body=self.body, ledger=SimpleNamespace(spoken=True, side="primary"), save=save, to_state=to_state,
            event=lambda _kind, text, _level="": self.said.append(text),
        )  # fmt: skip

    def not_yet(self) -> str:
        return self.again._not_yet(self.life)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_protected_again_once_the_peer_has_answered_long_enough(world: World) -> None:
    assert world.not_yet() == ""
    world.peer.carries_since = world.now_ms / 1000 - 29
    assert "long enough" in world.not_yet()
    world.body.quick_return = True
    assert world.not_yet() == ""


def test_a_cut_replication_link_is_waited_for(world: World) -> None:
    world.peer.carries_since = None
    assert "replication link" in world.not_yet()


@pytest.mark.parametrize(
    ("field", "value"),
    [("manual", "disk error"), ("overlays_g", 4), ("dismantling", True), ("state", "protected"), ("state", "failed"),
     ("role", "standby")],
)
def test_not_while_something_forbids_it(world: World, field: str, value: Any) -> None:
    setattr(world.body, field, value)
    assert world.not_yet()


@pytest.mark.parametrize(("maintenance", "free"), [(False, True), (True, False)])
async def test_not_to_a_host_in_maintenance(world: World, maintenance: bool, free: bool) -> None:
    async def ask(*_question: Any) -> model.Records:
        return model.Records("host2", "u", state="lost", maintenance=maintenance)

    world.again.site.ask = ask  # type: ignore[method-assign, assignment]
    world.again.core.about = lambda _life: None  # type: ignore[method-assign, assignment, return-value]
    assert await world.again._peer_is_free(world.life) is free


async def test_a_host_that_went_into_maintenance_meanwhile_is_no_failure(world: World) -> None:
    for _ in range(9):
        await world.again._failed(world.life, maintenance.refuse("host2"))
    assert world.body.failures == 0 and world.body.state == "solo"


async def test_each_failure_waits_longer_and_the_fifth_is_the_last(world: World) -> None:
    for failures, wait_ms in enumerate((MINUTE, 2 * MINUTE, 4 * MINUTE, 8 * MINUTE), 1):
        await world.again._failed(world.life, Failed("x", "it failed"))
        assert (world.body.failures, world.body.state) == (failures, "solo")
        assert world.not_yet()
        world.now_ms += wait_ms + 30_000.0
        assert world.not_yet() == ""
    await world.again._failed(world.life, Failed("x", "it failed"))
    assert world.body.state == "failed"
    assert "5 times" in world.body.manual


async def test_a_peer_that_went_away_is_no_failure(world: World) -> None:
    for _ in range(10):
        await world.again._failed(world.life, Unreachable("peer-unreachable", "host2 did not answer"))
    assert (world.body.failures, world.body.state) == (0, "solo")


@pytest.mark.parametrize("error", [KeyError("x"), asyncio.CancelledError(), Failed("x", "it failed")])
async def test_a_failure_inside_mcft_waits_and_is_told_like_any_other(world: World, error: BaseException) -> None:
    """Fails if only errors that mcft foresaw count: it was tried each second for two minutes, and nobody was told (chaos)."""

    async def breaks(_request: object, _job: object) -> str:
        raise error

    world.again.core.protecting = SimpleNamespace(now=breaks)  # type: ignore[assignment]
    works: list[Any] = []
    vars(world.body).update(
        uuid="u", pid="p", delay_ms=100, engine_asked="auto", buffer_asked="auto", disk_paths={}, overwrite=False, rdma_asked="",
        arbiter_asked="standby", mc=None, experimental=False,
    )  # fmt: skip
    jobs = SimpleNamespace(start=lambda _kind, _domain, work: works.append(work), running=lambda _domain: None)
    world.again.site.jobs = jobs  # type: ignore[assignment]
    spawned: list[Any] = []
    world.again.site.spawn = lambda work, _name: spawned.append(work)  # type: ignore[method-assign, assignment, return-value]
    world.again.core.lives = {world.body.uuid: world.life}
    world.again._start(world.life)
    with pytest.raises(type(error)):
        await works[0](None)
    for work in spawned:
        await work
    assert world.body.failures == 1 and world.not_yet()
