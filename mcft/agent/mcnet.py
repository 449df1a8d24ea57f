"""That QEMU's own network buffering (`--netbuffer qemu`, behind `--experimental`): what it must find, prepared and checked.

It takes the domain's first NIC; its device is `ifb` + everything from the first digit of the tap's name, and QEMU puts the `plug`
on it itself. A tap without a digit aborts it, a missing ifb or right ends it, a kernel without sch_plug lets both sides run: so
all of it is looked at before QEMU is told. Nobody could try it on a kernel that has plug. And that QEMU goes on unbuffered by
itself once its standby is gone: only a fenced host can't hurt then, so the arbiter must be `fence`.
"""

from __future__ import annotations

import asyncio
import errno
import re
import socket
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from mcft import netbuffer, plugkernel
from mcft.errors import Failed, Refused
from mcft.plugwire import ETH_P_ALL, INGRESS_HANDLE

CAP_NET_ADMIN = 12  # linux/capability.h
LIBNL_MODULES = tuple(f"usr/{lib}/libnl*/cli/qdisc/plug.so" for lib in ("lib", "lib64", "lib/*", "local/lib"))
UNSAFE = "QEMU's own buffer (--netbuffer qemu) lets everything out once its standby is gone"


def ifb_name(tap: str) -> str:
    """As that QEMU forms it. Raises: Refused ("ifb-name") where it would abort or find another domain's."""
    match = re.search(r"[0-9].*", tap)
    if match is None:
        raise Refused("ifb-name", f"the tap {tap} has no digit in its name", "that QEMU aborts on it", "<target dev='vnet0'/>")
    name = f"ifb{match[0]}"
    if len(name) > 15:
        raise Refused("ifb-name", f"the device {name} for tap {tap} has too long a name", "", "<target dev='vnet0'/>")
    return name


async def refuse(nics: list[netbuffer.Nic], arbiter: str, qemu_pid: int) -> None:
    """Raises: Refused for what that QEMU can't buffer here."""
    if arbiter != "fence":
        raise Refused(
            "mc-needs-fence", "netbuffer qemu needs the arbiter fence", "that QEMU goes on unbuffered when its standby is gone",
            "use mcft's own (--netbuffer plug), or configure [arbiter] kind = \"fence\"",
        )  # fmt: skip
    if len(nics) != 1:
        raise Refused("mc-one-nic", f"netbuffer qemu holds one NIC, and the domain has {len(nics)}", "", "use --netbuffer plug")
    ifb_name(nics[0].target)
    if not netbuffer.kernel_has_plug():
        why = "this kernel has no sch_plug or no ifb"
        raise Refused("no-plug", "netbuffer qemu is not possible here", why, "load its modules")
    if why := await asyncio.to_thread(plugkernel.trial):
        raise Refused("no-plug", "netbuffer qemu is not possible here", why, "load its modules")
    if why := await asyncio.to_thread(why_not_by_itself, qemu_pid):
        raise Refused("no-right", "netbuffer qemu would end this QEMU", why, "use mcft's own (--netbuffer plug)")


def why_not_by_itself(qemu_pid: int, root: str = "/") -> str:
    """What that QEMU lacks to drive a plug (it exits, and the guest with it); empty if nothing does.

    The right: CapEff of proc(5). libnl finds each qdisc's module by its name (`lib/netlink/cli/utils.c`).
    """
    try:
        status = Path(root, "proc", str(qemu_pid), "status").read_text(encoding="ascii")
    except OSError as error:
        return f"its rights can't be read: {error.strerror}"
    rights = next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:")), 0)
    if not rights >> CAP_NET_ADMIN & 1:
        return "it has no CAP_NET_ADMIN: libvirt starts QEMU without it"
    if not any(found for place in LIBNL_MODULES for found in Path(root).glob(place)):
        return "libnl's module for plug (cli/qdisc/plug.so) is not installed"
    return ""


async def prepare(tap: str) -> None:
    """ifb up, ingress on the tap, everything from it redirected there; read back. Raises: Failed ("netlink")."""
    name = ifb_name(tap)

    def work() -> None:
        with IPRoute() as ip:
            _prepare(ip, tap, name)

    try:
        await asyncio.to_thread(work)
    except (NetlinkError, OSError) as error:
        raise Failed("netlink", f"{name} can't be prepared for {tap}: {error}") from None


def _prepare(ip: Any, tap: str, name: str) -> None:
    if not ip.link_lookup(ifname=name):
        ip.link("add", ifname=name, kind="ifb")
    ifb, source = socket.if_nametoindex(name), socket.if_nametoindex(tap)
    ip.link("set", index=ifb, state="up")
    try:
        ip.tc("add", "ingress", source)
    except NetlinkError as error:
        if error.code != errno.EEXIST:
            raise
    action = {"kind": "mirred", "direction": "egress", "action": "redirect", "ifindex": ifb}
    ip.tc(
        "add-filter", "u32", source, parent=INGRESS_HANDLE, prio=1, protocol=ETH_P_ALL, keys=["0x0/0x0+0"], action=[action],
        target=0,
    )  # fmt: skip
    if ip.get_links(ifb)[0]["state"] != "up" or not ip.get_filters(index=source, parent=INGRESS_HANDLE):
        raise Failed("netlink", f"{name} is not what that QEMU needs", "it is down, or the tap is not redirected to it")


async def remove(tap: str) -> None:
    """The redirect and the ifb; what is not there is fine."""

    def work() -> None:
        with IPRoute() as ip:
            for index in ip.link_lookup(ifname=tap):
                _ignore(ip.tc, "del", "ingress", index)
            for index in ip.link_lookup(ifname=ifb_name(tap)):
                _ignore(ip.link, "del", index=index)

    await asyncio.to_thread(work)


def _ignore(work: Any, *arguments: Any, **named: Any) -> None:
    try:
        work(*arguments, **named)
    except NetlinkError:
        return
