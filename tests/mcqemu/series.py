"""Of the stand-in (not the micro-checkpointing QEMU): the series' commands, and which events go outside."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import surface
from beneath import Beneath
from destination import Destination
from source import Source
from surface import error, not_found

if TYPE_CHECKING:
    from commandline import Line

SIGTERM_POLL_S = 0.05
OURS_ALONE = frozenset(
    {"MIGRATION", "MIGRATION_PASS", "COLO_EXIT", "UNPLUG_PRIMARY", "FAILOVER_NEGOTIATED", "QUORUM_REPORT_BAD"}
)


class Series:
    """emit: gives an event to every client. listening: unset while the monitor is dead. ready: clients may come."""

    emit: Callable[[dict[str, Any]], None]

    def __init__(self, line: Line, qemu: Beneath, folder: str) -> None:
        self.line, self.qemu, self.folder = line, qemu, folder
        self.capabilities = dict.fromkeys(surface.CAPABILITIES, False)
        self.delay_ms, self.speed_bytes = 100, 32 << 20
        self.listening, self.ready = asyncio.Event(), asyncio.Event()
        self.listening.set()
        self.source = Source(self)
        self.destination = Destination(self) if line.incoming else None
        self.shut_down = False
        self.translates = False

    # ---- events from beneath ----

    async def run(self) -> None:
        self.translates = not (await self.qemu.execute("query-kvm"))["enabled"]
        if self.destination and self.line.incoming != "defer":
            await self.destination.wait_at(str(self.line.incoming))
        self.ready.set()
        while True:
            event = await self.qemu.events.get()
            if event["event"] == "SHUTDOWN":
                self.shut_down = True
                event.pop("data", None)  # 2.3 says no reason
            follower = self.destination if self.destination and not self.destination.done else self.source
            if not await follower.took(event) and event["event"] not in OURS_ALONE:
                self.emit(event)

    def say(self, name: str) -> None:
        now_us = time.time_ns() // 1000
        self.emit({"event": name, "timestamp": {"seconds": now_us // 1_000_000, "microseconds": now_us % 1_000_000}})

    def die(self, number: int) -> None:
        """What kills that QEMU kills this one."""
        os.kill(self.qemu.pid, number)

    def broken(self, task: asyncio.Task[None]) -> None:
        """An error in here: said in the domain's log, and the end of its QEMU. A half-dead stand-in proves nothing."""
        if not isinstance(task.exception(), ConnectionError):
            task.print_stack()
            self.die(signal.SIGKILL)

    async def watch_signals(self) -> None:
        """SIGTERM is blocked in QEMU: a QEMU that follows does not act on it. Otherwise it quits, as on SIGTERM."""
        while True:
            await asyncio.sleep(SIGTERM_POLL_S)
            with open(f"/proc/{self.qemu.pid}/status") as status:
                pending = next(int(row.split()[1], 16) for row in status if row.startswith("ShdPnd"))
            if pending >> (signal.SIGTERM - 1) & 1 and self.listening.is_set():
                await self.qemu.execute("quit")
                await asyncio.Event().wait()  # its reply comes before its SHUTDOWN: who ended here would swallow that

    # ---- commands from outside ----

    async def obey(self, command: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        name, arguments = str(command.get("execute")), command.get("arguments") or {}
        offered = getattr(self, "_" + name.replace("-", "_"), None)
        if name in surface.HIDDEN or "exec-oob" in command:
            return not_found(str(command.get("exec-oob", name)))
        if offered is not None:
            return await offered(arguments, command)
        return await self.qemu.ask(command, fds)

    async def _query_commands(self, _: dict[str, Any], command: dict[str, Any]) -> dict[str, Any]:
        reply = await self.qemu.ask(command)
        names = [row["name"] for row in reply["return"] if row["name"] not in surface.HIDDEN]
        return {"return": [{"name": name} for name in [*surface.ADDED, *names]]}

    async def _object_add(self, arguments: dict[str, Any], command: dict[str, Any]) -> dict[str, Any]:
        refused = surface.hidden_object(arguments)
        return error(refused) if refused else await self.qemu.ask(command)

    async def _qom_list_types(self, _: dict[str, Any], command: dict[str, Any]) -> dict[str, Any]:
        reply = await self.qemu.ask(command)
        rows = [row for row in reply.get("return", []) if not row["name"].startswith(surface.HIDDEN_OBJECTS)]
        return {"return": rows} if "return" in reply else reply

    async def _query_status(self, _: dict[str, Any], command: dict[str, Any]) -> dict[str, Any]:
        reply = (await self.qemu.ask(command)).get("return", {})
        status = self.source.status_shown(str(reply.get("status")))
        return {"return": {"status": status, "singlestep": False, "running": status == "running"}}

    async def _cont(self, _: dict[str, Any], command: dict[str, Any]) -> dict[str, Any]:
        if self.destination and not self.destination.done:
            self.line.autostart = True
            return {"return": {}}
        self.source.stopped_by_hand = False
        return await self.qemu.ask(command)

    async def _stop(self, _: dict[str, Any], command: dict[str, Any]) -> dict[str, Any]:
        if self.destination and not self.destination.done:
            self.line.autostart = False
            return {"return": {}}
        self.source.stopped_by_hand = True
        return await self.qemu.ask(command)

    async def _query_migrate_capabilities(self, *_: Any) -> dict[str, Any]:
        return {"return": [{"state": state, "capability": name} for name, state in self.capabilities.items()]}

    async def _migrate_set_capabilities(self, arguments: dict[str, Any], _: Any) -> dict[str, Any]:
        if self.source.busy:
            return error(surface.BUSY)
        asked = surface.capabilities_asked(arguments)
        if isinstance(asked, str):
            return error(asked)
        self.capabilities |= asked
        return {"return": {}}

    async def _query_migrate_parameters(self, *_: Any) -> dict[str, Any]:
        return {"return": surface.PARAMETERS}

    async def _migrate_set_parameters(self, arguments: dict[str, Any], _: Any) -> dict[str, Any]:
        unknown = [name for name in arguments if name not in surface.PARAMETERS]
        return error(f"Invalid parameter '{unknown[0]}'") if unknown else {"return": {}}

    async def _migrate_set_speed(self, arguments: dict[str, Any], _: Any) -> dict[str, Any]:
        if refused := surface.only(arguments, "value", "int"):
            return error(refused)
        self.speed_bytes = max(1, arguments["value"])
        return {"return": {}}

    async def _migrate_set_downtime(self, arguments: dict[str, Any], _: Any) -> dict[str, Any]:
        refused = surface.only(arguments, "value", "number")
        return error(refused) if refused else {"return": {}}

    async def _migrate_set_mc_delay(self, arguments: dict[str, Any], _: Any) -> dict[str, Any]:
        if refused := surface.only(arguments, "value", "int"):
            return error(refused)
        if arguments["value"] == 0:
            self.die(signal.SIGFPE)  # it divides by it
            await asyncio.sleep(3600)
        self.delay_ms = arguments["value"]
        return {"return": {}}

    async def _query_migrate(self, *_: Any) -> dict[str, Any]:
        return {"return": self.source.described()}

    async def _migrate(self, arguments: dict[str, Any], _: Any) -> dict[str, Any]:
        if self.source.busy:
            return error(surface.BUSY)
        refused = await self.source.start(str(arguments.get("uri", "")))
        return error(refused) if refused else {"return": {}}

    async def _migrate_cancel(self, *_: Any) -> dict[str, Any]:
        await self.source.cancel()
        return {"return": {}}

    async def _migrate_incoming(self, arguments: dict[str, Any], _: Any) -> dict[str, Any]:
        if self.line.incoming != "defer" or self.destination is None:
            return error("For use with '-incoming defer'")
        refused = surface.bad_uri(str(arguments.get("uri", "")))
        refused = refused or await self.destination.wait_at(arguments["uri"])
        return error(refused) if refused else {"return": {}}

    async def _human_monitor_command(self, arguments: dict[str, Any], command: dict[str, Any]) -> dict[str, Any]:
        words = str(arguments.get("command-line", "")).split()
        if words[:1] == ["migrate-set-mc-delay"] and len(words) == 2:
            await self._migrate_set_mc_delay({"value": int(words[1])}, command)
            return {"return": ""}
        return await self.qemu.ask(command)
