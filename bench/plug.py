"""What a barrier and a release cost: the gate's encoded messages against `tc` and `IPRoute.tc()`, 1 and 8 NICs.

`lab/uml $PWD/.venv/bin/python -m bench.plug` (or on any kernel with sch_plug, as root). Absolute times are this kernel's; the
ratios within one run are what counts.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable

from pyroute2 import IPRoute

from mcft import plugwire as wire
from mcft.plugbuffer import Limit, PlugBuffer
from tests.kernel.frames import nic, open_tap

CLONE_NEWNET = 0x40000000


def median_us(step: Callable[[], object], count: int) -> tuple[float, float]:
    """Median and p99 of one call, in microseconds."""
    times = []
    for _ in range(count):
        begin = time.perf_counter_ns()
        step()
        times.append((time.perf_counter_ns() - begin) / 1000)
    times.sort()
    return times[len(times) // 2], times[int(len(times) * 0.99)]


def by_tc(buffer: PlugBuffer, action: str) -> None:
    lines = [f"qdisc change dev {line.ifb} root handle {line.handle >> 16:x}: plug {action}\n" for line in buffer.lines]
    subprocess.run(["tc", "-batch", "-"], input="".join(lines), text=True, check=True)


def by_iproute(ip: IPRoute, buffer: PlugBuffer) -> None:
    for action in ("TCQ_PLUG_BUFFER", "TCQ_PLUG_RELEASE_ONE"):
        for line in buffer.lines:
            ip.tc("change", "plug", line.ifb_index, handle=line.handle, action=action)


def measure(nics: int) -> None:
    """One epoch = barrier and release, on all NICs."""
    names = [f"vnet{number}" for number in range(nics)]
    taps = [open_tap(name) for name in names]
    buffer = PlugBuffer()
    buffer.attach([nic(name) for name in names], Limit(1 << 20))
    buffer.hold()

    def gate() -> None:
        buffer.barrier()
        buffer.release()

    def encoded_each_time() -> None:
        for action in ("buffer", "release-one"):
            for line in buffer.lines:
                buffer.link.ask(wire.plug(line, action))

    rows = [("the gate", median_us(gate, 2000)), ("encoded each time", median_us(encoded_each_time, 200))]
    with IPRoute() as ip:
        rows.append(("IPRoute.tc()", median_us(lambda: by_iproute(ip, buffer), 100)))
    rows.append(("tc -batch", median_us(lambda: [by_tc(buffer, a) for a in ("block", "release")], 30)))
    base = rows[0][1][0]
    print(f"{nics} NIC{'s' if nics > 1 else ''}, one epoch (barrier and release)")
    for name, (median, p99) in rows:
        print(f"  {name:<18} median {median:9.0f} µs   p99 {p99:9.0f} µs   {median / base:6.1f} ×")
    sys.stdout.flush()
    buffer.open()
    buffer.detach()
    buffer.shut()
    for tap in taps:
        os.close(tap)


if __name__ == "__main__":
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        sys.exit(f"bench.plug needs root: {os.strerror(ctypes.get_errno())}")
    for count in (1, 8):
        measure(count)
