"""What engine `mc` costs on the primary, where its counter is asked for through libvirt: % of a core at ten checkpoints a second.

As root: `.venv/bin/python -m bench.mccost`, in the lab, with the stand-in for that QEMU (`tests/mcqemu`), whose own cost is
not counted. Gate, agent and libvirtd with all their threads (proc(5), `/proc/PID/stat`) while vm1 is protected, less what the
same took before. The target is 3 % for all three; of each the same run tells how much is the asking, by a protection at a
delay of 1 s, where a tenth is asked. A loaded machine makes all of it dearer, by caches and clocks.
"""

from __future__ import annotations

import os
import sys

from mcworld import definition, without_tls
from rich.console import Console
from rich.table import Table
from world import GATE, H1, HOSTS, LIBVIRTD, lab, now, pause, protect, redefined, up, wipe

from bench.figures import gate_status

WATCH_S = 20.0
DELAYS_MS = (100, 1000)
UNITS = ("mcft-agent", LIBVIRTD, GATE)


def seconds(unit: str) -> float:
    """CPU time of a unit's main process, all its threads; 0 where it does not run."""
    pid = H1.main_pid(unit)
    if not pid:
        return 0.0
    fields = H1.sh(f"cat /proc/{pid}/stat").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def percent() -> dict[str, float]:
    begun, before = now(), {unit: seconds(unit) for unit in UNITS}
    pause(WATCH_S)
    return {unit: (seconds(unit) - before[unit]) / (now() - begun) * 100 for unit in UNITS}


def main() -> int:
    if os.geteuid():
        print("this needs root: it is measured in the lab", file=sys.stderr)
        return 4
    up()
    wipe()
    for host in HOSTS:
        without_tls(host)
    redefined(definition())
    table = Table("delay", "checkpoints/s", "questions/s", "agent", "libvirtd", "gate", "all three", title="% of a core")
    before = percent()
    table.add_row("not protected", "", "", *(f"{before[unit]:.2f}" for unit in UNITS), f"{sum(before.values()):.2f}")
    for delay_ms in DELAYS_MS:
        protect(H1, "--engine", "mc", "--netbuffer", "none", "--delay", f"{delay_ms}ms", timeout=90)
        first = gate_status(H1)["mc"]
        used = percent()
        last = gate_status(H1)["mc"]
        more = [used[unit] - before[unit] for unit in UNITS]
        shown = [f"{delay_ms} ms", *(f"{(last[name] - first[name]) / WATCH_S:.1f}" for name in ("checkpoints", "polls"))]
        table.add_row(*shown, *(f"{value:.2f}" for value in more), f"{sum(more):.2f}")
        H1.mcft("unprotect", "vm1")
    Console(highlight=False).print(table)
    wipe()
    lab("install")
    return 0


if __name__ == "__main__":
    sys.exit(main())
