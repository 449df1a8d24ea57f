"""One protection on its primary's side: what operators ask of it, and going on after the agent's restart.

Its set-up is `setup.py`'s, its decisions are `decisions.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from mcft import generations
from mcft.agent import model
from mcft.agent.decisions import PULL_EVERY_S, Deciding
from mcft.agent.life import AT_REST_WITHIN_S
from mcft.agent.model import peer_ledger
from mcft.agent.pacing import Pacing
from mcft.agent.setup import STANDBYS_SIDE, OnStep
from mcft.agent.setup import make_body as make_body
from mcft.agent.site import log
from mcft.errors import Failed, McftError, Refused, Unreachable
from mcft.gate.loop import boottime_ms
from mcft.generations import UNDECIDED, Kind

ARBITER_WITHIN_S = 3.0


class Primary(Deciding):
    """Leads. Also lives what comes after: solo, active (took over), stopped, lost."""

    on_gone: Any = None  # called with self when nothing of this protection is left

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.pacing = Pacing(self)

    def on_note(self, kind: str, fields: dict[str, Any]) -> None:
        if kind == "pace":
            pace = self.pacing.keep(round(fields["period_ms"]), fields["pause_ms"], fields["share"])
            self.site.spawn(pace, f"keep {self.body.domain}'s pace")
        else:
            super().on_note(kind, fields)

    # ---- what operators ask ----

    async def unprotect(self, on_step: OnStep) -> None:
        """End the protection; the guest goes on (or stays stopped). Raises Refused where the standby does not let go."""
        if self.body.overlays_g:
            raise Refused(
                "committing", f"the disks of {self.body.domain} still have overlays of the take-over", "QEMU is committing them",
                "try again in a moment",
            )  # fmt: skip
        if self.ledger.newest in UNDECIDED and not self.ledger.won:
            on_step("the standby gives up", None)
            await self._let_go("unprotect")
        elif not await self.at_rest(AT_REST_WITHIN_S):
            raise self.not_settled()
        on_step("take everything away", None)
        # (What a copy was made of went as it was promoted, also if its guest was started again since.)
        if self.ledger.side == "primary" and self.body.state != "stopped" and await self._qemu_here():
            done = {step.name for step in self.steps()} - set(STANDBYS_SIDE)
            await self.site.runner.undo_all(self.steps(), self, done, on_step)
        await self._discard_standby()
        await self._unban()
        await self.site.store.delete(self.body.uuid)
        self.forget_labels()
        self.site.spawn(self.arbiter.delete_key(self.body.arbiter_key), f"delete the key of {self.body.domain}")
        self.event("unprotect", f"{self.body.domain} is not protected any more")
        if self.on_gone is not None:
            self.on_gone(self)

    async def _let_go(self, why: str) -> None:
        """Close, break the stream, and go solo on exactly given-up(g). Raises: Refused, TimedOut (muted then)."""
        if self.qemu_alive():
            # No reachable standby, no giving up: don't mute a guest for a question that can't be answered.
            if self.body.state != "muted":
                try:
                    await self.site.ask(self.body.peer, "state", self.about(why), model.Records, 3.0)
                except Unreachable as error:
                    raise Refused(
                        "standby-silent", f"{self.body.peer} does not answer, so it can't give {self.body.domain} up",
                        error.reason,
                        f"if {self.body.peer} is certainly off: mcft solo {self.body.domain} --peer-is-off",
                    ) from None  # fmt: skip
            self.decide(lambda: self._resolve(why), why)
            try:
                await self.gate.insist("yank")
            except Failed:
                if not self.ledger.won:  # decided meanwhile, and its gate taken away
                    raise
        else:
            self.decide(lambda: self._resolve(why), why)
        await self._decided()
        if not self.ledger.won:
            raise Refused("lost", f"{self.body.domain} runs on {self.body.peer} now", "it took over meanwhile")

    async def solo(self, *, force: bool, peer_is_off: bool) -> str:
        """The operator's word that the guest goes on alone. Asks the peer first; overrides only if it is silent."""
        domain, peer = self.body.domain, self.body.peer
        if self.ledger.won or self.body.state in ("solo", "active"):
            return f"{domain} runs without a standby already"
        if self.ledger.newest not in UNDECIDED:
            raise self._not_undecided()
        try:
            await self.site.ask(peer, "state", self.about(), model.Records, 3.0)
        except McftError as error:
            if not self.qemu_alive():
                raise Refused(
                    "guest-down", f"{domain} does not run here, and {peer} may have gone on with it before it fell silent",
                    "that it is off now does not tell", f"bring {peer} back, then: mcft start {domain}",
                ) from None  # fmt: skip
            if not peer_is_off:
                raise Refused(
                    "standby-silent", f"{peer} does not answer, so it may have taken {domain} over", str(error),
                    f"make sure that {peer} is powered off, then: mcft solo {domain} --peer-is-off",
                ) from None  # fmt: skip
            if await self._arbiter_decides():
                return await self.solo(force=force, peer_is_off=peer_is_off)
            why = f"the operator's word that {peer} is off"
            await self.override(why)
            return f"{domain} goes on alone, by your word; if {peer} is not off, two copies run"
        await self._let_go("solo, asked for by the operator")
        self.body.manual = "solo was asked for"
        await self.save()
        return f"{domain} runs without a standby; protect it again with: mcft protect {domain} --to {peer}"

    def _not_undecided(self) -> Refused:
        domain, state = self.body.domain, self.body.state
        return Refused("not-here", f"{domain} can't go solo here", f"its state is {state}", f"mcft status {domain}")

    async def _arbiter_decides(self) -> bool:
        """Whether what is being decided ends within a moment. Where an arbiter answers, nobody's word takes its place: it may
        have decided for the other side, before that one went off."""
        if self.body.arbiter == "standby" or self.deciding is None or self.deciding.done():
            return False
        await asyncio.wait({self.deciding}, timeout=ARBITER_WITHIN_S)
        return self.ledger.won or self.ledger.newest not in UNDECIDED

    async def go_alone(self, why: str) -> None:
        """The standby's host asked for it, and is protected to again by itself later. Raises: Refused, TimedOut (muted)."""
        if not self.ledger.won and self.ledger.newest in UNDECIDED:
            self.body.quick_return = True
            await self._let_go(why)

    async def override(self, why: str) -> None:
        """The operator's word in place of the standby's: this side goes on, or with its guest down it may start it."""
        await self.stop_deciding()
        if self.ledger.newest not in UNDECIDED:  # decided in this very moment: a record on its way to the disk stands
            self.decide(self.go_on, "go on with")
            if not self.ledger.won:
                raise self._not_undecided()
            return
        self.decide(lambda: self.go_solo(why, override=why), "override")
        if self.qemu_alive():
            with contextlib.suppress(Failed):
                await self.gate.ask("yank", 2.0)
        await self._decided()
        self.tell_arbiter()

    async def switch(self, on_step: OnStep) -> str:
        """A planned switch: last checkpoint, stop, resigned(g), TAKE; what is lost is as if the network had dropped it."""
        if self.ledger.newest is not Kind.PROTECTED or self.body.state != "protected":
            raise Refused(
                "not-protected", f"{self.body.domain} is {self.body.state}, so there is nothing to switch to", self.body.reason,
                f"mcft status {self.body.domain}",
            )  # fmt: skip
        if self.body.engine == "mc":
            # The guest here is ended before the standby takes over: no reachable standby, no switch.
            await self.site.ask(self.body.peer, "state", self.about("planned switch"), model.Records, 3.0)
        on_step("the last checkpoint", None)
        try:
            await self.gate.ask("switch", 12.0 + (8 * self.body.delay_ms / 1000 if self.body.engine == "mc" else 0.0))
        except BaseException:
            await self._after_failed_switch()
            raise
        on_step(f"{self.body.peer} takes over", None)
        self.decide(self._hand_over, "hand over")
        await self._decided()
        if self.ledger.won:
            raise Failed("switch", f"{self.body.peer} could not take {self.body.domain} over; it goes on here")
        return f"{self.body.domain} runs on {self.body.peer}"

    async def _after_failed_switch(self) -> None:
        """If the gate closed before it failed, the stream is over: the standby has to give up."""
        status: dict[str, Any] = {"closed": True}
        with contextlib.suppress(Failed):
            status = await self.gate.ask("status", 2.0)
        if status["closed"]:
            self.decide(lambda: self._resolve("the planned switch was cut off"), "undo the switch of")

    async def _hand_over(self) -> None:
        await self.record(Kind.RESIGNED)
        await self.gate.insist("update", record="resigned")
        if self.body.engine == "mc":
            # Nothing stops that QEMU (a `stop` is undone by its next checkpoint); its guest's next steps are void.
            await self.gate.insist("kill")
        while True:
            known = None
            try:
                known = await self.site.ask(self.body.peer, "take", self.about("planned switch"), model.Records, 10.0)
            except McftError as error:
                self.to_state("muted", f"the switch waits for {self.body.peer}: {error.message}")
            verdict = generations.verdict_on_peer_records(self.ledger, peer_ledger(known) if known else None)
            if verdict == "solo":
                await self.go_solo(f"{self.body.peer} could not take over")
                return
            if verdict == "lost":
                await self._lose(known)
                return
            await asyncio.sleep(PULL_EVERY_S)

    # ---- the agent was restarted ----

    async def adopt(self) -> None:
        """Go on from the records. A set-up that was cut off before arming is undone; what is armed is watched again."""
        newest = self.ledger.newest
        await self.arbiter.forget_if_void()
        if self.ledger.won and self.arbiter.pending:
            self.tell_arbiter()
        if not self.ledger.won and newest in (None, Kind.PREPARING):
            await self._undo_cut_off()
        elif newest in UNDECIDED and not self.ledger.won:
            await self._adopt_armed(newest)
        elif self.ledger.won or not (newest is Kind.LOST and not self.qemu_alive() and self.body.state == "lost"):
            self.decide(self.go_on, "go on with")

    async def _undo_cut_off(self) -> None:
        """Not given up before it is done: an undo that finds libvirt away is repeated (by `Core`)."""
        log.warning("%s: a set-up was cut off by the agent's end: undoing it", self.body.domain)
        self.event("undo", "the agent ended while it protected the domain; what it had done is undone", "warning")
        await self._undo_set_up()

    def undo_until_done(self, remains: str) -> None:
        """A protecting failed before arming, and part of its undo too (libvirtd was away, say): the guest may stand meanwhile.
        So it is undone again, each second, until nothing remains."""
        self.to_state("failed", f"the protecting failed, and undoing it goes on: {remains}")
        self.repeat_undo(self._undo_set_up, f"undo the protecting of {self.body.domain}")

    async def _undo_set_up(self) -> None:
        await self.site.runner.undo_all(self.steps(), self)
        await self.site.store.delete(self.body.uuid)
        if not self.body.previous:
            self.forget_labels()
        if self.on_gone is not None:
            self.on_gone(self)

    async def _adopt_armed(self, newest: Kind) -> None:
        if not self.qemu_alive():
            if self.arbiter.pending and newest in (Kind.ARMING, Kind.PROTECTED):  # (else `_resolve` asks first how it ended)
                await self.record(Kind.DIED, detail="found dead at the agent's start")
            self.to_state("muted", "this host or its QEMU was lost; asking who went on")
            self.decide(lambda: self._resolve("found dead at the agent's start"), "resolve")
            return
        if newest is not Kind.PROTECTED:
            self.decide(lambda: self._resolve(f"the agent restarted in {newest.value}"), "resolve")
            return
        await self.gate.adopt()
        await self.gate.insist("update", record="protected")
        self.arbiter.start_watch()
        status = await self.gate.insist("status")
        if status["closed"] or status["verdict"] or self.arbiter.pending:
            reason = (status["verdict"] or {}).get("reason", "the gate is closed")
            self.decide(lambda: self._resolve(reason), "resolve")
        else:
            if self.body.state in ("preparing", "syncing", "resyncing"):
                self.to_state("protected")
                await self.save()
            if self.body.engine != "mc":
                self.pacing.put_in_line()
        self.body.next_try_boottime_ms = min(self.body.next_try_boottime_ms, boottime_ms())
