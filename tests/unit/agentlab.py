"""Scenery for the agent's tests: a PKI in libvirt's layout, configurations, a core of canned answers."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import trustme

from mcft import api
from mcft.agent.core_api import Verb
from mcft.agent.events import EventLog
from mcft.agent.jobs import Jobs
from mcft.config import Config, Peer
from mcft.errors import NotFound


class Pki:
    """A CA and the files of hosts below it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ca = trustme.CA()

    def host(self, name: str) -> Path:
        """Write a host's files; the directory for `Config.pki_dir`."""
        pki = self.root / name
        for directory in ("CA", "libvirt/private"):
            (pki / directory).mkdir(parents=True, exist_ok=True)
        self.ca.cert_pem.write_to_path(pki / "CA/cacert.pem")
        for side in ("server", "client"):
            certificate = self.ca.issue_cert(name, common_name=name)
            certificate.private_key_pem.write_to_path(pki / f"libvirt/private/{side}key.pem")
            with (pki / f"libvirt/{side}cert.pem").open("wb") as out:
                out.writelines(part.bytes() for part in certificate.cert_chain_pems)
        return pki


def config(tmp_path: Path, pki_dir: Path, name: str = "host1", **fields: object) -> Config:
    """A host's configuration below tmp_path that listens on a free port of the loopback."""
    peer = "host2" if name == "host1" else "host1"
    values: dict[str, object] = {
        "name": name,
        "listen_addresses": ("127.0.0.1",),
        "listen_port": 0,
        "peers": {peer: Peer(peer, ("127.0.0.1",), 1)},
        "pki_dir": pki_dir,
        "state_dir": tmp_path,
        "run_dir": tmp_path / f"run-{name}",
        "socket_group": "root",
    }
    return Config(**(values | fields))  # type: ignore[arg-type]


class FakeStore:
    """A store without a disk, for the journal."""

    async def events(self, domain: str | None = None, after: int = 0, limit: int = 1000) -> list[api.EventBody]:
        return []

    async def add_event(self, *events: api.EventBody) -> bool:
        return True


class FakeCore:
    """Canned answers. peer_calls: what peers asked; hold: answers wait for it; error: is raised."""

    def __init__(self, name: str = "host1") -> None:
        self.name = name
        self.jobs = Jobs()
        self.events = EventLog(FakeStore())  # type: ignore[arg-type]
        self.acts: list[tuple[object, ...]] = []
        self.peer_calls: list[tuple[str, str, bytes]] = []
        self.hold: asyncio.Event | None = None
        self.error: Exception | None = None

    async def status(self, domain: str | None) -> api.Status:
        if domain not in (None, "vm1"):
            raise NotFound("no-such-protection", f"{domain} is not protected")
        return api.Status(self.name)

    def peers(self) -> api.Peers:
        return api.Peers(self.name)

    async def protect(self, request: api.ProtectRequest) -> api.JobBody:
        self.acts.append(("protect", request))
        if self.error:
            raise self.error
        return self.jobs.start("protect", request.domain, self._work, request.key)

    async def check(self, request: api.ProtectRequest) -> api.Check:
        self.acts.append(("check", request))
        return api.Check(self.name, request.domain, "u", request.to)

    async def act(self, domain: str, verb: Verb, request: api.ActRequest) -> api.JobBody:
        self.acts.append((verb, domain, request))
        return self.jobs.start(verb, domain, self._work, request.key)

    async def maintenance(self, request: api.MaintenanceRequest) -> api.JobBody:
        self.acts.append(("maintenance", request))
        return self.jobs.start("maintenance", self.name, self._work, request.key)

    async def set(self, domain: str, request: api.SetRequest) -> api.Protection:
        self.acts.append(("set", domain, request))
        return api.Protection(domain, "u", "p", "primary", "host2", "colo", "protected")

    async def peer_call(self, peer_name: str, verb: str, body: bytes) -> bytes:
        if verb != "hello":
            self.peer_calls.append((peer_name, verb, body))
            if self.hold:
                await self.hold.wait()
        if self.error:
            raise self.error
        return b'{"from":"%s"}' % self.name.encode()

    async def _work(self, _handle: object) -> str:
        if self.hold:
            await self.hold.wait()
        return "ok"


def client_tls(pki_dir: Path, with_certificate: bool = True) -> ssl.SSLContext:
    """A client's context that trusts the CA of pki_dir and shows its client certificate, or none."""
    context = ssl.create_default_context(cafile=str(pki_dir / "CA/cacert.pem"))
    if with_certificate:
        context.load_cert_chain(pki_dir / "libvirt/clientcert.pem", pki_dir / "libvirt/private/clientkey.pem")
    return context
