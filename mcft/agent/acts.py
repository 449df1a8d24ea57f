"""What operators ask of a protection that exists: unprotect, failover, solo, start."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec

from mcft import api
from mcft.agent import coldstart, model
from mcft.agent.jobs import JobHandle, done
from mcft.agent.life import AT_REST_WITHIN_S, Life
from mcft.agent.standby import Standby
from mcft.errors import Failed, McftError, Refused, TimedOut, Unreachable
from mcft.generations import Kind
from mcft.libvirt_unit import daemon_unit

if TYPE_CHECKING:
    from mcft.agent.core import Core

TAKEN_WITHIN_S = 30.0


class Acts:
    """Each is a job; `begin` starts it."""

    def __init__(self, core: Core) -> None:
        self.core, self.site = core, core.site

    async def begin(self, domain: str, verb: str, request: api.ActRequest) -> api.JobBody:
        """Refuse what can be refused now; the rest is a job. Raises: NotFound, Refused."""
        if verb == "unprotect" and not any(domain in (lf.body.domain, lf.body.uuid) for lf in self.core.lives.values()):
            info = await self.site.host.info(domain)
            looks = self.site.jobs.running(info.name, "protect")
            if looks is None:
                return self.site.jobs.start(verb, info.name, done("not protected"), request.key)
            await self.site.jobs.cancelled(looks.id)
            if info.uuid not in self.core.lives:
                return self.site.jobs.start(verb, info.name, done("the protecting was cancelled"), request.key)
        life = self.core.find(domain)
        if verb == "start":
            return coldstart.begin(self.core, life, request)
        acts = {"unprotect": self._unprotect, "failover": self._failover, "solo": self._solo}
        running = self.site.jobs.running(life.body.domain, "protect")
        if verb == "unprotect" and running is not None:
            await self.site.jobs.cancelled(running.id)
            if (left := self.core.lives.get(life.body.uuid)) is not None and left.ledger.newest is Kind.PREPARING:
                return self.site.jobs.start(verb, life.body.domain, self._once_undone(left), request.key)
            if not life.body.previous and life.body.uuid not in self.core.lives:
                return self.site.jobs.start(verb, life.body.domain, done("the protecting was cancelled and undone"), request.key)
            life = await self.core.once_back(life.body.uuid)
        target = life

        async def work(job: JobHandle) -> str:
            return await acts[verb](target, request, job)

        return self.site.jobs.start(verb, life.body.domain, work, request.key)

    def _once_undone(self, life: Life) -> Callable[[JobHandle], Awaitable[str]]:
        """The protecting was cancelled, and its undo is being repeated."""

        async def work(job: JobHandle) -> str:
            job.step("undo the protecting")
            if not await life.at_rest(AT_REST_WITHIN_S):
                raise TimedOut(
                    "undo-incomplete", f"undoing the protecting of {life.body.domain} goes on", life.body.reason,
                    f"mcft status {life.body.domain}; look at {daemon_unit()} on {self.site.config.name}",
                )  # fmt: skip
            return "the protecting was cancelled and undone"

        return work

    async def _unprotect(self, life: Life, _request: api.ActRequest, job: JobHandle) -> str:
        life = self.core.as_primary(life)
        await life.unprotect(job.step)
        return f"{life.body.domain} is not protected any more"

    async def _failover(self, life: Life, request: api.ActRequest, job: JobHandle) -> str:
        if life.body.role == "primary":
            return await self.core.as_primary(life).switch(job.step)
        if not isinstance(life, Standby):
            raise Refused("not-here", f"{life.body.domain} has no standby here", life.body.reason)
        if life.broken:
            raise _not_whole(life, life.broken)
        job.step(f"ask {life.body.peer} to hand over")
        try:
            asked = msgspec.structs.replace(self.core.about(life), detail=secrets.token_hex(8))
            await self.site.ask(life.body.peer, "switch", asked, model.Answer, 30.0)
        except Unreachable as error:
            return await self._claim(life, request, error)
        return f"{life.body.domain} runs here"

    async def _claim(self, life: Standby, request: api.ActRequest, error: McftError) -> str:
        """(d): the operator asks, and the primary's agent is silent. Its gate may not be."""
        status = await life.gate.ask("status")
        ages = [link["age_ms"] for link in status["links"] if link["age_ms"] is not None]
        if ages and min(ages) < self.site.config.loss_ms and status["peer"]["qemu"] == "running" and not request.force:
            raise Refused(
                "primary-alive", f"{life.body.peer} still sends keepalives though its agent does not answer", str(error),
                "wait for its agent, or if that host must go: power it off, then mcft failover --force --peer-is-off",
            )  # fmt: skip
        if request.force and not request.peer_is_off:
            raise Refused(
                "say-off", "a forced failover needs your word that the other host is off", "two copies would run otherwise",
                "add --peer-is-off",
            )  # fmt: skip
        if status["disk_error"]:
            raise _not_whole(life, status["disk_error"])
        await life.gate.ask("claim")
        if request.force:
            await life.override("the operator's word in the arbiter's place")
        else:
            life.begin_take("the operator asked")
        assert life.deciding is not None
        done, _ = await asyncio.wait({life.deciding}, timeout=TAKEN_WITHIN_S)
        if not done:
            raise TimedOut(
                "arbiter-silent", f"taking {life.body.domain} over goes on", life.body.reason,
                f"if {life.body.peer} is certainly off: mcft failover {life.body.domain} --force --peer-is-off",
            )  # fmt: skip
        if not life.ledger.spoken:
            raise Failed("take-over", f"{life.body.domain} could not be taken over", life.body.reason, "mcft events")
        return f"{life.body.domain} runs here"

    async def _solo(self, life: Life, request: api.ActRequest, job: JobHandle) -> str:
        return await self.core.as_primary(life).solo(force=request.force, peer_is_off=request.peer_is_off)


def _not_whole(life: Standby, why: str) -> Refused:
    """Nothing is asked and nobody shot for a copy that never takes over."""
    domain = life.body.domain
    so = f"the good one is {life.body.peer}'s: bring that host back, then: mcft start {domain}"
    return Refused("not-whole", f"the copy of {domain} here is not whole", why, so)
