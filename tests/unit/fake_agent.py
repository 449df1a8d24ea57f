"""A fake agent for the CLI's and the client's tests: canned answers by route, nothing behind them.

It speaks HTTP over a unix socket or TLS; what it was asked is kept in `asked`.
"""

from __future__ import annotations

import queue
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import BaseServer, TCPServer, ThreadingMixIn, UnixStreamServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import msgspec

from mcft import api

BREAK = object()  # close the connection instead of an answer
HOLD = object()  # answer nothing until the test ends

PROTECTED = api.Protection(
    domain="vm1", uuid="6a1e…", instance="i1", role="primary", peer="host2", engine="colo",
    state="protected", guest_running=True, output_flowing=True, survives_host_loss=True, generation=3,
    since="2026-01-01T00:00:00Z",
    checkpoints=api.Checkpoints(1234, 9.8, 43.0, api.Quantiles(4.1, 9.9)),
    network=api.Network("plug", 1230, 4, api.Quantiles(61, 110), [api.NicStatus("vnet0", 3, 412, 0, "mcft-vnet0")]),
    disks=[api.DiskStatus("vda", "replicating")], keepalive=[api.LinkStatus("udp", "10.99.0.2", 21.0)],
    last_event=api.EventBody(7, "2026-01-01T00:00:01Z", "vm1", "protected", "protected in generation 3"),
)  # fmt: skip


def changed(**fields: Any) -> api.Protection:
    """`PROTECTED` with other fields."""
    return msgspec.structs.replace(PROTECTED, **fields)


def status(*protections: api.Protection) -> api.Status:
    return api.Status("host1", list(protections))


def job(state: str = "running", **fields: Any) -> api.JobBody:
    return msgspec.convert(
        {"id": "j1", "kind": "protect", "domain": "vm1", "state": state, **fields}, api.JobBody
    )


class FakeAgent:
    """Answers each route with what it was told, in order; the last answer repeats."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.arrivals: queue.Queue[str] = queue.Queue()
        self.released = threading.Event()
        self._answers: dict[str, list[tuple[int, Any]]] = {}

    def say(self, route: str, *answers: Any, code: int = 200) -> FakeAgent:
        """route: "GET /v1/status". answers: API objects, bytes, BREAK or HOLD."""
        self._answers.setdefault(route, []).extend((code, answer) for answer in answers)
        return self

    def refuse(self, route: str, error: Exception, code: int) -> FakeAgent:
        return self.say(route, api.error_body(error), code=code)

    def routes(self) -> list[str]:
        return [route for route, _, _ in self.asked]

    def answer(self, route: str) -> tuple[int, Any]:
        answers = self._answers.get(route)
        if not answers:
            return 404, api.ErrorBody("no-route", f"the fake has no answer for {route}", exit_code=1)
        return answers.pop(0) if len(answers) > 1 else answers[0]


def _handler(agent: FakeAgent) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            route = f"{self.command} {url.path}"
            length = int(self.headers.get("Content-Length") or 0)
            body = msgspec.json.decode(self.rfile.read(length)) if length else None
            agent.asked.append((route, dict(parse_qsl(url.query)), body))
            agent.arrivals.put(route)
            code, answer = agent.answer(route)
            if answer is HOLD:
                agent.released.wait()
            if answer in (BREAK, HOLD):
                return
            payload = answer if isinstance(answer, bytes) else msgspec.json.encode(answer)
            self.send_response(code)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            """Quiet; and a unix socket has no address to log."""

    return Handler


class _UnixServer(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True
    block_on_close = False


class _TlsServer(ThreadingMixIn, TCPServer):
    daemon_threads = True
    block_on_close = False
    context: ssl.SSLContext

    def finish_request(self, request: Any, client_address: Any) -> None:
        with self.context.wrap_socket(request, server_side=True) as wrapped:
            super().finish_request(wrapped, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A failed handshake is a test's purpose, not noise."""


@contextmanager
def on_socket(path: Path) -> Iterator[FakeAgent]:
    agent = FakeAgent()
    with _serving(agent, _UnixServer(str(path), _handler(agent))):
        yield agent


@contextmanager
def on_tls(context: ssl.SSLContext) -> Iterator[tuple[FakeAgent, int]]:
    """A fake on 127.0.0.1 and its port."""
    agent = FakeAgent()
    server = _TlsServer(("127.0.0.1", 0), _handler(agent))
    server.context = context
    with _serving(agent, server):
        yield agent, server.server_address[1]


@contextmanager
def _serving(agent: FakeAgent, server: BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        agent.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
