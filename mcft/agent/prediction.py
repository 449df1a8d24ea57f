"""What protection would cost a guest, from how fast it changes its memory and what the link carries.

The measuring is QEMU's: `calc-dirty-rate` in its mode page-sampling, which hashes 512 pages per GiB twice and touches
neither the guest nor its dirty log (`migration/dirtyrate.c`), under any accelerator. The other modes switch the dirty log on.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Literal

from mcft.api import Prediction
from mcft.errors import Failed
from mcft.gate.pace import LEAST_SHARE, MOST_MS, PAUSES
from mcft.qmp_passthrough import Executor
from mcft.units import format_bytes, format_duration_ms

# A checkpoint with next to nothing in it, as measured in the lab (medians of 19 to 34 ms with quickack; README).
EMPTY_PAUSE_MS = 25.0
ASSUMED_LINK_BYTES_PER_S = 10**9 // 8  # where the kernel does not tell the link's speed
COSTLY_STANDING, BAD_STANDING = 0.3, 0.5
CALC_S, CALC_DEADLINE_S, POLL_S = 1, 5.0, 0.1
BUSY = ("setup", "active", "pre-switchover", "device", "postcopy-active", "colo", "cancelling", "wait-unplug")


async def dirty_rate(qmp: Executor) -> int:
    """Bytes per second in which the guest changes its memory, over one second.

    Raises: Failed ("no-dirty-rate") where it can't be measured, or must not be because something else is under way.
    """
    if (await qmp.execute("query-migrate")).get("status") in BUSY:
        raise Failed("no-dirty-rate", "the rate of change is not measured", "a migration is under way")
    if (await qmp.execute("query-dirty-rate")).get("status") == "measuring":
        raise Failed("no-dirty-rate", "the rate of change is not measured", "somebody else is measuring it")
    await qmp.execute("calc-dirty-rate", **{"calc-time": CALC_S, "mode": "page-sampling"})
    for _ in range(int(CALC_DEADLINE_S / POLL_S)):
        await asyncio.sleep(POLL_S)
        answer = await qmp.execute("query-dirty-rate")
        if answer.get("status") == "measured":
            return max(int(answer.get("dirty-rate", 0)), 0) << 20  # QEMU: MiB/s
    raise Failed("no-dirty-rate", "the rate of change is not measured", f"QEMU has no answer after {CALC_DEADLINE_S:g} s")


def link_speed(name: str, sysfs: Path = Path("/sys/class/net")) -> int:
    """Bytes per second of an interface as the kernel says it; 0 where it does not."""
    try:
        return max(int((sysfs / name / "speed").read_text(encoding="ascii")), 0) * 10**6 // 8
    except (OSError, ValueError):
        return 0


def interface_to(address: str) -> str:
    """The interface by which this address is reached; empty if none. A blocking call of a moment."""
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        try:
            return socket.if_indextoname(ip.route("get", dst=address)[0].get_attr("RTA_OIF"))
        except Exception:  # netlink's errors are many; without a route there is no speed to know
            return ""


def limit(max_bandwidth_bytes: int, interface: str, speed_bytes: int) -> tuple[int, str]:
    """What the link carries at most, and what says so."""
    carries, why = (speed_bytes, interface) if speed_bytes else (ASSUMED_LINK_BYTES_PER_S, "assumed")
    return (max_bandwidth_bytes, "max_bandwidth") if 0 < max_bandwidth_bytes < carries else (carries, why)


def predict(dirty_bytes_per_s: int | None, delay_ms: int, limit_bytes_per_s: int, limit_is: str, why_not: str = "") -> Prediction:
    """dirty_bytes_per_s: None where it was not measured (why_not)."""
    if dirty_bytes_per_s is None:
        text = f"No word on whether it is a good idea: {why_not or 'the rate of change was not measured'}."
        return Prediction(delay_ms, limit_bytes_per_s=limit_bytes_per_s, limit_is=limit_is, text=text)
    pause_ms, period_ms = _times(dirty_bytes_per_s / limit_bytes_per_s, delay_ms)
    standing = pause_ms / period_ms
    needed = int(dirty_bytes_per_s * (1 - standing))
    verdict = _verdict(dirty_bytes_per_s, limit_bytes_per_s, standing)
    latency_ms = round((period_ms + pause_ms) / 2, 1)
    text = _words(verdict, dirty_bytes_per_s, limit_bytes_per_s, standing, latency_ms, delay_ms)
    return Prediction(
        delay_ms, dirty_bytes_per_s, round(pause_ms, 1), latency_ms, round(period_ms, 1), needed,
        limit_bytes_per_s, limit_is, round(standing, 3), verdict, text,
    )  # fmt: skip


def _times(dirt: float, delay_ms: float) -> tuple[float, float]:
    """A pause and the time between two, ms; dirt: what the guest changes as a share of what the link carries.

    It changes memory while it runs, and all of that is sent while it stands; together they are the delay, or what the delay is
    stretched to (`gate/pace.py`).
    """

    def pause_ms(period_ms: float) -> float:
        return (EMPTY_PAUSE_MS + dirt * period_ms) / (1 + dirt)

    period_ms = delay_ms
    if pause_ms(delay_ms) > (1 - LEAST_SHARE) * delay_ms:
        stretched_ms = PAUSES * EMPTY_PAUSE_MS / (1 - dirt) if dirt < 1 else MOST_MS
        period_ms = max(delay_ms, min(stretched_ms, MOST_MS))
    return pause_ms(period_ms), period_ms


def _verdict(dirty: int, limit_bytes: int, standing: float) -> Literal["good", "costly", "bad"]:
    if dirty >= limit_bytes or standing > BAD_STANDING:
        return "bad"
    return "costly" if standing > COSTLY_STANDING else "good"


def _words(verdict: str, dirty: int, limit_bytes: int, standing: float, latency_ms: float, delay_ms: int) -> str:
    share, latency = f"{standing:.0%}", format_duration_ms(latency_ms)
    if dirty >= limit_bytes:
        return (
            f"A bad idea: it changes {format_bytes(dirty)}/s of memory and the link carries {format_bytes(limit_bytes)}/s; "
            "the first copy would not end, or the guest would stand still more than it runs."
        )
    if verdict == "bad":
        longer = "; a longer --delay makes it stand less and answer later" if delay_ms < 500 else ""
        return f"A bad idea: the guest would stand still {share} of the time{longer}."
    if verdict == "costly":
        return f"It works, at a price: the guest stands still {share} of the time, and each answer comes about {latency} later."
    return f"A good idea, if about {latency} more on each answer are fine: the guest stands still {share} of the time."
