"""One TCP connection to the guest's echo port, opened before the failure and used all the while.

Numbered lines go out, and every byte that comes back must be the next one expected: nothing missing, nothing twice, no
reset.

Questions: `report` · `finish` (send no more; echoes are still awaited: ask `report` until none is open).
"""

from __future__ import annotations

import socket
from contextlib import suppress

from clientside import GUEST, now, serve

PERIOD_S = 0.005
WINDOW = 256  # lines under way; a connection that stands still through a failure must not fill up for ever


def line(number: int) -> bytes:
    return b"%011d\n" % number


class Connection:
    def __init__(self) -> None:
        self.sock = socket.create_connection((GUEST, 7), timeout=10)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self.sent = self.echoed = 0
        self.error = ""
        self.finishing = False
        self._half = b""
        self._next_s = 0.0
        self._echo_s = now()
        self.longest_stall_s = 0.0

    def tick(self) -> None:
        at_s = now()
        if self.finishing or self.error or at_s < self._next_s or self.sent - self.echoed >= WINDOW:
            return
        self._next_s = at_s + PERIOD_S
        try:
            # A line of 12 bytes fits as a whole or not at all, as the window is far below the socket's buffer.
            self.sock.send(line(self.sent + 1))
            self.sent += 1
        except BlockingIOError:
            return
        except OSError as error:
            self.error = f"sending line {self.sent + 1}: {error}"

    def read(self) -> None:
        try:
            with suppress(BlockingIOError):
                data = self.sock.recv(65536)
                if not data:
                    self.error = self.error or f"closed by the guest after line {self.echoed}"
                self._check(data)
        except OSError as error:
            self.error = self.error or f"after line {self.echoed}: {error}"

    def _check(self, data: bytes) -> None:
        at_s = now()
        self.longest_stall_s = max(self.longest_stall_s, at_s - self._echo_s)
        self._echo_s = at_s
        self._half += data
        while len(self._half) >= 12 and not self.error:
            got, self._half = self._half[:12], self._half[12:]
            if got != line(self.echoed + 1):
                self.error = f"line {self.echoed + 1} expected, {got!r} came"
                return
            self.echoed += 1

    def report(self) -> dict[str, object]:
        return {
            "sent": self.sent, "echoed": self.echoed, "open": self.sent - self.echoed, "error": self.error,
            "longest_stall_s": round(self.longest_stall_s, 3),
        }  # fmt: skip

    def finish(self) -> dict[str, object]:
        self.finishing = True
        return self.report()


if __name__ == "__main__":
    connection = Connection()
    serve(
        {"report": connection.report, "finish": connection.finish},
        connection.read,
        lambda: None if connection.error else connection.sock,
        connection.tick,
        PERIOD_S,
    )
