"""How a domain ended by libvirt's word, and what tells a wish from a loss (`protocol.md`, "Intended ends")."""

from __future__ import annotations

import asyncio

from mcft.agent.process import run
from mcft.errors import Failed
from mcft.gate.loop import boottime_ms

DESTROYED = 1  # VIR_DOMAIN_EVENT_STOPPED_DESTROYED
BY_GUEST = 1  # VIR_DOMAIN_EVENT_SHUTDOWN_GUEST
STOPPED_WITHIN_S = 2.5
# libvirt ends a QEMU right behind its guest's shutdown; one that lives on was rebooted (`virsh reboot` by ACPI).
SHUTDOWN_COUNTS_MS = 5000.0


async def host_goes_down() -> bool:
    """Whether this host is shutting down (systemd says `stopping`)."""
    try:
        return "stopping" in await run("systemctl", "is-system-running")
    except Failed as error:  # it exits with 1 for `degraded`, and for `stopping`
        return "stopping" in str(error)


class LibvirtsWord:
    """Lifecycle events of one domain (virConnectDomainEventCallback), kept for a decision that may need them."""

    def __init__(self) -> None:
        self._stopped = asyncio.Event()
        self._detail = -1
        self._shut_down_ms = float("-inf")

    def heard(self, event: str, detail: int) -> None:
        """An event as `libvirt_bridge.EVENTS` names it, and its detail in libvirt's numbers."""
        if event == "stopped":
            self._detail = detail
            self._stopped.set()
        elif event == "started":
            self._stopped.clear()
            self._shut_down_ms = float("-inf")
        elif event == "shutdown" and detail == BY_GUEST:
            self._shut_down_ms = boottime_ms()

    @property
    def stopped(self) -> bool:
        """libvirt has said that it has ended."""
        return self._stopped.is_set()

    def shut_down_by_guest(self) -> bool:
        """Its guest has shut it down just now: also where the gate was not there to hear it."""
        return boottime_ms() - self._shut_down_ms < SHUTDOWN_COUNTS_MS

    async def destroyed(self) -> bool:
        """Whether libvirt ended it by `virsh destroy`; waits for its word."""
        try:
            await asyncio.wait_for(self._stopped.wait(), STOPPED_WITHIN_S)
        except TimeoutError:
            return False
        return self._detail == DESTROYED
