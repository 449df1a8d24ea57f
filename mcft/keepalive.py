"""Keepalives between the two gates of a protection: one UDP datagram per link every T/6, authenticated.

A datagram says who is alive, in which generation, with which record, what QEMU does, and echoes the newest counter
of the other side; the release lease rests on that echo (`commit.py`), loss detection on the silence (`failover.py`).
The MAC is HMAC-SHA256 (16 bytes) under a key that the agents exchanged over TLS at `protect`.

A peer process is believed once it has echoed a counter that *this* process sent (its nonce is then fresh); from then
on its counters must rise. So datagrams recorded earlier mean nothing to a gate that was restarted.
"""

from __future__ import annotations

import hmac
import os
import socket
import struct
from collections import deque
from dataclasses import dataclass, field
from hashlib import sha256

MAGIC = b"MCF1"
_BODY = struct.Struct("!4s16sQBBBB8sQ8sQQQ")  # magic pid g role record qemu flags nonce counter echo_nonce echo loads acks
MAC_BYTES = 16
NEWCOMER_AFTER_MS = 100.0
DATAGRAM_BYTES = _BODY.size + MAC_BYTES

ROLES = ("primary", "standby")
QEMU = ("unknown", "running", "gone", "shutdown")
RECORDS = (
    "", "preparing", "arming", "protected", "armed", "died", "resigned", "solo", "lost", "taken", "given-up",
    "not-whole", "spoken", "ended",
)  # fmt: skip
FLAG_CLOSED, FLAG_CLAIMING = 1, 2


@dataclass(frozen=True, slots=True)
class Word:
    """What a gate says of itself. closed: releases nothing; loads, acks: counts on this stream."""

    role: str = "primary"
    g: int = 0
    record: str = ""
    qemu: str = "unknown"
    closed: bool = False
    claiming: bool = False
    loads: int = 0
    acks: int = 0


@dataclass(frozen=True, slots=True)
class Heard:
    """An accepted datagram: the peer's word, its counter, and the newest of our counters that it echoes (0: none)."""

    link: str
    word: Word
    counter: int
    echo: int


def pack(key: bytes, pid: bytes, word: Word, nonce: bytes, counter: int, echo_nonce: bytes, echo: int) -> bytes:
    """One datagram of `DATAGRAM_BYTES`."""
    flags = (FLAG_CLOSED if word.closed else 0) | (FLAG_CLAIMING if word.claiming else 0)
    body = _BODY.pack(
        MAGIC, pid, word.g, ROLES.index(word.role), RECORDS.index(word.record), QEMU.index(word.qemu), flags,
        nonce, counter, echo_nonce, echo, word.loads, word.acks,
    )  # fmt: skip
    return body + hmac.digest(key, body, sha256)[:MAC_BYTES]


@dataclass
class Session:
    """The sans-IO half: counters, nonces, echoes, MAC. Times are only kept to tell when a counter was sent."""

    key: bytes
    pid: bytes
    nonce: bytes = field(default_factory=lambda: os.urandom(8))
    counter: int = 0
    refused: int = 0
    peer_nonce: bytes = bytes(8)
    peer_counter: int = 0
    peer_heard_ms: float = float("-inf")
    _sent_ms: dict[int, float] = field(default_factory=dict)
    _candidate: tuple[bytes, int] = (bytes(8), 0)
    _candidate_ms: float = float("-inf")
    _retired: deque[bytes] = field(default_factory=lambda: deque(maxlen=16))  # nonces of the peer's dead processes

    def next(self, word: Word, now_ms: float) -> bytes:
        """The next datagram; the same one goes out on every link (which also tells a link's loss from its delay)."""
        self.counter += 1
        self._sent_ms[self.counter] = now_ms
        if len(self._sent_ms) > 128:
            del self._sent_ms[self.counter - 128]
        # A newcomer that talks while the proven process is silent gets its echo, and with it the chance to prove itself.
        echo_nonce, echo = self._candidate if self.echoes_newcomer else (self.peer_nonce, self.peer_counter)
        return pack(self.key, self.pid, word, self.nonce, self.counter, echo_nonce, echo)

    @property
    def echoes_newcomer(self) -> bool:
        """Whether the next datagram echoes a process that has yet to prove itself."""
        if not self.peer_counter:
            return self._candidate[1] > 0
        return self._candidate_ms - self.peer_heard_ms > NEWCOMER_AFTER_MS

    def sent_ms(self, counter: int) -> float | None:
        """When our counter was sent (our clock); None if it is too old to remember."""
        return self._sent_ms.get(counter)

    def accept(self, datagram: bytes, link: str, now_ms: float) -> Heard | None:
        """None for anything that is not a fresh word of the peer's gate (garbage, replay, other instance)."""
        if len(datagram) != DATAGRAM_BYTES or not datagram.startswith(MAGIC):
            self.refused += 1
            return None
        body, mac = datagram[: _BODY.size], datagram[_BODY.size :]
        if not hmac.compare_digest(hmac.digest(self.key, body, sha256)[:MAC_BYTES], mac):
            self.refused += 1
            return None
        (_, pid, g, role, record, qemu, flags, nonce, counter, echo_nonce, echo, loads, acks) = _BODY.unpack(body)
        if pid != self.pid or nonce == self.nonce or role >= len(ROLES) or record >= len(RECORDS) or qemu >= len(QEMU):
            self.refused += 1
            return None
        ours = echo if echo_nonce == self.nonce and echo <= self.counter else 0
        if nonce != self.peer_nonce:
            if nonce in self._retired:
                self.refused += 1
                return None
            if not ours or echo not in self._sent_ms:
                # Unproven: remember it, so that our next datagram lets it prove itself; don't listen to it yet.
                self._candidate, self._candidate_ms = (nonce, counter), now_ms
                return None
            if self.peer_counter:
                self._retired.append(self.peer_nonce)
            self.peer_nonce, self.peer_counter = nonce, 0
            self._candidate, self._candidate_ms = (bytes(8), 0), float("-inf")
        if counter < self.peer_counter or (counter == self.peer_counter and now_ms - self.peer_heard_ms > 1000.0):
            self.refused += 1
            return None
        self.peer_counter, self.peer_heard_ms = max(counter, self.peer_counter), now_ms
        word = Word(
            ROLES[role], g, RECORDS[record], QEMU[qemu], bool(flags & FLAG_CLOSED), bool(flags & FLAG_CLAIMING), loads, acks
        )  # fmt: skip
        return Heard(link, word, counter, ours)


@dataclass
class Link:
    """One path between the hosts: a connected, non-blocking UDP socket. name is the peer's address on it."""

    name: str
    sock: socket.socket

    @classmethod
    def open(cls, local: str, local_port: int, peer: str, peer_port: int) -> Link:
        """Bind (also before the address exists: IP_FREEBIND) and connect. Raises: OSError."""
        family = socket.AF_INET6 if ":" in peer else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_IP, 15, 1)  # IP_FREEBIND, not named by the socket module
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, 6)
        sock.bind((local, local_port))
        sock.connect((peer, peer_port))
        return cls(peer, sock)

    def send(self, datagram: bytes) -> bool:
        """False where it could not leave (link down, buffer full): the other end sees a missing keepalive."""
        try:
            return self.sock.send(datagram) == len(datagram)
        except OSError:
            return False

    def receive(self) -> list[bytes]:
        """All datagrams that wait. Errors of the path (ICMP unreachable) are the silence they are."""
        datagrams: list[bytes] = []
        for _ in range(64):
            try:
                datagrams.append(self.sock.recv(2048))
            except BlockingIOError:
                break
            except OSError:
                continue
        return datagrams
