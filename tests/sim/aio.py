"""Stands in for asyncio's event loop: one per agent process, in virtual time. A killed agent's tasks never run again."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from tests.sim.world import Proc, here

_graves: list[Any] = []  # what dead agents' tasks held: collected only between worlds, or their `finally` would run


class Loop(asyncio.AbstractEventLoop):
    """The few methods that the product's agent uses."""

    def __init__(self, proc: Proc) -> None:
        self.proc, self.world = proc, proc.host.world
        self._ready: deque[asyncio.Handle] = deque()
        self._scheduled = False
        self.tasks: set[Any] = set()
        _graves.append(self)

    def time(self) -> float:
        return self.proc.host.boottime_ms() / 1000

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Any = None) -> asyncio.Handle:  # type: ignore[override]
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        if not self._scheduled:
            self._scheduled = True
            self.world.at(0.01, self.proc, self._run)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any, context: Any = None) -> asyncio.TimerHandle:  # type: ignore[override]
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any, context: Any = None) -> asyncio.TimerHandle:  # type: ignore[override]
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self.world.at(max(0.0, (when - self.time()) * 1000), self.proc, self._due, handle)
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None: ...

    def _due(self, handle: asyncio.TimerHandle) -> None:
        if not handle._cancelled:
            self._ready.append(handle)
            self._run()

    def _run(self) -> None:
        """One turn: what is ready now, not what that makes ready."""
        self._scheduled = False
        asyncio._set_running_loop(self)
        try:
            for _ in range(len(self._ready)):
                handle = self._ready.popleft()
                if not handle._cancelled:
                    handle._run()
                    if not self.proc.alive:
                        return
        finally:
            asyncio._set_running_loop(None)
        if self._ready and not self._scheduled:
            self._scheduled = True
            self.world.at(0.01, self.proc, self._run)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Any = None) -> asyncio.Task[Any]:  # type: ignore[override]
        task = asyncio.Task(coro, loop=self, name=name or "task")
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """A thread: done a moment later, and done even if nobody waits for it any more."""
        future = self.create_future()
        self.world.at(0.2 + self.world.rng.random(), self.proc, self._thread, future, func, args)
        return future

    def _thread(self, future: asyncio.Future[Any], func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        try:
            value = func(*args)
        except BaseException as error:
            if not future.done():
                future.set_exception(error)
            return
        if not future.done():
            future.set_result(value)

    async def create_unix_connection(self, protocol_factory: Any, path: str | None = None, **_: Any) -> Any:  # type: ignore[override]
        """To a gate's control socket (`gates.Control`)."""
        await asyncio.sleep(0.0001)
        listener = here.host.machine.sockets.get(str(path))
        if listener is None:
            raise ConnectionRefusedError(path)
        protocol = protocol_factory()
        transport = listener.connect(self, protocol)
        protocol.connection_made(transport)
        return transport, protocol

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        exception = context.get("exception")
        if exception is not None and self.proc.alive and not self.world.over:
            self.world.note(self.proc.name, f"unhandled: {exception!r}")

    def default_exception_handler(self, context: dict[str, Any]) -> None: ...


def bury() -> None:
    """Between worlds: let go of dead agents' tasks; whatever their `finally` does meets a world that is over."""
    _graves.clear()
