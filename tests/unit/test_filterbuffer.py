"""The filter's network buffer on real socket pairs: we are QEMU's end of both."""

from __future__ import annotations

import itertools
import random
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from mcft.filterbuffer import (
    DEFAULT_LIMIT_BYTES,
    FilterBuffer,
    attach_commands,
    count_frames,
    detach_commands,
    make_channel,
    names,
)
from mcft.netbuffer import Nic

NIC = Nic("vnet0", "52:54:00:00:00:01", "hostnet0", "virtio", False, "bridge")


def frame(payload: bytes, vnet: int = 12) -> bytes:
    return struct.pack("!II", len(payload), vnet) + payload


class Qemu:
    """QEMU's ends of one NIC's pair."""

    def __init__(self, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self.channel, self.out, self.inn = make_channel(NIC, limit_bytes)
        self.inn.setblocking(False)

    def send(self, data: bytes) -> None:
        self.out.sendall(data)

    def got(self) -> bytes:
        """What reached QEMU (and would go on to the tap)."""
        data = b""
        while True:
            try:
                part = self.inn.recv(1 << 20)
            except BlockingIOError:
                return data
            if not part:
                return data
            data += part

    def close(self) -> None:
        self.channel.close()
        self.out.close()
        self.inn.close()


@pytest.fixture
def qemu() -> Iterator[Qemu]:
    made = Qemu()
    yield made
    made.close()


def holding(*qemus: Qemu) -> FilterBuffer:
    buffer = FilterBuffer([q.channel for q in qemus])
    buffer.hold()
    return buffer


# ---- frames ----


@given(st.lists(st.binary(max_size=60), max_size=10), st.integers(0, 100))
def test_count_frames(payloads: list[bytes], cut: int) -> None:
    whole = b"".join(frame(p) for p in payloads)
    assert count_frames(whole) == (len(payloads), sum(map(len, payloads)), len(whole))
    frames, _, end = count_frames(whole[: max(0, len(whole) - cut)])
    assert frames == sum(1 for at in itertools.accumulate(len(frame(p)) for p in payloads) if at <= len(whole) - cut)
    assert end <= max(0, len(whole) - cut)


# ---- epochs ----


class Epochs(RuleBasedStateMachine):
    """Random frames, cut anywhere, over two NICs; each epoch arrives byte for byte, at its time and not before."""

    @initialize()
    def start(self) -> None:
        self.qemus = [Qemu(), Qemu()]
        self.buffer = FilterBuffer([q.channel for q in self.qemus])
        self.open = [b"", b""]  # whole frames behind the barrier
        self.before = [b"", b""]  # whole frames before it
        self.half = [b"", b""]  # the rest of a frame that QEMU has not written yet
        self.holds = False

    def teardown(self) -> None:
        if hasattr(self, "qemus"):
            for q in self.qemus:
                q.close()

    def nothing_arrived(self) -> None:
        assert [q.got() for q in self.qemus] == [b"", b""]

    @precondition(lambda self: not self.holds)
    @rule()
    def hold(self) -> None:
        self.buffer.hold()
        self.holds = True

    @rule(nic=st.integers(0, 1), payload=st.binary(max_size=40), read=st.booleans())
    def guest_sends(self, nic: int, payload: bytes, read: bool) -> None:
        data = frame(payload)
        self.qemus[nic].send(data)
        if read:
            self.buffer.readable(self.qemus[nic].channel)
        if self.holds:
            self.open[nic] += data
            self.nothing_arrived()
        else:
            self.buffer.readable(self.qemus[nic].channel)
            assert self.qemus[nic].got() == data

    @precondition(lambda self: self.holds)
    @rule()
    def barrier(self) -> None:
        self.buffer.barrier()
        self.before = [a + b for a, b in zip(self.before, self.open, strict=True)]
        self.open = [b"", b""]
        self.nothing_arrived()

    @precondition(lambda self: self.holds)
    @rule()
    def release(self) -> None:
        self.buffer.release()
        assert [q.got() for q in self.qemus] == self.before
        self.before = [b"", b""]

    @precondition(lambda self: self.holds)
    @rule()
    def open_up(self) -> None:
        self.buffer.open()
        assert [q.got() for q in self.qemus] == [a + b for a, b in zip(self.before, self.open, strict=True)]
        self.before, self.open, self.holds = [b"", b""], [b"", b""], False

    @precondition(lambda self: self.holds)
    @rule()
    def drop(self) -> None:
        for q in self.qemus:
            self.buffer.readable(q.channel)
        self.buffer.drop()
        self.before, self.open = [b"", b""], [b"", b""]

    @rule()
    def backlog(self) -> None:
        for q in self.qemus:
            self.buffer.readable(q.channel)
        held = [count_frames(a + b)[:2] for a, b in zip(self.before, self.open, strict=True)]
        assert [(b.packets, b.bytes) for b in self.buffer.backlog()] == held


Epochs.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestEpochs = Epochs.TestCase


def test_half_a_frame_belongs_to_the_next_epoch(qemu: Qemu) -> None:
    buffer = holding(qemu)
    whole = frame(b"second")
    qemu.send(frame(b"first") + whole[:9])
    buffer.barrier()
    buffer.release()
    assert qemu.got() == frame(b"first")
    qemu.send(whole[9:])
    buffer.barrier()
    buffer.release()
    assert qemu.got() == whole


def test_barrier_includes_what_nobody_has_read_yet(qemu: Qemu) -> None:
    buffer = holding(qemu)
    qemu.send(frame(b"unread"))
    buffer.barrier()
    buffer.release()
    assert qemu.got() == frame(b"unread")


def test_hold_begins_behind_what_passed(qemu: Qemu) -> None:
    buffer = FilterBuffer([qemu.channel])
    qemu.send(frame(b"before"))
    buffer.hold()
    assert qemu.got() == frame(b"before")
    qemu.send(frame(b"after"))
    buffer.readable(qemu.channel)
    assert qemu.got() == b""


def test_closed_keeps_everything_until_open(qemu: Qemu) -> None:
    buffer = holding(qemu)
    qemu.send(frame(b"1"))
    buffer.barrier()
    qemu.send(frame(b"2"))
    buffer.close()
    qemu.send(frame(b"3"))
    buffer.readable(qemu.channel)
    with pytest.raises(AssertionError):
        buffer.release()
    assert qemu.got() == b""
    buffer.open()
    assert qemu.got() == frame(b"1") + frame(b"2") + frame(b"3")


def test_limit_drops_whole_frames_and_keeps_the_oldest() -> None:
    qemu = Qemu(limit_bytes=100)
    buffer = holding(qemu)
    frames = [frame(bytes([i]) * 22) for i in range(6)]  # 30 bytes each
    qemu.send(b"".join(frames[:2]))
    buffer.barrier()
    qemu.send(b"".join(frames[2:5]) + frames[5][:10])
    buffer.readable(qemu.channel)
    assert buffer.backlog()[0].dropped == 2 and buffer.backlog()[0].packets == 3
    qemu.send(frames[5][10:])
    buffer.barrier()
    buffer.release()
    frames_out, _, end = count_frames(got := qemu.got())
    assert end == len(got), "never half a frame"
    assert got == frames[0] + frames[1] + frames[2] and frames_out == 3
    assert buffer.backlog()[0].dropped == 3, "the newest is dropped, also one that was half there at the limit"
    qemu.close()


def test_partial_writes_under_back_pressure(qemu: Qemu) -> None:
    """QEMU does not read for a while: what was released arrives whole and in order once it does."""
    buffer = holding(qemu)
    qemu.channel.ours_in.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    rng = random.Random(1)
    data = b"".join(frame(rng.randbytes(1400)) for _ in range(400))
    for at in range(0, len(data), 100_000):
        qemu.send(data[at : at + 100_000])
        buffer.readable(qemu.channel)
    buffer.barrier()
    buffer.release()
    assert qemu.channel.sending and not buffer.settled
    got = b""
    while part := qemu.got():
        got += part
        qemu.channel.flush()
    assert got == data and not qemu.channel.sending
    assert buffer.settled


def test_closed_stops_what_was_released_but_not_yet_written(qemu: Qemu) -> None:
    """A release is a lease: what QEMU did not take while the lease held must not leave after the close."""
    buffer = holding(qemu)
    qemu.channel.ours_in.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    data = b"".join(frame(bytes(1400)) for _ in range(100))
    qemu.send(data)
    buffer.barrier()
    buffer.release()
    buffer.close()
    taken = len(qemu.got())
    qemu.channel.flush()  # what the gate's loop does once the socket is writable
    assert taken < len(data) and qemu.got() == b""


@pytest.mark.parametrize("side", ["out", "inn"])
def test_a_gone_qemu_is_noticed(qemu: Qemu, side: str) -> None:
    buffer = holding(qemu)
    getattr(qemu, side).close()
    qemu.out.send(frame(b"x")) if side == "inn" else None
    buffer.barrier()
    buffer.release()
    assert "vnet0" in buffer.broken


# ---- QEMU's graph ----


def run_rx(commands: list[tuple[str, dict[str, object]]], chain: list[str]) -> list[str]:
    """Apply `object-add` to a netdev's filter list as QEMU does (`insert` behind or before, else the tail)."""
    chain = list(chain)
    for name, arguments in commands:
        if name != "object-add":
            continue
        ident = str(arguments["id"])
        if "position" in arguments:
            at = chain.index(str(arguments["position"]).removeprefix("id="))
            chain.insert(at + 1 if arguments["insert"] == "behind" else at, ident)
        else:
            chain.append(ident)
    return chain


def test_the_new_pair_sees_packets_first_and_outdev_before_indev() -> None:
    """What the guest sends walks the list backwards: new outdev, then (from its indev) the old pair, then the tap."""
    first = run_rx(attach_commands(NIC, 0, 1, None), ["others"])
    one = names(0, 1)
    assert list(reversed(first)) == [one["out"], one["in"], "others"]
    second = run_rx(attach_commands(NIC, 0, 2, one["out"]), first)
    two = names(0, 2)
    assert list(reversed(second)) == [two["out"], two["in"], one["out"], one["in"], "others"]
    for length in (1, 2, 3):  # at no step does a packet pass unbuffered: an outdev of either pair is before the tap
        partial = run_rx(attach_commands(NIC, 0, 2, one["out"])[: 1 + length], first)
        walk = list(reversed(partial))
        assert any(ident.endswith("-out") for ident in walk[: walk.index("others")])


def test_attach_makes_chardevs_of_the_passed_descriptors_first() -> None:
    commands = attach_commands(NIC, 3, 7, None)
    assert [name for name, _ in commands] == ["chardev-add", "chardev-add", "object-add", "object-add"]
    n = names(3, 7)
    assert [c[1]["backend"]["data"]["addr"]["data"]["str"] for c in commands[:2]] == [n["fd_out"], n["fd_in"]]
    assert commands[2][1]["indev"] == n["chr_in"] and commands[3][1]["outdev"] == n["chr_out"]
    for _, arguments in commands[2:]:
        assert (arguments["netdev"], arguments["queue"], arguments["vnet_hdr_support"]) == ("hostnet0", "rx", True)


def test_detach_takes_outdevs_first_and_only_ours() -> None:
    n = names(0, 1)
    chardevs = ["charserial0", n["chr_in"], n["chr_out"]]
    commands = list(detach_commands([n["in"], "iothread1", n["out"], "mcft-netx"], chardevs))
    assert commands == [
        ("object-del", {"id": n["out"]}),
        ("object-del", {"id": n["in"]}),
        ("chardev-remove", {"id": n["chr_in"]}),
        ("chardev-remove", {"id": n["chr_out"]}),
    ]


def test_names_of_two_gates_and_nics_differ() -> None:
    every = [i for index, serial in itertools.product(range(3), range(3)) for i in names(index, serial).values()]
    assert len(set(every)) == len(every)
