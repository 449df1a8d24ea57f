"""PURE: what two hosts keep in each other's memory by RDMA: a keepalive that the adapter carries, not the kernel's IP stack.

Each side registers a few bytes. The other one writes its newest keepalive there, the very datagram that goes out by UDP
(`keepalive.py`: pid, generation, record, counter, echo, MAC), by a one-sided RDMA write: our CPU has no part in it. So the
*reader* judges: a counter in my memory that rises means a live writer. That the writer's own write succeeded says only that
the other adapter answers; writes into a stopped process go on succeeding. A write that fails is a hint that something is
wrong, quicker than silence, and never more than a hint.

`gate/verbs.py` does the I/O in a process of its own, `gate/rdma.py` is the gate's end of it.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import msgspec

from mcft.keepalive import DATAGRAM_BYTES

# The memory that the gate and its verbs process share. The inbox alone may be written by the other host.
INBOX_AT, OUTBOX_AT, SLOT_BYTES, SLOTS = 0, 1024, 128, 16
REGION_BYTES = 4096

# Tries after the first. 7 would mean for ever (seen on rxe: no error in 11 s of total loss).
RETRIES = 6
TORN_READS = 3


# A datagram on its way from the gate to its verbs process begins with this; a request begins with "{".
WRITE = b"W"


class Spec(msgspec.Struct, frozen=True):
    """What a verbs process is started with. device: "auto" or a name; local: this host's address on that link."""

    device: str
    local: str
    loss_ms: float


class Offer(msgspec.Struct, frozen=True):
    """Where and how a queue pair can be reached, and the inbox behind it. Agents carry it over TLS.

    gid: of the port, as an IPv6 address; lid: 0 on Ethernet. A new queue pair has another number and another key, so that
    writes meant for its predecessor fail.
    """

    qpn: int
    psn: int
    address: int
    rkey: int
    gid: str
    lid: int = 0


def ack_timeout(loss_ms: float) -> int:
    """The exponent t of a queue pair's timeout, 4.096 µs · 2^t per try: all tries together end within half the loss time."""
    per_try_us = loss_ms * 1000 / 2 / (RETRIES + 1)
    return max(1, min(20, math.floor(math.log2(per_try_us / 4.096))))


@dataclass
class Inbox:
    """What the other host wrote, read while it may be writing: a torn read is read again, and the MAC has the last word."""

    memory: memoryview
    _last: bytes = bytes(DATAGRAM_BYTES)

    def take(self) -> bytes | None:
        """The datagram there, if it is another one than the last that was taken."""
        found = self._read()
        for _ in range(TORN_READS):
            again = self._read()
            if again == found:
                break
            found = again
        if found == self._last:
            return None
        self._last = found
        return found if any(found) else None

    def _read(self) -> bytes:
        return bytes(self.memory[INBOX_AT : INBOX_AT + DATAGRAM_BYTES])

    def clear(self) -> None:
        """For a new queue pair: what its predecessor received is not news."""
        self.memory[INBOX_AT : INBOX_AT + DATAGRAM_BYTES] = bytes(DATAGRAM_BYTES)


@dataclass
class Outbox:
    """Slots to write from: the adapter reads a slot until its write is acknowledged, so that one is left alone as long."""

    memory: memoryview
    _flying: deque[int] = field(default_factory=deque)
    _next: int = 0

    @property
    def flying(self) -> int:
        """Writes that are not acknowledged yet."""
        return len(self._flying)

    def put(self, datagram: bytes) -> int | None:
        """Offset of the filled slot in the region; None while every slot is under way (the other side sees a missing one)."""
        if len(self._flying) == SLOTS:
            return None
        at = OUTBOX_AT + self._next * SLOT_BYTES
        self.memory[at : at + len(datagram)] = datagram
        self._flying.append(self._next)
        self._next = (self._next + 1) % SLOTS
        return at

    def acknowledged(self, count: int) -> None:
        """Reliable connections complete in order."""
        for _ in range(count):
            self._flying.popleft()

    def reset(self) -> None:
        """For a new queue pair."""
        self._flying.clear()
