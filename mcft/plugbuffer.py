"""The network buffer by the kernel: an IFB and a `plug` qdisc per NIC, driven over rtnetlink. The canonical way.

What the guest sends is redirected at its tap's ingress to the IFB, waits in the plug, and goes on from the tap's ingress
once it is released: any bridge, vhost or not, no copy. It survives the gate: while nobody drives the plug, it holds.

Two sockets: `wire` sends what was encoded beforehand, all NICs in one datagram, and reads the acknowledgements that the
kernel has already queued by then; `watch` hears of every change by others (`plugwire.judge`) and is read before each
release. Nothing here waits, but that the kernel takes its rtnl lock inside `send`.
Sources: Linux net/sched/sch_plug.c; `plugwire.py` for the messages.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from mcft import plugwire as wire
from mcft.errors import Failed, Refused
from mcft.netbuffer import Backlog, Mode, Nic
from mcft.plugwire import Line

RTNLGRP_LINK, RTNLGRP_TC = 1, 4
_SO_ATTACH_FILTER, _SO_RCVBUFFORCE, _SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP = 26, 33, 270, 1
ANSWER_S = 2.0
DRAIN_MS = 200.0


class Netlink:
    """A NETLINK_ROUTE socket. `ask` waits for the kernel's answer (set-up); `fire` and `answers` never do (timed path)."""

    def __init__(self) -> None:
        self.sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self.sock.bind((0, 0))
        self.sock.setblocking(False)
        self.port = int(self.sock.getsockname()[0])
        self._sequence = 0

    def close(self) -> None:
        self.sock.close()

    def _numbered(self, message: bytes) -> bytes:
        self._sequence = (self._sequence + 1) & 0x7FFFFFFF
        return message[:8] + struct.pack("=I", self._sequence) + message[12:]

    def ask(self, message: bytes) -> list[tuple[int, bytes]]:
        """Send one and return what came back, (type, body) each. Raises: OSError with the kernel's errno."""
        self.sock.send(self._numbered(message))
        found: list[tuple[int, bytes]] = []
        while True:
            if not select.select([self.sock], [], [], ANSWER_S)[0]:
                raise TimeoutError(errno.ETIMEDOUT, "the kernel does not answer")
            for kind, sequence, body in wire.messages(self.sock.recv(1 << 18)):
                if sequence != self._sequence:
                    continue  # the acknowledgement of something fired before
                if kind in (wire.ERROR, wire.DONE):
                    if code := wire.error_of(body):
                        raise OSError(code, os.strerror(code))
                    return found
                found.append((kind, body))
                if message[6:8] == b"\1\0":  # NLM_F_REQUEST alone: one answer, no acknowledgement
                    return found

    def fire(self, messages: bytes) -> None:
        """Send without waiting. Raises: OSError."""
        self.sock.send(messages)

    def answers(self) -> Iterator[int]:
        """The errno (0: done) of each acknowledgement that has arrived."""
        while True:
            try:
                datagram = self.sock.recv(1 << 16)
            except BlockingIOError:
                return
            for kind, _, body in wire.messages(datagram):
                if kind == wire.ERROR:
                    yield wire.error_of(body)


@dataclass
class PlugBuffer:
    """The `NetBuffer` contract over one `Line` per NIC.

    broken: why it can't be trusted any more (somebody changed a piece of it); from then on nothing is released.
    remarks: changes that are harmless and worth a word.
    """

    lines: list[Line] = field(default_factory=list)
    taps: list[str] = field(default_factory=list)  # whose pieces `detach` takes away, also of a line that is broken
    mode: Mode = "pass"
    broken: str = ""
    merged: int = 0  # barriers that came while one was outstanding: the kernel counts no second one
    taps_up: bool = True  # what we want; a tap that somebody else sets down is a change
    remarks: list[str] = field(default_factory=list)
    link: Netlink = field(default_factory=Netlink)
    watch: socket.socket | None = None
    outstanding: bool = False
    _steps: dict[wire.Action, bytes] = field(default_factory=dict)
    _known: dict[int, Backlog] = field(default_factory=dict)

    # ---- the contract; `barrier` and `release` are the timed path ----

    def hold(self) -> None:
        """From now on everything waits. What was still on its way out leaves first, or the kernel would miscount it."""
        if self.mode == "pass":
            end = time.monotonic() + DRAIN_MS / 1000
            self._do("buffer")
            while not self.broken and any(queue.packets for queue in self._queues()):
                if time.monotonic() > end:
                    self._replace()  # they would lag for ever: dropped, as by a full queue
                    break
                self._do("release-indefinite")
                self._do("buffer")
            self.outstanding = False
        self.mode = "hold"

    def barrier(self) -> None:
        """All that has been sent so far, by every NIC, is before the barrier. A second one merges into the next epoch."""
        if self.outstanding:
            self.merged += 1
            return
        self._do("buffer")
        self.outstanding = True

    def release(self) -> None:
        """Everything before the barrier leaves, on every NIC; nothing at all if a piece of the buffer was changed."""
        assert self.mode == "hold", f"a release while the buffer is {self.mode}"
        self.look()
        if self.broken or not self.outstanding:
            return
        self._do("release-one")
        self.outstanding = False

    def open(self) -> None:
        """Everything leaves in order, then passes. A buffer that was tampered with is taken away instead."""
        self.look()
        self.taps_up = True
        if self.broken:
            self.detach()
        else:
            self._do("release-indefinite")
        self.mode, self.outstanding = "pass", False

    def close(self) -> None:
        """Nothing leaves until `open` or `reopen`; what is held stays in the kernel."""
        self.mode, self.taps_up = "closed", False

    def reopen(self) -> None:
        """Hold again: the close is taken back."""
        self.look()
        self.mode, self.taps_up = "hold", True

    def drop(self) -> None:
        """Throw away what is held (this side lost: its unacknowledged output never existed)."""
        if not self.broken:
            self._replace()

    def backlog(self) -> list[Backlog]:
        """What waited and was dropped when `poll` last looked."""
        return [self._known.get(line.ifb_index, Backlog(line.tap, 0, 0, 0)) for line in self.lines]

    def poll(self) -> None:
        """Ask the kernel for the backlog. Not for the timed path: half a millisecond."""
        with contextlib.suppress(OSError):
            self._queues()

    # ---- watching ----

    def look(self) -> None:
        """Read what others changed; `broken` and `remarks` say it after."""
        while self.watch is not None:
            try:
                datagram = self.watch.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError as error:
                self.broken = self.broken or f"notifications of the kernel were lost ({error.strerror})"
                return
            for kind, _, body in wire.messages(datagram):
                heard = wire.news(kind, body)
                verdict = wire.judge(self.lines, heard, taps_up=self.taps_up) if heard is not None else None
                if verdict is not None and verdict.tampered:
                    self.broken = self.broken or verdict.what
                elif verdict is not None:
                    self.remarks.append(verdict.what)

    def _subscribe(self) -> None:
        """From now on every change by others is heard; what went before is looked at once."""
        indexes = [index for line in self.lines for index in (line.tap_index, line.ifb_index)]
        program = ctypes.create_string_buffer(wire.socket_filter(self.link.port, indexes))
        watch = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        count = (len(program) - 1) // 8
        fprog = struct.pack("HxxxxxxP" if struct.calcsize("P") == 8 else "HxxP", count, ctypes.addressof(program))
        watch.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)
        with contextlib.suppress(OSError):
            watch.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 20)
        watch.setblocking(False)
        watch.bind((0, 0))
        for group in (RTNLGRP_LINK, RTNLGRP_TC):
            watch.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
        self._unsubscribe()
        self.watch = watch

    def _unsubscribe(self) -> None:
        if self.watch is not None:
            self.watch.close()
            self.watch = None

    def verify(self) -> str:
        """Whether every piece stands as it was made; the first that does not, or empty. Reads the kernel."""
        for line in self.lines:
            try:
                if not _seen(self.link, line.ifb_index).up:
                    return f"{line.ifb} is down"
                if not any(queue.handle == line.handle and queue.kind == "plug" for queue in _queues(self.link, line.ifb_index)):
                    return f"{line.ifb} has no plug qdisc of mcft's"
                if not _redirected(self.link, line):
                    return f"the ingress filter from {line.tap} to {line.ifb} is gone"
            except OSError as error:
                return f"{line.ifb}: {error.strerror}"
        return ""

    # ---- set-up and its undo; these wait for the kernel ----

    def attach(self, nics: list[Nic], limits: list[int]) -> None:
        """Put every NIC's way in place, in pass-through. Raises: Refused, Failed; all or nothing. Again: nothing changes."""
        self.taps = [nic.target for nic in nics]
        try:
            for nic, limit in zip(nics, limits, strict=True):
                with _named(f"the network buffer of {nic.target} can't be attached"):
                    self._attach_line(nic, limit)
        except BaseException:
            self.detach()
            raise
        self._encode()
        self._subscribe()
        self._check()

    def _attach_line(self, nic: Nic, limit_bytes: int) -> None:
        remove(self.link, nic.target)  # what an attach that was cut off has left
        tap_index = socket.if_nametoindex(nic.target)
        copied = wire.copies(_filters(self.link, tap_index), nic.target)
        name = wire.ifb_name(nic.target)
        ifb_index, found = _make_ifb(self.link, nic.target, name)
        line = Line(nic.target, tap_index, name, ifb_index, wire.next_handle(0), limit_bytes)
        self.lines.append(line)
        try:
            self.link.ask(wire.new_clsact(tap_index))
        except FileExistsError:
            found = [*found, "clsact"]
        self.link.ask(wire.change_link(ifb_index, up=True, alias=wire.alias(nic.target, found)))
        self.link.ask(wire.new_plug(line))
        self.link.ask(wire.plug(line, "release-indefinite"))
        if copied:
            self.link.ask(wire.new_clsact(ifb_index))
            for theirs in copied:
                self.link.ask(wire.copy_filter(theirs, ifb_index))
        self.link.ask(wire.redirect(line))

    def adopt(self, nics: list[Nic], limits: list[int], mode: Mode) -> None:
        """After a gate's death: the kernel's counts of epochs can't be read, so a new plug takes the old one's place and
        what that held is dropped; nothing leaks. `broken` after: the pieces did not stand as the dead gate had left them.
        """
        self.mode, self.taps_up, self.taps = mode, mode != "closed", [nic.target for nic in nics]
        for nic, limit in zip(nics, limits, strict=True):
            name = wire.ifb_name(nic.target)
            try:
                ifb_index, tap_index = socket.if_nametoindex(name), socket.if_nametoindex(nic.target)
                handle = next((q.handle for q in _queues(self.link, ifb_index) if q.kind == "plug"), 0)
            except OSError:
                self.broken = f"{name} or {nic.target} is gone"
                continue
            line = Line(nic.target, tap_index, name, ifb_index, handle, limit)
            self.lines.append(line)
            if not handle:
                self.broken = f"{name} has no plug qdisc any more"
        self._encode()
        self._subscribe()
        self.broken = self.broken or self.verify()
        if not self.broken and mode != "pass":
            self._replace()

    def detach(self) -> None:
        """Everything that waits leaves in order, then every piece goes away and the taps are as they were before. Idempotent."""
        self._unsubscribe()
        for line in self.lines:
            with contextlib.suppress(OSError):
                self.link.ask(wire.plug(line, "release-indefinite"))
                _drain(self.link, line.ifb_index)
        for tap in self.taps:
            remove(self.link, tap)
        self.lines, self.taps, self._steps, self.outstanding, self.mode = [], [], {}, False, "pass"

    def shut(self) -> None:
        """Let go of the sockets; the kernel's part stays."""
        self._unsubscribe()
        self.link.close()

    # ---- parts ----

    def _encode(self) -> None:
        for action in ("buffer", "release-one", "release-indefinite"):
            self._steps[action] = b"".join(wire.plug(line, action) for line in self.lines)

    def _do(self, action: wire.Action) -> None:
        """One step on all NICs: one datagram; the kernel has acted on all of it and queued its answers when `send` returns."""
        if self.broken or not self.lines:
            return
        try:
            self.link.fire(self._steps[action])
            self.answered()
        except OSError as error:
            self.broken = f"the kernel takes no commands for the plug: {error.strerror}"

    def answered(self) -> None:
        """Read the acknowledgements that are there; an error breaks the buffer (all NICs step together, or none again)."""
        for code in self.link.answers():
            if code and not self.broken:
                self.broken = f"the plug did not obey: {os.strerror(code)}; somebody has replaced it"

    def _replace(self) -> None:
        """A new plug under another handle on every IFB, holding from the start."""
        for number, line in enumerate(self.lines):
            fresh = replace(line, handle=wire.next_handle(line.handle))
            try:
                self.link.ask(wire.new_plug(fresh))
            except OSError as error:
                self.broken = f"the plug of {line.ifb} can't be replaced: {error.strerror}"
                return
            self.lines[number] = fresh
        self.outstanding = False
        self._encode()

    def _queues(self) -> list[wire.Queue]:
        found = []
        for line in self.lines:
            for queue in _queues(self.link, line.ifb_index):
                if queue.handle == line.handle:
                    found.append(queue)
                    self._known[line.ifb_index] = Backlog(line.tap, queue.packets, queue.bytes, queue.dropped)
        return found

    def _check(self) -> None:
        if what := self.verify():
            self.detach()
            raise Failed("net-buffer", "the network buffer did not come to stand", what, "see: mcft events")


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Raises: Failed ("net-buffer") in place of an OSError."""
    try:
        yield
    except OSError as error:
        raise Failed("net-buffer", what, f"{error.strerror or error}", "see: ip link, tc qdisc, tc filter") from None


def _queues(link: Netlink, index: int) -> list[wire.Queue]:
    found = [wire.queue(body) for kind, body in link.ask(wire.ask_queues(index)) if kind == wire.NEWQDISC]
    return [queue for queue in found if queue.index == index]


def _drain(link: Netlink, index: int) -> None:
    """Wait until nothing waits in this interface's qdiscs, at most 200 ms."""
    end = time.monotonic() + DRAIN_MS / 1000
    while time.monotonic() < end and any(queue.packets for queue in _queues(link, index)):
        time.sleep(0.0005)


def _filters(link: Netlink, index: int) -> list[wire.Filter]:
    """The ingress filters of this interface; none if it has no ingress qdisc."""
    try:
        return [wire.filter_(body) for kind, body in link.ask(wire.ask_filters(index, wire.INGRESS)) if kind == wire.NEWTFILTER]
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            return []
        raise


def _redirected(link: Netlink, line: Line) -> bool:
    found = [f for f in _filters(link, line.tap_index) if f.options]
    return any(f.priority == wire.OUR_PRIORITY and wire.redirects_to(f) == line.ifb_index for f in found)


def _seen(link: Netlink, index: int) -> wire.Link:
    ((_, body),) = link.ask(wire.ask_link(index))
    return wire.link(body)


def _make_ifb(link: Netlink, tap: str, name: str) -> tuple[int, list[str]]:
    """The index of an IFB that is ours, and what of it was there before. Raises: OSError, Refused ("ifb-taken")."""
    found = []
    try:
        link.ask(wire.new_ifb(name))
    except FileExistsError:
        # QEMU's mc engine has people load `ifb` with its devices ready-made: one that nobody uses yet may be taken.
        seen = _seen(link, socket.if_nametoindex(name))
        if seen.kind != "ifb" or seen.up or seen.alias:
            raise Refused(
                "ifb-taken", f"the interface {name} is there and is not mcft's",
                f"mcft holds what {tap} sends in an IFB of that name", f"see: ip -d link show {name}; rename or delete it",
            ) from None  # fmt: skip
        found.append("ifb")
    index = socket.if_nametoindex(name)
    link.ask(wire.change_link(index, up=True, alias=wire.alias(tap, found)))
    return index, found


def remove(link: Netlink, tap: str) -> None:
    """Take every piece of this tap's buffer away, whatever is left of it. Others' filters stay; what is held is dropped.

    The filter goes before the IFB, so that nothing is sent into one that is no more.
    """
    name, ifb_index, found = wire.ifb_name(tap), 0, []
    with contextlib.suppress(OSError):
        seen = _seen(link, socket.if_nametoindex(name))
        before = wire.found_before(seen.alias, tap)
        if before is not None:
            ifb_index, found = seen.index, before
    with contextlib.suppress(OSError):
        index = socket.if_nametoindex(tap)
        for theirs in _filters(link, index):
            if theirs.options and theirs.priority == wire.OUR_PRIORITY and wire.redirects_to(theirs) in (0, ifb_index):
                link.ask(wire.delete_redirect(Line(tap, index, name, 0, 0, 0)))
                if "clsact" not in found and not _filtered(link, index):
                    link.ask(wire.delete_clsact(index))
    if not ifb_index:
        return
    with contextlib.suppress(OSError):
        _drain(link, ifb_index)
        if "ifb" in found:
            for made in (wire.delete_clsact(ifb_index), wire.delete_root(ifb_index)):
                with contextlib.suppress(OSError):
                    link.ask(made)
            link.ask(wire.change_link(ifb_index, up=False, alias=""))
        else:
            link.ask(wire.delete_link(ifb_index))


def _filtered(link: Netlink, index: int) -> bool:
    """Whether somebody filters there meanwhile: then the clsact is theirs now."""
    parents = (wire.INGRESS, wire.EGRESS)
    return any(kind == wire.NEWTFILTER for parent in parents for kind, _ in link.ask(wire.ask_filters(index, parent)))
