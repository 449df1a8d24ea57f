"""Of the stand-in (not the micro-checkpointing QEMU): one process becomes two, QEMU and what stands before its monitor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket

import commandline
from trace_log import Trace

QEMU = os.environ.get("MCQEMU_QEMU", "/usr/bin/qemu-system-x86_64")
FOLDER = "/run/mcqemu"


def main(argv: list[str]) -> None:
    line = commandline.read(argv[1:])
    if not line.monitored:
        os.execv(QEMU, [QEMU, *argv[1:]])
    listeners = [socket.socket(fileno=fd) for fd in line.fds] + [listen(path) for path in line.paths]
    ours, theirs = socket.socketpair()
    if os.fork():
        for listener in listeners:
            listener.close()
        ours.close()
        os.set_inheritable(theirs.fileno(), True)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        arguments = [a.replace("@MONITOR@", str(theirs.fileno())) for a in line.arguments]
        os.execv(QEMU, [QEMU, *arguments])
    # Nothing of QEMU's may live on in here: a tap whose last descriptor this process held would outlive its guest.
    keep = {ours.fileno(), *(listener.fileno() for listener in listeners)}
    for fd in [int(name) for name in os.listdir("/proc/self/fd")]:
        if fd > 2 and fd not in keep:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(fd)
    asyncio.run(stand_in(line, ours, listeners, os.getppid()))


def listen(path: str) -> socket.socket:
    if os.path.exists(path):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(1)
    return listener


async def stand_in(line: commandline.Line, ours: socket.socket, listeners: list[socket.socket], pid: int) -> None:
    from beneath import Beneath
    from monitor_front import Front
    from series import Series

    trace = Trace(FOLDER, line.name, pid, "dst" if line.incoming else "src")
    qemu = Beneath(ours, pid)
    series = Series(line, qemu, FOLDER)
    front = Front(series, listeners, trace)
    series.emit = front.emit
    await qemu.connect()
    front.greeting = qemu.greeting
    tasks = [asyncio.create_task(series.run()), asyncio.create_task(front.run()), asyncio.create_task(series.watch_signals())]
    # Until QEMU is gone: then its clients see the end of the socket, as they would of QEMU's own. An error in here ends it all
    # with its traceback in the domain's log, and QEMU too: a half-dead stand-in proves nothing.
    done, _ = await asyncio.wait([asyncio.create_task(qemu.ended()), *tasks], return_when=asyncio.FIRST_COMPLETED)
    try:
        for task in done:
            with contextlib.suppress(ConnectionError):  # QEMU is gone in the middle of a command
                task.result()
        await asyncio.wait_for(qemu.ended(), 5)
        while not qemu.events.empty() and not tasks[0].done():  # what it said last
            await asyncio.sleep(0)
        await front.flush()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        raise
    trace.note("eof", "QMP socket closed")
    os._exit(0)
