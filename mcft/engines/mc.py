"""Engine `mc`: QEMU with the micro-checkpointing series (capability `mc`). What is sent to it, and what its answers mean.

Its document is wrong in places and several of its commands crash or hang it: what it really does was recorded (88 runs), and
this module sends nothing else. Never: a delay of 0 or less (SIGFPE, or a stall for ever), `blk`, `migrate_cancel` under
checkpointing (no effect), anything at all to a standby that follows (its monitor is dead, the command would run at the
take-over). The series' spellings are told apart by asking: `query-migrate-capabilities`, `query-commands`.

Sources: hinesmr/qemu `migration-checkpoint.c`, `qapi-schema.json`; `docs/engines.md`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mcft.api import McOptions
from mcft.errors import Failed, Refused, Usage
from mcft.qmp_passthrough import Executor
from mcft.streams import Endpoint
from mcft.units import DELAY_MAX_MS, DELAY_MIN_MS

CAPABILITY = "mc"
NET_DISABLE, DISK_DISABLE = "mc-net-disable", "mc-disk-disable"
RDMA_COPY, RDMA_KEEPALIVE, PIN_ALL = "mc-rdma-copy", "rdma-keepalive", "rdma-pin-all"
KNOWN = (CAPABILITY, NET_DISABLE, DISK_DISABLE, RDMA_COPY, RDMA_KEEPALIVE, PIN_ALL)
SET_DELAY = "migrate-set-mc-delay"
DEFAULT_DELAY_MS = 100
DEFAULT_SPEED_BYTES = 32 << 20  # this QEMU's own migrate_set_speed
STATISTICS = ("xmit-time", "log-dirty-time", "migration-bitmap-time", "ram-copy-time", "mbps", "copy-mbps")
ENDED = ("failed", "completed", "cancelled", "cancelling")
FIRST_PASS = ("setup", "active")
RDMA_DEVICES = "/sys/class/infiniband"
END_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True)
class Progress:
    """What one `query-migrate` says. checkpoints: acknowledged - 1 (0 also before the first); None while there is no `mc`.

    statistics: ms and Mbit/s as QEMU gives them, and `downtime` (ms of the last capture).
    """

    status: str
    checkpoints: int | None
    statistics: dict[str, float]

    @property
    def ended(self) -> bool:
        return self.status in ENDED


def progress(answer: dict[str, Any]) -> Progress:
    """From the `return` of `query-migrate`; an empty one is status `none`."""
    mc = answer.get("mc")
    if not isinstance(mc, dict):
        return Progress(str(answer.get("status", "none")), None, {})
    numbers = {name: float(mc[name]) for name in STATISTICS if isinstance(mc.get(name), int | float)}
    if isinstance(answer.get("downtime"), int | float):
        numbers["downtime"] = float(answer["downtime"])
    return Progress(str(answer.get("status", "none")), int(mc.get("checkpoints", 0)), numbers)


def spelling(name: str, offered: Iterable[str]) -> str:
    """The name under which this QEMU knows it (the series began with `x-` before some); empty if it does not."""
    known = set(offered)
    return next((spelt for spelt in (name, f"x-{name}") if spelt in known), "")


def wanted(options: McOptions, offered: Iterable[str], *, qemu_buffers: bool = False) -> list[dict[str, Any]]:
    """The capabilities to set, in one call, as this QEMU spells them. qemu_buffers: it holds the packets itself.

    Raises: Refused ("no-capability") naming the one that this QEMU lacks; nothing is set then.
    """
    offered = list(offered)
    asked = {CAPABILITY: True, NET_DISABLE: not qemu_buffers, DISK_DISABLE: True, **rdma_asked(options)}
    rows = []
    for name, state in asked.items():
        spelt = spelling(name, offered)
        if spelt:
            rows.append({"capability": spelt, "state": state})
        elif state and name != DISK_DISABLE:  # an earlier series has no disk part at all: nothing to switch off
            raise Refused(
                "no-capability", f"its QEMU has no capability {name}", f"it offers {', '.join(sorted(offered))}",
                f"leave {option_of(name)} away, or use a QEMU whose series has it",
            )  # fmt: skip
    return rows


def rdma_asked(options: McOptions) -> dict[str, bool]:
    """The capabilities that mean something on transport rdma only, and whether each is wanted."""
    return {RDMA_COPY: options.rdma_copy, RDMA_KEEPALIVE: options.rdma_keepalive, PIN_ALL: options.rdma_pin_all}


def words(options: McOptions) -> list[str]:
    """As they would be typed."""
    return [f"--transport {options.transport}", *(option_of(name) for name, on in rdma_asked(options).items() if on)]


def option_of(capability: str) -> str:
    """What of mcft's options sets this capability."""
    return {RDMA_COPY: "--mc-rdma-copy", RDMA_KEEPALIVE: "--rdma-keepalive", PIN_ALL: "--rdma-pin-all"}.get(
        capability, f"engine mc ({capability})"
    )


def delay_arguments(delay_ms: float) -> dict[str, int]:
    """Of `migrate-set-mc-delay`. Raises: Usage for what would crash or stall that QEMU."""
    if isinstance(delay_ms, bool) or int(delay_ms) != delay_ms or not DELAY_MIN_MS <= delay_ms <= DELAY_MAX_MS:
        raise Usage("bad-delay", f"a delay of {delay_ms} ms is never sent to this QEMU", "it would crash or stall", "10ms to 10s")
    return {"value": int(delay_ms)}


def refuse_transport(options: McOptions, host: str, devices: str = RDMA_DEVICES) -> None:
    """Raises: Refused ("no-rdma") where this host has no RDMA device; ("rdma-only") for RDMA's options without it."""
    if options.transport == "rdma":
        if not os.path.isdir(devices) or not os.listdir(devices):
            raise Refused(
                "no-rdma", f"{host} has no RDMA device", f"{devices} is empty; QEMU would say "
                "'could not initialize local rdma queue pairs'", "use --transport tcp, or load the driver of the card",
            )  # fmt: skip
        return
    if names := [option_of(name) for name, on in rdma_asked(options).items() if on]:
        raise Refused(
            "rdma-only", f"{' and '.join(names)} need{'s' if len(names) == 1 else ''} transport rdma",
            f"over {options.transport} QEMU takes it and does nothing", "add --transport rdma, or leave it away",
        )  # fmt: skip


async def offered_capabilities(qmp: Executor) -> dict[str, bool]:
    """Name → whether it is on. QEMU: `query-migrate-capabilities`. Raises: QmpError."""
    return {row["capability"]: bool(row["state"]) for row in await qmp.execute("query-migrate-capabilities")}


async def offers(qmp: Executor) -> bool:
    """Whether this QEMU has the series. Raises: QmpError."""
    return bool(spelling(CAPABILITY, await offered_capabilities(qmp)))


def uri_of(endpoint: Endpoint, offered: Iterable[str]) -> str:
    """Of `migrate` and `migrate-incoming`. QEMU renamed `x-rdma` together with the capability (2.0)."""
    early = endpoint.transport == "rdma" and spelling(PIN_ALL, offered) == f"x-{PIN_ALL}"
    return f"x-{endpoint.uri}" if early else endpoint.uri


class Mc:
    """See `engines/base.py` for what each method promises. qemu_buffers: capability `mc-net-disable` stays off."""

    name = "mc"

    def __init__(self, options: McOptions | None = None, *, qemu_buffers: bool = False) -> None:
        self.options, self.qemu_buffers = options or McOptions(), qemu_buffers
        self.enabled: list[str] = []  # what `start` turned on, as this QEMU spells it

    async def unsupported(self, qmp: Executor) -> str:
        offered = await offered_capabilities(qmp)
        if not spelling(CAPABILITY, offered):
            return "its QEMU has no capability mc: it is not built with the micro-checkpointing series"
        try:
            wanted(self.options, offered, qemu_buffers=self.qemu_buffers)
        except Refused as refusal:
            return f"{refusal.message} ({refusal.reason})"
        if not spelling(SET_DELAY, await self._commands(qmp)):
            return f"its QEMU has no command {SET_DELAY}: its delay can't be set"
        return ""

    async def listen(self, qmp: Executor, here: Endpoint) -> None:
        """No capability is set here: MC alone on the standby would make it a plain migration."""
        offered = await offered_capabilities(qmp) if self.options.transport == "rdma" else {}
        await qmp.execute("migrate-incoming", uri=uri_of(here, offered))

    async def start(self, qmp: Executor, there: Endpoint, delay_ms: int, max_bandwidth_bytes: int) -> None:
        """Capabilities as a whole or not at all, then the delay, then `migrate`; a refusal takes the capabilities back."""
        delay = delay_arguments(delay_ms)
        commands = await self._commands(qmp)
        offered = await offered_capabilities(qmp)
        rows = wanted(self.options, offered, qemu_buffers=self.qemu_buffers)
        await qmp.execute("migrate-set-capabilities", capabilities=rows)
        try:
            await qmp.execute(spelling(SET_DELAY, commands), **delay)
            await qmp.execute("migrate_set_speed", value=max_bandwidth_bytes)
            await qmp.execute("migrate", uri=uri_of(there, offered))
            self.enabled = [row["capability"] for row in rows if row["state"]]
        except BaseException:
            await self.reset(qmp)
            raise

    async def set_delay_command(self, qmp: Executor, delay_ms: int) -> tuple[str, dict[str, Any]]:
        """The command for a change at run time; it applies after the sleep that is under way. Raises: Usage, QmpError."""
        return spelling(SET_DELAY, await self._commands(qmp)) or SET_DELAY, delay_arguments(delay_ms)

    async def switchover_reached(self, qmp: Executor) -> bool:
        """Whether the first pass is over. Raises: Failed if it ended otherwise."""
        now = progress(await qmp.execute("query-migrate"))
        if now.ended:
            raise Failed(
                "migration-failed", f"the first copy of the guest's memory ended as '{now.status}'",
                "the standby's QEMU ended or the link broke (this QEMU says no more)",
            )  # fmt: skip
        return now.status == "checkpointing"

    async def begin_checkpoints(self, qmp: Executor) -> None:
        """They begin by themselves; the guest never stood still for us."""

    async def abort(self, qmp: Executor, *, resume: bool = True) -> None:
        """Nothing stops MC but the stream's end, which the caller has brought about; the first pass can be cancelled."""
        if progress(await qmp.execute("query-migrate")).status in FIRST_PASS:
            await qmp.execute("migrate_cancel")
        deadline = asyncio.get_running_loop().time() + END_DEADLINE_S
        while (now := progress(await qmp.execute("query-migrate"))).status in (*FIRST_PASS, "checkpointing", "cancelling"):
            if asyncio.get_running_loop().time() > deadline:
                raise Failed("mc-goes-on", f"QEMU still says '{now.status}' though its stream was broken")
            await asyncio.sleep(0.02)
        await self.reset(qmp)

    async def reset(self, qmp: Executor) -> None:
        offered = await offered_capabilities(qmp)
        rows = [{"capability": spelt, "state": False} for name in KNOWN if (spelt := spelling(name, offered))]
        await qmp.execute("migrate-set-capabilities", capabilities=rows)
        commands = await self._commands(qmp)
        if spelt := spelling(SET_DELAY, commands):
            await qmp.execute(spelt, value=DEFAULT_DELAY_MS)
        await qmp.execute("migrate_set_speed", value=DEFAULT_SPEED_BYTES)

    def leave_commands(self) -> list[dict[str, Any]]:
        """None: a broken stream ends MC by itself, and the guest runs on."""
        return []

    async def _commands(self, qmp: Executor) -> list[str]:
        return [row["name"] for row in await qmp.execute("query-commands")]
