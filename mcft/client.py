"""The agent's API from outside: over this host's unix socket, or over TLS to a configured peer.

Stdlib only beside msgspec, so that `mcft status` starts fast. Every call is one connection and one
request; all failures are `errors.McftError`: what the agent refused as it said it, `Unreachable` where
no agent answered.
"""

from __future__ import annotations

import http.client
import os
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from mcft import api, errors, units

if TYPE_CHECKING:
    import ssl

    from mcft.config import Config

DEFAULT_SOCKET = Path("/run/mcft/agent.sock")
SOCKET_VARIABLE = "MCFT_SOCKET"

CONNECT_S = 5.0
# What an answer may take beyond the time that a long poll asked for: a busy host, not a dead one.
ANSWER_S = 30.0
POLL_S = 1.0
# An agent that is being restarted or upgraded comes back within this; its jobs went on meanwhile.
PATIENCE_S = 30.0
RETRY_S = 0.5

Verb = Literal["unprotect", "failover", "solo", "start"]
_T = TypeVar("_T")


class Client:
    """One agent, by the way to reach it. Build with `local` or `to_peer`."""

    def __init__(self, connections: list[http.client.HTTPConnection], silent: errors.Unreachable) -> None:
        """connections: the ways to this agent, tried in turn. silent: what to raise if none answers."""
        self._connections, self._silent = connections, silent

    # ---- one method per route ----

    def status(self, domain: str | None = None) -> api.Status:
        """What the agent protects; `NotFound` if a domain is named that is not among it."""
        return self.status_with_json(domain)[0]

    def status_with_json(self, domain: str | None = None) -> tuple[api.Status, bytes]:
        """The same, and the agent's own JSON: it may have fields that this version does not know."""
        raw = self._request("GET", _route("status", domain=domain))
        status = _decode(raw, api.Status)
        if domain is not None and not status.protections:
            raise errors.NotFound("no-such-protection", f"{status.host} has no protection of {domain}")
        return status, raw

    def protect(self, request: api.ProtectRequest) -> api.JobBody:
        return _decode(self._request("POST", _route("protections"), request), api.JobBody)

    def check(self, request: api.ProtectRequest) -> tuple[api.Check, bytes]:
        """What `protect` would say to this request, and the agent's own JSON of it. Takes some seconds."""
        raw = self._request("POST", _route("check"), request)
        return _decode(raw, api.Check), raw

    def act(self, domain: str, verb: Verb, request: api.ActRequest) -> api.JobBody:
        return _decode(self._request("POST", _route("protections", domain, verb), request), api.JobBody)

    def maintenance(self, request: api.MaintenanceRequest) -> api.JobBody:
        return _decode(self._request("POST", _route("maintenance"), request), api.JobBody)

    def set(self, domain: str, request: api.SetRequest) -> api.Protection:
        return _decode(self._request("POST", _route("protections", domain, "set"), request), api.Protection)

    def job(self, job_id: str, wait_s: float = 0.0) -> api.JobBody:
        """A job as it stands, after wait_s seconds at the latest: the agent answers when it changes."""
        return _decode(
            self._request("GET", _route("jobs", job_id, wait_s=wait_s), wait_s=wait_s), api.JobBody
        )

    def cancel(self, job_id: str) -> api.JobBody:
        return _decode(self._request("POST", _route("jobs", job_id, "cancel")), api.JobBody)

    def events(self, domain: str | None = None, after: int = 0, wait_s: float = 0.0) -> api.Events:
        """The journal's lines with an id above after; waits up to wait_s seconds for the first one."""
        route = _route("events", domain=domain, after=after, wait_s=wait_s)
        return _decode(self._request("GET", route, wait_s=wait_s), api.Events)

    def peers(self) -> api.Peers:
        return _decode(self._request("GET", _route("peers")), api.Peers)

    # ---- waiting, through restarts of the agent ----

    def follow_job(self, job: api.JobBody, timeout_s: float | None = None) -> Iterator[api.JobBody]:
        """Yield a job as it changes, last its end (done, failed or cancelled). Raises `TimedOut`."""
        clock = _Deadline(timeout_s)
        yield job
        while job.state == "running":
            if clock.left_s() <= 0:
                raise errors.TimedOut(
                    "still-running",
                    f"{job.kind} of {job.domain} still goes on after {clock}",
                    job.step,
                    f"see mcft status {job.domain}",
                )
            wait_s = min(POLL_S, clock.left_s())
            job = _patiently(clock, partial(self.job, job.id, wait_s))
            yield job

    def wait_state(
        self, domain: str, wanted: frozenset[str], timeout_s: float | None = None
    ) -> api.Protection:
        """Wait until a protection is in one of the wanted states.

        Raises `TimedOut`, `NotFound`, and `Failed` once the state is `failed`: it stays so by itself.
        """
        clock = _Deadline(timeout_s)
        protection = self._once_begun(domain, clock)
        while protection.state not in wanted:
            if protection.state == "failed":
                raise errors.Failed(
                    "protection-failed", f"the protection of {domain} has failed", protection.reason or "",
                    protection.next_step or f"mcft events {domain}",
                )  # fmt: skip
            if clock.left_s() <= 0:
                raise errors.TimedOut(
                    "still-waiting",
                    f"{domain} is {protection.state} after {clock}",
                    protection.reason or "",
                    f"see mcft status {domain}",
                )
            # A change of state writes an event; a second's poll stands behind that.
            after = protection.last_event.id if protection.last_event else 0
            wait_s = min(POLL_S, clock.left_s())
            _patiently(clock, partial(self.events, domain, after, wait_s))
            protection = _patiently(clock, partial(self.status, domain)).protections[0]
        return protection

    def _once_begun(self, domain: str, clock: _Deadline) -> api.Protection:
        """A `protect` that was accepted looks first, for seconds where a host is silent; it may still refuse."""
        ask = partial(self.status, domain)
        while True:
            try:
                return ask().protections[0]
            except errors.NotFound as error:
                if error.code != "not-yet":
                    raise
                if clock.left_s() <= 0:
                    raise errors.TimedOut("still-waiting", error.message, error.reason, error.next_step) from None
                ask = partial(_patiently, clock, partial(self.status, domain))
            time.sleep(min(RETRY_S, max(clock.left_s(), 0.0)))

    def follow_events(self, domain: str | None = None, wait_s: float = ANSWER_S) -> Iterator[api.EventBody]:
        """Yield the journal and then every new line, until an agent stays away."""
        after, forever = 0, _Deadline(None)
        while True:
            answer = _patiently(forever, partial(self.events, domain, after, wait_s))
            for event in answer.events:
                after = max(after, event.id)
                yield event

    # ---- one request ----

    def _request(
        self, method: str, route: str, body: msgspec.Struct | None = None, wait_s: float = 0.0
    ) -> bytes:
        connection = self._connect()
        try:
            assert connection.sock is not None
            connection.sock.settimeout(wait_s + ANSWER_S)
            payload = msgspec.json.encode(body) if body is not None else None
            connection.request(
                method, route, payload, {"Content-Type": "application/json", "Connection": "close"}
            )
            answer = connection.getresponse()
            raw = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(method, error) from error
        finally:
            connection.close()
        if answer.status >= 400:
            _raise_answer(raw, answer.status)
        return raw

    def _connect(self) -> http.client.HTTPConnection:
        causes: list[str] = []
        for connection in self._connections:
            try:
                connection.connect()
                return connection
            except PermissionError as error:
                raise errors.Unreachable(
                    "agent-forbidden", "you may not speak to this host's agent", str(error),
                    "be root, or a member of the group libvirt",
                ) from error  # fmt: skip
            except OSError as error:
                connection.close()
                causes.append(f"{connection.host}: {error.strerror or error}")
        reason = "; ".join(causes)
        raise errors.Unreachable(self._silent.code, self._silent.message, reason, self._silent.next_step)

    def _broken(self, method: str, error: Exception) -> errors.Unreachable:
        reason = (
            "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
        )
        if method == "POST":
            reason += "; the request may have arrived, `mcft status` tells"
        message = "the agent broke off before it answered"
        return errors.Unreachable("agent-silent", message, reason, self._silent.next_step)


def local(path: Path | None = None) -> Client:
    """The agent of this host. path: its socket; else the environment's MCFT_SOCKET; else the default."""
    path = path or Path(os.environ.get(SOCKET_VARIABLE) or DEFAULT_SOCKET)
    message = "the agent on this host does not answer"
    silent = errors.Unreachable("no-agent", message, "", "systemctl status mcft-agent")
    return Client([_UnixConnection(path)], silent)


def to_peer(config: Config, name: str) -> Client:
    """The agent of a configured peer, over TLS with this host's client certificate.

    Raises `NotFound` for an unconfigured name and `Usage` for certificates that cannot be read.
    """
    peer = config.peer(name)
    context = _tls_context(config)
    message = f"the agent on {name} does not answer"
    silent = errors.Unreachable("no-agent", message, "", f"on {name}: systemctl status mcft-agent")
    ways: list[http.client.HTTPConnection] = [
        _TlsConnection(address, peer.port, name, context) for address in peer.addresses
    ]
    return Client(ways, silent)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=CONNECT_S)
        self._path = path

    def connect(self) -> None:
        self.host = str(self._path)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CONNECT_S)
        self.sock.connect(self.host)

    def putrequest(
        self, method: str, url: str, skip_host: bool = False, skip_accept_encoding: bool = False
    ) -> None:
        # self.host is the socket's path, for messages; in a Host header it would be malformed.
        super().putrequest(method, url, skip_host=True, skip_accept_encoding=True)
        self.putheader("Host", "localhost")


class _TlsConnection(http.client.HTTPConnection):
    """TLS to an address, of a server that must prove to be `name` (not the address, as https would ask)."""

    def __init__(self, address: str, port: int, name: str, context: ssl.SSLContext) -> None:
        super().__init__(address, port, timeout=CONNECT_S)
        self._name, self._context = name, context

    def connect(self) -> None:
        plain = socket.create_connection((self.host, self.port), timeout=CONNECT_S)
        try:
            self.sock = self._context.wrap_socket(plain, server_hostname=self._name)
        except OSError:
            plain.close()
            raise


def _tls_context(config: Config) -> ssl.SSLContext:
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    reading: Path = config.ca_cert
    try:
        context.load_verify_locations(config.ca_cert)
        reading = config.client_cert
        # load_cert_chain does not say which of its two files is missing.
        for reading in (config.client_cert, config.client_key):
            reading.open("rb").close()
        context.load_cert_chain(config.client_cert, config.client_key)
    except OSError as error:
        raise errors.Usage(
            "bad-certificates", f"the TLS file {reading} cannot be used", error.strerror or str(error),
            "asking another host needs this host's certificates and, as a rule, root",
        ) from error  # fmt: skip
    return context


class _Deadline:
    def __init__(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._end_s = None if timeout_s is None else time.monotonic() + timeout_s

    def left_s(self) -> float:
        return float("inf") if self._end_s is None else self._end_s - time.monotonic()

    def __str__(self) -> str:
        return units.format_duration_ms((self._timeout_s or 0) * 1000)


def _patiently(clock: _Deadline, call: Callable[[], _T]) -> _T:
    """Call again while the agent is away, up to `PATIENCE_S` and not beyond the deadline."""
    give_up_s = time.monotonic() + min(PATIENCE_S, max(clock.left_s(), 0.0))
    while True:
        try:
            return call()
        except errors.Unreachable:
            if time.monotonic() >= give_up_s:
                raise
            time.sleep(RETRY_S)


def _route(*path: str, **query: str | float | None) -> str:
    given = {key: value for key, value in query.items() if value is not None}
    route = "/v1/" + "/".join(quote(part, safe="") for part in path)
    return f"{route}?{urlencode(given)}" if given else route


def _decode(raw: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.DecodeError as error:
        raise errors.Failed(
            "bad-answer",
            "the agent's answer is not understood",
            str(error),
            "bring mcft on both hosts to one version",
        ) from error


def _raise_answer(raw: bytes, status: int) -> NoReturn:
    try:
        body = msgspec.json.decode(raw, type=api.ErrorBody)
    except msgspec.DecodeError:
        body = api.ErrorBody(
            "bad-answer", f"the agent answered with HTTP {status} and no reason", "", "see its log"
        )
    api.raise_error(body)
    raise AssertionError("raise_error returned")
