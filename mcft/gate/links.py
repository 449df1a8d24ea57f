"""Interfaces of this host by rtnetlink: one message on a fresh socket each, so that nothing is kept open for a rare act."""

from __future__ import annotations

import errno
import os
import socket
import struct


def set_link(ifname: str, *, up: bool) -> None:
    """RTM_NEWLINK with or without IFF_UP, one message on a fresh socket. Raises: OSError (rtnetlink(7))."""
    index = socket.if_nametoindex(ifname)
    _rtnetlink(16, struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, int(up), 1))


def remove_drop_filter(ifname: str) -> None:
    """Take away the ingress qdisc that silenced this interface, with its filters. Raises: OSError (tc(8), RTM_DELQDISC)."""
    index = socket.if_nametoindex(ifname)
    try:
        _rtnetlink(37, struct.pack("=BxxxiIII", socket.AF_UNSPEC, index, 0xFFFF0000, 0xFFFFFFF1, 0))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EINVAL):
            raise


def _rtnetlink(kind: int, body: bytes) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as sock:
        sock.settimeout(1.0)
        sock.sendall(struct.pack("=IHHII", 16 + len(body), kind, 5, 1, 0) + body)  # NLM_F_REQUEST | NLM_F_ACK
        (code,) = struct.unpack_from("=i", sock.recv(4096), 16)
        if code:
            raise OSError(-code, os.strerror(-code))
