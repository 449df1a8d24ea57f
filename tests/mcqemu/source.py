"""Of the stand-in (not the micro-checkpointing QEMU): the side that is protected, its statuses, counter and RESUMEs."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import surface
from beneath import Refused

from mcft.engines import tcg

if TYPE_CHECKING:
    from series import Series

LEADING = ("return-path", "x-colo", "pause-before-switchover", "events")
NEVER_MS = 2_000_000_000  # QEMU's own timer stays quiet; each checkpoint is asked for
LATE_MS = 200.0  # a capture that is not acknowledged by then: does the stream still stand?
ENDED = ("none", "completed", "failed", "cancelled", None)
RAM = (
    "total", "dirty-sync-count", "remaining", "mbps", "transferred", "duplicate", "dirty-pages-rate", "skipped",
    "normal-bytes", "normal",
)  # fmt: skip


def now_ms() -> float:
    return time.monotonic() * 1000


class Source:
    """status: as `query-migrate` shows it, None before the first `migrate`.

    stopped_by_hand: a client said `stop`, so the guest stands although nothing is captured. runs: a RESUME was seen last.
    """

    def __init__(self, series: Series) -> None:
        self.series, self.qemu = series, series.qemu
        self.status: str | None = None
        self.stopped_by_hand, self.runs = not series.line.autostart, False
        self._uri = ""
        self._hides: tcg.Function | None = None
        self._ram: dict[str, Any] = {}
        self._start_ms = self._capture_ms = 0.0
        self._capturing = self._ending = self._resume_seen = False
        self._acknowledged = 0
        self._shown: dict[str, Any] = {}
        self._pace: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def busy(self) -> bool:
        return self._ending or self.status in ("setup", "active", "checkpointing", "cancelling")

    def status_shown(self, status: str) -> str:
        """`query-status`: MC's guest runs between captures, and a capture is too short to be seen."""
        if self.status == "checkpointing" or self._ending:
            return "paused" if self.stopped_by_hand else "running"
        return "paused" if self.stopped_by_hand and status in ("colo", "finish-migrate", "postmigrate") else status

    # ---- a migration ----

    async def start(self, uri: str) -> str:
        """Begin; empty, or why not, in that QEMU's words. A refusal leaves `failed` behind, as there."""
        mc = self.series.capabilities["mc"]
        refused = surface.bad_uri(uri)
        if uri.startswith("unix:") and not os.path.exists(uri[5:]):
            refused = "Failed to connect socket: No such file or directory"
        if refused:
            self.status = "failed"
            return refused
        if mc and not self.series.capabilities["mc-net-disable"] and "tap" in " ".join(self.series.line.arguments):
            os.write(2, b"mcqemu: no ifb for this tap; the series' own network buffering is not in this stand-in\n")
            self.series.die(signal.SIGKILL)  # there: exit code 2
        self.status, self._start_ms, self._acknowledged, self._shown = "setup", now_ms(), 0, {}
        self._uri = uri
        self._capturing = self._resume_seen = False
        self._ram = {}
        try:
            self._hides = await tcg.function_to_hide(self.qemu) if mc and self.series.translates else None
            names = LEADING if mc else LEADING[2:]
            await self._capabilities(names, True)
            parameters = {"x-checkpoint-delay": NEVER_MS, "max-bandwidth": self.series.speed_bytes, "downtime-limit": 300}
            await self.qemu.execute("migrate-set-parameters", **parameters)
            await self.qemu.execute("migrate", uri=uri)
        except Refused as refusal:
            self.status = "failed"
            return str(refusal)
        return ""

    async def cancel(self) -> None:
        """While `checkpointing` it does nothing at all."""
        if self.status in ("setup", "active"):
            self.status = "cancelling"
            await self.qemu.attempt("migrate_cancel")

    async def took(self, event: dict[str, Any]) -> bool:
        """Whether the event stays in here."""
        name, data = event["event"], event.get("data") or {}
        if name in ("STOP", "RESUME"):
            self.runs = name == "RESUME"
        if name == "MIGRATION":
            await self._migration(str(data.get("status")))
        elif name == "COLO_EXIT" and data.get("reason") == "error" and self.busy:
            self._spawn(self._standby_lost())
        elif name == "STOP" and self._capturing:
            self._captured()
        elif name == "RESUME" and self._ending:
            pass
        elif name == "RESUME" and self.status == "active":
            stood = self.stopped_by_hand
            self.status, self.stopped_by_hand = "checkpointing", False
            self._pace = self._spawn(self._checkpoints())
            return stood  # MC starts a guest that stood without a word
        elif name == "RESUME" and self._capturing:
            self._loaded()
        else:
            return self._ending and name == "STOP"
        return True

    async def _migration(self, status: str) -> None:
        if status == "active" and self.status == "setup":
            self.status = "active"
            self._spawn(self._watch_ram())
        elif status == "pre-switchover":
            self._spawn(self._switch_over())
        elif status in ("failed", "cancelled") and self.status in ("setup", "active", "cancelling"):
            self._spawn(self._over("cancelled" if self.status == "cancelling" else "failed"))
        elif status == "completed" and self.status == "active":
            self._spawn(self._over("completed"))

    async def _switch_over(self) -> None:
        if self._hides is not None:
            await tcg.flush_tlbs(self.qemu, self._hides)
        await self.qemu.attempt("migrate-continue", state="pre-switchover")

    async def _watch_ram(self) -> None:
        while self.status == "active":
            said = await self.qemu.execute("query-migrate")
            self._ram = {k: v for k, v in said.get("ram", {}).items() if k in RAM} or self._ram
            await asyncio.sleep(0.02)

    # ---- checkpoints ----

    async def _checkpoints(self) -> None:
        """The first at once, then one per delay, counted from the last capture; never one before the last is acknowledged.

        A new delay counts after the current sleep. A negative one sleeps for ever.
        """
        if not self.series.capabilities["mc-disk-disable"]:
            return  # there the destination deadlocks: `checkpointing`, counter 0, for ever
        while True:
            await self._hang_if_told()
            if self.series.shut_down and self.series.line.stays:
                os.write(2, b"ERROR: invalid runstate transition: 'shutdown' -> 'checkpointing'\n")
                self.series.die(signal.SIGABRT)
            self._capturing, self._capture_ms = True, now_ms()
            acknowledged = self._acknowledged
            if self.stopped_by_hand:
                self._captured()
            await self.qemu.attempt("migrate-set-parameters", x_checkpoint_delay=NEVER_MS)
            while self._acknowledged == acknowledged:
                await asyncio.sleep(0.001)
                if now_ms() - self._capture_ms > LATE_MS and not self._stream_lives():
                    # A broken socket ends MC at once. QEMU's COLO may say nothing at all (seen after SOCK_DESTROY).
                    await self.qemu.yank()
                    self._spawn(self._standby_lost())
                    return
            delay_ms = self.series.delay_ms if self.series.delay_ms > 0 else 1e12
            # MC's guest runs while what was captured is sent. This one stands, so it has half the delay, however long that took.
            await asyncio.sleep(max(delay_ms / 2, delay_ms - (now_ms() - self._capture_ms)) / 1000)

    def _stream_lives(self) -> bool:
        """Whether a connection to the standby's port is still established. Linux: proc(5), /proc/net/tcp."""
        port = f":{int(self._uri.rpartition(':')[2]):04X}" if self._uri.startswith("tcp:") else ""
        with open("/proc/net/tcp") as sockets:
            return not port or any(row.split()[2].endswith(port) and row.split()[3] == "01" for row in sockets)

    def _captured(self) -> None:
        """The guest stands, so what will be sent is fixed: MC says RESUME when it has copied it."""
        if not self._resume_seen:
            self._resume_seen, self.stopped_by_hand = True, False
            self.series.say("RESUME")

    def _loaded(self) -> None:
        pause_ms = round(now_ms() - self._capture_ms)
        self._capturing = self._resume_seen = False
        self._acknowledged += 1
        self._shown = {"xmit-time": pause_ms, "downtime": pause_ms}

    async def _hang_if_told(self) -> None:
        knob = os.path.join(self.series.folder, f"{self.series.line.name}.hang")
        if os.path.exists(knob):
            os.unlink(knob)
            self.series.die(signal.SIGSTOP)
            self.series.listening.clear()
            await asyncio.sleep(1e6)

    # ---- ends ----

    async def _standby_lost(self) -> None:
        """QEMU stands until it is told that its standby is gone; MC's runs on."""
        await self._over("failed", lost=True)

    async def _over(self, status: str, lost: bool = False) -> None:
        if self._ending:
            return
        self._ending = True
        if self._pace:
            self._pace.cancel()
        if lost:
            await self.qemu.attempt("x-colo-lost-heartbeat")
        while (await self.qemu.execute("query-migrate")).get("status") not in ENDED:
            await asyncio.sleep(0.002)
        if not self.stopped_by_hand and status != "completed":
            while (await self.qemu.execute("query-status"))["status"] != "running":
                await self.qemu.attempt("cont")
                await asyncio.sleep(0.002)
        while True:  # QEMU may still be tidying up behind a status that says it is over
            try:
                await self._capabilities(LEADING, False)
                break
            except Refused:
                await asyncio.sleep(0.002)
        while not self.qemu.events.empty():
            await asyncio.sleep(0)
        self.status, self._ending, self._capturing = status, False, False

    async def _capabilities(self, names: tuple[str, ...], state: bool) -> None:
        await self.qemu.execute("migrate-set-capabilities", capabilities=[{"capability": n, "state": state} for n in names])

    # ---- query-migrate ----

    def described(self) -> dict[str, Any]:
        """The fields of the recorded runs, no more and no less for each status."""
        if self.status is None:
            return {}
        if self.status in ("setup", "failed", "cancelled"):
            return {"status": self.status}
        common = {"status": self.status, "setup-time": 1, "total-time": round(now_ms() - self._start_ms)}
        ram = {name: self._ram.get(name, 0) for name in RAM} | {"skipped": 0, "dirty-sync-count": 1}
        if self.status != "checkpointing":
            return {"expected-downtime": 300, **common, "ram": ram}
        mc = {
            "copy-mbps": 0, "log-dirty-time": 0, "ram-copy-time": 0, "mbps": 0, "migration-bitmap-time": 0,
            "xmit-time": self._shown.get("xmit-time", 0), "checkpoints": max(0, self._acknowledged - 1),
        }  # fmt: skip
        # As there, total-time is worth nothing from now on.
        return {"mc": mc, **common, "total-time": round(now_ms()), "downtime": self._shown.get("downtime", 1), "ram": ram}

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.series.broken(task)
