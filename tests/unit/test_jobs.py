"""Jobs: keys, one at a time per domain, polling, cancelling, errors; and the journal's waiting."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mcft.agent import jobs as jobs_module
from mcft.agent.events import EventLog
from mcft.agent.jobs import JobHandle, Jobs
from mcft.agent.store import Store
from mcft.errors import Failed, NotFound, Refused


async def finished(jobs: Jobs, job_id: str) -> jobs_module.api.JobBody:
    async with asyncio.timeout(5):
        while (body := await jobs.wait(job_id, 5)).state == "running":
            pass
    return body


async def test_a_job_says_its_steps_and_its_result() -> None:
    jobs, go = Jobs(), asyncio.Event()

    async def work(handle: JobHandle) -> str:
        handle.step("copying", 0.5)
        await go.wait()
        return "protected"

    started = jobs.start("protect", "vm1", work)
    assert started.state == "running"
    body = await jobs.wait(started.id, 5)
    assert (body.step, body.progress) == ("copying", 0.5)
    assert jobs.running("vm1") == body
    go.set()
    body = await finished(jobs, started.id)
    assert (body.state, body.result, body.progress) == ("done", "protected", 1.0)
    assert body.finished
    assert jobs.running("vm1") is None


async def test_a_poll_ends_in_time() -> None:
    jobs = Jobs()
    started = jobs.start("protect", "vm1", lambda handle: asyncio.Event().wait())  # type: ignore[arg-type, return-value]
    assert (await jobs.wait(started.id, 0.01)).state == "running"
    await jobs.close()


async def test_one_at_a_time_per_domain() -> None:
    jobs, go = Jobs(), asyncio.Event()

    async def work(handle: JobHandle) -> None:
        await go.wait()

    first = jobs.start("protect", "vm1", work)
    with pytest.raises(Refused) as error:
        jobs.start("unprotect", "vm1", work)
    assert error.value.code == "busy"
    assert first.id in error.value.message
    other = jobs.start("protect", "vm2", work)
    go.set()
    assert (await finished(jobs, first.id)).state == (await finished(jobs, other.id)).state == "done"
    jobs.start("unprotect", "vm1", work)
    await jobs.close()


async def test_the_same_key_is_the_same_job() -> None:
    jobs, runs = Jobs(), []

    async def work(handle: JobHandle) -> None:
        runs.append(handle.id)

    first = jobs.start("protect", "vm1", work, "k")
    assert jobs.start("protect", "vm1", work, "k").id == first.id
    await finished(jobs, first.id)
    assert jobs.start("protect", "vm1", work, "k").state == "done"
    assert runs == [first.id]
    with pytest.raises(Refused, match="belongs to protect of vm1"):
        jobs.start("unprotect", "vm1", work, "k")
    assert jobs.start("protect", "vm1", work).id != first.id
    await jobs.close()


async def test_cancelling_lets_the_act_undo_itself_undisturbed() -> None:
    jobs, undone, go = Jobs(), [], asyncio.Event()

    async def work(handle: JobHandle) -> None:
        try:
            handle.step("waiting")
            await asyncio.Event().wait()
        finally:
            await go.wait()
            undone.append(True)

    job = jobs.start("protect", "vm1", work)
    await jobs.wait(job.id, 5)
    assert jobs.cancel(job.id).state == "running"
    assert "cancelling" in jobs.cancel(job.id).step
    go.set()
    assert (await finished(jobs, job.id)).state == "cancelled"
    assert undone == [True]
    assert jobs.cancel(job.id).state == "cancelled"


async def test_a_job_cancelled_before_its_first_step_ends() -> None:
    jobs = Jobs()

    async def work(handle: JobHandle) -> None:
        raise AssertionError

    job = jobs.start("protect", "vm1", work)
    jobs.cancel(job.id)
    assert (await finished(jobs, job.id)).state == "cancelled"


@pytest.mark.parametrize(
    ("error", "code", "exit_code"),
    [(Refused("unsafe", "no"), "unsafe", 4), (Failed("f", "x"), "f", 1), (KeyError("oops"), "internal", 1)],
)
async def test_errors_become_bodies(error: Exception, code: str, exit_code: int) -> None:
    jobs = Jobs()

    async def work(handle: JobHandle) -> None:
        raise error

    body = await finished(jobs, jobs.start("protect", "vm1", work).id)
    assert body.state == "failed"
    assert body.error is not None
    assert (body.error.code, body.error.exit_code) == (code, exit_code)


async def test_old_jobs_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs()

    async def work(handle: JobHandle) -> None:
        pass

    monkeypatch.setattr(jobs_module, "KEPT", 3)
    ids = []
    for number in range(6):
        ids.append(jobs.start("protect", "vm1", work, str(number)).id)
        await finished(jobs, ids[-1])
    with pytest.raises(NotFound, match="no job"):
        jobs.get(ids[0])
    assert jobs.get(ids[-1]).state == "done"
    assert jobs.start("protect", "vm1", work, "0").id != ids[0]
    await jobs.close()


async def test_the_journal_wakes_who_waits_and_goes_on_after_a_restart(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "store.db")
    events = await EventLog.open(store)
    assert await events.wait(0, None, 0.0) == []
    follower = asyncio.create_task(events.wait(0, "vm1", 5))
    events.emit("vm2", "other", "not for vm1")
    first = events.emit("vm1", "protected", "yes", "alarm")
    assert await follower == [first]
    assert events.last("vm1") == first
    assert [e.domain for e in await events.wait(0, None, 0)] == ["vm2", "vm1"]
    await events.close()
    again = await EventLog.open(store)
    assert again.last("vm1") == first
    assert again.emit("vm1", "solo", "again").id == first.id + 1
    # An id of a journal that was lost means: from now on.
    assert await again.wait(999, None, 0.0) == []
    await again.close()
    await store.close()


async def test_the_journal_pages_from_disk_beyond_its_ring(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "store.db")
    events = await EventLog.open(store)
    for number in range(1500):
        events.emit("vm1" if number % 10 else "vm2", "n", str(number))
    await events.close()
    again = await EventLog.open(store)
    assert [e.id for e in await again.wait(0, None, 0)] == list(range(501, 1501))
    assert len(await again.wait(0, "vm2", 0)) == 150
    await again.close()
    await store.close()
