"""A process's TCP connections from outside, on this host alone: look at them and break them, by the kernel's sock_diag.

A micro-checkpointed standby whose primary vanished without a word waits in recv for up to 70 s, deaf; one whose socket is
destroyed (`SOCK_DESTROY`) wakes at once (ECONNABORTED). A primary whose standby vanished waits likewise. Needs CAP_NET_ADMIN and
a kernel with CONFIG_INET_DIAG_DESTROY; `why_not` tries it on a connection of its own. To look needs neither. Kernel:
`net/ipv4/inet_diag.c`, `linux/sock_diag.h`; ss(8) -K does the same. No pyroute2: a gate must start fast.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

SOCK_DIAG_BY_FAMILY, SOCK_DESTROY = 20, 21
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 1, 4, 0x300
NETLINK_SOCK_DIAG = 4
ESTABLISHED, LISTEN = 1, 10  # linux/tcp_states.h
CONNECTED = sum(1 << state for state in range(1, 12) if state != LISTEN)  # every state of linux/tcp_states.h but that
_HEADER, _REQUEST, _ID = struct.Struct("=IHHII"), struct.Struct("=BBBBI"), struct.Struct("!HH16s16s")
_MESSAGE_BYTES = 72  # inet_diag_msg


@dataclass(frozen=True, slots=True)
class Connection:
    """A TCP socket as the kernel names it. state: of linux/tcp_states.h; ident: its inet_diag_sockid."""

    family: int
    state: int
    local_port: int
    peer_port: int
    inode: int
    ident: bytes


def connections() -> Iterator[Connection]:
    """Every TCP connection of this network namespace. Raises: OSError."""
    for family in (socket.AF_INET, socket.AF_INET6):
        request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, CONNECTED) + bytes(48)
        header = _HEADER.pack(_HEADER.size + len(request), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, 1, 0)
        with _netlink() as sock:
            sock.sendall(header + request)
            yield from _dumped(sock)


def _netlink() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG)
    sock.settimeout(1.0)
    return sock


def _dumped(sock: socket.socket) -> Iterator[Connection]:
    while True:
        data, at = sock.recv(1 << 18), 0
        while at < len(data):
            length, kind = struct.unpack_from("=IH", data, at)
            body = data[at + _HEADER.size : at + length]
            if kind == NLMSG_DONE:
                return
            if kind == NLMSG_ERROR:
                code = -struct.unpack_from("=i", body)[0]
                raise OSError(code, os.strerror(code))
            local, peer, _, _ = _ID.unpack_from(body, 4)
            (inode,) = struct.unpack_from("=I", body, _MESSAGE_BYTES - 4)
            yield Connection(body[0], body[1], local, peer, inode, body[4:52])
            at += (length + 3) & ~3


def destroy(connection: Connection) -> None:
    """Raises: OSError (EOPNOTSUPP: this kernel can't; ENOENT: it is gone already)."""
    request = _REQUEST.pack(connection.family, socket.IPPROTO_TCP, 0, 0, CONNECTED) + connection.ident
    with _netlink() as sock:
        sock.sendall(_HEADER.pack(_HEADER.size + len(request), SOCK_DESTROY, NLM_F_REQUEST | NLM_F_ACK, 1, 0) + request)
        (code,) = struct.unpack_from("=i", sock.recv(4096), _HEADER.size)
        if code:
            raise OSError(-code, os.strerror(-code))


def break_stream(pid: int, port: int) -> int:
    """Destroy the connections of this process (and its children) to or from that port; how many they were. 0: none is left.

    Raises: OSError where the kernel can't.
    """
    inodes, broken = set(_sockets({pid, *descendants(pid)})), 0
    for connection in list(connections()):
        if connection.inode in inodes and port in (connection.local_port, connection.peer_port):
            try:
                destroy(connection)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
            broken += 1
    return broken


def is_open(port: int) -> bool:
    """Whether a connection to this port of ours stands whole: neither end has closed it, or ours has not heard of it.

    Raises: OSError.
    """
    return any(c.local_port == port and c.state == ESTABLISHED for c in connections())


def _sockets(pids: Iterable[int]) -> Iterator[int]:
    for pid in pids:
        folder = f"/proc/{pid}/fd"
        with contextlib.suppress(OSError):
            for name in os.listdir(folder):
                with contextlib.suppress(OSError):
                    target = os.readlink(os.path.join(folder, name))
                    if target.startswith("socket:["):
                        yield int(target[8:-1])


def descendants(pid: int) -> set[int]:
    """Children, theirs, and so on (an emulator may be a script that started QEMU)."""
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        parent = waiting.pop()
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children", encoding="ascii") as file:
                    new = {int(word) for word in file.read().split()} - found
                found |= new
                waiting += new
    return found


def why_not() -> str:
    """Empty if this kernel can, tried on a loopback connection of our own; else why not."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        client = stack.enter_context(socket.create_connection(listener.getsockname()))
        server = stack.enter_context(listener.accept()[0])
        inode = os.fstat(server.fileno()).st_ino
        try:
            ours = [connection for connection in connections() if connection.inode == inode]
            for connection in ours:
                destroy(connection)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return "this kernel is built without CONFIG_INET_DIAG_DESTROY"
            return f"the kernel refused: {error.strerror}"
        server.settimeout(1.0)
        try:
            server.recv(1)
        except ConnectionAbortedError:
            return ""
        except OSError as error:
            return f"the broken socket said {error.strerror}"
        finally:
            client.close()
        return "the kernel does not list this host's connections" if not ours else "the socket was not broken"
