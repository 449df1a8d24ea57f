"""QEMU's redirector filters in the gate's loop (`filterbuffer.py`), and no buffer at all."""

from __future__ import annotations

import selectors
from contextlib import suppress
from functools import partial
from typing import Protocol

from mcft.filterbuffer import (
    DEFAULT_LIMIT_BYTES,
    Channel,
    FilterBuffer,
    NoBuffer,
    attach_commands,
    detach_commands,
    make_channel,
    names,
)
from mcft.gate.control import Answer, Denied
from mcft.gate.core import Gate
from mcft.gate.loop import Commands, Task
from mcft.gate.taplease import TapLease
from mcft.netbuffer import NetBuffer

BACKLOG_MS = 5000.0  # for what was held, while the guest runs
STANDING_MS = 1000.0  # for the rest, while it stands still


class BufferSide(Protocol):
    """A network buffer with what it needs of the gate: its loop, its monitor, its state file."""

    @property
    def buffer(self) -> NetBuffer: ...
    @property
    def stands(self) -> bool: ...  # it holds all that the guest says by itself, also while closed
    @property
    def kernel_lease(self) -> bool: ...  # nothing that was released leaves after the lease, whoever stands still meanwhile
    def started(self) -> None:
        """Go on where a dead gate left off: hold or stay closed; what that one held is dropped, never sent."""

    def monitor_connected(self) -> None:
        """QEMU can be asked (again) for what this buffer needs of it."""

    def attach(self, answer: Answer) -> None:
        """Put it under every NIC, passing; all or none."""

    def detach(self, answer: Answer) -> None:
        """Let all go in order, then take it away."""

    def hold(self) -> None:
        """From now on every packet waits (`NetBuffer.hold`)."""

    def open(self) -> None:
        """Let all go, then pass (`NetBuffer.open`)."""

    def released(self) -> None:
        """An epoch was let go: see to what of it could not leave at once."""

    def delay_changed(self) -> None:
        """Epochs are longer or shorter from now on (`state.every_ms`)."""

    def lease_until(self, at_ms: float) -> None:
        """Nothing released leaves after this instant (CLOCK_BOOTTIME, ms); told before the release that rests on it."""

    def poll(self) -> None:
        """Count afresh what is held, for `status`."""


class NoSide:
    """`none`."""

    stands = kernel_lease = False

    def __init__(self) -> None:
        self.buffer = NoBuffer()

    def started(self) -> None: ...
    def monitor_connected(self) -> None: ...
    def hold(self) -> None: ...
    def open(self) -> None: ...
    def released(self) -> None: ...
    def delay_changed(self) -> None: ...
    def lease_until(self, at_ms: float) -> None: ...
    def poll(self) -> None: ...

    def attach(self, answer: Answer) -> None:
        answer({})

    def detach(self, answer: Answer) -> None:
        answer({})


class FilterSide:
    """A pair of filters before each NIC. A restarted gate puts a new pair there as soon as it has the monitor."""

    stands = False  # what QEMU has taken from us and not sent yet can't be called back, only dropped

    def __init__(self, gate: Gate) -> None:
        self.gate, self.buffer, self.lease = gate, FilterBuffer(), TapLease()
        self._attaching = self._detaching = False

    @property
    def kernel_lease(self) -> bool:
        return self.lease.stands

    def started(self) -> None:
        self.buffer.mode = self.gate.state.mode
        self.lease_until(float("-inf"))

    def monitor_connected(self) -> None:
        whole = bool(self.buffer.channels) and not self.buffer.broken
        if self.gate.state.attached and not whole:
            self.attach(lambda _answer: None)

    def attach(self, answer: Answer) -> None:
        self.gate.loop.spawn(self._attaching_task(answer))

    def detach(self, answer: Answer) -> None:
        self.gate.loop.spawn(self._detaching_task(answer))

    def hold(self) -> None:
        self.buffer.hold()

    def open(self) -> None:
        self.lease.until(float("inf"))
        self.buffer.open()
        self.released()

    def lease_until(self, at_ms: float) -> None:
        """What is released is said by QEMU within the lease, or never."""
        if self.buffer.mode != "pass":
            self.lease.until(at_ms)

    def delay_changed(self) -> None: ...
    def poll(self) -> None: ...

    def _attaching_task(self, answer: Answer) -> Task:
        """Put a new pair of filters before each NIC, then take away a dead predecessor's."""
        state = self.gate.state
        if self._attaching:
            answer({})
            return
        self._attaching = True
        yield self.gate.qemu.until_connected()
        state.serial += 1
        self.gate.persist()
        (reply,) = yield Commands([("qom-list", {"path": "/objects"})])
        old = [row["name"] for row in reply.get("return", []) if row["name"].startswith("mcft-net")]
        channels, error = [], ""
        for index, nic in enumerate(state.nics):
            channel, theirs_out, theirs_in = make_channel(nic, state.limit_bytes or DEFAULT_LIMIT_BYTES)
            ids = names(index, state.serial)
            older = [name for name in old if name.startswith(f"mcft-net{index}-") and name.endswith("-out")]
            replies = yield Commands([("getfd", {"fdname": ids["fd_out"]})], fds=(theirs_out.fileno(),))
            replies += yield Commands([("getfd", {"fdname": ids["fd_in"]})], fds=(theirs_in.fileno(),))
            replies += yield Commands(attach_commands(nic, index, state.serial, older[-1] if older else None))
            theirs_out.close()
            theirs_in.close()
            error = error or next((r["error"]["desc"] for r in replies if "error" in r), "")
            channels.append(channel)
        if not error and old:
            (reply,) = yield Commands([("query-chardev", {})])
            old_chardevs = [c["label"] for c in reply.get("return", [])
                            if c["label"].startswith("mcft-net") and f"-{state.serial}-" not in c["label"]]  # fmt: skip
            yield Commands(list(detach_commands(old, old_chardevs)))
        for channel in self.buffer.channels:
            self.gate.loop.forget(channel.ours_out)
            channel.close()
        self.buffer.channels = channels
        for channel in channels:
            self.gate.loop.watch(channel.ours_out, selectors.EVENT_READ, partial(self._readable, channel))
        self._attaching = False
        if error:
            self.gate.control.note("alarm", reason=f"the network buffer can't be attached: {error}")
            answer(Denied(f"the network buffer can't be attached: {error}"))
            return
        self._guard()
        state.attached = True
        self.gate.persist()
        answer({"attached": [nic.target for nic in state.nics]})

    def _guard(self) -> None:
        with suppress(OSError):  # before Linux 6.6: status says so, docs/correctness.md what remains then
            self.lease.guard([nic.target for nic in self.gate.state.nics])

    def _readable(self, channel: Channel, _events: int) -> None:
        self.buffer.readable(channel)
        if channel.broken:
            self.gate.loop.forget(channel.ours_out)
            if self.gate.qemu.condition == "running" and self.gate.state.attached and not self._detaching:
                self.gate.control.note("alarm", reason=f"the buffer of {channel.nic.target} broke: {channel.broken}")
        self.released()

    def released(self) -> None:
        """What QEMU did not take at once is written when it does."""
        for channel in self.buffer.channels:
            if channel.sending:
                self.gate.loop.watch(channel.ours_in, selectors.EVENT_WRITE, partial(self._writable, channel))
            else:
                self.gate.loop.forget(channel.ours_in)

    def _writable(self, channel: Channel, _events: int) -> None:
        channel.flush()
        if not channel.sending:
            self.gate.loop.forget(channel.ours_in)

    def _detaching_task(self, answer: Answer) -> Task:
        """Only in pass-through, and with the guest standing still for some ms: what it sends next would otherwise
        overtake what is still on its way through our sockets. What was held for long is said before that: QEMU may need
        seconds for it, and what it has not taken when its end goes is lost."""
        self._detaching = True
        yield self.gate.qemu.until_connected()
        yield self.gate.wait(self._caught_up, BACKLOG_MS)
        objects, chardevs, status = yield Commands(
            [("qom-list", {"path": "/objects"}), ("query-chardev", {}), ("query-status", {})]
        )
        running = status.get("return", {}).get("running", False)
        if running:
            yield Commands([("stop", {})])
        self.buffer.open()
        yield self.gate.wait(self._settled, STANDING_MS)
        names_ = [row["name"] for row in objects.get("return", [])]
        labels = [row["label"] for row in chardevs.get("return", [])]
        replies = yield Commands([*detach_commands(names_, labels), *([("cont", {})] if running else [])])
        for channel in self.buffer.channels:
            self.gate.loop.forget(channel.ours_out)
            self.gate.loop.forget(channel.ours_in)
            channel.close()
        self.buffer.channels = []
        self.lease.lift()
        self._detaching = False
        errors = [r["error"]["desc"] for r in replies if "error" in r]
        if errors and self.gate.qemu.condition == "running":
            answer(Denied("; ".join(errors)))
            return
        self.gate.state.attached = False
        self.gate.persist()
        answer({})

    def _caught_up(self) -> bool:
        """QEMU has read all but what the guest says in this moment."""
        settled = self.buffer.settled or bool(self.buffer.broken)
        self.buffer.open()
        return settled

    def _settled(self) -> bool:
        self.buffer.open()
        return self.buffer.settled or bool(self.buffer.broken)
