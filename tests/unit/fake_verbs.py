"""A FAKE of `mcft.gate.verbs`: its protocol with the gate is real, but a "write" goes into the other process's memory by /proc.

An offer's qpn is the process, its rkey the descriptor of its memory, its psn the incarnation. A write into a process that is
gone, or has a newer incarnation, fails as an adapter's would.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import sys
from contextlib import suppress

PAGE = 4096
INCARNATION_AT = 4000


def main() -> None:
    sock, fd = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    memory = mmap.mmap(fd, PAGE)
    spec = json.loads(sys.argv[3])
    if spec["device"] == "absent":
        sock.send(json.dumps({"absent": "pyverbs can't be imported"}).encode())
        return
    peer, incarnation = None, 0
    sock.send(json.dumps({"ready": True}).encode())
    with suppress(OSError):
        while packet := sock.recv(1 << 16):
            if packet[:1] == b"W":
                if peer is None:
                    continue
                try:
                    with open(f"/proc/{peer['qpn']}/fd/{peer['rkey']}", "r+b") as file:
                        there = mmap.mmap(file.fileno(), PAGE)
                    if there[INCARNATION_AT] != peer["psn"]:
                        raise ProcessLookupError
                    there[: len(packet) - 1] = packet[1:]
                except OSError:
                    peer = None
                    sock.send(json.dumps({"down": "RETRY_EXC_ERR"}).encode())
                continue
            request = json.loads(packet)
            if spec["device"] == "broken":
                sock.send(json.dumps({"error": "there is no RDMA device 'broken'"}).encode())
                continue
            if request["do"] in ("open", "accept"):
                incarnation, peer = incarnation + 1, None
                memory[INCARNATION_AT] = incarnation
            if request["do"] in ("accept", "connect"):
                peer = request["offer"]
            mine = {"qpn": os.getpid(), "psn": incarnation, "address": 0, "rkey": fd, "gid": "::"}
            sock.send(json.dumps({"ok": {} if request["do"] == "connect" else mine}).encode())


main()
