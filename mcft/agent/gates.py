"""The agent's end of the talk with its gates: start their units, ask, be told. A gate outlives the agent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable
from typing import Any

from mcft.agent.process import run
from mcft.errors import Failed
from mcft.gate import state as gate_state
from mcft.gate.control import NO_ANSWER

QUIT_S = 2.0
Notes = Callable[[str, dict[str, Any]], None]


def unit(uuid: str) -> str:
    return f"mcft-gate@{uuid}.service"


class GateLink:
    """One gate. on_note(kind, fields) is called for every note, and with ("connected", status) at each connection."""

    def __init__(self, run_dir: str, uuid: str, pid: str, on_note: Notes) -> None:
        self.uuid, self.pid, self._on_note = uuid, pid, on_note
        self.state_path, self.socket_path = gate_state.paths(run_dir, uuid)
        self._writer: asyncio.StreamWriter | None = None
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._serial = 0
        self._keeper: asyncio.Task[None] | None = None
        self._connected = asyncio.Event()

    async def create(self, state: gate_state.GateState) -> None:
        """Write the state file, start the unit (it says ready once its sockets are open), connect."""
        await self.end()
        os.makedirs(os.path.dirname(self.state_path), mode=0o700, exist_ok=True)
        gate_state.save(self.state_path, state)
        await run("systemctl", "start", unit(self.uuid))
        await self.adopt()

    async def adopt(self, timeout_s: float = 5.0) -> None:
        """Connect to a gate that runs (systemd keeps it running). Raises: Failed ("gate")."""
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.create_task(self._keep(), name=f"gate {self.uuid}")
        try:
            await asyncio.wait_for(self._connected.wait(), timeout_s)
        except TimeoutError:
            raise Failed("gate", "the gate does not answer", "", f"look at: systemctl status {unit(self.uuid)}") from None

    async def _keep(self) -> None:
        while True:
            try:
                reader, self._writer = await asyncio.open_unix_connection(self.socket_path, limit=1 << 22)
            except OSError:
                await asyncio.sleep(0.02)
                continue
            hello = asyncio.create_task(self._hello())
            with contextlib.suppress(OSError, ValueError):
                while line := await reader.readline():
                    self._take(json.loads(line))
            hello.cancel()
            self._disconnected()

    async def _hello(self) -> None:
        with contextlib.suppress(Failed):
            status = await self.ask("status")
            self._connected.set()
            self._on_note("connected", status)

    def _disconnected(self) -> None:
        self._connected.clear()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(Failed("gate", "the gate ended before it answered"))

    def _take(self, message: dict[str, Any]) -> None:
        if "note" in message:
            self._on_note(message["note"], message)
            return
        future = self._waiting.pop(message["id"], None)
        if future is None or future.done():
            return
        if "error" in message:
            future.set_exception(Failed("gate-refused", f"the gate refused: {message['error']}"))
        else:
            future.set_result(message["ok"])

    @property
    def connected(self) -> bool:
        return self._connected.is_set()

    async def ask(self, do: str, timeout_s: float = 10.0, **fields: Any) -> Any:
        """One request. Raises: Failed: "gate-refused", or "gate" if it does not answer in time or is not there."""
        if self._writer is None:
            raise Failed("gate", "the gate is not connected", "", f"look at: systemctl status {unit(self.uuid)}")
        self._serial += 1
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[self._serial] = future
        self._writer.write(json.dumps({"id": self._serial, "do": do, "pid": self.pid, **fields}).encode() + b"\n")
        try:
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise Failed("gate", f"the gate did not answer '{do}' within {timeout_s:g} s") from None

    def tell(self, do: str, **fields: Any) -> None:
        """A request that is not answered; a gate that is not there is not told."""
        if self._writer is not None:
            self._writer.write(json.dumps({"id": NO_ANSWER, "do": do, "pid": self.pid, **fields}).encode() + b"\n")

    async def insist(self, do: str, timeout_s: float = 10.0, **fields: Any) -> Any:
        """`ask`, again and again while the gate is away: systemd restarts it.

        Raises: Failed ("gate-refused"; "gate" if it was ended meanwhile: without its state file it never comes back).
        """
        while True:
            try:
                await self.adopt()
                return await self.ask(do, timeout_s, **fields)
            except Failed as error:
                if error.code != "gate" or not os.path.exists(self.state_path):
                    raise
                await asyncio.sleep(0.02)

    async def qmp(self, commands: list[dict[str, Any]], timeout_s: float = 10.0) -> list[dict[str, Any]]:
        """Commands on the added monitor, sent in one go; the replies as QEMU gave them."""
        replies: list[dict[str, Any]] = await self.ask("qmp", timeout_s, commands=commands)
        return replies

    def load_state(self) -> gate_state.GateState | None:
        """The state file, if there is one."""
        try:
            return gate_state.load(self.state_path)
        except (OSError, ValueError):
            return None

    def stands(self) -> bool:
        """Whether a gate of this very instance is there, or a state file that can't be read."""
        state = self.load_state()
        return state.pid == self.pid if state is not None else os.path.exists(self.state_path)

    async def end(self) -> None:
        """Tell it to quit, stop its unit, forget its state. Nothing of it is left; none running is fine."""
        quits = False
        with contextlib.suppress(Failed):
            if self._writer is not None:
                await self.ask("quit", 1.0)
                quits = True
        await self.let_go()
        if os.path.exists(self.state_path) or os.path.exists(self.socket_path):
            with contextlib.suppress(Failed):
                if not (quits and await self._ended_by_itself()):
                    await run("systemctl", "stop", unit(self.uuid))
        for path in (self.state_path, self.socket_path):
            if os.path.exists(path):
                os.unlink(path)

    async def _ended_by_itself(self) -> bool:
        """Whether systemd has seen it end after `quit`: at a host's shutdown a `systemctl stop` would wait for ever."""
        deadline = asyncio.get_running_loop().time() + QUIT_S
        while asyncio.get_running_loop().time() < deadline:
            state = await run("systemctl", "show", "--property=ActiveState", "--value", unit(self.uuid))
            if state.strip() in ("inactive", "failed"):
                return True
            await asyncio.sleep(0.02)
        return False

    async def let_go(self) -> None:
        """Disconnect; the gate goes on."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None
        self._disconnected()
