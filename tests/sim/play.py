"""One world from its beginning to its end: protect, faults, mended again, checked, and once more."""

from __future__ import annotations

import gc
import sys
import warnings

from mcft import api
from mcft.agent.core import Core
from tests.sim import aio, arbiters, wiring
from tests.sim.disk import History, Image, Moment
from tests.sim.files import Files
from tests.sim.machine import DISK, DOMAIN, UUID, XML, Domain, Machine
from tests.sim.oracle import Oracle, state_of
from tests.sim.world import Host, Violation, World, here

PROTECT_WITHIN_MS = 130_000.0  # the same, and the set-up itself
FLOWS_WITHIN_MS = 110_000.0  # as long as a set-up may wait for a dead host


def make(seed: int, *, trace: bool = False) -> World:
    """Two hosts that boot, vm1 running on host1."""
    world = World(seed, trace=trace)
    world.history = History()
    world.slow_monitor_ms = world.rng.choice([2.0, 20.0, 150.0])
    world.slow_store_ms = world.rng.choice([2.0, 30.0, 300.0])
    world.double_calls = world.rng.choice([0.0, 0.05, 0.3])
    world.slow_commit = world.rng.choice([1.0, 1.0, 5.0, 60.0])
    world.arbiter = KINDS[seed % len(KINDS)]
    world.release_is_kernels = seed // len(KINDS) % 2 == 1
    world.fence_lies = world.rng.random() < 0.3
    world.auto_protect = world.rng.random() < 0.7
    for host in (*world.hosts, world.outside.host):
        host.files = Files(host)
        host.machine = Machine(host)
        host.rate = 1.0 + world.rng.uniform(-2e-4, 2e-4)
        host.wall_ms += world.rng.uniform(-5000, 5000)
    world.oracle = Oracle(world)
    world.etcd = arbiters.Etcd(world)
    first = world.hosts[0]
    first.files.put(DISK, Image(Moment(0, 0)))
    first.machine.domains[UUID] = Domain(DOMAIN, definition=XML, xml=XML)
    here.world, here.host = world, first
    for host in world.hosts:
        here.host = host
        host.machine.power_on()
    here.host = first
    first.machine.boot_guest(UUID)
    world.outside.host.machine.kernel = world.outside
    look(world)
    return world


def look(world: World) -> None:
    world.oracle.look()
    world.at(23.0, world.outside, look, world)


def over(world: World) -> None:
    """Let go of everything; what dead agents' `finally` blocks do now meets nobody."""
    world.over = True
    world.queue.clear()
    dead = World(0)
    for host in (*dead.hosts, dead.outside.host):
        host.files, host.machine = Files(host), Machine(host)
        host.machine.kernel = dead.outside
    dead.oracle = Oracle(dead)
    dead.history = History()
    here.world, here.host = dead, dead.hosts[0]
    aio.bury()
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()
    sys.unraisablehook = hook


# ---- what operators type ----


def protect(host: Host, *, overwrite: bool = True) -> None:
    agent = host.machine.agent
    if agent is None:
        return
    request = api.ProtectRequest(DOMAIN, host.other.name, 100, overwrite=[DISK] if overwrite else [])

    async def work(core: Core) -> api.JobBody:
        return await core.protect(request)

    agent.operator("protect vm1", work)


def act(host: Host, verb: str, **fields: bool) -> None:
    agent = host.machine.agent
    if agent is None:
        return

    async def work(core: Core) -> api.JobBody:
        return await core.act(DOMAIN, verb, api.ActRequest(**fields))

    flags = "".join(f" --{name.replace('_', '-')}" for name, on in fields.items() if on)
    agent.operator(f"{verb} vm1{flags}", work)


def virsh_start(world: World) -> None:
    """mcft knows nothing of it any more: started where it ran last."""
    host = world.oracle.last_host
    domain = host.machine.domains.get(UUID)
    if host.up and domain is not None and domain.qemu is None and not host.machine.banned(UUID):
        here.host = host
        domain.xml = domain.definition or domain.xml
        host.machine.boot_guest(UUID)


def by_force(world: World) -> None:
    """No arbiter can tell, and a copy lives: its operator switches the other host off, and says so."""
    for host in world.hosts:
        if any(q.colo == "secondary" for q in host.machine.qemus()):
            if host.other.up:
                host.other.machine.power_off()
                world.at(9000.0, world.outside, lambda other=host.other: None if other.up else other.machine.power_on())  # type: ignore[misc]
            else:
                act(host, "failover", force=True, peer_is_off=True)


def maintenance(host: Host, on: bool) -> None:
    agent = host.machine.agent
    if agent is None:
        return

    async def work(core: Core) -> api.JobBody:
        return await core.maintenance(api.MaintenanceRequest(on))

    agent.operator(f"maintenance {'on' if on else 'off'}", work)


# ---- the rounds ----


def until_protected(world: World) -> None:
    """By itself, or by an operator where the guest runs. Raises: Violation (liveness)."""
    end = world.now + PROTECT_WITHIN_MS
    asked = world.now + (5000.0 if world.auto_protect else 500.0)
    while not is_protected(world):
        if world.oracle.arbiter_broken and world.now > end - 90_000.0:
            world.count("left to an operator: etcd was wiped or rolled back")
            return  # what is promised then is safety alone
        if world.now > end:
            raise Violation("liveness", f"not protected within {PROTECT_WITHIN_MS / 1000:.0f} s: {states(world)}")
        if world.now >= asked:
            asked = world.now + 5000.0
            work_is_done(world)
            for host in world.hosts:
                if any(q.runstate == "running" and (not q.colo or q.failover) for q in host.machine.qemus()):
                    protect(host)
        world.run(world.now + 50.0)


def until_settled(world: World) -> None:
    """Nothing is half made or half undone for long. Raises: Violation."""
    end = world.now + 8000.0
    while said := world.oracle.settled():
        if world.now > end:
            raise Violation("no half set-up", said)
        world.run(world.now + 100.0)


def work_is_done(world: World) -> None:
    """Whoever put a host into maintenance takes it out again."""
    for host in world.hosts:
        agent = host.machine.agent
        if agent is not None and agent.serving and agent.core.site.maintenance:
            maintenance(host, False)


def is_protected(world: World) -> bool:
    for host in world.hosts:
        if state_of(host) == "protected" and state_of(host.other) == "protected":
            gate = host.machine.gates.get(UUID)
            if gate is not None and gate.alive and gate.gate.state.record == "protected" and not gate.gate.side.closed():
                return True
    return False


def states(world: World) -> str:
    return ", ".join(f"{h.name} {state_of(h)} {[q.runstate for q in h.machine.qemus()]}" for h in world.hosts)


def until_it_flows(world: World) -> None:
    """Everything is mended: the guest must talk again, by itself or with what the documents say. Raises: Violation."""
    end = world.now + FLOWS_WITHIN_MS
    type_at = world.now + 4000.0
    began = world.now
    while True:
        world.run(world.now + 100.0)
        if world.oracle.last_at > began + 1000.0 and world.now - world.oracle.last_at < 300.0:
            return
        if world.now > end:
            raise Violation("liveness", f"no output for {FLOWS_WITHIN_MS / 1000:.0f} s with everything mended: {states(world)}")
        if world.now >= type_at:
            type_at = world.now + 5000.0
            work_is_done(world)
            for host in world.hosts:
                running = [q for q in host.machine.qemus() if q.runstate == "paused" and q.colo != "secondary"]
                for qemu in running:
                    world.at(0.0, qemu.proc, qemu.command, "cont", {}, lambda _reply: None)
            by_word = world.oracle.arbiter_broken and world.now > began + 20000.0
            if by_word and any(q.colo == "secondary" for host in world.hosts for q in host.machine.qemus()):
                by_force(world)
                continue
            if any(state_of(host) for host in world.hosts):
                act(world.rng.choice(world.hosts), "start")
            if not state_of(world.oracle.last_host):  # (the other one may not have heard yet that nothing is protected)
                virsh_start(world)
            if world.oracle.arbiter_broken:
                for host in world.hosts:
                    if any(q.colo == "primary" or q.copy is not None for q in host.machine.qemus()):
                        act(host, "unprotect")


wiring.install()
KINDS = ("standby", "etcd", "fence") if arbiters.install() else ("standby",)
