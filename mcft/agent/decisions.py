"""The primary's decisions: arming, and what follows each verdict of its gate, until one side alone may run the guest.

Every decision is carried through: one at a time per protection, whatever fails in between is told and gone on with
from the records (`Life.carry_through`). Only exactly given-up(g) or taken(g) of the standby mean anything.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import msgspec

from mcft import diskreplica, generations
from mcft.agent import model
from mcft.agent.ends import LibvirtsWord, host_goes_down
from mcft.agent.model import peer_ledger
from mcft.agent.setup import STANDBYS_SIDE, OnStep, Setup
from mcft.agent.site import boottime_ms, log
from mcft.arbiter.base import Standing
from mcft.errors import Failed, McftError, TimedOut
from mcft.failover import BUFFER_BROKEN, OWN_DISK
from mcft.generations import UNDECIDED, Kind

PULL_EVERY_S = 0.2
ASK_WHY_S = 2.0  # how long a gate may take to say why its QEMU ended: the other side waits meanwhile
DEAD_WITHIN_S = 5.0  # after SIGKILL
DECIDED_WITHIN_S = 20.0


def alone(reason: str) -> str:
    """The state of a guest that goes on without a standby: `failed` if somebody took its buffer apart; an operator must look."""
    return "failed" if reason.startswith(BUFFER_BROKEN) else "solo"


class Deciding(Setup):
    """From `arming` on: only given-up(g) or a won generation opens the buffer."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.libvirts_word = LibvirtsWord()

    # ---- arming ----

    async def protect(self, on_step: OnStep) -> None:
        """From a running domain to `protected`. Raises what failed, with everything undone (or what remains said)."""
        self.on_step = on_step
        await self.site.runner.run(self.steps(), self, on_step)
        on_step("arm the standby", None)
        if self.hangs:
            await self._rescue()
        try:
            await self._arm()
        except BaseException as error:
            await self._arming_failed(error)
            raise
        if self.body.previous:
            older = msgspec.json.decode(self.body.previous, type=model.Body)
            self.site.spawn(self.arbiter.delete_key(older.arbiter_key), f"delete the old key of {self.body.domain}")
        self.body.failures, self.body.manual, self.body.previous = 0, "", ""
        self.to_state("protected")
        await self.save()

    async def _rescue(self) -> None:
        """Engine mc: QEMU hangs for ever at its first checkpoint, because it found no dirty page. Raises: Failed, always.

        The guest here is frozen and can't be brought back. That no page was dirty since the first pass means that the standby
        has exactly its state, and that it sent nothing since: so the standby is armed all the same, this QEMU ended; it goes on.
        """
        domain, peer = self.body.domain, self.body.peer
        try:
            await self._arm()
        except BaseException as error:
            await self._arming_failed(error)
            raise
        self._verdict({"act": "hung", "reason": "QEMU hangs at its first checkpoint: it found no dirty page"})
        await self._decided()
        where = f"{domain} runs on {peer} now" if self.ledger.newest is Kind.LOST else f"mcft status {domain} says how it ended"
        raise Failed(
            "mc-hung", f"QEMU hung at the first checkpoint of {domain}, as this QEMU does when a guest changes nothing", where,
            f"on {peer}: mcft protect {domain} --to {self.site.config.name} --delay 200ms",
        )  # fmt: skip

    async def _arm(self) -> None:
        """arming(g) → ARM → armed(g) → protected(g). From the first record on, opening needs given-up or a win."""
        await self.record(Kind.ARMING)
        await self.gate.insist("update", record="arming")
        await self.arbiter.arm()
        answer = await self.site.ask(self.body.peer, "arm", self._arm_words(), model.Answer, 10.0)
        if answer.kind != Kind.ARMED.value:
            said = answer.detail or f"it said {answer.kind or 'nothing'}"
            raise Failed("not-armed", f"{self.body.peer} did not arm", said)
        await self.record(Kind.PROTECTED)
        await self.gate.insist("update", record="protected")
        self.arbiter.start_watch()
        # A verdict of before arming(g) was the set-up's own affair then; if one came behind its last look, it counts now.
        if verdict := (await self.gate.insist("status"))["verdict"]:
            self._verdict(verdict)

    def _arm_words(self) -> model.Arm:
        about, body = self.about(), self.body
        return model.Arm(
            about.uuid, about.pid, about.g, about.domain, qemu_runs=about.qemu_runs, key=body.arbiter_key, seen=body.arbiter_seen
        )

    async def _arming_failed(self, error: BaseException) -> None:
        """Undo freely if nothing was recorded; otherwise the standby has to give up first."""
        log.warning("%s: arming failed: %r", self.body.domain, error)
        if self.ledger.newest is Kind.PREPARING:
            await self.site.runner.undo_all(self.steps(), self)
            return
        self.decide(lambda: self._resolve(f"arming failed: {error}"), "undo arming")
        await self._decided()

    def decide(self, work: Any, name: str) -> None:
        """Begin a decision; where one is under way, that one is it."""
        self.carry_through(work, f"{name} {self.body.domain}")

    async def _decided(self) -> None:
        """Wait for the decision. Raises: TimedOut (it goes on, the guest muted meanwhile)."""
        assert self.deciding is not None
        try:
            await asyncio.wait_for(asyncio.shield(self.deciding), DECIDED_WITHIN_S)
        except TimeoutError:
            raise TimedOut(
                "standby-silent", f"{self.body.peer} has not answered yet; {self.body.domain} is muted", self.body.reason,
                f"if {self.body.peer} is certainly off: mcft solo {self.body.domain} --peer-is-off",
            ) from None  # fmt: skip

    async def go_on(self) -> None:
        """The next step by the newest record alone."""
        newest = self.ledger.newest
        if self.ledger.won:
            await self.adopt_won()
        elif newest is Kind.LOST:
            await self._lose(None)
        elif newest is Kind.ENDED and self.body.state == "unprotected":
            await self.look()  # the standby let go long ago; its guest was started again
        elif newest is Kind.ENDED:
            await self._ended(self.body.reason or "the guest was ended")
        elif newest in UNDECIDED:
            await self._resolve(self.body.reason or f"going on from {newest.value if newest else ''}")

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
        elif kind == "rdma-wanted":
            self.rdma.wanted(fields["reason"], fields["down_ms"])
        elif kind == "alarm":
            self.event("alarm", fields["reason"], "alarm")
        elif kind == "stalled":
            self.event("stalled", "this host's watcher was itself stalled; the silence it saw does not count", "warning")
        elif kind == "qemu" and fields["event"] in ("COLO_EXIT", "QUORUM_FAILURE", "QUORUM_REPORT_BAD"):
            said = fields["data"].get("reason") or fields["data"].get("error", "")
            self.event("stream", f"{fields['event']} {said}", "warning")
            if not fields["data"].get("node-name", "mcft-").startswith("mcft-") and not self.ledger.has(Kind.ARMING):
                # From arming on the gate ends this QEMU; before, the undo keeps the guest, whose disk lacks that write.
                why = "the guest was told that it is done, and only the copy that is given up has it: look at its file systems"
                self.event("disk", f"this host's own disk failed a write of {self.body.domain}: {why}", "alarm")

    def _verdict(self, verdict: dict[str, Any]) -> None:
        # Before arming, the set-up and its undo look at the stream themselves.
        if self.ledger.newest in (Kind.ARMING, Kind.PROTECTED, Kind.DIED):
            self.decide(lambda: self._after(verdict), verdict["act"])

    async def _after(self, verdict: dict[str, Any]) -> None:
        act, reason = verdict["act"], verdict["reason"]
        self.event("verdict", f"{act}: {reason}", "warning")
        if reason.startswith(BUFFER_BROKEN):
            self._note_buffer(reason)
        if act == "hung":
            await self.record(Kind.DIED, detail=reason)
            await self.gate.insist("kill")
            await self._until_dead()
        elif act == "ended":
            if await self._was_intended(verdict.get("shutdown", "")):
                await self._ended("the guest was shut down")
                return
            await self.record(Kind.DIED, detail=reason)
        elif act == "died":
            if self.libvirts_word.shut_down_by_guest():  # its gate was not there when QEMU said it
                await self._ended("the guest was shut down")
                return
            await self.record(Kind.DIED, detail=reason)
        self.body.quick_return = True
        await self._resolve(reason)

    async def _until_dead(self) -> None:
        """A killed QEMU is still there for some milliseconds. Asked then, the standby would hear that it runs, and give up."""
        deadline = time.monotonic() + DEAD_WITHIN_S
        while self.qemu_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.005)

    def _note_disk_error(self, reason: str, known: model.Records) -> None:
        """A failed write is a disk error unless the standby's QEMU had gone before it gave up: then it was that end.
        A copy that says itself that it is not whole is one too.

        A disk error is sticky: no protecting again by itself.
        """
        not_whole = peer_ledger(known).has(Kind.NOT_WHOLE)
        if not_whole or (reason.startswith("disk error") and not known.copy_lost):
            self.body.manual = reason
            self.event("disk", f"{reason}: not protected again by itself; mend it, then: mcft protect", "alarm")

    def _note_buffer(self, reason: str) -> None:
        """Whoever changed it may do so again: no protecting again by itself."""
        self.body.manual = reason
        vm, peer = self.body.domain, self.body.peer
        mend = f"find out who did it (tc, ip, libvirt's bandwidth), then: mcft protect {vm} --to {peer}"
        self.event("buffer", f"{reason}: not protected any more; {mend}", "alarm")

    async def _was_intended(self, shutdown_reason: str) -> bool:
        """A guest's own reason, or libvirt saying `destroyed` (`protocol.md`, "Intended ends")."""
        if shutdown_reason.startswith("guest-") or shutdown_reason == "host-qmp-quit":
            return True
        if self.body.engine == "mc" and not shutdown_reason:
            # That QEMU gives no reason: a guest's power-off looks like a signal of a host that goes down.
            return not await host_goes_down()
        return await self.libvirts_word.destroyed()

    async def _resolve(self, reason: str) -> None:
        """Pull the standby's word until it is given-up (solo) or taken (lost); where it is silent, claim by the arbiter
        meanwhile. Neither: muted.

        A primary whose QEMU is gone says so: then the standby takes over instead of giving up.
        """
        claiming: asyncio.Task[Standing | None] | None = None
        try:
            while True:
                if claiming is None and (self.arbiter.pending or await self._should_claim()):
                    claiming = asyncio.create_task(self._claim(reason), name=f"claim {self.body.domain}")
                about = self.about(reason)
                if claiming is None and not about.qemu_runs and self.ledger.newest in (Kind.ARMING, Kind.PROTECTED):
                    # It ended while something else was being decided: "it is gone" would raise a guest that was shut down.
                    said = await self._shutdown_reason()
                    if said is not None and await self._was_intended(said):
                        await self._ended("the guest was shut down")
                        return
                    await self.record(Kind.DIED, detail=reason)
                pull = asyncio.create_task(self._pull(about))
                await asyncio.wait({pull, claiming} if claiming else {pull}, return_when=asyncio.FIRST_COMPLETED)
                if claiming is not None and claiming.done():
                    pull.cancel()
                    standing, claiming = claiming.result(), None
                    if standing is Standing.WON:
                        await self.go_solo(f"{reason}; the arbiter ({self.body.arbiter}) decided for {self.site.config.name}")
                        return
                    if standing is Standing.LOST:
                        await self._lose(None)
                        return
                    continue
                if await self._obey_peer(reason, *pull.result(), claiming):
                    return
                if claiming is None:
                    await asyncio.sleep(PULL_EVERY_S)
                else:
                    await asyncio.wait({claiming}, timeout=PULL_EVERY_S)
        finally:
            if claiming is not None:
                claiming.cancel()

    async def _shutdown_reason(self) -> str | None:
        """The reason of a SHUTDOWN that gate or libvirt has heard of this QEMU; None if there was none or nobody can tell."""
        if self.libvirts_word.shut_down_by_guest():
            return "guest-shutdown"
        if not os.path.exists(self.gate.state_path):  # gone with a reboot
            return None
        try:
            await self.gate.adopt(ASK_WHY_S)
            status = await self.gate.ask("status", ASK_WHY_S)
        except Failed:
            return None
        return str(status.get("shutdown", "")) if status["own_qemu"] == "shutdown" else None

    async def _pull(self, about: model.About) -> tuple[model.Records | None, str]:
        try:
            known = await self.site.ask(self.body.peer, "give-up", about, model.Records, 2.0)
            return known, f"{self.body.peer} says {known.state or 'nothing'}"
        except McftError as error:
            return None, str(error)

    async def _obey_peer(
        self, reason: str, known: model.Records | None, said: str, claiming: asyncio.Task[Standing | None] | None
    ) -> bool:
        """What the standby's word means: True once it decided, and then the claim has no more to say. A claim that may have
        been sent comes first: what it decides is not known yet."""
        theirs = peer_ledger(known) if known else None
        verdict = generations.verdict_on_peer_records(self.ledger, theirs)
        if verdict == "solo" and known is not None and theirs is not None:
            if theirs.has(Kind.TAKEN) or await self.arbiter.withdraw():
                if claiming is not None:
                    claiming.cancel()
                self._note_disk_error(reason, known)
                await self.go_solo(reason)
                return True
            said = f"{said}, but a claim is not resolved yet"
        if verdict == "lost":
            if claiming is not None:
                claiming.cancel()
            await self._lose(known)
            return True
        if self.body.state != "muted":
            self.to_state("muted", f"{reason}; {said}")
            await self.save()
        return False

    async def _should_claim(self) -> bool:
        """The standby is silent on every link for T, and this side has a guest that could go on (`protocol.md`)."""
        if self.arbiter.may_claim() or self.ledger.newest not in (Kind.ARMING, Kind.PROTECTED) or not self.qemu_alive():
            return False
        return await self.peer_silent()

    async def _claim(self, reason: str) -> Standing | None:
        """The gate is closed, for good in this generation, before anything is sent."""
        if self.qemu_alive():
            await self.gate.insist("close", reason="a claim is made")

        def waits(why: str) -> None:
            self.to_state("muted", f"{reason}; {why}")

        standing = await self.arbiter.claim(on_wait=waits, silent=self.peer_silent)
        if standing is Standing.UNKNOWN:
            why = f"the arbiter ({self.body.arbiter}) can't tell who goes on: {self.body.arbiter_trouble}"
            self.to_state("muted", f"{reason}; {why}")
            await self.save()
            if self.arbiter.pending:
                # What was sent may still win: neither a giving up nor anything else is accepted. The operator decides.
                await asyncio.Event().wait()
        return standing

    # ---- won ----

    async def go_solo(self, reason: str, override: str = "") -> None:
        """solo(g) on disk → QEMU lets go of its standby → spoken on disk → the buffer opens → everything undone."""
        if not override:
            self.arbiter.forget_resolved()
        if self.ledger.newest is Kind.LOST:
            await self.record(Kind.TAKEN, self.body.g + 1, reason)
        else:
            await self.record(Kind.SOLO, detail=override or reason)
        if override:
            self.body.manual = override
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
        await self._leave()
        await self.record(Kind.SPOKEN, self.ledger.owned)
        await self.gate.insist("update", record="solo")
        await self.gate.insist("open", because="solo")
        self.body.next_try_boottime_ms = boottime_ms()
        self.body.dismantling = True
        self.to_state(alone(reason), reason)
        await self.save()
        await self.free()
        await self.dismantle_all()

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
                await self.gate.adopt()
                await self._leave()
                await self.record(Kind.SPOKEN, self.ledger.owned)
            self.body.dismantling = True
            self.to_state(alone(self.body.reason), self.body.reason)
            await self.free()
            await self.dismantle_all()
        await self.look()

    def _half_solo(self) -> bool:
        """Whether going solo was cut off, or its taking away failed."""
        settled = self.body.state in ("solo", "unprotected", "stopped", "failed")
        return not settled or self.body.dismantling or os.path.exists(self.gate.state_path)

    # ---- lost, ended ----

    async def _lose(self, known: model.Records | None) -> None:
        """taken(g) stands on the other side. The guest here stays muted until that one has spoken; then it ends."""
        self.arbiter.forget_resolved()
        await self.record(Kind.LOST)
        self.to_state("lost", f"{self.body.peer} took over")
        while known is None or not peer_ledger(known).spoken:
            if known is not None and peer_ledger(known).resigned_win:
                await self.go_solo(f"{self.body.peer} could not run its copy and gave its win back")
                return
            await asyncio.sleep(0.05)
            try:
                known = await self.site.ask(self.body.peer, "state", self.about(), model.Records, 2.0)
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
                    await self._give_way()
                    return
                if answer.kind in (Kind.ENDED.value, Kind.GIVEN_UP.value, Kind.LOST.value, ""):
                    break
            except McftError as error:
                log.info("telling %s that %s has ended: %s", self.body.peer, self.body.domain, error)
            await asyncio.sleep(1.0)
        await self.free()
        await self._clean_up_dead()
        await self.look()
