"""A QEMU that is started without a machine, asked, and ended: what an emulator can do where no domain of it runs.

QEMU: `-machine none -accel qtest -qmp stdio`, as libvirt itself probes emulators (`qemu_capabilities.c`, with KVM).
"""

from __future__ import annotations

import asyncio
import json
import os
from types import TracebackType
from typing import Any

from mcft.errors import Failed
from mcft.qmp_passthrough import result, wire

DEADLINE_S = 8.0
NOBODY = 65534


def trustworthy(path: str) -> bool:
    """Whether only root can have put it there: the path comes from another host."""
    try:
        stat = os.stat(path)
    except OSError:
        return False
    return path.startswith("/") and stat.st_uid == 0 and not stat.st_mode & 0o022


class QemuProbe:
    """`async with QemuProbe(path) as probe: await probe.execute(…)`. version: known once it was entered."""

    def __init__(self, path: str, *, old: bool = False) -> None:
        """old: a QEMU of before 2.9, which has no option -accel."""
        self.path, self.version = path, ""
        self._machine = ("-machine", "none,accel=qtest") if old else ("-machine", "none", "-accel", "qtest")
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> QemuProbe:
        """Raises: Failed ("qemu-probe") if it can't be started or does not answer."""
        pipe = asyncio.subprocess.PIPE
        try:
            self._process = await asyncio.create_subprocess_exec(
                self.path, "-S", "-no-user-config", "-nodefaults", "-display", "none", *self._machine,
                "-qmp", "stdio", stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL, user=NOBODY, group=NOBODY,
                extra_groups=[], cwd="/",
            )  # fmt: skip
            await self._line()
            await self.execute("qmp_capabilities")
            version = (await self.execute("query-version"))["qemu"]
        except OSError as error:
            raise Failed("qemu-probe", f"can't ask {self.path}", error.strerror or str(error)) from None
        except BaseException:
            await self._end()
            raise
        self.version = f"{version['major']}.{version['minor']}.{version['micro']}"
        return self

    async def __aexit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None) -> None:
        await self._end()

    async def _end(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def execute(self, command: str, **arguments: Any) -> Any:
        """One command. Raises: QmpError, Failed."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps({"execute": command, "arguments": wire(arguments)}).encode() + b"\n")
        while "event" in (reply := await self._line()):
            continue
        return result(command, reply)

    async def _line(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), DEADLINE_S)
            reply: dict[str, Any] = json.loads(line)
        except (TimeoutError, ValueError):
            raise Failed("qemu-probe", f"{self.path} did not answer when it was asked what it can") from None
        return reply
