"""Of the stand-in (not the micro-checkpointing QEMU): the monitor of the QEMU beneath."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
from typing import Any

LINE_BYTES = 64 << 20  # a reply is one line; query-qmp-schema's is long


class Refused(Exception):
    """QEMU's error reply; `error` is what it said."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error.get("desc", ""))
        self.error = error


class Beneath:
    """Sends commands in order, hands out replies by id, queues events. pid: QEMU's."""

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self.sock, self.pid = sock, pid
        self.greeting: dict[str, Any] = {}
        self.events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count()
        self._sending = asyncio.Lock()
        self._reader: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        reader, self._writer = await asyncio.open_connection(sock=self.sock, limit=LINE_BYTES)
        first = await reader.readline()
        if not first:
            os._exit(1)  # QEMU did not like its arguments, and said so in its log
        self.greeting = json.loads(first)
        self.greeting["QMP"]["capabilities"] = []
        self._reader = asyncio.create_task(self._read(reader))
        await self.execute("qmp_capabilities", enable=["oob"])

    async def ended(self) -> None:
        assert self._reader is not None
        await self._reader

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                message = json.loads(line)
                if "event" in message:
                    self.events.put_nowait(message)
                elif (waiting := self._waiting.pop(message.get("id", ""), None)) and not waiting.done():
                    waiting.set_result(message)
        except ConnectionError:
            pass

    async def ask(self, command: dict[str, Any], fds: list[int] | None = None) -> dict[str, Any]:
        """QEMU's reply to a command as a client sent it, without our id. Closes fds once they are passed on."""
        number = f"beneath-{next(self._numbers)}"
        self._waiting[number] = waiting = asyncio.get_running_loop().create_future()
        line = json.dumps({**command, "id": number}).encode() + b"\n"
        async with self._sending:
            await self._writer.drain()
            if fds:
                socket.send_fds(self.sock, [line], fds)
                for fd in fds:
                    os.close(fd)
            else:
                self._writer.write(line)
        reply = await waiting
        reply.pop("id", None)
        return reply

    async def execute(self, command: str, **arguments: Any) -> Any:
        """For ourselves, and for mcft's own `engines.tcg`. Raises: Refused."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        reply = await self.ask({"execute": command, "arguments": named} if named else {"execute": command})
        if "error" in reply:
            raise Refused(reply["error"])
        return reply["return"]

    async def yank(self) -> None:
        """Ends the stream even where QEMU's main loop waits for it: out of band."""
        await self.ask({"exec-oob": "yank", "arguments": {"instances": [{"type": "migration"}]}})

    async def attempt(self, command: str, **arguments: Any) -> None:
        with contextlib.suppress(Refused):
            await self.execute(command, **arguments)
