"""What every protection on this host shares: configuration, store, journal, libvirt, peers, arbiters, background work."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from mcft import __version__
from mcft.agent import hook, model
from mcft.agent.arbitration import Arbiters
from mcft.agent.events import EventLog
from mcft.agent.jobs import Jobs
from mcft.agent.peers import PeerLink
from mcft.agent.ports import Ports
from mcft.agent.steps import Runner
from mcft.agent.store import Store
from mcft.config import Config
from mcft.errors import Failed, NotFound, Refused
from mcft.libvirt_bridge import LibvirtHost

log = logging.getLogger("mcft.agent")
T = TypeVar("T")


@dataclass
class Site:
    """One host's shared parts."""

    config: Config
    store: Store
    events: EventLog
    jobs: Jobs
    host: LibvirtHost
    markers: hook.Markers
    hook: hook.HookProof
    ports: Ports
    arbiters: Arbiters = None  # type: ignore[assignment]  # made from the configuration, if not given
    peers: dict[str, PeerLink] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: {"mcft": __version__})
    runner: Runner = field(default_factory=Runner)
    maintenance: bool = False
    route_users: dict[str, set[str]] = field(default_factory=dict)  # peer's address → uuids that want `quickack`
    committing: dict[str, asyncio.Lock] = field(default_factory=dict)  # uuid → its overlays are being committed offline
    routes_changed: set[str] = field(default_factory=set)  # those that had no `quickack` before mcft set it
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.arbiters = self.arbiters or Arbiters(self.config)

    def peer(self, name: str) -> PeerLink:
        """Raises: NotFound ("no-such-peer"), Refused ("peer-is-self")."""
        if name == self.config.name:
            raise Refused("peer-is-self", f"{name} is this host", "a copy on the same host dies with it", "name another host")
        if name not in self.peers:
            known = ", ".join(self.peers) or "none"
            raise NotFound(
                "no-such-peer", f"no peer '{name}'", f"configured peers: {known}", "add it to /etc/mcft/mcft.toml: [peers.NAME]"
            )
        return self.peers[name]

    async def ask(
        self, peer: str, verb: str, body: msgspec.Struct, reply: type[T], timeout_s: float = 5.0, *, patiently: bool = False
    ) -> T:
        """One call of a peer's agent, typed. Raises: Unreachable, Refused, or what the peer answered."""
        link = self.peer(peer)
        answer = await (link.call_patiently if patiently else link.call)(verb, model.encode(body), timeout_s)
        try:
            return msgspec.json.decode(answer, type=reply)
        except msgspec.MsgspecError as error:
            raise Failed("peer-garbled", f"{peer} answered '{verb}' in words that this agent does not know", str(error)) from None

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run in the background; an exception is logged, never lost."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed: %s", task.get_name(), error, exc_info=error)

    async def stop_tasks(self) -> None:
        """Cancel what runs in the background."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
