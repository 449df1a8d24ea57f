"""Does this host's own LAN answer? A standby without LAN must not take over (`protocol.md`).

ICMP echo to configured addresses: each 25 ms once the peer has gone silent, which a take-over depends on; once a second before,
so that people know of a LAN that is away while it does no harm yet. Without addresses the carrier of any NIC must do.
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
from dataclasses import dataclass, field

from mcft.gate.loop import Loop, boottime_ms

ASK_EVERY_MS = 25.0
PEACE_EVERY_MS = 1000.0
AWAY_AFTER = 5  # questions that nobody answered
AWAY = "this host's own LAN is away"
_IDENT = os.getpid() & 0xFFFF


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def echo_request(ident: int, sequence: int) -> bytes:
    """An ICMP echo request (RFC 792) of 16 bytes."""
    body = struct.pack("!BBHHH8s", 8, 0, 0, ident, sequence & 0xFFFF, b"mcft-lan")
    return body[:2] + struct.pack("!H", _checksum(body)) + body[4:]


@dataclass
class LanCheck:
    """Asks when told to, remembers the newest answer."""

    loop: Loop
    addresses: list[str]
    answered_ms: float = float("-inf")
    asked_ms: float = float("-inf")
    away: str = ""  # in peace: why a take-over would be forbidden now
    _unanswered: int = 0  # of those that were asked in peace
    _sequence: int = 0
    _forgotten: int = 0  # the newest question whose answer, like any before it, is no sign that the LAN is there now
    _sock: socket.socket | None = field(default=None)

    def ask(self, now_ms: float) -> None:
        """Send an echo request to each address, at most every 25 ms."""
        if not self.addresses or now_ms - self.asked_ms < ASK_EVERY_MS:
            return
        self.asked_ms = now_ms
        self._sequence += 1
        if self._sock is None:
            self._sock = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMP)
            self.loop.watch(self._sock, selectors.EVENT_READ, lambda _events: self._answered())
        for address in self.addresses:
            try:
                self._sock.sendto(echo_request(_IDENT, self._sequence), (address, 0))
            except OSError:
                continue

    def in_peace(self, now_ms: float) -> None:
        """Ask, and say in `away` what is known; to be called often.

        Nothing is decided by these answers: one of just before the loss would let a host that is cut off take over. Counted by
        questions, not by time: what a host that stands still did not ask is no silence of its LAN.
        """
        if now_ms - self.asked_ms < PEACE_EVERY_MS:
            return
        if not self.addresses:
            self.asked_ms, self.away = now_ms, "" if any_carrier() else f"{AWAY}: no interface has carrier"
            return
        self.away = "" if self._unanswered < AWAY_AFTER else f"{AWAY}: no answer from {', '.join(self.addresses)}"
        self.ask(now_ms)
        self._forgotten = self._sequence
        self._unanswered += 1

    def _answered(self) -> None:
        assert self._sock is not None
        while True:
            try:
                packet, (address, _) = self._sock.recvfrom(256)
            except OSError:
                return
            header = (packet[0] & 15) * 4
            if len(packet) < header + 8 or address not in self.addresses:
                continue
            kind, _, _, ident, sequence = struct.unpack_from("!BBHHH", packet, header)
            if kind != 0 or ident != _IDENT:
                continue
            self._unanswered = 0
            age = (self._sequence - sequence) & 0xFFFF
            if age < self._sequence - self._forgotten:
                self.answered_ms = boottime_ms()

    def peer_spoke(self) -> None:
        """What was asked before that says nothing of the silence that begins now, however late it is answered."""
        self._forgotten = self._sequence

    def forget(self) -> None:
        """We were stalled: only answers to what is asked from now on count, not those that waited in the socket meanwhile."""
        self.answered_ms = float("-inf")
        self._forgotten = self._sequence

    def ok(self, now_ms: float, silent_ms: float) -> bool:
        """Whether the LAN has answered since the peer fell silent; without addresses: whether any NIC has carrier."""
        if self.addresses:
            return self.answered_ms >= now_ms - silent_ms
        return silent_ms < 1.0 or any_carrier()


def any_carrier(root: str = "/sys/class/net") -> bool:
    """Whether any physical or veth interface (not lo, not a tap of a guest) has carrier."""
    for name in os.listdir(root):
        if name == "lo" or name.startswith(("vnet", "tap", "virbr")):
            continue
        try:
            with open(os.path.join(root, name, "carrier"), encoding="ascii") as file:
                if file.read(1) == "1":
                    return True
        except OSError:
            continue
    return False
