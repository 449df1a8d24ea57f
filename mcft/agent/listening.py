"""How the agent listens: its sockets, a deadline for every connection, every error as an `api.ErrorBody`.

Whatever a client sends (or does not), the answer is an ErrorBody or a closed connection, and the agent lives.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import shutil
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec
from aiohttp import web

from mcft import api
from mcft.config import Config
from mcft.errors import McftError, NotFound, Refused, Usage

log = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# Linux's numbers; Python has no names for them.
_IP_FREEBIND, _IPV6_FREEBIND = 15, 78
LINGER_S = 1.0


@dataclass(frozen=True)
class Limits:
    """What a client may take. head_s: to send a whole request head, from the connection or the last answer
    on; body_s: for the body; handshake_s: for TLS (all seconds); wait_s: the longest a poll waits.
    """

    head_s: float = 30.0
    body_s: float = 10.0
    handshake_s: float = 5.0
    wait_s: float = 60.0
    body_bytes: int = 1 << 20


def json_answer(body: msgspec.Struct, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")


def _http_error(status: int, reason: str) -> web.Response:
    """What HTTP itself refuses (unknown route, wrong method, too much, garbage), as the API says it."""
    error: McftError = Usage("bad-request", f"the request is refused: {reason}")
    if status == 404:
        error = NotFound("no-such-route", "this agent has no such route", next_step="is that mcft older?")
    return json_answer(api.error_body(error), status)


class Connection(web.RequestHandler):
    """A connection with a deadline whenever the client has the word: no head in time, no connection.

    (aiohttp's own keep-alive timer differs from version to version in what it covers.)
    """

    def __init__(self, server: web.Server, head_s: float) -> None:
        # lingering: after an early answer, for that answer to be read; aiohttp's 10 s would double the body's deadline.
        super().__init__(
            server, loop=asyncio.get_running_loop(), access_log=None, lingering_time=LINGER_S  # type: ignore[arg-type]
        )  # fmt: skip
        self._head_s = head_s
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.clients_turn(True)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self.clients_turn(False)

    def clients_turn(self, waiting: bool) -> None:
        """Start the deadline, or end it because a whole head is here."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if waiting and self.transport is not None:
            self._deadline = asyncio.get_running_loop().call_later(self._head_s, self.transport.abort)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        log.info("refused what is no HTTP: %s", message or exc)
        response = _http_error(status, "it is no HTTP")
        response.force_close()
        return response


class Listener:
    """An aiohttp application and the sockets that feed it."""

    def __init__(
        self,
        routes: list[web.RouteDef],
        limits: Limits,
        check: Callable[[web.Request], None] | None = None,
    ) -> None:
        """check: raises the McftError with which a request is refused."""
        app = web.Application(middlewares=[self._guard], client_max_size=limits.body_bytes)
        app.add_routes(routes)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        self._limits = limits
        self._check = check
        self._servers: list[asyncio.Server] = []

    @property
    def ports(self) -> list[int]:
        return [int(server.sockets[0].getsockname()[1]) for server in self._servers]

    async def listen(self, listening: socket.socket, context: ssl.SSLContext | None) -> None:
        if self._runner.server is None:
            await self._runner.setup()
        server = self._runner.server
        assert server is not None
        loop = asyncio.get_running_loop()
        timeout = self._limits.handshake_s if context else None
        self._servers.append(
            await loop.create_server(
                lambda: Connection(server, self._limits.head_s),
                sock=listening,
                ssl=context,
                ssl_handshake_timeout=timeout,
                ssl_shutdown_timeout=timeout,
                backlog=128,
            )
        )

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        await self._runner.cleanup()
        self._servers.clear()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Around every request: the deadlines, the authorisation, and every error as an ErrorBody."""
        connection = cast(Connection, request.protocol)
        connection.clients_turn(False)
        try:
            if self._check is not None:
                self._check(request)
            return await handler(request)
        except web.HTTPException as error:
            return _http_error(error.status, error.reason)
        except McftError as error:
            return json_answer(api.error_body(error), error.http_status)
        except Exception as error:
            log.exception("%s %s failed inside", request.method, request.path)
            return json_answer(api.error_body(error), 500)
        finally:
            connection.clients_turn(True)


def tcp_socket(address: str, port: int) -> socket.socket:
    """A bound socket; its address may come up later (a link that is down at boot, say). Raises OSError."""
    six = ipaddress.ip_address(address).version == 6
    listening = socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if six:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listening.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
        else:
            listening.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        listening.bind((address, port))
    except OSError as error:
        listening.close()
        raise OSError(error.errno, f"{address} port {port}: {error.strerror}") from error
    return listening


def unix_socket(config: Config) -> socket.socket:
    """The operators' socket; it appears under its name only with its rights. Raises Refused, OSError."""
    path = config.socket_path
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    _refuse_if_served(path)
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        mask = os.umask(0o177)
        try:
            listening.bind(str(fresh))
        finally:
            os.umask(mask)
        try:
            shutil.chown(fresh, group=config.socket_group)
        except (LookupError, PermissionError) as error:
            log.warning("only root can use %s: group %s: %s", path, config.socket_group, error)
        else:
            fresh.chmod(0o660)
        fresh.rename(path)
    except OSError:
        listening.close()
        raise
    return listening


def _refuse_if_served(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return
    raise Refused("agent-runs", f"another mcft agent listens on {path}", next_step="stop that one first")
