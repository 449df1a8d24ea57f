"""Of the stand-in (not the micro-checkpointing QEMU): what its clients said and heard, in the recorded runs' own format."""

from __future__ import annotations

import json
import os
import time
from typing import Any

LIMIT_BYTES = 64 << 20


class Trace:
    """A line per line of the monitor: `t` seconds since the start, `side`, `dir` (out: to QEMU, in: from it), `msg`."""

    def __init__(self, folder: str, name: str, pid: int, side: str) -> None:
        self.side, self._start_s = side, time.monotonic()
        self._file = None
        if os.path.isdir(folder):
            self._file = open(os.path.join(folder, f"{name}-{pid}.jsonl"), "w", buffering=1)  # noqa: SIM115

    def note(self, direction: str, message: Any) -> None:
        if self._file is None or self._file.tell() > LIMIT_BYTES:
            return
        row = {"t": round(time.monotonic() - self._start_s, 4), "side": self.side, "dir": direction, "msg": message}
        self._file.write(json.dumps(row) + "\n")
