"""The client to another agent: certificates, hedging, dead links."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import ssl
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from agentlab import FakeCore, Pki, config

from mcft.agent import peers as peers_module
from mcft.agent import tls
from mcft.agent.peers import PeerLink
from mcft.agent.server import Server
from mcft.config import Config, Peer
from mcft.errors import McftError, Refused, Unreachable


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


class Lab:
    """host2's agent as the peer of host1, whose links it makes."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp = tmp_path
        self.pki = Pki(tmp_path / "pki")
        self.core = FakeCore("host2")
        settings = config(tmp_path, self.pki.host("host2"), "host2", listen_addresses=("127.0.0.1",))
        self.server = Server(settings, self.core)
        self.home: Config = config(tmp_path, self.pki.host("host1"), "host1")
        self.links: list[PeerLink] = []
        self.relays: list[Relay] = []

    async def start(self) -> None:
        await self.server.start()
        self.port = self.server.ports[0]

    async def stop(self) -> None:
        if self.core.hold:
            self.core.hold.set()
        for link in self.links:
            await link.close()
        for relay in self.relays:
            await relay.stop()
        await self.server.stop()

    async def relay(self, address: str) -> Relay:
        """A way to host2 on another address of the loopback, same port."""
        self.relays.append(Relay(address, self.port))
        await self.relays[-1].start()
        return self.relays[-1]

    def link(self, *addresses: str, home: Config | None = None, started: bool = True) -> PeerLink:
        peer = Peer("host2", addresses or ("127.0.0.1",), self.port)
        self.links.append(PeerLink(home or self.home, peer, lambda: b'{"from":"host1"}'))
        if started:
            self.links[-1].start()
        return self.links[-1]


class Relay:
    """Forwards bytes until `cut`: then connections stay open and nothing passes, as by a pulled cable."""

    def __init__(self, address: str, port: int) -> None:
        self.address, self.port = address, port
        self.cut = False
        self.connections = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, self.address, self.port)

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        there = await asyncio.open_connection("127.0.0.1", self.port)
        self._writers += [writer, there[1]]
        for source, sink in ((reader, there[1]), (there[0], writer)):
            task = asyncio.create_task(self._pass(source, sink))
            self._tasks.add(task)

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                if not self.cut:
                    sink.write(data)
            sink.close()


@pytest_asyncio.fixture
async def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lab]:
    monkeypatch.setattr(peers_module, "HELLO_EVERY_S", 0.02)
    monkeypatch.setattr(peers_module, "HELLO_DEADLINE_S", 0.2)
    lab = Lab(tmp_path)
    await lab.start()
    yield lab
    await lab.stop()


async def test_hello_keeps_it_reachable(lab: Lab) -> None:
    link = lab.link()
    assert not link.reachable
    assert link.carries_since is None
    await until(lambda: link.reachable)
    since = link.carries_since
    assert since is not None
    assert link.last_hello == b'{"from":"host2"}'
    ok = link.last_ok["127.0.0.1"]
    assert ok is not None
    await until(lambda: (link.last_ok["127.0.0.1"] or 0) > ok)
    assert link.carries_since == since
    assert link.detail == ""


async def test_a_gap_is_seen(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_module, "GAP_S", 0.3)
    relay = await lab.relay("127.0.0.2")
    link = lab.link("127.0.0.2")
    await until(lambda: link.reachable)
    since = link.carries_since
    relay.cut = True
    await until(lambda: not link.reachable)
    await until(lambda: "no answer" in link.detail)
    relay.cut = False
    await until(lambda: link.reachable)
    assert link.carries_since is not None
    assert since is not None
    assert link.carries_since > since + 0.3


async def test_a_call_on_a_warm_connection_is_quick(lab: Lab) -> None:
    link = lab.link()
    await until(lambda: link.reachable)
    times = []
    for _ in range(50):
        begun = time.perf_counter()
        assert await link.call("arm", b"{}") == b'{"from":"host2"}'
        times.append(time.perf_counter() - begun)
    assert lab.core.peer_calls == [("host1", "arm", b"{}")] * 50
    assert sorted(times)[25] < 0.02


async def test_the_peers_own_refusal_is_raised(lab: Lab) -> None:
    lab.core.error = Refused("given-up", "g is given up", "because", "do that")
    with pytest.raises(Refused) as error:
        await lab.link(started=False).call("arm")
    assert (error.value.code, error.value.reason, error.value.next_step) == ("given-up", "because", "do that")


async def test_nobody_there(lab: Lab) -> None:
    link = lab.link(started=False)
    await lab.server.stop()
    begun = time.monotonic()
    with pytest.raises(Unreachable) as error:
        await link.call("arm", timeout_s=5)
    assert error.value.code == "peer-unreachable"
    assert "127.0.0.1" in error.value.reason
    # A refusal of the connection is an answer: no time passes by waiting.
    assert time.monotonic() - begun < 3


async def test_silence_ends_in_time(lab: Lab) -> None:
    relay = await lab.relay("127.0.0.2")
    relay.cut = True
    with pytest.raises(Unreachable, match="did not answer") as error:
        await lab.link("127.0.0.2", started=False).call("arm", timeout_s=0.2)
    assert "no answer within 0.2 s" in error.value.reason


async def test_a_cut_link_costs_a_call_one_hedge(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the whole of its patience, nor a fresh connection's."""
    monkeypatch.setattr(peers_module, "FRESH_AFTER_S", 10.0)
    first, second = await lab.relay("127.0.0.2"), await lab.relay("127.0.0.3")
    link = lab.link("127.0.0.2", "127.0.0.3")
    await until(lambda: all(link.last_ok.values()))
    for cut, other in ((first, second), (second, first)):
        other.cut = False
        await until(lambda: all(peers_module.boottime_s() - (ok or 0) < 0.1 for ok in link.last_ok.values()))
        cut.cut = True
        begun = time.perf_counter()
        assert await link.call("arm", timeout_s=30) == b'{"from":"host2"}'
        assert time.perf_counter() - begun < 5
        assert link.reachable


async def test_a_dead_connection_is_left_for_a_fresh_one(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_module, "FRESH_AFTER_S", 60.0)
    relay = await lab.relay("127.0.0.2")
    link = lab.link("127.0.0.2", started=False)
    lab.core.hold = asyncio.Event()
    both = [asyncio.create_task(link.call("arm")) for _ in range(2)]
    await until(lambda: relay.connections == 2)
    lab.core.hold.set()
    await asyncio.gather(*both)
    monkeypatch.setattr(peers_module, "FRESH_AFTER_S", 0.5)
    for task in list(relay._tasks):
        # The old connections are dead for good, as after a reboot of the peer's host; new ones work.
        task.cancel()
    begun = time.perf_counter()
    assert await link.call("arm", timeout_s=5) == b'{"from":"host2"}'
    assert time.perf_counter() - begun < 2
    assert relay.connections == 3


async def test_a_slow_answer_is_waited_for(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_module, "FRESH_AFTER_S", 0.05)
    monkeypatch.setattr(peers_module, "HEDGE_S", 0.02)
    lab.core.hold = asyncio.Event()
    await lab.relay("127.0.0.2")
    link = lab.link("127.0.0.1", "127.0.0.2", started=False)
    call = asyncio.create_task(link.call("arm", timeout_s=5))
    await until(lambda: len(lab.core.peer_calls) == 4)
    lab.core.hold.set()
    assert await call == b'{"from":"host2"}'


async def test_what_takes_long_ends_when_the_peer_answers_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The links are cut while the peer builds its copy. Fails if the primary waits for the whole of `prepare`'s deadline."""
    monkeypatch.setattr(peers_module, "ASK_AGAIN_S", 0.4)
    monkeypatch.setattr(peers_module, "SILENT_S", 2.0)
    lab.core.hold = asyncio.Event()
    relay = await lab.relay("127.0.0.2")
    link = lab.link("127.0.0.2")
    await until(lambda: link.reachable)
    call = asyncio.create_task(link.call_patiently("prepare", b"", 300))
    await until(lambda: len(lab.core.peer_calls) >= 3)  # hellos are answered: it is asked again
    assert not call.done()
    relay.cut = True
    with pytest.raises(Unreachable, match="did not answer"):
        await asyncio.wait_for(call, 10)


async def test_an_answer_that_was_lost_is_asked_for_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulation, seed 44: the standby's plug is pulled and it boots again. Fails if the primary waits for what never comes."""
    monkeypatch.setattr(peers_module, "ASK_AGAIN_S", 0.4)
    lab.core.hold = asyncio.Event()
    relay = await lab.relay("127.0.0.2")
    link = lab.link("127.0.0.2")
    await until(lambda: link.reachable)
    call = asyncio.create_task(link.call_patiently("prepare", b"", 300))
    await until(lambda: lab.core.peer_calls)
    for task in list(relay._tasks):
        task.cancel()  # nothing passes on these connections any more; new ones work
    lab.core.hold.set()
    assert await asyncio.wait_for(call, 10) == b'{"from":"host2"}'


async def test_the_servers_name_must_be_the_peers(lab: Lab) -> None:
    """A certificate of the same CA, of another host, on the peer's address."""
    imposter = config(lab.tmp, lab.pki.host("host3"), "host3", peers={"host1": Peer("host1", ("127.0.0.1",), 1)})
    server = Server(imposter, FakeCore("host3"))
    await server.start()
    lab.port = server.ports[0]
    link = lab.link()
    with pytest.raises(Refused) as error:
        await link.call("arm", b"secret")
    assert error.value.code == "peer-untrusted"
    assert "host2" in str(error.value)
    await until(lambda: "host2" in link.detail)
    assert not link.reachable
    await server.stop()


async def test_a_server_of_another_ca_is_not_trusted(lab: Lab) -> None:
    foreign = Pki(lab.tmp / "foreign").host("host1")
    with pytest.raises(Refused) as error:
        await lab.link(home=replace(lab.home, pki_dir=foreign), started=False).call("arm")
    assert error.value.code == "peer-untrusted"


async def test_being_no_peer_there_is_said(lab: Lab) -> None:
    stranger = config(lab.tmp, lab.pki.host("stranger"), "stranger")
    with pytest.raises(Refused, match="no peer named") as error:
        await lab.link(home=stranger, started=False).call("arm")
    assert error.value.code == "peer-untrusted"


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
async def test_our_certificate_refused_is_said(lab: Lab, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """We trust the peer's CA, and it does not trust the one of our client certificate."""
    home = lab.pki.host("mixed")
    foreign = Pki(lab.tmp / "foreign").host("host1")
    for name in ("clientcert.pem", "private/clientkey.pem"):
        shutil.copy(foreign / "libvirt" / name, home / "libvirt" / name)
    made = tls.client_context

    def context(settings: Config) -> ssl.SSLContext:
        context = made(settings)
        context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
        return context

    monkeypatch.setattr(tls, "client_context", context)
    with pytest.raises(McftError) as error:
        await lab.link(home=replace(lab.home, pki_dir=home), started=False).call("arm")
    assert error.value.code == "peer-untrusted", str(error.value)


async def test_missing_certificates_are_named(lab: Lab) -> None:
    link = lab.link(home=replace(lab.home, pki_dir=lab.tmp / "none"))
    with pytest.raises(Unreachable, match=r"cacert\.pem does not exist"):
        await link.call("arm")
    await until(lambda: "cacert.pem does not exist" in link.detail)
