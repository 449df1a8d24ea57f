"""Of the stand-in (not the micro-checkpointing QEMU): the monitors that its clients see."""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import socket
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from series import Series
    from trace_log import Trace

FD_SPACE = socket.CMSG_SPACE(16 * array.array("i").itemsize)


class Client:
    """One connection: commands are carried out one after the other; while the monitor is dead they wait, unread."""

    def __init__(self, front: Front, sock: socket.socket) -> None:
        self.front, self.sock = front, sock
        self._text, self._fds = "", []
        self._out: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._negotiated = False

    async def serve(self) -> None:
        self.sock.setblocking(False)
        loop = asyncio.get_running_loop()
        writer = asyncio.create_task(self._write())
        self.say(self.front.greeting)
        try:
            while await self.front.series.listening.wait():
                await self._readable(loop)
                if not self.front.series.listening.is_set():
                    continue
                data, fds, _, _ = socket.recv_fds(self.sock, 1 << 16, 16)
                if not data:
                    return
                self._text += data.decode()
                self._fds += fds
                while (command := self._next_command()) is not None:
                    await self._obey(command)
        except ConnectionError:
            return
        finally:
            writer.cancel()
            self.sock.close()

    async def _readable(self, loop: asyncio.AbstractEventLoop) -> None:
        ready: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self.sock, lambda: ready.done() or ready.set_result(None))
        try:
            await ready
        finally:
            loop.remove_reader(self.sock)

    def _next_command(self) -> dict[str, Any] | None:
        self._text = self._text.lstrip()
        if not self._text:
            return None
        try:
            command, end = json.JSONDecoder().raw_decode(self._text)
        except ValueError:
            return None
        self._text = self._text[end:]
        return command

    async def _obey(self, command: dict[str, Any]) -> None:
        await self.front.series.listening.wait()
        self.front.trace.note("out", {k: v for k, v in command.items() if k != "id"})
        if command.get("execute") == "qmp_capabilities":
            self._negotiated, reply = True, {"return": {}}
        else:
            fds, self._fds = self._fds, []
            reply = await self.front.series.obey(command, fds)
        self.say({**reply, "id": command["id"]} if "id" in command else reply)

    def say(self, message: dict[str, Any]) -> None:
        self.front.trace.note("in", {k: v for k, v in message.items() if k != "id"})
        self._out.put_nowait(json.dumps(message).encode() + b"\r\n")

    def hear(self, event: dict[str, Any]) -> None:
        if self._negotiated:
            self._out.put_nowait(json.dumps(event).encode() + b"\r\n")

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            line = await self._out.get()
            await loop.sock_sendall(self.sock, line)
            self._out.task_done()

    async def flushed(self) -> None:
        await self._out.join()


class Front:
    """Accepts on every listener one client at a time, as QEMU does, and none while the monitor is dead."""

    greeting: dict[str, Any]

    def __init__(self, series: Series, listeners: list[socket.socket], trace: Trace) -> None:
        self.series, self.trace, self._listeners = series, trace, listeners
        self._clients: list[Client] = []

    async def run(self) -> None:
        await self.series.ready.wait()
        await asyncio.gather(*(self._accept(listener) for listener in self._listeners))

    async def _accept(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        loop = asyncio.get_running_loop()
        while True:
            await self.series.listening.wait()
            sock, _ = await loop.sock_accept(listener)
            await self.series.listening.wait()
            client = Client(self, sock)
            self._clients.append(client)
            try:
                await client.serve()
            finally:
                self._clients.remove(client)

    def emit(self, event: dict[str, Any]) -> None:
        self.trace.note("in", event)
        for client in self._clients:
            client.hear(event)

    async def flush(self) -> None:
        """What QEMU said last reaches those who listen."""
        for client in self._clients:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(client.flushed(), 1)
