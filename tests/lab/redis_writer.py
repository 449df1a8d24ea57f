"""Writes to the guest's redis (`appendfsync always`) and remembers what was acknowledged: that must never be lost.

Keys are numbered and replies come in order, so "acknowledged up to n" is the whole record. Some are always under way.

Questions: `report` · `finish` (write no more; ask `report` until none is open) · `verify` (reads every acknowledged key
over a new connection).
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import IO

from clientside import GUEST, now, serve

WINDOW = 16
PERIOD_S = 0.03  # the guest's disk and memory are small: a long run must not fill them
TAG = f"w{os.getpid()}:{int(now() * 1000)}"


def command(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words)


def key(number: int) -> bytes:
    return f"{TAG}:{number}".encode()


class Writer:
    def __init__(self) -> None:
        self.sock = socket.create_connection((GUEST, 6379), timeout=10)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self.sent = self.acknowledged = 0
        self.error = ""
        self.finishing = False
        self._half = b""
        self._next_s = 0.0

    def tick(self) -> None:
        if self.finishing or self.error or now() < self._next_s:
            return
        self._next_s = now() + PERIOD_S
        # All that the window allows in one piece: far below the socket's buffer, so it goes as a whole or not at all.
        numbers = range(self.sent + 1, self.acknowledged + WINDOW + 1)
        data = b"".join(command(b"SET", key(n), b"%d" % n) for n in numbers)
        if not data:
            return
        try:
            self.sock.send(data)
            self.sent += len(numbers)
        except BlockingIOError:
            return
        except OSError as error:
            self.error = f"writing: {error}"

    def read(self) -> None:
        try:
            with suppress(BlockingIOError):
                data = self.sock.recv(65536)
                if not data:
                    self.error = self.error or "closed by redis"
                self._half += data
        except OSError as error:
            self.error = self.error or f"reading: {error}"
        while b"\r\n" in self._half and not self.error:
            reply, self._half = self._half.split(b"\r\n", 1)
            if reply != b"+OK":
                self.error = f"SET {self.acknowledged + 1} answered {reply!r}"
                return
            self.acknowledged += 1

    def report(self) -> dict[str, object]:
        opened = self.sent - self.acknowledged
        return {"sent": self.sent, "acknowledged": self.acknowledged, "open": opened, "error": self.error}

    def finish(self) -> dict[str, object]:
        self.finishing = True
        return self.report()

    def verify(self) -> dict[str, object]:
        """missing: acknowledged numbers whose key is not there with its value. error: redis could not be asked."""
        missing: list[int] = []
        try:
            with socket.create_connection((GUEST, 6379), timeout=10) as sock, sock.makefile("rb") as replies:
                for begin in range(1, self.acknowledged + 1, 500):
                    numbers = range(begin, min(begin + 500, self.acknowledged + 1))
                    sock.sendall(command(b"MGET", *(key(n) for n in numbers)))
                    head = replies.readline()
                    if head != b"*%d\r\n" % len(numbers):
                        return {"error": f"MGET answered {head!r}", "missing": missing}
                    missing += [n for n in numbers if self._bulk(replies) != b"%d" % n]
        except OSError as error:
            return {"error": str(error), "missing": missing}
        return {"error": "", "missing": missing, "checked": self.acknowledged}

    @staticmethod
    def _bulk(replies: IO[bytes]) -> bytes:
        size = int(replies.readline()[1:])
        return replies.read(size + 2)[:-2] if size >= 0 else b""


if __name__ == "__main__":
    writer = Writer()
    serve(
        {"report": writer.report, "finish": writer.finish, "verify": writer.verify},
        writer.read,
        lambda: None if writer.error else writer.sock,
        writer.tick,
        PERIOD_S,
    )
