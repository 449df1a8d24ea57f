"""The primary's side of a gate for engine `mc`: it asks for the counter, and breaks the stream by its socket."""

from __future__ import annotations

from typing import Any

from mcft import sockbreak
from mcft.commit import Action, AskCount, CommitGate
from mcft.engines.mcsession import Leader
from mcft.gate.control import Answer, Denied
from mcft.gate.loop import Commands, Task, boottime_ms
from mcft.gate.primary import SWITCH_DEADLINE_MS, Primary
from mcft.gate.relay import AWAY
from mcft.monitor import Message, stamp_ms

EPOCHS_OF_A_SWITCH = 8


class McPrimary(Primary):
    """See `Primary`; what differs is how captures and acknowledgements are known, and what ends a stream."""

    leader: Leader
    _timed = False
    _blind_ms = float("-inf")  # when this gate last knew nothing of its QEMU

    def _new_commit(self) -> CommitGate:
        loss_ms = self.gate.state.loss_ms
        commit = CommitGate(loss_ms, margin_ms=loss_ms / 15, on_hold_ms=self.hold_ms.add, rule="counter")
        self.leader = Leader(self.gate.state.delay_ms, commit)
        return commit

    def monitor_connected(self) -> None:
        """The agent (or the second monitor) is there again: what was asked before is void."""
        self._blind_ms = boottime_ms()
        self.leader.reconnected()
        super().monitor_connected()
        self._pace()

    def on_event(self, event: Message, now_ms: float) -> None:
        """A RESUME is a capture's end. A STOP says nothing here: the next checkpoint undoes it."""
        if event["event"] == "RESUME":
            self._resume_stamp_ms = stamp_ms(event)
            self._apply(self.leader.resume_seen(now_ms), now_ms)

    def _apply(self, actions: list[Action], now_ms: float) -> None:
        super()._apply([action for action in actions if not isinstance(action, AskCount)], now_ms)
        self._pace()

    # ---- asking ----

    def before_send(self, now_ms: float) -> None:
        self._pace()

    def _pace(self) -> None:
        """Ask when it is due; every barrier that was wanted is set by now."""
        gate, now_ms = self.gate, boottime_ms()
        if gate.state.mode != "hold" or gate.qemu.condition != "running" or not gate.qemu.monitor.connected:
            return
        self.leader.delay_ms = gate.state.delay_ms
        due_ms = self.leader.due_ms()
        if due_ms <= now_ms:
            self._ask()
        elif due_ms != float("inf") and not self._timed:
            self._timed = True
            gate.loop.after(due_ms - now_ms, self._timer)

    def _timer(self) -> None:
        self._timed = False
        self._pace()

    def _ask(self) -> None:
        leader = self.leader
        ticket = leader.ask(boottime_ms())

        def answered(replies: list[Message]) -> None:
            reply, now_ms = replies[0], boottime_ms()
            if reply.get("error", {}).get("class") in (AWAY, "MonitorGone"):
                self._blind_ms = now_ms
            if leader is self.leader:
                self._apply(leader.answered(ticket, reply.get("return"), now_ms), now_ms)

        self.gate.qemu.send(Commands([("query-migrate", {})]), answered)

    # ---- the stream's end ----

    def _yank(self) -> None:
        """Nothing in that QEMU stops MC: its socket is destroyed, it says `failed` and its guest runs on."""
        state = self.gate.state
        if not state.stream_port:
            return  # a unix socket: the standby's end ends it
        try:
            sockbreak.break_stream(state.qemu_pid, state.stream_port)
        except OSError as error:
            self.gate.control.note("alarm", reason=f"the checkpoint stream could not be broken here: {error.strerror}")

    def _checkpoint_and_stop(self, answer: Answer) -> Task:
        """The last covered acknowledgement and its release; then closed. The agent ends the guest, whose next steps are void."""
        deadline_ms = SWITCH_DEADLINE_MS + EPOCHS_OF_A_SWITCH * self.gate.state.delay_ms
        wanted = self.commit.stats.released_epochs + 1 + self.commit.outstanding
        self.gate.switching_until_ms = boottime_ms() + deadline_ms
        done = yield self.gate.wait(lambda: self.commit.stats.released_epochs >= wanted or self._over(), deadline_ms)
        if done and not self._over():
            self._close("planned switch")
            answer({"stopped": False, "acknowledged": self.commit.stats.acknowledged})
            return
        self.gate.switching_until_ms = float("-inf")
        answer(Denied(f"no last checkpoint within {deadline_ms / 1000:.0f} s {self.commit.dead}".strip()))

    # ---- for the watcher and status ----

    def stream_age_ms(self, now_ms: float) -> float:
        """While nobody can ask (the agent or libvirt is away), nothing is known, and no time counts."""
        if not self.gate.qemu.monitor.connected:
            self._blind_ms = now_ms
        return now_ms - max(self._ack_ms, self._blind_ms)

    def status(self, now_ms: float) -> dict[str, Any]:
        now = self.leader.now
        said = {"status": now.status, "checkpoints": now.checkpoints, "polls": self.leader.polls, "resumes": self.leader.resumes}
        silent = {"silent_ms": self.gate.qemu.monitor.silent_ms(now_ms)}
        return {**super().status(now_ms), "mc": {**said, **silent, **now.statistics}}
