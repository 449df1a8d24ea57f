"""What the three observers on `cl` share: they run until their standard input ends, and answer questions from there.

A question is a line, its answer a line of JSON. Plain Python without packages: the client has none.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

GUEST = "10.77.0.10"


def now() -> float:
    """Seconds of CLOCK_BOOTTIME: the same clock in every host of the lab and in the tests."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def serve(
    answers: dict[str, Callable[[], Any]],
    read: Callable[[], None],
    watched: Callable[[], socket.socket | None],
    tick: Callable[[], None] = lambda: None,
    period_s: float = 1.0,
) -> None:
    """read: called when the watched socket has something. tick: called at least every period_s."""
    os.set_blocking(0, False)
    asked = b""
    while True:
        sock = watched()
        ready, _, _ = select.select([0] if sock is None else [0, sock], [], [], period_s)
        if sock is not None and sock in ready:
            read()
        tick()
        if 0 in ready:
            data = os.read(0, 4096)
            if not data:
                return
            asked += data
            while b"\n" in asked:
                word, asked = asked.split(b"\n", 1)
                sys.stdout.write(json.dumps(answers[word.decode()]()) + "\n")
                sys.stdout.flush()
