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

from mcft import generations
from mcft.agent import model
from mcft.agent.ends import LibvirtsWord, host_goes_down
from mcft.agent.model import peer_ledger
from mcft.agent.outcomes import Outcomes
from mcft.agent.setup import OnStep
from mcft.agent.site import log
from mcft.arbiter.base import Standing
from mcft.errors import Failed, McftError, TimedOut
from mcft.failover import BUFFER_BROKEN
from mcft.generations import UNDECIDED, Kind

PULL_EVERY_S = 0.2
ASK_WHY_S = 2.0  # how long a gate may take to say why its QEMU ended: the other side waits meanwhile
DEAD_WITHIN_S = 5.0  # after SIGKILL
DECIDED_WITHIN_S = 20.0


class Deciding(Outcomes):
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
        if self.ledger.newest in UNDECIDED:  # (a guest that shut down meanwhile, say, has been dealt with)
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
            if await self.libvirts_word.destroyed():  # (for a QEMU that hangs `virsh destroy` takes 10 s too)
                await self._ended("the guest was destroyed while its QEMU hung")
                return
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

    async def last_words(self) -> None:
        """Its gate was not there when QEMU ended (engine `mc`: hears nothing of it by itself): what libvirt said, or will say."""
        word = self.libvirts_word
        if self.body.engine == "mc" and not word.stopped:
            await super().last_words()
            return
        intended = word.shut_down_by_guest() or await word.destroyed()
        self.gate.tell("last-words", destroyed=intended)

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
        if not shutdown_reason and self.libvirts_word.shut_down_by_guest():
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
        """What the standby's word means: True once it decided, and then the claim has no more to say.

        A claim that may have been sent comes first: what it decides is not known yet. One that etcd can resolve no more (wiped,
        or restored from a backup) would wait for ever; given-up(g), which no side writes whose own claim may be out, counts then.
        """
        theirs = peer_ledger(known) if known else None
        verdict = generations.verdict_on_peer_records(self.ledger, theirs)
        if verdict == "solo" and known is not None and theirs is not None:
            if theirs.has(Kind.TAKEN) or self.body.arbiter_trouble or await self.arbiter.withdraw():
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
