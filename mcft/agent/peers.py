"""The agent's client to another agent: quick on warm connections, and not stalled by a dead one.

Each of the peer's addresses is a link of its own, kept warm by a `hello` every second. A call goes to the
link that answered last; one that has not answered within `HEDGE_S` goes out on the next link as well, and
the first answer wins (all verbs are idempotent). A cut cable sends no reset: a connection that does not
answer is left for a fresh one, and forgotten.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import random
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import msgspec
from yarl import URL

from mcft import api
from mcft.agent import tls
from mcft.config import Config, Peer
from mcft.errors import Failed, McftError, Refused, Unreachable

log = logging.getLogger(__name__)

HELLO_EVERY_S = 1.0
HELLO_DEADLINE_S = 1.0
HEDGE_S = 0.060
# A link on which a call got no answer for this long is tried again on a fresh connection.
FRESH_AFTER_S = 1.0
GAP_S = 3.0
# A host without power sends no reset, and answers of a minute (a copy's disks are made) are waited for. Its kernel is asked
# whether it is there, and still knows the connection: tcp(7), in s.
_ASK_AFTER_S, _ASK_EVERY_S, _ASK_TIMES = 5, 2, 5
# Of what may take minutes there: how often it is asked, and the silence that ends the asking.
ASK_AGAIN_S = 20.0
SILENT_S = 10.0
# Shorter than the server's deadline for idle connections, so that none is closed under a call.
_IDLE_S = 15.0
_CUT = (
    ssl.SSLEOFError,
    ssl.SSLZeroReturnError,
    ConnectionResetError,
    ConnectionAbortedError,
    aiohttp.ServerDisconnectedError,
)


def boottime_s() -> float:
    """CLOCK_BOOTTIME in seconds: the protocol's only clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _recent(answered_s: float | None) -> bool:
    return answered_s is not None and boottime_s() - answered_s <= GAP_S


class PeerLink:
    """One peer, by all its links: `start()`, then `await call(...)`; `await close()` at the end."""

    def __init__(self, config: Config, peer: Peer, hello: Callable[[], bytes] = lambda: b"{}") -> None:
        """hello: makes the body of every `hello` that is sent."""
        self.peer = peer
        self.last_hello = b""
        self.detail = "not tried yet"
        self._hello = hello
        self._links = [_Link(config, peer, address) for address in peer.addresses]
        self._last_ok: float | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to say hello on every link."""
        self._tasks = [asyncio.create_task(self._greet(link), name=f"hello {link}") for link in self._links]

    async def close(self) -> None:
        """Stop, and close every connection."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for link in self._links:
            await link.close()

    @property
    def reachable(self) -> bool:
        """True if a hello was answered on any link within the last 3 s."""
        return _recent(self._last_ok)

    @property
    def carries_since(self) -> float | None:
        """Since when (CLOCK_BOOTTIME, s) the link that carries checkpoints answers without a gap of more than 3 s; or None."""
        link = self._links[0]
        return link.since if _recent(link.last_ok) else None

    @property
    def last_ok(self) -> dict[str, float | None]:
        """Address → when it last answered (CLOCK_BOOTTIME, s)."""
        return {link.address: link.last_ok for link in self._links}

    async def call(self, verb: str, body: bytes = b"", timeout_s: float = 5.0) -> bytes:
        """POST /v1/peer/{verb} and return the answer's body.

        Raises the McftError that the peer answered; Unreachable("peer-unreachable") if none did in
        `timeout_s` seconds; Refused("peer-untrusted") if either side does not accept the other's
        certificate.
        """
        failures: dict[str, McftError] = {}
        answer = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                answer = await self._race(verb, body, failures)
        if answer is not None:
            return answer
        untrusted = [error for error in failures.values() if error.code == "peer-untrusted"]
        if untrusted:
            raise untrusted[0]
        silence = f"no answer within {timeout_s:g} s"
        why = [f"{a}: {failures[a].reason if a in failures else silence}" for a in self.peer.addresses]
        raise Unreachable(
            "peer-unreachable",
            f"{self.peer.name} did not answer ({verb})",
            "; ".join(why),
            f"look at the links to {self.peer.name}, and at its agent",
        )

    async def call_patiently(self, verb: str, body: bytes, timeout_s: float) -> bytes:
        """`call` of what the peer does once, however often it is asked: an answer that got lost comes with the next asking.

        Raises: as `call`; Unreachable also when no hello has been answered for SILENT_S.
        """
        end_s = boottime_s() + timeout_s
        while True:
            began_s = boottime_s()
            try:
                return await self.call(verb, body, max(0.1, min(ASK_AGAIN_S, end_s - began_s)))
            except Unreachable:
                now_s = boottime_s()
                waited, heard = now_s - began_s >= ASK_AGAIN_S, now_s - (self._last_ok or 0.0) <= SILENT_S
                if not (waited and heard) or now_s >= end_s:
                    raise

    async def _race(self, verb: str, body: bytes, failures: dict[str, McftError]) -> bytes | None:
        """The first answer; None if every attempt failed. failures: by address, filled on the way."""
        attempts = self._attempts()
        running: dict[asyncio.Task[bytes], _Link] = {}
        patience: float | None = 0.0
        try:
            while running or patience is not None:
                if patience is not None:
                    link, fresh, patience = next(attempts)
                    running[asyncio.create_task(link.post(verb, body, fresh))] = link
                done, _ = await asyncio.wait(running, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    link = running.pop(task)
                    error = task.exception()
                    if error is None:
                        self._answered(link)
                        return task.result()
                    if isinstance(error, McftError):
                        self._answered(link)
                    if not isinstance(error, _NoAnswer):
                        raise error
                    failures[link.address] = error.said
            return None
        finally:
            for task in running:
                # Its connection goes with it: nobody knows what is still under way on it.
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _attempts(self) -> Iterator[tuple[_Link, bool, float | None]]:
        """(link, on a fresh connection?, seconds until the next attempt; None: this is the last)."""
        links = sorted(self._links, key=lambda link: link.last_ok or 0.0, reverse=True)
        for position, link in enumerate(links):
            yield link, False, HEDGE_S if position < len(links) - 1 else FRESH_AFTER_S
        for position, link in enumerate(links):
            yield link, True, HEDGE_S if position < len(links) - 1 else None

    async def _greet(self, link: _Link) -> None:
        while True:
            try:
                async with asyncio.timeout(HELLO_DEADLINE_S):
                    self.last_hello = await link.post("hello", self._hello())
            except TimeoutError:
                self._silent(link, f"no answer within {HELLO_DEADLINE_S:g} s")
            except _NoAnswer as error:
                self._silent(link, error.said.reason)
            except McftError as error:
                self._silent(link, str(error))
            except Exception as error:
                log.exception("hello to %s failed inside", link)
                self._silent(link, f"{type(error).__name__}: {error}")
            else:
                self._answered(link)
            await asyncio.sleep(HELLO_EVERY_S * random.uniform(0.8, 1.2))

    def _answered(self, link: _Link) -> None:
        now = boottime_s()
        if not _recent(link.last_ok):
            link.since = now
        self._last_ok, self.detail = now, ""
        link.last_ok = now
        if link.trouble != "":
            log.info("%s answers", link)
            link.trouble = ""

    def _silent(self, link: _Link, reason: str) -> None:
        link.forget_connections()
        if not self.reachable:
            self.detail = reason
        if link.trouble != reason:
            log.warning("%s does not answer: %s", link, reason)
            link.trouble = reason


class _NoAnswer(Exception):
    """An attempt that brought no answer of the peer's agent; another link may."""

    def __init__(self, said: McftError) -> None:
        super().__init__(str(said))
        self.said = said


class _Link:
    """One address of a peer and its connections."""

    def __init__(self, config: Config, peer: Peer, address: str) -> None:
        self.address = address
        self.last_ok: float | None = None
        self.since: float | None = None  # the first answer after a gap
        self.trouble: str | None = None
        self._config = config
        self._peer = peer
        self._pool: _Pool | None = None

    def __str__(self) -> str:
        return f"{self._peer.name} ({self.address})"

    async def close(self) -> None:
        if self._pool is not None:
            await self._pool.session.close()
            self._pool = None

    def forget_connections(self) -> None:
        """Use none of the present connections any more; those in use are closed at the end of their call."""
        if self._pool is not None:
            self._pool.retire()
            self._pool = None

    async def post(self, verb: str, body: bytes, fresh: bool = False) -> bytes:
        """One attempt; its deadline is the caller's. Raises _NoAnswer, or the peer's McftError."""
        if fresh:
            self.forget_connections()
        fresh = self._pool is None
        try:
            if self._pool is None:
                self._pool = _Pool(tls.client_context(self._config))
            url = URL.build(scheme="https", host=self.address, port=self._peer.port, path=f"/v1/peer/{verb}")
            status, answer = await self._pool.post(url, body, self._peer.name)
        except McftError as error:
            raise _NoAnswer(Unreachable("peer-unreachable", error.message, str(error))) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _NoAnswer(self._said(error, fresh)) from error
        if status != 200:
            raise self._refusal(status, answer)
        return answer

    def _said(self, error: Exception, fresh: bool) -> McftError:
        causes = list(_causes(error))
        words = str(error) or type(error).__name__
        spoken = [c for c in causes if isinstance(c, ssl.SSLError) and not isinstance(c, _CUT)]
        # asyncio's TLS server sends no alert: whom it does not accept is cut off in the handshake.
        cut = fresh and any(isinstance(c, _CUT) or getattr(c, "errno", 0) == errno.ECONNRESET for c in causes)
        if not spoken and not cut:
            return Unreachable("peer-unreachable", f"{self} does not answer", words)
        return Refused(
            "peer-untrusted",
            f"{self} and this host do not trust each other's certificates",
            str(spoken[0]) if spoken else f"it cuts a new connection in the TLS handshake ({words})",
            f"both need certificates of one CA, and the other's must name {self._peer.name}",
        )

    def _refusal(self, status: int, answer: bytes) -> McftError:
        try:
            api.raise_error(msgspec.json.decode(answer, type=api.ErrorBody))
        except McftError as error:
            return error
        except msgspec.MsgspecError:
            pass
        return Failed("peer-garbled", f"{self} answered with HTTP {status} and no words of mcft's")


def _asked_after(address: tuple[Any, ...]) -> socket.socket:
    """A socket whose connection ends once its peer's kernel is silent for some 15 s, or does not know it (any more)."""
    family, kind, protocol, *_ = address
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, _ASK_AFTER_S),
        (socket.TCP_KEEPINTVL, _ASK_EVERY_S),
        (socket.TCP_KEEPCNT, _ASK_TIMES),
        (socket.TCP_USER_TIMEOUT, (_ASK_AFTER_S + _ASK_EVERY_S * _ASK_TIMES) * 1000),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    return sock


class _Pool:
    """A session that closes itself once it is retired and its last call is over."""

    def __init__(self, context: ssl.SSLContext) -> None:
        connector = aiohttp.TCPConnector(ssl=context, limit=0, keepalive_timeout=_IDLE_S, socket_factory=_asked_after)
        self.session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),
        )
        self._busy = 0
        self._retired = False
        self._closing: asyncio.Task[None] | None = None

    async def post(self, url: URL, body: bytes, server_hostname: str) -> tuple[int, bytes]:
        self._busy += 1
        try:
            async with self.session.post(
                url, data=body, server_hostname=server_hostname, allow_redirects=False
            ) as answer:
                return answer.status, await answer.read()
        finally:
            self._busy -= 1
            self._close_if_over()

    def retire(self) -> None:
        self._retired = True
        self._close_if_over()

    def _close_if_over(self) -> None:
        if self._retired and not self._busy and self._closing is None:
            self._closing = asyncio.ensure_future(self.session.close())


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        inner = getattr(error, "os_error", None) or getattr(error, "certificate_error", None)
        error = inner or error.__cause__
