"""Ports of the configured range for one protection's keepalives, disks and checkpoints."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable

from mcft.errors import Refused

RESERVED_S = 60.0  # from the choice of a port until somebody listens on it


class Ports:
    """Chooses ports that nobody has. A choice is kept free of others for a minute: its user binds it later.

    held: what the protections of this host have written down as theirs; a bound port is seen by trying.
    """

    def __init__(self, first: int, last: int, held: Callable[[], Iterable[int]] = tuple) -> None:
        self.first, self.last, self.held = first, last, held
        self._reserved: dict[int, float] = {}  # port → when the reservation ends, CLOCK_BOOTTIME in s

    def take(self, address: str, *, udp: bool) -> int:
        """A free port on this address. Raises: Refused ("no-port")."""
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        self._reserved = {port: end for port, end in self._reserved.items() if end > now}
        others = {*self._reserved, *self.held()}
        for port in range(self.first, self.last + 1):
            if port not in others and _free(address, port, udp=udp):
                self._reserved[port] = now + RESERVED_S
                return port
        raise Refused(
            "no-port", f"no free port in {self.first}-{self.last} on {address}", "every protection takes up to three",
            "widen [ports] range",
        )  # fmt: skip


def _free(address: str, port: int, *, udp: bool) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM if udp else socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True
