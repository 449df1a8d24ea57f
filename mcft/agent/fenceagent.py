"""I/O: a program of the fence-agents family (`fence_ipmilan`, `fence_apc`, …): options on standard input, one per line.

`FenceAgentAPI`: action=off, status (exit 0: on, 2: off, else it can't tell) and monitor (0: the device answers).
"""

from __future__ import annotations

import os
import shutil

from mcft.agent.etcdhttp import NoReply
from mcft.agent.process import finished
from mcft.arbiter.fence import Monitor, Off, Power, Status
from mcft.config import FenceDevice
from mcft.errors import Failed

PATH = "/usr/sbin:/usr/local/sbin:/sbin:/usr/bin:/usr/local/bin:/bin"
ACTIONS = {Off: "off", Status: "status", Monitor: "monitor"}


def program(device: FenceDevice) -> str:
    """Its path. Raises: Failed ("no-fence-agent")."""
    found = shutil.which(device.agent, path=f"{os.environ.get('PATH', '')}:{PATH}")
    if found is None:
        so = "install it: the package fence-agents has most of them"
        raise Failed("no-fence-agent", f"the fence agent {device.agent} is not installed here", "", so)
    return found


async def ask(device: FenceDevice, what: Off | Status | Monitor, timeout_ms: float) -> Power:
    """Run it once. Raises: NoReply, with `sent` where it was started and did not end in time (it is killed then)."""
    options = {**dict(device.options), "action": ACTIONS[type(what)]}
    text = "".join(f"{name}={value}\n" for name, value in options.items())
    try:
        path = program(device)
    except Failed as error:
        raise NoReply(error.message, sent=False) from None
    try:
        code, out, err = await finished(path, stdin=text, timeout_s=timeout_ms / 1000)
    except TimeoutError:
        raise NoReply(f"{device.agent} did not end within {timeout_ms / 1000:g} s", sent=True) from None
    except OSError as error:
        raise NoReply(f"{device.agent}: {error.strerror}", sent=False) from None
    return power(what, code, " ".join((err or out).split())[:200])


def power(what: Off | Status | Monitor, code: int, words: str) -> Power:
    """What an exit code means. Only `status` tells a host's power."""
    if isinstance(what, Status):
        return Power("on" if code == 0 else "off" if code == 2 else "unknown", words or f"exit {code}")
    if code == 0:
        return Power("on", words)
    return Power("unknown", words or f"exit {code}")
