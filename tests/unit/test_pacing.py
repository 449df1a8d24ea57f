"""A delay and a stretched period on their way to QEMU, the gate and the standby: in which order, and what a failure leaves."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from mcft.agent import model
from mcft.agent.pacing import Pacing
from mcft.agent.protection import Primary
from mcft.agent.standby import Standby
from mcft.errors import Failed, NotFound, Unreachable
from mcft.generations import Kind


class World:
    """A protected primary as Pacing sees it. done: who was told what (delay, stretched period; QEMU: its delay), in order.

    fails: of what is told next, what fails. late: the standby hears of nothing before this is set.
    """

    def __init__(self, *, delay_ms: int = 100, period_ms: int = 0) -> None:
        self.done: list[tuple[Any, ...]] = []
        self.said: list[str] = []
        self.fails: dict[str, Exception] = {}
        self.obeys = False  # and what failed was done all the same
        self.patient = True  # no watcher was ever less patient than QEMU is slow
        self.standbys_ms = period_ms or delay_ms
        self.tasks: list[asyncio.Task[None]] = []
        self.late: asyncio.Event | None = None
        self.qemus_ms = period_ms or delay_ms
        self.gates = SimpleNamespace(delay_ms=float(delay_ms), every_ms=float(self.qemus_ms))
        self.life: Any = object.__new__(Primary)
        self.life.body = SimpleNamespace(
            uuid="u", pid="p", g=1, domain="vm1", peer="host2", state="protected", engine="colo", delay_ms=delay_ms
        )
        self.life.ledger = SimpleNamespace(newest=Kind.PROTECTED)
        self.life.site = SimpleNamespace(ask=self._ask, spawn=self._spawn)
        self.life.gate = SimpleNamespace(ask=self._gate, qmp=self._qmp, load_state=lambda: self.gates)
        self.life.save = self._save
        self.life.event = lambda _kind, text, _level="": self.said.append(text)
        self.life.pacing = self.pacing = Pacing(self.life)

    def _spawn(self, work: Any, _name: str) -> asyncio.Task[None]:
        self.tasks.append(asyncio.create_task(work))
        return self.tasks[-1]

    def _does(self, what: str, *words: Any) -> None:
        failure = self.fails.get(what)
        if failure is not None and not self.obeys:
            raise failure
        self.done.append((what, *words))
        if what == "standby":
            self.standbys_ms = max(words)
        elif what == "gate":
            self.gates.delay_ms, self.gates.every_ms = words[0], max(words)
        else:
            self.qemus_ms = words[0]
        self.patient = self.patient and min(self.standbys_ms, self.gates.every_ms) >= self.qemus_ms
        if failure is not None:
            raise failure

    async def _ask(self, _peer: str, verb: str, told: model.SetDelay, *_more: Any) -> model.Answer:
        assert verb == "set-delay" and told.pid == "p" and told.told_at_ms > 0
        if self.late is not None:
            await self.late.wait()
        self._does("standby", told.delay_ms, told.period_ms)
        return model.Answer("armed")

    async def _gate(self, do: str, _timeout_s: float = 0.0, **fields: float) -> dict[str, float]:
        if do == "update":
            self._does("gate", fields["delay_ms"], fields["period_ms"])
        return {"period_ms": self.gates.every_ms}

    async def _qmp(self, commands: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for command in commands:
            if command["execute"] == "migrate-set-parameters":
                self._does("qemu", command["arguments"]["x-checkpoint-delay"])
        return [{"return": {"x-checkpoint-delay": self.qemus_ms}}]

    async def _save(self) -> None:
        self.done.append(("body", self.life.body.delay_ms))


async def test_a_longer_delay_is_heard_of_by_both_watchers_before_qemu_has_it() -> None:
    """Fails if only the primary knows it (after a take-over the guest had the old one back), or QEMU before a watcher."""
    world = World()
    await world.pacing.set_delay(250)
    assert world.done == [("standby", 250, 0), ("gate", 250, 0), ("qemu", 250), ("body", 250)] and not world.said


async def test_a_shorter_delay_is_gone_by_by_no_watcher_before_qemu_has_it() -> None:
    """Fails if a watcher goes by the shorter one while QEMU's is ten seconds: each checkpoint was overdue."""
    world = World(delay_ms=10_000)
    await world.pacing.set_delay(50)
    assert world.done == [
        ("standby", 50, 10_000), ("gate", 50, 10_000), ("qemu", 50), ("gate", 50, 0), ("standby", 50, 0), ("body", 50)
    ]  # fmt: skip


FAILURES = {"standby": Unreachable("peer", "no answer"), "gate": Failed("gate", "it ended"), "qemu": Failed("gate", "it ended")}


@pytest.mark.parametrize("lost", ["words", "answers"])
@pytest.mark.parametrize("fails", FAILURES)
@pytest.mark.parametrize("delay_ms", [50, 5000])
async def test_a_change_that_fails_is_put_back_as_soon_as_that_can_be(fails: str, delay_ms: int, lost: str) -> None:
    """Whoever fails may have obeyed, its answer being what was lost; and it fails for some time.

    Fails if one of them stays with the new delay while the operator was told that it failed, or if QEMU is slower meanwhile
    than a watcher is patient.
    """
    world = World(delay_ms=1000)
    world.fails, world.obeys = {fails: FAILURES[fails]}, lost == "answers"
    with pytest.raises((Unreachable, Failed)):
        await world.pacing.set_delay(delay_ms)
    for _ in range(50):
        await asyncio.sleep(0)
    with pytest.raises((Unreachable, Failed)):
        await world.pacing.set_delay(delay_ms)
    world.fails = {}
    assert sum(not task.done() for task in world.tasks) <= 1, "one at a time, however often it fails"
    await asyncio.wait_for(asyncio.gather(*world.tasks), 10)
    assert (world.life.body.delay_ms, world.qemus_ms, world.gates.delay_ms, world.gates.every_ms) == (1000, 1000, 1000, 1000)
    assert [words for words in world.done if words[0] == "standby"][-1] == ("standby", 1000, 0)
    assert world.patient, world.done


async def test_a_watcher_that_could_not_be_told_of_the_shorter_one_is_only_too_patient() -> None:
    world = World(delay_ms=1000)

    async def told_once(*words: Any) -> model.Answer:
        answer = await world._ask(*words)
        world.fails = {"standby": Unreachable("peer", "no answer")}
        return answer

    world.life.site.ask = told_once
    await world.pacing.set_delay(50)
    assert (world.life.body.delay_ms, world.qemus_ms, world.gates.every_ms) == (50, 50, 50)
    assert [words for words in world.done if words[0] == "standby"] == [("standby", 50, 1000)]


async def test_a_period_is_stretched_on_both_sides_and_the_delay_stays_as_asked() -> None:
    """Fails if the standby's watcher does not know it, or the guest had it as its delay after a take-over."""
    world = World()
    await world.pacing.keep(250, 125.0, 0.03)
    assert world.done == [("standby", 100, 250), ("gate", 100, 250), ("qemu", 250)] and world.life.body.delay_ms == 100
    assert world.said == ["a checkpoint takes 125 ms, and the guest ran 3% of the time: one every 250 ms now, not 100 ms"]


async def test_a_period_that_comes_back_is_told_to_the_watchers_last() -> None:
    world = World(period_ms=400)
    await world.pacing.keep(100, 20.0, 0.8)
    assert world.done[2:] == [("qemu", 100), ("gate", 100, 0), ("standby", 100, 0)]
    assert world.said == ["a checkpoint takes 20 ms: one every 100 ms again, as asked for"]


async def test_changes_take_turns_and_a_word_of_the_gate_waits_for_none() -> None:
    """The standby has not heard of a stretched period yet when `mcft set --delay` comes, and more words of the gate's.

    Fails if one overtakes another (the standby's watcher would go by the older), or if words queue up behind a silent standby.
    """
    world = World()
    world.late = asyncio.Event()
    first = asyncio.create_task(world.pacing.keep(250, 125.0, 0.03))
    await asyncio.sleep(0)
    asked = asyncio.create_task(world.pacing.set_delay(300))
    await asyncio.wait_for(world.pacing.keep(260, 130.0, 0.03), 5)
    for _ in range(20):
        await asyncio.sleep(0)  # as far as each can come
    assert not world.done
    world.late.set()
    await asyncio.gather(first, asked)
    told = [words[1:] for words in world.done if words[0] == "standby"]
    assert told == [(100, 250), (300, 0)] and world.life.body.delay_ms == 300


async def test_a_word_from_before_a_longer_delay_is_void() -> None:
    world = World(delay_ms=300)
    await world.pacing.keep(240, 120.0, 0.4)
    assert not world.done


async def test_a_period_stays_where_the_standby_can_not_be_told() -> None:
    world = World()
    world.fails = {"standby": Unreachable("peer", "host2 did not answer (set-delay)")}
    await world.pacing.keep(250, 125.0, 0.03)
    assert not world.done and not world.said


async def test_an_older_standby_is_told_of_in_an_event() -> None:
    world = World()
    world.fails = {"standby": NotFound("no-such-verb", "this agent knows no 'set-delay'")}
    await world.pacing.set_delay(250)
    assert world.life.body.delay_ms == 250 and "does not know the new delay" in world.said[0]


@pytest.mark.parametrize(
    ("gates_ms", "qemus_ms", "undone"),
    [
        ((100, 100), 100, False), ((100, 400), 400, False),
        ((250, 250), 250, True), ((100, 400), 100, True), ((50, 100), 100, True),
    ],
)
async def test_a_change_that_an_agent_did_not_live_to_finish_is_undone_by_the_next(
    gates_ms: tuple[int, int], qemus_ms: int, undone: bool
) -> None:
    """The body says 100 ms. Fails if QEMU and the watchers go by different delays for ever, or a stretched period is undone."""
    world = World()
    world.gates, world.qemus_ms = SimpleNamespace(delay_ms=float(gates_ms[0]), every_ms=float(gates_ms[1])), qemus_ms
    world.standbys_ms = 5000  # which may have been told of what the body does not know
    await world.pacing.in_line()
    every_ms = 100 if undone else gates_ms[1]
    assert (world.qemus_ms, world.gates.delay_ms, world.gates.every_ms) == (every_ms, 100, every_ms)
    assert world.done[-1] == ("standby", 100, every_ms if every_ms > 100 else 0)


async def test_a_planned_switch_is_not_disturbed() -> None:
    """It sets QEMU's longest delay meanwhile. Fails if that is taken for a change that was cut off."""
    world = World()
    world.qemus_ms = 2**32 - 1
    waits = asyncio.create_task(world.pacing.in_line())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not world.done and not waits.done()
    world.life.body.state = "lost"
    await asyncio.wait_for(waits, 10)
    assert not world.done


async def test_the_standby_goes_by_the_newest_word_whichever_comes_first() -> None:
    """A call goes out on both links, and the slower one may arrive seconds later. Fails if the older word wins then."""
    told: list[float] = []

    async def update(_do: str, **fields: float) -> None:
        told.append(fields["delay_ms"])

    async def save() -> None: ...

    life: Any = object.__new__(Standby)
    life.body, life._delay_told_at_ms = SimpleNamespace(delay_ms=100), 0.0
    life.gate, life.save, life._stands = SimpleNamespace(ask=update), save, lambda: model.Answer("armed")
    for delay_ms, at_ms in ((5000, 20.0), (100, 10.0), (300, 30.0)):
        await life.set_delay(model.SetDelay("u", "p", 1, "vm1", delay_ms=delay_ms, told_at_ms=at_ms))
    assert told == [5000, 300] and life.body.delay_ms == 300
