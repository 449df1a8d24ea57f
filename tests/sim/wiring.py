"""Puts the stand-ins where the product's modules look for clocks, files, sockets and processes. Once per process."""

from __future__ import annotations

import logging
from typing import Any

from tests.sim.files import SimOs, process_start, sim_open
from tests.sim.world import here


def boottime_ms() -> float:
    """CLOCK_BOOTTIME of the host whose code runs."""
    return here.host.boottime_ms()


class SimTime:
    """`time`."""

    CLOCK_BOOTTIME = 7

    @staticmethod
    def time() -> float:
        return (here.host.wall_ms + here.world.now) / 1000

    @staticmethod
    def monotonic() -> float:
        return here.host.boottime_ms() / 1000

    @staticmethod
    def clock_gettime(_clock: int) -> float:
        return here.host.boottime_ms() / 1000


class SimSecrets:
    """`secrets`."""

    @staticmethod
    def token_hex(count: int) -> str:
        return here.world.rng.randbytes(count).hex()


class SimRandom:
    """`random`."""

    @staticmethod
    def uniform(low: float, high: float) -> float:
        return here.world.rng.uniform(low, high)


class SimUrl:
    """`yarl.URL`."""

    @staticmethod
    def build(*, host: str, path: str, **_: Any) -> tuple[str, str]:
        return host, path.rsplit("/", 1)[1]


async def _run(*argv: str, **options: Any) -> str:
    return await here.host.machine.run(*argv, **options)


async def _nothing(*_: Any, **__: Any) -> None: ...


async def _no(*_: Any, **__: Any) -> bool:
    return False


async def _silence(ifname: str) -> None:
    machine = here.host.machine
    machine.taps[ifname] = False
    machine.silenced.add(ifname)


async def _choose(*_: Any) -> str:
    return "filter"


def _set_link(ifname: str, *, up: bool) -> None:
    here.host.machine.taps[ifname] = up


def _remove_drop_filter(ifname: str) -> None:
    here.host.machine.silenced.discard(ifname)


def _user_of(path: str) -> str:
    return next((f"qemu (process {q.proc.pid})" for q in here.host.machine.qemus() if q.path == path), "")


def _boot_id() -> str:
    return f"{here.host.name}-{here.host.boot}"


def install() -> None:
    """Patch the modules' globals. Everything below is by name: a module that renames one fails here, loudly."""
    logging.disable(logging.CRITICAL)
    import mcft.agent.acts
    import mcft.agent.again
    import mcft.agent.check
    import mcft.agent.coldstart
    import mcft.agent.copy
    import mcft.agent.core
    import mcft.agent.decisions
    import mcft.agent.diskfiles
    import mcft.agent.ends
    import mcft.agent.gates
    import mcft.agent.hook
    import mcft.agent.jobs
    import mcft.agent.life
    import mcft.agent.maintenance
    import mcft.agent.network
    import mcft.agent.outcomes
    import mcft.agent.overlays
    import mcft.agent.overwriting
    import mcft.agent.peers
    import mcft.agent.ports
    import mcft.agent.protection
    import mcft.agent.setup
    import mcft.agent.site
    import mcft.agent.standby
    import mcft.diskreplica
    import mcft.gate.control
    import mcft.gate.core
    import mcft.gate.filter
    import mcft.gate.lan
    import mcft.gate.links
    import mcft.gate.loop
    import mcft.gate.primary
    import mcft.gate.qemu
    import mcft.gate.standby
    import mcft.gate.state
    import mcft.keepalive
    import mcft.qmp_passthrough
    from tests.sim import agents, gates

    agent, gate = mcft.agent, mcft.gate

    def put(name: str, value: Any, *modules: Any) -> None:
        for module in modules:
            if not hasattr(module, name) and name != "open":
                raise AttributeError(f"{module.__name__} has no {name} any more: tests/sim/wiring.py")
            setattr(module, name, value)

    put("boottime_ms", boottime_ms, gate.loop, gate.core, gate.qemu, gate.primary, gate.standby, gate.lan,
        agent.setup, agent.protection, agent.outcomes, agent.ends, agent.again, agent.overlays)  # fmt: skip
    put("time", SimTime, gate.qemu, gate.primary, gate.standby, agent.life, agent.peers, agent.ports, agent.jobs)
    put("os", SimOs, gate.qemu, gate.primary, gate.standby, mcft.keepalive, agent.life, agent.setup, agent.decisions,
        agent.outcomes, agent.copy, agent.gates, agent.overlays, agent.maintenance, agent.diskfiles, agent.overwriting,
        mcft.diskreplica)  # fmt: skip
    put("open", sim_open, agent.life, agent.outcomes, agent.overwriting, agent.diskfiles)
    put("process_start", process_start, gate.qemu, gate.primary, agent.life, agent.setup, agent.copy)
    put("secrets", SimSecrets, agent.setup, agent.acts, agent.coldstart, agent.maintenance)
    put("random", SimRandom, agent.peers)
    put("run", _run, agent.gates, agent.copy, agent.diskfiles, agent.overlays)
    put("boot_id", _boot_id, agent.hook, agent.core, agent.maintenance)
    put("set_quickack", _no, agent.network)
    put("silence", _silence, agent.network)
    put("set_link", _set_link, gate.links, gate.primary, gate.standby, agent.setup)
    put("remove_drop_filter", _remove_drop_filter, gate.links, gate.standby)
    put("user_of", _user_of, agent.overwriting)
    put("uses_vhost", lambda _pid: False, mcft.agent.domainxml)
    put("refuse_unfit", _nothing, mcft.agent.checkpeer)
    put("choose", _choose, mcft.agent.buffers)
    put("shutil", SimShutil, agent.life, agent.copy)
    put("add_monitor", _add_monitor, agent.setup, agent.copy)
    put("_free", lambda *_, **__: True, agent.ports)
    put("URL", SimUrl, agent.peers)
    put("_Pool", agents.SimPool, agent.peers)
    put("client_context", lambda _config: None, mcft.agent.tls)
    put("Loop", gates.make_loop, gate.core)
    put("Link", gates.SimLink, gate.core)
    put("LanCheck", gates.SimLan, gate.core)
    put("Monitor", gates.SimMonitor, gate.qemu)
    put("Control", gates.SimControl, gate.core)
    put("TapLease", SimTapLease, gate.filter)
    put("make_channel", gates.make_channel, gate.filter)
    put("save", gates.save_state, gate.core, gate.state)
    put("load", gates.load_state, gate.state)
    put("_forget_file", _forget_file, gate.standby)
    put("sockbreak", SimSockbreak, gate.standby)
    mcft.gate.qemu.OwnQemu._send_fds = gates.send_fds  # type: ignore[method-assign, assignment]


class SimTapLease:
    """`TapLease`: until when this machine's kernel passes on what the guest's tap is given; it goes with its gate's process."""

    def __init__(self) -> None:
        from tests.sim.gates import current

        self.host, self.gate = here.host, current()
        self.until_ms, self.stands = float("inf"), False

    def until(self, at_ms: float) -> None:
        self.until_ms = at_ms

    def guard(self, taps: list[str]) -> None:
        if here.world.release_is_kernels:
            raise OSError("no program at the tap")
        self.stands = True
        for tap in taps:
            self.host.machine.tap_leases[tap] = self

    def lift(self) -> None:
        self.stands = False

    def passes(self) -> bool:
        return not (self.stands and self.gate.alive) or self.host.boottime_ms() < self.until_ms


class SimSockbreak:
    """`sockbreak`: what the kernel knows of TCP connections."""

    @staticmethod
    def is_open(port: int) -> bool:
        streams = ((q, q.stream) for q in here.host.machine.qemus() if q.listening == port)
        return any(stream is not None and stream.established(q) for q, stream in streams)


def _forget_file(path: str) -> None:
    here.host.files.drop(path)


class SimShutil:
    """`shutil`."""

    @staticmethod
    def rmtree(path: str, **_: Any) -> None:
        files = here.host.files
        for name in [name for name in files.held if name.startswith(f"{path}/")]:
            files.drop(name)


async def _add_monitor(qmp: Any, path: str) -> None:
    """`qmp_passthrough.add_monitor`, without the socket."""
    qemu = next((q for q in here.host.machine.qemus()), None)
    if qemu is not None:
        qemu.fds["mcft-mon-fd"] = None
    address = {"type": "fd", "data": {"str": "mcft-mon-fd"}}
    await qmp.execute("chardev-add", id="mcft-mon", backend={"type": "socket", "data": {"addr": address, "server": True}})
    await qmp.execute("object-add", **{"qom-type": "monitor-qmp"}, id="mcft-qmp", chardev="mcft-mon")
