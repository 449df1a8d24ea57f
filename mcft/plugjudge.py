"""PURE: what a change of the plug buffer's pieces by somebody else means. Fed with the kernel's notifications.

Whoever deletes a qdisc or a filter of the buffer lets packets pass, and an IFB that was down and up again releases too much:
the kernel tells, and from then on nothing may be released. Sources: rtnetlink(7); Linux net/sched/sch_plug.c.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from mcft.plugwire import (
    CLSACT,
    DELCHAIN,
    DELLINK,
    DELQDISC,
    DELTFILTER,
    EGRESS,
    IFF_UP,
    INGRESS_HANDLE,
    LINK,
    NEWLINK,
    NEWQDISC,
    NEWTFILTER,
    OUR_PRIORITY,
    TC,
    Line,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class News:
    """A notification. parent, handle and priority are 0 for links; flags are 0 for the others."""

    kind: int
    index: int
    handle: int = 0
    parent: int = 0
    priority: int = 0
    flags: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """tampered: nothing may be released any more; otherwise it is only worth a word.

    by_its_end: the end of QEMU does the same.
    """

    tampered: bool
    what: str
    by_its_end: bool = False


def news(kind: int, body: bytes) -> News | None:
    """A notification as News, None for kinds that don't matter here."""
    if kind in (NEWLINK, DELLINK):
        _, _, index, flags, _ = LINK.unpack_from(body)
        return News(kind, index, flags=flags)
    if kind in (NEWQDISC, DELQDISC, NEWTFILTER, DELTFILTER, DELCHAIN):
        _, index, handle, parent, info = TC.unpack_from(body)
        return News(kind, index, handle, parent, info >> 16)
    return None


def judge(lines: list[Line], heard: News, *, taps_up: bool) -> Verdict | None:
    """What a notification that is not of our own doing means. taps_up: whether we want the taps to be up."""
    for line in lines:
        if heard.index == line.ifb_index:
            return _judge_ifb(line, heard)
        if heard.index == line.tap_index:
            return _judge_tap(line, heard, taps_up)
    return None


def _judge_ifb(line: Line, heard: News) -> Verdict | None:
    if heard.kind == DELLINK:
        return Verdict(True, f"{line.ifb} was deleted")
    if heard.kind == NEWLINK:
        if heard.flags & IFF_UP:
            return None
        return Verdict(True, f"{line.ifb} was set down: what it held is lost, and its counts are wrong from now on")
    if heard.kind in (NEWQDISC, DELQDISC):
        word = "deleted" if heard.kind == DELQDISC else "changed"
        return Verdict(True, f"a qdisc of {line.ifb} was {word}")
    return Verdict(True, f"a filter of {line.ifb} was changed")


def _judge_tap(line: Line, heard: News, taps_up: bool) -> Verdict | None:
    if heard.kind == DELLINK:
        return Verdict(True, f"{line.tap} is gone", by_its_end=True)
    if heard.kind == NEWLINK:
        if not taps_up or heard.flags & IFF_UP:
            return None
        return Verdict(True, f"{line.tap} was set down", by_its_end=True)
    if heard.kind == NEWQDISC:
        return None  # shaping towards the guest, or a second ingress, which the kernel refuses
    if heard.kind == DELQDISC:
        if heard.parent != CLSACT and heard.handle != INGRESS_HANDLE:
            return None
        what = f"the ingress qdisc of {line.tap} was deleted, with the filter that sends packets to {line.ifb}"
        return Verdict(True, what, by_its_end=True)
    if heard.parent >> 16 != 0xFFFF or heard.parent == EGRESS:
        return None  # a class's (libvirt's limit towards the guest), or what is sent to the guest
    if heard.kind == DELCHAIN or heard.priority <= OUR_PRIORITY:
        word = "changed" if heard.kind == NEWTFILTER else "deleted"
        what = f"the filter that sends what {line.tap} receives to {line.ifb} was {word}"
        return Verdict(True, what, by_its_end=heard.kind != NEWTFILTER)
    word = "new" if heard.kind == NEWTFILTER else "deleted"
    return Verdict(False, f"a {word} ingress filter of {line.tap} has no effect while the domain is protected")


def socket_filter(own_port: int, indexes: list[int]) -> bytes:
    """A classic BPF program for the notifications' socket: only of these interfaces, and not what `own_port` caused.

    All messages that matter have the interface's index 4 bytes into their body (struct ifinfomsg, struct tcmsg).
    """

    def word(value: int) -> int:  # BPF loads in network order
        return int.from_bytes(value.to_bytes(4, "little"), "big")

    count = len(indexes)
    program = [(0x20, 0, 0, 12), (0x15, count + 1, 0, word(own_port)), (0x20, 0, 0, 20)]
    program += [(0x15, count - number, 0, word(index)) for number, index in enumerate(indexes)]
    program += [(0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
