"""`mcft start`: after both hosts were down, find out where a domain belongs, and start it there.

Which side may start it is `generations.belongs`; a side that can't tell by its own records needs the peer's. Whatever the
agent has to settle first by itself (asking who went on, committing the overlays of a take-over) is waited for.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, cast

import msgspec

from mcft import api, generations
from mcft.agent import domainxml, model
from mcft.agent.jobs import JobHandle
from mcft.agent.model import peer_ledger
from mcft.arbiter.base import Standing
from mcft.errors import Failed, McftError, NotFound, Refused, TimedOut
from mcft.generations import UNDECIDED, Kind

if TYPE_CHECKING:  # so that it can be tested without libvirt
    from mcft.agent.core import Core
    from mcft.agent.life import Life
    from mcft.agent.standby import Standby

ASK_S = 5.0
SETTLED_WITHIN_S = 20.0
ARBITER_S = 10.0
ANSWER_AFTER_S = 5.0  # a peer that is asked to start says how far it is, and is asked again
ACCEPTED = "the operator accepted that data may be lost (start --accept-lost-data)"


class ColdStart:
    """One start of one protected domain, asked of this host."""

    def __init__(self, core: Core, life: Life, job: JobHandle, *, accept_lost_data: bool = False, for_peer: bool = False) -> None:
        """for_peer: the other agent asked, so it is not asked back to start it."""
        self.core, self.site, self.uuid, self.job = core, core.site, life.body.uuid, job
        self.domain, self.peer, self.host = life.body.domain, life.body.peer, core.site.config.name
        self.accept_lost_data, self.for_peer = accept_lost_data, for_peer
        self.theirs: model.Records | None = None
        self.silence = ""

    @property
    def life(self) -> Life:
        """As it is now: a copy that took over is another object. Raises: NotFound."""
        if (life := self.core.lives.get(self.uuid)) is None:
            raise NotFound("not-protected", f"{self.domain} is not protected any more", "", f"virsh start {self.domain}")
        return life

    async def run(self) -> str:
        """What was done. Raises: Refused (with what is known and unknown), TimedOut, Failed."""
        if runs(self.life):
            return f"{self.domain} already runs on {self.host}"
        await self._ask_peer()
        if self.theirs is not None and self.theirs.running:
            return f"{self.domain} already runs on {self.peer}"
        await self._settled()
        if runs(self.life):
            return f"{self.domain} already runs on {self.host}"
        where = self._where()
        if where == "unknown" and await self._by_the_arbiter():
            where = "here"
        if where == "there":
            return await self._start_there()
        if where == "both":
            raise Refused(
                "two-histories", f"{self.host} and {self.peer} both went on with {self.domain}, so each has a history of its own",
                "an operator's word made it so, and mcft does not choose",
                f"where the history shall go: mcft forget {self.domain} --local; then start it on the other",
            )  # fmt: skip
        if where == "unknown":
            await self._by_the_operators_word()
        return await self._start_here()

    async def _ask_peer(self) -> None:
        self.job.step(f"ask {self.peer} what it knows")
        try:
            about = self.core.about(self.life)
            self.theirs = await self.site.ask(self.peer, "records", about, model.Records, ASK_S)
        except McftError as error:
            self.silence = str(error)

    async def _settled(self) -> None:
        """What the agent has to do first by itself is done. Raises: TimedOut.

        Asking a silent peer is not waited for; committing overlays is, however long it takes.
        """
        life = self.life
        deciding = life.deciding
        told = self.theirs is not None and self.theirs.pid != ""
        if deciding is None or deciding.done() or not (told or life.ledger.won):
            return
        self.job.step("commit the overlays of the take-over" if life.body.overlays_g else "find out who went on")
        within_s = None if life.body.overlays_g else SETTLED_WITHIN_S
        try:
            await asyncio.wait_for(asyncio.shield(deciding), within_s)
        except TimeoutError:
            if generations.entitled(self.life.ledger) is not None:
                raise TimedOut(
                    "not-settled", f"{self.host} is still busy with {self.domain}", life.body.reason, f"mcft events {self.domain}"
                ) from None

    def _where(self) -> str:
        ledger = self.life.ledger
        theirs = peer_ledger(self.theirs) if self.theirs is not None and self.theirs.pid else None
        where = generations.belongs(ledger, theirs)
        if self.theirs is not None and self.theirs.qemu_alive and generations.entitled(ledger) is None:
            # Neither knows who went on, and its copy still can: started here as well there would be two.
            raise Refused(
                "copy-lives", f"the copy of {self.domain} on {self.peer} lives, with its memory",
                f"there it is {self.theirs.state}", f"on {self.peer}: mcft failover {self.domain}",
            )  # fmt: skip
        # Shut down, but the standby was never heard to let go: it may have been told to take over.
        letting_go = ledger.newest is Kind.ENDED and self._deciding()
        return "unknown" if where == "here" and letting_go else where

    def _deciding(self) -> bool:
        return self.life.deciding is not None and not self.life.deciding.done()

    # ---- there ----

    async def _start_there(self) -> str:
        body = self.life.body
        if self.for_peer:
            raise Refused("not-here", f"{self.domain} does not belong on {self.host}", f"here it is {body.state}", "mcft status")
        if self.theirs is None:
            raise Refused(
                "belongs-there", f"{self.domain} belongs on {self.peer}, which does not answer: {self.silence}",
                f"{self.host} knows that its own disks are old ({self._records()})",
                f"bring {self.peer} back, then: mcft start {self.domain}. "
                f"If it is gone for good: mcft forget {self.domain} --local",
            )  # fmt: skip
        self.job.step(f"{self.peer} starts it")
        asked = msgspec.structs.replace(self.core.about(self.life), detail=secrets.token_hex(8))
        while True:
            answer = await self.site.ask(self.peer, "start", asked, model.Answer, ANSWER_AFTER_S * 3)
            if answer.kind == "done":
                return answer.detail
            if answer.kind != "running":
                raise Failed("not-started", f"starting {self.domain} was {answer.kind} on {self.peer}")
            self.job.step(f"{self.peer}: {answer.detail}")

    # ---- nobody knows ----

    def _records(self) -> str:
        newest = self.life.ledger.newest
        return f"its newest record is {newest.value if newest else 'none'}({self.life.ledger.g})"

    async def _by_the_arbiter(self) -> bool:
        """Whether etcd says that the other side did not go on, and now can't any more: this primary's claim is won.

        A fence can't say that: that a host is off now does not tell what it did before.
        """
        life = self.life
        may = life.body.arbiter == "etcd" and life.ledger.side == "primary" and life.ledger.newest in UNDECIDED
        if not may or life.qemu_alive() or life.arbiter.may_claim():
            return False
        primary = self.core.as_primary(life)
        self.job.step("ask the arbiter")
        await primary.stop_deciding()
        standing: Standing | None = None
        try:
            standing = await asyncio.wait_for(primary.arbiter.claim(), ARBITER_S)
        except TimeoutError:
            self.silence = f"{self.silence}; the arbiter does not answer either"
        if standing is Standing.WON:
            primary.decide(lambda: primary.go_solo(f"{self.peer} had not gone on: the arbiter says so"), "go on with")
        else:
            primary.decide(primary.go_on, "go on with")
        if standing is not Standing.WON:
            return False
        assert primary.deciding is not None
        await asyncio.shield(primary.deciding)
        return True

    async def _by_the_operators_word(self) -> None:
        """Raises: Refused without that word."""
        life = self.life
        copy = cast("Standby", life) if life.body.role == "standby" else None
        if copy is not None and copy.qemu_alive():
            raise Refused(
                "copy-lives", f"the copy of {self.domain} on {self.host} lives, with its memory", self.silence,
                f"mcft failover {self.domain}",
            )  # fmt: skip
        if not self.accept_lost_data:
            raise self._nobody_knows()
        life.event("override", f"{ACCEPTED}; {self.peer}: {self.silence or 'has no records of it'}", "warning")
        if copy is not None:
            await copy.take_cold(ACCEPTED)
            return
        primary = self.core.as_primary(life)
        if primary.ledger.newest is Kind.ENDED:
            await primary.stop_deciding()
            primary.body.manual = ACCEPTED
            await primary.save()
        else:
            await primary.override(ACCEPTED)

    def _nobody_knows(self) -> Refused:
        body, standby = self.life.body, self.life.ledger.side == "standby"
        silent = f"does not answer ({self.silence.rstrip('.')})" if self.silence else "has no records of it"
        if standby:
            known = f"{self.host} held a copy that followed {self.peer}, and lost its memory ({self._records()})"
            unknown = f"Unknown: what {self.domain} wrote on {self.peer} after that, and whether it went on there alone"
        else:
            known = f"{self.host} led {self.domain} until its end here ({self._records()})"
            unknown = f"Unknown: whether {self.peer} then went on with it; if so, what it has done since is only there"
        return Refused(
            "nobody-knows", f"{self.host} can't tell which host has the newest {self.domain}, as {self.peer} {silent}",
            f"Known: {known}. {unknown}. That {self.peer} is off now would not tell",
            f"bring {body.peer} back, then: mcft start {self.domain}. Only if it is gone for good, or certainly did not go on: "
            f"mcft start {self.domain} --accept-lost-data",
        )  # fmt: skip

    # ---- here ----

    async def _start_here(self) -> str:
        primary = self.core.as_primary(self.life)
        self.job.step(f"start it on {self.host}")
        await primary.look()
        await primary.free()
        body, host = primary.body, self.site.host
        if await host.find(self.uuid) is None and not body.persistent:
            await host.create(body.xml)
        else:
            if await host.find(self.uuid) is None:
                await host.define(domainxml.moved(body.xml, body.disk_paths) if primary.ledger.side == "standby" else body.xml)
            await host.start_domain(self.uuid)
        info = await host.info(self.uuid)
        if not info.running:
            raise Failed("not-started", f"{self.domain} was started on {self.host} and ended at once", "", "look at QEMU's log")
        await primary.look()
        again = self.site.config.auto_protect and not body.manual and not self.site.maintenance
        return f"{self.domain} runs on {self.host}" + (f"; it is protected to {body.peer} again by itself" if again else "")


def runs(life: Life) -> bool:
    """Whether the guest runs here; a copy that follows does not count."""
    return life.body.role == "primary" and life.qemu_alive()


def begin(core: Core, life: Life, request: api.ActRequest, *, for_peer: bool = False) -> api.JobBody:
    """The job. Of a domain that runs here it is done at once, whatever else is at work on it."""
    domain = life.body.domain
    if runs(life):
        return core.jobs.answer("start", domain, f"{domain} already runs on {core.site.config.name}", request.key)

    async def work(job: JobHandle) -> str:
        accept = request.accept_lost_data
        return await ColdStart(core, life, job, accept_lost_data=accept, for_peer=for_peer).run()

    return core.jobs.start("start", domain, work, request.key)


async def answer(core: Core, peer: str, body: bytes) -> model.Answer:
    """The peer's agent asks: an operator typed it there, and by its records the domain belongs here."""
    about = msgspec.json.decode(body, type=model.About)
    life = core.lives.get(about.uuid)
    if life is None or life.body.peer != peer:
        raise NotFound("not-protected", f"{core.site.config.name} has no protection of {about.domain} with {peer}")
    job = begin(core, life, api.ActRequest(key=f"start-{about.pid}-{about.detail}"), for_peer=True)
    if job.state == "running":
        job = await core.jobs.wait(job.id, ANSWER_AFTER_S)
    if job.error is not None:
        api.raise_error(job.error)
    return model.Answer("done" if job.state == "done" else job.state, about.g, job.result or job.step)
