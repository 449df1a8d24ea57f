"""What `--netbuffer qemu` prepares for the micro-checkpointing QEMU, on a kernel that has plug. That QEMU's part is played by
pyroute2: the qdisc that it would put on `ifb0` itself, and its barriers and releases.
"""

from __future__ import annotations

import asyncio

from frames import Wire, sh
from pyroute2 import IPRoute

from mcft.agent import mcnet


def test_what_that_qemu_finds_holds_every_frame_and_is_taken_away_again(wire: Wire) -> None:
    """Fails if the redirect misses a protocol, the ifb is down or has another name, or `remove` leaves a piece."""
    asyncio.run(mcnet.prepare("vnet0"))
    with IPRoute() as ip:
        (ifb,) = ip.link_lookup(ifname="ifb0")
        ip.tc("add", "plug", ifb, handle=0x10000, limit=1 << 20)
        for epoch in range(3):
            sent = wire.send(epoch, 24)
            assert wire.comes(1, patience_s=0.3) == []
            for action in ("TCQ_PLUG_BUFFER", "TCQ_PLUG_RELEASE_ONE"):
                ip.tc("change", "plug", ifb, handle=0x10000, action=action)
            assert wire.comes(24) == sent
    asyncio.run(mcnet.remove("vnet0"))
    sent = wire.send(3, 12)
    assert wire.comes(12) == sent
    assert "ifb0" not in sh("ip link") and "ingress" not in sh("tc qdisc")


def test_prepared_twice_is_prepared(wire: Wire) -> None:
    """An agent that died behind `prepare` does it again. Fails if what is there is an error, or the frames come doubled."""
    for _ in range(2):
        asyncio.run(mcnet.prepare("vnet0"))
    sent = wire.send(0, 12)
    assert wire.comes(12) == sent
    asyncio.run(mcnet.remove("vnet0"))
