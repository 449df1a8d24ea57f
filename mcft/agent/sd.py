"""Words to systemd (sd_notify); without systemd they go nowhere."""

from __future__ import annotations

import contextlib
import os
import socket

READY, WATCHDOG, STOPPING = "READY=1", "WATCHDOG=1", "STOPPING=1"


def notify(state: str, status: str = "") -> None:
    """Send READY, WATCHDOG or STOPPING, with a line for `systemctl status`. Never raises, never blocks."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    message = f"{state}\nSTATUS={status}" if status else state
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.setblocking(False)
        out.sendto(message.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)


def watchdog_interval_s() -> float | None:
    """How often to send WATCHDOG (half of systemd's patience), in seconds; None: not asked for."""
    wanted = os.environ.get("WATCHDOG_USEC", "")
    return int(wanted) / 2e6 if wanted.isdigit() and int(wanted) else None
