"""Stands in for a host's file systems and the parts of Python's `os` that the product uses on them.

Below /run all is in memory and goes with the power. Elsewhere a file is as durable as it was made: what was never synced may
be there after a power loss or not. Disk images and overlays are `Image` objects: see `qemu.py`.
"""

from __future__ import annotations

import os
import posixpath
from typing import Any

from tests.sim.world import Host, here


class Files:
    """path → content (text, bytes or `Image`)."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.held: dict[str, Any] = {}
        self.synced: dict[str, Any] = {}

    def put(self, path: str, content: Any, *, durable: bool = True) -> None:
        self.held[path] = content
        if durable:
            self.synced[path] = content

    def drop(self, path: str) -> None:
        self.held.pop(path, None)
        self.synced.pop(path, None)

    def power_lost(self) -> None:
        rng = self.host.world.rng
        kept = dict(self.synced)
        for path, content in self.held.items():
            if (path not in kept and rng.random() < 0.5) or (path in kept and kept[path] is not content and rng.random() < 0.5):
                kept[path] = content
        self.held = {path: content for path, content in kept.items() if not path.startswith("/run/")}
        self.synced = dict(self.held)


class _Written:
    """`open(path, "w")`."""

    def __init__(self, path: str) -> None:
        self.path, self.parts = path, []  # type: ignore[var-annotated]

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *_: object) -> None:
        here.host.files.put(self.path, "".join(self.parts), durable=False)

    def write(self, text: str) -> None:
        self.parts.append(text)


class _Read:
    """`open(path)`."""

    def __init__(self, path: str) -> None:
        if path not in here.host.files.held:
            raise FileNotFoundError(path)
        self.content = here.host.files.held[path]

    def __enter__(self) -> _Read:
        return self

    def __exit__(self, *_: object) -> None: ...

    def read(self) -> Any:
        return self.content


def sim_open(path: Any, mode: str = "r", **_: Any) -> Any:
    return _Written(str(path)) if "w" in mode else _Read(str(path))


class _Path:
    """`os.path`."""

    join, dirname, basename, normpath = posixpath.join, posixpath.dirname, posixpath.basename, posixpath.normpath

    @staticmethod
    def exists(path: str) -> bool:
        host = here.host
        return path in host.files.held or path in host.machine.sockets

    lexists = exists

    @staticmethod
    def isdir(path: str) -> bool:
        return any(name.startswith(f"{path}/") for name in here.host.files.held)

    @staticmethod
    def realpath(path: str) -> str:
        return path


class _Stat:
    st_uid = st_gid = 0
    st_mode = 0o100600


class SimOs:
    """`os`, for the modules of the product that touch files or processes."""

    path = _Path
    O_RDONLY, O_DIRECTORY, environ, PathLike = os.O_RDONLY, os.O_DIRECTORY, {}, os.PathLike  # type: ignore[var-annotated]

    @staticmethod
    def makedirs(*_: Any, **__: Any) -> None: ...

    @staticmethod
    def unlink(path: str) -> None:
        host = here.host
        if path in host.machine.sockets:
            del host.machine.sockets[path]
            return
        if path not in host.files.held:
            raise FileNotFoundError(path)
        host.files.drop(path)

    @staticmethod
    def replace(old: str, new: str) -> None:
        files = here.host.files
        # An image is flushed by its QEMU, and with it its name; a label is not.
        files.put(new, files.held[old], durable=not isinstance(files.held[old], str))
        files.drop(old)

    @staticmethod
    def open(*_: Any) -> int:
        return -1

    @staticmethod
    def fsync(_: int) -> None: ...

    @staticmethod
    def close(fd: int) -> None:
        here.host.machine.pidfds.pop(fd, None)

    @staticmethod
    def chown(*_: Any) -> None: ...

    @staticmethod
    def chmod(*_: Any) -> None: ...

    @staticmethod
    def stat(path: str) -> _Stat:
        return _Stat()

    @staticmethod
    def getxattr(*_: Any) -> bytes:
        raise OSError("no such attribute")

    setxattr = getxattr

    @staticmethod
    def kill(pid: int, _signal: int) -> None:
        proc = here.host.process(pid)
        if proc is None:
            raise ProcessLookupError(pid)
        here.world.note(here.host.name, f"kill -9 {proc.name}")
        # The kernel ends it a moment later; until then it is as alive as it looks.
        here.world.at(0.05 + here.world.rng.random(), here.host.machine.kernel, proc.kill)

    @staticmethod
    def pidfd_open(pid: int) -> int:
        proc = here.host.process(pid)
        if proc is None:
            raise ProcessLookupError(pid)
        return here.host.machine.pidfd(proc)

    @staticmethod
    def urandom(count: int) -> bytes:
        return here.world.rng.randbytes(count)

    @staticmethod
    def getpid() -> int:
        return 1


def process_start(pid: int) -> int | None:
    """`/proc/PID/stat`."""
    proc = here.host.process(pid)
    return None if proc is None else proc.start
