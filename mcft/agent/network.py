"""The host's network as mcft changes it: silenced taps of a standby, `quickack` on the replication route. By pyroute2.

A standby's tap is silenced twice: set down, and with a drop filter at its ingress (everything that the guest sends).
`quickack` on the route to the peer halves the pause of a checkpoint (delayed acknowledgements of TCP).
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from mcft import bpf
from mcft.errors import Failed

T = TypeVar("T")
INGRESS_PARENT = 0xFFFF0000
ETH_P_ALL = 3


async def _in_thread(work: Callable[[Any], T]) -> T:
    def opened() -> T:
        with IPRoute() as ip:
            return work(ip)

    try:
        return await asyncio.to_thread(opened)
    except NetlinkError as error:
        raise Failed("netlink", f"the kernel refused a change of the network: {error}") from None


async def silence(ifname: str) -> None:
    """Set the tap down and drop whatever comes from the guest. Raises: Failed ("netlink"). Idempotent."""

    def work(ip: Any) -> None:
        index = _index(ifname)
        ip.link("set", index=index, state="down")
        try:
            ip.tc("add", "ingress", index)
        except NetlinkError as error:
            if error.code != errno.EEXIST:
                raise
            return
        program = _load_drop_program()
        try:
            ip.tc(
                "add-filter", "bpf", index, fd=program, name="mcft-silent", parent=INGRESS_PARENT, prio=1,
                protocol=ETH_P_ALL, direct_action=True,
            )  # fmt: skip
        finally:
            os.close(program)
        if ip.get_links(index)[0]["state"] != "down":
            raise Failed("netlink", f"{ifname} could not be silenced", "it is still up after it was set down")

    await _in_thread(work)


def _load_drop_program() -> int:
    """A descriptor of the BPF program `return TC_ACT_SHOT`: every kernel has cls_bpf, few all of act_*.

    Raises: Failed ("netlink").
    """
    try:
        return bpf.load(bpf.returning(bpf.DROP))
    except OSError as error:
        raise Failed("netlink", f"the kernel did not take the drop filter: {error.strerror or error}") from None


def _index(ifname: str) -> int:
    try:
        return socket.if_nametoindex(ifname)
    except OSError:
        raise Failed("netlink", f"there is no interface {ifname} on this host") from None


def _route_to(ip: Any, address: str) -> Any:
    """The connected route by which the peer's address is reached, as the kernel's table has it; None if none."""
    index = ip.route("get", dst=address)[0].get_attr("RTA_OIF")
    packed = int.from_bytes(socket.inet_aton(address), "big")
    best = None
    for route in ip.get_routes(family=socket.AF_INET, oif=index, table=254):
        destination = route.get_attr("RTA_DST")
        if destination is None:
            continue
        shift = 32 - route["dst_len"]
        if int.from_bytes(socket.inet_aton(destination), "big") >> shift == packed >> shift:
            best = route if best is None or route["dst_len"] > best["dst_len"] else best
    return best


def _metrics_of(route: Any) -> dict[str, int]:
    """{"quickack": 1, "mtu": 9000, …} of a route, as `IPRoute.route` takes them."""
    metrics = route.get_attr("RTA_METRICS")
    attributes = metrics["attrs"] if metrics is not None else []
    return {name.removeprefix("RTAX_").lower(): value for name, value in attributes if isinstance(value, int)}


async def set_quickack(address: str, on: bool) -> bool:
    """Set or clear `quickack` on the route to this address; whether it was changed. IPv4 only, others: False."""
    if ":" in address:
        return False

    def work(ip: Any) -> bool:
        route = _route_to(ip, address)
        metrics = {} if route is None else _metrics_of(route)
        if route is None or bool(metrics.pop("quickack", 0)) == on:
            return False
        fields = {
            "dst": f"{route.get_attr('RTA_DST')}/{route['dst_len']}",
            "oif": route.get_attr("RTA_OIF"),
            "proto": route["proto"],
            "scope": route["scope"],
            "table": 254,
            "type": route["type"],
        }
        for attribute, name in (("RTA_GATEWAY", "gateway"), ("RTA_PREFSRC", "prefsrc"), ("RTA_PRIORITY", "priority")):
            if route.get_attr(attribute) is not None:
                fields[name] = route.get_attr(attribute)
        if on:
            metrics["quickack"] = 1
        if metrics:
            fields["metrics"] = metrics
        ip.route("replace", **fields)
        return True

    return await _in_thread(work)
