"""What the other agent asks: its verbs, each answered from records or from a protection's own life.

A verb may come twice, as peers ask on several links at once: what builds or looks is done once per instance.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec

from mcft.agent import checkpeer, coldstart, domainxml, maintenance, model, standby
from mcft.agent.jobs import JobHandle
from mcft.agent.life import Life
from mcft.agent.protection import Primary
from mcft.agent.standby import Standby
from mcft.errors import NotFound, Refused, Remains, Usage
from mcft.generations import Kind, Ledger

AT_REST_WITHIN_S = 10.0  # less than a primary waits for its answer

if TYPE_CHECKING:
    from mcft.agent.core import Core


class PeerVerbs:
    """The verbs of one core."""

    def __init__(self, core: Core) -> None:
        self.core, self.site = core, core.site
        self._preparing: dict[str, asyncio.Task[msgspec.Struct]] = {}  # by instance
        self._connecting: dict[str, asyncio.Task[msgspec.Struct]] = {}  # by the primary's queue pair
        self._checking: dict[str, asyncio.Task[checkpeer.Found]] = {}  # by check
        self._verbs: dict[str, Callable[[str, bytes], Awaitable[msgspec.Struct]]] = {
            "hello": self._hello,
            "records": self._records,
            "state": self._state,
            "prepare": self._prepare,
            "arm": self._arm,
            "give-up": self._give_up,
            "take": self._take,
            "ended": self._ended,
            "discard": self._discard,
            "switch": self._switch,
            "check": self._check,
            "start": self._start,
            "go-alone": self._go_alone,
            "rdma": self._rdma,
            "set-delay": self._set_delay,
        }

    async def call(self, peer_name: str, verb: str, body: bytes) -> bytes:
        handler = self._verbs.get(verb)
        if handler is None:
            raise NotFound("no-such-verb", f"this agent knows no '{verb}'", "the other agent is newer")
        try:
            return model.encode(await handler(peer_name, body))
        except msgspec.DecodeError as error:
            raise Usage("bad-request", f"'{verb}' was asked in words that this agent does not know", str(error)) from None

    async def _hello(self, _peer: str, _body: bytes) -> msgspec.Struct:
        return msgspec.json.decode(self.core.hello(), type=model.Hello)

    async def _records(self, _peer: str, body: bytes) -> msgspec.Struct:
        about = msgspec.json.decode(body, type=model.About)
        info = await self.site.host.find(about.uuid)
        life = self.core.lives.get(about.uuid)
        known = life.known(host_running=False) if life else model.Records(self.site.config.name, about.uuid)
        running = info is not None and info.running and (life is None or life.body.role == "primary")
        highest = await self.site.store.highest_generation(about.uuid)
        defined, protections = info is not None and info.persistent, len(self.core.lives)
        return msgspec.structs.replace(
            known, highest_g=highest, running=running, defined=defined, protections=protections,
            maintenance=self.site.maintenance,
        )  # fmt: skip

    async def _state(self, _peer: str, body: bytes) -> msgspec.Struct:
        about = msgspec.json.decode(body, type=model.About)
        return await self._known(about)

    async def _known(self, about: model.About) -> model.Records:
        """This side's records of that very instance, from memory or from the store."""
        life = self.core.lives.get(about.uuid)
        if life is not None and (not about.pid or life.body.pid == about.pid):
            return life.known(host_running=life.qemu_alive())
        rows = [r for r in await self.site.store.records(about.uuid, about.pid)] if about.pid else []
        if not rows or life is not None:
            return model.Records(self.site.config.name, about.uuid)
        side = rows[0].side
        return model.Records(
            self.site.config.name, about.uuid, 0, about.pid, about.g, side, "unprotected", [(side, r.g, r.kind) for r in rows]
        )

    def _instance(self, peer: str, body: bytes) -> tuple[model.About, Standby]:
        about = msgspec.json.decode(body, type=model.About)
        life = self.core.lives.get(about.uuid)
        if not isinstance(life, Standby) or life.body.pid != about.pid or life.body.peer != peer:
            raise NotFound("no-such-instance", f"{self.site.config.name} holds no standby of this instance of {about.domain}")
        return about, life

    async def _prepare(self, peer: str, body: bytes) -> msgspec.Struct:
        """Asked twice for one instance (on two links, say), it is built once."""
        request = msgspec.json.decode(body, type=model.Prepare)
        if request.pid not in self._preparing:
            self._preparing = {p: task for p, task in self._preparing.items() if not task.done()}
            name = f"prepare {request.domain} for {peer}"
            self._preparing[request.pid] = asyncio.create_task(self._prepare_once(peer, request), name=name)
        return await asyncio.shield(self._preparing[request.pid])

    async def _prepare_once(self, peer: str, request: model.Prepare) -> msgspec.Struct:
        life = self.core.lives.get(request.uuid)
        if life is not None:
            life.recompute_labels()  # a full disk may have kept the newest from being written: its file would count as no copy
        await self.core.may_receive(peer, request, life)
        if life is not None and not await life.at_rest(AT_REST_WITHIN_S):
            raise Refused(
                "busy-there", f"on {self.site.config.name} what came before is not over yet for {request.domain}",
                f"it is {life.body.state}: {life.body.reason}", "try again",
            )  # fmt: skip
        highest = await self.site.store.highest_generation(request.uuid)
        if request.g <= highest:
            raise Refused("old-generation", f"generation {request.g} of {request.domain} is not newer than {highest} here")
        await self.site.hook.prove(self.site.config.name, domainxml.machine(request.persistent_xml))
        await checkpeer.refuse_unfit(self.core, peer, request)
        made = standby.make_body(request, self.site.config, peer)
        port = self.site.ports.take(self.site.config.listen_addresses[0], udp=True)
        made.links = [msgspec.structs.replace(link, local_port=port) for link in made.links]
        if life is not None:
            await life.close()
        fresh = self.core.alive(made, Ledger(made.pid, "standby", made.g))
        assert isinstance(fresh, Standby)
        fresh.request = request
        try:
            prepared = await fresh.prepare()
            self.site.spawn(self.core.still_wanted(fresh), f"is {request.domain} still wanted")
            return prepared
        except Remains:
            # (libvirt was away, say, and has started the copy all the same.)
            fresh.repeat_undo(lambda: self._undo(fresh, life), f"undo the copy of {request.domain}")
            await fresh.save(anew=True)  # (an agent that is restarted meanwhile goes on with it: `Copy.cut_off`)
            raise
        except BaseException:
            await self._put_back(fresh, life)
            raise

    async def _undo(self, fresh: Standby, before: Life | None) -> None:
        await fresh.discard()
        await self._put_back(fresh, before)

    async def _put_back(self, fresh: Standby, before: Life | None) -> None:
        """A copy that was not made leaves what was there before it."""
        if self.core.lives.get(fresh.body.uuid) is not fresh:
            return
        self.core.gone(fresh)
        if before is not None:
            self.core.lives[fresh.body.uuid] = before
            await before.save(anew=True)
            self.site.markers.ban(fresh.body.uuid, "restored after a failed protect")

    async def _check(self, peer: str, body: bytes) -> msgspec.Struct:
        """Asked twice for one check, it looks once."""
        ask = msgspec.json.decode(body, type=checkpeer.Ask)
        if ask.id not in self._checking:
            self._checking = {i: task for i, task in self._checking.items() if not task.done()}
            looking = checkpeer.look(self.core, peer, ask)
            self._checking[ask.id] = asyncio.create_task(looking, name=f"check {ask.prepare.domain} for {peer}")
        return await asyncio.shield(self._checking[ask.id])

    async def _arm(self, peer: str, body: bytes) -> msgspec.Struct:
        _, life = self._instance(peer, body)
        return await life.arm(msgspec.json.decode(body, type=model.Arm))

    async def _give_up(self, peer: str, body: bytes) -> msgspec.Struct:
        about = msgspec.json.decode(body, type=model.About)
        life = self.core.lives.get(about.uuid)
        if isinstance(life, Standby) and life.body.pid == about.pid and life.body.peer == peer:
            await life.give_up(about)
        elif life is None:
            await self._give_up_discarded(about)
        return await self._known(about)

    async def _give_up_discarded(self, about: model.About) -> None:
        """A copy that was discarded unarmed never takes over, and here says so for good, to a primary that has to hear it: one
        whose write of arming(g) failed and was on its disk all the same."""
        rows = await self.site.store.records(about.uuid, about.pid)
        if rows and (rows[-1].g, rows[-1].side, rows[-1].kind) == (about.g, "standby", Kind.PREPARING.value):
            await self.site.store.append(about.uuid, about.pid, about.g, "standby", [Kind.GIVEN_UP.value])

    async def _take(self, peer: str, body: bytes) -> msgspec.Struct:
        """The primary has resigned, its gate is closed and its guest stands."""
        about, life = self._instance(peer, body) if self._holds(body) else (msgspec.json.decode(body, type=model.About), None)
        if life is not None and life.ledger.newest is Kind.ARMED:
            # An arbiter that can't tell gives nobody the generation; by word it goes back to whom it came from.
            if life.qemu_alive() and not life.arbiter.may_claim():
                life.begin_take("planned switch", peer_closed=True)
            else:
                await life.give_up(msgspec.structs.replace(about, qemu_runs=True))
        return await self._known(about)

    def _holds(self, body: bytes) -> bool:
        about = msgspec.json.decode(body, type=model.About)
        life = self.core.lives.get(about.uuid)
        return isinstance(life, Standby) and life.body.pid == about.pid

    async def _ended(self, peer: str, body: bytes) -> msgspec.Struct:
        about = msgspec.json.decode(body, type=model.About)
        if self._holds(body):
            _, life = self._instance(peer, body)
            return await life.ended(about.detail or "the guest was ended")
        known = await self._known(about)
        kinds = [kind for side, g, kind in known.records if side == "standby" and g == about.g]
        return model.Answer(kinds[-1] if kinds else "", about.g)

    async def _discard(self, peer: str, body: bytes) -> msgspec.Struct:
        about = msgspec.json.decode(body, type=model.About)
        # Also one that has only begun, and has not shown itself among the lives yet.
        if (building := self._preparing.get(about.pid)) is not None and not building.done():
            building.cancel()
            await asyncio.gather(building, return_exceptions=True)
        life = self.core.lives.get(about.uuid)
        if life is None or life.body.peer != peer or life.body.pid != about.pid:
            return model.Answer("")
        if isinstance(life, Standby):
            await life.discard()
        elif life.body.state not in model.VOID_STATES:
            return model.Answer("")
        else:
            self.site.markers.forget(about.uuid)
            await self.site.store.delete(about.uuid)
        self.core.gone(life)
        return model.Answer("")

    async def _switch(self, peer: str, body: bytes) -> msgspec.Struct:
        about = msgspec.json.decode(body, type=model.About)
        life = self.core.lives.get(about.uuid)
        if life is None or life.body.pid != about.pid or not isinstance(life, Primary):
            raise NotFound("no-such-instance", f"{self.site.config.name} does not lead this instance of {about.domain}")
        leader = life

        async def work(job: JobHandle) -> str:
            return await leader.switch(job.step)

        job = self.core.jobs.start("failover", leader.body.domain, work, f"switch-{about.pid}-{about.detail}")
        await self.core.jobs.ended(job.id)
        return model.Answer("taken", about.g)

    async def _rdma(self, peer: str, body: bytes) -> msgspec.Struct:
        """The gates' queue pairs. Asked twice with one offer, it is connected once: each time makes a new one here."""
        question = msgspec.json.decode(body, type=model.RdmaOffer)
        _, life = self._instance(peer, model.encode(question.about))
        key = f"{question.about.pid} {question.offer}"
        if key not in self._connecting:
            self._connecting = {k: task for k, task in self._connecting.items() if not task.done()}
            self._connecting[key] = asyncio.create_task(self._accept(life, question), name=f"RDMA for {life.body.domain}")
        return await asyncio.shield(self._connecting[key])

    async def _accept(self, life: Standby, question: model.RdmaOffer) -> msgspec.Struct:
        return model.RdmaAnswer(await life.gate.ask("rdma-accept", offer=question.offer))

    async def _set_delay(self, peer: str, body: bytes) -> msgspec.Struct:
        _, life = self._instance(peer, body)
        told = msgspec.json.decode(body, type=model.SetDelay)
        return await life.set_delay(told)

    async def _start(self, peer: str, body: bytes) -> msgspec.Struct:
        return await coldstart.answer(self.core, peer, body)

    async def _go_alone(self, peer: str, body: bytes) -> msgspec.Struct:
        return await maintenance.answer(self.core, peer, body)
