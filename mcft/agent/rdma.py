"""RDMA keepalives on the agents' side: whether a protection gets one, and carrying the gates' queue pairs to each other.

The gates own the queue pairs; how to reach them goes over the agents' TLS connection, so that no port is open for it. The
primary's gate asks (`rdma-wanted`) as long as it is not connected; an exchange is fetch, carry, bring back, and may fail at
any point: the gate asks again.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mcft import rdmadevices
from mcft.agent import model
from mcft.api import Finding
from mcft.config import Config
from mcft.errors import McftError, Refused
from mcft.gate.state import LinkSpec, RdmaSpec

if TYPE_CHECKING:  # so that it can be tested without libvirt
    from mcft.agent.life import Life

log = logging.getLogger("mcft.agent")
AUTO, OFF = "auto", "off"
EXCHANGE_S = 5.0
WORTH_TELLING_MS = 2000.0


def required(asked: str) -> bool:
    """Whether a device was named: then a protection without it is refused."""
    return asked not in (AUTO, OFF)


async def choose(asked: str, pairs: list[tuple[str, str]]) -> RdmaSpec | None:
    """The first pair of (our, the peer's) addresses whose own one belongs to an RDMA device (the named one, if one is named).

    Raises: Refused if a device is named and does not serve. Changes nothing.
    """
    if asked == OFF:
        return None
    if not rdmadevices.verbs_installed():
        if required(asked):
            raise Refused("no-pyverbs", "RDMA keepalives need pyverbs, which this host's Python lacks", "", rdmadevices.INSTALL)
        return None
    refusals: list[Refused] = []
    for local, peer in pairs:
        try:
            address = rdmadevices.local_address(local, peer)
            await asyncio.to_thread(rdmadevices.find, address, asked)
            return RdmaSpec(asked, address, peer)
        except Refused as refusal:
            refusals.append(refusal)
        except OSError:
            continue  # no route there now
    if required(asked):
        # A device that is down on its link says more than one that is not on the next link.
        raise next((r for r in refusals if r.code == "rdma-down"), refusals[0] if refusals else _no_pair(asked))
    return None


def _no_pair(asked: str) -> Refused:
    return Refused("rdma-no-address", f"RDMA device {asked} is on no link to the peer", "no address of this host leads there")


async def choose_here(request: model.Prepare, config: Config, links: list[LinkSpec]) -> RdmaSpec | None:
    """The standby's end, for the address that the primary's keepalive would go to. Raises: Refused if that one is a must."""
    if not request.rdma_address:
        return None
    towards = next((link.peer for link in links if link.local == request.rdma_address), links[0].peer if links else "")
    try:
        if config.rdma_device == OFF:
            raise Refused("rdma-off", 'its configuration says [keepalive] rdma_device = "off"')
        if not rdmadevices.verbs_installed():
            raise Refused("no-pyverbs", "its Python lacks pyverbs", "", rdmadevices.INSTALL)
        await asyncio.to_thread(rdmadevices.find, request.rdma_address, config.rdma_device)
    except Refused as refusal:
        if request.rdma_required:
            raise _peer_has_none(config.name, str(refusal)) from None
        return None
    return RdmaSpec(config.rdma_device, request.rdma_address, towards)


def _peer_has_none(peer: str, why: str) -> Refused:
    return Refused(
        "peer-no-rdma", f"{peer} has no RDMA keepalive to offer", why.rstrip("."), "mend that there, or use --rdma-device auto"
    )


async def look(request: model.Prepare, config: Config) -> Finding | None:
    """For `check` and `prepare` on the peer's side. Raises: Refused."""
    if not request.rdma_address:
        return None
    if await choose_here(request, config, []) is None:
        why = "keepalives go by UDP"
        return Finding("warning", "rdma", f"{config.name} has no RDMA device with the address {request.rdma_address}", why)
    return Finding("ok", "rdma", f"keepalives can go by RDMA to {request.rdma_address} on {config.name}")


def settle(spec: RdmaSpec | None, asked: str, prepared: model.Prepared, peer: str) -> RdmaSpec | None:
    """Both sides have it or none. Raises: Refused if it was a must and the peer (an older one) did not say that it has it."""
    if spec is not None and not prepared.rdma and required(asked):
        raise _peer_has_none(peer, "its mcft is older")
    return spec if prepared.rdma else None


class Exchange:
    """One protection's, on the primary's side: one exchange at a time, and what operators are told of it."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._task: asyncio.Task[Any] | None = None
        self._told = ""  # "", "up", "down"

    def wanted(self, reason: str, down_ms: float) -> None:
        """The gate is not connected. Runs on the loop."""
        if down_ms > WORTH_TELLING_MS and self._told != "down":
            self._told = "down"
            peer = self._life.body.peer
            self._life.event("keepalive", f"no RDMA keepalive with {peer}: {reason}; UDP goes on", "warning")
        if self._task is None or self._task.done():
            self._task = self._life.site.spawn(self._connect(), f"connect {self._life.body.domain} by RDMA")

    async def _connect(self) -> None:
        life = self._life
        try:
            offer = await life.gate.ask("rdma-offer", EXCHANGE_S)
            body = life.body
            question = model.RdmaOffer(model.About(body.uuid, body.pid, body.g, body.domain), offer)
            theirs = await life.site.ask(body.peer, "rdma", question, model.RdmaAnswer, EXCHANGE_S)
            await life.gate.ask("rdma-connect", EXCHANGE_S, offer=theirs.offer)
        except McftError as error:
            log.info("%s: no RDMA connection: %s", life.body.domain, error)
            with suppress(McftError):
                await life.gate.ask("rdma-connect", EXCHANGE_S, error=str(error))
            return
        if self._told != "up":
            self._told = "up"
            life.event("keepalive", f"RDMA keepalive with {life.body.peer} stands")
