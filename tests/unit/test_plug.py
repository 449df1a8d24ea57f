"""The plug buffer's pure half: names, messages there and back, what may be copied, what counts as tampering."""

from __future__ import annotations

import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcft import plugwire as wire
from mcft.errors import Refused
from mcft.netbuffer import Nic, choose
from mcft.plugjudge import News, judge, news, socket_filter
from mcft.plugwire import Filter, Line

LINE = Line("vnet0", 5, "mcft-vnet0", 6, 0x4D010000, 1 << 20)
OTHER = Line("vnet1", 7, "mcft-vnet1", 8, 0x4D010000, 1 << 20)
ALL = 0x0300  # ETH_P_ALL as on the wire


def body_of(message: bytes) -> tuple[int, int, bytes]:
    """(type, flags, body) of the one message."""
    length, kind, flags, _, _ = wire.HEADER.unpack_from(message)
    assert length == len(message)
    return kind, flags, message[wire.HEADER.size :]


def attr(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + b"\0" * (-len(data) % 4)


# ---- names ----


@given(st.from_regex(r"[a-z0-9._-]{1,15}", fullmatch=True))
def test_the_ifb_says_whose_it_is_and_fits_the_kernel(tap: str) -> None:
    """Fails with names over 15 bytes, or two long taps of one name."""
    name = wire.ifb_name(tap)
    assert 0 < len(name.encode()) <= 15 and name != tap
    if re.fullmatch(r"tap\d+", tap):
        assert name == "ifb" + tap[3:]
    elif len(tap) <= 10:
        assert name == f"mcft-{tap}"


def test_long_names_stay_apart() -> None:
    assert wire.ifb_name("customer-web-01") != wire.ifb_name("customer-web-02")


def test_an_alias_is_read_back_for_its_own_tap_only() -> None:
    for found in ([], ["ifb"], ["ifb", "clsact"]):
        says = wire.alias("vnet0", found)
        assert wire.found_before(says, "vnet0") == found
        assert wire.found_before(says, "vnet01") is None
    assert wire.found_before("", "vnet0") is None and wire.found_before("mcft holds what", "vnet0") is None


def test_every_new_qdisc_has_another_handle() -> None:
    """Fails if the one after the last is the same: a message for the old one would act on the new."""
    handle, seen = wire.next_handle(0), []
    for _ in range(300):
        seen.append(handle)
        handle = wire.next_handle(handle)
        assert handle != seen[-1] and handle & 0xFFFF == 0 and 0 < handle >> 16 < 0xFFFF
    assert len(set(seen)) == 256


@pytest.mark.parametrize(("mtu", "delay", "limit"), [(1500, 100, 60_000_000), (1500, 10_000, 256 << 20), (68, 10, 4 << 20)])
def test_the_default_limit(mtu: int, delay: float, limit: int) -> None:
    assert wire.default_limit_bytes(mtu, delay, 300.0) == limit


# ---- messages ----


@pytest.mark.parametrize(("action", "number"), [("buffer", 0), ("release-one", 1), ("release-indefinite", 2)])
def test_a_step_of_the_plug(action: wire.Action, number: int) -> None:
    """An action that pyroute2 does not know is silently BUFFER. Fails if a step may create a qdisc, or names no handle."""
    kind, flags, body = body_of(wire.plug(LINE, action))
    _, index, handle, parent, _ = wire.TC.unpack_from(body)
    assert (kind, flags) == (wire.NEWQDISC, wire.REQUEST | wire.ACK)
    assert (index, handle, parent) == (6, LINE.handle, wire.ROOT)
    found = dict(wire.attributes(body[wire.TC.size :]))
    assert found[1] == b"plug\0" and struct.unpack("=iI", found[2]) == (number, 0)


def test_a_new_plug_has_its_limit() -> None:
    """Without one pyroute2 says 0, and the kernel drops everything."""
    kind, flags, body = body_of(wire.new_plug(LINE))
    assert kind == wire.NEWQDISC and flags & (wire.CREATE | wire.REPLACE) == wire.CREATE | wire.REPLACE
    assert struct.unpack("=iI", dict(wire.attributes(body[wire.TC.size :]))[2]) == (0, 1 << 20)


def test_the_redirect_is_read_back() -> None:
    kind, _, body = body_of(wire.redirect(LINE))
    found = wire.filter_(body)
    assert kind == wire.NEWTFILTER and (found.priority, found.protocol) == (wire.OUR_PRIORITY, ALL)
    assert wire.redirects_to(found) == LINE.ifb_index
    assert news(kind, body) == News(wire.NEWTFILTER, 5, 0, wire.INGRESS, wire.OUR_PRIORITY)


def test_a_queue_with_its_statistics() -> None:
    stats = attr(7, attr(1, b"\0" * 16) + attr(3, struct.pack("=IIIII", 3, 412, 7, 0, 0)))
    body = wire.TC.pack(0, 6, LINE.handle, wire.ROOT, 1) + attr(1, b"plug\0") + stats
    assert wire.queue(body) == wire.Queue("plug", 6, LINE.handle, wire.ROOT, 3, 412, 7)


def test_what_is_inside_an_ifb() -> None:
    """Fails if what it took and dropped counts as still in there: every `unprotect` would wait for it in vain."""
    counts = attr(23, struct.pack("=8Q", 100, 90, 0, 0, 0, 0, 7, 0))
    body = wire.LINK.pack(0, 1, 6, wire.IFF_UP, 0) + attr(4, struct.pack("=I", 1500)) + counts
    assert wire.link(body) == wire.Link(6, True, 1500, "", "", inside=3)


def test_several_messages_of_a_datagram_and_a_broken_one() -> None:
    both = wire.ask_link(5) + wire.ask_queues(6)
    assert [kind for kind, _, _ in wire.messages(both)] == [wire.GETLINK, wire.GETQDISC]
    assert list(wire.messages(both[:20] + b"\0" * 20)) != [] and list(wire.messages(b"\0" * 40)) == []


# ---- filters of others ----


def act(kind: bytes) -> bytes:
    return attr(1, attr(1, kind + b"\0") + attr(2, b""))


def theirs(kind: str = "matchall", action: bytes = b"gact", priority: int = 9, chain: int = 0) -> Filter:
    number = {"matchall": 2, "u32": 7, "flower": 3}.get(kind, 2)
    return Filter(kind, 1, ALL, priority, chain, attr(number, act(action)))


def test_harmless_filters_are_copied_without_what_the_card_says() -> None:
    """Fails if TCA_MATCHALL_FLAGS goes along: the kernel refuses its own "not in hardware"."""
    with_flags = Filter("matchall", 1, ALL, 9, 0, attr(2, act(b"police")) + attr(3, struct.pack("=I", 8)))
    head = Filter("matchall", 0, ALL, 9, 0, b"")
    assert wire.copies([head, with_flags], "vnet0") == [with_flags]
    kind, flags, body = body_of(wire.copy_filter(with_flags, 6))
    copied = wire.filter_(body)
    assert kind == wire.NEWTFILTER and flags & wire.CREATE and copied.options == attr(2, act(b"police"))
    assert wire.TC.unpack_from(body)[1:4] == (6, 0, wire.EGRESS) and copied.priority == 9


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (theirs(action=b"mirred"), "past the buffer"),
        (theirs(kind="bpf"), "type 'bpf'"),
        (theirs(chain=3), "chains"),
        (theirs(priority=1), "priority"),
        (theirs(action=b"sample"), "past the buffer"),
    ],
)
def test_what_would_pass_the_buffer_is_refused(found: Filter, why: str) -> None:
    with pytest.raises(Refused) as refusal:
        wire.copies([theirs(), found], "vnet0")
    assert refusal.value.code == "foreign-filter" and why in refusal.value.reason


# ---- tampering ----

UP = wire.IFF_UP
HEARD = [
    (News(wire.DELLINK, 6), True),
    (News(wire.NEWLINK, 6, flags=0), True),
    (News(wire.NEWLINK, 6, flags=UP), False),
    (News(wire.DELQDISC, 6, LINE.handle, wire.ROOT), True),
    (News(wire.NEWQDISC, 6, LINE.handle, wire.ROOT), True),
    (News(wire.NEWTFILTER, 6, 1, wire.EGRESS, 9), True),
    (News(wire.DELLINK, 5), True),
    (News(wire.NEWLINK, 5, flags=0), True),
    (News(wire.NEWLINK, 5, flags=UP), False),
    (News(wire.DELQDISC, 5, wire.INGRESS_HANDLE, wire.CLSACT), True),
    (News(wire.DELQDISC, 5, 0x10000, wire.ROOT), False),  # shaping towards the guest
    (News(wire.NEWQDISC, 5, 0x10000, wire.ROOT), False),
    (News(wire.DELTFILTER, 5, 0, wire.INGRESS, 1), True),
    (News(wire.DELTFILTER, 5, 0, wire.INGRESS, 0), True),  # all of them
    (News(wire.DELCHAIN, 5, 0, wire.INGRESS, 0), True),
    (News(wire.NEWTFILTER, 5, 1, wire.INGRESS, 1), True),
    (News(wire.NEWTFILTER, 5, 1, wire.INGRESS_HANDLE, 1), True),
    (News(wire.DELTFILTER, 5, 1, wire.INGRESS, 9), False),
    (News(wire.NEWTFILTER, 5, 1, wire.EGRESS, 1), False),
    (News(wire.NEWTFILTER, 5, 1, 0x10000, 1), False),  # libvirt's limit towards the guest
    (News(wire.DELLINK, 99), False),
]


@pytest.mark.parametrize(("heard", "tampered"), HEARD, ids=[str(h) for h, _ in HEARD])
def test_judging(heard: News, tampered: bool) -> None:
    verdict = judge([OTHER, LINE], heard, taps_up=True)
    assert (verdict is not None and verdict.tampered) == tampered


def test_a_tap_that_we_set_down_ourselves() -> None:
    assert judge([LINE], News(wire.NEWLINK, 5, flags=0), taps_up=False) is None
    assert judge([LINE], News(wire.NEWLINK, 6, flags=0), taps_up=False) is not None, "the IFB never goes down"


def test_what_the_end_of_qemu_does_too() -> None:
    """Fails if an IFB's end counts as QEMU's, or a tap's does not."""
    ends = {heard.index for heard, tampered in HEARD if tampered and (v := judge([LINE], heard, taps_up=True)) and v.by_its_end}
    assert ends == {5}


def run_bpf(program: bytes, packet: bytes) -> int:
    """Classic BPF as far as it is used here (bpf(4))."""
    code, at, accumulator = [struct.unpack_from("=HBBI", program, i) for i in range(0, len(program), 8)], 0, 0
    while True:
        what, if_true, if_false, value = code[at]
        at += 1
        if what == 0x20:
            if value + 4 > len(packet):
                return 0
            accumulator = int.from_bytes(packet[value : value + 4], "big")
        elif what == 0x15:
            at += if_true if accumulator == value else if_false
        else:
            return value


@given(st.integers(1, 2**31), st.lists(st.integers(1, 2**31 - 1), min_size=1, max_size=20, unique=True), st.data())
def test_the_sockets_filter(port: int, indexes: list[int], data: st.DataObject) -> None:
    """Only our interfaces, and nothing that we did ourselves. Fails with a jump one off, or the other byte order."""
    index = data.draw(st.one_of(st.sampled_from(indexes), st.integers(1, 2**31 - 1)))
    sender = data.draw(st.one_of(st.just(port), st.just(0), st.integers(0, 2**32 - 1)))
    packet = wire.HEADER.pack(36, wire.NEWQDISC, 0, 1, sender) + wire.TC.pack(0, index, 0, 0, 0)
    taken = run_bpf(socket_filter(port, indexes), packet) > 0
    assert taken == (index in indexes and sender != port)


# ---- the choice ----


def nic(vhost: bool = False, kind: str = "bridge") -> Nic:
    return Nic("vnet0", "52:54:00:00:00:01", "hostnet0", "virtio", vhost, kind)


def test_the_plug_is_the_default_where_it_works() -> None:
    """Also with vhost, which the filter does not see."""
    assert choose("auto", [nic(vhost=True)], plug_available=True) == "plug"
    assert choose("plug", [nic()], plug_available=True) == "plug"
    assert choose("filter", [nic()], plug_available=True) == "filter"
    assert choose("auto", [nic()], plug_available=False) == "filter"


def test_the_plug_is_refused_where_it_does_not_work() -> None:
    with pytest.raises(Refused, match="not possible here") as refusal:
        choose("plug", [nic()], plug_available=False, why_no_plug="this kernel gives no sch_plug: No such file")
    assert "gives no sch_plug" in str(refusal.value)
    with pytest.raises(Refused, match="vhost-net"):
        choose("auto", [nic(vhost=True)], plug_available=False)


@pytest.mark.parametrize("kind", ["direct", "hostdev", "user", "vhostuser"])
def test_a_nic_without_a_tap_is_never_let_through(kind: str) -> None:
    """Fails if the plug is chosen before the NICs are looked at: a macvtap sends past its ingress."""
    for asked in ("auto", "plug"):
        with pytest.raises(Refused, match="can't be buffered"):
            choose(asked, [nic(), nic(kind=kind)], plug_available=True)
