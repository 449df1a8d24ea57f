"""Hold and release what a domain's NICs send: the contract, and which way is chosen.

Two ways meet it: the kernel's `plug` qdisc behind an IFB (`plugbuffer.py`, where the kernel has `sch_plug`), and QEMU's
own redirector filter (`filterbuffer.py`) where it has not. `none` buffers nothing and is only taken when asked for by
name: the protection is then marked `unsafe`. `qemu` is engine mc's own (`agent/mcnet.py`): mcft holds nothing then.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from typing import Literal, Protocol

from mcft.errors import Refused

Way = Literal["plug", "filter", "none", "qemu"]
Mode = Literal["pass", "hold", "closed"]


@dataclass(frozen=True, slots=True)
class Nic:
    """One NIC of a domain. target: the tap's name (vnet0); netdev: QEMU's id (hostnet0); model: virtio, e1000…"""

    target: str
    mac: str
    netdev: str
    model: str
    vhost: bool
    kind: str  # the XML's interface type


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits behind the buffer for one NIC now, and what was dropped at its limit so far."""

    target: str
    packets: int
    bytes: int
    dropped: int
    ifb: str = ""  # in which interface it waits, if the kernel holds it


class NetBuffer(Protocol):
    """The contract. All NICs of a domain share one epoch: barrier and release act on all of them.

    `hold` → every packet from now on waits. `barrier` ends the open epoch; at most one may be outstanding.
    `release` lets out all that was sent before the barrier. `open` lets everything out in order, then passes. `close`
    keeps what is held and lets nothing out until `open`, or `reopen`, which holds again. `drop` throws away what is held.
    Implementations are non-blocking.
    """

    mode: Mode

    def hold(self) -> None: ...
    def barrier(self) -> None: ...
    def release(self) -> None: ...
    def open(self) -> None: ...
    def close(self) -> None: ...
    def reopen(self) -> None: ...
    def drop(self) -> None: ...
    def backlog(self) -> list[Backlog]: ...


def kernel_has_plug(modules_root: str = "/lib/modules") -> bool:
    """Whether this kernel has `sch_plug` and `ifb`, built in or as loadable modules."""
    release = platform.release()
    found = {"sch_plug": False, "ifb": False}
    for listing in ("modules.builtin", "modules.dep"):
        try:
            with open(os.path.join(modules_root, release, listing), encoding="utf-8") as lines:
                text = lines.read()
        except OSError:
            continue
        for name in found:
            found[name] = found[name] or f"/{name}.ko" in text
    return all(found.values()) or all(os.path.isdir(f"/sys/module/{name}") for name in found)


def choose(asked: str, nics: list[Nic], *, plug_available: bool, why_no_plug: str = "") -> Way:
    """The way to buffer these NICs. why_no_plug: for people, if the plug is asked for by name and does not work here.

    Raises: Refused ("nic-not-bufferable", "no-plug") where a NIC could not be held: never a silent hole.
    """
    if asked == "none":
        return "none"
    if asked == "plug" and not plug_available:
        why = why_no_plug or "this kernel has no sch_plug"
        raise Refused("no-plug", "netbuffer plug is not possible here", why, "use --netbuffer filter, or load its modules")
    for nic in nics:
        if nic.kind in ("hostdev", "vdpa", "vhostuser", "direct", "user"):
            raise Refused(
                "nic-not-bufferable",
                f"NIC {nic.target or nic.mac} is of type '{nic.kind}' and can't be buffered",
                "its packets don't pass through a tap of this host",
                "move it to a bridge or network, or accept unbuffered output with --netbuffer none",
            )
    if plug_available and asked in ("plug", "auto"):
        return "plug"
    for nic in nics:
        if nic.vhost:
            raise Refused(
                "nic-not-bufferable",
                f"NIC {nic.target} uses vhost-net, which QEMU's filter does not see",
                "its packets pass by QEMU" + ("" if plug_available else " and this kernel has no sch_plug"),
                f"give NIC {nic.mac} <driver name='qemu'/> and restart the domain, or use a kernel with sch_plug",
            )
    return "filter"
