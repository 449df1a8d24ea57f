"""What operators ask, where it meets what is under way. Site and lives are FAKES; `acts`, jobs and ledger are real."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from mcft import api
from mcft.agent.acts import Acts
from mcft.agent.core import Core
from mcft.agent.jobs import JobHandle, Jobs
from mcft.agent.protection import Primary
from mcft.agent.standby import Standby
from mcft.errors import NotFound, Refused, Unreachable
from mcft.generations import Kind, Ledger, Record


@pytest.mark.parametrize("recorded", [True, False])
async def test_a_copy_that_is_not_whole_is_not_taken_over_and_nobody_is_asked(recorded: bool) -> None:
    """The operator may already have switched the good host off for it; the answer says where the good one is.

    Fails if `Acts._failover` asks the other host, or claims, first.
    """
    life: Any = object.__new__(Standby)
    records = [Record(3, kind) for kind in (Kind.PREPARING, Kind.ARMED, *([Kind.NOT_WHOLE] if recorded else []))]
    life.ledger = Ledger("p", "standby", 3, records)
    life.body = SimpleNamespace(role="standby", domain="vm1", peer="host1", reason="this copy is not whole: BLOCK_IO_ERROR")
    life._broken = "" if recorded else "BLOCK_IO_ERROR"
    core: Any = SimpleNamespace(site=SimpleNamespace())  # whoever asks anybody meets an AttributeError
    job: Any = SimpleNamespace(step=lambda _text: None)
    with pytest.raises(Refused) as refused:
        await Acts(core)._failover(life, api.ActRequest(force=True, peer_is_off=True), job)
    assert refused.value.code == "not-whole" and "mcft start vm1" in refused.value.next_step


async def looking(jobs: Jobs) -> api.JobBody:
    """A `protect` that was accepted and looks at the domain and its peer: nothing of it is there yet."""

    async def work(job: JobHandle) -> str:
        job.step("look at the domain and at the peer")
        await asyncio.Event().wait()
        return ""

    job = jobs.start("protect", "vm1", work)
    while not jobs.running("vm1").step:  # type: ignore[union-attr]
        await asyncio.sleep(0)
    return job


def core_with(jobs: Jobs, *lives: Any) -> Any:
    async def info(_domain: str) -> Any:
        return SimpleNamespace(uuid="u", name="vm1")

    core: Any = object.__new__(Core)
    core.site = SimpleNamespace(jobs=jobs, host=SimpleNamespace(info=info))
    core.lives = {life.body.uuid: life for life in lives}
    return core


async def test_a_protect_that_still_looks_can_be_cancelled_and_is_not_unknown() -> None:
    """Fails if `unprotect` is told to cancel it (which the command line can't), or `wait` that there is no such protection."""
    jobs = Jobs()
    job, core = await looking(jobs), core_with(jobs)
    with pytest.raises(NotFound) as unknown:
        core.find("vm1")
    assert unknown.value.code == "not-yet" and "being looked at" in str(unknown.value)
    done = await Acts(core).begin("vm1", "unprotect", api.ActRequest())
    assert (await jobs.ended(done.id)).result == "the protecting was cancelled"
    assert (await jobs.wait(job.id)).state == "cancelled"
    with pytest.raises(NotFound) as unknown:
        core.find("vm1")
    assert unknown.value.code == "not-protected"


@pytest.mark.parametrize("state", ["syncing", "solo"])
async def test_a_delay_is_not_set_while_its_domain_is_being_protected(state: str) -> None:
    """Fails if QEMU gets the new one, and both watchers keep that of the request; or if it is lost, and answered with 0."""
    jobs, told = Jobs(), []

    async def set_delay(delay_ms: int) -> None:
        told.append(delay_ms)

    life: Any = object.__new__(Primary)
    life.body = SimpleNamespace(uuid="u", domain="vm1", role="primary", state=state)
    life.pacing = SimpleNamespace(set_delay=set_delay)
    core = core_with(jobs, life)
    core._view = lambda _life: asyncio.sleep(0)
    await looking(jobs)
    with pytest.raises(Refused, match="being protected"):
        await core.set("vm1", api.SetRequest(delay_ms=5000))
    assert not told
    life.body.state = "protected"  # (the job's very end)
    await core.set("vm1", api.SetRequest(delay_ms=5000))
    assert told == [5000]
    await jobs.close()


@pytest.mark.parametrize("override", [True, False])
async def test_after_an_operators_word_nothing_is_protected_by_itself(override: bool) -> None:
    """`mcft failover --force --peer-is-off`: what the other host's disk holds is the operator's to judge.

    Fails if `Again` may write over it as soon as that host is back.
    """
    recorded: list[str] = []

    async def record(kind: Kind, *_: Any, **__: Any) -> None:
        recorded.append(life.body.manual)
        raise Refused("stop", "far enough")

    async def win(*_: Any) -> bool:
        return True

    life: Any = object.__new__(Standby)
    life.ledger = Ledger("p", "standby", 3, [Record(3, kind) for kind in (Kind.PREPARING, Kind.ARMED)])
    life.body = SimpleNamespace(g=3, domain="vm1", arbiter="etcd", manual="", overlays_g=0)
    life._broken, life.record, life._win = "", record, win
    life.arbiter = SimpleNamespace(forget_resolved=lambda: None)
    with pytest.raises(Refused, match="far enough"):
        await life._take("the operator's word", False, override=override)
    assert recorded == ["the operator's word" if override else ""]


@pytest.mark.parametrize("decided", [Kind.LOST, Kind.SOLO, None])
async def test_an_arbiter_that_answers_goes_before_an_operators_word(
    decided: Kind | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mcft solo --peer-is-off`, typed while this host stood still: the other one had taken over before it went off.

    Fails if the word is taken though the arbiter tells that (simulation, seed 230083), or is not where the arbiter is silent.
    """
    monkeypatch.setattr("mcft.agent.protection.ARBITER_WITHIN_S", 5.0 if decided else 0.05)
    overridden: list[str] = []

    async def decides() -> None:
        await asyncio.sleep(0.01 if decided else 60.0)
        if decided:
            life.ledger.append(decided)

    async def ask(*_: Any) -> None:
        raise Unreachable("peer", "host2 does not answer")

    async def override(why: str) -> None:
        overridden.append(why)

    life: Any = object.__new__(Primary)
    life.ledger = Ledger("p", "primary", 3, [Record(3, kind) for kind in (Kind.PREPARING, Kind.ARMING, Kind.PROTECTED)])
    life.body = SimpleNamespace(uuid="u", pid="p", g=3, domain="vm1", peer="host2", arbiter="etcd", state="muted")
    life.site, life.about, life.override = SimpleNamespace(ask=ask), lambda *_: None, override
    life.qemu_alive = lambda: True
    life.deciding = asyncio.create_task(decides())
    if decided is Kind.LOST:
        with pytest.raises(Refused, match="can't go solo here"):
            await life.solo(force=True, peer_is_off=True)
    else:
        await life.solo(force=True, peer_is_off=True)
    assert bool(overridden) is (decided is None)
    life.deciding.cancel()


async def test_an_override_does_not_undo_what_was_decided_in_that_moment() -> None:
    """The operator's word comes while `lost(g)` is being written, which can't be called back. Fails if both win."""
    went_on: list[str] = []

    async def stop_deciding() -> None:
        life.ledger.append(Kind.LOST)

    life: Any = object.__new__(Primary)
    life.ledger = Ledger("p", "primary", 3, [Record(3, kind) for kind in (Kind.PREPARING, Kind.ARMING, Kind.PROTECTED)])
    life.body = SimpleNamespace(domain="vm1", state="lost")
    life.stop_deciding, life.decide = stop_deciding, lambda _work, name: went_on.append(name)
    with pytest.raises(Refused, match="can't go solo here"):
        await life.override("the operator's word")
    assert went_on == ["go on with"]
