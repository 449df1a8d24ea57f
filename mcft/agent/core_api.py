"""What the server needs of the agent's core: the one seam between HTTP and the acts."""

from __future__ import annotations

from typing import Literal, Protocol

from mcft import api
from mcft.agent.events import EventLog
from mcft.agent.jobs import Jobs

Verb = Literal["unprotect", "failover", "solo", "start"]


class Core(Protocol):
    """Every method may raise `McftError`, which the server carries to the caller as `api.ErrorBody`."""

    @property
    def jobs(self) -> Jobs:
        """The jobs that `protect` and `act` start."""

    @property
    def events(self) -> EventLog:
        """The journal."""

    async def status(self, domain: str | None) -> api.Status:
        """All protections, or the one of `domain`, as their gates say now. Raises NotFound."""

    def peers(self) -> api.Peers:
        """The configured peers as they are now. From memory: never waits."""

    async def protect(self, request: api.ProtectRequest) -> api.JobBody:
        """Accept a protection and start its set-up."""

    async def check(self, request: api.ProtectRequest) -> api.Check:
        """What `protect` would refuse and warn of; changes nothing."""

    async def act(self, domain: str, verb: Verb, request: api.ActRequest) -> api.JobBody:
        """Start unprotect, failover, solo, or a domain that is down."""

    async def maintenance(self, request: api.MaintenanceRequest) -> api.JobBody:
        """Begin or end this host's maintenance."""

    async def set(self, domain: str, request: api.SetRequest) -> api.Protection:
        """Change what can be changed while it runs; the answer is read back."""

    async def peer_call(self, peer_name: str, verb: str, body: bytes) -> bytes:
        """Answer another agent. peer_name: the configured name that its certificate proved."""
