"""Which RDMA device, port and GID belong to an address of this host, read from sysfs (no verbs library is needed for that).

RoCE and rxe: the port's table has a GID made of each address of its network interface. InfiniBand: the address is that of
an IPoIB interface of the device, and the port's first GID serves.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path

from mcft.errors import Refused

SYSFS = Path("/sys")
ACTIVE = "4: ACTIVE"
ANY = ("0.0.0.0", "::")
INSTALL = "install python3-pyverbs (apt) or rdma-core's Python bindings (dnf: python3-pyverbs)"


@dataclass(frozen=True, slots=True)
class Port:
    """One port of a device, and the GID that stands for the address. lid: 0 on Ethernet."""

    device: str
    port: int
    gid_index: int
    gid: str
    lid: int = 0


def verbs_installed() -> bool:
    """Whether the gate's Python could import pyverbs. Nothing is imported."""
    return importlib.util.find_spec("pyverbs") is not None


def local_address(local: str, peer: str) -> str:
    """The address that this host speaks from to the peer: its own if it is named, else by the route. Raises: OSError."""
    if local not in ANY:
        return local
    with socket.socket(socket.AF_INET6 if ":" in peer else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((peer, 9))
        return str(sock.getsockname()[0])


def devices(sysfs: Path = SYSFS) -> list[str]:
    """All RDMA devices of this host (of this network namespace, where the kernel tells them apart)."""
    folder = sysfs / "class/infiniband"
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def node(device: str, sysfs: Path = SYSFS) -> Path | None:
    """What user programs open of a device; None if it has none (ib_uverbs is not loaded). It goes first when a device does."""
    for entry in sorted((sysfs / "class/infiniband_verbs").glob("uverbs*")):
        if _read(entry / "ibdev") == device:
            return entry
    return None


def find(address: str, device: str = "auto", sysfs: Path = SYSFS) -> Port:
    """The active port with this address; device: "auto" for any, else this one alone.

    Raises: Refused ("no-rdma-device", "rdma-no-address", "rdma-down").
    """
    known = devices(sysfs)
    if device != "auto" and device not in known:
        there = f"RDMA devices here: {', '.join(known)}" if known else "this host has no RDMA device"
        raise Refused("no-rdma-device", f"there is no RDMA device '{device}'", there, "`rdma link` lists them")
    if not known:
        raise Refused("no-rdma-device", "this host has no RDMA device", "", "`rdma link` would list them")
    candidates = [device] if device != "auto" else known
    down = []
    for name in candidates:
        for folder in sorted((sysfs / "class/infiniband" / name / "ports").iterdir(), key=lambda path: int(path.name)):
            found = _gid(sysfs, name, folder, address)
            if found is None:
                continue
            if _read(folder / "state") == ACTIVE:
                return found
            down.append(f"{name} port {folder.name} is {_read(folder / 'state').partition(': ')[2] or 'gone'}")
    if down:
        raise Refused("rdma-down", f"the RDMA device with the address {address} is down", ", ".join(down), "set its link up")
    raise Refused(
        "rdma-no-address", f"{'RDMA device ' + device if device != 'auto' else 'no RDMA device here'} has"
        f"{' not' if device != 'auto' else ''} the address {address}", "its port and GID are chosen by the peer link's address",
        "give its network interface that address, or name the device on that link",
    )  # fmt: skip


def _gid(sysfs: Path, device: str, port: Path, address: str) -> Port | None:
    if _read(port / "link_layer") == "InfiniBand":
        if _interface_of(sysfs, device, int(port.name), address):
            return Port(device, int(port.name), 0, _read(port / "gids/0"), int(_read(port / "lid") or "0", 16))
        return None
    wanted = ipaddress.ip_address(address)
    wanted = wanted if wanted.version == 6 else ipaddress.IPv6Address(f"::ffff:{wanted}")
    best: Port | None = None
    for entry in sorted((port / "gids").iterdir(), key=lambda path: int(path.name)):
        gid = _read(entry)
        if gid and ipaddress.ip_address(gid) == wanted:
            here = Port(device, int(port.name), int(entry.name), gid)
            if _read(port / "gid_attrs/types" / entry.name) == "RoCE v2":
                return here
            best = best or here
    return best


def _interface_of(sysfs: Path, device: str, port: int, address: str) -> bool:
    """Whether an IPoIB interface of this port has the address."""
    from pyroute2 import IPRoute  # takes 0.3 s to import, and only InfiniBand needs it

    folder = sysfs / "class/infiniband" / device / "device/net"
    with IPRoute() as route:
        for row in route.get_addr(address=address):
            (link,) = route.get_links(row["index"])
            name = str(link.get_attr("IFLA_IFNAME"))
            if (folder / name).exists() and int(_read(folder / name / "dev_port") or "0") + 1 == port:
                return True
    return False


def _read(path: Path) -> str:
    """Empty where the kernel has nothing to say (an unset GID's type is an error)."""
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
