"""Protecting, as steps with their undo: what a primary's host and its QEMU are given, one thing after the other."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable
from typing import Any

from mcft import diskreplica, filterbuffer, generations, streams
from mcft.agent import buffers, diskfiles, domainxml, hook, mcnet, model, rdma
from mcft.agent.life import Life
from mcft.agent.site import log
from mcft.agent.steps import Step
from mcft.engines.mc import Mc
from mcft.errors import Failed, Refused, Unreachable
from mcft.gate.links import set_link
from mcft.gate.loop import boottime_ms
from mcft.gate.state import GateState, LinkSpec, process_start
from mcft.generations import Kind, Ledger
from mcft.qmp_passthrough import add_monitor, remove_monitor
from mcft.streams import Endpoint

SWITCHOVER_DEADLINE_S = 600.0
HUNG_MS = 5000.0  # of a monitor, behind the first pass
PREPARE_DEADLINE_S = 300.0  # more than the copy's start may take over there (`libvirt_bridge.START_MOST_S`)
FIRST_CHECKPOINT_DEADLINE_S = 10.0  # the guest's output is held all the while
WAKE_S = 5.0
OnStep = Callable[[str, float | None], None]
STOCK_ONLY = ("add the monitor", "credentials for the streams", "put quorum over the disks", "copy the disks")
STANDBYS_SIDE = ("write down the intention", "ban unguarded starts", "prepare the standby")


class Setup(Life):
    """The steps. What is decided once they are done is `protection.Primary`'s."""

    side = "primary"
    on_step: OnStep = staticmethod(lambda _text, _progress: None)

    def __init__(self, site: Any, body: model.Body, ledger: Ledger) -> None:
        super().__init__(site, body, ledger)
        self._acknowledged = asyncio.Event()
        self.rdma = rdma.Exchange(self)
        self.hangs = False  # engine mc: QEMU hangs at its first checkpoint
        self._graph = asyncio.Lock()  # one hand at a time on the domain's block graph

    def about(self, detail: str = "") -> model.About:
        """This instance, as a question to the peer."""
        return model.About(
            self.body.uuid, self.body.pid, self.body.g, self.body.domain, detail, qemu_runs=self.qemu_alive()
        )

    def steps(self) -> list[Step[Setup]]:
        """Protecting, in order; unprotecting and going solo are the same list backwards (from `the standby` on).

        Engine mc has neither a monitor to add nor TLS nor disks of the host's.
        """
        steps: list[Step[Setup]] = [
            Step("write down the intention", Setup._intend),
            Step("ban unguarded starts", Setup._ban, Setup._unban),
            Step("prepare the standby", Setup._prepare_standby, Setup._discard_standby, undo_timeout_s=60.0),
            Step("add the monitor", Setup._add_monitor, Setup._remove_monitor),
            Step("credentials for the streams", Setup._add_credentials, Setup._drop_credentials),
            Step("quick acknowledgements", Setup.set_quickack, Setup.clear_quickack),
            Step("start the gate", Setup._start_gate, Setup._end_gate),
            Step("attach the network buffer", Setup._attach, Setup._detach),
            Step("put quorum over the disks", Setup._interpose, Setup._restore_disks),
            Step("copy the disks", Setup._copy, Setup._dismantle),
            Step("copy the memory and switch over", Setup._switch_over, Setup._abort),
            Step("wait for the first checkpoint", Setup._first_checkpoint),
        ]
        return steps if self.body.engine != "mc" else [step for step in steps if step.name not in STOCK_ONLY]

    async def _intend(self) -> None:
        self.to_state("preparing")
        await self.save(anew=True)
        await self.record(Kind.PREPARING)

    async def _ban(self) -> None:
        self.site.markers.ban(self.body.uuid, f"protected, standby on {self.body.peer}")
        if self.body.autostart:
            await self.site.host.set_autostart(self.body.uuid, False)

    async def _unban(self) -> None:
        if self.body.autostart and (info := await self.site.host.find(self.body.uuid)) is not None and info.persistent:
            await self.site.host.set_autostart(self.body.uuid, True)
        self.site.markers.forget(self.body.uuid)

    async def _prepare_standby(self) -> None:
        body, config = self.body, self.site.config
        port = self.site.ports.take(config.listen_addresses[0], udp=True)
        peer = config.peers[body.peer]
        pairs = list(zip(config.listen_addresses, peer.addresses, strict=False))
        request = model.Prepare(
            body.uuid, body.domain, body.pid, body.g, body.key, body.delay_ms, body.engine, config.loss_ms,
            await self.site.host.xml(body.uuid, migratable=True), body.xml, body.autostart, body.disks,
            [port] * len(pairs), body.disk_paths, body.overwrite, body.g - 1, self.site.versions.get("qemu", ""), body.buffer,
            "off" if body.engine == "mc" else streams.offer(config.tls, config.qemu_pki_dir, config.name),
            await diskfiles.of_domain(self), diskfiles.read_nvram(body.nvram) if body.nvram else None,
            body.rdma.peer if body.rdma else "", rdma.required(self.rdma_wish()), body.arbiter, body.mc,
            model.Asked(body.engine_asked, body.buffer_asked, body.rdma_asked, body.arbiter_asked, body.experimental),
        )  # fmt: skip
        prepared = await self.site.ask(body.peer, "prepare", request, model.Prepared, PREPARE_DEADLINE_S, patiently=True)
        if prepared.arbiter != body.arbiter:
            why = f"its mcft goes by arbiter {prepared.arbiter}; two rules at once would be unsafe"
            raise Refused("old-peer", f"{body.peer} can't be decided for by {body.arbiter}", why, "bring both hosts to one mcft")
        body.links = [LinkSpec(local, port, remote, prepared.keepalive_port) for local, remote in pairs]
        body.mig_port, body.nbd_port = prepared.mig_port, prepared.nbd_port
        body.peer_versions, body.tls, body.stream_path = prepared.versions, prepared.tls, prepared.stream_path
        body.rdma = rdma.settle(body.rdma, self.rdma_wish(), prepared, body.peer)
        self.to_state("syncing")
        await self.save()

    def rdma_wish(self) -> str:
        """What the operator asked for, or the configuration."""
        return self.body.rdma_asked or self.site.config.rdma_device

    async def choose_rdma(self) -> None:
        """The RDMA keepalive's path, if there is one. Raises: Refused; changes nothing but the body."""
        config = self.site.config
        pairs = list(zip(config.listen_addresses, config.peers[self.body.peer].addresses, strict=False))
        self.body.rdma = await rdma.choose(self.rdma_wish(), pairs)

    async def _discard_standby(self) -> None:
        """Before arming, and after given-up: the standby's side is nothing any more."""
        try:
            await self.site.ask(self.body.peer, "discard", self.about(), model.Answer, 45.0)
        except Unreachable:
            # It discards by itself when it comes back and asks: this instance is unknown here then.
            log.warning("%s is away; it will discard its copy of %s when it asks", self.body.peer, self.body.domain)

    async def _add_monitor(self) -> None:
        await add_monitor(self.qmp, self.monitor_path())

    async def _remove_monitor(self) -> None:
        if await self._qemu_here():
            await remove_monitor(self.qmp, self.monitor_path())
        elif os.path.lexists(self.monitor_path()):
            os.unlink(self.monitor_path())

    def _there(self, port: int) -> Endpoint:
        if self.body.engine == "mc":
            return Endpoint(self.body.stream_path or self._peer_address(), port, transport=self.body.mc.transport)
        return Endpoint(self._peer_address(), port, self.body.peer if self.body.tls else "")

    async def _add_credentials(self) -> None:
        if self.body.tls:
            await streams.add_credentials(self.qmp, self.site.config.qemu_pki_dir, "client")

    async def _drop_credentials(self) -> None:
        if await self._qemu_here():
            await streams.drop_credentials(self.qmp)

    async def _qemu_here(self) -> bool:
        return self.qemu_alive() and (await self.site.host.info(self.body.uuid)).running

    async def _start_gate(self) -> None:
        body, config = self.body, self.site.config
        if body.engine == "mc":
            await self.site.host.watch(body.uuid)
        await self.gate.create(
            GateState(
                body.uuid, body.domain, body.pid, body.g, "primary", body.key, self.gate_monitor(), body.qemu_pid,
                body.qemu_start, body.links, record="preparing", mode="pass", buffer=body.buffer, nics=body.nics,
                loss_ms=config.loss_ms, delay_ms=body.delay_ms, lan_check=list(config.lan_check),
                limit_bytes=config.buffer_limit_bytes, rdma=body.rdma, engine=body.engine,
                stream_port=body.mig_port if body.mc.transport == "tcp" else 0,
            )
        )

    async def _end_gate(self) -> None:
        """A gate that must not open is kept; filters that a dead one left are taken away, or they would drop everything."""
        if refusal := generations.may_open_primary(self.ledger):
            raise Refused("may-not-open", "the gate is kept, its buffer closed", refusal)
        if os.path.exists(self.gate.state_path):  # else it stands by somebody's word, not by an undo of ours
            await self._resume()  # (while libvirtd is away this fails, the gate stays, and all is tried again)
        await self.gate.end()
        if self.body.engine == "mc":
            await self.site.host.unwatch(self.body.uuid)
        await self.drop_dead_plugs()
        if self.body.buffer == "plug" and await self._qemu_here():
            await buffers.remove_plugs([nic.target for nic in self.body.nics])
            for nic in self.body.nics:
                set_link(nic.target, up=True)
        if self.body.buffer == "filter" and await self._qemu_here():
            objects = [row["name"] for row in await self.qmp.execute("qom-list", path="/objects")]
            chardevs = [row["label"] for row in await self.qmp.execute("query-chardev")]
            for command, arguments in filterbuffer.detach_commands(objects, chardevs):
                await self.qmp.attempt(command, **arguments)
            for nic in self.body.nics:
                set_link(nic.target, up=True)

    async def drop_dead_plugs(self) -> None:
        """A QEMU that is gone took its taps along, but not what mcft made beside them."""
        if self.body.buffer == "plug" and not self.qemu_alive():
            await buffers.drop_plugs([nic.target for nic in self.body.nics], str(self.site.config.run_dir))

    async def _attach(self) -> None:
        if self.body.buffer == "qemu":
            await mcnet.prepare(self.body.nics[0].target)
        await self.gate.ask("attach")

    async def _detach(self) -> None:
        """Only where the protocol lets the buffer open; everything held leaves in order first."""
        if not os.path.exists(self.gate.state_path) or not self.qemu_alive():
            return
        if refusal := generations.may_open_primary(self.ledger):
            raise Refused("may-not-open", "the network buffer stays closed", refusal)
        because = "solo" if self.ledger.won else self.ledger.newest.value if self.ledger.newest else "preparing"
        await self.gate.insist("open", because=because)
        try:
            await self.gate.insist("detach", 20.0)
            if self.body.buffer == "qemu":
                await mcnet.remove(self.body.nics[0].target)
        finally:
            await self._resume()

    async def _resume(self) -> None:
        """A guest that an undo has stopped goes on. Not where its writes would vanish: that one waits for its disks."""
        if await self._qemu_here() and await self.qmp.status() == "paused":
            if not await diskreplica.on_null(self.qmp, self.body.disks):
                await self.qmp.execute("cont")

    async def _interpose(self) -> None:
        async with self._graph:
            await diskreplica.interpose(self.qmp, self.body.disks)

    async def _restore_disks(self) -> None:
        async with self._graph:
            if await self._qemu_here():
                await diskreplica.restore(self.qmp, self.body.disks)

    def _peer_address(self) -> str:
        return self.body.links[0].peer

    async def _copy(self) -> None:
        await self.gate.ask("update", yank=diskreplica.yank_instances(self.body.disks, copying=True))
        await diskreplica.start_mirrors(self.qmp, self.body.disks, self._there(self.body.nbd_port))
        await diskreplica.mirrors_ready(
            self.qmp, self.body.disks, lambda progress: self.on_step("copy the disks", round(progress, 3))
        )

    async def _dismantle(self) -> None:
        if await self._qemu_here():
            await self._wake()
            await diskreplica.dismantle_copy(self.qmp, self.body.disks)

    async def _wake(self) -> None:
        """Whatever waits for a host that fell silent is woken first, or QEMU's main loop may not answer, and its guest stand."""
        if os.path.exists(self.gate.state_path):
            try:
                async with asyncio.timeout(WAKE_S):
                    await self.gate.insist("yank")
            except (Failed, TimeoutError) as error:
                log.warning("the gate of %s breaks no stream (%s); undoing goes on", self.body.domain, error or "no answer")

    async def _switch_over(self) -> None:
        """Mirrors run until the guest stands still; then hold, swap, go on. A deadline: a lost standby says nothing."""
        body = self.body
        bandwidth = self.site.config.max_bandwidth_bytes or (1 << 40)
        engine = self.engine
        await engine.start(self.qmp, self._there(body.mig_port), body.delay_ms, bandwidth)
        if isinstance(engine, Mc):
            body.capabilities = engine.enabled
        # From here on QEMU plugs and unplugs nothing (qdev_device_add: not while a migration runs).
        domainxml.refuse_other_nics(body.nics, await self.site.host.xml(body.uuid))
        deadline_ms = boottime_ms() + SWITCHOVER_DEADLINE_S * 1000
        while not await self._switchover_reached():
            if boottime_ms() > deadline_ms:
                raise Failed("switch-over", "the memory can't be copied: the guest dirties it faster than the link carries it")
            await asyncio.sleep(0.004 if body.engine != "mc" else 0.02)
        await self.gate.ask("hold")
        if body.engine == "mc":
            return  # checkpoints have begun; what the guest sent before the hold belongs to no promise yet
        await diskreplica.swap_to_replication(self.qmp, body.disks, self._there(body.nbd_port))
        await self.gate.ask("update", yank=diskreplica.yank_instances(body.disks))
        await self.engine.begin_checkpoints(self.qmp)

    async def _switchover_reached(self) -> bool:
        try:
            return await self.engine.switchover_reached(self.qmp)
        except Failed as error:
            if self.body.engine != "mc" or error.code != "libvirt-timeout" or not await self._hung_behind_first_pass():
                raise
            self.hangs = True
            return True

    async def _hung_behind_first_pass(self) -> bool:
        """Whether the first pass is over (its RESUME came) and QEMU, asked again, says nothing while libvirt answers."""
        seen = (await self.gate.ask("status")).get("mc", {}).get("resumes", 0)
        if not seen or not await self.site.host.answers():
            return False
        try:
            await self.qmp.status()
        except Failed as error:
            return error.code == "libvirt-timeout" and await self.site.host.answers()
        return False

    async def _abort(self) -> None:
        if not await self._qemu_here():
            return
        await self._wake()
        resume = not await diskreplica.on_null(self.qmp, self.body.disks)
        await self.engine.abort(self.qmp, resume=resume)

    async def _first_checkpoint(self) -> None:
        """The guest's output waits for it, so it is asked for at once: setting the delay again starts a checkpoint.

        (Engine mc can't be hurried, and shows the first one that counts when the fourth is acknowledged.)
        """
        mc = self.body.engine == "mc"
        if self.hangs:
            return
        deadline_s = FIRST_CHECKPOINT_DEADLINE_S + (5 * self.body.delay_ms / 1000 if mc else 0)
        try:
            async with asyncio.timeout(deadline_s):
                while not mc and await self.qmp.status() not in ("running", "colo"):
                    await asyncio.sleep(0.002)
                delay = {"x-checkpoint-delay": self.body.delay_ms}
                if not mc:
                    await self.gate.qmp([{"execute": "migrate-set-parameters", "arguments": delay}])
                await self._acknowledged.wait()
        except TimeoutError:
            said = (await self.gate.ask("status")).get("mc", {})
            if said.get("silent_ms", 0.0) > HUNG_MS and await self.site.host.answers():
                self.hangs = True
                return
            await self._tell_stall()
            raise Failed(
                "no-checkpoint", f"no checkpoint was acknowledged within {deadline_s:g} s",
                "the standby's QEMU hangs or the link is gone",
            ) from None  # fmt: skip
        await self._stream_lives()

    async def _tell_stall(self) -> None:
        """For the log: what each part was at then."""
        try:
            gate = await self.gate.ask("status", 2.0)
            questions = ("query-status", "query-migrate", *(("query-colo-status",) if self.body.engine != "mc" else ()))
            qemu = await self.gate.qmp([{"execute": name} for name in questions], 2.0)
            theirs = await self.site.ask(self.body.peer, "state", self.about(), model.Records, 2.0)
            log.error("no first checkpoint: gate %s; QEMU %s; %s says %s", gate, qemu, self.body.peer, theirs)
        except Exception as error:
            log.error("no first checkpoint, and what was asked why did not answer: %r", error)

    async def _stream_lives(self) -> None:
        status = await self.gate.ask("status")
        if status["disk_error"] or status["stream_dead"]:
            raise Failed("stream", f"the stream broke at once: {status['disk_error'] or status['stream_dead']}")


async def make_body(site: Any, request: Any, g: int) -> model.Body:
    """Look at the running domain: what is to be protected. Raises: NotFound, Refused; changes nothing."""
    info = await site.host.info(request.domain)
    if not info.running or info.paused:
        raise Refused(
            "not-running", f"{info.name} is {'paused' if info.paused else 'not running'}", "only a running guest can be",
            f"virsh {'resume' if info.paused else 'start'} {info.name}",
        )  # fmt: skip
    live = await site.host.xml(info.uuid)
    domainxml.refuse_unprotectable(live)
    start = process_start(info.qemu_pid)
    options = request.mc if request.mc is not None else site.config.mc
    if start is None:
        raise Refused("no-qemu", f"the QEMU of {info.name} can't be found", "its pid file names no process of this domain")
    return model.Body(
        info.uuid, info.name, secrets.token_hex(16), g, "primary", request.to, engine_asked=request.engine,
        buffer_asked=request.netbuffer, delay_ms=request.delay_ms, key=secrets.token_hex(32),
        xml=await site.host.xml(info.uuid, inactive=info.persistent), persistent=info.persistent, autostart=info.autostart,
        disk_paths=dict(request.disks), overwrite=list(request.overwrite), qemu_pid=info.qemu_pid, qemu_start=start,
        boot_id=hook.boot_id(), nics=domainxml.nics(live, domainxml.uses_vhost(info.qemu_pid)),
        nvram=domainxml.nvram(live), rdma_asked=request.rdma_device, arbiter=request.arbiter or site.config.arbiter,
        arbiter_asked=request.arbiter, mc=options, experimental=request.experimental,
    )  # fmt: skip
