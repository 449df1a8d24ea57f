"""Two rxe devices on a veth pair in one namespace (6.12 makes them in the initial one only), their traffic on that wire."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


def sh(script: str) -> str:
    """A script that must succeed; its output."""
    done = subprocess.run(["sh", "-euc", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{script}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class End:
    device: str
    netdev: str
    address: str


A = End("rxa", "va", "10.7.0.1")
B = End("rxb", "vb", "10.7.0.2")

# The local table serves only what came in from a wire, so that what one end sends to the other goes out to the wire.
WIRE = """
ip link add va type veth peer name vb
ip addr add 10.7.0.1/24 dev va; ip addr add 10.7.0.2/24 dev vb
ip link set va up; ip link set vb up
for d in va vb all; do
    for v in accept_local=1 rp_filter=0 arp_ignore=1 arp_announce=2; do echo ${v#*=} > /proc/sys/net/ipv4/conf/$d/${v%=*}; done
done
ip rule add pref 10 iif va lookup local; ip rule add pref 10 iif vb lookup local
ip rule add pref 20 to 10.7.0.2 lookup 101; ip rule add pref 20 to 10.7.0.1 lookup 102
ip rule add pref 100 lookup local; ip rule del pref 0
# Without its wire a packet would find the other end by the local table.
ip route add unreachable 10.7.0.2 table 101 metric 9999; ip route add unreachable 10.7.0.1 table 102 metric 9999
"""
# Routes and neighbours go with their link.
ROUTES = """
ip route replace 10.7.0.2 dev va src 10.7.0.1 table 101; ip route replace 10.7.0.1 dev vb src 10.7.0.2 table 102
ip neigh replace 10.7.0.2 dev va lladdr $(cat /sys/class/net/vb/address) nud permanent
ip neigh replace 10.7.0.1 dev vb lladdr $(cat /sys/class/net/va/address) nud permanent
"""


class Fabric:
    """Made once per VM; `mend` undoes whatever a test did to it."""

    def __init__(self) -> None:
        if not Path("/sys/class/net/va").exists():  # a second run in one VM
            sh(WIRE)
        self._touched = True
        self.mend()

    def mend(self) -> None:
        """Each program takes half a second there: nothing is run for what nobody touched."""
        if not self._touched:
            return
        sh("".join(f"tc qdisc del dev {end.netdev} root 2> /dev/null || :; ip link set {end.netdev} up\n" for end in (A, B)))
        for end in (A, B):
            if not Path("/sys/class/infiniband", end.device).exists():
                sh(f"rdma link add {end.device} type rxe netdev {end.netdev}")
        sh(ROUTES)
        self._touched = False

    def remove_device(self, end: End) -> None:
        self._touched = True
        sh(f"rdma link del {end.device}")

    def down(self, end: End) -> None:
        self._touched = True
        sh(f"ip link set {end.netdev} down")

    def loss(self, percent: int) -> None:
        """Of every frame, both ways, RDMA's and UDP's alike."""
        self._touched = True
        for end in (A, B):
            sh(f"tc qdisc replace dev {end.netdev} root netem loss {percent}%")
