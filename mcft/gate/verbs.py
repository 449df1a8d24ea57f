"""`python -m mcft.gate.verbs`: the RDMA verbs of one gate, in a process of its own: the only place that imports pyverbs.

Not in the gate, because calls of the verbs library may block: connecting a queue pair resolves the peer's address in the
kernel (up to a second), and a device that is being removed answers when it likes. The gate and this process share a page of
memory: the other host's adapter writes into it, the gate reads it by itself. Between them goes one SOCK_SEQPACKET: a
datagram to write (`WRITE` and its bytes), or a request as JSON with its answer. It ends when the gate does.

Source of the calls: ibv_reg_mr(3), ibv_create_qp(3), ibv_modify_qp(3), ibv_post_send(3), ibv_poll_cq(3).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
import select
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

try:
    import pyverbs.enums as enums
    from pyverbs.addr import GID, AHAttr, GlobalRoute
    from pyverbs.cq import CQ
    from pyverbs.device import Context
    from pyverbs.mr import MR
    from pyverbs.pd import PD
    from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
    from pyverbs.wr import SGE, SendWR
except ImportError as error:
    ABSENT = str(error)
else:
    ABSENT = ""

from mcft import rdmadevices
from mcft.errors import McftError
from mcft.keepalive import DATAGRAM_BYTES
from mcft.rdma import (
    INBOX_AT,
    OUTBOX_AT,
    REGION_BYTES,
    RETRIES,
    SLOT_BYTES,
    SLOTS,
    WRITE,
    Inbox,
    Offer,
    Outbox,
    Spec,
    ack_timeout,
)  # fmt: skip

COMPLETION_POLL_S = 0.004  # while writes are under way
LEAVE_POLL_S = 0.1
MIN_RNR_TIMER = 12
HOPS = 64  # RoCE v2 may be routed
PR_SET_PDEATHSIG = 1


class Verbs:
    """One queue pair with its memory, made anew by every `open`."""

    def __init__(self, spec: Spec, memory: mmap.mmap) -> None:
        self.e: Any = enums
        self.spec, self.inbox, self.outbox = spec, Inbox(memoryview(memory)), Outbox(memoryview(memory))
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._context: Any = None
        self._node: Path | None = None
        self._peer: Offer | None = None
        self._wc: dict[int, str] = {
            v: k.removeprefix("IBV_WC_") for k, v in vars(enums).items() if k.startswith("IBV_WC_") and k.endswith("_ERR")
        }

    def open(self) -> Offer:
        """Device, memory and a fresh queue pair, which waits for its peer. Raises: Refused, and pyverbs' errors."""
        self.close()
        port = rdmadevices.find(self.spec.local, self.spec.device)
        self._node = rdmadevices.node(port.device)
        self._context = Context(name=port.device)
        pd = PD(self._context)
        self._cq = CQ(self._context, 2 * SLOTS)
        here, there = self.e.IBV_ACCESS_LOCAL_WRITE, self.e.IBV_ACCESS_REMOTE_WRITE
        self._in = MR(pd, DATAGRAM_BYTES, here | there, self._base + INBOX_AT)
        self._out = MR(pd, SLOTS * SLOT_BYTES, here, self._base + OUTBOX_AT)
        cap = QPCap(max_send_wr=SLOTS, max_recv_wr=1, max_send_sge=1, max_recv_sge=1)
        self._qp = QP(pd, QPInitAttr(qp_type=self.e.IBV_QPT_RC, scq=self._cq, rcq=self._cq, cap=cap))
        attr = QPAttr(port_num=port.port)
        attr.qp_access_flags = here | there
        self._qp.to_init(attr)
        self._port, self._attr, self._psn = port, attr, secrets.randbits(24)
        self.inbox.clear()
        return Offer(self._qp.qp_num, self._psn, self._base + INBOX_AT, self._in.rkey, port.gid, port.lid)

    def connect(self, peer: Offer) -> None:
        """Ready to write and be written to. Blocks while the kernel looks for the peer. Raises: pyverbs' errors."""
        route = GlobalRoute(dgid=GID(peer.gid), sgid_index=self._port.gid_index, hop_limit=HOPS)
        attr = self._attr
        attr.dest_qp_num, attr.rq_psn, attr.path_mtu = peer.qpn, peer.psn, self.e.IBV_MTU_256  # a datagram fits
        attr.max_dest_rd_atomic, attr.min_rnr_timer = 1, MIN_RNR_TIMER
        attr.ah_attr = AHAttr(port_num=self._port.port, is_global=1, gr=route, dlid=peer.lid)
        self._qp.to_rtr(attr)
        attr.timeout, attr.retry_cnt, attr.rnr_retry = ack_timeout(self.spec.loss_ms), RETRIES, RETRIES
        attr.sq_psn, attr.max_rd_atomic = self._psn, 1
        self._qp.to_rts(attr)
        self._peer = peer

    def leave(self) -> bool:
        """Whether the device is being removed. Some (rxe) wait for their users before they go, and don't tell them."""
        return self._context is not None and (self._node is None or not self._node.exists())

    def write(self, datagram: bytes) -> None:
        """Into the peer's inbox. Raises: pyverbs' errors (the device is gone)."""
        if self._peer is None or (at := self.outbox.put(datagram)) is None:
            return
        sge = SGE(self._base + at, len(datagram), self._out.lkey)
        wr = SendWR(opcode=self.e.IBV_WR_RDMA_WRITE, num_sge=1, sg=[sge], send_flags=self.e.IBV_SEND_SIGNALED)
        wr.set_wr_rdma(self._peer.rkey, self._peer.address)
        self._qp.post_send(wr)

    def failed(self) -> str:
        """Empty, or what the adapter says of a write that it could not bring over."""
        if self._peer is None:
            return ""
        count, completions = self._cq.poll(SLOTS)
        for completion in completions or []:
            if completion.status != self.e.IBV_WC_SUCCESS:
                return self._wc.get(completion.status, f"status {completion.status}")
        self.outbox.acknowledged(count)
        return ""

    def close(self) -> None:
        """Nothing can be written here any more. A device that is gone may not even take its leave."""
        self._peer = None
        self.outbox.reset()
        if self._context is not None:
            with suppress(Exception):
                self._context.close()  # and all that was made of it
            self._context = None


def words(error: Exception) -> str:
    """One line of an error, whosever it is."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def serve(verbs: Verbs, sock: socket.socket) -> None:
    """Until the gate is gone."""
    while True:
        busy = verbs.outbox.flying > 0
        ready, _, _ = select.select([sock], [], [], COMPLETION_POLL_S if busy else LEAVE_POLL_S)
        if ready:
            packet = sock.recv(1 << 16)
            if not packet:
                return
            if packet[:1] == WRITE:
                _write(verbs, sock, packet[1:])
            else:
                _answer(verbs, sock, msgspec.json.decode(packet))
        what = (verbs.failed() if busy else "") or ("the device is being removed" if verbs.leave() else "")
        if what:
            verbs.close()
            _tell(sock, {"down": what})


def _write(verbs: Verbs, sock: socket.socket, datagram: bytes) -> None:
    try:
        verbs.write(datagram)
    except Exception as error:
        verbs.close()
        _tell(sock, {"down": words(error)})


def _answer(verbs: Verbs, sock: socket.socket, request: dict[str, Any]) -> None:
    """{"do": "open"} → an offer; {"do": "connect", "offer": …} → {}; {"do": "accept", "offer": …} → an offer, connected."""
    try:
        offer = verbs.open() if request["do"] in ("open", "accept") else None
        if request["do"] in ("connect", "accept"):
            verbs.connect(msgspec.convert(request["offer"], Offer))
        _tell(sock, {"ok": {} if offer is None else msgspec.to_builtins(offer)})
    except Exception as error:
        verbs.close()
        _tell(sock, {"error": str(error) if isinstance(error, McftError) else words(error)})


def _tell(sock: socket.socket, body: dict[str, Any]) -> None:
    sock.send(msgspec.json.encode(body))


def main(argv: list[str]) -> int:
    """argv: the socket's and the memory's descriptors, and the `Spec` as JSON."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    sock, memory = socket.socket(fileno=int(argv[1])), mmap.mmap(int(argv[2]), REGION_BYTES)
    os.close(int(argv[2]))
    if ABSENT:
        _tell(sock, {"absent": f"pyverbs can't be imported ({ABSENT}); {rdmadevices.INSTALL}"})
        return 0
    verbs = Verbs(msgspec.json.decode(argv[3], type=Spec), memory)
    with suppress(OSError):  # the gate went while it was told something
        _tell(sock, {"ready": True})
        serve(verbs, sock)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
