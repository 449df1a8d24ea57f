"""Stands in for a third machine with etcd, and for the power switches that a fence agent talks to.

etcd's answers are those of its own rules: one history, transactions that compare and put, revisions that only rise, until it
is wiped or an old backup is restored. What is sent may be carried out although its answer never comes, also long after.
"""

from __future__ import annotations

import asyncio
import copy
from typing import Any

from tests.sim.world import Host, World, here


class Etcd:
    """One etcd, as clients see it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.cluster, self.revision = 1, 10
        self.held: dict[str, tuple[str, int]] = {}
        self.up = True
        self.slow_ms = 0.0
        self.backup: Any = None
        self.reaches = [True, True]  # by host
        self.at_noon()

    def at_noon(self) -> None:
        """Somebody keeps a backup."""
        self.backup = (self.revision, copy.deepcopy(self.held))

    def wipe(self) -> None:
        self.cluster, self.revision, self.held = self.cluster + 1, 1, {}
        self.broken()

    def roll_back(self) -> None:
        self.revision, self.held = self.backup[0], dict(self.backup[1])
        self.broken()

    def broken(self) -> None:
        """From here on a protection of before can't trust it; mended is what is protected anew."""
        self.world.oracle.arbiter_broken = True

    def carry_out(self, what: Any) -> Any:
        """The state machine: one question, its answer."""
        from mcft.arbiter.etcd import Create, Read, Reply, Swap

        cluster = str(self.cluster)
        found = self.held.get(what.key)
        if isinstance(what, Create) and found is None:
            self._put(what.key, what.value)
            return Reply(cluster, self.revision, True)
        if isinstance(what, Swap) and found == (what.value, what.mod_revision):
            self._put(what.key, what.put)
            return Reply(cluster, self.revision, True)
        assert isinstance(what, (Create, Read, Swap)), what
        value, mod = found if found is not None else (None, 0)
        return Reply(cluster, self.revision, False, value, mod)

    def _put(self, key: str, value: str) -> None:
        self.revision += 1
        self.held[key] = (value, self.revision)
        self.world.note("etcd", f"{key[-8:]} = {value} ({self.revision})")


class Client:
    """`etcdhttp.EtcdHttp` of one agent."""

    def __init__(self, host: Host) -> None:
        self.host = host

    async def ask(self, what: Any, timeout_ms: float) -> Any:
        from mcft.agent.etcdhttp import NoReply

        world, etcd = self.host.world, self.host.world.etcd
        rng = world.rng
        if not (etcd.up and etcd.reaches[self.host.number] and self.host.machine.lan_up):
            await asyncio.sleep(0.002 if rng.random() < 0.5 else timeout_ms / 1000)
            raise NoReply("connection refused", sent=False)
        future = asyncio.get_running_loop().create_future()
        proc = asyncio.get_running_loop().proc  # type: ignore[attr-defined]

        def arrived() -> None:
            if not etcd.up:
                return
            reply = etcd.carry_out(what)
            if etcd.reaches[self.host.number] and self.host.machine.lan_up and self.host.up:
                world.at(0.2 + rng.random() * (0.5 + etcd.slow_ms), proc, answered, reply)

        def answered(reply: Any) -> None:
            if not future.done():
                future.set_result(reply)

        world.at(0.2 + rng.random() * (0.5 + etcd.slow_ms), world.outside, arrived)
        try:
            return await asyncio.wait_for(future, timeout_ms / 1000)
        except TimeoutError:
            raise NoReply("no answer", sent=True) from None

    async def delete(self, key: str) -> None:
        etcd = self.host.world.etcd
        if etcd.up and etcd.reaches[self.host.number] and key in etcd.held:
            etcd.revision += 1
            del etcd.held[key]

    async def close(self) -> None: ...


async def fence(_device: Any, what: Any, timeout_ms: float) -> Any:
    """`fenceagent.ask`: switches the other host off. It works without the hosts' links; it may fail, or say what is not so."""
    from mcft.agent.etcdhttp import NoReply
    from mcft.arbiter.fence import Off, Power, Status

    host, world = here.host, here.world
    other, rng = host.other, world.rng
    works = world.fence_works[host.number]
    await asyncio.sleep((20.0 + rng.random() * 300.0) / 1000)
    if isinstance(what, Off):
        if works and not (world.fence_lies and rng.random() < 0.5):
            world.note(host.name, f"shoots {other.name}")
            other.machine.power_off()
            world.at(3000.0 + rng.random() * 4000.0, world.outside, _on_again, other)
        await asyncio.sleep(rng.random() * 0.5)
        if not works:
            await asyncio.sleep(timeout_ms / 1000 * rng.random())
            raise NoReply("the device does not answer", sent=True)
        return Power("on", "done")
    if not works:
        return Power("unknown", "the device does not answer")
    if isinstance(what, Status):
        return Power("off" if not other.up else "on")
    return Power("on", "monitor")


def _on_again(host: Host) -> None:
    if not host.up:
        host.machine.power_on()


def install() -> bool:
    """False where the product has no arbiters yet."""
    try:
        import mcft.agent.arbitration as arbitration
        import mcft.agent.fenceagent as fenceagent
    except ImportError:
        return False
    fenceagent.ask = fence  # type: ignore[assignment]
    arbitration.EtcdHttp = lambda _settings: Client(here.host)  # type: ignore[assignment, misc]
    from tests.sim import wiring

    arbitration.boottime_ms = wiring.boottime_ms
    arbitration.secrets = wiring.SimSecrets  # type: ignore[assignment]
    return True
