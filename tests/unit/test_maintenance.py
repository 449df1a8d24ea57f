"""A host is emptied: what goes, what is named, what lasts. Core, peer and lives are FAKES; `maintenance` and jobs are real."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from mcft import api
from mcft.agent import maintenance, model
from mcft.agent.hook import boot_id
from mcft.agent.jobs import JobHandle, Jobs
from mcft.errors import Failed, NotFound, Unreachable


class World:
    """host1; `add` gives it protections. said: what was done, in order."""

    def __init__(self) -> None:
        self.meta: dict[str, str] = {}
        self.said: list[str] = []
        self.jobs = Jobs()
        self.lives: dict[str, Any] = {}
        self.peer_error: Exception | None = None
        store = SimpleNamespace(meta=self._meta, set_meta=self._set_meta)
        self.site = SimpleNamespace(
            config=SimpleNamespace(name="host1"), store=store, maintenance=False, ask=self._ask, jobs=self.jobs
        )
        self.core: Any = SimpleNamespace(
            site=self.site, lives=self.lives, jobs=self.jobs, act=self._act, as_primary=lambda life: life,
            about=lambda life: model.About(life.body.uuid, life.body.pid, 1, life.body.domain),
        )  # fmt: skip

    def add(self, domain: str, role: str, state: str, alive: bool = True) -> Any:
        body = SimpleNamespace(uuid=f"u-{domain}", pid="p", domain=domain, role=role, state=state, peer="host2", reason="")

        async def go_alone(why: str) -> None:
            self.said.append(f"{domain} alone: {why}")

        life = SimpleNamespace(
            body=body, alive=alive, gate=SimpleNamespace(state_path="/nonexistent/state"), event=lambda *_words: None,
            qemu_alive=lambda: life.alive, go_alone=go_alone,
        )  # fmt: skip
        self.lives[body.uuid] = life
        return life

    async def _meta(self, key: str) -> str | None:
        return self.meta.get(key)

    async def _set_meta(self, key: str, value: str) -> None:
        self.meta[key] = value

    async def _ask(self, peer: str, verb: str, about: model.About, _reply: Any, _timeout_s: float) -> model.Answer:
        self.said.append(f"{peer}: {verb} {about.domain}")
        if self.peer_error:
            raise self.peer_error
        life = self.lives[about.uuid]
        life.alive, life.body.state = False, "lost"
        return model.Answer("gone-alone")

    async def _act(self, uuid: str, verb: str, _request: api.ActRequest) -> api.JobBody:
        life = self.lives[uuid]

        async def work(_job: JobHandle) -> str:
            self.said.append(f"{verb} {life.body.domain}")
            if life.body.reason == "fails":
                raise Failed("switch", "host2 could not take it over")
            life.body.state, life.alive = "lost", False
            return ""

        return self.jobs.start(verb, life.body.domain, work)

    async def ask(self, on: bool, for_shutdown: bool = False) -> api.JobBody:
        """The job once it has ended."""
        job = await maintenance.begin(self.core, api.MaintenanceRequest(on, for_shutdown))
        while job.state == "running":
            job = await self.jobs.wait(job.id, 5.0)
        return job

    async def rebooted(self, same_boot: bool = False) -> bool:
        """Whether it is in maintenance after a restart of the agent (same_boot), or of the host."""
        if not same_boot:
            self.meta = {key: value.replace(boot_id(), "an earlier boot") for key, value in self.meta.items()}
        await maintenance.load(self.site)  # type: ignore[arg-type]
        return self.site.maintenance


@pytest.fixture
def world() -> World:
    return World()


async def test_what_leads_is_switched_and_what_follows_is_let_go(world: World) -> None:
    world.add("vm1", "primary", "protected")
    world.add("vm2", "standby", "protected")
    world.add("vm3", "primary", "stopped", alive=False)
    world.add("vm4", "standby", "lost", alive=False)
    job = await world.ask(True)
    assert job.state == "done" and "vm1 runs on host2" in job.result and "vm2 goes on alone on host2" in job.result
    assert world.said == ["failover vm1", "host2: go-alone vm2"]
    assert world.site.maintenance


async def test_what_can_not_go_is_named_and_the_others_go(world: World) -> None:
    world.add("vm1", "primary", "protected").body.reason = "fails"
    world.add("vm2", "primary", "solo")
    world.add("vm3", "primary", "protected")
    job = await world.ask(True)
    assert job.state == "failed" and job.error is not None and job.error.exit_code == 1
    text = f"{job.error.message} {job.error.reason} {job.error.next_step}"
    assert "vm1: host2 could not take it over" in text and "vm2: it is solo here" in text and "vm3 runs on host2" in text
    assert world.site.maintenance, "it stays on: what is left is the operator's"


async def test_a_silent_primary_keeps_its_copy_here(world: World) -> None:
    world.peer_error = Unreachable("peer-unreachable", "host2 did not answer")
    copy = world.add("vm1", "standby", "protected")
    job = await world.ask(True)
    assert job.state == "failed" and copy.alive


async def test_a_job_of_the_domain_is_waited_for(world: World) -> None:
    life = world.add("vm1", "primary", "syncing")

    async def work(_job: JobHandle) -> None:
        life.body.state = "protected"

    world.jobs.start("protect", "vm1", work)
    assert (await world.ask(True)).state == "done"
    assert world.said == ["failover vm1"]


async def test_an_operators_word_lasts_over_a_reboot(world: World) -> None:
    await world.ask(True)
    assert await world.rebooted()
    await world.ask(False)
    assert not world.site.maintenance and not await world.rebooted()


async def test_a_shutdowns_lasts_until_the_next_boot(world: World) -> None:
    await world.ask(True, for_shutdown=True)
    assert world.site.maintenance and await world.rebooted(same_boot=True)
    assert not await world.rebooted()


async def test_a_shutdown_does_not_shorten_an_operators_word(world: World) -> None:
    await world.ask(True)
    await world.ask(True, for_shutdown=True)
    assert await world.rebooted()
    await world.ask(False, for_shutdown=True)
    assert world.site.maintenance


# ---- the other side: its standby's host asks ----


async def test_go_alone_is_answered_once_it_is_done(world: World) -> None:
    world.add("vm1", "primary", "protected")
    about = msgspec.json.encode(model.About("u-vm1", "p", 1, "vm1", "nonce"))
    for _ in range(2):  # on two links
        assert (await maintenance.answer(world.core, "host2", about)).kind == "gone-alone"
    assert world.said == ["vm1 alone: host2 goes into maintenance"]


@pytest.mark.parametrize(("peer", "pid"), [("host3", "p"), ("host2", "another instance")])
async def test_nobody_else_can_ask_for_it(world: World, peer: str, pid: str) -> None:
    world.add("vm1", "primary", "protected")
    with pytest.raises(NotFound):
        await maintenance.answer(world.core, peer, msgspec.json.encode(model.About("u-vm1", pid, 1, "vm1")))
    assert world.said == []


async def test_a_protecting_to_it_is_cancelled(world: World) -> None:
    import asyncio

    world.add("vm1", "primary", "syncing")
    job = world.jobs.start("protect", "vm1", lambda _job: asyncio.Event().wait())  # type: ignore[arg-type, return-value]
    about = msgspec.json.encode(model.About("u-vm1", "p", 1, "vm1"))
    assert (await maintenance.answer(world.core, "host2", about)).kind == "cancelled"
    assert world.jobs.get(job.id).state == "cancelled"
