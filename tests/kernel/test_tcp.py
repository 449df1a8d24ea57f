"""Real streams through the plug: unprotecting while they flow loses and reorders nothing."""

from __future__ import annotations

import time
from functools import partial
from itertools import pairwise

from frames import nic, sh
from streams import Stream, epochs

from mcft.plugbuffer import Limit, PlugBuffer

RUN_S = 2.5


def holding() -> PlugBuffer:
    buffer = PlugBuffer()
    buffer.attach([nic("vnet0")], Limit(64 << 20))
    buffer.hold()
    return buffer


def checkpoint(buffer: PlugBuffer) -> None:
    buffer.barrier()
    time.sleep(0.01)
    buffer.release()


def test_numbered_datagrams_do_not_notice_unprotect() -> None:
    """Protected and unprotected many times while they flow: not one is lost, doubled, or overtaken.

    Fails if `detach` does not wait for what has left the plug (5860 of 35800 were gone with the IFB), or if the filter goes
    before that.
    """
    with Stream("udp", 8.0) as stream:
        stream.begin()
        times, end = 0, time.monotonic() + 4.5
        while time.monotonic() < end:
            buffer = holding()
            epochs(stream, partial(checkpoint, buffer), 0.05)
            buffer.open()
            buffer.detach()
            times += 1
        before = stream.came
        sent = stream.end()["sent"]
    late = [pair for pair in pairwise(stream.numbers) if pair[1] <= pair[0]]
    print(f"{times} times, {sent} sent, {len(stream.numbers)} came, {before} until then; out of order: {late[:20]}")
    assert not late and stream.numbers == list(range(sent)) and before < sent


def lost(plain: bool) -> int:
    """Segments that a bulk stream had to repeat because they were lost or overtaken."""
    with Stream("tcp", RUN_S) as stream:
        buffer = holding()
        stream.begin()
        epochs(stream, partial(checkpoint, buffer), RUN_S / 2)
        if plain:
            buffer.shut()
            sh("tc qdisc del dev mcft-vnet0 root; tc filter del dev vnet0 ingress; ip link del mcft-vnet0")
        else:
            buffer.open()
            buffer.detach()
        before = stream.came
        said = stream.end()
    print(f"{'plain' if plain else 'mcft'}: {said}; {stream.came - before} bytes after it")
    assert stream.came == said["sent"] > before > 0 and not buffer.broken
    return int(said["repeated"] - said["in_vain"])


def test_a_bulk_stream_does_not_notice_unprotect() -> None:
    """Beside it the same stream whose qdisc is just deleted, with what it holds: that one does notice.

    Fails if the filter goes before what waits, if the IFB goes before its filter, or if the plug drops what it holds.
    """
    assert lost(plain=False) == 0 < lost(plain=True)
