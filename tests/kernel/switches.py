"""What a guest's tap may hang on beside a bridge: Open vSwitch's datapath (linux/openvswitch.h), the host's own routes."""

from __future__ import annotations

import os
import struct
from socket import AF_NETLINK, SOCK_RAW, if_nametoindex, inet_aton, socket

from frames import SOURCE, sh

NETLINK_GENERIC, GENL_ID_CTRL, CTRL_CMD_GETFAMILY = 16, 16, 3  # linux/genetlink.h
REQUEST_ACK = 5  # NLM_F_REQUEST | NLM_F_ACK
NEW, NETDEV = 1, 1  # OVS_…_CMD_NEW, OVS_VPORT_TYPE_NETDEV
IN_PORT, ETHERNET, OUTPUT = 3, 4, 1  # OVS_KEY_ATTR_…, OVS_ACTION_ATTR_OUTPUT


def _attribute(number: int, value: bytes) -> bytes:
    return (struct.pack("=HH", 4 + len(value), number) + value).ljust(4 + (len(value) + 3) // 4 * 4, b"\0")


def _u32(number: int, value: int) -> bytes:
    return _attribute(number, struct.pack("=I", value))


def _genetlink(family: int, command: int, version: int, body: bytes) -> bytes:
    """The first message that comes back. Raises: OSError."""
    with socket(AF_NETLINK, SOCK_RAW, NETLINK_GENERIC) as netlink:
        netlink.send(struct.pack("=IHHIIBBH", 20 + len(body), family, REQUEST_ACK, 1, 0, command, version, 0) + body)
        reply = netlink.recv(65536)
    if reply[4:6] == b"\2\0" and (code := struct.unpack_from("=i", reply, 16)[0]):  # NLMSG_ERROR
        raise OSError(-code, os.strerror(-code))
    return reply


def _family(name: str) -> int:
    reply = _genetlink(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, 1, _attribute(2, name.encode() + b"\0"))
    at = 20
    while struct.unpack_from("=H", reply, at + 2)[0] != 1:  # CTRL_ATTR_FAMILY_ID
        at += (struct.unpack_from("=H", reply, at)[0] + 3) // 4 * 4
    return int(struct.unpack_from("=H", reply, at + 4)[0])


def _ovs(family: str, version: int, dp_ifindex: int, *attributes: bytes) -> None:
    _genetlink(_family(family), NEW, version, struct.pack("=i", dp_ifindex) + b"".join(attributes))


def on_open_vswitch(tap: str, outside: str) -> None:
    """Both ports leave the bridge for a datapath that passes what has no VLAN tag from one to the other.

    Without the daemon: one flow per direction is all that two ports need.
    """
    sh(f"ip link set {tap} nomaster; ip link set {outside} nomaster")
    _ovs("ovs_datapath", 2, 0, _attribute(1, b"ovs0\0"), _u32(2, 0))  # NAME, UPCALL_PID
    index = if_nametoindex("ovs0")
    for number, name in ((1, tap), (2, outside)):
        # PORT_NO, TYPE, NAME, UPCALL_PID
        port = (_u32(1, number), _u32(2, NETDEV), _attribute(3, name.encode() + b"\0"), _u32(5, 0))
        _ovs("ovs_vport", 1, index, *port)
    for come, go in ((1, 2), (2, 1)):
        key = _u32(IN_PORT, come) + _attribute(ETHERNET, bytes(12))
        mask = _u32(IN_PORT, 0xFFFFFFFF) + _attribute(ETHERNET, bytes(12))
        _ovs("ovs_flow", 1, index, _attribute(1, key), _attribute(7, mask), _attribute(2, _u32(OUTPUT, go)))  # KEY, MASK, ACTIONS


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
