"""PURE: the plug buffer's names and its rtnetlink messages, there and back. No socket, no clock.

Per NIC: tap → ingress filter (matchall, all protocols, first) → redirect → IFB → `plug` qdisc → back to the tap's ingress,
behind its filters. Messages are encoded once, by pyroute2; what the kernel says is read with `struct`, as it comes in the
timed path. Sources: Linux net/sched/sch_plug.c, drivers/net/ifb.c, act_mirred.c, rtnetlink(7), tc-mirred(8).
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mcft.bareimport import bare
from mcft.errors import Refused

with bare("pyroute2"):  # as a whole it takes 0.16 s to import: half of a gate's start
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
    from pyroute2.netlink.rtnl.tcmsg import cls_matchall, tcmsg

Action = Literal["buffer", "release-one", "release-indefinite"]
_ACTIONS: dict[Action, int] = {"buffer": 0, "release-one": 1, "release-indefinite": 2}

NEWLINK, DELLINK, GETLINK = 16, 17, 18
NEWQDISC, DELQDISC, GETQDISC = 36, 37, 38
NEWTFILTER, DELTFILTER, GETTFILTER = 44, 45, 46
DELCHAIN = 101
ERROR, DONE = 2, 3
REQUEST, ACK, DUMP = 1, 4, 0x300
CREATE, EXCL, REPLACE = 0x400, 0x200, 0x100

ROOT, CLSACT, INGRESS, EGRESS = 0xFFFFFFFF, 0xFFFFFFF1, 0xFFFFFFF2, 0xFFFFFFF3
INGRESS_HANDLE = 0xFFFF0000
ETH_P_ALL = 3
OUR_PRIORITY = 1
IFF_UP = 1
NAME_BYTES = 15  # IFNAMSIZ without its end
HEADER = struct.Struct("=IHHII")
TC = struct.Struct("=BxxxiIII")  # struct tcmsg: family, ifindex, handle, parent, info
LINK = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change

# What each classifier calls its flags (what the card's hardware made of it) and its actions: linux/pkt_cls.h.
_FLAGS = {"matchall": 3, "u32": 11, "flower": 22, "basic": 0, "fw": 0}
_ACTS = {"matchall": (2,), "u32": (6, 7), "flower": (3,), "basic": (3, 4), "fw": (4, 2)}
_POLICE = {("u32", 6), ("basic", 4), ("fw", 2)}  # the old form: one policer, no list of actions
_HARMLESS_ACTIONS = ("police", "gact", "skbedit", "pedit", "csum", "vlan")


@dataclass(frozen=True, slots=True)
class Line:
    """One NIC's way through the buffer. handle: the plug qdisc's, new with every qdisc that mcft creates."""

    tap: str
    tap_index: int
    ifb: str
    ifb_index: int
    handle: int
    limit_bytes: int


@dataclass(frozen=True, slots=True)
class Queue:
    """A qdisc as the kernel shows it; packets and bytes wait in it now, dropped ones met its limit."""

    kind: str
    index: int
    handle: int
    parent: int
    packets: int
    bytes: int
    dropped: int


@dataclass(frozen=True, slots=True)
class Filter:
    """A filter as the kernel shows it. options: TCA_OPTIONS, unread."""

    kind: str
    handle: int
    protocol: int  # as on the wire
    priority: int
    chain: int
    options: bytes


@dataclass(frozen=True, slots=True)
class Link:
    """An interface as the kernel shows it."""

    index: int
    up: bool
    mtu: int
    alias: str
    kind: str
    inside: int = 0  # of an IFB: packets that have left its qdisc and not yet come out of it


# ---- names ----


def ifb_name(tap: str) -> str:
    """Whose IFB it is, to be seen at a glance: `ifb0` beside `tap0` (as QEMU's mc engine looks for it), else `mcft-vnet0`."""
    if match := re.fullmatch(r"tap(\d+)", tap):
        return f"ifb{match[1]}"
    name = f"mcft-{tap}"
    return name if len(name) <= NAME_BYTES else f"mcft-{tap[:4]}{zlib.crc32(tap.encode()) & 0xFFFFFF:06x}"


def alias(tap: str, found: list[str]) -> str:
    """What `ip link show` says of the IFB; also how a restarted gate knows whose it is, and what to leave when it goes.

    found: what was there before ("ifb", "clsact").
    """
    return f"mcft holds what {tap} sends" + (f" (kept: {' '.join(found)})" if found else "")


def found_before(says: str, tap: str) -> list[str] | None:
    """What an alias says was there before; None if the interface is not mcft's for this tap."""
    match = re.fullmatch(r"mcft holds what (\S+) sends(?: \(kept: ([a-z ]+)\))?", says)
    return (match[2] or "").split() if match and match[1] == tap else None


def next_handle(before: int) -> int:
    """Another handle than the one before: a message meant for the old qdisc then can't touch the new one."""
    return (0x4D00 | ((before >> 16) + 1) & 0xFF) << 16


def default_limit_bytes(mtu: int, delay_ms: float, loss_ms: float) -> int:
    """100 full packets per ms for as long as an epoch may wait (delay + T); 4 to 256 MiB."""
    return int(min(256 << 20, max(4 << 20, mtu * 100 * (delay_ms + loss_ms))))


# ---- encoding (pyroute2) ----


def _encode(message: Any, kind: int, flags: int) -> bytes:
    message["header"]["type"] = kind
    message["header"]["flags"] = flags | REQUEST | ACK
    message["header"]["sequence_number"] = 0
    message["header"]["pid"] = 0
    message.encode()
    return bytes(message.data)


def _tc(kind: int, flags: int, index: int, handle: int, parent: int, attrs: list[Any], info: int = 0) -> bytes:
    message = tcmsg()
    message["index"], message["handle"], message["parent"], message["info"] = index, handle, parent, info
    message["attrs"] = attrs
    return _encode(message, kind, flags)


def plug(line: Line, action: Action) -> bytes:
    """One step of the hot path."""
    return _change(line, {"action": _ACTIONS[action], "limit": 0})


def new_plug(line: Line) -> bytes:
    """A plug that holds from its first packet on, in place of whatever was the IFB's root; what that held is dropped."""
    options = {"action": 0, "limit": line.limit_bytes}
    attrs = [("TCA_KIND", "plug"), ("TCA_OPTIONS", options)]
    return _tc(NEWQDISC, CREATE | REPLACE, line.ifb_index, line.handle, ROOT, attrs)


def set_limit(line: Line) -> bytes:
    """The limit of a plug that stands (TCQ_PLUG_LIMIT); what it holds stays, also beyond it."""
    return _change(line, {"action": 3, "limit": line.limit_bytes})


def _change(line: Line, options: dict[str, int]) -> bytes:
    """It names the handle, so a qdisc that somebody put there instead answers with an error."""
    return _tc(NEWQDISC, 0, line.ifb_index, line.handle, ROOT, [("TCA_KIND", "plug"), ("TCA_OPTIONS", options)])


def new_clsact(index: int) -> bytes:
    """Where filters hang, at ingress and egress. Error EEXIST: there is one, or an `ingress`, which serves as well."""
    return _tc(NEWQDISC, CREATE | EXCL, index, INGRESS_HANDLE, CLSACT, [("TCA_KIND", "clsact")])


def delete_clsact(index: int) -> bytes:
    return _tc(DELQDISC, 0, index, INGRESS_HANDLE, CLSACT, [("TCA_KIND", "clsact")])


def delete_root(index: int) -> bytes:
    return _tc(DELQDISC, 0, index, 0, ROOT, [])


def redirect(line: Line) -> bytes:
    """All protocols, before every filter of others. Error EEXIST: somebody has a filter of this priority."""
    action = {"kind": "mirred", "direction": "egress", "action": "redirect", "ifindex": line.ifb_index}
    options = cls_matchall.get_parameters({"action": action})
    info = OUR_PRIORITY << 16 | _swap16(ETH_P_ALL)
    attrs = [("TCA_KIND", "matchall"), ("TCA_OPTIONS", options)]
    return _tc(NEWTFILTER, CREATE | EXCL, line.tap_index, 0, INGRESS, attrs, info)


def delete_redirect(line: Line) -> bytes:
    info = OUR_PRIORITY << 16 | _swap16(ETH_P_ALL)
    return _tc(DELTFILTER, 0, line.tap_index, 0, INGRESS, [("TCA_KIND", "matchall")], info)


def copy_filter(theirs: Filter, index: int) -> bytes:
    """The same filter at the egress of `index`, before its qdisc. Its actions are the very ones (by their index): one
    policer goes on counting both, so libvirt's bandwidth limit stays what it was."""
    skipped = _FLAGS[theirs.kind]
    options = b"".join(_attr(kind, data) for kind, data in attributes(theirs.options) if kind != skipped or not skipped)
    body = _attr(1, theirs.kind.encode() + b"\0") + _attr(2, options)
    info = theirs.priority << 16 | theirs.protocol
    return _raw(NEWTFILTER, CREATE | REQUEST | ACK, TC.pack(0, index, 0, EGRESS, info) + body)


def new_ifb(name: str) -> bytes:
    """One queue: with more, packets of one NIC could overtake each other."""
    message = ifinfmsg()
    message["attrs"] = [
        ("IFLA_IFNAME", name), ("IFLA_NUM_TX_QUEUES", 1), ("IFLA_NUM_RX_QUEUES", 1),
        ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "ifb")]}),
    ]  # fmt: skip
    return _encode(message, NEWLINK, CREATE | EXCL)


def change_link(index: int, *, up: bool, alias: str) -> bytes:
    message = ifinfmsg()
    message["index"], message["flags"], message["change"] = index, int(up), IFF_UP
    message["attrs"] = [("IFLA_IFALIAS", alias)]
    return _encode(message, NEWLINK, 0)


def delete_link(index: int) -> bytes:
    message = ifinfmsg()
    message["index"] = index
    return _encode(message, DELLINK, 0)


def ask_queues(index: int) -> bytes:
    """A dump of this interface's qdiscs (older kernels: of all)."""
    return _raw(GETQDISC, REQUEST | DUMP, TC.pack(0, index, 0, 0, 0))


def ask_filters(index: int, parent: int) -> bytes:
    return _raw(GETTFILTER, REQUEST | DUMP, TC.pack(0, index, 0, parent, 0))


def ask_link(index: int) -> bytes:
    return _raw(GETLINK, REQUEST, LINK.pack(0, 0, index, 0, 0))


def _raw(kind: int, flags: int, body: bytes) -> bytes:
    return HEADER.pack(HEADER.size + len(body), kind, flags, 0, 0) + body


def _attr(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + b"\0" * (-len(data) % 4)


def _swap16(value: int) -> int:
    return (value & 0xFF) << 8 | value >> 8


# ---- reading what the kernel says ----


def messages(datagram: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(type, sequence number, body) of each message of a datagram."""
    at = 0
    while at + HEADER.size <= len(datagram):
        length, kind, _flags, sequence, _pid = HEADER.unpack_from(datagram, at)
        if length < HEADER.size:
            return
        yield kind, sequence, datagram[at + HEADER.size : at + length]
        at += (length + 3) & ~3


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type without its flags, value) of a list of attributes (rtnetlink(7), struct rtattr)."""
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if length < 4:
            return
        yield kind & 0x3FFF, data[at + 4 : at + length]
        at += (length + 3) & ~3


def error_of(body: bytes) -> int:
    """The errno of an acknowledgement, 0 for success (struct nlmsgerr)."""
    (code,) = struct.unpack_from("=i", body)
    return -int(code)


def link(body: bytes) -> Link:
    """A message RTM_NEWLINK (linux/if_link.h: IFLA_MTU, IFLA_LINKINFO, IFLA_IFALIAS, IFLA_STATS64).

    drivers/net/ifb.c counts as received what it takes from its qdisc, as sent what it gives back to the tap's ingress.
    """
    _, _, index, flags, _ = LINK.unpack_from(body)
    mtu, alias_, kind, inside = 0, "", "", 0
    for number, data in attributes(body[LINK.size :]):
        if number == 4:
            (mtu,) = struct.unpack("=I", data)
        elif number == 20:
            alias_ = _text(data)
        elif number == 18:
            kind = _text(dict(attributes(data)).get(1, b""))
        elif number == 23:  # struct rtnl_link_stats64: received, sent, …, (6) dropped at receiving
            counts = struct.unpack_from("=8Q", data)
            inside = counts[0] - counts[6] - counts[1]
    return Link(index, bool(flags & IFF_UP), mtu, alias_, kind, inside)


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")


def queue(body: bytes) -> Queue:
    """A message RTM_NEWQDISC with its TCA_STATS2 (linux/gen_stats.h: struct gnet_stats_queue)."""
    _, index, handle, parent, _ = TC.unpack_from(body)
    kind, waiting, backlog, dropped = "", 0, 0, 0
    for number, data in attributes(body[TC.size :]):
        if number == 1:
            kind = _text(data)
        elif number == 7:
            for stat, value in attributes(data):
                if stat == 3:
                    waiting, backlog, dropped = struct.unpack_from("=III", value)
    return Queue(kind, index, handle, parent, waiting, backlog, dropped)


def filter_(body: bytes) -> Filter:
    """A message RTM_NEWTFILTER."""
    _, _, handle, _, info = TC.unpack_from(body)
    kind, chain, options = "", 0, b""
    for number, data in attributes(body[TC.size :]):
        if number == 1:
            kind = _text(data)
        elif number == 2:
            options = data
        elif number == 11:
            (chain,) = struct.unpack("=I", data)
    return Filter(kind, handle, info & 0xFFFF, info >> 16, chain, options)


def redirects_to(found: Filter) -> int | None:
    """The interface that this filter redirects everything to (matchall, mirred egress redirect), 0 if that is gone; None: it
    does no such thing."""
    if found.kind != "matchall" or found.protocol != _swap16(ETH_P_ALL):
        return None
    for kind, options in _actions(found):
        if kind == "mirred":
            for number, data in attributes(options):
                if number == 2:  # TCA_MIRRED_PARMS: tc_gen, eaction, ifindex
                    eaction, index = struct.unpack_from("=iI", data, 20)
                    return int(index) if eaction == 1 else None
    return None


def _actions(found: Filter) -> Iterator[tuple[str, bytes]]:
    """(kind, options) of each action of a filter."""
    for number, data in attributes(found.options):
        if (found.kind, number) in _POLICE:
            yield "police", data
        elif number in _ACTS.get(found.kind, ()):
            for _priority, action in attributes(data):
                parts = dict(attributes(action))
                yield _text(parts.get(1, b"")), parts.get(2, b"")


def copies(theirs: list[Filter], tap: str) -> list[Filter]:
    """Which of the tap's ingress filters are to be copied before the plug, in their order.

    A filter behind ours never sees a packet, and one before ours would let packets pass: so ours comes first, and theirs act
    where the packets enter the IFB. Raises: Refused ("foreign-filter") for one that can't be moved or would pass packets by
    the buffer.
    """
    found = []
    for theirs_ in theirs:
        if not theirs_.options:
            continue  # the head of a priority, not a filter
        kinds = [kind for kind, _ in _actions(theirs_)]
        why = ""
        if theirs_.kind not in _FLAGS:
            why = f"mcft can't copy a filter of type '{theirs_.kind}'"
        elif theirs_.chain:
            why = "it uses chains"
        elif theirs_.priority <= OUR_PRIORITY:
            why = "nothing can be put before its priority"
        elif bad := next((kind for kind in kinds if kind not in _HARMLESS_ACTIONS), ""):
            why = f"its action '{bad}' would take packets past the buffer"
        if why:
            raise Refused(
                "foreign-filter",
                f"{tap} has an ingress filter that is not mcft's ({theirs_.kind}, priority {theirs_.priority})",
                why,
                f"look at: tc filter show dev {tap} ingress; remove it, or use --netbuffer filter",
            )
        if theirs_.kind == "u32" and any(number == 4 for number, _ in attributes(theirs_.options)):
            continue  # the hash table that the kernel makes by itself
        found.append(theirs_)
    return found
