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
import os
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from mcft import plugkernel as kernel
from mcft import plugwire as wire
from mcft.errors import Failed
from mcft.netbuffer import Backlog, Mode, Nic
from mcft.plugjudge import judge, news, socket_filter
from mcft.plugkernel import DRAIN_MS, Netlink
from mcft.plugwire import Line

RTNLGRP_LINK, RTNLGRP_TC = 1, 4
_SO_ATTACH_FILTER, _SO_RCVBUFFORCE, _SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP = 26, 33, 270, 1


@dataclass(frozen=True, slots=True)
class Limit:
    """How much a NIC's plug holds before it drops. asked_bytes 0: by the link's MTU and how long an epoch may wait."""

    asked_bytes: int
    delay_ms: float = 100.0
    loss_ms: float = 300.0

    def of(self, mtu: int) -> int:
        """The limit in bytes for a link of this MTU."""
        return self.asked_bytes or wire.default_limit_bytes(mtu, self.delay_ms, self.loss_ms)


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
    by_qemus_end: bool = False  # what broke it may be no more than the end of QEMU, whose taps go with it
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
        """Nothing leaves until `open` or `reopen`; what is held, and comes meanwhile, stays in the kernel.

        The taps are set down only where the buffer is broken.
        """
        if self.mode == "pass" and not self.broken:
            self._do("buffer")
        self.mode, self.taps_up = "closed", self.taps_up and not self.broken

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
        return [self._known.get(line.ifb_index, Backlog(line.tap, 0, 0, 0, line.ifb)) for line in self.lines]

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
                heard = news(kind, body)
                verdict = judge(self.lines, heard, taps_up=self.taps_up) if heard is not None else None
                if verdict is not None and verdict.tampered:
                    self.by_qemus_end = verdict.by_its_end and (self.by_qemus_end or not self.broken)
                    self.broken = self.broken or verdict.what
                elif verdict is not None:
                    self.remarks.append(verdict.what)

    def _subscribe(self) -> None:
        """From now on every change by others is heard; what went before is looked at once."""
        indexes = [index for line in self.lines for index in (line.tap_index, line.ifb_index)]
        program = ctypes.create_string_buffer(socket_filter(self.link.port, indexes))
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
                if not kernel.seen(self.link, line.ifb_index).up:
                    return f"{line.ifb} is down"
                if not any(q.handle == line.handle and q.kind == "plug" for q in kernel.queues(self.link, line.ifb_index)):
                    return f"{line.ifb} has no plug qdisc of mcft's"
                if not kernel.redirected(self.link, line):
                    return f"the ingress filter from {line.tap} to {line.ifb} is gone"
            except OSError as error:
                return f"{line.ifb}: {error.strerror}"
        return ""

    # ---- set-up and its undo; these wait for the kernel ----

    def attach(self, nics: list[Nic], limit: Limit) -> None:
        """Put every NIC's way in place, in pass-through. Raises: Refused, Failed; all or nothing."""
        self.taps = [nic.target for nic in nics]
        try:
            for nic in nics:
                with _named(f"the network buffer of {nic.target} can't be attached"):
                    self._attach_line(nic, limit)
        except BaseException:
            self.detach()
            raise
        self._encode()
        self._subscribe()
        self._check()

    def _attach_line(self, nic: Nic, limit: Limit) -> None:
        kernel.remove(self.link, nic.target)  # what an attach that was cut off has left
        tap_index = socket.if_nametoindex(nic.target)
        copied = wire.copies(kernel.filters(self.link, tap_index), nic.target)
        name = wire.ifb_name(nic.target)
        ifb_index, found = kernel.make_ifb(self.link, nic.target, name)
        limit_bytes = limit.of(kernel.seen(self.link, tap_index).mtu)
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

    def limit_to(self, limit: Limit) -> None:
        """Another limit from now on, as after `mcft set --delay`: epochs may last longer."""
        if self.broken:
            return
        for number, line in enumerate(self.lines):
            try:
                wanted = replace(line, limit_bytes=limit.of(kernel.seen(self.link, line.tap_index).mtu))
                if wanted != line:
                    self.link.ask(wire.set_limit(wanted))
            except OSError as error:
                self.broken = f"the plug of {line.ifb} takes no other limit: {error.strerror}"
                self.by_qemus_end = not _there(line.tap)
                return
            self.lines[number] = wanted

    def adopt(self, nics: list[Nic], limit: Limit, mode: Mode) -> None:
        """After a gate's death: the kernel's counts of epochs can't be read, so a new plug takes the old one's place and
        what that held is dropped; nothing leaks. `broken` after: the pieces did not stand as the dead gate had left them.
        """
        self.mode, self.taps_up, self.taps = mode, mode != "closed", [nic.target for nic in nics]
        for nic in nics:
            name = wire.ifb_name(nic.target)
            try:
                ifb_index, tap_index = socket.if_nametoindex(name), socket.if_nametoindex(nic.target)
                handle = next((q.handle for q in kernel.queues(self.link, ifb_index) if q.kind == "plug"), 0)
                limit_bytes = limit.of(kernel.seen(self.link, tap_index).mtu)
            except OSError:
                self.broken, self.by_qemus_end = f"{name} or {nic.target} is gone", not _there(nic.target)
                continue
            line = Line(nic.target, tap_index, name, ifb_index, handle, limit_bytes)
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
        for tap in self.taps:
            kernel.remove(self.link, tap)
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
            for queue in kernel.queues(self.link, line.ifb_index):
                if queue.handle == line.handle:
                    found.append(queue)
                    self._known[line.ifb_index] = Backlog(line.tap, queue.packets, queue.bytes, queue.dropped, line.ifb)
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


def _there(tap: str) -> bool:
    try:
        return socket.if_nametoindex(tap) > 0
    except OSError:
        return False
