"""The agent's choice on a kernel that has the plug: tried for real, refused before anything is made."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from frames import Wire, nic, sh

from mcft.agent import buffers
from mcft.errors import Refused
from mcft.gate.state import GateState, paths, save
from mcft.plugbuffer import Limit, PlugBuffer


def test_auto_means_plug_and_looking_changes_nothing(wire: Wire) -> None:
    """With vhost too. Fails if the trial leaves its interface here, or `auto` means the filter."""
    before = sh("ip -o link | cut -d: -f2; tc qdisc")
    assert asyncio.run(buffers.choose("auto", [nic("vnet0")])) == "plug"
    assert asyncio.run(buffers.choose("filter", [])) == "filter"
    assert sh("ip -o link | cut -d: -f2; tc qdisc") == before


def test_without_the_right_to_change_the_network_it_says_so() -> None:
    """Fails if a missing right reads like a missing module: nobody would find it."""
    bare = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable, "-c"]
    code = f"import sys; sys.path = {sys.path!r}; from mcft.plugkernel import trial; print(trial())"
    said = subprocess.run([*bare, code], capture_output=True, text=True)
    assert "CAP_NET_ADMIN" in said.stdout, said


def test_what_stands_in_the_way_is_said_before_anything_is_made(wire: Wire) -> None:
    """Fails if only the gate's attach finds out."""
    with pytest.raises(Refused, match="no interface vnet9"):
        asyncio.run(buffers.choose("plug", [nic("vnet9")]))
    sh("ip link add mcft-vnet0 type bridge")
    with pytest.raises(Refused, match="not mcft's"):
        asyncio.run(buffers.choose("auto", [nic("vnet0")]))
    sh("ip link del mcft-vnet0; tc qdisc add dev vnet0 clsact")
    sh("tc filter add dev vnet0 ingress pref 9 protocol all matchall action mirred egress mirror dev c0")
    with pytest.raises(Refused, match="ingress filter"):
        asyncio.run(buffers.choose("auto", [nic("vnet0")]))


def test_what_a_dead_gate_left_is_let_go_and_taken_away(wire: Wire) -> None:
    """`forget --local`, and the end of a protection. Fails if what is held is dropped, or a piece stays."""
    buffer = PlugBuffer()
    buffer.attach([nic("vnet0")], Limit(1 << 20))
    buffer.hold()
    sent = wire.send(0, 6)
    buffer.shut()
    asyncio.run(buffers.remove_plugs(["vnet0", "vnet9"]))
    sent += wire.send(1, 6)
    assert wire.comes(12) == sent and "mcft" not in sh("ip link; tc qdisc; tc filter show dev vnet0 ingress")
    asyncio.run(buffers.remove_plugs(["vnet0"]))


def test_what_a_dead_guest_has_sent_never_leaves(wire: Wire, tmp_path: Path) -> None:
    """It lost, or was ended: nobody has acknowledged that. (A tap that is not QEMU's own outlives it.)

    Fails if a piece stays, or if what waits is let out, or if a tap is taken from a guest that has that name now.
    """
    buffer = PlugBuffer()
    buffer.attach([nic("vnet0")], Limit(1 << 20))
    buffer.hold()
    wire.send(0, 6)
    buffer.shut()
    other = GateState("u", "vm2", "p", 1, "primary", "k", "", 1, 1, [], nics=[nic("vnet0")], buffer="plug")
    (tmp_path / "gate").mkdir()
    save(paths(str(tmp_path), "u")[0], other)
    asyncio.run(buffers.drop_plugs(["vnet0", "vnet9"], str(tmp_path)))
    assert "mcft-vnet0" in sh("ip link")
    Path(paths(str(tmp_path), "u")[0]).unlink()
    asyncio.run(buffers.drop_plugs(["vnet0", "vnet9"], str(tmp_path)))
    assert "mcft" not in sh("ip link; tc qdisc; tc filter show dev vnet0 ingress")
    sent = wire.send(1, 6)
    assert wire.comes(6) == sent
    asyncio.run(buffers.drop_plugs(["vnet0"], str(tmp_path)))
