"""The lease in the kernel: what a guest's tap is given after the lease's end goes no further, whoever stands still.

Between the gate's look at its lease and the tap there is QEMU: what the gate released lies in a socket until QEMU's main loop
has read it. A host that is frozen just then, and thawed after its standby took over, would say it all the same: both its
processes go on at once, and QEMU is the faster one. So a program at the tap's ingress compares CLOCK_BOOTTIME, which goes on
while a host sleeps, with the lease's end, for each frame. It goes with its gate: nothing of it is left on the host.
"""

from __future__ import annotations

import os
import socket

from mcft import bpf

FOR_EVER = (1 << 64) - 1
_KTIME_GET_BOOT_NS = 125  # Linux 5.8


class TapLease:
    """One domain's: `guard` its taps, say `until` whenever that changes, `lift` at the end."""

    def __init__(self) -> None:
        self._until_ns = FOR_EVER
        self._end: bpf.Number | None = None
        self._links: list[int] = []

    @property
    def stands(self) -> bool:
        return bool(self._links)

    def until(self, at_ms: float) -> None:
        """The lease's end in ms of CLOCK_BOOTTIME: a store to memory. inf: no end; -inf: it is over."""
        self._until_ns = FOR_EVER if at_ms == float("inf") else int(max(at_ms, 0.0) * 1_000_000)
        if self._end is not None:
            self._end.value = self._until_ns

    def guard(self, taps: list[str]) -> None:
        """From now on, and in place of what was guarded before. Raises: OSError (before Linux 6.6, or without the right to)."""
        if self._end is None:
            self._end = bpf.Number()
            self._end.value = self._until_ns
        fresh, program = [], bpf.load(self._instructions(self._end))  # a new one: the kernel takes none twice
        try:
            for tap in taps:
                fresh.append(bpf.attach_ingress(program, socket.if_nametoindex(tap)))
        except OSError:
            _close(fresh)
            raise
        finally:
            os.close(program)  # its links keep it
        self.lift()
        self._links = fresh

    def lift(self) -> None:
        """The taps are as they were."""
        _close(self._links)
        self._links = []

    @staticmethod
    def _instructions(end: bpf.Number) -> bytes:
        now = bpf.instruction(0x85, value=_KTIME_GET_BOOT_NS)
        skip = bpf.instruction(0xAD, dst=0, src=1, offset=2)  # if now < end
        return now + end.into(1) + skip + bpf.returning(bpf.DROP) + bpf.returning(bpf.NEXT)


def _close(links: list[int]) -> None:
    for link in links:
        os.close(link)
