"""`make bench`: the figures that mcft promises, measured in the lab in one run, as a table. RUNS=10 for the failures.

Machines are noisy: compare within one run. Each row names what reproduces it by hand.
"""

from __future__ import annotations

import json
import os
import re
import socket
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table
from watching import Observer
from world import GATE, H1, HOSTS, UUID, Host, lab, now, other, pause, protect, restore, up

RUNS = int(os.environ.get("RUNS", "10"))
WATCH_S = 10.0
console = Console(highlight=False)


def gate_status(host: Host) -> dict[str, Any]:
    """The gate's own status, from its socket (`mcft/gate/control.py`); it knows more than the API shows."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(f"{host.root}/run/mcft/gate/{UUID}.sock")
        sock.sendall(b'{"id": 1, "do": "status"}\n')
        with sock.makefile() as lines:
            while "ok" not in (answer := json.loads(lines.readline())):
                pass
    status: dict[str, Any] = answer["ok"]
    return status


def pause_with_mcft(leader: Host) -> float:
    """Median pause of a checkpoint in ms, buffered, `quickack` set, as `mcft protect` leaves it."""
    protect(leader)
    pause(WATCH_S)
    return float(gate_status(leader)["pause_ms"]["p50"])


def pause_plain(leader: Host) -> float:
    """The same engine and delay as one sets COLO up by hand: no buffer, the routes as they were.

    Set up by mcft with `--netbuffer none`, then the routes' `quickack` is taken away; the standby stays frozen.
    """
    protect(leader, "--netbuffer", "none")
    for host in HOSTS:
        address = "10.99.0.1" if host is H1 else "10.99.0.2"
        host.sh(f"ip route change 10.99.0.0/24 dev rep0 proto kernel scope link src {address}")
    pause(WATCH_S)
    return float(gate_status(leader)["pause_ms"]["p50"])


def cpu_percent(host: Host) -> float:
    """Agent and gate together over 10 s, in % of a core."""
    pids = [host.main_pid("mcft-agent"), host.main_pid(GATE)]

    def ticks() -> int:
        total = 0
        for pid in pids:
            fields = host.sh(f"cat /proc/{pid}/stat").rsplit(")", 1)[1].split()
            total += int(fields[11]) + int(fields[12])
        return total

    begun, before = now(), ticks()
    pause(WATCH_S)
    return (ticks() - before) / os.sysconf("SC_CLK_TCK") / (now() - begun) * 100


def status_command_s(host: Host) -> float:
    """Median of ten `mcft status` from the shell."""
    times = []
    for _ in range(10):
        begun = time.perf_counter()
        host.mcft("status")
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def failures(leader: Host, lose: Callable[[Host], float], *, power: bool) -> tuple[list[float], list[float], Host]:
    """RUNS times: lose the leader, protect back. Client's gaps and verdict → RESUME, both in ms; who leads at the end."""
    gaps, resumes = [], []
    observer = Observer()
    try:
        for _ in range(RUNS):
            protect(leader, timeout=90)
            observer.hears()
            pause(0.5)
            survivor = other(leader)
            at_s = lose(leader)
            observer.hears(20, after_s=at_s + 0.05)
            survivor.await_took_over(timeout=20)
            pause(0.5)
            gaps.append(observer.gap(at_s) * 1000)
            text = next(e["text"] for e in reversed(survivor.events()) if "runs here now" in e["text"])
            if found := re.search(r"won \+([0-9.]+) ms, free \+([0-9.]+) ms, resume \+([0-9.]+)", text):
                won, free, resume = map(float, found.groups())
                resumes.append(won + (resume - free))  # without waiting out the lease
            if power:
                leader.power_on()
            leader.await_lost(40)
            leader = survivor
        observer.clean()
    finally:
        observer.close()
    return gaps, resumes, leader


def main() -> int:
    if os.geteuid():
        print("the figures need root: they are measured in the lab", file=sys.stderr)
        return 4
    up()
    restore(thorough=True)
    table = Table("figure", "to reach", "measured", "by hand", title=f"mcft, delay 100 ms, {RUNS} runs of each failure")
    plain = pause_plain(H1)
    H1.mcft("unprotect", "vm1")
    ours = pause_with_mcft(H1)
    lag = gate_status(H1)["release_lag_ms"]
    table.add_row("pause, against plain COLO", "≤ 0.7", f"{ours / plain:.2f} ({ours:.1f} / {plain:.1f} ms)", "mcft status")
    table.add_row("release after the RESUME, median", "≤ 1.5 ms", f"{lag['p50']} ms (p99 {lag['p99']})", "gate's status")
    table.add_row("agent + gate", "≤ 5 % of a core", f"{cpu_percent(H1):.1f} %", "top")
    table.add_row("mcft status", "≤ 0.35 s", f"{status_command_s(H1):.2f} s", "time mcft status")
    kills, resumes, leader = failures(H1, Host.kill_qemu, power=False)
    losses, more, _ = failures(leader, Host.power_off, power=True)
    resumes += more
    table.add_row("last input to RESUME, median", "≤ 20 ms", f"{statistics.median(resumes):.1f} ms", "mcft events")
    table.add_row("client's gap, kill -9", "≤ 150, worst 400 ms", _spread(kills), "kill -9 QEMU; tests/lab/observer.py")
    table.add_row("client's gap, power loss", "≤ 600, worst 1200 ms", _spread(losses), "lab/lab power h1 off")
    console.print(table)
    lab("down")
    return 0


def _spread(values: list[float]) -> str:
    return f"median {statistics.median(values):.0f}, {min(values):.0f} to {max(values):.0f} ms"


if __name__ == "__main__":
    sys.exit(main())
