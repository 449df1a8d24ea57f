"""Of the stand-in (not the micro-checkpointing QEMU): the side that follows, deaf until its source is gone."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from beneath import Refused

from mcft.engines import tcg

if TYPE_CHECKING:
    from series import Series

FOLLOWING = ("return-path", "x-colo")


class Destination:
    """done: it took over and is an ordinary QEMU now."""

    def __init__(self, series: Series) -> None:
        self.series, self.qemu, self.done = series, series.qemu, False
        self._following = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def wait_at(self, uri: str) -> str:
        """The capabilities that QEMU needs and the series does not, then `migrate-incoming`. Empty, or QEMU's refusal."""
        if self.series.translates:
            await tcg.follow(self.qemu)
        await self._capabilities(True)
        try:
            await self.qemu.execute("migrate-incoming", uri=uri)
        except Refused as refusal:
            return str(refusal)
        return ""

    async def took(self, event: dict[str, Any]) -> bool:
        """Before the take-over no event goes outside: MC's destination says nothing, and libvirt must see nothing."""
        name, data = event["event"], event.get("data") or {}
        if name == "RESUME":
            # QEMU lets a standby run after each load; MC's does not run.
            self._following = True
            self.series.listening.clear()
            self._spawn(self.qemu.attempt("stop"))
        elif name == "COLO_EXIT" and data.get("reason") == "error" and self._following:
            self._following = False
            self._spawn(self._take_over())
        return name not in ("SHUTDOWN", "RESET")

    async def _take_over(self) -> None:
        """It comes after the last load. QEMU goes on only when told; outside that is one RESUME, or nothing with -S."""
        await self.qemu.attempt("stop")
        await self.qemu.attempt("x-colo-lost-heartbeat")
        if self.series.translates:
            await self.qemu.attempt("human-monitor-command", command_line=tcg.LEAD)
        while (await self.qemu.execute("query-colo-status"))["mode"] != "none":
            await asyncio.sleep(0.002)
        await self.qemu.attempt("stop")  # the end of COLO starts it
        while not self.qemu.events.empty():  # of the above
            await asyncio.sleep(0)
        self.done = True
        self.series.source.stopped_by_hand = not self.series.line.autostart
        self._spawn(self._afterwards())
        if self.series.line.autostart:
            self._spawn(self.qemu.attempt("cont"))  # its RESUME goes out before the first command is answered
            while not self.series.source.runs:
                await asyncio.sleep(0.001)
        self.series.listening.set()

    async def _afterwards(self) -> None:
        announce = {"initial": 50, "max": 550, "rounds": 5, "step": 100}
        await self.qemu.attempt("announce-self", **announce)
        for _ in range(1000):
            try:
                await self._capabilities(False)
                break
            except Refused:
                await asyncio.sleep(0.005)

    async def _capabilities(self, state: bool) -> None:
        rows = [{"capability": name, "state": state} for name in (*FOLLOWING, "events")]
        await self.qemu.execute("migrate-set-capabilities", capabilities=rows)

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.series.broken(task)
