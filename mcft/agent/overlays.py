"""The overlays of a take-over: until they are committed the disk alone is wrong, and the chain is the guest's disk."""

from __future__ import annotations

import asyncio
import os

from mcft import diskreplica
from mcft.agent.process import run
from mcft.diskreplica import Disk
from mcft.errors import Failed
from mcft.gate.loop import boottime_ms
from mcft.qmp_passthrough import Qmp

POLL_S = 0.1


async def await_committed(qmp: Qmp, disks: list[Disk], deadline_s: float) -> None:
    """QEMU commits by itself after `x-colo-lost-heartbeat`; wait for it. Raises: Failed ("not-committed")."""
    deadline_ms = boottime_ms() + deadline_s * 1000
    while not await diskreplica.committed(qmp, disks):
        if boottime_ms() > deadline_ms:
            raise Failed(
                "not-committed", f"the overlays are not committed after {deadline_s:g} s", "the disk alone is not the truth",
                "see whether its disk is full or broken",
            )  # fmt: skip
        await asyncio.sleep(POLL_S)


async def commit_files(disks: list[Disk], g: int) -> None:
    """The guest ended before QEMU had committed its overlays: make each chain one again, and remove it. Raises: Failed.

    qemu-img: `rebase -u` names each backing file (QEMU was given them by node), `commit -d` writes through.
    """
    for disk in disks:
        active, hidden = (diskreplica.overlay_path(disk, layer, g) for layer in diskreplica.OVERLAYS)
        if os.path.exists(active):
            await run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", disk.path, "-F", disk.format, hidden, timeout_s=60)
            await run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", hidden, "-F", "qcow2", active, timeout_s=60)
            await run("qemu-img", "commit", "-q", "-d", "-b", disk.path, active, timeout_s=3600)
    diskreplica.remove_overlay_files(disks, g)
