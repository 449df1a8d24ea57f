"""What goes wrong, and when: a plan is made from a seed at once, so that a failing one can be shortened and replayed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tests.sim import play
from tests.sim.machine import DESTROYED, UUID
from tests.sim.qemu import Qemu
from tests.sim.world import Host, Proc, World


@dataclass(frozen=True)
class Fault:
    """at_ms: after its round began. host: 0 or 1. ms: how long it lasts. more: what the kind needs."""

    at_ms: float
    kind: str
    host: int = 0
    ms: float = 0.0
    more: int = 0

    def __str__(self) -> str:
        return f"{self.at_ms:8.1f} ms  {self.kind} host{self.host + 1} {self.ms:.0f} ms {self.more}"


def _long(rng: random.Random) -> float:
    """Around T, around what watchers think of, or long."""
    return rng.choice([rng.uniform(1, 60), rng.uniform(60, 500), rng.uniform(250, 420), rng.uniform(500, 4000), 8000.0])


KINDS: dict[str, float] = {
    "kill the gate": 3, "kill the agent": 4, "kill QEMU": 3, "power": 3, "both lose power": 0.6,
    "freeze the host": 4, "stop the gate": 3, "stop the agent": 2, "cut a link": 4, "cut one way": 3, "cut both links": 3,
    "lose datagrams": 2, "double datagrams": 1, "late datagrams": 2, "libvirtd away": 1.5, "disk fails": 1.5, "records fail": 1,
    "QEMU hangs": 0.7, "wall clock steps": 1, "the guest shuts down": 1, "virsh destroy": 0.7, "virsh suspend and resume": 1.5,
    "mcft failover": 2, "mcft solo": 1, "mcft solo --peer-is-off": 0.7, "mcft failover --force --peer-is-off": 0.5,
    "mcft unprotect": 1, "mcft protect": 1.5, "mcft maintenance": 0.8, "mcft start": 1.0, "mcft start --accept-lost-data": 0.3,
    "at the next record": 5, "between acknowledgement and release": 3, "while the overlays are committed": 2,
    "arbiter away": 3, "arbiter slow": 2, "arbiter wiped": 0.5, "arbiter rolled back": 0.5,
}  # fmt: skip


def plan(seed: int, rounds: int = 3) -> list[list[Fault]]:
    """Rounds of faults; a few close together find more than many."""
    rng = random.Random(seed ^ 0x5EED)
    made = []
    kinds = dict(KINDS)
    if rng.random() < 0.6:  # a few kinds only, often: what goes wrong by two of them together is met sooner
        chosen = rng.sample(sorted(KINDS), rng.choice([2, 3, 4, 6]))
        kinds = {kind: 1.0 for kind in chosen}
    for _ in range(rounds):
        faults = []
        at = rng.choice([rng.uniform(0.0, 200.0), rng.uniform(0.0, 1000.0)])
        for _ in range(rng.choice([1, 1, 2, 2, 3, 4, 6])):
            kind = rng.choices(list(kinds), list(kinds.values()))[0]
            faults.append(Fault(round(at, 2), kind, rng.randrange(2), round(_long(rng), 2), rng.randrange(4)))
            at += rng.choice([rng.uniform(0, 5), rng.uniform(0, 60), rng.uniform(0, 500), rng.uniform(0, 3000)])
        made.append(faults)
    rng = random.Random(seed ^ 0xFA417)  # of its own: the other worlds stay what they are
    if rng.random() < 0.2:
        made[0] = rng.choice(STORIES)(rng)
    return made


# What chance alone meets too seldom: faults that mean something only one after the other.


def _old_words(rng: random.Random) -> list[Fault]:
    """Every call between the agents comes twice, the second when the instance that it speaks of is over."""
    shut = rng.uniform(50, 500)
    start = shut + rng.uniform(300, 1500)
    faults = [Fault(0.0, "calls come twice", 0, 20_000.0), Fault(shut, "the guest shuts down", 0), Fault(start, "mcft start", 0)]
    return [*faults, Fault(start + 9000.0, rng.choice(["kill the agent", "lose datagrams"]), rng.randrange(2), 30.0)]


def _arming_fails(rng: random.Random) -> list[Fault]:
    """Behind `arming(g)`, before `protected(g)`: nothing may be undone freely any more."""
    begun = rng.uniform(100, 1500)
    faults = [Fault(0.0, "mcft unprotect", 0), Fault(0.0, "at arming", 0, 0.0, rng.randrange(4))]
    return [*faults, *(Fault(begun + n * 1000.0, "mcft protect", 0, 0.0, 3) for n in range(5))]


def _a_write_is_lost(rng: random.Random) -> list[Fault]:
    """The standby's disk fails too shortly for a load to meet it; some checkpoints later its memory of it is asked for."""
    at = rng.uniform(20, 200)
    faults = [Fault(at, "disk fails", 1, rng.uniform(8, 60))]
    return [*faults, Fault(at + rng.uniform(60, 600), rng.choice(["kill QEMU", "power", "cut both links"]), 0, 3000.0)]


def _arming_is_written_all_the_same(rng: random.Random) -> list[Fault]:
    """The store says EIO while a protecting comes to arming(g): its set-up is undone, and the record may be on the disk."""
    fails = rng.uniform(300, 1200)
    faults = [Fault(0.0, "mcft unprotect", 0), Fault(100.0, "mcft protect", 0, 0.0, 3), Fault(fails, "records fail", 0, 1500.0)]
    return [*faults, Fault(fails + 1500.0, rng.choice(["kill the agent", "cut both links", "power"]), rng.randrange(2), 2000.0)]


STORIES = (_old_words, _arming_fails, _a_write_is_lost, _arming_is_written_all_the_same)


def apply(world: World, fault: Fault) -> None:
    """Make it happen now; what lasts ends by itself."""
    host = world.hosts[fault.host]
    world.count(fault.kind)
    world.note("FAULT", f"{fault.kind} {host.name} {fault.ms:.0f} ms {fault.more}")
    _HOW[fault.kind](world, host, fault)


def mend(world: World) -> None:
    """Everything as it should be: power, cables, disks."""
    world.note("world", "everything is mended")
    world.mended += 1
    world.moments = {kind: [] for kind in world.moments}
    for host in world.hosts:
        host.thaw()
        host.machine.disk_fails = host.machine.qemu_hangs = host.machine.store_fails = False
        host.machine.libvirt_down_until = 0.0
        host.machine.lan_up = True
        if not host.up:
            host.machine.power_on()
        for proc in list(host.procs):
            while proc.halted:
                proc.go_on()
    _arbiter_there(world)
    for number, link in enumerate(world.links):
        link.loss = link.double = link.late_ms = 0.0
        world.cut(number, (True, True))


def _later(world: World, ms: float, call: Callable[[], None]) -> None:
    """Not any more once all was mended."""
    mended = world.mended

    def then() -> None:
        if world.mended == mended:
            call()

    world.at(ms, world.outside, then)


def _kill(world: World, proc: object) -> None:
    """SIGKILL. On a host that stands still nobody sends one: it comes when that host goes on.

    (Not at the same moment: the lease at the tap goes with its gate, `docs/correctness.md`.)
    """
    if isinstance(proc, Proc) and proc.host.frozen:
        proc.deferred.append((world.at, (50.0, world.outside, proc.kill)))
    elif isinstance(proc, Proc):
        proc.kill()


def _gate(world: World, host: Host, fault: Fault) -> None:
    _kill(world, host.machine.gates.get(UUID))


def _agent(world: World, host: Host, fault: Fault) -> None:
    _kill(world, host.machine.agent)


def _qemu(world: World, host: Host, fault: Fault) -> None:
    for qemu in host.machine.qemus():
        _kill(world, qemu.proc)


def _power(world: World, host: Host, fault: Fault) -> None:
    host.machine.power_off()

    def back() -> None:
        if not host.up:
            host.machine.power_on()

    _later(world, 500.0 + fault.ms * 2, back)


def _both_power(world: World, host: Host, fault: Fault) -> None:
    _power(world, host, fault)
    _later(world, fault.ms if fault.more % 2 else 0.0, lambda: _power(world, host.other, fault))


def _freeze(world: World, host: Host, fault: Fault) -> None:
    if host.up:
        host.freeze()
        host.deaf = fault.more % 2 == 1
        _later(world, fault.ms, host.thaw)


def _stop(world: World, proc: object, ms: float) -> None:
    if isinstance(proc, Proc) and proc.alive:
        proc.halt()
        _later(world, ms, lambda: proc.go_on() if proc.alive and proc.halted else None)


def _stop_gate(world: World, host: Host, fault: Fault) -> None:
    _stop(world, host.machine.gates.get(UUID), fault.ms)


def _stop_agent(world: World, host: Host, fault: Fault) -> None:
    _stop(world, host.machine.agent, fault.ms)


def _cut(world: World, host: Host, fault: Fault) -> None:
    _cut_link(world, host, fault.more % 2, (False, False), fault.ms)


def _cut_link(world: World, host: Host, number: int, directions: tuple[bool, bool], ms: float) -> None:
    world.cut(number, directions)
    if number == 1 and directions == (False, False):
        host.machine.lan_up = False

    def whole() -> None:
        world.cut(number, (True, True))
        if number == 1:
            host.machine.lan_up = True

    _later(world, ms, whole)


def _cut_one_way(world: World, host: Host, fault: Fault) -> None:
    _cut_link(world, host, fault.more % 2, (host.number != 0, host.number != 1), fault.ms)


def _cut_both(world: World, host: Host, fault: Fault) -> None:
    _cut_link(world, host, 0, (False, False), fault.ms)
    _later(world, [0.0, 0.0, 30.0, 200.0][fault.more], lambda: _cut_link(world, host, 1, (False, False), fault.ms))


def _lose(world: World, host: Host, fault: Fault) -> None:
    for link in world.links:
        link.loss = [0.05, 0.3, 0.6, 0.9][fault.more]
    _later(world, fault.ms, lambda: [setattr(link, "loss", 0.0) for link in world.links] and None)


def _double(world: World, host: Host, fault: Fault) -> None:
    for link in world.links:
        link.double = 0.4
    _later(world, fault.ms, lambda: [setattr(link, "double", 0.0) for link in world.links] and None)


def _late(world: World, host: Host, fault: Fault) -> None:
    for link in world.links:
        link.late_ms = [20.0, 120.0, 400.0, 1500.0][fault.more]
    _later(world, fault.ms, lambda: [setattr(link, "late_ms", 0.0) for link in world.links] and None)


def _libvirtd(world: World, host: Host, fault: Fault) -> None:
    host.machine.libvirt_down_until = world.now + fault.ms


def _disk(world: World, host: Host, fault: Fault) -> None:
    host.machine.disk_fails = True
    _later(world, fault.ms, lambda: setattr(host.machine, "disk_fails", False))


def _records(world: World, host: Host, fault: Fault) -> None:
    host.machine.store_fails = True
    _later(world, fault.ms, lambda: setattr(host.machine, "store_fails", False))


def _hang(world: World, host: Host, fault: Fault) -> None:
    def on(proc: Proc) -> None:
        host.machine.qemu_hangs = False
        if proc.alive and proc.halted:
            proc.go_on()

    for qemu in host.machine.qemus():
        host.machine.qemu_hangs = True
        qemu.proc.halt()
        _later(world, fault.ms * (4 if fault.more == 3 else 1), partial(on, qemu.proc))


def _wall(world: World, host: Host, fault: Fault) -> None:
    for number in range(1 + 30 * (fault.more % 2)):
        by = [-3.6e6, -500.0, 3.6e6, 500.0][fault.more] * (-1 if number % 2 else 1)
        _later(world, number * 37.0, lambda by=by: setattr(host, "wall_ms", host.wall_ms + by))  # type: ignore[misc]


def _shutdown(world: World, host: Host, fault: Fault) -> None:
    for qemu in host.machine.qemus():
        if qemu.runstate == "running" and qemu.colo != "secondary":
            world.oracle.ended = qemu.colo == "primary"
            qemu.event("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})
            qemu.runstate = "shutdown"


def _destroy(world: World, host: Host, fault: Fault) -> None:
    domain = host.machine.domains.get(UUID)
    if domain is not None and domain.qemu is not None:
        domain.detail = DESTROYED
        domain.qemu.event("SHUTDOWN", {"guest": False, "reason": "host-signal"})
        domain.detail = DESTROYED


def _suspend(world: World, host: Host, fault: Fault) -> None:
    for qemu in host.machine.qemus():
        if qemu.colo == "secondary" or qemu.runstate not in ("running",):
            continue

        def resume(qemu: Qemu = qemu, stops: int = qemu.stops + 1) -> None:
            # Assumed (docs/correctness.md): nobody types it in just the ms in which mcft changes the drives.
            if qemu.stops == stops and not any(name.startswith("mcft-0-") for name in qemu.nodes):
                qemu.command("cont", {}, lambda _reply: None)

        world.at(0.0, qemu.proc, qemu.command, "stop", {}, lambda _reply: None)
        world.at(min(fault.ms, 300.0), qemu.proc, resume)


def _failover(world: World, host: Host, fault: Fault) -> None:
    play.act(host, "failover")


def _solo(world: World, host: Host, fault: Fault) -> None:
    play.act(host, "solo")


def _truly_off(world: World, host: Host) -> bool:
    """Whether the other host has no guest and can't get one: the operator looked."""
    return not host.other.up


def _solo_off(world: World, host: Host, fault: Fault) -> None:
    if _truly_off(world, host):
        play.act(host, "solo", force=True, peer_is_off=True)
    else:
        play.act(host, "solo", force=True)


def _failover_off(world: World, host: Host, fault: Fault) -> None:
    if _truly_off(world, host):
        play.act(host, "failover", force=True, peer_is_off=True)
    else:
        play.act(host, "failover", force=True)


def _unprotect(world: World, host: Host, fault: Fault) -> None:
    play.act(host, "unprotect")


def _protect(world: World, host: Host, fault: Fault) -> None:
    play.protect(host, overwrite=fault.more > 1)


def _maintenance(world: World, host: Host, fault: Fault) -> None:
    play.maintenance(host, True)
    _later(world, fault.ms + 1000.0, lambda: play.maintenance(host, False))


def _start(world: World, host: Host, fault: Fault) -> None:
    play.act(host, "start")


def _accept(world: World, host: Host, fault: Fault) -> None:
    if not host.other.up:
        world.oracle.accepted_loss = True
        play.act(host, "start", accept_lost_data=True)


def _at(world: World, kind: str, what: Callable[[Host], None]) -> None:
    mended = world.mended
    world.moments[kind].append(lambda host: what(host) if world.mended == mended else None)


def _at_record(world: World, host: Host, fault: Fault) -> None:
    """The next record, or one of the four behind it: it is on the disk, and who wrote it does not know it yet."""

    skip = int(fault.ms) % 5

    def then(writer: Host) -> None:
        nonlocal skip
        skip -= 1
        if skip >= 0:
            _at(world, "record", then)
            return
        act = [_agent, _freeze, _power, _gate][fault.more]
        act(world, writer, fault)

    _at(world, "record", then)


def _at_arming(world: World, host: Host, fault: Fault) -> None:
    """`arming(g)` is on the disk: before ARM gets there the standby's QEMU, gate or agent is away."""

    def then(writer: Host) -> None:
        if writer.machine.records["record"][-1].kind != "arming":
            _at(world, "record", then)
            return
        act = [_qemu, _stop_gate, _agent, _stop_gate][fault.more]
        _later(world, world.rng.random() * 2.0, lambda: act(world, writer.other, Fault(0.0, "", 0, 5000.0)))

    _at(world, "record", then)


def _twice(world: World, host: Host, fault: Fault) -> None:
    before, world.double_calls = world.double_calls, 1.0
    world.at(fault.ms, world.outside, lambda: setattr(world, "double_calls", before))


def _before_release(world: World, host: Host, fault: Fault) -> None:
    """The standby has the checkpoint; the primary's gate, or its host, stands still before it hears of it, or just after."""

    def then(standby: Host) -> None:
        ms = max(fault.ms, 350.0)
        delay = world.rng.random() * 1.2
        if fault.more < 2:
            _later(world, delay, lambda: _stop_gate(world, standby.other, Fault(0, "", 0, ms + 3000.0)))
        else:
            _later(world, delay, lambda: _freeze(world, standby.other, Fault(0, "", 0, ms, fault.more)))

    _at(world, "acknowledged", then)


def _in_commit(world: World, host: Host, fault: Fault) -> None:
    def then(where: Host) -> None:
        act = [_qemu, _power, _agent, _freeze][fault.more]
        when = world.rng.random()
        if when < 0.5:
            _later(world, 2 * when * 250.0 * min(world.slow_commit, 12.0), lambda: act(world, where, fault))
        else:
            _at(world, "committed", lambda ended: _later(world, (2 * when - 1) * 15.0, lambda: act(world, ended, fault)))

    _at(world, "commit", then)
    if fault.host == 0:
        _qemu_primary(world)


def _qemu_primary(world: World) -> None:
    for host in world.hosts:
        for qemu in host.machine.qemus():
            if qemu.colo == "primary":
                qemu.proc.kill()


def _arbiter_away(world: World, host: Host, fault: Fault) -> None:
    etcd = world.etcd
    if fault.more == 3:
        etcd.up = False
    else:
        etcd.reaches[host.number] = world.fence_works[host.number] = False
        if fault.more == 2:
            etcd.reaches[:] = world.fence_works[:] = [False, False]
    _later(world, fault.ms, lambda: _arbiter_there(world))


def _arbiter_there(world: World) -> None:
    world.etcd.up = True
    world.etcd.reaches[:] = world.fence_works[:] = [True, True]
    world.etcd.slow_ms = 0.0


def _arbiter_slow(world: World, host: Host, fault: Fault) -> None:
    world.etcd.slow_ms = [20.0, 200.0, 900.0, 4000.0][fault.more]
    _later(world, fault.ms, lambda: _arbiter_there(world))


def _arbiter_wiped(world: World, host: Host, fault: Fault) -> None:
    if world.arbiter == "etcd":
        world.etcd.wipe()


def _arbiter_back(world: World, host: Host, fault: Fault) -> None:
    if world.arbiter == "etcd":
        world.etcd.roll_back()


_HOW: dict[str, Callable[[World, Host, Fault], None]] = {
    "kill the gate": _gate, "kill the agent": _agent, "kill QEMU": _qemu, "power": _power, "both lose power": _both_power,
    "freeze the host": _freeze, "stop the gate": _stop_gate, "stop the agent": _stop_agent, "cut a link": _cut,
    "cut one way": _cut_one_way, "cut both links": _cut_both, "lose datagrams": _lose, "double datagrams": _double,
    "late datagrams": _late, "libvirtd away": _libvirtd, "disk fails": _disk, "records fail": _records, "QEMU hangs": _hang,
    "wall clock steps": _wall, "the guest shuts down": _shutdown, "virsh destroy": _destroy,
    "virsh suspend and resume": _suspend, "mcft failover": _failover, "mcft solo": _solo,
    "mcft solo --peer-is-off": _solo_off, "mcft failover --force --peer-is-off": _failover_off, "mcft unprotect": _unprotect,
    "mcft protect": _protect, "mcft maintenance": _maintenance, "mcft start": _start,
    "at the next record": _at_record, "between acknowledgement and release": _before_release,
    "while the overlays are committed": _in_commit, "mcft start --accept-lost-data": _accept,
    "arbiter away": _arbiter_away, "arbiter slow": _arbiter_slow,
    "arbiter wiped": _arbiter_wiped, "arbiter rolled back": _arbiter_back,
    "calls come twice": _twice, "at arming": _at_arming,
}  # fmt: skip
