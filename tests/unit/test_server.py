"""The API's server: routes, authorisation, and clients that mean no good."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import stat
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from agentlab import FakeCore, Pki, client_tls, config

from mcft.agent.listening import Limits
from mcft.agent.server import Server
from mcft.errors import Failed, Refused

QUICK = Limits(head_s=1.0, body_s=1.0, handshake_s=1.0)


@pytest.fixture
def limits(request: pytest.FixtureRequest) -> Limits:
    """The server's limits; a test may give others."""
    given = getattr(request, "param", Limits())
    assert isinstance(given, Limits)
    return given


@pytest_asyncio.fixture
async def scene(tmp_path: Path, limits: Limits) -> AsyncIterator[SimpleNamespace]:
    """A server of host1, whose peer is host2."""
    pki = Pki(tmp_path / "pki")
    core = FakeCore()
    server = Server(config(tmp_path, pki.host("host1")), core, limits)
    await server.start()
    sessions: list[aiohttp.ClientSession] = []

    def local() -> aiohttp.ClientSession:
        sessions.append(aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(server.config.socket_path))))
        return sessions[-1]

    def remote(context: ssl.SSLContext) -> aiohttp.ClientSession:
        sessions.append(aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)))
        return sessions[-1]

    async def raw(context: ssl.SSLContext | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if context is None:
            return await asyncio.open_unix_connection(server.config.socket_path)
        return await asyncio.open_connection("127.0.0.1", server.ports[0], ssl=context, server_hostname="host1")

    yield SimpleNamespace(server=server, core=core, pki=pki, local=local, remote=remote, raw=raw, tmp=tmp_path)
    for session in sessions:
        await session.close()
    if core.hold:
        core.hold.set()
    await core.jobs.close()
    await server.stop()


async def ask(session: aiohttp.ClientSession, method: str, path: str, **kwargs: Any) -> tuple[int, Any]:
    async with session.request(method, f"http://agent{path}", **kwargs) as answer:
        return answer.status, json.loads(await answer.read())


async def ask_tls(scene: SimpleNamespace, name: str, method: str, path: str, **kwargs: Any) -> tuple[int, Any]:
    session = scene.remote(client_tls(scene.pki.host(name)))
    url = f"https://127.0.0.1:{scene.server.ports[0]}{path}"
    async with session.request(method, url, server_hostname="host1", **kwargs) as answer:
        return answer.status, json.loads(await answer.read())


async def lives(scene: SimpleNamespace) -> bool:
    return await ask(scene.local(), "GET", "/v1/status") == (
        200,
        {"host": "host1", "protections": [], "version": 1, "maintenance": False},
    )


async def test_the_socket_is_the_groups(scene: SimpleNamespace) -> None:
    mode = scene.server.config.socket_path.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o660


async def test_operators_routes(scene: SimpleNamespace) -> None:
    http = scene.local()
    assert (await ask(http, "GET", "/v1/status?domain=vm1"))[0] == 200
    assert (await ask(http, "GET", "/v1/peers"))[1] == {"host": "host1", "peers": []}
    status, job = await ask(http, "POST", "/v1/protections", json={"domain": "vm1", "to": "host2", "key": "k"})
    assert (status, job["kind"], job["domain"]) == (200, "protect", "vm1")
    assert (await ask(http, "GET", f"/v1/jobs/{job['id']}?wait_s=5"))[1]["state"] == "done"
    for verb in ("unprotect", "failover", "solo"):
        status, job = await ask(http, "POST", f"/v1/protections/my%20vm-{verb}/{verb}", json={"force": True})
        assert (status, job["kind"], job["domain"]) == (200, verb, f"my vm-{verb}")
        assert scene.core.acts[-1][2].force
    status, body = await ask(http, "POST", "/v1/protections/vm1/set", json={"delay_ms": 50})
    assert (status, body["state"]) == (200, "protected")
    assert scene.core.acts[-1][2].delay_ms == 50
    status, body = await ask(http, "POST", "/v1/check", json={"domain": "vm1", "to": "host2", "disks": {"vda": "/a"}})
    assert (status, body["domain"], body["peer"], body["exit_code"]) == (200, "vm1", "host2", 0)
    assert scene.core.acts[-1][1].disks == {"vda": "/a"}


async def test_jobs_are_polled_and_cancelled(scene: SimpleNamespace) -> None:
    scene.core.hold = asyncio.Event()
    http = scene.local()
    _, job = await ask(http, "POST", "/v1/protections", json={"domain": "vm1", "to": "host2"})
    assert (await ask(http, "GET", f"/v1/jobs/{job['id']}?wait_s=0.01"))[1]["state"] == "running"
    status, error = await ask(http, "POST", "/v1/protections/vm1/solo")
    assert (status, error["code"], error["exit_code"]) == (409, "busy", 4)
    await ask(http, "POST", f"/v1/jobs/{job['id']}/cancel")
    assert (await ask(http, "GET", f"/v1/jobs/{job['id']}?wait_s=5"))[1]["state"] == "cancelled"
    assert (await ask(http, "GET", "/v1/jobs/none"))[0] == 404


async def test_events_are_followed(scene: SimpleNamespace) -> None:
    http = scene.local()
    follower = asyncio.create_task(ask(http, "GET", "/v1/events?domain=vm1&after=0&wait_s=5"))
    scene.core.events.emit("vm2", "other", "no")
    scene.core.events.emit("vm1", "protected", "yes")
    status, body = await follower
    assert (status, [event["text"] for event in body["events"]]) == (200, ["yes"])


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/", None, 404),
        ("GET", "/v1/nothing", None, 404),
        ("POST", "/v1/protections/vm1/destroy", b"{}", 404),
        ("POST", "/v1/peer/hello", b"{}", 404),  # peers' routes are not on the operators' socket
        ("DELETE", "/v1/status", None, 405),
        ("GET", "/v1/protections", None, 405),
        ("GET", "/v1/status?domain=none", None, 404),
        ("POST", "/v1/protections", b"", 400),
        ("POST", "/v1/protections", b"{", 400),
        ("POST", "/v1/protections", b"\xff\xfe", 400),
        ("POST", "/v1/protections", b"[]", 400),
        ("POST", "/v1/protections", b'{"domain": 1, "to": "host2"}', 400),
        ("POST", "/v1/protections", b'{"domain": "vm1", "to": "host2", "engine": "magic"}', 400),
        ("POST", "/v1/protections", b"[" * 100_000, 400),
        ("POST", "/v1/protections", b"x" * ((1 << 20) + 1), 413),
        ("GET", "/v1/events?after=x", None, 400),
        ("GET", "/v1/events?wait_s=nan", None, 400),
        ("GET", "/v1/events?wait_s=-1", None, 400),
        ("GET", "/v1/events?after=1e400", None, 400),
    ],
)
async def test_bad_requests_are_refused_in_words(
    scene: SimpleNamespace, method: str, path: str, body: bytes | None, status: int
) -> None:
    answered, error = await ask(scene.local(), method, path, data=body)
    assert answered == status
    assert error["code"]
    assert error["message"]
    assert error["exit_code"] in (2, 3)
    assert await lives(scene)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Refused("unsafe", "no"), 409, "unsafe"),
        (Failed("f", "x"), 500, "f"),
        (ZeroDivisionError("oops"), 500, "internal"),
        (TimeoutError(), 500, "internal"),
    ],
)
async def test_the_cores_errors_are_carried(scene: SimpleNamespace, error: Exception, status: int, code: str) -> None:
    scene.core.error = error
    answered, body = await ask(scene.local(), "POST", "/v1/protections", json={"domain": "vm1", "to": "host2"})
    assert (answered, body["code"]) == (status, code)
    assert await lives(scene)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"hello\r\n\r\n",
        b"GET /v1/status HTTP/9.9\r\n\r\n",
        b"GET /v1/status HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /v1/protections HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
async def test_garbage_is_answered_in_words_or_cut(scene: SimpleNamespace, garbage: bytes) -> None:
    reader, writer = await scene.raw()
    writer.write(garbage)
    writer.write_eof()
    async with asyncio.timeout(5):
        answer = await reader.read()
    if answer:
        assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400"))
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "bad-request"
    writer.close()
    assert await lives(scene)


@pytest.mark.parametrize("limits", [QUICK], indirect=True)
@pytest.mark.parametrize("sent", [b"", b"GET /v1/sta", b"GET /v1/status HTTP/1.1\r\nHost: a\r\nX-"])
@pytest.mark.parametrize("by_tls", [False, True])
async def test_a_slow_head_is_cut(scene: SimpleNamespace, sent: bytes, by_tls: bool) -> None:
    reader, writer = await scene.raw(client_tls(scene.pki.host("host2")) if by_tls else None)
    writer.write(sent)

    async def drip() -> None:
        while True:
            writer.write(b"x")
            await asyncio.sleep(0.02)

    dripping = asyncio.create_task(drip()) if sent else None
    async with asyncio.timeout(5):
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
    if dripping:
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)
    writer.close()
    assert await lives(scene)


@pytest.mark.parametrize("limits", [QUICK], indirect=True)
async def test_a_slow_body_is_refused_and_cut(scene: SimpleNamespace) -> None:
    reader, writer = await scene.raw()
    writer.write(b"POST /v1/protections HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{")
    async with asyncio.timeout(5):
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408")
        with contextlib.suppress(ConnectionError):
            await reader.read()
    writer.close()
    assert scene.core.acts == []
    assert await lives(scene)


@pytest.mark.parametrize("limits", [QUICK], indirect=True)
async def test_an_idle_connection_is_let_go_and_a_long_poll_is_not(scene: SimpleNamespace) -> None:
    scene.core.hold = asyncio.Event()
    http = scene.local()
    _, job = await ask(http, "POST", "/v1/protections", json={"domain": "vm1", "to": "host2"})
    # Three times the deadline that an idle connection has.
    assert (await ask(http, "GET", f"/v1/jobs/{job['id']}?wait_s=3"))[1]["state"] == "running"
    reader, writer = await scene.raw()
    writer.write(b"GET /v1/status HTTP/1.1\r\nHost: a\r\n\r\n")
    async with asyncio.timeout(5):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        with contextlib.suppress(ConnectionError):
            await reader.read()
    writer.close()


@pytest.mark.parametrize("limits", [QUICK], indirect=True)
async def test_no_tls_handshake_no_connection(scene: SimpleNamespace) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", scene.server.ports[0])
    async with asyncio.timeout(5):
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
    writer.close()
    assert await lives(scene)


async def test_a_peer_speaks_by_its_certificates_name(scene: SimpleNamespace) -> None:
    status, body = await ask_tls(scene, "host2", "POST", "/v1/peer/arm", data=b"{}")
    assert (status, body) == (200, {"from": "host1"})
    assert scene.core.peer_calls == [("host2", "arm", b"{}")]
    # No operators are configured: peers are.
    assert (await ask_tls(scene, "host2", "GET", "/v1/status"))[0] == 200


async def test_a_stranger_of_the_same_ca_may_nothing(scene: SimpleNamespace) -> None:
    for method, path, code in (
        ("POST", "/v1/peer/arm", "peer-untrusted"),
        ("GET", "/v1/status", "not-an-operator"),
        ("GET", "/v1/nothing", "not-an-operator"),
    ):
        status, error = await ask_tls(scene, "stranger", method, path)
        assert (status, error["code"], error["exit_code"]) == (403, code, 4)
        assert "stranger" in error["message"]
    assert scene.core.peer_calls == []


async def test_configured_operators_are_the_only_ones_by_tls(scene: SimpleNamespace) -> None:
    await scene.server.reload(replace(scene.server.config, operators=("console",)))
    assert (await ask_tls(scene, "console", "GET", "/v1/status"))[0] == 200
    assert (await ask_tls(scene, "console", "POST", "/v1/peer/arm"))[0] == 403
    assert (await ask_tls(scene, "host2", "GET", "/v1/status"))[0] == 403
    assert (await ask_tls(scene, "host2", "POST", "/v1/peer/arm"))[0] == 200


async def test_certificates_of_nobody_and_of_another_ca_do_not_get_in(scene: SimpleNamespace) -> None:
    home = scene.pki.host("host2")
    other = Pki(scene.tmp / "other").host("host2")
    foreign = client_tls(home, with_certificate=False)
    foreign.load_cert_chain(other / "libvirt/clientcert.pem", other / "libvirt/private/clientkey.pem")
    old = client_tls(home)
    with pytest.warns(DeprecationWarning):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    for context in (client_tls(home, with_certificate=False), foreign, old):
        session = scene.remote(context)
        with pytest.raises(aiohttp.ClientError):
            await session.post(f"https://127.0.0.1:{scene.server.ports[0]}/v1/peer/arm", server_hostname="host1")
    assert scene.core.peer_calls == []
    assert await lives(scene)


async def test_a_second_agent_is_refused_and_a_dead_ones_socket_is_replaced(scene: SimpleNamespace) -> None:
    with pytest.raises(Refused) as error:
        await Server(scene.server.config, FakeCore()).start()
    assert error.value.code == "agent-runs"
    await scene.server.stop()
    path = scene.server.config.socket_path
    left_behind = await asyncio.start_unix_server(lambda reader, writer: None, path)
    left_behind.close()
    again = Server(scene.server.config, scene.core)
    await again.start()
    assert await lives(scene)
    await again.stop()


async def test_without_certificates_the_operators_are_served(tmp_path: Path) -> None:
    settings = config(tmp_path, tmp_path / "none")
    server = Server(settings, FakeCore())
    await server.start()
    assert str(tmp_path / "none/CA/cacert.pem") in server.trouble
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(settings.socket_path))) as http:
        assert (await ask(http, "GET", "/v1/status"))[0] == 200
    Pki(tmp_path).host("none")
    await server.reload(settings)
    assert server.trouble == ""
    assert len(server.ports) == 1
    await server.stop()


async def test_addresses_that_are_not_there_yet_are_listened_on(tmp_path: Path) -> None:
    addresses = ("127.0.0.1", "192.0.2.77", "2001:db8::77")
    server = Server(config(tmp_path, Pki(tmp_path).host("host1"), listen_addresses=addresses), FakeCore())
    await server.start()
    assert server.trouble == ""
    assert len(server.ports) == 3
    await server.stop()
