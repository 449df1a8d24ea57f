"""`protect` on the primary's agent: what may be protected, what takes the place of what, and the way back where it fails."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from msgspec import structs

from mcft import api, diskreplica, generations
from mcft.agent import buffers, check, domainxml, maintenance, mccheck, model, protection
from mcft.agent.jobs import JobHandle, done
from mcft.agent.life import AT_REST_WITHIN_S, Life
from mcft.agent.protection import Primary
from mcft.configvalues import rdma_device
from mcft.diskreplica import Disk
from mcft.engines import mc
from mcft.errors import Refused, Remains, Usage
from mcft.generations import Kind, Ledger
from mcft.libvirt_bridge import DomainInfo
from mcft.units import DELAY_MAX_MS, DELAY_MIN_MS

if TYPE_CHECKING:
    from mcft.agent.core import Core

ENDS_POLL_S = 0.1


class Protecting:
    """One host's; `begin` is what an operator asks, `now` the work itself (also of protecting again)."""

    def __init__(self, core: Core) -> None:
        self.core, self.site = core, core.site

    async def begin(self, request: api.ProtectRequest) -> api.JobBody:
        """Refuse what can be refused now; the rest is a job."""
        info = await self.named(request)
        life = self.core.lives.get(info.uuid)
        if life is not None and (answer := self.already(life, request)):
            return self.site.jobs.start("protect", info.name, done(answer), request.key)

        async def work(job: JobHandle) -> str:
            return await self.now(request, job)

        return self.site.jobs.start("protect", info.name, work, request.key)

    async def named(self, request: api.ProtectRequest) -> DomainInfo:
        """The domain, if the request's words are sound and the peer is one. Raises: Usage, Refused, NotFound."""
        delay_ms = self.delay_asked_ms(request)
        if not DELAY_MIN_MS <= delay_ms <= DELAY_MAX_MS:
            raise Usage("bad-delay", f"a delay of {delay_ms} ms is out of range", "10ms to 10s", "--delay 100ms")
        try:
            rdma_device(request.rdma_device or "auto")
        except ValueError as error:
            raise Usage("bad-rdma-device", f"--rdma-device {error}") from None
        if self.buffer_asked(request) == "qemu" and not request.experimental:
            raise Refused(
                "experimental", "netbuffer qemu was never seen at work", "no kernel with sch_plug was at hand for that QEMU",
                "add --experimental, or use --netbuffer plug",
            )  # fmt: skip
        self.site.peer(request.to)
        if self.site.maintenance:
            raise maintenance.refuse(self.site.config.name)
        return await self.site.host.info(request.domain)

    def delay_asked_ms(self, request: api.ProtectRequest) -> int:
        """In the request, or else in the configuration; so for the buffer."""
        return self.site.config.delay_ms if request.delay_ms is None else request.delay_ms

    def buffer_asked(self, request: api.ProtectRequest) -> api.BufferChoice:
        return request.netbuffer if request.netbuffer != "auto" else self.site.config.netbuffer

    def already(self, life: Life, request: api.ProtectRequest) -> str:
        """Empty if this protection may be made (anew), "already" if it is there. Raises: Refused."""
        body = life.body
        if body.state in ("solo", "active", "stopped", "failed", "unprotected") and body.role == "primary":
            return ""
        if body.role == "standby" or body.state == "lost":
            raise Refused(
                "not-primary", f"{body.domain} is led by {body.peer}", f"here it is {body.state}", f"run this on {body.peer}"
            )  # fmt: skip
        if body.peer != request.to:
            raise Refused(
                "other-peer", f"{body.domain} is protected to {body.peer} already", "", f"mcft unprotect {body.domain} first"
            )  # fmt: skip
        if other := self._other_settings(body, request):
            raise other
        if body.state == "protected":
            return "already"
        raise Refused("busy", f"{body.domain} is {body.state}", body.reason, f"mcft wait {body.domain} --for protected")

    @staticmethod
    def _other_settings(body: model.Body, request: api.ProtectRequest) -> Refused | None:
        """Why this is not the protection that is asked for, if it is not."""
        domain, peer = body.domain, body.peer
        if request.delay_ms not in (None, body.delay_ms):
            return Refused(
                "other-settings", f"{domain} is protected to {peer} with another delay", f"{body.delay_ms} ms",
                f"mcft set {domain} --delay {request.delay_ms}ms",
            )  # fmt: skip
        has = {
            "engine": (request.engine, ("auto", body.engine), body.engine),
            "network buffer": (request.netbuffer, ("auto", body.buffer_asked, body.buffer), body.buffer),
            "RDMA device for keepalives": (request.rdma_device, ("", body.rdma_asked), body.rdma_asked or "as configured"),
            "arbiter": (request.arbiter, (None, body.arbiter), body.arbiter),
            "options of engine mc": (request.mc, (None, body.mc), " ".join(mc.words(body.mc))),
        }
        for what, (asked, same, now) in has.items():
            if asked not in same:
                return Refused(
                    "other-settings", f"{domain} is protected to {peer} with another {what}", now,
                    f"mcft unprotect {domain}, then protect it anew",
                )  # fmt: skip
        return None

    async def now(self, request: api.ProtectRequest, job: JobHandle) -> str:
        """Look, refuse, set up. Everything before the first step changes nothing."""
        job.step("look at the domain and at the peer")
        peer, config = request.to, self.site.config
        domain = await self.site.host.info(request.domain)
        theirs = await self._records_there(peer, domain)
        previous = self.core.lives.get(domain.uuid)
        at_rest = previous is None or await previous.at_rest(AT_REST_WITHIN_S)
        previous = self.core.lives.get(domain.uuid)  # (an undo that had to be repeated puts back what was before it)
        if previous is not None and not at_rest:
            raise previous.not_settled()
        if theirs.maintenance:
            raise maintenance.refuse(peer)
        if theirs.running:
            raise Refused("runs-there", f"{domain.name} runs on {peer} too", "two copies with one identity", f"look at {peer}")
        highest = await self.site.store.highest_generation(domain.uuid)
        life = await self.candidate(request, generations.first_generation(highest, theirs.highest_g))
        body = life.body
        if previous is not None:
            body.autostart = body.autostart or previous.body.autostart
            body.xml = body.xml if body.persistent else previous.body.xml
        body.engine = await mccheck.choose_engine(life.qmp, request.engine, config)
        await check.refuse_engine(life)
        check.refuse_older(await check.running_qemu(life.qmp), self.core.hello_of(peer).qemu, domain.name, peer)
        await check.refuse_busy(life.qmp, domain.name)
        asked = self.buffer_asked(request)
        if body.engine == "mc":
            live = await self.site.host.xml(body.uuid)
            await mccheck.refuse(life, live, config)
            body.buffer = await mccheck.choose_buffer(asked, body)
            body.second_monitor = mccheck.second_monitor(live)
            await life.choose_rdma()
        else:
            body.buffer = await buffers.choose(asked, body.nics)
            await life.choose_rdma()
            body.disks = await self.disks_of(life)
        await self.site.hook.prove(config.name, domainxml.machine(body.xml))
        await self.site.arbiters.refuse_unfit(body.arbiter, peer)
        life.on_gone = self.core.gone
        if previous is not None:
            body.previous = model.encode(previous.body).decode()
        self.core.lives[body.uuid] = life
        try:
            await life.protect(job.step)
        except Remains as error:
            if life.ledger.newest in (None, Kind.PREPARING):
                life.undo_until_done(error.reason)
            raise
        except BaseException:
            if life.ledger.newest in (None, Kind.PREPARING):
                self.core.gone(life)
                await asyncio.shield(self._back_to(previous, life))
            raise
        return f"{body.domain} is protected, its standby is on {peer}"

    async def _records_there(self, peer: str, domain: DomainInfo) -> model.Records:
        """What the peer knows of the domain. A guest of before that it has lost is being ended there: that is waited for."""
        about = model.About(domain.uuid, domain=domain.name)
        theirs = await self.site.ask(peer, "records", about, model.Records, 5.0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(AT_REST_WITHIN_S):
                while theirs.running and theirs.state == "lost":
                    await asyncio.sleep(ENDS_POLL_S)
                    theirs = await self.site.ask(peer, "records", about, model.Records, 5.0)
        return theirs

    async def candidate(self, request: api.ProtectRequest, g: int) -> Primary:
        """What would be protected; nothing of it is kept. Raises: NotFound, Refused."""
        request = structs.replace(request, delay_ms=self.delay_asked_ms(request))
        body = await protection.make_body(self.site, request, g)
        return Primary(self.site, body, Ledger(body.pid, "primary", body.g))

    async def disks_of(self, life: Primary) -> list[Disk]:
        """The running domain's writable disks as QEMU has them. Raises: Refused."""
        found = []
        for disk in domainxml.disks(await self.site.host.xml(life.body.uuid)):
            drive = await diskreplica.drive_of(life.qmp, disk.alias)
            if drive is None:
                raise Refused("disk-not-protectable", f"disk {disk.target} has no medium", "", "detach it")
            qom, inserted = drive
            node = inserted["node-name"]
            if not node or node.startswith("mcft-"):
                raise Refused(
                    "disk-busy", f"disk {disk.target} still carries a node of mcft's ({node})", "an earlier protection left it",
                    f"mcft forget {life.body.domain} --local",
                )  # fmt: skip
            direct = bool(inserted.get("cache", {}).get("direct"))
            found.append(Disk(disk.target, qom, node, inserted["image"]["virtual-size"], disk.path, disk.format, direct))
        return found

    async def _back_to(self, previous: Life | None, failed: Primary) -> None:
        """A protecting that failed leaves what was before: nothing, or a primary without a standby (`gone` puts it back)."""
        if previous is None:
            await self.site.store.delete(failed.body.uuid)
            failed.forget_labels()
        elif previous.ledger.won:
            self.site.markers.free(previous.body.uuid)
