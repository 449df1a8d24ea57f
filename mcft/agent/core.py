"""The agent's core: one `Life` per protection, and what operators ask of them (the other agent's words: `peerverbs.py`)."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from mcft import api
from mcft.agent import check, maintenance, model, standby, statusview
from mcft.agent.acts import Acts
from mcft.agent.ends import DESTROYED
from mcft.agent.events import EventLog
from mcft.agent.hook import boot_id
from mcft.agent.jobs import Jobs
from mcft.agent.life import Life, stored_ledger
from mcft.agent.peerverbs import PeerVerbs
from mcft.agent.protecting import Protecting
from mcft.agent.protection import Primary
from mcft.agent.site import Site, log
from mcft.agent.standby import Standby
from mcft.config import ARBITERS
from mcft.errors import Failed, McftError, NotFound, Refused, Usage
from mcft.generations import Kind, Ledger
from mcft.units import DELAY_MAX_MS, DELAY_MIN_MS

OWNER_STATES = ("solo", "active", "stopped", "unprotected")


class Core:
    """See `core_api.Core` for what the server expects."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.lives: dict[str, Life] = {}
        site.ports.held = self._ports
        self.peer_verbs = PeerVerbs(self)
        self.protecting = Protecting(self)
        self.acts = Acts(self)

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
        """An unarmed copy whose primary no longer knows this instance, or went on without it, is discarded.

        One that was armed and can't take over any more goes once its primary's records say that it went on: that one may have
        ended the protection since, while this side was away, and has nothing left to tell or to ask.
        """
        while self.lives.get(life.body.uuid) is life and life.ledger.newest in (Kind.PREPARING, Kind.ARMED, Kind.NOT_WHOLE):
            try:
                if await self._left_behind(life):
                    return
            except McftError as error:
                log.info("asking %s about %s: %s", life.body.peer, life.body.domain, error)
            await asyncio.sleep(1.0)

    async def _left_behind(self, life: Standby) -> bool:
        """Whether its primary has no use for this copy any more, by that one's records; then it is gone, or lost."""
        unarmed = life.ledger.newest is Kind.PREPARING
        if not unarmed and life.body.state != "failed":
            return False
        known = await self.site.ask(life.body.peer, "state", self.about(life), model.Records, 3.0)
        theirs, same = model.peer_ledger(known), known.pid == life.body.pid
        over = theirs.newest in (Kind.SOLO, Kind.ENDED)
        if unarmed and (not same or known.state in ("", "unprotected") or over):
            await life.discard()
            self.gone(life)
            return True
        if not unarmed and same and over and theirs.spoken:
            await life.left_behind()
            return True
        return False

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

    def find(self, domain: str) -> Life:
        for life in self.lives.values():
            if domain in (life.body.domain, life.body.uuid):
                return life
        if (protecting := self.jobs.running(domain, "protect")) is not None:
            why = f"it is being looked at ({protecting.step})"
            raise NotFound("not-yet", f"'{domain}' is not protected yet", why, f"mcft wait {domain} --for protected")
        raise NotFound("not-protected", f"no protection of '{domain}' on this host", "", f"mcft protect {domain} --to PEER")

    async def status(self, domain: str | None) -> api.Status:
        lives = [self.find(domain)] if domain else sorted(self.lives.values(), key=lambda life: life.body.domain)
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
            self.site.config.name, self.site.maintenance, self.hello_of(life.body.peer).maintenance,
            life.arbiter.status(self._peers_arbiter(life)), self._standbys_lan(life),
        )  # fmt: skip

    def _standbys_lan(self, life: Life) -> str:
        """Why the standby must not take over now, by its agent's word while that answers."""
        link = self.site.peers.get(life.body.peer)
        return self.hello_of(life.body.peer).lans.get(life.body.pid, "") if link is not None and link.reachable else ""

    def _peers_arbiter(self, life: Life) -> bool | None:
        """Whether the other host says that the arbiter could decide there; None where it says nothing."""
        said = self.hello_of(life.body.peer).arbiters.get(life.body.pid)
        return None if said is None else not said

    def hello_of(self, peer: str) -> model.Hello:
        """What the peer last said of itself; nothing where it is silent or not configured any more."""
        link = self.site.peers.get(peer)
        return msgspec.json.decode(link.last_hello, type=model.Hello) if link and link.last_hello else model.Hello()

    def peers(self) -> api.Peers:
        rows = []
        for name, link in self.site.peers.items():
            hello = self.hello_of(name)
            addresses = list(link.peer.addresses)
            rows.append(api.PeerBody(name, addresses, link.reachable, hello.mcft, link.detail, hello.maintenance))
        return api.Peers(self.site.config.name, rows)

    async def protect(self, request: api.ProtectRequest) -> api.JobBody:
        """Refuse what can be refused now; the rest is a job."""
        return await self.protecting.begin(request)

    async def check(self, request: api.ProtectRequest) -> api.Check:
        """What `protect` would refuse and warn of. Raises: Usage, Refused, NotFound; changes nothing."""
        return await check.Checker(self, request).run(await self.protecting.named(request))

    async def act(self, domain: str, verb: str, request: api.ActRequest) -> api.JobBody:
        return await self.acts.begin(domain, verb, request)

    async def maintenance(self, request: api.MaintenanceRequest) -> api.JobBody:
        """Empty this host of everything protected and keep it so, or end that."""
        return await maintenance.begin(self, request)

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

    async def set(self, domain: str, request: api.SetRequest) -> api.Protection:
        life = self.as_primary(self.find(domain))
        if request.delay_ms is not None:
            if not DELAY_MIN_MS <= request.delay_ms <= DELAY_MAX_MS:
                raise Usage("bad-delay", f"a delay of {request.delay_ms} ms is out of range", "it must be 10ms to 10s")
            if life.body.state != "protected" and self.jobs.running(life.body.domain, "protect") is not None:
                raise Refused(
                    "busy", f"{life.body.domain} is being protected", "its hosts would go by different delays",
                    f"mcft wait {life.body.domain} --for protected; then again",
                )  # fmt: skip
            await life.pacing.set_delay(request.delay_ms)
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
                {lf.body.pid: lf.lan_away for lf in self.lives.values() if isinstance(lf, standby.Standby) and lf.lan_away},
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
        owns = life.body.state in OWNER_STATES or (life.body.state == "failed" and life.ledger.won)
        if event in ("started", "stopped") and life.body.role == "primary" and owns:
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
