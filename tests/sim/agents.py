"""Stands in for an agent's process, its store's disk, its connections to the other agent, and its journal.

The agent itself is the product's: `Core`, `Primary`, `Standby`, their set-ups, `GateLink`, `PeerLink`, `Jobs`, `Again`.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from mcft.agent import maintenance
from mcft.agent.again import Again
from mcft.agent.core import Core
from mcft.agent.jobs import Jobs
from mcft.agent.peers import PeerLink
from mcft.agent.ports import Ports
from mcft.agent.site import Site
from mcft.agent.store import Record, StoredProtection, instance_of
from mcft.config import Config, Peer
from mcft.errors import Failed, McftError
from tests.sim import aio
from tests.sim.machine import ADDRESSES, RUN, STATE, SimLibvirt
from tests.sim.world import Host, Proc, here

T = TypeVar("T")


class SimStore:
    """`store.Store`: one writer. A write is on the disk some time before its answer comes; a crash may fall between."""

    def __init__(self, host: Host) -> None:
        self.host, self.broken = host, ""
        self._free_at = 0.0

    @property
    def _disk(self) -> dict[str, Any]:
        return self.host.machine.records

    async def _run(self, work: Callable[[], T], *, write: bool = False) -> T:
        if self.broken:
            raise Failed("store-damaged", "the records cannot be used", self.broken)
        world, machine = self.host.world, self.host.machine
        took = 0.2 + world.rng.random() * (3.0 if write else 0.3)
        if write and world.rng.random() < 0.02:
            took += world.rng.random() * world.slow_store_ms
        start = max(world.now, self._free_at)
        self._free_at = start + took
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        proc = asyncio.get_running_loop().proc  # type: ignore[attr-defined]

        def answer(value: Any, error: Exception | None) -> None:
            if done.done():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(value)

        def reached() -> None:
            if write and machine.store_fails:
                # SQLite says EIO: nobody knows what is on the disk. Here: the write, or not.
                if world.rng.random() < 0.5:
                    work()
                self.broken = "SQLite: disk I/O error"
                world.at(0.1, proc, answer, None, Failed("store-damaged", "the records cannot be used", self.broken))
                return
            try:
                value = work()
            except McftError as error:
                world.at(0.1, proc, answer, None, error)
                return
            world.at(took / 2, proc, answer, value, None)

        # The disk's own moment belongs to the kernel: a process killed before it has not written, one killed after has.
        world.at(start + took / 2 - world.now, proc, reached)
        return await done

    async def load(self) -> list[StoredProtection]:
        return await self._run(lambda: [StoredProtection(u, d, b) for u, (d, b) in self._disk["protection"].items()])

    async def save(self, uuid: str, domain: str, body: bytes) -> None:
        def work() -> None:
            self._disk["protection"][uuid] = (domain, body)

        await self._run(work, write=True)

    def _is_saved(self, uuid: str, body: bytes) -> bool:
        saved = self._disk["protection"].get(uuid)
        return saved is not None and instance_of(saved[1]) == instance_of(body)

    async def update(self, uuid: str, body: bytes) -> bool:
        def work() -> bool:
            mine = self._is_saved(uuid, body)
            if mine:
                self._disk["protection"][uuid] = (self._disk["protection"][uuid][0], body)
            return mine

        return await self._run(work, write=True)

    async def delete(self, uuid: str) -> None:
        await self._run(lambda: self._disk["protection"].pop(uuid, None), write=True)

    async def append(
        self, uuid: str, pid: str, g: int, side: str, kinds: Any, detail: str = "", body: bytes | None = None
    ) -> bool:
        def work() -> bool:
            rows = self._disk["record"]
            new = 0
            for kind in kinds:
                if not any((r.uuid, r.pid, r.g, r.side, r.kind) == (uuid, pid, g, side, kind) for r in rows):
                    rows.append(Record(len(rows) + 1, uuid, pid, g, side, kind, "", detail))
                    new += 1
                    here.world.note(self.host.name, f"record {kind}({g}) on the {side}'s disk")
                    here.world.oracle.recorded(self.host, pid, g, side, kind, detail)
                    here.world.moment("record", self.host)
            if new:
                self._disk["generation"][uuid] = max(g, self._disk["generation"].get(uuid, 0))
                if body is not None:
                    if uuid not in self._disk["protection"]:
                        raise Failed("store-write", f"no protection {uuid} is saved, so its records were not written either")
                    if self._is_saved(uuid, body):
                        self._disk["protection"][uuid] = (self._disk["protection"][uuid][0], body)
            return new > 0

        return await self._run(work, write=True)

    async def records(self, uuid: str, pid: str | None = None) -> list[Record]:
        return await self._run(lambda: [r for r in self._disk["record"] if r.uuid == uuid and pid in (None, r.pid)])

    async def highest_generation(self, uuid: str) -> int:
        return await self._run(lambda: int(self._disk["generation"].get(uuid, 0)))

    async def meta(self, key: str) -> str | None:
        return await self._run(lambda: self._disk["meta"].get(key))

    async def set_meta(self, key: str, value: str) -> None:
        def work() -> None:
            self._disk["meta"][key] = value

        await self._run(work, write=True)


class SimEvents:
    """`events.EventLog`: lines of the trace."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def emit(self, domain: str, kind: str, text: str, level: str = "info") -> None:
        world = self.host.world
        world.note(self.host.name, f"{kind}: {text}" if level != "alarm" else f"ALARM {kind}: {text}")
        if level == "alarm" and ("own disk failed a write" in text or "lacks a write that it believes" in text):
            world.oracle.accepted_loss = True  # what correctness.md says remains: nobody can undo it, and it was said
        if level == "alarm" and "failed" in text and "going on from the records" in text:
            world.count("a decision gone on with from the records")

    def last(self, _domain: str) -> None: ...


class SimMarkers:
    """`hook.Markers` and `hook.sh`: durable when they return."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def _path(self, uuid: str) -> str:
        return f"{STATE}/start/{uuid}"

    def ban(self, uuid: str, why: str) -> None:
        self.host.files.put(self._path(uuid), f"banned {why}\n")

    def free(self, uuid: str) -> None:
        self.host.files.put(self._path(uuid), "free\n")
        self.host.world.note(self.host.name, "may be started here")
        self.host.world.oracle.freed(self.host)

    def forget(self, uuid: str) -> None:
        self.host.files.drop(self._path(uuid))
        self.host.files.drop(f"{RUN}/token/{uuid}")

    def banned(self, uuid: str) -> bool:
        return self.host.machine.banned(uuid)

    def grant(self, uuid: str, pid: str, g: int, purpose: str) -> None:
        self.host.files.put(f"{RUN}/token/{uuid}", "token")

    def revoke(self, uuid: str) -> None:
        self.host.files.drop(f"{RUN}/token/{uuid}")


class _Proof:
    """`hook.HookProof`: it lives."""

    async def prove(self, *_: Any) -> None: ...


class SimPool:
    """`peers._Pool`: HTTP over TLS to the other agent, one link. Requests and answers wait while the cable is cut."""

    def __init__(self, _context: Any) -> None:
        self.host = here.host
        self.session = self

    def retire(self) -> None: ...

    async def close(self) -> None: ...

    async def post(self, url: Any, body: bytes, _name: str) -> tuple[int, bytes]:
        world, host = self.host.world, self.host
        address, verb = url
        number = ADDRESSES[host.other.name].index(address)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[tuple[int, bytes]] = loop.create_future()
        mine: Proc = loop.proc  # type: ignore[attr-defined]
        kernel = host.other.machine.kernel

        def refused() -> None:
            if not done.done():
                done.set_exception(ConnectionRefusedError("connection refused"))

        def arrived() -> None:
            agent = host.other.machine.agent
            if agent is None or not agent.alive or not agent.serving:
                world.stream(number, host.other, refused, mine)
                return
            agent.on_death.append(lambda: world.stream(number, host.other, refused, mine) if host.other.up else None)
            world.at(0.05, agent, agent.serve, host.name, verb, body, answer)

        def answer(status: int, reply: bytes) -> None:
            world.stream(number, host.other, lambda: None if done.done() else done.set_result((status, reply)), mine)

        boot, asked = host.other.boot, 0

        def probe() -> None:
            """tcp(7), keepalive: whether the other kernel is there and knows this connection (`_asked_after`)."""
            nonlocal asked
            if done.done():
                return
            asked = 0 if host.other.up and all(world.links[number].up) else asked + 1
            if asked > 5 or (not asked and host.other.boot != boot):
                refused()
            else:
                world.at(2000.0 if asked else 5000.0, mine, probe)

        world.at(5000.0, mine, probe)
        if host.other.up:
            world.stream(number, host, arrived, kernel)
            if verb != "hello" and world.double_calls and world.rng.random() < world.double_calls:
                world.count("a call between agents that came twice")
                late = world.rng.choice([0.0, 50.0, 1000.0, 4000.0, 12000.0])
                world.at(late, kernel, world.stream, number, host, arrived, kernel)
        return await done


def _arbiter(kind: str, other: str) -> dict[str, Any]:
    """That part of the configuration."""
    if kind == "etcd":
        from mcft.config import Etcd

        return {"arbiter": kind, "etcd": Etcd(("http://arb:2379",))}
    if kind == "fence":
        from mcft.config import FenceDevice

        return {"arbiter": kind, "fence": {other: FenceDevice("fence_sim", (), 2500)}}
    return {}


class AgentProc(Proc):
    """`mcft agent`."""

    def __init__(self, host: Host) -> None:
        super().__init__(host, "agent")
        self.loop = aio.Loop(self)
        self.serving = False
        self.core: Core
        asyncio._set_running_loop(self.loop)
        try:
            self.main = self.loop.create_task(self._main(), name="agent")
        finally:
            asyncio._set_running_loop(None)

    async def _main(self) -> None:
        """`mcft.agent.main._run`, without HTTP server, signals and versions."""
        host = self.host
        other = host.other.name
        config = Config(
            name=host.name, listen_addresses=ADDRESSES[host.name], peers={other: Peer(other, ADDRESSES[other])},
            loss_ms=300, netbuffer="filter", reprotect_after_ms=3000, reprotect_after_restart_ms=1500, tls="off",
            lan_check=("192.168.0.254",), state_dir=STATE, run_dir=RUN, auto_protect=host.world.auto_protect,
            **_arbiter(host.world.arbiter, other),
        )  # fmt: skip
        store = SimStore(host)
        site = Site(
            config, store, SimEvents(host), Jobs(), SimLibvirt(host), SimMarkers(host), _Proof(), Ports(*config.ports)  # type: ignore[arg-type]
        )
        core = self.core = Core(site)
        site.versions.update(qemu="11.1.3", libvirt="11.3.0")
        for name, peer in config.peers.items():
            site.peers[name] = PeerLink(config, peer, core.hello)
            site.peers[name].start()
        try:
            await maintenance.load(site)
            await core.load()
        except McftError:
            self.kill()
            return
        self.serving = True
        site.spawn(Again(core).run(), "protect again")
        while True:
            if store.broken:
                self.kill()  # the watchdog's turn: systemd starts it again
                return
            await asyncio.sleep(1.0)

    # ---- what comes from outside ----

    def task(self, work: Any, name: str) -> None:
        asyncio._set_running_loop(self.loop)
        try:
            self.loop.create_task(work, name=name)
        finally:
            asyncio._set_running_loop(None)

    def serve(self, peer: str, verb: str, body: bytes, answer: Callable[[int, bytes], None]) -> None:
        async def work() -> None:
            from mcft import api
            from mcft.agent import model

            try:
                reply = await self.core.peer_call(peer, verb, body)
            except McftError as error:
                answer(error.http_status, model.encode(api.error_body(error)))
                return
            except Exception as error:
                where = "".join(traceback.format_tb(error.__traceback__)[-3:])
                self.host.world.note(self.name, f"{verb} failed inside: {error!r} {where}")
                answer(500, b"")
                return
            answer(200, reply)

        self.task(work(), f"serve {verb}")

    def lifecycle(self, uuid: str, event: str, detail: int) -> None:
        if self.serving:
            self._call(self.core.lifecycle, uuid, event, detail)

    def disk_event(self, uuid: str, message: dict[str, Any]) -> None:
        if self.serving:
            self._call(self.core.disk_event, uuid, message)

    def _call(self, call: Callable[..., None], *arguments: Any) -> None:
        asyncio._set_running_loop(self.loop)
        try:
            call(*arguments)
        finally:
            asyncio._set_running_loop(None)

    def operator(self, verb: str, work: Callable[[Core], Any]) -> None:
        """Somebody types a command here; what it says goes into the trace."""

        async def typed() -> None:
            try:
                job = await work(self.core)
                if hasattr(job, "id"):
                    job = await self.core.jobs.ended(job.id)
                said = getattr(job, "result", "") or "done"
            except McftError as error:
                said = f"{error.code}: {error.message}"
            self.host.world.note(self.host.name, f"mcft {verb}: {said}")

        if self.serving:
            self.host.world.note(self.host.name, f"$ mcft {verb}")
            self.task(typed(), f"mcft {verb}")
