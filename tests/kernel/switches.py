"""What a guest's tap may hang on beside a bridge: Open vSwitch's datapath (linux/openvswitch.h), the host's own routes."""

from __future__ import annotations

import struct
from socket import if_nametoindex, inet_aton

from frames import SOURCE, sh
from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST, genlmsg
from pyroute2.netlink.generic import GenericNetlinkSocket

NEW = 1
NETDEV = 1  # OVS_VPORT_TYPE_NETDEV
IN_PORT, ETHERNET, OUTPUT = 3, 4, 1  # OVS_KEY_ATTR_…, OVS_ACTION_ATTR_OUTPUT


class _Ovs(genlmsg):
    fields = (*genlmsg.fields, ("dp_ifindex", "i"))


class _Datapath(_Ovs):
    nla_map = (("OVS_DP_ATTR_UNSPEC", "none"), ("OVS_DP_ATTR_NAME", "asciiz"), ("OVS_DP_ATTR_UPCALL_PID", "uint32"))


class _Vport(_Ovs):
    nla_map = (
        ("OVS_VPORT_ATTR_UNSPEC", "none"), ("OVS_VPORT_ATTR_PORT_NO", "uint32"), ("OVS_VPORT_ATTR_TYPE", "uint32"),
        ("OVS_VPORT_ATTR_NAME", "asciiz"), ("OVS_VPORT_ATTR_OPTIONS", "none"), ("OVS_VPORT_ATTR_UPCALL_PID", "uint32"),
    )  # fmt: skip


class _Flow(_Ovs):
    nla_map = tuple(
        (f"OVS_FLOW_ATTR_{name}", "cdata") for name in ("UNSPEC", "KEY", "ACTIONS", "STATS", "TCP_FLAGS", "USED", "CLEAR", "MASK")
    )


def _attribute(number: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), number) + value


def _asked(family: str, message: type[_Ovs], dp_ifindex: int, **values: object) -> None:
    prefix = {_Datapath: "OVS_DP_ATTR_", _Vport: "OVS_VPORT_ATTR_", _Flow: "OVS_FLOW_ATTR_"}[message]
    with GenericNetlinkSocket() as socket:
        socket.bind(family, message)
        asked = message()
        asked["cmd"], asked["version"], asked["dp_ifindex"] = NEW, 2 if message is _Datapath else 1, dp_ifindex
        asked["attrs"] = [(prefix + name, value) for name, value in values.items()]
        list(socket.nlm_request(asked, msg_type=socket.prid, msg_flags=NLM_F_REQUEST | NLM_F_ACK))


def on_open_vswitch(tap: str, outside: str) -> None:
    """Both ports leave the bridge for a datapath that passes what has no VLAN tag from one to the other.

    Without the daemon: one flow per direction is all that two ports need.
    """
    sh(f"ip link set {tap} nomaster; ip link set {outside} nomaster")
    _asked("ovs_datapath", _Datapath, 0, NAME="ovs0", UPCALL_PID=0)
    index = if_nametoindex("ovs0")
    for number, name in ((1, tap), (2, outside)):
        _asked("ovs_vport", _Vport, index, PORT_NO=number, TYPE=NETDEV, NAME=name, UPCALL_PID=0)
    for come, go in ((1, 2), (2, 1)):
        key = _attribute(IN_PORT, struct.pack("=I", come)) + _attribute(ETHERNET, bytes(12))
        mask = _attribute(IN_PORT, b"\xff" * 4) + _attribute(ETHERNET, bytes(12))
        _asked("ovs_flow", _Flow, index, KEY=key, MASK=mask, ACTIONS=_attribute(OUTPUT, struct.pack("=I", go)))


def routed(tap: str, address: str) -> bytes:
    """The tap leaves the bridge and is the guest's way into the host's own IP stack; its MAC address."""
    mac = "02:00:00:00:00:fe"
    sh(f"ip link set {tap} nomaster address {mac}; ip addr add {address}/24 dev {tap}")
    return bytes.fromhex(mac.replace(":", ""))


def datagram(to_mac: bytes, guest: str, address: str, port: int, said: bytes) -> bytes:
    """A guest's frame: UDP without a checksum, which IPv4 allows."""
    udp = struct.pack("!HHHH", port, port, 8 + len(said), 0) + said
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, inet_aton(guest), inet_aton(address))
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    head = head[:10] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + head[12:]
    return to_mac + SOURCE + b"\x08\0" + head + udp
