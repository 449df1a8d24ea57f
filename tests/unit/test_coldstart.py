"""`mcft start`: where, when not, and by whose word. libvirt, peer and lives are FAKES; `ColdStart`, jobs and ledgers are real."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from mcft import api
from mcft.agent import coldstart, model
from mcft.agent.jobs import JobHandle, Jobs
from mcft.errors import McftError, NotFound, Refused, Unreachable
from mcft.generations import Kind, Ledger, Side

P = Kind.PREPARING
LED = [P, Kind.ARMING, Kind.PROTECTED, Kind.DIED]
FOLLOWED = [P, Kind.ARMED]


class World:
    """host1 after a boot: one protection, whose records are `kinds`. said: what was done, in order."""

    def __init__(self, side: Side, *kinds: Kind, persistent: bool = True, defined: bool = True) -> None:
        self.said: list[str] = []
        self.theirs: model.Records | McftError = Unreachable("peer-unreachable", "host2 did not answer", "no route")
        self.ledger = Ledger("p", side, 3)
        for kind in kinds:
            self.ledger.append(kind, 4 if kind is Kind.SPOKEN else None)
        self.body = SimpleNamespace(
            arbiter="standby",
            uuid="u", pid="p", g=3, domain="vm1", peer="host2", role=side, state="muted", reason="", overlays_g=0, manual="",
            persistent=persistent, xml="<domain/>", disk_paths={},
        )  # fmt: skip
        self.running, self.defined = False, defined
        self.life: Any = SimpleNamespace(
            body=self.body, ledger=self.ledger, deciding=None, qemu_alive=lambda: self.running, look=self._look, free=self._free,
            override=self._override, take_cold=self._take_cold, stop_deciding=self._nothing, save=self._nothing,
            event=lambda _kind, text, _level="": self.said.append(text),
        )  # fmt: skip
        host = SimpleNamespace(find=self._find, info=self._find, define=self._define)
        host.start_domain = host.create = self._start
        config = SimpleNamespace(name="host1", auto_protect=True)
        site = SimpleNamespace(config=config, ask=self._ask, host=host, maintenance=False)
        self.jobs = Jobs()
        self.core: Any = SimpleNamespace(
            site=site, lives={"u": self.life}, jobs=self.jobs, as_primary=lambda life: life,
            about=lambda _life: model.About("u", "p", 3, "vm1"),
        )  # fmt: skip

    def heard(self, side: Side, *kinds: Kind, running: bool = False, pid: str = "p") -> World:
        rows = [(side, 4 if kind is Kind.SPOKEN else 3, kind.value) for kind in kinds]
        self.theirs = model.Records("host2", "u", 4, pid, 3, side, "", rows, running)
        return self

    async def _ask(self, peer: str, verb: str, about: model.About, _reply: Any, _timeout_s: float = 5.0) -> Any:
        if verb == "records":
            if isinstance(self.theirs, McftError):
                raise self.theirs
            return self.theirs
        self.said.append(f"{verb} on {peer}")
        return model.Answer("running" if len(self.said) < 2 else "done", 3, "vm1 runs on host2")

    async def _nothing(self) -> None: ...

    async def _look(self) -> None:
        if self.running:
            self.body.state = "unprotected"

    async def _free(self) -> None:
        self.said.append("free")

    async def _override(self, _why: str) -> None:
        self.ledger.append(Kind.SOLO)
        self.said.append("override")

    async def _take_cold(self, _why: str) -> None:
        self.ledger.append(Kind.TAKEN)
        self.said.append("take cold")

    async def _find(self, _uuid: str) -> Any:
        return SimpleNamespace(running=self.running) if self.defined else None

    async def _define(self, _xml: str) -> None:
        self.defined = True
        self.said.append("define")

    async def _start(self, what: str) -> None:
        self.said.append(f"start {what}")
        self.body.role, self.running, self.defined = "primary", True, True

    async def start(self, *, accept: bool = False, for_peer: bool = False) -> str:
        """The job's result. Raises what it failed of."""
        request = api.ActRequest(accept_lost_data=accept)
        return (await self.jobs.ended(coldstart.begin(self.core, self.life, request, for_peer=for_peer).id)).result


async def test_the_owner_starts_whether_or_not_the_peer_answers() -> None:
    world = World("primary", P, Kind.ARMING, Kind.PROTECTED, Kind.SOLO, Kind.SPOKEN)
    said = await world.start()
    assert "vm1 runs on host1" in said and "protected to host2 again by itself" in said
    assert world.said == ["free", "start u"]


async def test_twice_is_once_even_while_it_is_protected_again() -> None:
    world = World("primary", P, Kind.ARMING, Kind.PROTECTED, Kind.SOLO, Kind.SPOKEN)
    await world.start()
    world.jobs.start("protect", "vm1", lambda _job: asyncio.Event().wait())  # type: ignore[arg-type, return-value]
    assert await world.start() == "vm1 already runs on host1"
    assert world.said.count("start u") == 1
    await world.jobs.close()


async def test_a_guest_that_runs_there_is_not_started_here() -> None:
    world = World("primary", *LED).heard("standby", *FOLLOWED, Kind.TAKEN, Kind.SPOKEN, running=True)
    assert await world.start() == "vm1 already runs on host2"
    assert world.said == []


@pytest.mark.parametrize(("side", "kinds"), [("primary", LED), ("standby", FOLLOWED)])
@pytest.mark.parametrize("knows_nothing", [False, True])
async def test_who_can_not_tell_refuses_with_what_is_known(side: Side, kinds: list[Kind], knows_nothing: bool) -> None:
    world = World(side, *kinds)
    if knows_nothing:
        world.theirs = model.Records("host2", "u")
    with pytest.raises(Refused) as refused:
        await world.start()
    text = str(refused.value)
    assert "Known: host1" in text and "Unknown: wh" in text and "mcft start vm1 --accept-lost-data" in text
    assert ("has no records of it" if knows_nothing else "does not answer") in text
    assert world.said == [] and not world.running


@pytest.mark.parametrize(("side", "kinds", "word"), [("primary", LED, "override"), ("standby", FOLLOWED, "take cold")])
async def test_the_operators_word_is_recorded_before_it_starts(side: Side, kinds: list[Kind], word: str) -> None:
    world = World(side, *kinds)
    world.body.manual = coldstart.ACCEPTED
    said = await world.start(accept=True)
    assert said == "vm1 runs on host1", "not protected again by itself after it"
    assert world.said[1:] == [word, "free", "start u"]


@pytest.mark.parametrize("last", [Kind.GIVEN_UP, Kind.NOT_WHOLE, Kind.ENDED, Kind.LOST])
async def test_an_old_copy_is_never_started_not_even_by_force(last: Kind) -> None:
    world = World("standby", P, last)
    for accept in (False, True):
        with pytest.raises(Refused) as refused:
            await world.start(accept=accept)
        assert "belongs on host2" in str(refused.value)
    assert world.said == []


async def test_it_is_started_there_where_it_belongs() -> None:
    world = World("standby", *FOLLOWED).heard("primary", *LED)
    assert await world.start() == "vm1 runs on host2"
    assert world.said == ["start on host2", "start on host2"], "asked again until it was done"


async def test_a_peer_that_asks_is_not_asked_back() -> None:
    world = World("standby", *FOLLOWED).heard("primary", *LED)
    with pytest.raises(Refused) as refused:
        await world.start(for_peer=True)
    assert refused.value.code == "not-here" and world.said == []


async def test_two_histories_are_the_operators() -> None:
    world = World("primary", P, Kind.ARMING, Kind.PROTECTED, Kind.SOLO, Kind.SPOKEN)
    world.heard("standby", *FOLLOWED, Kind.TAKEN, Kind.SPOKEN)
    for accept in (False, True):
        with pytest.raises(Refused) as refused:
            await world.start(accept=accept)
        assert refused.value.code == "two-histories" and "forget vm1 --local" in str(refused.value)


async def test_asking_who_went_on_is_waited_for() -> None:
    world = World("primary", *LED).heard("standby", *FOLLOWED)

    async def resolve() -> None:
        await asyncio.sleep(0)
        world.ledger.append(Kind.SOLO)
        world.ledger.append(Kind.SPOKEN, 4)

    world.life.deciding = asyncio.create_task(resolve())
    assert "vm1 runs on host1" in await world.start()


async def test_shut_down_but_nobody_heard_the_standby_let_go() -> None:
    """It may have been told to take over."""
    world = World("primary", P, Kind.ARMING, Kind.PROTECTED, Kind.ENDED)
    world.life.deciding = asyncio.create_task(asyncio.Event().wait())
    with pytest.raises(Refused) as refused:
        await world.start()
    assert refused.value.code == "nobody-knows"
    world.life.deciding.cancel()


@pytest.mark.parametrize(("persistent", "done"), [(True, ["free", "define", "start u"]), (False, ["free", "start <domain/>"])])
async def test_a_definition_that_the_host_lost_is_made_again(persistent: bool, done: list[str]) -> None:
    kinds = [P, Kind.ARMING, Kind.PROTECTED, Kind.SOLO, Kind.SPOKEN]
    world = World("primary", *kinds, persistent=persistent, defined=False)
    await world.start()
    assert world.said == done


async def test_the_peers_question_is_answered_with_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coldstart, "ANSWER_AFTER_S", 0.01)
    world = World("primary", P, Kind.ARMING, Kind.PROTECTED, Kind.SOLO, Kind.SPOKEN)
    go = asyncio.Event()

    async def slow(_what: str) -> None:
        await go.wait()
        world.running = True

    world.core.site.host.start_domain = slow
    about = msgspec.json.encode(model.About("u", "p", 3, "vm1", "nonce"))
    assert (await coldstart.answer(world.core, "host2", about)).kind == "running"
    go.set()
    await asyncio.sleep(0.01)
    answer = await coldstart.answer(world.core, "host2", about)
    assert answer.kind == "done" and "runs on host1" in answer.detail
    with pytest.raises(NotFound):
        await coldstart.answer(world.core, "host3", about)


async def test_a_job_answered_at_once_is_there_to_be_followed() -> None:
    jobs = Jobs()

    async def busy(_job: JobHandle) -> None:
        await asyncio.Event().wait()

    jobs.start("protect", "vm1", busy)
    assert jobs.get(jobs.answer("start", "vm1", "already").id).result == "already"
    await jobs.close()


async def test_a_copy_that_lives_there_may_still_take_over() -> None:
    """Neither side knows who went on, but the other's copy runs no guest yet and can: nothing is started beside it."""
    world = World("primary", *LED).heard("standby", *FOLLOWED)
    assert isinstance(world.theirs, model.Records)
    world.theirs = msgspec.structs.replace(world.theirs, qemu_alive=True)
    with pytest.raises(Refused) as refusal:
        await world.start()
    assert refusal.value.code == "copy-lives"
    assert not world.running
