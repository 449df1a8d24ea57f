"""The standby's side of a gate for engine `mc`: deaf while it follows, so nothing is asked of it; then the take-over."""

from __future__ import annotations

import time
from typing import Any

from mcft import sockbreak
from mcft.engines.mcsession import Ask, Break, Clock, Wait, take_over
from mcft.gate.announce import announce
from mcft.gate.control import Answer, Denied
from mcft.gate.loop import Commands, Task, boottime_ms
from mcft.gate.standby import Standby
from mcft.keepalive import Heard
from mcft.monitor import Message


class McStandby(Standby):
    """See `Standby`. What it knows comes from the primary's keepalives, from libvirt's events and from its process."""

    def monitor_connected(self) -> None:
        """Nothing: a command would wait in a dead monitor, and run at the take-over."""

    def on_event(self, event: Message, now_ms: float) -> None:
        if event["event"] == "RESUME" and self._following:
            self.gate.control.note("alarm", reason="the copy was resumed by somebody else; it is silent all the same")

    def on_heard(self, heard: Heard, now_ms: float) -> None:
        if heard.word.g == self.gate.state.g and heard.word.acks > self.loads:
            first, self.loads, self._load_ms = not self.loads, heard.word.acks, now_ms
            if first:
                self.gate.control.note("loaded", count=self.loads)

    def _wake(self) -> None: ...

    def counts(self) -> tuple[int, int]:
        return 0, 0

    def _on_break(self, request: dict[str, Any], answer: Answer) -> None:
        """The primary asks us to give up: our stream is made dead here first."""
        self._dead = self._dead or "broken to give up"
        self._break()
        answer({"own_qemu": self.gate.qemu.condition})

    def _break(self) -> None:
        state = self.gate.state
        if not state.stream_port:
            return
        try:
            sockbreak.break_stream(state.qemu_pid, state.stream_port)
        except OSError as error:
            why = "QEMU gives up by itself after 70 s"
            self.gate.control.note("alarm", reason=f"the checkpoint stream could not be broken here ({error.strerror}): {why}")

    def _take(self, request: dict[str, Any], answer: Answer) -> Task:
        """taken(g) is on disk: wait out what was echoed, break the socket, await `paused`, resume, read back."""
        if self.gate.state.record != "taken":
            answer(Denied("taken(g) must be durable first"))
            return
        self._timing["won"] = boottime_ms()
        yield self.gate.qemu.until_connected()
        if not (request.get("peer_closed") or (self.gate.peer.closed and self.gate.peer.qemu in ("gone", "shutdown"))):
            yield self.gate.wait(lambda: boottime_ms() >= self.earliest_ms(), 2 * self.gate.state.loss_ms + 1000)
        self._timing["free"] = boottime_ms()
        take, value = take_over(), None
        try:
            while True:
                wanted, value = take.send(value), None
                if isinstance(wanted, Clock):
                    value = boottime_ms()
                elif isinstance(wanted, Break):
                    self._break()
                    self._following, self._took = False, True
                    self._timing["broken"] = boottime_ms()
                elif isinstance(wanted, Wait):
                    yield self.gate.wait(lambda: self.gate.qemu.condition != "running", wanted.ms)
                elif isinstance(wanted, Ask):
                    (value,) = yield Commands([(wanted.command, {})])
                    self._timing.setdefault("paused" if wanted.command == "query-status" else "resume", boottime_ms())
                if self.gate.qemu.condition != "running":
                    answer(Denied("the copy does not run: its QEMU is gone"))
                    return
        except StopIteration as end:
            problem = str(end.value or "")
        self._timing["running"] = boottime_ms()
        if problem:
            answer(Denied(problem))
            return
        self.gate.state.mode = "pass"
        self.gate.persist()
        answer({"running": True, "timing_ms": self.timing()})

    def _speak(self, answer: Answer) -> Task:
        """spoken(g+1) is on disk: open the NICs and tell the switches; that QEMU has no `announce-self`."""
        errors = self._open_nics()
        macs = {nic.target: nic.mac for nic in self.gate.state.nics}
        answer({"errors": errors, "timing_ms": self.timing(), "time": time.time()})
        for wait_ms in (0.0, 50.0, 150.0, 250.0, 350.0):
            yield self.gate.wait(lambda: False, wait_ms)
            for ifname, mac in macs.items():
                announce(ifname, mac)
