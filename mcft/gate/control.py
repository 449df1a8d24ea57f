"""The gate's side of its talk with the agent: JSON lines on a unix socket, requests with ids, notes without.

Request `{"id": 1, "do": "hold", …}` → `{"id": 1, "ok": …}` or `{"id": 1, "error": "…"}`; notes `{"note": "verdict", …}` go to
every agent that is connected. Id 0: nobody waits, so nothing is answered. An agent that died leaves nothing behind; the next one
connects and asks `status`.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mcft.faults import die_at
from mcft.gate.loop import Loop

NO_ANSWER = 0  # the id of such a request
Answer = Callable[[Any], None]
Handler = Callable[[str, dict[str, Any], Answer], None]


class Denied(Exception):
    """A request that this gate must not carry out in its state; its text goes to the agent."""


@dataclass
class _Client:
    sock: socket.socket
    rest: bytes = b""
    unsent: bytearray = field(default_factory=bytearray)


@dataclass
class Control:
    """Listens, parses, answers. handler(do, request, answer) may answer at once or later."""

    path: str
    loop: Loop
    handler: Handler
    on_agent: Callable[[bool], None] | None = None  # one came (True), or the last one left
    _clients: list[_Client] = field(default_factory=list)
    _server: socket.socket | None = None

    @property
    def connected(self) -> bool:
        """Whether an agent is there."""
        return bool(self._clients)

    def listen(self) -> None:
        """Take the path over from a dead predecessor (only one gate of a name runs: systemd sees to it)."""
        if os.path.exists(self.path):
            os.unlink(self.path)
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        server.bind(self.path)
        os.chmod(self.path, 0o600)
        server.listen(4)
        server.setblocking(False)
        self._server = server
        self.loop.watch(server, selectors.EVENT_READ, self._accept)

    def _accept(self, _events: int) -> None:
        assert self._server is not None
        try:
            sock, _ = self._server.accept()
        except OSError:
            return
        sock.setblocking(False)
        client = _Client(sock)
        self._clients.append(client)
        self.loop.watch(sock, selectors.EVENT_READ, lambda events: self._ready(client, events))
        if self.on_agent is not None:
            self.on_agent(True)

    def _ready(self, client: _Client, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush(client)
        if not events & selectors.EVENT_READ:
            return
        try:
            data = client.sock.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._gone(client)
            return
        *lines, client.rest = (client.rest + data).split(b"\n")
        for line in lines:
            self._request(client, line)

    def _request(self, client: _Client, line: bytes) -> None:
        try:
            request = json.loads(line)
            ident, do = request["id"], request["do"]
        except (ValueError, KeyError, TypeError):
            self._gone(client)
            return

        point = f"{do} {request['record']}" if "record" in request else do

        def answer(result: Any) -> None:
            die_at(f"after {point}")
            if ident == NO_ANSWER:
                return
            body = {"id": ident, "error": str(result)} if isinstance(result, Exception) else {"id": ident, "ok": result}
            self._send(client, body)

        die_at(f"before {point}")
        try:
            self.handler(do, request, answer)
        except Denied as error:
            answer(error)

    def note(self, kind: str, **fields: Any) -> None:
        """Tell every connected agent."""
        for client in list(self._clients):
            self._send(client, {"note": kind, **fields})

    def _send(self, client: _Client, body: dict[str, Any]) -> None:
        client.unsent += json.dumps(body, separators=(",", ":")).encode() + b"\n"
        self._flush(client)

    def _flush(self, client: _Client) -> None:
        try:
            while client.unsent:
                del client.unsent[: client.sock.send(client.unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._gone(client)
            return
        if len(client.unsent) > 4 << 20:  # an agent that does not read is as good as none
            self._gone(client)
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.unsent else 0)
        self.loop.watch(client.sock, wanted, lambda events: self._ready(client, events))

    def _gone(self, client: _Client) -> None:
        was_there = client in self._clients
        if was_there:
            self._clients.remove(client)
        self.loop.forget(client.sock)
        client.sock.close()
        if was_there and not self._clients and self.on_agent is not None:
            self.on_agent(False)
