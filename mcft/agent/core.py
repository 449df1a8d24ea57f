"""The agent's core: one `Life` per protection, and what operators ask of them (the other agent's words: `peerverbs.py`)."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from mcft import api, diskreplica, generations
from mcft.agent import buffers, check, coldstart, domainxml, maintenance, mccheck, model, protection, standby, statusview
from mcft.agent.ends import DESTROYED
from mcft.agent.events import EventLog
from mcft.agent.hook import boot_id
from mcft.agent.jobs import JobHandle, Jobs
from mcft.agent.peerverbs import PeerVerbs
from mcft.agent.protection import Primary
from mcft.agent.site import AT_REST_WITHIN_S, Life, Site, log, stored_ledger
from mcft.agent.standby import Standby
from mcft.config import ARBITERS
from mcft.configvalues import rdma_device
from mcft.diskreplica import Disk
from mcft.errors import Failed, McftError, NotFound, Refused, Remains, TimedOut, Unreachable, Usage
from mcft.generations import Kind, Ledger
from mcft.libvirt_bridge import DomainInfo
from mcft.units import DELAY_MAX_MS, DELAY_MIN_MS

TAKEN_WITHIN_S = 30.0
OWNER_STATES = ("solo", "active", "stopped", "unprotected")


class Core:
    """See `core_api.Core` for what the server expects."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.lives: dict[str, Life] = {}
        site.ports.held = self._ports
        self.peer_verbs = PeerVerbs(self)

    @property
    def jobs(self) -> Jobs:
        return self.site.jobs

    @property
    def events(self) -> EventLog:
        return self.site.events

    # ---- start ----

    async def load(self) -> None:
        """Read what is stored and go on from it; each protection by itself, so that one can't hold up the others."""
        for stored in await self.site.store.load():
            await self._load_one(msgspec.json.decode(stored.body, type=model.Body))

    async def _load_one(self, body: model.Body) -> None:
        ledger = await stored_ledger(self.site.store, body)
        life = self.alive(body, ledger)
        if ledger.records:
            life.recompute_labels()  # a power loss may have taken the newest label, never the record before it
        if body.links and ledger.newest not in (Kind.LOST, Kind.ENDED, Kind.GIVEN_UP) and not ledger.won:
            self.site.route_users.setdefault(body.links[0].peer, set()).add(body.uuid)
        if body.route_changed and body.links:
            self.site.routes_changed.add(body.links[0].peer)
        if body.boot_id != boot_id():
            body.next_try_boottime_ms = 0.0  # the clock of another boot
        self.site.spawn(self._adopt(life), f"adopt {body.domain}")

    def alive(self, body: model.Body, ledger: Ledger) -> Life:
        life: Life = Standby(self.site, body, ledger) if body.role == "standby" else Primary(self.site, body, ledger)
        if isinstance(life, Standby):
            life.on_active = self._became_active
        elif isinstance(life, Primary):
            life.on_gone = self.gone
        self.lives[body.uuid] = life
        return life

    async def _adopt(self, life: Any) -> None:
        """Again and again until it is done: libvirt or a gate may come up later than this agent."""
        while True:
            try:
                if life.body.engine == "mc" and life.qemu_alive():
                    await self.site.host.watch(life.body.uuid)
                await life.adopt()
                break
            except Exception as error:
                log.exception("%s: going on after the restart failed", life.body.domain)
                life.event("alarm", f"going on after the agent's restart failed: {error}; trying again", "alarm")
                await asyncio.sleep(2.0)
        if isinstance(life, Standby):
            if life.cut_off:
                self.gone(life)
            await self.still_wanted(life)

    async def still_wanted(self, life: Standby) -> None:
        """An unarmed copy whose primary no longer knows this instance, or went on without it, is discarded."""
        while self.lives.get(life.body.uuid) is life and life.ledger.newest is Kind.PREPARING:
            try:
                known = await self.site.ask(life.body.peer, "state", self.about(life), model.Records, 3.0)
                over = model.peer_ledger(known).newest in (Kind.SOLO, Kind.ENDED)
                if known.pid != life.body.pid or known.state in ("", "unprotected") or over:
                    await life.discard()
                    self.gone(life)
                    return
            except McftError as error:
                log.info("asking %s about %s: %s", life.body.peer, life.body.domain, error)
            await asyncio.sleep(1.0)

    def about(self, life: Life) -> model.About:
        return model.About(life.body.uuid, life.body.pid, life.body.g, life.body.domain)

    def gone(self, life: Life) -> None:
        if self.lives.get(life.body.uuid) is life:
            del self.lives[life.body.uuid]
        if life.body.previous and life.body.role == "primary" and life.ledger.newest in (None, Kind.PREPARING):
            self.site.spawn(self._put_back(life.body.previous), f"put {life.body.domain} back")

    async def once_back(self, uuid: str) -> Life:
        """The protection that a failed protecting would have replaced, once it is back."""
        while uuid not in self.lives:
            await asyncio.sleep(0.01)
        return self.lives[uuid]

    def _ports(self) -> set[int]:
        """What the protections here hold; a primary's `mig_port` and `nbd_port` are its standby's."""
        ports: set[int] = set()
        for body in (life.body for life in self.lives.values() if life.body.state not in model.VOID_STATES):
            ports |= {link.local_port for link in body.links}
            ports |= {body.mig_port, body.nbd_port} if body.role == "standby" else set()
        return ports

    async def _put_back(self, text: str) -> None:
        """A set-up that would have replaced a solo or active protection was undone: the intention stays."""
        body = msgspec.json.decode(text, type=model.Body)
        if body.uuid not in self.lives:
            await self.site.store.save(body.uuid, body.domain, model.encode(body))
            await self._load_one(body)

    async def _became_active(self, life: Standby) -> None:
        """A standby that took over is a primary without a standby from now on; its ledger stays the standby's."""
        life.body.role = "primary"
        await life.save()

    # ---- what operators ask ----

    def _find(self, domain: str) -> Life:
        for life in self.lives.values():
            if domain in (life.body.domain, life.body.uuid):
                return life
        raise NotFound("not-protected", f"no protection of '{domain}' on this host", "", f"mcft protect {domain} --to PEER")

    async def status(self, domain: str | None) -> api.Status:
        lives = [self._find(domain)] if domain else sorted(self.lives.values(), key=lambda life: life.body.domain)
        views = [await self._view(life) for life in lives]
        return api.Status(self.site.config.name, views, maintenance=self.site.maintenance)

    async def _view(self, life: Life) -> api.Protection:
        gate: dict[str, Any] = {}
        try:
            await life.refresh()
            gate = life.gate_status
        except Failed:
            log.debug("%s: the gate does not answer", life.body.domain)
        running = life.qemu_alive()
        return statusview.protection(
            life.body, life.ledger, gate, self.jobs.running(life.body.domain), self.events.last(life.body.domain),
            self.site.versions, running if life.body.role == "primary" else False,
            self.site.config.name, self.site.maintenance, self._hello_of(life.body.peer).maintenance,
            life.arbiter.status(self._peers_arbiter(life)),
        )  # fmt: skip

    def _peers_arbiter(self, life: Life) -> bool | None:
        """Whether the other host says that the arbiter could decide there; None where it says nothing."""
        said = self._hello_of(life.body.peer).arbiters.get(life.body.pid)
        return None if said is None else not said

    def _hello_of(self, peer: str) -> model.Hello:
        """What the peer last said of itself; nothing where it is silent or not configured any more."""
        link = self.site.peers.get(peer)
        return msgspec.json.decode(link.last_hello, type=model.Hello) if link and link.last_hello else model.Hello()

    def peers(self) -> api.Peers:
        rows = []
        for name, link in self.site.peers.items():
            hello = self._hello_of(name)
            addresses = list(link.peer.addresses)
            rows.append(api.PeerBody(name, addresses, link.reachable, hello.mcft, link.detail, hello.maintenance))
        return api.Peers(self.site.config.name, rows)

    async def protect(self, request: api.ProtectRequest) -> api.JobBody:
        """Refuse what can be refused now; the rest is a job."""
        info = await self.named(request)
        life = self.lives.get(info.uuid)
        if life is not None and (answer := self.already(life, request)):
            return self.jobs.start("protect", info.name, _done(answer), request.key)

        async def work(job: JobHandle) -> str:
            return await self.protect_now(request, job)

        return self.jobs.start("protect", info.name, work, request.key)

    async def named(self, request: api.ProtectRequest) -> DomainInfo:
        """The domain, if the request's words are sound and the peer is one. Raises: Usage, Refused, NotFound."""
        if not DELAY_MIN_MS <= request.delay_ms <= DELAY_MAX_MS:
            raise Usage("bad-delay", f"a delay of {request.delay_ms} ms is out of range", "10ms to 10s", "--delay 100ms")
        try:
            rdma_device(request.rdma_device or "auto")
        except ValueError as error:
            raise Usage("bad-rdma-device", f"--rdma-device {error}") from None
        if request.netbuffer == "qemu" and not request.experimental:
            raise Refused(
                "experimental", "netbuffer qemu was never seen at work", "no kernel with sch_plug was at hand for that QEMU",
                "add --experimental, or use --netbuffer plug",
            )  # fmt: skip
        self.site.peer(request.to)
        if self.site.maintenance:
            raise maintenance.refuse(self.site.config.name)
        return await self.site.host.info(request.domain)

    async def check(self, request: api.ProtectRequest) -> api.Check:
        """What `protect` would refuse and warn of. Raises: Usage, Refused, NotFound; changes nothing."""
        return await check.Checker(self, request).run(await self.named(request))

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
        other_rdma = request.rdma_device not in ("", body.rdma_asked)
        if body.delay_ms != request.delay_ms or request.netbuffer not in ("auto", body.buffer_asked) or other_rdma:
            raise Refused(
                "other-settings", f"{body.domain} is protected to {body.peer} with other settings",
                f"delay {body.delay_ms} ms, buffer {body.buffer_asked}", f"mcft set {body.domain} --delay {request.delay_ms}ms",
            )  # fmt: skip
        if request.arbiter not in (None, body.arbiter):
            raise Refused(
                "other-settings", f"{body.domain} is protected to {body.peer} with arbiter {body.arbiter}",
                "the arbiter is changed only with a generation",
                f"mcft unprotect {body.domain}, then: mcft protect {body.domain} --to {body.peer} --arbiter {request.arbiter}",
            )  # fmt: skip
        if body.state == "protected":
            return "already"
        raise Refused("busy", f"{body.domain} is {body.state}", body.reason, f"mcft wait {body.domain} --for protected")

    async def protect_now(self, request: api.ProtectRequest, job: JobHandle) -> str:
        """Look, refuse, set up. Everything before the first step changes nothing."""
        job.step("look at the domain and at the peer")
        peer, config = request.to, self.site.config
        domain = await self.site.host.info(request.domain)
        theirs = await self.site.ask(peer, "records", model.About(domain.uuid, domain=domain.name), model.Records, 5.0)
        previous = self.lives.get(domain.uuid)
        at_rest = previous is None or await previous.at_rest(AT_REST_WITHIN_S)
        previous = self.lives.get(domain.uuid)  # (an undo that had to be repeated puts back what was before it)
        if previous is not None and not at_rest:
            raise Refused(
                "not-settled", f"what came before is not over yet for {domain.name}: it is {previous.body.state}",
                previous.body.reason, f"mcft events {domain.name}; then try again",
            )  # fmt: skip
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
        body.engine = await mccheck.choose_engine(life.qmp, request.engine)
        await check.refuse_engine(life)
        check.refuse_older(await check.running_qemu(life.qmp), self._hello_of(peer).qemu, domain.name, peer)
        await check.refuse_busy(life.qmp, domain.name)
        asked = request.netbuffer if request.netbuffer != "auto" else config.netbuffer
        if body.engine == "mc":
            live = await self.site.host.xml(body.uuid)
            await mccheck.refuse(life, live, config)
            body.buffer = await mccheck.choose_buffer(asked, body.nics, body.arbiter)
            body.second_monitor = mccheck.second_monitor(live)
            await life.choose_rdma()
        else:
            body.buffer = await buffers.choose(asked, body.nics)
            await life.choose_rdma()
            body.disks = await self.disks_of(life)
        await self.site.hook.prove(config.name, domainxml.machine(body.xml))
        await self.site.arbiters.refuse_unfit(body.arbiter, peer)
        life.on_gone = self.gone
        if previous is not None:
            body.previous = model.encode(previous.body).decode()
        self.lives[body.uuid] = life
        try:
            await life.protect(job.step)
        except Remains as error:
            if life.ledger.newest in (None, Kind.PREPARING):
                life.undo_until_done(error.reason)
            raise
        except BaseException:
            if life.ledger.newest in (None, Kind.PREPARING):
                self.gone(life)
                await asyncio.shield(self._back_to(previous, life))
            raise
        return f"{body.domain} is protected, its standby is on {peer}"

    async def candidate(self, request: api.ProtectRequest, g: int) -> Primary:
        """What would be protected; nothing of it is kept. Raises: NotFound, Refused."""
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

    async def act(self, domain: str, verb: str, request: api.ActRequest) -> api.JobBody:
        if verb == "unprotect" and not any(domain in (lf.body.domain, lf.body.uuid) for lf in self.lives.values()):
            info = await self.site.host.info(domain)
            return self.jobs.start(verb, info.name, _done("not protected"), request.key)
        life = self._find(domain)
        if verb == "start":
            return coldstart.begin(self, life, request)
        acts = {"unprotect": self._unprotect, "failover": self._failover, "solo": self._solo}
        running = self.jobs.running(life.body.domain)
        if verb == "unprotect" and running is not None and running.kind == "protect":
            await self.jobs.cancelled(running.id)
            if (left := self.lives.get(life.body.uuid)) is not None and left.ledger.newest is Kind.PREPARING:
                return self.jobs.start(verb, life.body.domain, self._once_undone(left), request.key)
            if not life.body.previous and life.body.uuid not in self.lives:
                return self.jobs.start(verb, life.body.domain, _done("the protecting was cancelled and undone"), request.key)
            life = await self.once_back(life.body.uuid)
        target = life

        async def work(job: JobHandle) -> str:
            return await acts[verb](target, request, job)

        return self.jobs.start(verb, life.body.domain, work, request.key)

    def _once_undone(self, life: Life) -> Callable[[JobHandle], Awaitable[str]]:
        """The protecting was cancelled, and its undo is being repeated."""

        async def work(job: JobHandle) -> str:
            job.step("undo the protecting")
            if not await life.at_rest(AT_REST_WITHIN_S):
                raise TimedOut(
                    "undo-incomplete", f"undoing the protecting of {life.body.domain} goes on", life.body.reason,
                    f"mcft status {life.body.domain}; look at libvirtd on {self.site.config.name}",
                )  # fmt: skip
            return "the protecting was cancelled and undone"

        return work

    async def maintenance(self, request: api.MaintenanceRequest) -> api.JobBody:
        """Empty this host of everything protected and keep it so, or end that."""
        return await maintenance.begin(self, request)

    async def _unprotect(self, life: Life, _request: api.ActRequest, job: JobHandle) -> str:
        life = self.as_primary(life)
        await life.unprotect(job.step)
        return f"{life.body.domain} is not protected any more"

    def as_primary(self, life: Life) -> Primary:
        if life.body.role == "standby" or life.body.state == "lost":
            raise Refused(
                "not-primary", f"{life.body.domain} is led by {life.body.peer}", f"here it is {life.body.state}",
                f"run this on {life.body.peer}, or if that host is gone for good: mcft forget {life.body.domain} --local",
            )  # fmt: skip
        if isinstance(life, Primary):
            return life
        primary = Primary(self.site, life.body, life.ledger)
        primary.deciding, primary.tidying = life.deciding, life.tidying
        primary.on_gone = self.gone
        self.lives[life.body.uuid] = primary
        return primary

    async def _failover(self, life: Life, request: api.ActRequest, job: JobHandle) -> str:
        if life.body.role == "primary":
            return await self.as_primary(life).switch(job.step)
        if not isinstance(life, Standby):
            raise Refused("not-here", f"{life.body.domain} has no standby here", life.body.reason)
        job.step(f"ask {life.body.peer} to hand over")
        try:
            asked = msgspec.structs.replace(self.about(life), detail=secrets.token_hex(8))
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
            raise Refused("not-whole", f"the copy of {life.body.domain} here is not whole", status["disk_error"])
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
        return await self.as_primary(life).solo(force=request.force, peer_is_off=request.peer_is_off)

    async def set(self, domain: str, request: api.SetRequest) -> api.Protection:
        life = self.as_primary(self._find(domain))
        if request.delay_ms is not None:
            if not DELAY_MIN_MS <= request.delay_ms <= DELAY_MAX_MS:
                raise Usage("bad-delay", f"a delay of {request.delay_ms} ms is out of range", "it must be 10ms to 10s")
            await life.set_delay(request.delay_ms)
        return await self._view(life)

    # ---- what the other agent asks ----

    async def peer_call(self, peer_name: str, verb: str, body: bytes) -> bytes:
        return await self.peer_verbs.call(peer_name, verb, body)

    def hello(self) -> bytes:
        """What this agent says of itself."""
        versions = self.site.versions
        return model.encode(
            model.Hello(
                self.site.config.name, versions.get("mcft", ""), versions.get("qemu", ""), versions.get("libvirt", ""), boot_id(),
                self.site.maintenance, {lf.body.pid: lf.arbiter.health() for lf in self.lives.values() if lf.arbiter.watch},
            )
        )  # fmt: skip

    def would_be_standby(self, request: model.Prepare, peer: str) -> Standby:
        """The copy that `prepare` would build; nothing of it is kept. Raises: Refused if the two sides' TLS does not fit."""
        made = standby.make_body(request, self.site.config, peer)
        copy = Standby(self.site, made, Ledger(made.pid, "standby", made.g))
        copy.request = request
        return copy

    async def may_receive(self, peer: str, request: model.Prepare, life: Life | None) -> None:
        """Raises: Refused if a copy of this domain can't come here because of what is here."""
        name = self.site.config.name
        if self.site.maintenance:
            raise maintenance.refuse(name)
        if life is not None and (life.body.state not in model.VOID_STATES or life.qemu_alive()):
            raise Refused("busy-there", f"{name} has a protection of {request.domain} of its own", f"it is {life.body.state}")
        info = await self.site.host.find(request.uuid)
        if info is not None and info.running:
            raise Refused("runs-there", f"{request.domain} runs on {name}", "a standby must not", f"on {name}: virsh list")
        other = await self.site.host.find(request.domain)
        if other is not None and other.uuid != request.uuid:
            raise Refused("name-taken", f"{name} has another domain named {request.domain}", f"its uuid is {other.uuid}")
        if request.arbiter not in ARBITERS:
            why = "the other mcft is newer"
            raise Refused("no-arbiter", f"{name} knows no arbiter {request.arbiter}", why, "bring both hosts to one mcft")
        await self.site.arbiters.refuse_unfit(request.arbiter, peer)

    # ---- libvirt's events, and protecting again ----

    def lifecycle(self, uuid: str, event: str, detail: int) -> None:
        """Called on the loop for every domain of this host."""
        life = self.lives.get(uuid)
        if life is None:
            return
        if isinstance(life, Primary):
            life.libvirts_word.heard(event, detail)
        if life.body.engine == "mc" and event == "stopped":
            life.gate.tell("last-words", destroyed=detail == DESTROYED)
        if event in ("started", "stopped") and life.body.role == "primary" and life.body.state in OWNER_STATES:
            self.site.spawn(self.as_primary(life).look(), f"look at {life.body.domain}")

    def disk_event(self, uuid: str, event: dict[str, Any]) -> None:
        """Called on the loop. The gate sees these itself, unless it was down or its monitor broken just then."""
        life = self.lives.get(uuid)
        if life is not None and life.body.state == "protected":
            self.site.spawn(life.tell_gate_of(event), f"{event['event']} of {life.body.domain}")

    def watched_event(self, uuid: str, event: dict[str, Any]) -> None:
        """Called on the loop: an event of a domain whose gate has no monitor of its own."""
        life = self.lives.get(uuid)
        if life is not None and not life.body.second_monitor:
            life.gate.tell("event", event=event)


def _done(text: str) -> Callable[[JobHandle], Awaitable[str]]:
    async def work(_job: JobHandle) -> str:
        return text

    return work
