"""The kernel's side of the plug buffer: the netlink socket, what stands of a NIC's pieces, making and removing them.

Everything but `Netlink.fire` and `answers` waits for the kernel's answer, so it is for set-up and its undo only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator

from mcft import plugwire as wire
from mcft.errors import Refused
from mcft.plugwire import Line

CLONE_NEWNET = 0x40000000  # unshare(2)
ANSWER_S = 2.0
DRAIN_MS = 200.0
LAST_DRAIN_MS = 2000.0  # nothing comes in any more: as long as a loaded host's ksoftirqd may be kept waiting


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


def queues(link: Netlink, index: int) -> list[wire.Queue]:
    found = [wire.queue(body) for kind, body in link.ask(wire.ask_queues(index)) if kind == wire.NEWQDISC]
    return [queue for queue in found if queue.index == index]


def drain(link: Netlink, index: int, patience_ms: float = DRAIN_MS) -> None:
    """Wait until nothing waits in this IFB, neither in its qdiscs nor behind them, for as long as it gets less. (An IFB has
    queues of its own: what is in there would be overtaken once the redirect has gone, and lost with the IFB.)"""
    least, end = float("inf"), time.monotonic() + patience_ms / 1000
    while time.monotonic() < end:
        left = sum(q.packets for q in queues(link, index)) + max(0, seen(link, index).inside)
        if not left:
            return
        if left < least:
            least, end = left, time.monotonic() + patience_ms / 1000
        time.sleep(0.0005)


def filters(link: Netlink, index: int) -> list[wire.Filter]:
    """The ingress filters of this interface; none if it has no ingress qdisc."""
    try:
        return [wire.filter_(body) for kind, body in link.ask(wire.ask_filters(index, wire.INGRESS)) if kind == wire.NEWTFILTER]
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            return []
        raise


def redirected(link: Netlink, line: Line) -> bool:
    found = [f for f in filters(link, line.tap_index) if f.options]
    return any(f.priority == wire.OUR_PRIORITY and wire.redirects_to(f) == line.ifb_index for f in found)


def seen(link: Netlink, index: int) -> wire.Link:
    ((_, body),) = link.ask(wire.ask_link(index))
    return wire.link(body)


def make_ifb(link: Netlink, tap: str, name: str) -> tuple[int, list[str]]:
    """The index of an IFB that is ours, and what of it was there before. Raises: OSError, Refused ("ifb-taken")."""
    found = []
    try:
        link.ask(wire.new_ifb(name))
    except FileExistsError:
        # QEMU's mc engine has people load `ifb` with its devices ready-made: one that nobody uses yet may be taken.
        there = seen(link, socket.if_nametoindex(name))
        if not _may_be_taken(there):
            raise _taken(tap, name) from None
        found.append("ifb")
    index = socket.if_nametoindex(name)
    _disable_ipv6(name, "1")
    link.ask(wire.change_link(index, up=True, alias=wire.alias(tap, found)))
    return index, found


def _disable_ipv6(name: str, value: str) -> None:
    """An IFB with IPv6 sends router solicitations of its own: they would wait in the plug, and count as held and dropped."""
    with contextlib.suppress(OSError), open(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "w", encoding="ascii") as file:
        file.write(value)


def _may_be_taken(there: wire.Link) -> bool:
    return there.kind == "ifb" and not there.up and not there.alias


def _taken(tap: str, name: str) -> Refused:
    return Refused(
        "ifb-taken", f"the interface {name} is there and is not mcft's",
        f"mcft holds what {tap} sends in an IFB of that name", f"see: ip -d link show {name}; rename or delete it",
    )  # fmt: skip


def refuse_unpluggable(taps: list[str]) -> None:
    """What would stand in the way of attaching these; changes nothing.

    Raises: Refused ("foreign-filter", "ifb-taken", "no-such-tap").
    """
    with contextlib.closing(Netlink()) as link:
        for tap in taps:
            try:
                index = socket.if_nametoindex(tap)
            except OSError:
                why = "it may be in another network namespace"
                raise Refused("no-such-tap", f"there is no interface {tap} on this host", why, "use --netbuffer filter") from None
            name = wire.ifb_name(tap)
            with contextlib.suppress(OSError):
                there = seen(link, socket.if_nametoindex(name))
                if wire.found_before(there.alias, tap) is None and not _may_be_taken(there):
                    raise _taken(tap, name)
            wire.copies([f for f in filters(link, index) if wire.redirects_to(f) is None or f.priority != 1], tap)


def trial() -> str:
    """Why the plug does not work here, empty if it does: all its pieces are made for once, in a network namespace of their
    own. Loads the kernel's modules (`ifb`, `sch_plug`, `cls_matchall`, `act_mirred`) where they are not there yet."""
    said: list[str] = []

    def work() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET):
            said.append(f"no network namespace: {os.strerror(ctypes.get_errno())}")
            return
        with contextlib.closing(Netlink()) as link:
            what = "ifb"
            try:
                link.ask(wire.new_ifb("mcft-trial"))
                index = socket.if_nametoindex("mcft-trial")
                line = Line("mcft-trial", index, "mcft-trial", index, wire.next_handle(0), 1 << 20)
                what = "sch_plug"
                link.ask(wire.new_plug(line))
                what = "sch_ingress"
                link.ask(wire.new_clsact(index))
                what = "cls_matchall or act_mirred"
                link.ask(wire.redirect(line))
            except PermissionError:
                said.append("this process may not change the network (no CAP_NET_ADMIN)")
            except OSError as error:
                said.append(f"this kernel gives no {what}: {error.strerror}")

    thread = threading.Thread(target=work)  # the namespace is this thread's alone, and goes with it
    thread.start()
    thread.join()
    return said[0] if said else ""


def remove(link: Netlink, tap: str, *, drop: bool = False) -> None:
    """Take every piece of this tap's buffer away, whatever is left of it. Others' filters stay.

    What it holds leaves first; drop: never does, the guest that sent it being dead. The filter goes before the IFB, so that
    nothing is sent into one that is no more.
    """
    name, ifb_index, found = wire.ifb_name(tap), 0, []
    with contextlib.suppress(OSError):
        there = seen(link, socket.if_nametoindex(name))
        before = wire.found_before(there.alias, tap)
        if before is not None:
            ifb_index, found = there.index, before
            for queue in queues(link, ifb_index) if not drop else []:
                if queue.kind == "plug":
                    link.ask(wire.plug(Line(tap, 0, name, ifb_index, queue.handle, 0), "release-indefinite"))
            if not drop:
                drain(link, ifb_index)
    with contextlib.suppress(OSError):
        index = socket.if_nametoindex(tap)
        for theirs in filters(link, index):
            if theirs.options and theirs.priority == wire.OUR_PRIORITY and wire.redirects_to(theirs) in (0, ifb_index):
                link.ask(wire.delete_redirect(Line(tap, index, name, 0, 0, 0)))
                if "clsact" not in found and not _filtered(link, index):
                    link.ask(wire.delete_clsact(index))
    if not ifb_index:
        return
    with contextlib.suppress(OSError):
        if not drop:
            drain(link, ifb_index, LAST_DRAIN_MS)
        if "ifb" in found:
            for made in (wire.delete_clsact(ifb_index), wire.delete_root(ifb_index)):
                with contextlib.suppress(OSError):
                    link.ask(made)
            link.ask(wire.change_link(ifb_index, up=False, alias=""))
            _disable_ipv6(name, "0")
        else:
            link.ask(wire.delete_link(ifb_index))


def _filtered(link: Netlink, index: int) -> bool:
    """Whether somebody filters there meanwhile: then the clsact is theirs now."""
    parents = (wire.INGRESS, wire.EGRESS)
    return any(kind == wire.NEWTFILTER for parent in parents for kind, _ in link.ask(wire.ask_filters(index, parent)))
