"""The primary's side of a protection: the set-up as steps with their undo, and what follows each verdict of the gate."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Coroutine
from typing import Any

from mcft import diskreplica, generations
from mcft.agent import domainxml, hook, model
from mcft.agent.site import Life, boottime_ms, log, peer_ledger
from mcft.agent.steps import Step
from mcft.errors import Failed, McftError, Refused, TimedOut, Unreachable
from mcft.gate.state import GateState, LinkSpec
from mcft.generations import Kind, Ledger
from mcft.qmp_passthrough import add_monitor, remove_monitor

SWITCHOVER_DEADLINE_S = 600.0
FIRST_CHECKPOINT_DEADLINE_S = 30.0
PULL_EVERY_S = 0.2
OnStep = Callable[[str, float | None], None]


class Primary(Life):
    """Leads. Also lives what comes after: solo, active (took over), stopped, lost."""

    side = "primary"
    on_step: OnStep = staticmethod(lambda _text, _progress: None)
    _acknowledged: asyncio.Event
    _resolving: asyncio.Task[Any] | None = None
    _stopped: asyncio.Event
    on_gone: Any = None  # called with self when nothing of this protection is left

    def __init__(self, site: Any, body: model.Body, ledger: Ledger) -> None:
        super().__init__(site, body, ledger)
        self._acknowledged, self._stopped = asyncio.Event(), asyncio.Event()
        self.stopped_detail = -1

    # ---- set-up ----

    def steps(self) -> list[Step[Primary]]:
        """Protecting, in order; unprotecting and going solo are the same list backwards (from `the standby` on)."""
        return [
            Step("write down the intention", Primary._intend),
            Step("ban unguarded starts", Primary._ban, Primary._unban),
            Step("prepare the standby", Primary._prepare_standby, Primary._discard_standby, undo_timeout_s=60.0),
            Step("add the monitor", Primary._add_monitor, Primary._remove_monitor),
            Step("quick acknowledgements", Primary.set_quickack, Primary.clear_quickack),
            Step("start the gate", Primary._start_gate, Primary._end_gate),
            Step("attach the network buffer", Primary._attach, Primary._detach),
            Step("put quorum over the disks", Primary._interpose, Primary._restore_disks),
            Step("copy the disks", Primary._copy, Primary._dismantle),
            Step("copy the memory and switch over", Primary._switch_over, Primary._abort),
            Step("wait for the first checkpoint", Primary._first_checkpoint),
        ]

    async def protect(self, on_step: OnStep) -> None:
        """From a running domain to `protected`. Raises what failed, with everything undone (or what remains said)."""
        self.on_step = on_step
        before = (self.body.state, self.body.reason)
        await self.site.runner.run(self.steps(), self, on_step)
        on_step("arm the standby", None)
        try:
            await self._arm()
        except BaseException as error:
            await asyncio.shield(self.site.spawn(self._arming_failed(error), "undo arming"))
            raise
        self.body.failures, self.body.manual = 0, ""
        self.to_state("protected")
        await self.save()
        log.info("%s: %s → protected", self.body.domain, before)

    async def _intend(self) -> None:
        self.to_state("preparing")
        await self.save()
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
        port = self.site.take_port(config.listen_addresses[0], udp=True)
        peer = config.peers[body.peer]
        pairs = list(zip(config.listen_addresses, peer.addresses, strict=False))
        request = model.Prepare(
            body.uuid, body.domain, body.pid, body.g, body.key, body.delay_ms, body.engine, config.loss_ms,
            await self.site.host.xml(body.uuid, migratable=True), body.xml, body.autostart, body.disks,
            [port] * len(pairs), body.disk_paths, body.overwrite, body.g - 1, self.site.versions.get("qemu", ""), body.buffer,
        )  # fmt: skip
        prepared = await self.site.ask(body.peer, "prepare", request, model.Prepared, 90.0)
        body.links = [LinkSpec(local, port, remote, prepared.keepalive_port) for local, remote in pairs]
        body.mig_port, body.nbd_port = prepared.mig_port, prepared.nbd_port
        body.peer_versions = prepared.versions
        self.to_state("syncing")
        await self.save()

    async def _discard_standby(self) -> None:
        """Before arming, and after given-up: the standby's side is nothing any more."""
        about = model.About(self.body.uuid, self.body.pid, self.body.g, self.body.domain)
        try:
            await self.site.ask(self.body.peer, "discard", about, model.Answer, 45.0)
        except Unreachable:
            # It discards by itself when it comes back and asks: this instance is unknown here then.
            log.warning("%s is away; it will discard its copy of %s when it asks", self.body.peer, self.body.domain)

    async def _add_monitor(self) -> None:
        await add_monitor(self.qmp, self.monitor_path())

    async def _remove_monitor(self) -> None:
        if await self._qemu_here():
            await remove_monitor(self.qmp, self.monitor_path())
        elif os.path.exists(self.monitor_path()):
            os.unlink(self.monitor_path())

    async def _qemu_here(self) -> bool:
        return self.qemu_alive() and (await self.site.host.info(self.body.uuid)).running

    async def _start_gate(self) -> None:
        body, config = self.body, self.site.config
        await self.gate.create(
            GateState(
                body.uuid, body.domain, body.pid, body.g, "primary", body.key, self.monitor_path(), body.qemu_pid,
                body.qemu_start, body.links, record="preparing", mode="pass", buffer=body.buffer, nics=body.nics,
                loss_ms=config.loss_ms, delay_ms=body.delay_ms, lan_check=list(config.lan_check),
            )  # fmt: skip
        )

    async def _end_gate(self) -> None:
        await self.gate.end()

    async def _attach(self) -> None:
        await self.gate.ask("attach")

    async def _detach(self) -> None:
        """Only where the protocol lets the buffer open; everything held leaves in order first."""
        if not os.path.exists(self.gate.state_path):
            return
        if not self.gate.connected:
            await self.gate.adopt()
        if refusal := generations.may_open_primary(self.ledger):
            raise Refused("may-not-open", "the network buffer stays closed", refusal)
        await self.gate.ask("open", because=self.ledger.newest.value if self.ledger.newest else "preparing")
        await self.gate.ask("detach")

    async def _interpose(self) -> None:
        await diskreplica.interpose(self.qmp, self.body.disks)

    async def _restore_disks(self) -> None:
        if await self._qemu_here():
            await diskreplica.restore(self.qmp, self.body.disks)

    def _peer_address(self) -> str:
        return self.body.links[0].peer

    async def _copy(self) -> None:
        await diskreplica.start_mirrors(self.qmp, self.body.disks, self._peer_address(), self.body.nbd_port)
        await diskreplica.mirrors_ready(
            self.qmp, self.body.disks, lambda progress: self.on_step("copy the disks", round(progress, 3))
        )

    async def _dismantle(self) -> None:
        if await self._qemu_here():
            await diskreplica.dismantle_copy(self.qmp, self.body.disks)

    async def _switch_over(self) -> None:
        """Mirrors run until the guest stands still; then hold, swap, go on. A deadline: a lost standby says nothing."""
        body = self.body
        bandwidth = self.site.config.max_bandwidth_bytes or (1 << 40)
        await self.engine.start(self.qmp, self._peer_address(), body.mig_port, body.delay_ms, bandwidth)
        deadline_ms = boottime_ms() + SWITCHOVER_DEADLINE_S * 1000
        while not await self.engine.switchover_reached(self.qmp):
            if boottime_ms() > deadline_ms:
                raise Failed("switch-over", "the memory could not be copied: the guest dirties it faster than the link carries it")
            await asyncio.sleep(0.004)
        await self.gate.ask("hold")
        await diskreplica.swap_to_replication(self.qmp, body.disks, self._peer_address(), body.nbd_port)
        await self.gate.ask("update", yank=diskreplica.yank_instances(body.disks))
        await self.engine.begin_checkpoints(self.qmp)

    async def _abort(self) -> None:
        if not await self._qemu_here():
            return
        if self.gate.connected:
            # Whatever waits in a dead stream is woken first, or QEMU's main loop may not answer.
            await self.gate.ask("yank")
        await self.engine.abort(self.qmp)

    async def _first_checkpoint(self) -> None:
        """The guest's output waits for it, so it is asked for at once: setting the delay again starts a checkpoint."""
        while await self.qmp.status() not in ("running", "colo"):
            await asyncio.sleep(0.002)
        delay = {"x-checkpoint-delay": self.body.delay_ms}
        await self.gate.qmp([{"execute": "migrate-set-parameters", "arguments": delay}])
        try:
            await asyncio.wait_for(self._acknowledged.wait(), FIRST_CHECKPOINT_DEADLINE_S)
        except TimeoutError:
            raise Failed(
                "no-checkpoint", f"no checkpoint was acknowledged within {FIRST_CHECKPOINT_DEADLINE_S:g} s",
                "the standby's QEMU hangs or the link is gone",
            ) from None  # fmt: skip
        status = await self.gate.ask("status")
        if status["disk_error"] or status["stream_dead"]:
            raise Failed("stream", f"the stream broke at once: {status['disk_error'] or status['stream_dead']}")

    # ---- arming ----

    async def _arm(self) -> None:
        """arming(g) → ARM → armed(g) → protected(g). From the first record on, opening needs given-up or a win."""
        await self.record(Kind.ARMING)
        await self.gate.ask("update", record="arming")
        about = model.About(self.body.uuid, self.body.pid, self.body.g, self.body.domain)
        answer = await self.site.ask(self.body.peer, "arm", about, model.Answer, 10.0)
        if answer.kind != Kind.ARMED.value:
            raise Failed("not-armed", f"{self.body.peer} did not arm", answer.detail or f"it said {answer.kind or 'nothing'}")
        await self.record(Kind.PROTECTED)
        await self.gate.ask("update", record="protected")

    async def _arming_failed(self, error: BaseException) -> None:
        log.warning("%s: arming failed: %s", self.body.domain, error)
        if self.gate.connected:
            await self.gate.ask("yank")
        await self._resolve(f"arming failed: {error}")

    # ---- verdicts ----

    def on_note(self, kind: str, fields: dict[str, Any]) -> None:
        if kind == "connected":
            if fields.get("acknowledged"):
                self._acknowledged.set()
            if fields.get("verdict"):
                self._verdict(fields["verdict"])
        elif kind == "acknowledged":
            self._acknowledged.set()
        elif kind == "verdict":
            self._verdict(fields)
        elif kind == "alarm":
            self.event("alarm", fields["reason"], "alarm")
        elif kind == "stalled":
            self.event("stalled", "this host's watcher was itself stalled; the silence it saw does not count", "warning")
        elif kind == "qemu" and fields["event"] in ("COLO_EXIT", "QUORUM_FAILURE", "QUORUM_REPORT_BAD"):
            self.event("stream", f"{fields['event']} {fields['data'].get('reason') or fields['data'].get('error', '')}", "warning")

    def _verdict(self, verdict: dict[str, Any]) -> None:
        if self.ledger.newest not in (Kind.ARMING, Kind.PROTECTED, Kind.DIED):
            return  # set-up and its undo look at the stream themselves
        if self._resolving is not None and not self._resolving.done():
            return
        self._carry_through(lambda: self._after(verdict), f"{verdict['act']} {self.body.domain}")

    def _carry_through(self, work: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        """Decisions end only when they are done: whatever fails in between is told, and gone on with from the records."""

        async def until_done() -> None:
            step = work
            while True:
                try:
                    await step()
                    return
                except (McftError, OSError, generations.IllegalRecord) as error:
                    log.exception("%s: %s", name, error)
                    self.event("alarm", f"{name}: {error}; going on from the records", "alarm")
                    await asyncio.sleep(1.0)
                    step = self._go_on

        self._resolving = self.site.spawn(until_done(), name)

    async def _go_on(self) -> None:
        """The next step by the newest record alone."""
        newest = self.ledger.newest
        if self.ledger.won:
            await self._adopt_won()
        elif newest is Kind.LOST:
            await self._lose(None)
        elif newest is Kind.ENDED:
            await self._ended("the guest was ended")
        elif newest in (Kind.ARMING, Kind.PROTECTED, Kind.DIED, Kind.RESIGNED):
            await self._resolve(self.body.reason or f"going on from {newest.value}")

    async def _after(self, verdict: dict[str, Any]) -> None:
        act, reason = verdict["act"], verdict["reason"]
        self.event("verdict", f"{act}: {reason}", "warning")
        if act == "break" and reason.startswith("disk error"):
            self.site.spawn(self._was_disk_error(reason), f"disk error of {self.body.domain}")
        if act == "hung":
            await self.record(Kind.DIED, detail=reason)
            await self.gate.ask("kill")
        elif act == "ended":
            if await self._was_intended(verdict.get("shutdown", "")):
                await self._ended("the guest was shut down")
                return
            await self.record(Kind.DIED, detail=reason)
        elif act == "died":
            await self.record(Kind.DIED, detail=reason)
        self.body.quick_return = True
        await self._resolve(reason)

    async def _was_disk_error(self, reason: str) -> None:
        """A failed write is a disk error unless the standby's QEMU or the link turns out to be gone. Sticky: no more by itself."""
        deadline_ms = boottime_ms() + 2 * self.site.config.loss_ms
        while boottime_ms() < deadline_ms and self.gate.connected:
            try:
                status = await self.gate.ask("status", 1.0)
            except Failed:
                break
            age_ms = status["links"][0]["age_ms"]
            if status["peer"]["qemu"] == "gone" or age_ms is None or age_ms > self.site.config.loss_ms:
                return
            await asyncio.sleep(0.02)
        self.body.manual = reason
        await self.save()
        self.event("disk", f"{reason}: not protected again by itself; mend it, then: mcft protect", "alarm")

    async def _was_intended(self, shutdown_reason: str) -> bool:
        """A guest's own reason, or libvirt saying `destroyed` or `shutdown` (`protocol.md`, "Intended ends")."""
        if shutdown_reason.startswith("guest-") or shutdown_reason == "host-qmp-quit":
            return True
        try:
            await asyncio.wait_for(self._stopped.wait(), 2.5)
        except TimeoutError:
            return False
        return self.stopped_detail in (0, 1)  # VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN, _DESTROYED

    def lifecycle(self, event: str, detail: int) -> None:
        """libvirt's lifecycle event of this domain."""
        if event == "stopped":
            self.stopped_detail = detail
            self._stopped.set()
        elif event == "started":
            self._stopped.clear()

    async def _resolve(self, reason: str) -> None:
        """Pull the standby's word until it is given-up (solo) or taken (lost). Anything else: muted."""
        about = model.About(self.body.uuid, self.body.pid, self.body.g, self.body.domain, reason)
        said = ""
        while True:
            known: model.Records | None = None
            try:
                known = await self.site.ask(self.body.peer, "give-up", about, model.Records, 2.0)
            except McftError as error:
                said = str(error)
            if known is not None:
                self.peer_known = known
            verdict = generations.verdict_on_peer_records(self.ledger, peer_ledger(known) if known else None)
            if verdict == "solo":
                await self.go_solo(reason)
                return
            if verdict == "lost":
                await self._lose(known)
                return
            if known is not None:
                said = f"{self.body.peer} says {known.state or 'nothing'}"
            if self.body.state != "muted":
                self.to_state("muted", f"{reason}; {said}")
                await self.save()
            await asyncio.sleep(PULL_EVERY_S)

    # ---- won ----

    async def go_solo(self, reason: str, override: str = "") -> None:
        """solo(g) on disk → QEMU lets go of its standby → spoken(g+1) on disk → the buffer opens → everything undone."""
        if self.ledger.newest is Kind.LOST:
            await self.record(Kind.TAKEN, self.body.g + 1, reason)
        else:
            await self.record(Kind.SOLO, detail=override or reason)
        if override:
            self.body.manual = override
        if not self.qemu_alive():
            await self.record(Kind.SPOKEN, self.ledger.owned)
            self.to_state("stopped", f"{reason}; the guest is down, its disk here is the truth")
            await self._free()
            await self.save()
            await self._clean_up_dead()
            return
        await self._leave()
        await self.record(Kind.SPOKEN, self.ledger.owned)
        await self.gate.ask("update", record="solo")
        await self.gate.ask("open", because="solo")
        self.to_state("solo", reason)
        await self.save()
        await self._free()
        await self._dismantle_all()
        self.body.next_try_boottime_ms = boottime_ms()
        await self.save()

    async def _leave(self) -> None:
        """QEMU goes on alone: read back that it runs. Raises: Failed."""
        targets = [disk.target for disk in self.body.disks]
        commands = [*self.engine.leave_commands(), *diskreplica.drop_replication_commands(targets)]
        await self.gate.qmp([*commands, {"execute": "query-status"}])
        for _ in range(400):
            replies = await self.gate.qmp([{"execute": "query-status"}])
            status = replies[0].get("return", {}).get("status")
            if status == "running":
                return
            if status in ("paused", "colo", "finish-migrate", "postmigrate"):
                await self.gate.qmp([*self.engine.leave_commands(), {"execute": "cont"}])
            await asyncio.sleep(0.005)
        raise Failed("leave", f"QEMU does not go on alone (it says '{status}')", "", "look at: virsh domstate; mcft events")

    async def _free(self) -> None:
        """This side owns the newest generation: it may start here again, also by itself."""
        self.site.markers.free(self.body.uuid)
        if self.body.autostart and (info := await self.site.host.find(self.body.uuid)) is not None and info.persistent:
            await self.site.host.set_autostart(self.body.uuid, True)

    async def _dismantle_all(self) -> None:
        """The set-up backwards, without its first two steps and the standby's own (it cleans up itself)."""
        done = {s.name for s in self.steps()[3:]}
        await self.site.runner.undo_all(self.steps(), self, done)

    async def _clean_up_dead(self) -> None:
        await self.gate.end()
        await self.clear_quickack()
        await self._remove_monitor()

    # ---- lost, ended ----

    async def _lose(self, known: model.Records | None) -> None:
        """taken(g) stands on the other side. The guest here stays muted until that one has spoken; then it ends."""
        await self.record(Kind.LOST)
        self.to_state("lost", f"{self.body.peer} took over")
        about = model.About(self.body.uuid, self.body.pid, self.body.g, self.body.domain)
        while known is None or not peer_ledger(known).spoken:
            if known is not None and peer_ledger(known).resigned_win:
                await self.go_solo(f"{self.body.peer} could not run its copy and gave its win back")
                return
            await asyncio.sleep(0.05)
            try:
                known = await self.site.ask(self.body.peer, "state", about, model.Records, 2.0)
            except McftError as error:
                log.info("waiting until %s has spoken: %s", self.body.peer, error)
        await self._give_way()

    async def _give_way(self) -> None:
        """End what is left of the guest here; its definition goes too (kept in the state directory), the ban stays."""
        self.kill_qemu()
        await self.qemu_gone()
        await self._clean_up_dead()
        info = await self.site.host.find(self.body.uuid)
        if info is not None and info.persistent:
            keep = os.path.join(self.site.config.state_dir, "definitions")
            os.makedirs(keep, exist_ok=True)
            with open(os.path.join(keep, f"{self.body.domain}.xml"), "w", encoding="utf-8") as file:
                file.write(await self.site.host.xml(self.body.uuid, inactive=True))
            await self.site.host.undefine(self.body.uuid)
        self.event("lost", f"{self.body.domain} runs on {self.body.peer}; nothing of it runs here", "warning")
        await self.save()

    async def _ended(self, why: str) -> None:
        """An intended end: no take-over; the record stays, and starting the guest again protects it again."""
        await self.record(Kind.ENDED, detail=why)
        self.to_state("stopped", why)
        about = model.About(self.body.uuid, self.body.pid, self.body.g, self.body.domain, why)
        await self.save()
        while True:
            try:
                await self.site.ask(self.body.peer, "ended", about, model.Answer, 10.0)
                break
            except McftError as error:
                log.info("telling %s that %s has ended: %s", self.body.peer, self.body.domain, error)
                await asyncio.sleep(1.0)
        await self._free()
        await self._clean_up_dead()
        await self.save()

    # ---- what operators ask ----

    async def unprotect(self, on_step: OnStep) -> None:
        """End the protection; the guest goes on (or stays stopped). Raises Refused where the standby does not let go."""
        state = self.ledger.newest
        if state in (Kind.ARMING, Kind.PROTECTED, Kind.DIED) and not self.ledger.won:
            on_step("the standby gives up", None)
            await self._let_go("unprotect")
        on_step("take everything away", None)
        if self.body.state not in ("active", "stopped") and await self._qemu_here():
            done = {s.name for s in self.steps()[3:]}
            await self.site.runner.undo_all(self.steps(), self, done, on_step)
        await self._discard_standby()
        await self._unban()
        await self.site.store.delete(self.body.uuid)
        self.forget_labels()
        self.event("unprotect", f"{self.body.domain} is not protected any more")
        if self.on_gone is not None:
            self.on_gone(self)

    async def _let_go(self, why: str) -> None:
        """Close, break the stream, and go solo on exactly given-up(g). Raises: Refused, TimedOut (muted then)."""
        if self.qemu_alive():
            if not self.gate.connected:
                await self.gate.adopt()
            # No reachable standby, no giving up: don't mute a guest for a question that can't be answered.
            about = model.About(self.body.uuid, self.body.pid, self.body.g, self.body.domain, why)
            if self.body.state != "muted":
                try:
                    await self.site.ask(self.body.peer, "state", about, model.Records, 3.0)
                except Unreachable as error:
                    raise Refused(
                        "standby-silent", f"{self.body.peer} does not answer, so it can't give {self.body.domain} up", error.reason,
                        f"if {self.body.peer} is certainly off: mcft solo {self.body.domain} --peer-is-off",
                    ) from None  # fmt: skip
            await self.gate.ask("yank")
        if self._resolving is None or self._resolving.done():
            self._carry_through(lambda: self._resolve(why), f"{why} {self.body.domain}")
        assert self._resolving is not None
        try:
            await asyncio.wait_for(asyncio.shield(self._resolving), 20.0)
        except TimeoutError:
            raise TimedOut(
                "standby-silent", f"{self.body.peer} has not given {self.body.domain} up yet; it is muted", self.body.reason,
                f"if {self.body.peer} is certainly off: mcft solo {self.body.domain} --peer-is-off",
            ) from None  # fmt: skip
        if not self.ledger.has(Kind.SOLO):
            raise Refused("lost", f"{self.body.domain} runs on {self.body.peer} now", "it took over meanwhile")

    async def solo(self, *, force: bool, peer_is_off: bool) -> str:
        """The operator's word that the guest goes on alone. Asks the peer first; overrides only if it is silent."""
        domain, peer = self.body.domain, self.body.peer
        if self.ledger.won or self.body.state in ("solo", "active"):
            return f"{domain} runs without a standby already"
        if self.ledger.newest not in (Kind.ARMING, Kind.PROTECTED, Kind.DIED):
            raise Refused("not-here", f"{domain} can't go solo here", f"its state is {self.body.state}", f"mcft status {domain}")
        try:
            await self.site.ask(peer, "state", model.About(self.body.uuid, self.body.pid, self.body.g), model.Records, 3.0)
        except McftError as error:
            if not peer_is_off:
                raise Refused(
                    "standby-silent", f"{peer} does not answer, so it may have taken {domain} over", str(error),
                    f"make sure that {peer} is powered off, then: mcft solo {domain} --peer-is-off",
                ) from None  # fmt: skip
            return await self._override(f"the operator's word that {peer} is off")
        await self._let_go("solo, asked for by the operator")
        self.body.manual = "solo was asked for"
        await self.save()
        return f"{domain} runs without a standby; protect it again with: mcft protect {domain} --to {peer}"

    async def _override(self, why: str) -> str:
        if self._resolving is not None:
            self._resolving.cancel()
            await asyncio.gather(self._resolving, return_exceptions=True)
        if self.qemu_alive():
            if not self.gate.connected:
                await self.gate.adopt()
            await self.gate.ask("yank")
        await self.go_solo(why, override=why)
        return f"{self.body.domain} goes on alone, by your word; if {self.body.peer} is not off, two copies run"

    async def switch(self, on_step: OnStep) -> str:
        """A planned switch: last checkpoint, stop, resigned(g), TAKE; what is lost is as if the network had dropped it."""
        if self.ledger.newest is not Kind.PROTECTED or self.body.state != "protected":
            raise Refused(
                "not-protected", f"{self.body.domain} is {self.body.state}, so there is nothing to switch to", self.body.reason,
                f"mcft status {self.body.domain}",
            )  # fmt: skip
        on_step("the last checkpoint", None)
        await self.gate.ask("switch", 12.0)
        await self.record(Kind.RESIGNED)
        await self.gate.ask("update", record="resigned")
        on_step(f"{self.body.peer} takes over", None)
        about = model.About(self.body.uuid, self.body.pid, self.body.g, self.body.domain, "planned switch")
        known: model.Records | None = None
        while known is None or generations.verdict_on_peer_records(self.ledger, peer_ledger(known)) == "unknown":
            try:
                known = await self.site.ask(self.body.peer, "take", about, model.Records, 10.0)
            except McftError as error:
                self.to_state("muted", f"the switch waits for {self.body.peer}: {error.message}")
                await asyncio.sleep(PULL_EVERY_S)
        if generations.verdict_on_peer_records(self.ledger, peer_ledger(known)) == "solo":
            await self.go_solo(f"{self.body.peer} could not take over")
            raise Failed("switch", f"{self.body.peer} could not take {self.body.domain} over; it goes on here")
        await self._lose(known)
        return f"{self.body.domain} runs on {self.body.peer}"

    async def set_delay(self, delay_ms: int) -> None:
        """At run time, read back from QEMU."""
        self.body.delay_ms = delay_ms
        await self.save()
        if self.body.state == "protected":
            await self.gate.ask("update", delay_ms=float(delay_ms))
            await self.gate.qmp([{"execute": "migrate-set-parameters", "arguments": {"x-checkpoint-delay": delay_ms}}])
            replies = await self.gate.qmp([{"execute": "query-migrate-parameters"}])
            found = replies[0].get("return", {}).get("x-checkpoint-delay")
            if found != delay_ms:
                raise Failed("set", f"QEMU took {found} ms instead of {delay_ms} ms as its delay")

    # ---- the agent was restarted ----

    async def adopt(self) -> None:
        """Go on from the records. A set-up that was cut off before arming is undone; what is armed is watched again."""
        newest = self.ledger.newest
        if self.ledger.won:
            await self._adopt_won()
        elif newest in (None, Kind.PREPARING):
            await self._undo_cut_off()
        elif newest in (Kind.ARMING, Kind.PROTECTED, Kind.DIED, Kind.RESIGNED):
            await self._adopt_armed(newest)
        elif newest is Kind.LOST:
            await self._lose(None)
        elif newest is Kind.ENDED and self.body.state != "unprotected":
            await self._clean_up_dead()

    async def _adopt_won(self) -> None:
        """This side owns g + 1. What a cut-off solo or take-over had left to do is done; then: does the guest run?"""
        if self.ledger.side == "standby":
            if self.qemu_alive() and self.body.overlays_g:
                await self.commit_online()
        elif not self.qemu_alive():
            if not self.ledger.spoken:
                await self.record(Kind.SPOKEN, self.ledger.owned)
            await self._clean_up_dead()
            await self._free()
        elif self.body.state not in ("solo", "unprotected", "stopped") or os.path.exists(self.gate.state_path):
            if not self.ledger.spoken:
                await self.gate.adopt()
                await self._leave()
                await self.record(Kind.SPOKEN, self.ledger.owned)
            self.to_state("solo", self.body.reason)
            await self._free()
            await self._dismantle_all()
        await self.look()

    async def _undo_cut_off(self) -> None:
        log.warning("%s: a set-up was cut off by the agent's end: undoing it", self.body.domain)
        self.event("undo", "the agent ended while it protected the domain; what it had done is undone", "warning")
        try:
            await self.site.runner.undo_all(self.steps(), self)
        finally:
            await self.site.store.delete(self.body.uuid)
            self.forget_labels()
            if self.on_gone is not None:
                self.on_gone(self)

    async def _adopt_armed(self, newest: Kind) -> None:
        if not self.qemu_alive():
            if newest in (Kind.ARMING, Kind.PROTECTED):
                await self.record(Kind.DIED, detail="found dead at the agent's start")
            self.to_state("muted", "this host or its QEMU was lost; asking who went on")
            self._carry_through(lambda: self._resolve("found dead at the agent's start"), f"resolve {self.body.domain}")
            return
        await self.gate.adopt()
        if newest is Kind.PROTECTED:
            return
        self._carry_through(lambda: self._resolve(f"the agent restarted in {newest.value}"), f"resolve {self.body.domain}")


async def make_body(site: Any, request: Any, g: int) -> model.Body:
    """Look at the running domain: what is to be protected. Raises: NotFound, Refused; changes nothing."""
    info = await site.host.info(request.domain)
    if not info.running or info.paused:
        raise Refused(
            "not-running", f"{info.name} is {'paused' if info.paused else 'not running'}", "only a running guest can be protected",
            f"virsh {'resume' if info.paused else 'start'} {info.name}",
        )  # fmt: skip
    live = await site.host.xml(info.uuid)
    domainxml.refuse_unprotectable(live)
    from mcft.gate.state import process_start

    start = process_start(info.qemu_pid)
    if start is None:
        raise Refused("no-qemu", f"the QEMU of {info.name} can't be found", "its pid file names no process of this domain")
    return model.Body(
        info.uuid, info.name, secrets.token_hex(16), g, "primary", request.to, engine_asked=request.engine,
        buffer_asked=request.netbuffer, delay_ms=request.delay_ms, key=secrets.token_hex(32),
        xml=await site.host.xml(info.uuid, inactive=info.persistent), persistent=info.persistent, autostart=info.autostart,
        disk_paths=dict(request.disks), overwrite=list(request.overwrite), qemu_pid=info.qemu_pid, qemu_start=start,
        boot_id=hook.boot_id(), nics=domainxml.nics(live, domainxml.uses_vhost(info.qemu_pid)),
    )  # fmt: skip
