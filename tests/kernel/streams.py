"""A guest behind vnet0 that sends as fast as it may: a real TCP stream, or numbered datagrams; and what came of them."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from frames import Wire, sh, unshare

GUEST, OUTSIDE, PORT = "10.9.0.1", "10.9.0.2", 5001
MAC = "02:00:00:00:00:02"  # known beforehand: while a neighbour is asked for, datagrams are dropped
TOTAL_RETRANS = 100  # offset in struct tcp_info (linux/tcp.h)
NUMBER = struct.Struct("!I")
SO_RCVBUFFORCE = 33


def _tcp(run_s: float) -> dict[str, Any]:
    """repeated: segments that TCP sent again; in_vain: those of them that came twice (the receiver says so, RFC 2883): nothing
    had been lost, TCP's own clock was impatient. (A probe or a timeout while the one CPU is busy elsewhere.)"""
    with socket.create_connection((OUTSIDE, PORT), timeout=30) as sock:
        end, sent = time.monotonic() + run_s, 0
        while time.monotonic() < end:
            sent += sock.send(b"\0" * 65536)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(1):  # until the other end has read everything
            pass
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
    with open("/proc/self/net/netstat", encoding="ascii") as file:
        names, values = (line.split()[1:] for line in file if line.startswith("TcpExt:"))
    in_vain = int(values[names.index("TCPDSACKRecvSegs")])
    return {"sent": sent, "repeated": struct.unpack_from("=I", info, TOTAL_RETRANS)[0], "in_vain": in_vain}


def _udp(run_s: float) -> dict[str, Any]:
    """Bursts of numbered datagrams: 5000 a second. As fast as it may be, a receiver that gets too little of this kernel's one CPU
    falls behind by more than its socket holds (43,000 were seen), and what is dropped there was not lost by any plug.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, 32, 4 << 20)  # SO_SNDBUFFORCE
        sock.connect((OUTSIDE, PORT))
        end, sent = time.monotonic() + run_s, 0
        while time.monotonic() < end:
            for _ in range(100):
                sock.send(NUMBER.pack(sent).ljust(500, b"\0"))
                sent += 1
            time.sleep(0.02)
    return {"sent": sent}


@dataclass
class Stream:
    """`with Stream("tcp", 2.5) as stream`: vnet0 is there; `begin()` starts the guest, `end()` waits for it and says all.

    came: bytes of TCP, numbers of datagrams, as they come.
    """

    kind: str
    run_s: float
    came_bytes: int = 0
    numbers: list[int] = field(default_factory=list)

    def __enter__(self) -> Stream:
        self._wire = Wire(taps=())
        self._wire.__enter__()
        (ready, say_ready), (go, self._go), (self._done, say_done) = os.pipe(), os.pipe(), os.pipe()
        self._child = os.fork()
        if not self._child:
            try:
                unshare()
                os.write(say_ready, b"x")
                os.read(go, 1)
                sh(f"ip link set g0 up; ip address add {GUEST}/24 dev g0; ip neigh add {OUTSIDE} lladdr {MAC} dev g0")
                os.write(say_done, json.dumps((_tcp if self.kind == "tcp" else _udp)(self.run_s)).encode())
            finally:
                os._exit(0)
        for fd in (say_ready, go, say_done):
            os.close(fd)
        os.read(ready, 1)
        os.close(ready)
        sh(f"ip link add vnet0 type veth peer g0; ip link set g0 netns {self._child}; ip link set vnet0 master br0 up")
        sh(f"ip link set c1 address {MAC}; ip address add {OUTSIDE}/24 dev c1")
        receive = self._receive_tcp if self.kind == "tcp" else self._receive_udp
        self._over = threading.Event()
        if self.kind == "tcp":
            self._sock = socket.create_server((OUTSIDE, PORT))
        else:
            self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
            self._sock.bind((OUTSIDE, PORT))
        self._sock.settimeout(0.5)
        self._receiver = threading.Thread(target=receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        for fd in (self._go, self._done):
            os.close(fd)
        os.waitpid(self._child, 0)
        if self._receiver.is_alive():
            self._receiver.join()
        self._sock.close()
        self._wire.__exit__(kind, error, tb)

    def begin(self) -> None:
        self._receiver.start()
        os.write(self._go, b"x")

    @property
    def came(self) -> int:
        return self.came_bytes if self.kind == "tcp" else len(self.numbers)

    def end(self) -> dict[str, Any]:
        """What the guest says: sent (bytes, datagrams); of TCP also what it repeated."""
        said = b""
        while more := os.read(self._done, 65536):
            said += more
        self._over.set()
        self._receiver.join()
        return dict(json.loads(said))

    def _receive_tcp(self) -> None:
        self._sock.settimeout(30)
        connection, _ = self._sock.accept()
        with connection:
            while data := connection.recv(1 << 20):
                self.came_bytes += len(data)

    def _receive_udp(self) -> None:
        while True:
            try:
                self.numbers.append(NUMBER.unpack_from(self._sock.recv(2048))[0])
            except TimeoutError:
                if self._over.is_set():
                    return


def epochs(stream: Stream, step: Callable[[], None], seconds: float) -> None:
    """Drive the buffer for so long, and until something has come."""
    end = time.monotonic() + seconds
    while time.monotonic() < end or not stream.came:
        step()
