"""The contract of an engine: how one kind of QEMU is asked, started and stopped checkpointing. Engines know QMP, never HTTP."""

from __future__ import annotations

from typing import Any, Protocol

from mcft.qmp_passthrough import Qmp
from mcft.streams import Endpoint


class Engine(Protocol):
    """name: as `status` shows it. Every method raises QmpError (or Failed with the reason) and changes nothing then."""

    name: str

    async def unsupported(self, qmp: Qmp) -> str:
        """Empty, or why this QEMU can't do it, in words for the operator."""
        ...

    async def listen(self, qmp: Qmp, here: Endpoint) -> None:
        """On the standby: capabilities, then wait for the stream."""
        ...

    async def start(self, qmp: Qmp, there: Endpoint, delay_ms: int, max_bandwidth_bytes: int) -> None:
        """On the primary: capabilities, parameters, and the first pass of the migration."""
        ...

    async def switchover_reached(self, qmp: Qmp) -> bool:
        """Whether the guest stands still at the end of the first pass. Raises: Failed if the migration failed."""
        ...

    async def begin_checkpoints(self, qmp: Qmp) -> None:
        """The disks are swapped, the buffer holds: let the guest go on, checkpointed."""
        ...

    async def abort(self, qmp: Qmp, *, resume: bool = True) -> None:
        """Undo `start`: no migration, capabilities and parameters as they were, the guest running. Idempotent.

        resume: False where a guest that `start` stopped must stay so (`diskreplica.on_null`).
        """
        ...

    async def reset(self, qmp: Qmp) -> None:
        """Capabilities and parameters as libvirt had them; no migration runs. Idempotent."""
        ...

    def leave_commands(self) -> list[dict[str, Any]]:
        """The commands by which a primary whose stream is dead goes on alone."""
        ...
