"""What the docs tell an operator to type, typed: `docs/network-buffering.md`, for the tap vnet0."""

from __future__ import annotations

import re
import select
import subprocess
import time
from pathlib import Path

from frames import Wire, nic, sh

from mcft.plugbuffer import Limit, PlugBuffer

TEXT = (Path(__file__).parents[2] / "docs" / "network-buffering.md").read_text()


def commands(heading: str) -> list[str]:
    """The lines of the first shell block below a heading, without their comments."""
    found = re.search(rf"^## {heading}.*?^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert found, f"no shell block below '{heading}'"
    return [line.split("  #")[0].strip() for line in found[1].splitlines()]


def held(wire: Wire) -> PlugBuffer:
    buffer = PlugBuffer()
    buffer.attach([nic("vnet0")], Limit(16 << 20))
    buffer.hold()
    return buffer


def test_looking_at_it(wire: Wire) -> None:
    """Fails if a command of the docs is wrong, or shows not what they say."""
    buffer = held(wire)
    wire.send(0, 7)
    *looks, monitor = commands("Looking at it")
    seen = [sh(command) for command in looks]
    assert any("plug" in s and re.search(r"backlog \d+b 7p", s) for s in seen), seen
    assert any("Redirect to device mcft-vnet0" in s for s in seen) and any("holds what vnet0 sends" in s for s in seen)
    with subprocess.Popen(monitor.split(), stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        end = time.monotonic() + 30
        while not select.select([watching.stdout], [], [], 0.05)[0] and time.monotonic() < end:
            buffer.barrier()
            buffer.release()
        watching.kill()
        assert "qdisc plug" in watching.stdout.read()
    buffer.detach()


def test_by_hand_if_everything_of_mcft_is_gone(wire: Wire) -> None:
    """With the gate dead and its tap down, as a closed gate leaves it.

    Fails if a command of the docs is wrong, loses what was held, or leaves a piece of mcft's behind.
    """
    buffer = held(wire)
    sent = wire.send(0, 60)
    buffer.close()
    sh("ip link set vnet0 down")
    buffer.shut()
    for command in commands("By hand"):
        sh(command)
    assert wire.comes(60) == sent
    sent = wire.send(1, 12)
    assert wire.comes(12) == sent
    assert "mcft" not in sh("ip link; tc qdisc") and "clsact" not in sh("tc qdisc")
