"""The standby's side of a protection: arm, give up, take over, clean up. Its copy is built by `copy.py`.

A take-over is a decision: carried through, whatever fails in between, and gone on with from the records.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from mcft import diskreplica, generations
from mcft.agent import domainxml, model
from mcft.agent.copy import Copy
from mcft.agent.copy import make_body as make_body
from mcft.agent.model import peer_ledger
from mcft.agent.site import log
from mcft.arbiter.base import Standing
from mcft.errors import Failed, McftError, Refused
from mcft.failover import OWN_DISK
from mcft.generations import Kind


class Standby(Copy):
    """Follows, until the primary asks it to give up or is lost."""

    on_active: Any = None  # called with self once this side is the active one

    # ---- answers to the primary ----

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._delay_told_at_ms = 0.0
        self.lan_away = ""  # as its gate sees it
        self._letting_go = asyncio.Lock()  # of giving up and claiming, the one that begins first excludes the other
        self._broken = ""  # why this copy is not whole; its record waits while a claim of its own is under way

    @property
    def broken(self) -> str:
        """Why this copy never takes over; empty if it may."""
        return self._broken or (self.body.reason if self.ledger.has(Kind.NOT_WHOLE) else "")

    async def arm(self, words: model.Arm) -> model.Answer:
        """armed(g), durable; or why not."""
        if refusal := generations.may_arm(self.ledger):
            return self._stands(refusal)
        if not self.qemu_alive():
            return self._stands("the copy's QEMU is gone")
        status = await self.gate.ask("status", 2.0)
        if status["stream_dead"] or status["disk_error"]:
            return self._stands(status["stream_dead"] or status["disk_error"])
        if self.ledger.newest is Kind.PREPARING and (refusal := await self.arbiter.follow(words.key, words.seen)):
            return self._stands(refusal)
        try:
            await self.record(Kind.ARMED)
        except generations.IllegalRecord as error:
            return self._stands(str(error))
        if self.ledger.newest is not Kind.ARMED:
            return self._stands("another record came first")
        await self.gate.insist("update", record="armed")
        if self.ledger.newest is Kind.ARMED:  # (its gate may have been away for long: given up meanwhile)
            self.arbiter.start_watch()
            self.to_state("protected")
            await self.save()
        return self._stands()

    def _stands(self, detail: str = "") -> model.Answer:
        newest = self.ledger.newest
        return model.Answer(newest.value if newest else "", self.ledger.g, detail)

    async def give_up(self, about: model.About) -> None:
        """Only ever in answer to the primary: given-up(g) on disk, the copy ended.

        A primary whose QEMU is gone gets no giving up: it said so, and this side takes over.
        """
        await self._note_primarys_disk(about.detail)
        async with self._letting_go:
            await self._give_up(about)

    async def _give_up(self, about: model.About) -> None:
        if self.ledger.newest in (Kind.TAKEN, Kind.GIVEN_UP, Kind.LOST, Kind.ENDED):
            return
        if not about.qemu_runs and self.ledger.newest is Kind.ARMED and self.qemu_alive():
            self.begin_take("the primary's agent says that its QEMU is gone", peer_closed=True)
            return
        # A claim that nobody can have heard is given back; one that may have been sent has to be resolved first.
        claiming = self.arbiter.pending and not await self.arbiter.withdraw()
        claiming = claiming or (self.body.arbiter == "standby" and self.deciding is not None and not self.deciding.done())
        if refusal := generations.may_give_up(
            self.ledger, own_qemu_gone=not self.qemu_alive(), stream_dead=True, claim_under_way=claiming
        ):
            log.info("%s: not given up: %s", self.body.domain, refusal)
            return
        if self.gate.connected:
            await self.gate.ask("break", 1.0)
        # Looked at as late as can be: a QEMU that closed its disks' connections may still be dying a few ms after.
        self.body.copy_lost = not self.qemu_alive()
        try:
            await self.record(Kind.GIVEN_UP)
        except generations.IllegalRecord as error:
            log.info("%s: not given up: %s", self.body.domain, error)
            return
        self.kill_qemu()
        self.to_state("lost", f"gave up: {self.body.peer} goes on without this copy")
        self.site.spawn(self._clean_up(), f"clean up {self.body.domain}")

    async def set_delay(self, told: model.SetDelay) -> model.Answer:
        """The primary's delay is another from now on; a take-over goes on with it, but not with a period that was stretched.

        A word that was overtaken by a newer one changes nothing.
        """
        if told.told_at_ms >= self._delay_told_at_ms:
            self._delay_told_at_ms = told.told_at_ms
            self.body.delay_ms = told.delay_ms
            await self.save()
            await self.gate.ask("update", delay_ms=float(told.delay_ms), period_ms=float(told.period_ms))
        return self._stands()

    async def _note_primarys_disk(self, why: str) -> None:
        """Why the primary ended its QEMU: this side goes on, and does not protect by itself onto that disk."""
        if why.startswith(f"disk error: {OWN_DISK}") and not self.body.manual:
            self.body.manual = why
            await self.save()
            self.event("disk", f"{why} ({self.body.peer}): not protected again by itself; mend it, then: mcft protect", "alarm")

    async def ended(self, why: str) -> model.Answer:
        """The primary's guest was ended on purpose: no take-over, the copy goes. What was taken stays taken."""
        claiming = self.deciding is not None and not self.deciding.done()
        if self.arbiter.pending and self.ledger.newest is Kind.ARMED:
            return model.Answer("claiming", self.ledger.g, "a claim is not resolved yet")
        if self.ledger.newest is Kind.TAKEN or claiming:
            return model.Answer(Kind.TAKEN.value, self.ledger.g, "taken over here")
        if self.ledger.newest not in (Kind.GIVEN_UP, Kind.LOST, Kind.ENDED):
            try:
                await self.record(Kind.ENDED, detail=why)
            except generations.IllegalRecord as error:
                return self._stands(str(error))
        self.kill_qemu()
        self.to_state("stopped", why)
        await self._clean_up()
        return self._stands()

    async def _clean_up(self, *, taken: bool = False) -> None:
        """The copy is void: its QEMU, gate and overlays go, its disk stays, labelled stale."""
        async with self.tidying:
            await self._tidy(taken)

    async def _tidy(self, taken: bool) -> None:
        if taken:
            await self.qemu_gone()
        for work in (self._destroy, self._end_gate, self.clear_quickack, self._remove_socket):
            try:
                await work()
            except McftError as error:
                log.warning("cleaning up %s: %s", self.body.domain, error)
        await self._remove_monitor()
        diskreplica.remove_overlay_files(self.body.disks, self.body.g)
        self.site.markers.revoke(self.body.uuid)
        await self.save()

    async def discard(self) -> None:
        """The protection is undone or over: nothing of it is left here but its generation."""
        if self.ledger.newest is Kind.TAKEN:
            raise Refused("taken", f"{self.site.config.name} has taken {self.body.domain} over")
        await self.site.runner.undo_all(self.steps(), self)

    async def refresh(self) -> None:
        """Ask the gate how it is; what it does not answer stays empty."""
        await super().refresh()
        self.lan_away = self.gate_status.get("lan_away", self.lan_away)

    # ---- take-over ----

    def on_note(self, kind: str, fields: dict[str, Any]) -> None:
        if kind == "lan":
            self.lan_away = fields["away"]
            self.event("lan", self.lan_away or "this host's own LAN answers again", "warning" if self.lan_away else "info")
        elif kind == "connected":
            verdict, self.lan_away = fields.get("verdict"), fields.get("lan_away", "")
            if fields.get("disk_error"):
                self._broken = fields["disk_error"]
                self.site.spawn(self._not_whole(fields["disk_error"]), f"{self.body.domain} is not whole")
            elif verdict and verdict["act"] == "claim" and not fields.get("took"):
                self.begin_take(verdict["reason"])
        elif kind == "verdict" and fields["act"] == "claim":
            self.begin_take(fields["reason"])
        elif kind == "not-whole":
            self._broken = fields["reason"]
            self.site.spawn(self._not_whole(fields["reason"]), f"{self.body.domain} is not whole")
        elif kind == "alarm":
            if self.ledger.newest in (Kind.GIVEN_UP, Kind.LOST, Kind.ENDED):
                return  # this copy was let go of on purpose: that its QEMU is gone is no news
            self.event("alarm", fields["reason"], "alarm")
            if not self.qemu_alive() and self.ledger.newest is Kind.ARMED:
                self.to_state("lost", f"the copy's QEMU is gone; {self.body.peer} goes on without it")
        elif kind == "stalled":
            self.event("stalled", "this host's watcher was itself stalled; the silence it saw does not count", "warning")
        elif kind == "qemu" and fields["event"] == "COLO_EXIT":
            self.event("stream", f"the checkpoint stream ended ({fields['data'].get('reason')})", "warning")

    async def _not_whole(self, reason: str) -> None:
        """A disk error of this copy, however small: sticky and durable, it never takes over. While a claim of its own is
        under way the record waits: what that wins is given back at once."""
        if not self.arbiter.pending and self.ledger.newest in (Kind.PREPARING, Kind.ARMED):
            await self.record(Kind.NOT_WHOLE, detail=reason)
            await self.gate.insist("update", record="not-whole")
            self.to_state("failed", f"this copy is not whole: {reason}")
            await self.save()

    def begin_take(self, reason: str, *, peer_closed: bool = False) -> None:
        """Begin to take over; where that is under way already, it is that."""
        self.carry_through(lambda: self._take(reason, peer_closed), f"take {self.body.domain} over")

    async def override(self, why: str) -> None:
        """The operator's word in the arbiter's place."""
        await self.stop_deciding()
        self.carry_through(lambda: self._take(why, peer_closed=False, override=True), f"take {self.body.domain} over")
        assert self.deciding is not None
        await asyncio.shield(self.deciding)
        self.tell_arbiter()

    async def _win(self, reason: str, peer_closed: bool) -> bool:
        """By the arbiter. False: not won; what follows from that is done. `standby`: this side's own record is the win."""
        if self.body.arbiter == "standby":
            return True
        if why := self.arbiter.may_claim():
            await self._undecidable(reason, why)
            return False
        let_go = "the primary has let go of it" if peer_closed else ""
        if self.qemu_alive():
            await self.gate.insist("claim")
            peer = (await self.gate.insist("status"))["peer"]
            if peer["qemu"] == "gone" and peer["closed"]:
                let_go = "the primary's QEMU is gone and its gate is closed"

        def waits(why: str) -> None:
            self.to_state("taking-over", f"{reason}; {why}")

        async with self._letting_go:
            if self.ledger.newest is not Kind.ARMED:
                return False
        standing = await self.arbiter.claim(let_go=let_go, on_wait=waits, silent=self.peer_silent)
        if standing is Standing.WON:
            return True
        if standing is Standing.LOST:
            await self._lost(reason)
        elif standing is Standing.UNKNOWN:
            await self._undecidable(reason, self.body.arbiter_trouble)
            if self._broken:
                # Whatever was decided: after not-whole(g) there is no taken(g), and that is all that the primary has to know.
                self.arbiter.forget_resolved()
        elif self.ledger.newest is Kind.ARMED:
            # Withdrawn, and nothing of it can win: it follows again, or gives up if that is why.
            self.to_state("protected")
            with contextlib.suppress(Failed):
                await self.gate.ask("unclaim", 2.0)
        if self._broken:
            await self._not_whole(self._broken)  # what waited for the claim: the primary may have to know it, to go on
        return False

    async def _undecidable(self, reason: str, why: str) -> None:
        """Only an operator gets out of it: `failed`, which says what to type. Said once; the copy stays, for that word."""
        said = f"{reason}; the arbiter ({self.body.arbiter}) can't tell who goes on: {why}"
        if self.body.reason != said:
            self.event("alarm", f"{self.body.domain} can't be taken over here: {said}", "alarm")
            self.to_state("failed", said)
            await self.save()

    async def _lost(self, reason: str) -> None:
        """The arbiter decided for the primary. This copy stays paused until that one has spoken; then it goes."""
        self.arbiter.forget_resolved()
        await self.record(Kind.LOST, detail=reason)
        self.to_state("lost", f"{self.body.peer} goes on without this copy: the arbiter ({self.body.arbiter}) decided so")
        await self.save()
        while self.qemu_alive():
            try:
                known = await self.site.ask(self.body.peer, "state", self._about(), model.Records, 2.0)
                if known.pid != self.body.pid or peer_ledger(known).spoken:
                    break
            except McftError as error:
                log.info("waiting until %s has spoken: %s", self.body.peer, error)
            await asyncio.sleep(0.2)
        await self._clean_up()

    async def left_behind(self) -> None:
        """The primary's records say that it went on, and spoke: what this side knows of it is too old to say anything else."""
        async with self._letting_go:
            if self.ledger.newest in (Kind.ARMED, Kind.NOT_WHOLE):
                await self._lost(f"{self.body.peer} has gone on, and spoken")

    def _about(self) -> model.About:
        return model.About(self.body.uuid, self.body.pid, self.body.g, self.body.domain)

    async def _take(self, reason: str, peer_closed: bool, override: bool = False) -> None:
        """taken(g) → resume → spoken(g+1) → NICs open → persistent. Each record is on disk before its act."""
        if refusal := generations.may_take(self.ledger):
            self.event("alarm", f"{self.body.domain} can't be taken over here: {refusal}", "alarm")
            return
        if self.ledger.spoken:
            return
        if self._broken:
            await self._not_whole(self._broken)  # before anything is claimed, or anybody shot, for it
        if self.ledger.newest is Kind.NOT_WHOLE:
            return
        if self.ledger.newest is Kind.ARMED:
            if not override and not await self._win(reason, peer_closed):
                return
            peer_closed = peer_closed or self.body.arbiter == "fence"  # it is off, or has let go
            self.body.overlays_g = self.body.g
            manual = self.body.manual
            self.body.manual = reason if override else manual  # nothing is protected by itself after that
            self.arbiter.forget_resolved()
            try:
                await self.record(Kind.TAKEN, detail=reason)
            except generations.IllegalRecord as error:
                self.body.overlays_g, self.body.manual = 0, manual
                self.event("alarm", f"{self.body.domain} can't be taken over here: {error}", "alarm")
                return
        if self._broken:
            await self._give_back(f"this copy is not whole: {self._broken}")
            return
        if not self.qemu_alive():
            await self._give_back("its QEMU is gone")
            return
        await self.gate.insist("update", record="taken")
        self.to_state("taking-over", reason)
        try:
            await self.gate.insist("take", 20.0 if self.body.engine != "mc" else 100.0, peer_closed=peer_closed)
        except Failed as error:
            if self.qemu_alive():
                raise
            await self._give_back(str(error))
            return
        await self.record(Kind.SPOKEN, self.body.g + 1)
        spoken = await self.gate.insist("speak")
        self.event("take-over", f"{self.body.domain} runs here now: {reason} ({_timing(spoken['timing_ms'])})", "alarm")
        for problem in spoken["errors"]:
            self.event("alarm", f"opening the NICs: {problem}", "alarm")
        self.to_state("active", reason)
        await self.save()
        await self._settle()

    async def take_cold(self, why: str) -> None:
        """The operator's word that this copy's disk is the truth now, its memory being lost: it may be started here.

        Raises: Refused if this copy's records forbid it (a copy that saw a disk error never takes over).
        """
        if self.ledger.newest is not Kind.ARMED or self.qemu_alive():
            why_not = generations.may_take(self.ledger)
            raise Refused("not-startable", f"the copy of {self.body.domain} here can't be started", why_not)
        await self.stop_deciding()
        self.body.manual = why
        await self.record(Kind.TAKEN, detail=why)
        await self.record(Kind.SPOKEN, self.body.g + 1)
        self.to_state("stopped", why)
        await self._settle()

    async def _settle(self) -> None:
        """After the guest talks again: persistent here, startable here, overlays committed, libvirt's graph as it was."""
        xml = domainxml.moved(self.body.xml, self.body.disk_paths)
        await self.site.host.define(xml)
        if self.body.autostart:
            await self.site.host.set_autostart(self.body.uuid, True)
        self.label()
        await self.save()
        if self.on_active is not None:
            await self.on_active(self)
        if self.qemu_alive():
            await self.commit_online()
            return
        await self.look()
        if not self.body.overlays_g:
            self.site.markers.free(self.body.uuid)

    async def _give_back(self, why: str) -> None:
        """A win whose guest can't run, and that was never spoken: the other side takes it up."""
        self.body.overlays_g = 0  # never spoken: this chain is nobody's truth
        await self.record(Kind.RESIGNED, self.body.g + 1, why)
        self.to_state("lost", "took over, but the copy does not run; given back")
        await self._clean_up(taken=True)

    # ---- the agent was restarted ----

    async def go_on(self) -> None:
        """The next step by the newest record alone."""
        if self.ledger.newest is Kind.ARMED and self.arbiter.pending:
            await self._take(self.body.reason or "going on after the agent's restart", False)
            return
        if self.ledger.newest is Kind.LOST:
            await self._lost(self.body.reason)
        if self.ledger.newest is not Kind.TAKEN or self.ledger.resigned_win:
            return
        if not self.ledger.spoken and self.qemu_alive():
            await self._take(self.body.reason or "going on after the agent's restart", False)
        elif not self.ledger.spoken:
            await self._give_back("its QEMU is gone")
        elif self.body.overlays_g or self.body.role == "standby":
            if self.qemu_alive() and self.gate.load_state() is not None:  # its end comes after the overlays' commit
                await self.gate.insist("speak")
            self.to_state("active", self.body.reason)
            await self._settle()

    @property
    def cut_off(self) -> bool:
        """Whether the agent ended while it built the copy (`prepare` leaves `preparing` once it is whole)."""
        return self.ledger.newest is None or (self.ledger.newest is Kind.PREPARING and self.body.state == "preparing")

    async def adopt(self) -> None:
        """Go on from the records: follow, take over further, or clean up what no longer stands."""
        newest = self.ledger.newest
        await self.arbiter.forget_if_void()
        if self.cut_off:
            # Its primary waits in vain for this agent's answer; there may be no gate, monitor or QEMU to adopt.
            await self.site.runner.undo_all(self.steps(), self)
        elif newest is Kind.TAKEN and not self.ledger.resigned_win:
            self.carry_through(self.go_on, f"go on with {self.body.domain}")
        elif newest is Kind.ARMED and self.arbiter.pending:
            self.carry_through(self.go_on, f"go on with the claim of {self.body.domain}")
        elif newest in (Kind.PREPARING, Kind.ARMED) and self.qemu_alive():
            await self.gate.adopt()
            if newest is Kind.ARMED:
                await self.gate.insist("update", record="armed")
                self.arbiter.start_watch()
                self.to_state("protected")
                await self.save()
        else:
            self._say_how_it_ended()
            await self._clean_up()

    def _say_how_it_ended(self) -> None:
        """The record is what counts: the agent may have ended before it kept the state that follows from it."""
        newest = self.ledger.newest
        if newest in (Kind.PREPARING, Kind.ARMED):
            # armed(g) is void with its QEMU; what becomes of it is the primary's to ask.
            self.to_state("lost", "the copy here is gone (this host or its QEMU was restarted)")
        elif self.body.state not in model.VOID_STATES and newest is Kind.ENDED:
            self.to_state("stopped", "the guest was ended")
        elif self.body.state not in model.VOID_STATES:
            self.to_state("lost", f"its newest record is {newest.value}" if newest else "")


def _timing(timing_ms: dict[str, float]) -> str:
    return ", ".join(f"{name} +{at:.1f} ms" for name, at in timing_ms.items())
