"""Which files a receiver of a synchronisation may overwrite (`protocol.md`, "A receiver of a synchronisation accepts…").

A sender with a newer generation than any here is asked for elsewhere (`_prepare`); this is about the file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path

from mcft.agent.diskfiles import NVRAM
from mcft.errors import Refused

OLD_COPIES = ("stale", "syncing", "bad", "following")  # labels of what is no disk's truth


def refuse_overwriting(label_file: str, path: str, target: str, host: str, allowed: Collection[str]) -> None:
    """Raises: Refused for a file that is in use, or that is neither this disk's old copy nor named by the operator."""
    if user := user_of(path):
        raise Refused(
            "file-in-use", f"{path} on {host} is open in {user}", "protecting would replace it under its user",
            f"end that, or keep the copy elsewhere: --disk {target}=PATH",
        )  # fmt: skip
    label = ""
    if os.path.exists(label_file):
        with open(label_file, encoding="utf-8") as file:
            label = file.read()
    what = "these firmware variables" if target == NVRAM else f"disk {target}"
    ours = label.rstrip().endswith(f" {path}") and label.split()[0].split("(")[0] in OLD_COPIES
    if not ours and path not in allowed:
        raise Refused(
            "file-exists", f"{path} exists on {host}, and mcft does not know it as an old copy of {what}",
            "protecting would overwrite it", f"if it may be lost: --overwrite {path}",
        )  # fmt: skip


def user_of(path: str) -> str:
    """"NAME (process PID)" of one that has this very file open, or "". Linux: /proc/PID/fd."""
    wanted = os.stat(path)
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            found = fd.stat()
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return f"{(fd.parents[1] / 'comm').read_text().strip()} (process {fd.parents[1].name})"
    return ""
