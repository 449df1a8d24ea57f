"""For the tests: a process that dies at a named point. Nothing here acts unless the environment says so.

MCFT_DIE_AT="POINT,FILE": the process kills itself (SIGKILL) when it comes to POINT, once: FILE is made first, and while
that stands nobody dies. Points: "before record KIND", "after record KIND" in an agent; "before VERB", "after VERB" in a
gate, VERB being what its agent asked for ("take"), "update KIND" for a record that it is told of.
"""

from __future__ import annotations

import os
import signal

DIE_AT = os.environ.get("MCFT_DIE_AT", "")


def die_at(point: str) -> None:
    """End this process here, if the environment names this point and the file that says "it has died" is not there."""
    if not DIE_AT:
        return
    asked, _, file = DIE_AT.partition(",")
    if asked != point or not file or os.path.exists(file):
        return
    os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
    os.kill(os.getpid(), signal.SIGKILL)
