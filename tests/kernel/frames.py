"""A guest's taps on a bridge in a fresh network namespace, and a socket outside that sees what comes out, in order."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import socket
import struct
import subprocess
import time
from types import TracebackType

from mcft.netbuffer import Nic

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNET = 0x40000000
ETH_P_ALL = 3
SOURCE = b"\x02GUEST"
KINDS = (0x0800, 0x0806, 0x86DD, 0x8100, 0x88CC, 0x88B5)  # IPv4, ARP, IPv6, a VLAN's, LLDP, something unheard of
_BODY = struct.Struct("!HII")  # NIC, epoch, number
MARK = b"mcft-test:"
BRIDGE = """link set lo up
link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0
link add c0 type veth peer c1
link set c0 master br0 up
link set c1 up
link set br0 up
"""


def sh(command: str) -> str:
    """Run it; its output. Raises: AssertionError with its errors."""
    done = subprocess.run(["sh", "-ec", command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def open_tap(name: str) -> int:
    """As QEMU does: IFF_TAP | IFF_NO_PI (linux/if_tun.h)."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1002))
    return fd


def nic(tap: str) -> Nic:
    return Nic(tap, "52:54:00:00:00:01", "hostnet0", "virtio", True, "bridge")


class Wire:
    """Everything in here happens in its own network namespace: the process leaves it at the end."""

    def __init__(self, taps: tuple[str, ...] = ("vnet0",)) -> None:
        self.taps, self.kinds = taps, KINDS

    def __enter__(self) -> Wire:
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY)
        unshare()
        self.fds = {name: open_tap(name) for name in self.taps}
        taps = "".join(f"link set {name} master br0 up\n" for name in self.taps)
        batch = BRIDGE + taps  # one program: starting one is what takes time on this kernel
        subprocess.run(["ip", "-batch", "-"], input=batch, text=True, check=True)
        self.outside = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self.outside.bind(("c1", 0))
        self.outside.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        self.outside.setblocking(False)
        self.sent = 0
        self.came: list[tuple[int, int, int]] = []
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.outside.close()
        for fd in self.fds.values():
            os.close(fd)
        _setns(self._home)
        os.close(self._home)

    def send(self, epoch: int, count: int, size: int = 200, tap: str = "vnet0") -> list[tuple[int, int, int]]:
        """The guest sends; what has to come out at the other end some day."""
        number, out = self.taps.index(tap), []
        for _ in range(count):
            kind = self.kinds[self.sent % len(self.kinds)]
            tag = b"\0\5\x08\0" if kind == 0x8100 else b""
            self.sent += 1
            body = (number, epoch, self.sent)
            frame = b"\xff" * 6 + SOURCE + struct.pack("!H", kind) + tag + b"\0" * 20 + MARK + _BODY.pack(*body)
            os.write(self.fds[tap], frame.ljust(size, b"\0"))
            out.append(body)
        return out

    def arrived(self) -> list[tuple[int, int, int]]:
        """What has come out so far and was not asked for yet, without waiting."""
        out = []
        while True:
            try:
                frame = self.outside.recv(70000)
            except BlockingIOError:
                return out
            if (at := frame.find(MARK)) >= 0 and frame[6:12] == SOURCE:
                out.append(_BODY.unpack_from(frame, at + len(MARK)))

    def comes(self, count: int, patience_s: float = 10.0) -> list[tuple[int, int, int]]:
        """Wait for so many; more, if more have come."""
        out, end = self.arrived(), time.monotonic() + patience_s
        while len(out) < count and time.monotonic() < end:
            select.select([self.outside], [], [], 0.05)
            out += self.arrived()
        return out


def unshare() -> None:
    """A network namespace of its own for this process."""
    assert LIBC.unshare(CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())


def _setns(fd: int) -> None:
    assert LIBC.setns(fd, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
