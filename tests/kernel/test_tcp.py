"""A real TCP stream through the plug: unprotecting while it flows loses and reorders nothing."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time

from frames import Wire, nic, sh, unshare

from mcft.plugbuffer import Limit, PlugBuffer

TOTAL_RETRANS = 100  # offset in struct tcp_info (linux/tcp.h)
RUN_S = 2.5


def guest(ready: int, go: int, done: int) -> None:
    """A network namespace of its own behind vnet0, which sends as fast as it may and counts what it had to repeat."""
    unshare()
    os.write(ready, b"x")
    os.read(go, 1)
    sh("ip link set g0 up; ip address add 10.9.0.1/24 dev g0")
    with socket.create_connection(("10.9.0.2", 5001), timeout=10) as sock:
        end, sent = time.monotonic() + RUN_S, 0
        while time.monotonic() < end:
            sent += sock.send(b"\0" * 65536)
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
        repeated = struct.unpack_from("=I", info, TOTAL_RETRANS)[0]
    os.write(done, struct.pack("=QI", sent, repeated))


def test_a_bulk_stream_does_not_notice_unprotect() -> None:
    """Fails if the filter goes before what waits, if the IFB goes before its filter, or if the plug drops what it holds."""
    with Wire(taps=()):
        (ready, say_ready), (go, say_go), (done, say_done) = os.pipe(), os.pipe(), os.pipe()
        child = os.fork()
        if not child:
            try:
                guest(say_ready, go, say_done)
            finally:
                os._exit(0)
        os.close(say_done)
        os.read(ready, 1)
        sh(f"ip link add vnet0 type veth peer g0; ip link set g0 netns {child}; ip link set vnet0 master br0 up")
        sh("ip address add 10.9.0.2/24 dev c1")
        buffer = PlugBuffer()
        buffer.attach([nic("vnet0")], Limit(64 << 20))
        buffer.hold()
        came = 0

        def receive() -> None:
            nonlocal came
            connection, _ = server.accept()
            with connection:
                while data := connection.recv(1 << 20):
                    came += len(data)

        with socket.create_server(("10.9.0.2", 5001)) as server:
            receiver = threading.Thread(target=receive)
            receiver.start()
            os.write(say_go, b"x")
            end = time.monotonic() + RUN_S / 2
            while time.monotonic() < end or not came:
                buffer.barrier()
                time.sleep(0.01)
                buffer.release()
            buffer.open()
            buffer.detach()
            before = came
            answer = os.read(done, 12)
            receiver.join()
        os.waitpid(child, 0)
        sent, repeated = struct.unpack("=QI", answer)
        print(f"{sent} bytes, {repeated} segments repeated; {came - before} bytes after unprotect")
        assert came == sent and came > before > 0 and not buffer.broken
        assert repeated <= 3, "a burst"  # a probe of TCP's own (TLP) repeats one now and then
