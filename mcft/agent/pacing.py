"""How far apart one protection's checkpoints are: `mcft set --delay`, and what the gate asks for where they leave no time.

QEMU, the gate (watcher, buffer's limit) and the standby (watcher, and what a take-over goes on with) have to know it. Both
watchers hear of a longer period before QEMU has it, and of a shorter one after: neither is ever less patient than QEMU is slow.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from mcft.agent import model
from mcft.agent.site import log
from mcft.engines.mc import Mc
from mcft.errors import Failed, McftError, NotFound
from mcft.gate.loop import boottime_ms
from mcft.gate.pace import LEAST_SHARE
from mcft.gate.primary import MAX_DELAY_MS
from mcft.generations import Kind
from mcft.units import format_duration_ms

if TYPE_CHECKING:
    from mcft.agent.protection import Primary

SET_WITHIN_S = 5.0
ALIGN_EVERY_S = 1.0


class Pacing:
    """Of one primary. One change at a time: two that crossed on their way would leave the standby with the older."""

    def __init__(self, life: Primary) -> None:
        self.life = life
        self._turn = asyncio.Lock()
        self._aligning: asyncio.Task[None] | None = None

    async def set_delay(self, delay_ms: int) -> None:
        """At run time, read back from QEMU. Raises: Unreachable, Failed; what was done is put back as soon as that can be."""
        async with self._turn:
            body = self.life.body
            if body.state == "protected" and body.engine == "mc":
                await self._change_mc(delay_ms)
            elif body.state == "protected":
                await self._change(delay_ms, delay_ms)
            body.delay_ms = delay_ms
            await self.life.save()

    async def keep(self, every_ms: int, pause_ms: float, share: float) -> None:
        """The gate's word that checkpoints leave the guest too little time at the period they have, or need it no more.

        It says it again some checkpoints later: so no word waits for its turn, and none is repeated that failed. One from
        before a longer delay was set is void.
        """
        body = self.life.body
        if self._turn.locked():
            return
        async with self._turn:
            if body.state != "protected" or self.life.ledger.newest is not Kind.PROTECTED or every_ms < body.delay_ms:
                return
            try:
                await self._change(body.delay_ms, every_ms)
            except McftError as error:
                log.warning("%s: checkpoints stay as far apart as they were: %s", body.domain, error)
                return
        took, every = format_duration_ms(pause_ms), format_duration_ms(every_ms)
        if every_ms > body.delay_ms:
            why = f"a checkpoint takes {took}, and the guest ran {share:.0%} of the time"
            level = "warning" if share < LEAST_SHARE else "info"  # (better than before, not as asked for yet)
            self.life.event("pace", f"{why}: one every {every} now, not {format_duration_ms(body.delay_ms)}", level)
        else:
            self.life.event("pace", f"a checkpoint takes {took}: one every {every} again, as asked for")

    def put_in_line(self) -> None:
        """After a change that failed half way, and after the agent's restart; in the background, one at a time."""
        if self._aligning is None or self._aligning.done():
            self._aligning = self.life.site.spawn(self.in_line(), f"bring {self.life.body.domain}'s delay in line")

    async def in_line(self) -> None:
        """QEMU and both watchers go by the body's delay.

        A stretched period stays, if QEMU and the gate agree on it; else the gate asks for it again.
        """
        while self.life.body.state == "protected":
            with contextlib.suppress(McftError):
                async with self._turn:
                    if self.life.body.state != "protected" or await self._aligned():
                        return
            await asyncio.sleep(ALIGN_EVERY_S)

    async def _aligned(self) -> bool:
        delay_ms, state = self.life.body.delay_ms, self.life.gate.load_state()
        if self.life.body.engine == "mc":
            await self._set_mc_delay(delay_ms)
            await self._tell_standby(delay_ms, delay_ms)
            return True
        qemus_ms = await self._qemus_delay_ms()
        if state is None or qemus_ms >= MAX_DELAY_MS:  # (a planned switch is under way)
            return False
        every_ms = round(state.every_ms)
        if (state.delay_ms, qemus_ms) != (delay_ms, every_ms):
            every_ms = delay_ms
            await self._apply(delay_ms, every_ms, max(qemus_ms, round(state.every_ms), every_ms))
        await self._tell_standby(delay_ms, every_ms)
        return True

    async def _change(self, delay_ms: int, every_ms: int) -> None:
        """every_ms: what QEMU goes by, longer than the delay where mcft stretches it."""
        was_ms = round((await self.life.gate.ask("status", 2.0))["period_ms"])
        try:
            await self._apply(delay_ms, every_ms, max(was_ms, every_ms))
        except McftError:
            self.put_in_line()
            raise

    async def _apply(self, delay_ms: int, every_ms: int, patient_ms: int) -> None:
        """patient_ms: the longest that QEMU may go by until this is over."""
        await self._tell_standby(delay_ms, patient_ms)
        await self._tell_gate(delay_ms, patient_ms)
        await self._set_qemu(every_ms)
        if patient_ms == every_ms:
            return
        try:
            await self._tell_gate(delay_ms, every_ms)
            await self._tell_standby(delay_ms, every_ms)
        except McftError as error:  # harmless: it waits longer than it would have to
            log.warning("%s: a watcher goes by %d ms still: %s", self.life.body.domain, patient_ms, error)

    async def _set_qemu(self, every_ms: int) -> None:
        """QEMU commands `migrate-set-parameters`, `query-migrate-parameters`. Raises: Failed."""
        await self.life.gate.qmp([{"execute": "migrate-set-parameters", "arguments": {"x-checkpoint-delay": every_ms}}])
        if (found := await self._qemus_delay_ms()) != every_ms:
            raise Failed("set", f"QEMU took {found} ms instead of {every_ms} ms as its delay")

    async def _qemus_delay_ms(self) -> int:
        replies = await self.life.gate.qmp([{"execute": "query-migrate-parameters"}])
        return int(replies[0].get("return", {}).get("x-checkpoint-delay", 0))

    async def _change_mc(self, delay_ms: int) -> None:
        """(No watcher goes by it: that engine's stream is not seen.)"""
        await self._tell_standby(delay_ms, delay_ms)
        try:
            await self._set_mc_delay(delay_ms)
        except McftError:
            self.put_in_line()
            raise

    async def _set_mc_delay(self, delay_ms: int) -> None:
        """That QEMU does not tell its delay; its answer is all there is. It applies after the sleep that is under way."""
        command, arguments = await Mc().set_delay_command(self.life.qmp, delay_ms)
        await self.life.qmp.execute(command, **arguments)
        await self._tell_gate(delay_ms, delay_ms)

    async def _tell_gate(self, delay_ms: int, every_ms: int) -> None:
        await self.life.gate.ask("update", delay_ms=float(delay_ms), period_ms=float(_stretched(delay_ms, every_ms)))

    async def _tell_standby(self, delay_ms: int, every_ms: int) -> None:
        """Its watcher, and what the guest has after a take-over. The newest counts, whichever way came first."""
        body = self.life.body
        told = model.SetDelay(
            body.uuid, body.pid, body.g, body.domain, delay_ms=delay_ms, period_ms=_stretched(delay_ms, every_ms),
            told_at_ms=boottime_ms(),
        )  # fmt: skip
        try:
            await self.life.site.ask(body.peer, "set-delay", told, model.Answer, SET_WITHIN_S)
        except NotFound as error:
            if error.code != "no-such-verb":  # (an older mcft)
                raise
            why = f"{body.peer} does not know the new delay, a take-over goes by the old: {error}"
            self.life.event("delay", why, "warning")


def _stretched(delay_ms: int, every_ms: int) -> int:
    """`period_ms` as gates know it: 0 where it is the delay."""
    return every_ms if every_ms > delay_ms else 0
