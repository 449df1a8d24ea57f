"""`make demo`: protect a running guest, pull its host's plug under the eyes of a client, protect back, switch home."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from watching import Load, settled, verified
from world import H1, H2, Host, lab, now, other, pause, protect, restore, up

console = Console(highlight=False)


@contextmanager
def step(text: str) -> Iterator[None]:
    """Say what is done, and how long it took."""
    begun = now()
    console.print(f"[bold]{text}[/] …")
    yield
    console.print(f"    [dim]{now() - begun:.1f} s[/]")


def show(host: Host, *words: str) -> None:
    """What an operator would type and see."""
    console.print(f"    [cyan]{host.name}# mcft {' '.join(words)}[/]")
    for line in host.mcft(*words, check=False).stdout.splitlines():
        console.print(f"    [dim]{line}[/]", soft_wrap=True)


def lose(load: Load, host: Host) -> dict[str, Any]:
    """Pull the plug and wait until the client hears the guest again; what the client saw of it."""
    before = load.observer.report()
    at_s = host.power_off()
    heard_s = load.observer.hears(15, after_s=at_s + 0.05)
    survivor = other(host)
    survivor.await_took_over(timeout=20)
    verdict = next(e["text"] for e in reversed(survivor.events()) if e["kind"] == "take-over" and "runs here now" in e["text"])
    after = load.observer.report()
    return {
        "detection": verdict.split("runs here now: ")[1].split(" (")[0],
        "gap_ms": load.observer.gap(at_s) * 1000,
        "heard_after_ms": (heard_s - at_s) * 1000,
        "missing": after["missing"] - before["missing"],
    }


def main() -> int:
    if os.geteuid():
        print("the demo needs root: it makes network namespaces (nothing outside of them is touched)", file=sys.stderr)
        return 4
    with step("lab: two hosts, a client, a switch; libvirt, QEMU and systemd in each host"):
        up()
    with step("a guest on host1: echo server, redis, a beacon of about a number a millisecond"):
        restore(thorough=True)
    load = Load()
    try:
        return _show(load)
    finally:
        load.close()


def _show(load: Load) -> int:
    load.flowing()
    with step("protect it, while a client reads and writes"):
        protect(H1)
        show(H1, "status")
    pause(2)
    with step("power loss of host1"):
        seen = lose(load, H1)
        load.goes_on()
        show(H2, "status")
    with step("host1 returns, learns that it lost, and becomes the standby"):
        H1.power_on()
        H1.await_lost(30)
        show(H1, "status")
        protect(H2, timeout=60)
    pause(1)
    with step("planned switch home"):
        before = load.observer.report()
        at_s = now()
        H2.mcft("failover", "vm1")
        H1.await_took_over(timeout=20)
        load.goes_on()
        switch_ms = load.observer.gap(at_s) * 1000
        missing = load.observer.report()["missing"] - before["missing"]
    load.connection.ask("finish"), load.writer.ask("finish")
    lines, writes = settled(load.connection), settled(load.writer)
    checked = verified(load.writer)
    report = load.observer.clean()
    console.print(_table(seen, switch_ms, missing, lines, writes, checked, report))
    if not os.environ.get("MCFT_KEEP_LAB"):
        with step("lab down"):
            lab("down")
    return 0


def _table(
    seen: dict[str, Any], switch_ms: float, missing: int, lines: dict[str, Any], writes: dict[str, Any], checked: int,
    report: dict[str, Any],
) -> Table:  # fmt: skip
    table = Table(title="what the client saw", show_header=False)
    for name, value in (
        ("detection", seen["detection"]),
        ("gap, power loss", f"{seen['gap_ms']:.0f} ms"),
        ("gap, planned switch", f"{switch_ms:.0f} ms (a checkpoint's rhythm is about 120 ms)"),
        ("packets lost", f"{seen['missing']} datagrams at the power loss, {missing} at the switch, of {report['count']}"),
        ("numbers taken back by the guest", str(report["violation_count"])),
        ("acknowledged writes lost", f"0 of {checked} (each read back)"),
        ("connection kept", f"yes: {lines['echoed']} numbered lines through one TCP connection, in order, none missing"),
    ):
        table.add_row(name, value)
    return table


if __name__ == "__main__":
    sys.exit(main())
