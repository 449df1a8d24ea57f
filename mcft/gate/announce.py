"""Tell the LAN's switches where a guest is now: a RARP request in its name, from the bridge that its tap is on.

For QEMUs without `announce-self`. (What is sent into a tap would reach the guest, not the LAN.)
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct

RARP = 0x8035


def frame(mac: str) -> bytes:
    """RFC 903, request reverse: who am I, asked by the guest's own address; 60 octets, as Ethernet wants."""
    own = bytes.fromhex(mac.replace(":", ""))
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 3) + own + bytes(4) + own + bytes(4)
    return (b"\xff" * 6 + own + struct.pack("!H", RARP) + body).ljust(60, b"\0")


def announce(ifname: str, mac: str, sysfs: str = "/sys/class/net") -> None:
    """Once; a tap without a bridge, or a bridge that is down, can't be spoken for."""
    with contextlib.suppress(OSError):
        bridge = os.path.basename(os.readlink(os.path.join(sysfs, ifname, "master")))
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC) as sock:
            sock.bind((bridge, 0))
            sock.send(frame(mac))
