"""Which network buffer a domain gets on this host; taking away what a dead gate's plug has left. In threads: netlink waits."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from mcft import api, netbuffer, plugkernel
from mcft.gate import state as gate_state
from mcft.netbuffer import Nic, Way


async def choose(asked: api.BufferChoice, nics: list[Nic]) -> Way:
    """The way for these NICs, looked at on the real kernel. Raises: Refused; changes nothing."""
    if not nics:
        return "filter" if asked == "auto" else asked
    why_not = await _why_no_plug() if asked in ("auto", "plug") else ""
    way = netbuffer.choose(asked, nics, plug_available=asked in ("auto", "plug") and not why_not, why_no_plug=why_not)
    if way == "plug":
        await asyncio.to_thread(plugkernel.refuse_unpluggable, [nic.target for nic in nics])
    return way


async def _why_no_plug() -> str:
    if not netbuffer.kernel_has_plug():
        return "this kernel has no sch_plug or no ifb"
    return await asyncio.to_thread(plugkernel.trial)


async def remove_plugs(taps: list[str], *, drop: bool = False) -> None:
    """No gate holds these any more and the guest may speak: what is left of their plugs goes. Idempotent.

    drop: what they hold never leaves.
    """

    def work() -> None:
        with contextlib.closing(plugkernel.Netlink()) as link:
            for tap in taps:
                plugkernel.remove(link, tap, drop=drop)

    await asyncio.to_thread(work)


async def drop_plugs(taps: list[str], run_dir: str) -> None:
    """The guest's QEMU is dead, its gate has ended: the plugs go with what they hold. Idempotent.

    A tap's name may be another guest's by now: one that a gate of this host has is left alone.
    """
    others: set[str] = set()
    for path in await asyncio.to_thread(lambda: list(Path(run_dir, "gate").glob("*.json"))):
        with contextlib.suppress(FileNotFoundError):  # that gate ends
            others.update(nic.target for nic in gate_state.load(str(path)).nics)
    await remove_plugs([tap for tap in taps if tap not in others], drop=True)
