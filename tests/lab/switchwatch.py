"""What the LAN's switch sees of the guest: from which host's port its frames come, and when that changes. Runs on `sw`.

After the first frame with the guest's address from one port none may come from the other until the next take-over that somebody
recorded (`bench/chaos.py` compares).

Questions: `report` (every change: [when, port]; and frames counted per port) · `again`.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from contextlib import suppress

from clientside import now, serve

MAC = bytes.fromhex("525400000010")
PORTS = ("h1-lan", "h2-lan")
PACKET_OUTGOING = 4
SO_ATTACH_FILTER, SO_RCVBUFFORCE = 26, 33


class Switch:
    """One socket for all ports, so that frames are seen in the order in which they came in."""

    def __init__(self) -> None:
        self.sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(3))
        self.sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
        # Frames from the guest's address only: ether[6:4], ether[10:2].
        high, low = struct.unpack("!IH", MAC)
        code = [(0x20, 0, 0, 6), (0x15, 0, 3, high), (0x28, 0, 0, 10), (0x15, 0, 1, low), (0x06, 0, 0, 0xFFFF), (0x06, 0, 0, 0)]
        rows = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *row) for row in code))
        self.sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", len(code), ctypes.addressof(rows)))
        self.again()

    def read(self) -> None:
        with suppress(BlockingIOError):
            while True:
                _, (port, _, kind, _, _) = self.sock.recvfrom(64)
                if port not in PORTS or kind == PACKET_OUTGOING:
                    continue
                self.frames[port] += 1
                if not self.changes or self.changes[-1][1] != port:
                    self.changes.append((now(), port))

    def report(self) -> dict[str, object]:
        return {"changes": self.changes, "frames": self.frames}

    def again(self) -> bool:
        self.changes: list[tuple[float, str]] = []
        self.frames = dict.fromkeys(PORTS, 0)
        return True


if __name__ == "__main__":
    switch = Switch()
    serve({"report": switch.report, "again": switch.again}, switch.read, lambda: switch.sock)
