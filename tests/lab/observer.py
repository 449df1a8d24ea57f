"""The outside observer: hears the guest's beacon and says whether the guest ever took back what it had said.

The beacon's payload is a decimal number, one more with every datagram. A number that is not greater than all before it
came from a guest that was set back after the world had heard it go on: output left before its checkpoint was safe, or
two copies talk. Missing numbers are only lost datagrams.

Questions: `last` (when and what was heard last) · `report` (all since the start or the last `again`) · `again`.
"""

from __future__ import annotations

import socket
from contextlib import suppress

from clientside import now, serve

GAP_S = 0.02
SO_RCVBUFFORCE = 33


class Observer:
    def __init__(self) -> None:
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        # An epoch's packets come all at once; what this socket drops would look like the guest's loss.
        self.sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
        self.sock.bind(("", 9999))
        self.again()

    def again(self) -> bool:
        """Forget what was heard (after a reboot the guest counts from 1)."""
        with suppress(BlockingIOError):
            while True:
                self.sock.recv(64)
        self.count, self.first, self.highest, self.missing, self.heard_s = 0, 0, 0, 0, 0.0
        self.violations: list[tuple[float, int, int]] = []
        self.holes: list[tuple[float, int, int]] = []
        self.gaps: list[tuple[float, float]] = []
        self.started_s = now()
        return True

    def hear(self) -> None:
        with suppress(BlockingIOError):
            while True:
                number, at_s = int(self.sock.recv(64)), now()
                if self.count and number <= self.highest:
                    self.violations.append((at_s, number, self.highest))
                elif self.count:
                    self.missing += number - self.highest - 1
                    if number > self.highest + 1:
                        self.holes.append((at_s, number, self.highest))
                else:
                    self.first = number
                if self.count and at_s - self.heard_s > GAP_S:
                    self.gaps.append((self.heard_s, at_s))
                self.count += 1
                self.highest, self.heard_s = max(number, self.highest), at_s

    def last(self) -> dict[str, object]:
        release_s = self.gaps[-1][1] if self.gaps else 0.0
        return {"count": self.count, "at_s": self.heard_s, "highest": self.highest, "release_s": release_s}

    def report(self) -> dict[str, object]:
        """violations, holes: (when, number, highest before it). gaps: (last heard, heard again), those longer than 20 ms."""
        return {
            **self.last(), "first": self.first, "missing": self.missing, "started_s": self.started_s,
            "violations": self.violations[:20], "violation_count": len(self.violations), "gaps": self.gaps,
            "holes": self.holes[:20],
        }  # fmt: skip


if __name__ == "__main__":
    observer = Observer()
    serve(
        {"last": observer.last, "report": observer.report, "again": observer.again},
        observer.hear,
        lambda: observer.sock,
    )
