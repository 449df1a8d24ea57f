"""I/O: etcd's v3 API by its JSON gateway (`/v3/kv/txn`, `/v3/kv/range`, `/v3/auth/authenticate`), over aiohttp.

One question goes to the endpoint that answered last; where that one does not answer in its share of the time, to the next.
All of mcft's questions may reach etcd twice without harm (`etcd.py`). Every read is linearizable. A token that etcd does
not know any more is renewed, and the question asked again: it was refused, not done.
"""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
from types import SimpleNamespace
from typing import Any

import aiohttp

from mcft.arbiter.etcd import Create, Read, Reply, Swap
from mcft.config import Etcd
from mcft.errors import Failed, McftError

LEAST_SHARE_S = 0.2
CONNECT_SHARE = 0.5  # of an attempt's time
# gRPC's codes of answers which say that nothing was done: InvalidArgument, PermissionDenied, Unauthenticated.
NOT_DONE = (3, 7, 16)
UNAUTHENTICATED = 16


class NoReply(Exception):
    """No answer that counts. sent: the question may have reached etcd, and may still be carried out."""

    def __init__(self, why: str, *, sent: bool) -> None:
        super().__init__(why)
        self.sent = sent


class _Answered(Exception):
    """etcd answered with an error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class EtcdHttp:
    """One etcd. Make it on the loop; `await close()` at the end."""

    def __init__(self, settings: Etcd) -> None:
        """Raises: Failed ("etcd-files") if a certificate or the password can't be read."""
        self._settings = settings
        self._tls = _tls(settings)
        self._password = _password(settings)
        self._sessions: dict[str, aiohttp.ClientSession] = {}
        self._first = 0  # the endpoint that answered last
        self._token = ""

    async def ask(self, what: Create | Swap | Read, timeout_ms: float) -> Reply:
        """One question. Raises: NoReply."""
        path, body = request(what)
        deadline = asyncio.get_running_loop().time() + timeout_ms / 1000
        share_s = max(timeout_ms / 1000 / len(self._settings.endpoints), LEAST_SHARE_S)
        sent, why = False, "no time"
        for turn in range(len(self._settings.endpoints)):
            left_s = min(share_s, deadline - asyncio.get_running_loop().time())
            if left_s <= 0:
                break
            position = (self._first + turn) % len(self._settings.endpoints)
            try:
                answer = await self._authorised(self._settings.endpoints[position], path, body, left_s)
                reply = parse(what, answer)
            except NoReply as error:
                sent, why = sent or error.sent, str(error)
                continue
            self._first = position
            return reply
        self._first = (self._first + 1) % len(self._settings.endpoints)
        raise NoReply(why, sent=sent)

    async def delete(self, key: str) -> None:
        """Best effort: the key of a protection that is over."""
        body = {"key": _b64(key)}
        for endpoint in self._settings.endpoints:
            try:
                await self._authorised(endpoint, "/v3/kv/deleterange", body, 1.0)
            except NoReply:
                continue
            return

    async def close(self) -> None:
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()

    async def _authorised(self, endpoint: str, path: str, body: dict[str, Any], within_s: float) -> dict[str, Any]:
        try:
            async with asyncio.timeout(within_s):
                if self._settings.user and not self._token:
                    await self._authenticate(endpoint, within_s)
                try:
                    return await self._post(endpoint, path, body, within_s)
                except _Answered as error:
                    if error.code != UNAUTHENTICATED or not self._settings.user:
                        raise
                    await self._authenticate(endpoint, within_s)
                    return await self._post(endpoint, path, body, within_s)
        except _Answered as error:
            raise NoReply(f"{endpoint}: {error}", sent=error.code not in NOT_DONE) from None
        except TimeoutError:
            raise NoReply(f"{endpoint}: no answer within {within_s:g} s", sent=True) from None

    async def _authenticate(self, endpoint: str, within_s: float) -> None:
        self._token = ""
        who = {"name": self._settings.user, "password": self._password}
        try:
            self._token = str((await self._post(endpoint, "/v3/auth/authenticate", who, within_s))["token"])
        except (KeyError, NoReply) as error:
            raise NoReply(f"{endpoint}: no token for user {self._settings.user}: {error}", sent=False) from None
        except _Answered as error:
            raise NoReply(f"{endpoint}: user {self._settings.user}: {error}", sent=False) from None

    async def _post(self, endpoint: str, path: str, body: dict[str, Any], within_s: float) -> dict[str, Any]:
        handed = SimpleNamespace(over=False)
        headers = {"Authorization": self._token} if self._token else {}
        limits = aiohttp.ClientTimeout(total=within_s, sock_connect=within_s * CONNECT_SHARE)
        try:
            async with self._session(endpoint).post(
                endpoint + path, data=json.dumps(body), headers=headers, timeout=limits, trace_request_ctx=handed
            ) as answer:
                text = await answer.read()
                said = json.loads(text)
        except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
            await self._forget(endpoint)
            raise NoReply(f"{endpoint}: {error or type(error).__name__}", sent=handed.over) from None
        if not isinstance(said, dict):
            raise NoReply(f"{endpoint} answered in words that mcft does not know", sent=True)
        if answer.status != 200:
            raise _Answered(int(said.get("code") or 0), str(said.get("message") or said.get("error") or answer.status))
        return said

    def _session(self, endpoint: str) -> aiohttp.ClientSession:
        if endpoint not in self._sessions:
            trace = aiohttp.TraceConfig()
            # From here on bytes of it may leave: a refused connection never gets as far.
            trace.on_connection_create_end.append(_handed_over)
            trace.on_connection_reuseconn.append(_handed_over)
            self._sessions[endpoint] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=self._tls if self._tls is not None else True, limit=0),
                cookie_jar=aiohttp.DummyCookieJar(), trace_configs=[trace],
            )  # fmt: skip
        return self._sessions[endpoint]

    async def _forget(self, endpoint: str) -> None:
        """Its connections may be dead without having been closed."""
        if (session := self._sessions.pop(endpoint, None)) is not None:
            await session.close()


async def _handed_over(_session: Any, context: Any, _params: Any) -> None:
    context.trace_request_ctx.over = True


# ---- words ----


def request(what: Create | Swap | Read) -> tuple[str, dict[str, Any]]:
    """Path and JSON of a question. etcd's JSON gateway: keys and values in base64, 64-bit numbers as text."""
    key = _b64(what.key)
    read = {"key": key, "serializable": False}
    if isinstance(what, Read):
        return "/v3/kv/range", read
    if isinstance(what, Create):
        compare = [{"key": key, "target": "CREATE", "result": "EQUAL", "create_revision": "0"}]
        put = what.value
    else:
        compare = [
            {"key": key, "target": "VALUE", "result": "EQUAL", "value": _b64(what.value)},
            {"key": key, "target": "MOD", "result": "EQUAL", "mod_revision": str(what.mod_revision)},
        ]
        put = what.put
    success = [{"request_put": {"key": key, "value": _b64(put)}}]
    return "/v3/kv/txn", {"compare": compare, "success": success, "failure": [{"request_range": read}]}


def parse(what: Create | Swap | Read, answer: dict[str, Any]) -> Reply:
    """Raises: NoReply for an answer that is not etcd's."""
    try:
        header = answer["header"]
        cluster, revision = str(header["cluster_id"]), int(header["revision"])
        if isinstance(what, Read):
            rows = answer.get("kvs") or []
            succeeded = False
        else:
            succeeded = bool(answer.get("succeeded", False))
            rows = [] if succeeded else answer["responses"][0]["response_range"].get("kvs") or []
        if not rows:
            return Reply(cluster, revision, succeeded)
        value = base64.b64decode(rows[0].get("value", "")).decode(errors="replace")
        return Reply(cluster, revision, succeeded, value, int(rows[0]["mod_revision"]))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise NoReply(f"etcd answered in words that mcft does not know: {error!r}", sent=True) from None


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _tls(settings: Etcd) -> ssl.SSLContext | None:
    if not any(endpoint.startswith("https://") for endpoint in settings.endpoints):
        return None
    try:
        context = ssl.create_default_context(cafile=str(settings.ca) if settings.ca else None)
        if settings.cert is not None:
            context.load_cert_chain(settings.cert, settings.key)
    except (OSError, ssl.SSLError) as error:
        so = "look at [etcd] ca, cert and key"
        raise Failed("etcd-files", "the certificates for etcd can't be used", str(error), so) from None
    return context


def _password(settings: Etcd) -> str:
    if settings.password_file is None:
        return ""
    try:
        return settings.password_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(settings, error) from None


def _unreadable(settings: Etcd, error: Exception) -> McftError:
    return Failed("etcd-files", f"the password for etcd can't be read from {settings.password_file}", str(error))
