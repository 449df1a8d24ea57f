"""The agent's API over HTTP: routes and authorisation, nothing else.

Operators come by the unix socket (whoever may open it is one) or by TLS with a certificate whose name is an
operator's; peers by TLS only, on routes of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import ssl
from collections.abc import Callable
from typing import TypeVar

import msgspec
from aiohttp import web

from mcft import api
from mcft.agent import tls
from mcft.agent.core_api import Core, Verb
from mcft.agent.listening import Handler, Limits, Listener, json_answer, tcp_socket, unix_socket
from mcft.config import Config
from mcft.errors import McftError, Refused, Usage

log = logging.getLogger(__name__)
T = TypeVar("T")


class Server:
    """The listening sides of one agent: `await start()`, `await stop()`."""

    def __init__(self, config: Config, core: Core, limits: Limits = Limits()) -> None:  # noqa: B008
        self.config = config
        self.trouble = ""
        routes = _Routes(core, limits, self._peer)
        self._local = Listener(routes.operators(), limits)
        self._remote = Listener(routes.operators() + routes.peers(), limits, self._check)
        self._context: ssl.SSLContext | None = None

    async def start(self) -> None:
        """Listen on the unix socket, and by TLS on every configured address (present or not yet).

        Raises McftError if another agent has the socket, OSError if it cannot be made. What keeps TLS from
        listening is logged and kept in `trouble`: the operators' socket is what they find it out with.
        """
        await self._local.listen(unix_socket(self.config), None)
        await self._start_remote()

    async def reload(self, config: Config) -> None:
        """Take another configuration's peers and operators, and read the certificates again.

        Changed addresses and ports need a restart of the agent.
        """
        self.config = config
        if self._context is None:
            await self._start_remote()
            return
        try:
            tls.load(self._context, config)
            self.trouble = ""
        except McftError as error:
            self._complain(error)

    async def stop(self) -> None:
        """Close every socket and connection; acts that are under way go on."""
        await self._remote.close()
        await self._local.close()
        with contextlib.suppress(OSError):
            self.config.socket_path.unlink()

    @property
    def ports(self) -> list[int]:
        """The TCP ports that are listened on, in the order of the addresses."""
        return self._remote.ports

    async def _start_remote(self) -> None:
        try:
            self._context = tls.server_context(self.config)
        except McftError as error:
            self._complain(error)
            return
        self.trouble = ""
        for address in self.config.listen_addresses:
            try:
                await self._remote.listen(tcp_socket(address, self.config.listen_port), self._context)
            except OSError as error:
                self._complain(error)

    def _check(self, request: web.Request) -> None:
        """Who may do what by TLS: the certificate's name decides, on every request."""
        if request.path.startswith("/v1/peer/"):
            self._peer(request)
            return
        config, names = self.config, _names(request)
        if not {name.lower() for name in config.operators or config.peers} & set(names):
            raise _Forbidden("not-an-operator", f"{config.name} has no operator named {_list(names)}", *_NAMES)

    def _peer(self, request: web.Request) -> str:
        """The configured peer whose certificate this is. Raises Refused("peer-untrusted")."""
        config, names = self.config, _names(request)
        for name in config.peers:
            if name.lower() in names:
                return name
        raise _Forbidden("peer-untrusted", f"{config.name} has no peer named {_list(names)}", *_NAMES)

    def _complain(self, error: McftError | OSError) -> None:
        self.trouble = f"other agents cannot reach this one: {error}"
        log.error("%s", self.trouble)


_NAMES = (
    "a certificate of the CA alone is not enough",
    "name it in mcft.toml there, or use the right certificate",
)


def _names(request: web.Request) -> tuple[str, ...]:
    return tls.peer_names(request.get_extra_info("peercert"))


def _list(names: tuple[str, ...]) -> str:
    return " or ".join(f'"{name}"' for name in names) or "nothing"


class _Forbidden(Refused):
    @property
    def http_status(self) -> int:
        return 403


class _Routes:
    """The handlers: read the request, call the core, write what it answers."""

    def __init__(self, core: Core, limits: Limits, peer_of: Callable[[web.Request], str]) -> None:
        self._core = core
        self._limits = limits
        self._peer_of = peer_of

    def operators(self) -> list[web.RouteDef]:
        acts = [web.post(f"/v1/protections/{{domain}}/{verb}", self._act(verb)) for verb in _VERBS]
        return [
            web.get("/v1/status", self._status),
            web.get("/v1/peers", self._peers),
            web.get("/v1/events", self._events),
            web.get("/v1/jobs/{id}", self._job),
            web.post("/v1/jobs/{id}/cancel", self._cancel),
            web.post("/v1/protections", self._protect),
            web.post("/v1/protections/{domain}/set", self._set),
            web.post("/v1/check", self._check),
            web.post("/v1/maintenance", self._maintenance),
            *acts,
        ]

    def peers(self) -> list[web.RouteDef]:
        return [web.post("/v1/peer/{verb}", self._peer)]

    async def _status(self, request: web.Request) -> web.Response:
        return json_answer(await self._core.status(request.query.get("domain") or None))

    async def _peers(self, _request: web.Request) -> web.Response:
        return json_answer(self._core.peers())

    async def _events(self, request: web.Request) -> web.Response:
        after, wait_s = _number(request, "after"), self._wait_s(request)
        found = await self._core.events.wait(int(after), request.query.get("domain") or None, wait_s)
        return json_answer(api.Events(self._core.peers().host, found))

    async def _job(self, request: web.Request) -> web.Response:
        return json_answer(await self._core.jobs.wait(request.match_info["id"], self._wait_s(request)))

    async def _cancel(self, request: web.Request) -> web.Response:
        return json_answer(self._core.jobs.cancel(request.match_info["id"]))

    async def _protect(self, request: web.Request) -> web.Response:
        return json_answer(await self._core.protect(await self._read(request, api.ProtectRequest)))

    async def _check(self, request: web.Request) -> web.Response:
        return json_answer(await self._core.check(await self._read(request, api.ProtectRequest)))

    async def _maintenance(self, request: web.Request) -> web.Response:
        return json_answer(await self._core.maintenance(await self._read(request, api.MaintenanceRequest)))

    async def _set(self, request: web.Request) -> web.Response:
        wanted = await self._read(request, api.SetRequest)
        return json_answer(await self._core.set(request.match_info["domain"], wanted))

    def _act(self, verb: Verb) -> Handler:
        async def handler(request: web.Request) -> web.Response:
            wanted = await self._read(request, api.ActRequest)
            return json_answer(await self._core.act(request.match_info["domain"], verb, wanted))

        return handler

    async def _peer(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        answer = await self._core.peer_call(self._peer_of(request), request.match_info["verb"], body)
        return web.Response(body=answer, content_type="application/json")

    async def _read(self, request: web.Request, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(await self._body(request) or b"{}", type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise Usage("bad-request", "the request is not understood", str(error)) from error

    async def _body(self, request: web.Request) -> bytes:
        try:
            async with asyncio.timeout(self._limits.body_s):
                return await request.read()
        except TimeoutError:
            raise web.HTTPRequestTimeout from None

    def _wait_s(self, request: web.Request) -> float:
        return min(_number(request, "wait_s"), self._limits.wait_s)


_VERBS: tuple[Verb, ...] = ("unprotect", "failover", "solo", "start")


def _number(request: web.Request, name: str) -> float:
    """A query's number; 0 if it is not there. Raises Usage."""
    text = request.query.get(name, "0")
    with contextlib.suppress(ValueError):
        number = float(text)
        if math.isfinite(number) and number >= 0:
            return number
    raise Usage("bad-request", f'{name}="{text}" is no number of 0 or more')
