"""The lease at the tap of QEMU's filters, on a real kernel, in a network namespace of its own.

Frames that come after its end go no further, by nobody's act.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "kernel"))
from frames import Wire
from world import until

from mcft.gate.loop import boottime_ms
from mcft.gate.taplease import TapLease


@pytest.fixture
def two() -> Iterator[Wire]:
    """A guest with two taps."""
    with Wire(taps=("vnet0", "vnet1")) as made:
        yield made


@pytest.fixture
def lease(two: Wire) -> Iterator[TapLease]:
    two.kinds = (0x0806, 0x88B5)  # (what bridges and firewalls of any kernel pass on)
    made = TapLease()
    yield made
    made.lift()


def test_frames_pass_within_it_and_not_after(two: Wire, lease: TapLease) -> None:
    """Both NICs. Fails if the end is not looked at for each frame, or if only a process's act would stop them."""
    lease.guard(["vnet0", "vnet1"])
    assert lease.stands
    sent = two.send(1, 6) + two.send(1, 6, tap="vnet1")
    assert sorted(two.comes(12)) == sorted(sent)
    end_ms = boottime_ms() + 2000.0
    lease.until(end_ms)
    sent = two.send(2, 6)
    assert boottime_ms() < end_ms, "this machine stood still"
    assert two.comes(6) == sent
    until(lambda: boottime_ms() > end_ms, 5, "the lease is over")
    two.send(3, 6), two.send(3, 6, tap="vnet1")
    lease.until(boottime_ms() + 60_000)
    sent = two.send(4, 6)
    assert two.comes(6) == sent, "what came after the end is gone for good, and a new lease lets out again"


def test_it_ends_at_once(two: Wire, lease: TapLease) -> None:
    """As when the standby claims. Fails if -inf, or a time before boot, is taken for a far future."""
    lease.until(float("-inf"))
    lease.guard(["vnet0", "vnet1"])
    two.send(1, 6)
    lease.until(float("inf"))
    sent = two.send(2, 6)
    assert two.comes(6) == sent


def test_nothing_of_it_is_left(two: Wire, lease: TapLease) -> None:
    """Fails if a gate that ends, or is killed, leaves its guest silent: its descriptors are all there is."""
    lease.until(float("-inf"))
    lease.guard(["vnet0", "vnet1"])
    lease.guard(["vnet0", "vnet1"])
    lease.lift()
    assert not lease.stands
    sent = two.send(1, 6)
    assert two.comes(6) == sent


def test_an_interface_that_is_not_there(two: Wire, lease: TapLease) -> None:
    """All of them or none. Fails if the first stays guarded where the second could not be."""
    lease.until(float("-inf"))
    with pytest.raises(OSError):
        lease.guard(["vnet0", "vnet9"])
    assert not lease.stands
    sent = two.send(1, 6)
    assert two.comes(6) == sent
