"""The plug buffer in the gate's loop: attached and adopted there, its notifications read, its tampering acted upon."""

from __future__ import annotations

import selectors
from collections.abc import Callable

from mcft.errors import McftError
from mcft.gate.control import Answer, Denied
from mcft.gate.core import Gate
from mcft.gate.loop import boottime_ms
from mcft.plugbuffer import Limit, PlugBuffer

QEMUS_END_MS = 500.0  # its taps go some moments before its process, on a loaded host more than 100 ms; nothing leaves meanwhile
POLL_EVERY_MS = 200.0


class PlugSide:
    """stop(): nothing may leave any more, at once. failed(reason): the protection is over for that reason."""

    def __init__(self, gate: Gate, stop: Callable[[], None], failed: Callable[[str], None]) -> None:
        self.gate, self.buffer = gate, PlugBuffer()
        self._stop, self._failed = stop, failed
        self._polled_ms = float("-inf")
        self._acted = False

    kernel_lease = True  # a release is the kernel's own act

    @property
    def stands(self) -> bool:
        return bool(self.buffer.lines) and not self.buffer.broken

    def started(self) -> None:
        """A restarted gate: what the dead one held is dropped, nothing leaks."""
        state = self.gate.state
        if not state.attached:
            self.buffer.mode = state.mode
            return
        self.buffer.adopt(state.nics, self._limit(), state.mode)
        self._watch()
        self.look()

    def monitor_connected(self) -> None: ...
    def lease_until(self, at_ms: float) -> None: ...

    def released(self) -> None:
        """A release looks before it acts: what it saw is acted upon."""
        self.look()

    def _limit(self) -> Limit:
        state = self.gate.state
        return Limit(state.limit_bytes, state.every_ms, state.loss_ms)

    def delay_changed(self) -> None:
        self.buffer.limit_to(self._limit())
        self.look()

    def attach(self, answer: Answer) -> None:
        """Every NIC or none. Raises: Denied."""
        state = self.gate.state
        if not self.buffer.lines:
            try:
                self.buffer.attach(state.nics, self._limit())
            except McftError as error:
                raise Denied(str(error)) from None
            self._watch()
        state.attached = True
        self.gate.persist()
        answer({"attached": [nic.target for nic in state.nics]})

    def detach(self, answer: Answer) -> None:
        """In pass-through: what still waits leaves first, in order. No stop of the guest is needed."""
        self._forget()
        self.buffer.detach()
        self.gate.state.attached = False
        self.gate.persist()
        answer({})

    def hold(self) -> None:
        """Raises: Denied if it can't be trusted to hold."""
        self.look()
        self.buffer.hold()
        if self.buffer.broken:
            raise Denied(f"the network buffer does not hold: {self.buffer.broken}")

    def open(self) -> None:
        """Let everything go; a buffer that was tampered with is gone after."""
        if self.buffer.broken:
            self._forget()
        self.buffer.open()

    def _watch(self) -> None:
        for sock in (self.buffer.watch, self.buffer.link.sock):
            if sock is not None:
                self.gate.loop.watch(sock, selectors.EVENT_READ, lambda _events: self.look())

    def _forget(self) -> None:
        for sock in (self.buffer.watch, self.buffer.link.sock):
            if sock is not None:
                self.gate.loop.forget(sock)

    def look(self) -> None:
        """Act on what others changed, once."""
        self.buffer.answered()
        self.buffer.look()
        while self.buffer.remarks:
            self.gate.control.note("alarm", reason=self.buffer.remarks.pop(0))
        if not self.buffer.broken or self._acted:
            return
        self._acted = True
        if self.buffer.mode == "pass":  # nothing is held: nothing can leak, and a hold will be refused
            self.gate.control.note("alarm", reason=f"the network buffer was changed by somebody else: {self.buffer.broken}")
            return
        self._stop()
        if self.buffer.by_qemus_end:
            self.gate.loop.after(QEMUS_END_MS, self._unless_ended)
        else:
            self._failed(self.buffer.broken)

    def _unless_ended(self) -> None:
        if self.gate.qemu.condition == "running":
            self._failed(self.buffer.broken)

    def poll(self) -> None:
        """For status: ask the kernel what waits, at most five times a second."""
        now_ms = boottime_ms()
        if now_ms - self._polled_ms >= POLL_EVERY_MS and not self.buffer.broken:
            self._polled_ms = now_ms
            self.buffer.poll()
