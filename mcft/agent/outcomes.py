"""What a decision leads to, on the primary's side: alone with the guest, or without it; each step durable before its act."""

from __future__ import annotations

import asyncio
import os

from mcft import diskreplica
from mcft.agent import model
from mcft.agent.model import peer_ledger
from mcft.agent.setup import STANDBYS_SIDE, Setup
from mcft.agent.site import log
from mcft.errors import Failed, McftError
from mcft.failover import BUFFER_BROKEN, OWN_DISK
from mcft.gate.loop import boottime_ms
from mcft.generations import Kind


def alone(reason: str) -> str:
    """The state of a guest that goes on without a standby: `failed` if somebody took its buffer apart; an operator must look."""
    return "failed" if reason.startswith(BUFFER_BROKEN) else "solo"


class Outcomes(Setup):
    """Called once it is decided who goes on (`Deciding`), and again from the records after the agent's own end."""

    # ---- won ----

    async def go_solo(self, reason: str, override: str = "") -> None:
        """solo(g) on disk → QEMU lets go of its standby → spoken on disk → the buffer opens → everything undone."""
        if not override:
            self.arbiter.forget_resolved()
        if override:
            self.body.manual = override  # (durable with the record)
        if self.ledger.newest is Kind.LOST:
            await self.record(Kind.TAKEN, self.body.g + 1, reason)
        else:
            await self.record(Kind.SOLO, detail=override or reason)
        if not self.qemu_alive():
            await self.record(Kind.SPOKEN, self.ledger.owned)
            if OWN_DISK in reason:
                # Not armed yet, so the copy that has the write is no standby: what is left is what a power loss leaves.
                why = f"{reason}; the guest is down, and its disk here lacks a write that it believes: check its file systems"
                self.event("disk", why, "alarm")
            else:
                why = f"{reason}; the guest is down, its disk here is the truth"
            self.to_state("stopped", why)
            await self.free()
            await self.save()
            await self._clean_up_dead()
            return
        held = self._has_gate()
        if held:
            await self._leave()
        await self.record(Kind.SPOKEN, self.ledger.owned)
        await self._let_out()
        self.body.next_try_boottime_ms = boottime_ms()
        self.body.dismantling = True
        self.to_state(alone(reason), reason)
        await self.save()
        await self.free()
        await self.dismantle_all()

    async def _let_out(self) -> None:
        """solo and spoken stand: the gate watches no more, and lets go what it held, before anything is taken away."""
        if self._has_gate():
            await self.gate.insist("update", record="solo")
            await self.gate.insist("open", because="solo")

    def _has_gate(self) -> bool:
        """Not so where the write of arming(g) failed and was on the disk all the same: its set-up was undone, nothing is held."""
        return self.gate.stands()

    async def _leave(self) -> None:
        """QEMU goes on alone: read back that it runs. Raises: Failed."""
        targets = [disk.target for disk in self.body.disks]
        commands = [*self.engine.leave_commands(), *diskreplica.drop_replication_commands(targets)]
        await self.gate.qmp([*commands, {"execute": "query-status"}])
        status = ""
        for _ in range(400):
            replies = await self.gate.qmp([{"execute": "query-status"}])
            status = str(replies[0].get("return", {}).get("status"))
            if status == "running":
                return
            # Never inside a capture (`colo`): leaving ends that one, and then QEMU goes on by itself.
            if status in ("paused", "finish-migrate", "postmigrate"):
                await self.gate.qmp([*self.engine.leave_commands(), {"execute": "cont"}])
            await asyncio.sleep(0.005)
        raise Failed("leave", f"QEMU does not go on alone (it says '{status}')", "", "look at: virsh domstate; mcft events")

    async def free(self) -> None:
        """This side owns the newest generation: it may start here again, also by itself."""
        self.site.markers.free(self.body.uuid)
        if self.body.autostart and (info := await self.site.host.find(self.body.uuid)) is not None and info.persistent:
            await self.site.host.set_autostart(self.body.uuid, True)

    async def dismantle_all(self) -> None:
        """The set-up backwards, without what a solo guest keeps and the standby's own (it cleans up itself).

        What fails of it is tried again (`go_on`), though its gate is gone by then: `dismantling` remembers that.
        """
        done = {step.name for step in self.steps()} - set(STANDBYS_SIDE)
        await self.site.runner.undo_all(self.steps(), self, done)
        self.body.dismantling = False
        await self.save()

    async def _clean_up_dead(self) -> None:
        await self.gate.end()
        await self.drop_dead_plugs()
        await self.clear_quickack()
        await self._remove_monitor()

    async def adopt_won(self) -> None:
        """This side owns g + 1. What a cut-off solo or take-over had left to do is done; then: does the guest run?"""
        if self.ledger.side == "standby":
            if self.qemu_alive() and self.body.overlays_g:
                await self.commit_online()
        elif not self.qemu_alive():
            if not self.ledger.spoken:
                await self.record(Kind.SPOKEN, self.ledger.owned)
            await self._clean_up_dead()
            await self.free()
        elif self._half_solo():
            if not self.ledger.spoken:
                if self._has_gate():
                    await self.gate.adopt()
                    await self._leave()
                await self.record(Kind.SPOKEN, self.ledger.owned)
            await self._let_out()
            self.body.dismantling = True
            self.to_state(alone(self.body.reason), self.body.reason)
            await self.free()
            await self.dismantle_all()
        await self.look()

    def _half_solo(self) -> bool:
        """Whether going solo was cut off, or its taking away failed."""
        settled = self.body.state in ("solo", "unprotected", "stopped", "failed")
        return not settled or self.body.dismantling or self._has_gate()

    # ---- lost, ended ----

    async def _lose(self, known: model.Records | None) -> None:
        """taken(g) stands on the other side. The guest here stays muted until that one has spoken; then it ends."""
        self.arbiter.forget_resolved()
        await self.record(Kind.LOST)
        self.to_state("lost", f"{self.body.peer} took over")
        if await self._peer_speaks(known):
            await self._give_way()
        else:
            await self.go_solo(f"{self.body.peer} could not run its copy and gave its win back")

    async def _peer_speaks(self, known: model.Records | None) -> bool:
        """What follows taken(g) on the other side, waited for: True once its guest is heard, False if its win was given back."""
        while known is None or not peer_ledger(known).spoken:
            if known is not None and peer_ledger(known).resigned_win:
                return False
            await asyncio.sleep(0.05)
            try:
                known = await self.site.ask(self.body.peer, "state", self.about(), model.Records, 2.0)
            except McftError as error:
                log.info("waiting until %s has spoken: %s", self.body.peer, error)
        return True

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
        """An intended end: no take-over; the record stays, and starting the guest again protects it again.

        Only a standby that says ended, given-up or lost has let go; one that took over meanwhile keeps the guest.
        """
        await self.record(Kind.ENDED, detail=why)
        self.to_state("stopped", why)
        await self.save()
        while True:
            try:
                answer = await self.site.ask(self.body.peer, "ended", self.about(why), model.Answer, 10.0)
                if answer.kind == Kind.TAKEN.value:
                    self.to_state("lost", f"{self.body.peer} took over before it heard that the guest was shut down")
                    if await self._peer_speaks(None):
                        await self._give_way()
                        return
                    self.to_state("stopped", why)
                    break
                if answer.kind in (Kind.ENDED.value, Kind.GIVEN_UP.value, Kind.LOST.value, ""):
                    break
            except McftError as error:
                log.info("telling %s that %s has ended: %s", self.body.peer, self.body.domain, error)
            await asyncio.sleep(1.0)
        await self.free()
        await self._clean_up_dead()
        await self.look()
