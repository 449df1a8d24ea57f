"""Engine `colo`: stock QEMU from 11.1 on, capability `x-colo` in its periodic mode, with `return-path`.

Sources: QEMU `docs/COLO-FT.rst`, `migration/colo.c`, `qapi/migration.json`. What was measured: earlier versions offer `x-colo`
and break; they are refused by name.
"""

from __future__ import annotations

import asyncio
from typing import Any

from mcft.engines import tcg
from mcft.errors import Failed
from mcft.qmp_passthrough import Qmp
from mcft.streams import CREDENTIALS, Endpoint

MIN_VERSION = (11, 1)
KNOWN_BROKEN = {
    7: "under it the primary deadlocks within a few checkpoints (its migration thread takes the main lock twice)",
    10: "there COLO ends as `completed` without return-path and as `failed` with it (Received invalid message 0x0000)",
}
CAPABILITIES = ("return-path", "x-colo", "pause-before-switchover", "events")
STOPS_THE_GUEST = ("pre-switchover", "device", "colo", "failed", "cancelling")
DEFAULT_MAX_BANDWIDTH_BYTES = 128 << 20
DEFAULT_CHECKPOINT_DELAY_MS = 20000
# How long the guest may stand still at the switch-over. Who dirties memory too fast for the short limit gets QEMU's own.
DEFAULT_DOWNTIME_MS = 300
SHORT_DOWNTIME_MS = 30
SHORT_DOWNTIME_FOR_MS = 20_000


class Colo:
    """See `engines/base.py` for what each method promises."""

    name = "colo"
    _short = False
    _hides: tcg.Function | None = None

    async def unsupported(self, qmp: Qmp) -> str:
        version = (await qmp.execute("query-version"))["qemu"]
        number = (version["major"], version["minor"])
        offered = {c["capability"] for c in await qmp.execute("query-migrate-capabilities")}
        if "x-colo" not in offered:
            return f"its QEMU {number[0]}.{number[1]} was built without COLO (no capability x-colo)"
        if number < MIN_VERSION:
            why = KNOWN_BROKEN.get(number[0], "COLO is known to work from 11.1 on")
            return f"its QEMU is {number[0]}.{number[1]}: {why}; QEMU 11.1 or newer is needed"
        if not await qmp.execute("qom-list-types", implements="monitor-qmp"):
            return f"its QEMU {number[0]}.{number[1]} can't add a monitor while it runs (no object type monitor-qmp)"
        if await tcg.translates(qmp) and (await qmp.execute("query-target"))["arch"] not in ("x86_64", "i386"):
            return "its guest runs without KVM, and mcft knows how to checkpoint that for x86 machines only"
        return ""

    async def listen(self, qmp: Qmp, here: Endpoint) -> None:
        if await tcg.translates(qmp):
            await tcg.follow(qmp)
        await self._capabilities(qmp, ("return-path", "x-colo"), True)
        if here.hostname:
            await qmp.execute("migrate-set-parameters", **{"tls-creds": CREDENTIALS})
        await qmp.execute("migrate-incoming", uri=here.uri)

    async def start(self, qmp: Qmp, there: Endpoint, delay_ms: int, max_bandwidth_bytes: int) -> None:
        self._hides = None
        if await tcg.translates(qmp):
            self._hides = await tcg.function_to_hide(qmp)
            if self._hides is None:
                raise Failed("tcg", "its guest runs without KVM on a machine with no PCI device", "checkpoints would lack pages")
        await self._capabilities(qmp, CAPABILITIES, True)
        parameters: dict[str, Any] = {
            "x-checkpoint-delay": delay_ms, "max-bandwidth": max_bandwidth_bytes, "downtime-limit": SHORT_DOWNTIME_MS
        }  # fmt: skip
        if there.hostname:
            parameters |= {"tls-creds": CREDENTIALS, "tls-hostname": there.hostname}
        await qmp.execute("migrate-set-parameters", **parameters)
        self._short = True
        await qmp.execute("migrate", uri=there.uri)

    async def switchover_reached(self, qmp: Qmp) -> bool:
        migration = await self._migration(qmp)
        status = migration.get("status")
        if self._short and migration.get("total-time", 0) > SHORT_DOWNTIME_FOR_MS:
            self._short = False
            await qmp.attempt("migrate-set-parameters", **{"downtime-limit": DEFAULT_DOWNTIME_MS})
        if status in ("failed", "cancelled", "completed", "cancelling"):
            raise Failed("migration-failed", f"the first copy of the guest's memory ended as '{status}'")
        return status == "pre-switchover"

    async def begin_checkpoints(self, qmp: Qmp) -> None:
        if self._hides is not None:
            await tcg.flush_tlbs(qmp, self._hides)
        await qmp.execute("migrate-continue", state="pre-switchover")

    async def abort(self, qmp: Qmp, *, resume: bool = True) -> None:
        status = (await self._migration(qmp)).get("status")
        if status in ("setup", "active", "pre-switchover", "device", "cancelling"):
            await qmp.attempt("migrate_cancel")
        elif status == "colo":
            await qmp.attempt("x-colo-lost-heartbeat")
        for _ in range(1000):
            if (await self._migration(qmp)).get("status") in (None, "none", "cancelled", "failed", "completed"):
                break
            await asyncio.sleep(0.005)
        stopped_by_us = ("postmigrate", "finish-migrate", "colo", "paused")
        if resume and status in STOPS_THE_GUEST and await qmp.status() in stopped_by_us:
            await qmp.attempt("cont")
        await self.reset(qmp)

    async def reset(self, qmp: Qmp) -> None:
        await qmp.attempt(
            "migrate-set-capabilities", capabilities=[{"capability": n, "state": n == "events"} for n in CAPABILITIES]
        )
        defaults = {
            "x-checkpoint-delay": DEFAULT_CHECKPOINT_DELAY_MS, "max-bandwidth": DEFAULT_MAX_BANDWIDTH_BYTES,
            "downtime-limit": DEFAULT_DOWNTIME_MS, "tls-creds": "", "tls-hostname": "",
        }  # fmt: skip
        await qmp.attempt("migrate-set-parameters", **defaults)

    def leave_commands(self) -> list[dict[str, Any]]:
        return [{"execute": "x-colo-lost-heartbeat"}]

    async def _migration(self, qmp: Qmp) -> dict[str, Any]:
        answer: dict[str, Any] = await qmp.execute("query-migrate")
        return answer

    async def _capabilities(self, qmp: Qmp, names: tuple[str, ...], state: bool) -> None:
        await qmp.execute("migrate-set-capabilities", capabilities=[{"capability": n, "state": state} for n in names])
