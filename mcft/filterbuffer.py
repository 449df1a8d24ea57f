"""The network buffer by QEMU's own redirector filter, for kernels without `sch_plug`; and `none`.

Per NIC two `filter-redirector` objects and two socket pairs: what the guest sends comes out of QEMU on `out`; what
we write to `inn` goes on to the tap. The guest's direction walks the netdev's filter list backwards, so the `outdev`
filter is inserted *behind* the `indev` one. The sockets are handed over by descriptor (`getfd`), no path is involved.

It fails safe: when our end of `out` closes, QEMU drops what the guest sends. A restarted gate puts a new pair in
front of the old one and only then deletes the old (`adopt`), so that no packet passes unbuffered in between, and no
half frame of the dead gate's is misread. It does not work with vhost. Source: QEMU `net/filter-mirror.c` (frames:
length, vnet header length, bytes; all big endian 32 bit).
"""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mcft.netbuffer import Backlog, Mode, Nic

Command = tuple[str, dict[str, Any]]
PREFIX = "mcft-net"
_HEADER = struct.Struct("!II")
SOCKET_BUFFER_BYTES = 8 * 1024 * 1024
DEFAULT_LIMIT_BYTES = 64 * 1024 * 1024


def count_frames(stream: bytes | bytearray) -> tuple[int, int, int]:
    """Frames, their bytes, and where the last whole one ends."""
    at = frames = payload = 0
    end = len(stream)
    while at + 8 <= end:
        size, _ = _HEADER.unpack_from(stream, at)
        if at + 8 + size > end:
            break
        at += 8 + size
        frames += 1
        payload += size
    return frames, payload, at


@dataclass
class Channel:
    """One NIC's two sockets and what waits between them."""

    nic: Nic
    ours_out: socket.socket
    ours_in: socket.socket
    limit_bytes: int = DEFAULT_LIMIT_BYTES
    open_epoch: bytearray = field(default_factory=bytearray)
    held: bytearray = field(default_factory=bytearray)  # before the barrier
    sending: bytearray = field(default_factory=bytearray)  # released, on its way into QEMU
    dropped: int = 0
    broken: str = ""
    corked: bool = False  # closed: what was released and QEMU has not taken yet stays too, its lease may be over

    def drain(self, mode: Mode) -> None:
        """Read all that the guest has sent so far."""
        while True:
            try:
                data = self.ours_out.recv(1 << 20)
            except BlockingIOError:
                break
            except OSError as error:
                self.broken = str(error)
                break
            if not data:
                self.broken = "QEMU closed the buffer's socket"
                break
            if mode == "pass":
                self.sending += data
            else:
                self.open_epoch += data
        if mode != "pass" and len(self.open_epoch) + len(self.held) > self.limit_bytes:
            self._drop_newest()
        if mode == "pass":
            self.flush()

    def _drop_newest(self) -> None:
        _, _, whole = count_frames(self.open_epoch)
        room = max(0, self.limit_bytes - len(self.held))
        at = 0
        while at + 8 <= whole:
            size, _ = _HEADER.unpack_from(self.open_epoch, at)
            if at + 8 + size > room:
                break
            at += 8 + size
        frames, _, _ = count_frames(self.open_epoch[at:whole])
        self.dropped += frames
        del self.open_epoch[at:whole]

    def barrier(self) -> None:
        """The open epoch ends here; half a frame (never seen) belongs to the next."""
        _, _, whole = count_frames(self.open_epoch)
        self.held += self.open_epoch[:whole]
        del self.open_epoch[:whole]

    def release(self) -> None:
        """What lies before the barrier goes out."""
        self.sending += self.held
        self.held.clear()
        self.flush()

    def flush(self) -> None:
        """Write what was released as far as QEMU takes it."""
        if self.corked:
            return
        try:
            while self.sending:
                del self.sending[: self.ours_in.send(self.sending)]
        except BlockingIOError:
            return
        except OSError as error:
            self.broken = str(error)
            self.sending.clear()

    def unread_bytes(self) -> int:
        """What was written to QEMU and not yet read by it (SIOCOUTQ)."""
        return int(struct.unpack("i", fcntl.ioctl(self.ours_in, termios.TIOCOUTQ, b"\0\0\0\0"))[0])

    def close(self) -> None:
        self.ours_out.close()
        self.ours_in.close()


@dataclass
class FilterBuffer:
    """The `NetBuffer` contract over the channels of all NICs of a domain."""

    channels: list[Channel] = field(default_factory=list)
    mode: Mode = "pass"

    def hold(self) -> None:
        """From now on everything waits."""
        self._drain()
        self.mode = "hold"

    def close(self) -> None:
        """Nothing leaves until `open` (or `reopen`); what is held stays."""
        self.mode = "closed"
        for channel in self.channels:
            channel.corked = True

    def reopen(self) -> None:
        """Hold again: the close is taken back, its stream lives on."""
        self.mode = "hold"
        for channel in self.channels:
            channel.corked = False
            channel.flush()

    def barrier(self) -> None:
        """All that has been sent so far, by every NIC, is before the barrier."""
        self._drain()
        for channel in self.channels:
            channel.barrier()

    def release(self) -> None:
        """Everything before the barrier leaves, on every NIC. Raises: AssertionError when closed."""
        assert self.mode == "hold", f"a release while the buffer is {self.mode}"
        for channel in self.channels:
            channel.release()

    def open(self) -> None:
        """Everything leaves in order, then passes."""
        self._drain()
        for channel in self.channels:
            channel.corked = False
            channel.sending += channel.held + channel.open_epoch
            channel.held.clear()
            channel.open_epoch.clear()
            channel.flush()
        self.mode = "pass"

    def drop(self) -> None:
        """Throw away what is held (this side lost: its unacknowledged output never existed)."""
        for channel in self.channels:
            channel.held.clear()
            channel.open_epoch.clear()

    def _drain(self) -> None:
        for channel in self.channels:
            channel.drain(self.mode)

    def readable(self, channel: Channel) -> None:
        """The selector says that the guest has sent something on this NIC."""
        channel.drain(self.mode)

    def backlog(self) -> list[Backlog]:
        """What waits, per NIC."""
        rows = []
        for channel in self.channels:
            frames_held, bytes_held, _ = count_frames(channel.held)
            frames_open, bytes_open, _ = count_frames(channel.open_epoch)
            rows.append(Backlog(channel.nic.target, frames_held + frames_open, bytes_held + bytes_open, channel.dropped))
        return rows

    @property
    def broken(self) -> str:
        """Why this buffer can't hold any more (QEMU end gone), or empty."""
        return next((f"{c.nic.target}: {c.broken}" for c in self.channels if c.broken), "")

    @property
    def settled(self) -> bool:
        """Nothing is on its way: all that was released has been read by QEMU."""
        return all(not c.sending and c.unread_bytes() == 0 for c in self.channels)


def make_channel(nic: Nic, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> tuple[Channel, socket.socket, socket.socket]:
    """A channel and the two ends for QEMU (out, in); close those after `getfd`."""
    ours_out, theirs_out = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours_in, theirs_in = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for sock in (ours_in, theirs_out):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    for sock in (ours_out, ours_in):
        sock.setblocking(False)
    return Channel(nic, ours_out, ours_in, limit_bytes), theirs_out, theirs_in


def names(index: int, serial: int) -> dict[str, str]:
    """QEMU ids for NIC number index, of the serial-th gate process."""
    stem = f"{PREFIX}{index}-{serial}"
    return {"fd_out": f"{stem}-fdo", "fd_in": f"{stem}-fdi", "chr_out": f"{stem}-co", "chr_in": f"{stem}-ci",
            "out": f"{stem}-out", "in": f"{stem}-in"}  # fmt: skip


def attach_commands(nic: Nic, index: int, serial: int, in_front_of: str | None) -> list[Command]:
    """The QMP commands that put a new pair in place, after its two descriptors were passed with `getfd`.

    in_front_of: id of the older pair's `outdev` filter, which sees packets only after the new pair.
    """
    n = names(index, serial)

    def chardev(ident: str, fd: str) -> Command:
        backend = {"type": "socket", "data": {"addr": {"type": "fd", "data": {"str": fd}}, "server": False}}
        return "chardev-add", {"id": ident, "backend": backend}

    common = {"qom-type": "filter-redirector", "netdev": nic.netdev, "queue": "rx", "vnet_hdr_support": True}
    place = {"insert": "behind", "position": f"id={in_front_of}"} if in_front_of else {}
    return [
        chardev(n["chr_out"], n["fd_out"]),
        chardev(n["chr_in"], n["fd_in"]),
        ("object-add", {**common, "id": n["in"], "indev": n["chr_in"], **place}),
        ("object-add", {**common, "id": n["out"], "outdev": n["chr_out"], "insert": "behind", "position": f"id={n['in']}"}),
    ]


def detach_commands(object_ids: list[str], chardev_ids: list[str]) -> Iterator[Command]:
    """Take pairs away, `outdev` filters first: what the guest sends then passes, what was released still arrives."""
    for suffix in ("-out", "-in"):
        for ident in object_ids:
            if ident.startswith(PREFIX) and ident.endswith(suffix):
                yield "object-del", {"id": ident}
    for ident in chardev_ids:
        if ident.startswith(PREFIX):
            yield "chardev-remove", {"id": ident}


class NoBuffer:
    """`none`: asked for by name, holds nothing, is marked unsafe."""

    mode: Mode = "pass"

    def hold(self) -> None: ...
    def barrier(self) -> None: ...
    def release(self) -> None: ...
    def open(self) -> None: ...
    def close(self) -> None: ...
    def reopen(self) -> None: ...
    def drop(self) -> None: ...

    def backlog(self) -> list[Backlog]:
        """Nothing is ever held."""
        return []
