"""The machine's time-stamp counter in kHz, for lab/vm's kernel: on a loaded machine that one measures it wrong now and then.

Its clock then ran 60 times too fast, and all deadlines with it. An emulated processor's counter is the machine's own.
"""

from __future__ import annotations

import ctypes
import mmap
import time

RDTSC = b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0\xc3"  # rdtsc; shl rdx, 32; or rax, rdx; ret

code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(RDTSC)
counter = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(code)))


def both() -> tuple[int, int]:
    """Counter and nanoseconds, read as close to each other as can be: of several tries the quickest."""
    tries = []
    for _ in range(20):
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        ticks = counter()
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        tries.append((after - before, ticks, (before + after) // 2))
    _, ticks, at_ns = min(tries)
    return ticks, at_ns


(ticks0, at0_ns), _, (ticks1, at1_ns) = both(), time.sleep(0.3), both()
print(round((ticks1 - ticks0) * 1_000_000 / (at1_ns - at0_ns)))
