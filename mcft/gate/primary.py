"""The primary's side of a gate: barriers, releases, the last checkpoint of a planned switch; breaking a stream."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from mcft.commit import (
    Acknowledged,
    Action,
    AskCount,
    CommitGate,
    Release,
    SendMarker,
    SetBarrier,
)
from mcft.failover import OWN_DISK, Act, Verdict
from mcft.gate.control import Answer, Denied
from mcft.gate.core import Gate
from mcft.gate.filter import BufferSide, FilterSide, NoSide
from mcft.gate.links import set_link
from mcft.gate.loop import Commands, Task, boottime_ms
from mcft.gate.pace import Pace
from mcft.gate.samples import Samples
from mcft.gate.state import process_start
from mcft.keepalive import Heard
from mcft.monitor import DISK_ERRORS, Message, stamp_ms

MAX_DELAY_MS = 0xFFFFFFFF
SWITCH_DEADLINE_MS = 6000.0


class Primary:
    """Obeys `CommitGate`'s actions on the buffer and the monitor."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.output = self._buffer_side()
        self.buffer = self.output.buffer
        self.hold_ms, self.pause_ms, self.release_lag_ms = Samples(), Samples(), Samples()
        self.commit = self._new_commit()
        self._ack_ms = boottime_ms()
        self._ack_times: deque[float] = deque(maxlen=64)
        self._stop_stamp_ms = 0.0
        self._resume_stamp_ms = 0.0
        self._count_epoch, self._count_after = 0, 0
        self.pace = Pace(0.0, 0.0)  # anew whenever the delay is another

    def _buffer_side(self) -> BufferSide:
        if self.gate.state.buffer == "plug":
            from mcft.gate.plug import PlugSide  # pyroute2 takes 0.3 s to import, and only this way needs it

            return PlugSide(self.gate, self._stop_output, self._buffer_failed)
        return NoSide() if self.gate.state.buffer in ("none", "qemu") else FilterSide(self.gate)

    def _new_commit(self) -> CommitGate:
        return CommitGate(self.gate.state.loss_ms, margin_ms=self.gate.state.loss_ms / 15, on_hold_ms=self.hold_ms.add)

    # ---- start and restart ----

    def started(self) -> None:
        """A restarted gate holds (or stays closed) from its first moment; what the dead one held is dropped."""
        if self.gate.state.mode == "hold":
            self.commit.hold()
        elif self.gate.state.mode == "closed":
            self.commit.stream_died("closed before this gate started")
        self.output.started()

    def monitor_connected(self) -> None:
        self.commit.monitor_reconnected()
        self.output.monitor_connected()

    # ---- events in the monitor's order ----

    def on_event(self, event: Message, now_ms: float) -> None:
        name, data = event["event"], event.get("data") or {}
        at_ms = stamp_ms(event)
        if name == "STOP":
            self._stop_stamp_ms = at_ms
            self._apply(self.commit.stop_seen(now_ms), now_ms)
        elif name == "RESUME":
            self._resume_stamp_ms = at_ms
            # A fresh look at the clock: a release after a stall between reading and here must not rest on an old lease.
            now_ms = boottime_ms()
            self._apply(self.commit.resume_seen(now_ms), now_ms)
            self._stood(now_ms)
        elif name == "COLO_EXIT":
            self.commit.stream_died(f"COLO_EXIT ({data.get('reason')})")
        elif name == "MIGRATION" and data.get("status") in ("failed", "cancelled", "completed"):
            self.commit.stream_died(f"migration {data['status']}")
        elif name in DISK_ERRORS:
            self._disk_error(name, data)

    def _disk_error(self, name: str, data: Message) -> None:
        """One of the standby's disk ends the stream. One of this host's own ends this QEMU, so that the standby goes on.

        QEMU's quorum asks for one child only: the guest was told that this write is done, and it is in the replication
        node alone, or (a dead stream's node swallows writes) nowhere. A guest that went on here would find it missing.
        """
        node, mode, record = str(data.get("node-name", "")), self.gate.state.mode, self.gate.state.record
        what = f"{name} {node} {data.get('error', '')}".strip()
        own = name == "QUORUM_REPORT_BAD" and not node.startswith("mcft-")
        if own and mode in ("hold", "closed") and record in ("arming", "protected", "resigned"):
            self.gate.saw_disk_error(f"{OWN_DISK}: {what}")
            self._end_qemu(f"{OWN_DISK}: {what}")
        elif mode == "hold" and not self.commit.dead:
            self.gate.saw_disk_error(what)
            self.commit.stream_died("disk error")

    def _apply(self, actions: list[Action], now_ms: float) -> None:
        for action in actions:
            if isinstance(action, SetBarrier):
                self.buffer.barrier()
            elif isinstance(action, SendMarker):
                self._send_marker(action)
            elif isinstance(action, Release):
                if self.buffer.mode == "hold":
                    self.buffer.release()
                    self.release_lag_ms.add(time.time() * 1000 - self._resume_stamp_ms)
                    self.output.released()
            elif isinstance(action, AskCount):
                self._count_epoch, self._count_after = action.epoch, self.gate.session.counter + 1
                self.gate.say()
            elif isinstance(action, Acknowledged):
                self._acknowledged(action, now_ms)

    def _acknowledged(self, action: Acknowledged, now_ms: float) -> None:
        self._ack_ms = now_ms
        self._ack_times.append(now_ms)
        if action.count == 1:
            self.gate.control.note("acknowledged", count=1)

    def _stood(self, now_ms: float) -> None:
        """A pause is over. Where they leave the guest no time the agent hears of it; it tells the standby's watcher and QEMU."""
        state, pace = self.gate.state, self.pace
        if state.mode != "hold" or not self._resume_stamp_ms > self._stop_stamp_ms > 0:
            return
        self.pause_ms.add(self._resume_stamp_ms - self._stop_stamp_ms)
        if (pace.asked_ms, pace.period_ms) != (state.delay_ms, state.every_ms):
            pace = self.pace = Pace(state.delay_ms, state.every_ms)
        change = pace.checkpoint(self._stop_stamp_ms, self._resume_stamp_ms)
        if change and now_ms > self.gate.switching_until_ms:
            self.gate.control.note("pace", period_ms=change.period_ms, pause_ms=change.pause_ms, share=change.share)

    def _send_marker(self, marker: SendMarker) -> None:
        def answered(reply: Message) -> None:
            status = str(reply.get("return", {}).get("status", "error"))
            now_ms = boottime_ms()
            self._apply(self.commit.marker_answered(marker.capture, status, now_ms), now_ms)

        def send() -> None:
            self.gate.qemu.send(Commands([("query-status", {})]), lambda replies: answered(replies[0]))

        if marker.after_ms:
            self.gate.loop.after(marker.after_ms, send)
        else:
            send()

    # ---- the other side's word ----

    def on_heard(self, heard: Heard, now_ms: float) -> None:
        word = heard.word
        if word.role != "standby" or word.g != self.gate.state.g:
            return
        if word.record != "armed" or word.claiming:
            self.commit.lease_withdrawn()
            self.output.lease_until(self.commit.lease_until_ms)
        elif heard.echo:
            sent_ms = self.gate.session.sent_ms(heard.echo)
            if sent_ms is not None:
                now_ms = boottime_ms()
                actions = self.commit.lease_renewed(sent_ms, now_ms)
                if not self.closed():
                    self.output.lease_until(self.commit.lease_until_ms)
                self._apply(actions, now_ms)
        if self._count_epoch and heard.echo >= self._count_after:
            self._apply(self.commit.count_read(word.loads, self._count_epoch, now_ms), now_ms)

    def before_send(self, now_ms: float) -> None: ...

    def delay_changed(self) -> None:
        self.output.delay_changed()

    def obey(self, verdict: Verdict, now_ms: float) -> None:
        """Close first what holds (before that nothing was promised); then break the stream where QEMU still waits in it."""
        if self.gate.state.mode != "pass":
            self._close(f"{verdict.act.value}: {verdict.reason}")
        if verdict.act is Act.BREAK:
            self._yank()

    def _yank(self) -> None:
        """Out of band: QEMU's main loop may hang in the very stream (QEMU command `yank`)."""
        for instance in [{"type": "migration"}, *self.gate.state.yank]:
            self.gate.qemu.send(Commands([("yank", {"instances": [instance]})], oob=True), lambda replies: None)

    def _taps(self, *, up: bool) -> None:
        """What QEMU has taken from us and not sent yet can't be called back: a tap that is down stops that too."""
        for nic in self.gate.state.nics:
            with contextlib.suppress(OSError):
                set_link(nic.target, up=up)

    def _stop_output(self) -> None:
        """A plug that stands goes on holding, and what the guest says meanwhile leaves in order if this side goes on."""
        self.output.lease_until(float("-inf"))
        self.buffer.close()
        # (QEMU's own holds nothing once its standby is gone: the tap does.)
        if self.gate.state.buffer != "none" and not self.output.stands:
            self._taps(up=False)

    def _buffer_failed(self, reason: str) -> None:
        """The plug was changed by somebody else: what it holds can't be trusted, and the watcher breaks the stream."""
        self.gate.buffer_broken = reason
        self._close(f"network buffer: {reason}")

    def _close(self, reason: str) -> None:
        self._stop_output()
        self.commit.stream_died(reason)
        self.gate.state.mode = "closed"
        self.gate.persist()

    # ---- a planned switch ----

    def _checkpoint_and_stop(self, answer: Answer) -> Task:
        """The last checkpoint, acknowledged and released; then closed, and the guest read back as standing.

        Setting `x-checkpoint-delay`, even to the same value, starts a checkpoint at once; its maximum defers the next.
        """
        state, deadline_ms = self.gate.state, boottime_ms() + SWITCH_DEADLINE_MS
        self.gate.switching_until_ms = deadline_ms  # not for longer: a QEMU that hangs in a dead stream answers no `stop`
        while boottime_ms() < deadline_ms and not self._over():
            before = self.commit.stats.acknowledged

            def went_on(before: int = before) -> bool:
                return self.commit.stats.acknowledged > before or self._over()

            yield Commands([("migrate-set-parameters", {"x-checkpoint-delay": MAX_DELAY_MS})])
            yield self.gate.wait(went_on, max(0.0, deadline_ms - boottime_ms()))
            yield self.gate.wait(lambda: not self.commit.outstanding or self._over(), 1000.0)
            if self._over() or self.commit.outstanding or self.commit.stats.acknowledged == before:
                break
            self.buffer.close()
            _, reply = yield Commands([("stop", {}), ("query-status", {})])
            status = reply.get("return", {})
            if self._over():
                break  # what is closed then stays closed
            if status.get("status") == "paused":
                self._close("planned switch")
                answer({"stopped": True, "acknowledged": self.commit.stats.acknowledged})
                return
            self.buffer.reopen()
        yield Commands([("migrate-set-parameters", {"x-checkpoint-delay": int(state.every_ms)})])
        if self.buffer.mode == "closed" and not self._over():
            self.buffer.reopen()
        self.gate.switching_until_ms = float("-inf")
        answer(Denied(f"no last checkpoint within {SWITCH_DEADLINE_MS / 1000:.0f} s {self.commit.dead}".strip()))

    def _over(self) -> bool:
        """The stream or QEMU died: nothing may be opened again by a mere switch."""
        return bool(self.commit.dead) or self.gate.verdict is not None

    # ---- the agent's requests ----

    def handlers(self) -> dict[str, Callable[[dict[str, Any], Answer], None]]:
        return {
            "attach": lambda request, answer: self.output.attach(answer),
            "detach": self._on_detach,
            "hold": self._on_hold,
            "close": self._on_close,
            "open": self._on_open,
            "yank": self._on_yank,
            "switch": lambda request, answer: self.gate.loop.spawn(self._checkpoint_and_stop(answer)),
            "kill": self._on_kill,
        }

    def _on_hold(self, request: dict[str, Any], answer: Answer) -> None:
        if over := self.commit.dead or (self.gate.verdict and self.gate.verdict.reason):
            raise Denied(f"the stream is over already: {over}")
        self.output.hold()
        self.commit = self._new_commit()
        self.commit.hold()
        self._ack_ms = boottime_ms()
        self.gate.state.mode = "hold"
        self.gate.persist()
        answer({})

    def _on_close(self, request: dict[str, Any], answer: Answer) -> None:
        self._close(str(request.get("reason", "closed by the agent")))
        self.gate.say()
        answer({})

    def _on_open(self, request: dict[str, Any], answer: Answer) -> None:
        """The agent has made durable what allows it (nothing armed, or solo and spoken): it names that record."""
        if self.gate.state.record in ("arming", "protected") and request.get("because") not in ("solo", "given-up"):
            raise Denied(f"{self.gate.state.record}({self.gate.state.g}) stands: opening needs given-up or a win")
        if request.get("drop"):
            self.buffer.drop()
        self._taps(up=True)
        self.output.open()
        self.gate.state.mode = "pass"
        self.gate.persist()
        answer({})

    def _on_detach(self, request: dict[str, Any], answer: Answer) -> None:
        if self.buffer.mode != "pass":
            raise Denied("the buffer still holds: open it first")
        self.output.detach(answer)

    def _on_yank(self, request: dict[str, Any], answer: Answer) -> None:
        """The end of whatever was held for that stream; what passes rests on none, and goes on (it may be seconds of backlog)."""
        if self.gate.state.mode != "pass":
            self._close("yanked by the agent")
        self._yank()
        answer({})

    def _on_kill(self, request: dict[str, Any], answer: Answer) -> None:
        """End QEMU by pid and start time: this side has lost, died or hangs; its buffer is closed first."""
        self._end_qemu("QEMU ended by the agent")
        answer({})

    def _end_qemu(self, reason: str) -> None:
        self._close(reason)
        if process_start(self.gate.state.qemu_pid) == self.gate.state.qemu_start:
            os.kill(self.gate.state.qemu_pid, 9)

    # ---- for the watcher, the keepalives and status ----

    def stream_age_ms(self, now_ms: float) -> float:
        return now_ms - self._ack_ms

    def stream_dead(self) -> str:
        return self.commit.dead

    def counts(self) -> tuple[int, int]:
        return 0, self.commit.stats.acknowledged

    def closed(self) -> bool:
        return self.gate.state.mode == "closed"

    def status(self, now_ms: float) -> dict[str, Any]:
        stats, times = self.commit.stats, self._ack_times
        self.output.poll()
        recent = [t for t in times if now_ms - t < 5000]
        span = now_ms - recent[0] if len(recent) > 1 else 0.0
        return {
            "mode": self.buffer.mode, "buffer": self.gate.state.buffer, "attached": self.gate.state.attached,
            "acknowledged": stats.acknowledged, "rate_hz": round((len(recent) - 1) * 1000 / span, 2) if span > 100 else 0.0,
            "last_ack_age_ms": round(now_ms - times[-1], 1) if times else None, "pause_ms": self.pause_ms.quantiles(),
            "released_epochs": stats.released_epochs, "merged_epochs": stats.merged_epochs, "late_markers": stats.late_markers,
            "foreign_resumes": stats.foreign_resumes, "waits_for_lease": stats.waits_for_lease, "rule": self.commit.rule,
            "hold_ms": self.hold_ms.quantiles(), "release_lag_ms": self.release_lag_ms.quantiles(),
            "lease": self.commit.lease_holds(now_ms), "kernel_lease": self.output.kernel_lease,
            "nics": [{"target": b.target, "held_packets": b.packets, "held_bytes": b.bytes, "dropped": b.dropped, "ifb": b.ifb}
                     for b in self.buffer.backlog()],
        }  # fmt: skip
