"""Stands in for a gate's sockets: the real `Gate` with its real loop, keepalives and sides, in virtual time.

Datagrams, the added monitor, the control socket, the filters' sockets and the process watch are in memory here; what is
behind them (parsing, deciding, answering) is the product's own.
"""

from __future__ import annotations

import struct
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mcft.gate.core as core
from mcft.filterbuffer import Channel, FilterBuffer
from mcft.gate.control import Control, _Client
from mcft.gate.lan import ASK_EVERY_MS, LanCheck
from mcft.gate.loop import Loop
from mcft.gate.primary import Primary
from mcft.gate.qemu import OwnQemu
from mcft.gate.standby import Standby
from mcft.gate.state import GateState, paths
from mcft.keepalive import Link
from mcft.monitor import Message, Monitor, MonitorGone, Reply
from tests.sim.disk import Moment
from tests.sim.machine import ADDRESSES, RUN
from tests.sim.qemu import Qemu
from tests.sim.world import Host, Proc, Violation, here

FRAME = struct.Struct("!IIII")
READ_AFTER_MS = 0.3  # QEMU's main loop comes to what a gate wrote


class Sock:
    """One end of anything that a selector can watch."""

    def __init__(self, proc: GateProc) -> None:
        self.proc, self.open = proc, True

    def close(self) -> None:
        self.open = False

    def fileno(self) -> int:
        return -1


def current() -> GateProc:
    """The gate whose code runs: one per host at most."""
    return next(proc for proc in here.host.procs if isinstance(proc, GateProc))


class Selector:
    """`selectors`: what was marked as ready."""

    def __init__(self) -> None:
        self.map: dict[Any, _Key] = {}
        self.ready: dict[Any, int] = {}

    def register(self, sock: Any, events: int, data: Any) -> None:
        if sock in self.map:
            raise KeyError(sock)
        self.map[sock] = _Key(data)

    def modify(self, sock: Any, events: int, data: Any) -> None:
        self.map[sock].data = data

    def unregister(self, sock: Any) -> None:
        del self.map[sock]

    def select(self, _timeout: float) -> list[tuple[_Key, int]]:
        ready, self.ready = self.ready, {}
        return [(self.map[sock], events) for sock, events in ready.items() if sock in self.map]


class _Key:
    __slots__ = ("data",)

    def __init__(self, data: Any) -> None:
        self.data = data


class GateProc(Proc):
    """`python -m mcft.gate`."""

    def __init__(self, host: Host, uuid: str, ready: Callable[[], None]) -> None:
        super().__init__(host, "gate")
        self.uuid, self.quit = uuid, False
        self.selector = Selector()
        self._turning = False
        self._timer_at = float("inf")
        self.fds: dict[int, Proc] = {}
        self.on_death.append(self._gone)
        state = load_state(paths(RUN, uuid)[0])
        here.host = host
        self.gate = core.Gate(state, RUN, Primary if state.role == "primary" else Standby)
        self.gate.start(ready)
        self._next()

    def ready(self, sock: Any) -> None:
        self.selector.ready[sock] = 1
        self.wake()

    def wake(self) -> None:
        if not self._turning and self.alive:
            self._turning = True
            self.host.world.at(0.02 + self.host.world.rng.random() * 0.08, self, self.turn)

    def turn(self) -> None:
        self._turning = False
        loop = self.gate.loop
        try:
            loop.turn(self.gate._turn)
        except Violation:
            raise
        except Exception:
            raise Violation("the gate ended by itself", traceback.format_exc(limit=8)) from None
        if not loop.running:
            self.quit = True
            self.kill()
            return
        self._next()

    def _next(self) -> None:
        world, wait = self.host.world, self.gate.loop.timeout_ms()
        at = world.now + wait + 0.01
        if at < self._timer_at - 0.005:
            self._timer_at = at
            world.at(wait + 0.01, self, self._timer, at)

    def _timer(self, at: float) -> None:
        if at == self._timer_at:
            self._timer_at = float("inf")
            if self._turning:
                self._next()
            else:
                self.turn()

    def _gone(self) -> None:
        machine = self.host.machine
        for key in [key for key, link in machine.udp.items() if link.proc is self]:
            del machine.udp[key]
        monitor = self.gate.qemu.monitor
        if isinstance(monitor, SimMonitor) and monitor.qemu is not None and monitor.qemu.monitor is monitor:
            monitor.qemu.monitor = None
        control = self.gate.control
        if machine.sockets.get(control.path) is control:
            del machine.sockets[control.path]
        if isinstance(control, SimControl):
            for client in control.conns:
                client.gate_gone()
        machine.gate_gone(self)


def waiting_for(host: Host, proc: Proc, fd: int) -> None:
    """A pidfd of the gate that is being made or runs: readable once that process is dead."""
    gate = current()

    def ended() -> None:
        if gate.alive:
            host.world.at(0.1, host.machine.kernel, gate.ready, fd)

    proc.on_death.append(ended)


def make_loop(send: Any, latest_ms: Any) -> Loop:
    return Loop(send, latest_ms, selector=current().selector)  # type: ignore[arg-type]


# ---- keepalives ----


class SimLink(Link):
    """`keepalive.Link`: UDP."""

    @classmethod
    def open(cls, local: str, local_port: int, peer: str, peer_port: int) -> SimLink:
        link = cls(peer, Sock(current()))  # type: ignore[arg-type]
        link.proc = current()
        link.inbox = []
        host = link.proc.host
        link.number = ADDRESSES[host.name].index(local)
        link.there = (peer, peer_port)
        host.machine.udp[(local, local_port)] = link
        return link

    def send(self, datagram: bytes) -> bool:
        host = self.proc.host
        host.world.datagram(self.number, host, self._deliver, datagram)
        return True

    def _deliver(self, datagram: bytes) -> None:
        link = self.proc.host.other.machine.udp.get(self.there)
        if link is not None:
            link.inbox.append(datagram)
            other = self.proc.host.other
            newest = other.machine.newest
            counter = int.from_bytes(datagram[40:48], "big")
            fresh = counter >= newest.get(datagram[32:40], 0)
            proven = link.proc.gate.session.peer_nonce == datagram[32:40]  # a newcomer must prove itself first
            if fresh and proven:
                other.machine.heard_at = other.world.now
            newest[datagram[32:40]] = max(counter, newest.get(datagram[32:40], 0))
            link.proc.ready(link.sock)

    def receive(self) -> list[bytes]:
        inbox, self.inbox = self.inbox, []
        return inbox


class SimLan(LanCheck):
    """`lan.LanCheck`: pings to the gateway."""

    def ask(self, now_ms: float) -> None:
        if now_ms - self.asked_ms < ASK_EVERY_MS:
            return
        self.asked_ms = now_ms
        self._sequence += 1
        host, gate = here.host, current()
        if host.machine.lan_up:
            proc = next((p for p in host.procs if isinstance(p, GateProc) and p.gate.lan is self), gate)
            host.world.at(0.3, proc, self._answer, self._sequence)

    def in_peace(self, now_ms: float) -> None:
        """Not asked in peace here: nothing is decided by it."""

    def _answer(self, sequence: int) -> None:
        if sequence > self._forgotten:
            self.answered_ms = here.host.boottime_ms()


# ---- the added monitor ----


@dataclass
class SimMonitor(Monitor):
    """`monitor.Monitor`: the socket between gate and QEMU."""

    qemu: Qemu | None = None
    proc: GateProc | None = None
    inbox: deque[Message] = field(default_factory=deque)
    flight: deque[Message] = field(default_factory=deque)
    _eof: bool = False
    _greeted: bool = False
    _sent_at: float = 0.0

    def open(self) -> Any:
        self.proc = self.proc or current()
        host = self.proc.host
        qemu = host.machine.qemu_at(self.path)
        if qemu is None:
            raise MonitorGone(f"monitor {self.path}: no such file")
        self.close()
        self._opening = Sock(self.proc)  # type: ignore[assignment]
        self.inbox, self.flight, self._eof, self._greeted = deque(), deque(), False, False
        if qemu.monitor is None:
            qemu.monitor, self.qemu = self, qemu
            host.world.at(0.3, host.machine.kernel, self._greet)
        return self._opening

    def _greet(self) -> None:
        self._greeted = True
        assert self.proc is not None
        if self._opening is not None:
            self.proc.ready(self._opening)

    def negotiate(self) -> bool:
        if self._eof:
            raise MonitorGone("end of file")
        if self._greeted:
            self.sock, self._opening, self.oob = self._opening, None, True
        return self._greeted

    def encode(self, command: str, arguments: Message | None = None, on_reply: Reply | None = None, *, oob: bool = False) -> Any:
        raise AssertionError("never")

    def send(self, command: str, arguments: Message | None = None, on_reply: Reply | None = None, *, oob: bool = False) -> None:
        if self.sock is None or self._eof:
            raise MonitorGone("not connected")
        self._serial += 1
        ident = f"g{self._serial}"
        if on_reply is not None:
            self._replies[ident] = on_reply
        assert self.qemu is not None
        world, qemu = self.qemu.world, self.qemu
        at = max(world.now + 0.05 + world.rng.random() * 0.2, self._sent_at)
        if oob:
            at = world.now + 0.05
        else:
            self._sent_at = at

        def answered(reply: Message) -> None:
            if qemu.monitor is self:
                qemu._to_monitor({"id": ident, **reply})

        world.at(at - world.now, qemu.proc, lambda: qemu.command(command, arguments or {}, answered, oob=oob))

    def flush(self) -> None: ...

    def arrive(self) -> None:
        if not self.flight:
            return
        self.inbox.append(self.flight.popleft())
        if self.proc is not None and self.sock is not None:
            self.proc.ready(self.sock)

    def lost(self) -> None:
        """QEMU is dead. What it had written is in the socket."""
        self.inbox += self.flight
        self.flight.clear()
        self._eof = True
        if self.proc is not None and self.proc.alive:
            sock = self.sock or self._opening
            if sock is not None:
                self.proc.host.world.at(0.1, self.proc.host.machine.kernel, self.proc.ready, sock)

    def receive(self) -> list[Message]:
        if self.sock is None:
            raise MonitorGone("not connected")
        if not self.inbox and self._eof:
            raise MonitorGone("end of file")
        messages = list(self.inbox)
        self.inbox.clear()
        return messages

    def close(self) -> None:
        if self.qemu is not None and self.qemu.monitor is self:
            self.qemu.monitor = None
        self.qemu = None
        super().close()


def send_fds(own: OwnQemu, fds: tuple[int, ...], command: tuple[str, dict[str, Any]], on_reply: Reply) -> None:
    """`OwnQemu._send_fds`: the filters' ends that `make_channel` made just now."""
    monitor = own.monitor
    assert isinstance(monitor, SimMonitor)
    qemu = monitor.qemu
    if qemu is not None:
        qemu.fds[command[1]["fdname"]] = SimChannel.newest_out if command[1]["fdname"].endswith("fdo") else SimChannel.newest_in
    monitor.send(command[0], command[1], on_reply)


# ---- the filters' sockets ----


class _End:
    """QEMU's end of one of a channel's two sockets."""

    def __init__(self, channel: SimChannel) -> None:
        self.channel = channel
        self.qemu: Qemu | None = None
        self.chardev = ""
        self.unread: deque[tuple[Moment, str]] = deque()

    def given_to(self, qemu: Qemu, chardev: str) -> None:
        self.qemu, self.chardev = qemu, chardev

    def from_guest(self, moment: Moment) -> None:
        if self.channel.proc.alive and not self.channel.closed:
            self.channel.unread += FRAME.pack(8, 0, moment.branch, moment.n)
            self.channel.proc.ready(self.channel.ours_out)

    def from_gate(self, moment: Moment, mode: str) -> None:
        """It lies in the socket until QEMU's main loop comes to it: a host may freeze in between."""
        assert self.qemu is not None
        if self.qemu.world.release_is_kernels:
            self.qemu.from_gate(self.chardev, moment, mode)
            return
        self.unread.append((moment, mode))
        self.qemu.world.at(READ_AFTER_MS, self.qemu.proc, self._read)

    def _read(self) -> None:
        assert self.qemu is not None
        self.qemu.from_gate(self.chardev, *self.unread.popleft())

    def qemu_gone(self) -> None:
        self.channel.ended = True
        if self.channel.proc.alive:
            self.channel.proc.ready(self.channel.ours_out)

    def close(self) -> None: ...

    def fileno(self) -> int:
        return -1


class _Out(Sock):
    channel: SimChannel

    def recv(self, _size: int) -> bytes:
        channel = self.channel
        if channel.unread:
            data = bytes(channel.unread)
            channel.unread.clear()
            return data
        if channel.ended:
            return b""
        raise BlockingIOError


class _In(Sock):
    channel: SimChannel

    def send(self, data: bytearray) -> int:
        end = self.channel.end_in
        if end.qemu is None or not end.qemu.proc.alive:
            raise OSError("broken pipe")
        mode = self.channel.mode()
        whole = len(data) // FRAME.size * FRAME.size
        for at in range(0, whole, FRAME.size):
            _, _, branch, n = FRAME.unpack_from(data, at)
            end.from_gate(Moment(branch, n), mode)
        return whole


class SimChannel(Channel):
    """`filterbuffer.Channel` on two sockets in memory."""

    newest_out: _End
    newest_in: _End

    def __init__(self, nic: Any, limit: int) -> None:
        self.proc = current()
        out, inn = _Out(self.proc), _In(self.proc)
        super().__init__(nic, out, inn, limit)  # type: ignore[arg-type]
        out.channel = inn.channel = self
        self.unread = bytearray()
        self.ended = self.closed = False
        self.end_out, self.end_in = _End(self), _End(self)
        SimChannel.newest_out, SimChannel.newest_in = self.end_out, self.end_in

    def mode(self) -> str:
        gate = self.proc.gate
        if gate.state.record == "preparing":
            return "pass"  # nothing was promised: an undo lets out what it held
        buffer = getattr(gate.side, "buffer", None)
        return buffer.mode if isinstance(buffer, FilterBuffer) else "pass"

    def unread_bytes(self) -> int:
        return len(self.end_in.unread) * FRAME.size

    def close(self) -> None:
        self.closed = True
        super().close()


def make_channel(nic: Any, limit_bytes: int) -> Any:
    channel = SimChannel(nic, limit_bytes)
    return channel, channel.end_out, channel.end_in


# ---- the control socket ----


class _ControlSock(Sock):
    """The gate's end of one agent's connection, and the agent's transport."""

    def __init__(self, control: SimControl, loop: Any, protocol: Any) -> None:
        super().__init__(control.proc)
        self.control, self.loop_, self.protocol = control, loop, protocol
        self.data = bytearray()
        self.ended = False
        loop.proc.on_death.append(self._agent_gone)

    # the gate's side

    def recv(self, _size: int) -> bytes:
        if self.data:
            data = bytes(self.data)
            self.data.clear()
            return data
        if self.ended:
            return b""
        raise BlockingIOError

    def send(self, data: bytearray) -> int:
        if self.ended:
            raise BrokenPipeError
        agent = self.loop_.proc
        agent.host.world.at(0.1, agent, self._to_agent, bytes(data))
        return len(data)

    def _to_agent(self, data: bytes) -> None:
        if not self.closing:
            self.protocol.data_received(data)

    def gate_gone(self) -> None:
        agent = self.loop_.proc
        if not self.closing and agent.alive:
            agent.host.world.at(0.15, agent, self._lost)

    def _lost(self) -> None:
        if not self.closing:
            self.closing = True
            self.protocol.eof_received()
            self.protocol.connection_lost(None)

    # the agent's side: an asyncio transport

    closing = False

    def write(self, data: bytes) -> None:
        world = self.proc.host.world
        world.at(0.1, self.proc.host.machine.kernel, self._to_gate, bytes(data))

    def _to_gate(self, data: bytes) -> None:
        if self.proc.alive and not self.ended:
            self.data += data
            self.proc.ready(self)

    def close(self) -> None:
        if here.host is not None and not self.closing:
            self.closing = True
            self._agent_gone()

    def is_closing(self) -> bool:
        return self.closing

    def get_extra_info(self, _name: str, default: Any = None) -> Any:
        return default

    def _agent_gone(self) -> None:
        self.closing = self.ended = True
        if self.proc.alive:
            self.proc.ready(self)


class SimControl(Control):
    """`control.Control` on connections in memory."""

    def listen(self) -> None:
        self.proc = current()
        self.conns: list[_ControlSock] = []
        self.proc.host.machine.sockets[self.path] = self

    def note(self, kind: str, **fields: Any) -> None:
        if kind == "verdict" and fields["act"] == "claim":
            here.world.oracle.claims(here.host, fields["reason"])
        super().note(kind, **fields)

    def connect(self, loop: Any, protocol: Any) -> _ControlSock:
        sock = _ControlSock(self, loop, protocol)
        client = _Client(sock)  # type: ignore[arg-type]
        self._clients.append(client)
        self.conns.append(sock)
        self.loop.watch(sock, 1, lambda events: self._ready(client, events))  # type: ignore[arg-type]
        if self.on_agent is not None:
            self.on_agent(True)
        return sock


def save_state(path: str, state: GateState) -> None:
    import msgspec

    here.host.files.put(path, msgspec.json.encode(state))


def load_state(path: str) -> GateState:
    import msgspec

    held = here.host.files.held
    if path not in held:
        raise FileNotFoundError(path)
    return msgspec.json.decode(held[path], type=GateState)
