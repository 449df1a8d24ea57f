"""How drives are put under mcft's nodes: against a FAKE QEMU of one disk."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mcft import diskreplica
from mcft.agent.setup import Setup
from mcft.diskreplica import Disk
from mcft.errors import Failed

DISK = Disk("vda", "/machine/peripheral/virtio-disk0/virtio-backend", "libvirt-1-format", 1 << 20, "/d", "raw", False)


class Qemu:
    """Runs, stops, knows what each drive uses. resumed_at: a word of its commands after which somebody types `cont`."""

    def __init__(self, resumed_at: str = "") -> None:
        self.state, self.drive, self.resumed_at = "running", DISK.node, resumed_at
        self.nodes: dict[str, dict[str, str]] = {DISK.node: {}}
        self.ran_on: list[str] = []

    async def status(self) -> str:
        return self.state

    async def attempt(self, command: str, **arguments: Any) -> Any:
        return await self.execute(command, **arguments)

    async def execute(self, command: str, **arguments: Any) -> Any:
        a = {name.replace("_", "-"): value for name, value in arguments.items()}
        if command in ("stop", "cont"):
            self.state = "paused" if command == "stop" else "running"
        elif command == "qom-set":
            self.drive = a["value"]
        elif command == "blockdev-add":
            self.nodes[a["node-name"]] = {"children.0": DISK.node} if a["driver"] == "quorum" else {}
        elif command == "blockdev-del":
            self.nodes.pop(a["node-name"])
        elif command == "query-block":
            return [{"qdev": DISK.qom, "inserted": {"node-name": self.drive}}]
        elif command == "query-named-block-nodes":
            return [{"node-name": name, "drv": "x", "children": []} for name in self.nodes]
        if self.resumed_at and command == self.resumed_at and self.state == "paused":
            self.state, self.resumed_at = "running", ""
        if self.state == "running":
            self.ran_on.append(self.drive)
        return {}


async def test_a_guest_that_stood_still_goes_on_under_the_quorum() -> None:
    qemu = Qemu()
    await diskreplica.interpose(qemu, [DISK])  # type: ignore[arg-type]
    assert qemu.state == "running" and qemu.drive == diskreplica.quorum("vda")
    assert "mcft-0-vda" not in qemu.ran_on


class Undoing(Setup):
    """An undo whose guest stands still."""

    def __init__(self, qemu: Qemu) -> None:
        self.qmp: Any = qemu
        self.body: Any = SimpleNamespace(disks=[DISK])

    async def _qemu_here(self) -> bool:
        return True


@pytest.mark.parametrize("drive", ["mcft-0-vda", DISK.node])
async def test_a_guest_is_not_resumed_on_a_null_node(drive: str) -> None:
    """Giving the disks back failed half way, and the network's undo comes next. Fails if that one lets the guest go on: what it
    writes then is nowhere."""
    qemu = Qemu()
    qemu.drive, qemu.state = drive, "paused"
    await Undoing(qemu)._resume()
    assert qemu.state == ("running" if drive == DISK.node else "paused")
    assert "mcft-0-vda" not in qemu.ran_on


async def test_a_guest_that_somebody_resumed_on_a_null_node_is_told_of() -> None:
    """Fails if `interpose` does not look at the guest again: what it wrote on the null node is gone, and nobody would know."""
    qemu = Qemu(resumed_at="qom-set")
    with pytest.raises(Failed, match="resumed the guest") as error:
        await diskreplica.interpose(qemu, [DISK])  # type: ignore[arg-type]
    assert "mcft-0-vda" in qemu.ran_on and "file systems" in error.value.next_step
    assert qemu.drive == DISK.node and qemu.state == "running"


async def test_a_paused_guest_that_somebody_resumes_as_it_begins_is_stopped() -> None:
    """Fails if what was paused a moment ago is not stopped: its drives would change under a running guest."""
    qemu = Qemu(resumed_at="blockdev-add")
    qemu.state = "paused"
    await diskreplica.interpose(qemu, [DISK])  # type: ignore[arg-type]
    assert "mcft-0-vda" not in qemu.ran_on and qemu.drive == diskreplica.quorum("vda")
    assert qemu.state == "running"
