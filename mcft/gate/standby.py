"""The standby's side of a gate: frozen between checkpoints, silent, and the few commands of a take-over."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

from mcft import sockbreak
from mcft.blockgraph import uncommitted
from mcft.engines import tcg
from mcft.failover import Act, Verdict
from mcft.gate.control import Answer, Denied
from mcft.gate.core import Gate
from mcft.gate.links import remove_drop_filter, set_link
from mcft.gate.loop import Commands, Task, boottime_ms
from mcft.gate.samples import Samples
from mcft.keepalive import Heard
from mcft.monitor import DISK_ERRORS, Message

ANNOUNCE = {"initial": 50, "max": 550, "rounds": 5, "step": 100}
TAKE_DEADLINE_MS = 10000.0
EXIT_EVENT_MS = 1000.0
STREAM_END_MS = 5000.0
HALF_LOADED = "the checkpoint stream ended {how}: the last checkpoint may be half loaded"
WAKE_AFTER_MS = 100.0  # behind the delay: a checkpoint's own pause is shorter on a link that is fit for it
COMMIT_WAIT_MS = 2000.0
COMMIT_POLL_MS = 2.0
LATE_COMMIT_POLL_MS = 10.0


def _forget_file(path: str) -> None:
    """Its name is gone from the disk too. Blocks this gate; after a take-over nobody waits for it."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Standby:
    """Stops the guest again at every load (QEMU lets it run ahead otherwise), counts loads, takes over when told."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.loads = 0
        self.take_ms = Samples()
        self._load_ms = boottime_ms()
        self._dead = ""
        self._following = gate.state.record in ("preparing", "armed")
        self._armed_echo_ms = float("-inf")  # when the newest keepalive that we answered with `armed` had arrived
        self._no_echo_until_ms = float("-inf")
        self._exit_ms = 0.0
        self._took = self._exited = self._waking = self._was_blind = False
        self._held = False  # in a take-over, until our `cont`: a RESUME is QEMU's own
        self._timing: dict[str, float] = {}

    def started(self) -> None:
        """A restarted gate does not know what its dead predecessor echoed last: T after now, it has expired."""
        if self.gate.state.serial:
            self._no_echo_until_ms = boottime_ms() + self.gate.state.loss_ms
            self._was_blind = self.gate.state.record == "armed"  # (`taken`: a predecessor's own yank may have ended the stream)
        self.gate.state.serial += 1
        self.gate.persist()

    def monitor_connected(self) -> None:
        """Events may have been missed: a guest that runs ahead unseen is stopped (it is following, not active)."""
        if self.gate.state.mode == "pass" and self.gate.state.serial > 1:
            self.gate.loop.spawn(self._retire_overlays(LATE_COMMIT_POLL_MS))
        if self._following and self.gate.state.serial > 1 and self.gate.state.mode != "pass":
            self.gate.qemu.send(Commands([("query-status", {})]), self._stop_if_running)

    def _stop_if_running(self, replies: list[Message]) -> None:
        if self._following and replies[0].get("return", {}).get("status") == "running":
            self._stop()

    def _stop(self) -> None:
        self.gate.qemu.send(Commands([("stop", {})]), lambda _replies: None)

    def on_event(self, event: Message, now_ms: float) -> None:
        name, data = event["event"], event.get("data") or {}
        if name == "RESUME" and self._following:
            self.loads += 1
            self._load_ms = now_ms
            self._stop()
            if self.loads == 1:
                self.gate.control.note("loaded", count=1)
        elif name == "RESUME" and self._held:
            self._stop()
        elif name == "RESUME" and self._took and "resume" not in self._timing:
            self._timing["resume"] = now_ms
        elif name == "COLO_EXIT":
            if self._following and not self._exited and self._stream_is_open():
                self._not_whole(HALF_LOADED.format(how="here, though the primary's end of it is open"))
            self._exited, self._exit_ms = True, self._exit_ms or now_ms
            self._dead = self._dead or f"COLO_EXIT ({data.get('reason')})"
        elif name == "MIGRATION" and data.get("status") in ("failed", "cancelled"):
            self._dead = self._dead or f"migration {data['status']}"
        elif name in DISK_ERRORS and self._following:
            self._not_whole(f"{name} {data.get('node-name', '')}".strip())

    def on_heard(self, heard: Heard, now_ms: float) -> None:
        """A stream that ended while the primary's QEMU lives on, T later still, ended here: by an error of this copy's disk, say.

        QEMU loads a checkpoint's memory before its disks' part; when that one fails, it says COLO_EXIT and no more.
        """
        state, word = self.gate.state, heard.word
        lives = word.g == state.g and word.qemu == "running"
        follows = state.record == "armed" and not state.claiming and not self.gate.disk_error
        if follows and lives and self._exit_ms and now_ms - self._exit_ms > state.loss_ms:
            self._not_whole(HALF_LOADED.format(how="while the primary lives"))

    def _stream_is_open(self) -> bool:
        """Whether the primary's end of the stream stands, as our kernel knows it: then what ended it was an error of ours.

        QEMU (migration/colo.c) says COLO_EXIT and keeps its socket until a failover or a yank; a primary that dies has closed
        its end before, and one whose host lost its power causes no COLO_EXIT. Where the kernel can't tell, `on_heard` is left.
        """
        try:
            return bool(self.gate.state.stream_port) and sockbreak.is_open(self.gate.state.stream_port)
        except OSError:
            return False

    def _not_whole(self, reason: str) -> None:
        self.gate.saw_disk_error(reason)
        self.gate.control.note("not-whole", reason=self.gate.disk_error)

    def delay_changed(self) -> None: ...

    def before_send(self, now_ms: float) -> None:
        """What we are about to echo with `armed` is what the primary's lease may rest on: remember when it came in."""
        state = self.gate.state
        if state.record == "armed" and not state.claiming:
            # An echo given to a newcomer that has not proven itself yet counts from now: its arrival was not noted.
            proven = self.gate.session.peer_counter and not self.gate.session.echoes_newcomer
            heard_ms = self.gate.session.peer_heard_ms if proven else now_ms
            self._armed_echo_ms = max(self._armed_echo_ms, heard_ms)
        if self._following and now_ms - self._load_ms > state.every_ms + WAKE_AFTER_MS:
            self._wake()

    def _wake(self) -> None:
        """A load is late: perhaps this QEMU's main loop sleeps on a request that has come. Any command wakes it.

        QEMU 11.1: when a checkpoint begins, the COLO thread stops the guest and drains the disks, polling the main loop's
        sockets itself. What it takes up there is sometimes lost for the main loop, which goes on sleeping in a set of
        sockets without the NBD export's. A frozen standby has nothing else that would wake it; the primary waits for
        its write, and the stream stands. Seen about once in some thousand checkpoints; a command ended it at once.
        """
        if self._waking or self.gate.qemu.monitor.sock is None:
            return

        def woken(_replies: list[Message]) -> None:
            self._waking = False

        self._waking = True
        self.gate.qemu.send(Commands([("query-status", {})]), woken)

    def obey(self, verdict: Verdict, now_ms: float) -> None:
        """A claim: from now on we no longer say armed, whatever comes, until the agent withdraws it."""
        if verdict.act is Act.CLAIM:
            self._timing = {"verdict": now_ms}
            self._claim()

    def _claim(self) -> None:
        self.gate.state.claiming = True
        self.gate.persist()

    def earliest_ms(self) -> float:
        """From when on no release of the primary can rest on anything that we echoed.

        A lease runs from the *sending* of the keepalive that we echoed, so T after its arrival here it is over.
        """
        return max(self._armed_echo_ms, self._no_echo_until_ms - self.gate.state.loss_ms) + self.gate.state.loss_ms

    # ---- the agent's requests ----

    def handlers(self) -> dict[str, Callable[[dict[str, Any], Answer], None]]:
        return {
            "claim": self._on_claim,
            "unclaim": self._on_unclaim,
            "take": lambda request, answer: self.gate.loop.spawn(self._take(request, answer)),
            "speak": lambda request, answer: self.gate.loop.spawn(self._speak(answer)),
            "break": self._on_break,
        }

    def _on_claim(self, request: dict[str, Any], answer: Answer) -> None:
        """The operator's claim, or the agent's before a planned take: stop saying armed."""
        self._claim()
        self.gate.say()
        answer({})

    def _on_unclaim(self, request: dict[str, Any], answer: Answer) -> None:
        """No claim was sent, or it was refused: watch again."""
        self.gate.state.claiming = False
        self.gate.verdict = None
        self.gate.persist()
        answer({})

    def _on_break(self, request: dict[str, Any], answer: Answer) -> None:
        """The primary asks us to give up: our stream is made dead here first."""
        self._dead = self._dead or "broken to give up"
        self.gate.qemu.send(Commands([("yank", {"instances": [{"type": "migration"}]})], oob=True), lambda _replies: None)
        answer({"own_qemu": self.gate.qemu.condition})

    def _take(self, request: dict[str, Any], answer: Answer) -> Task:
        """taken(g) is on disk. Wait out what was echoed, end replication, resume from the last checkpoint, read back.

        QEMU: `nbd-server-stop` ends the primary's writes, `stop` flushes every disk (vm_stop does, also when stopped),
        `x-colo-lost-heartbeat` ends COLO, starts the commit of the overlay and resumes the guest by itself half a millisecond
        later (process_incoming_migration_bh), so it is stopped again, as at every load; `cont` after the commit resumes it.
        """
        if self.gate.state.record not in ("taken",):
            answer(Denied("taken(g) must be durable first"))
            return
        self._timing["won"] = boottime_ms()
        yield self.gate.qemu.until_connected()
        if not (request.get("peer_closed") or (self.gate.peer.closed and self.gate.peer.qemu in ("gone", "shutdown"))):
            yield self.gate.wait(lambda: boottime_ms() >= self.earliest_ms(), 2 * self.gate.state.loss_ms + 1000)
        self._timing["free"] = boottime_ms()
        # A checkpoint that came whole is still being loaded after its primary's death, from what waits in the socket. A `cont`
        # before its end would run the guest while QEMU writes another memory under it. COLO_EXIT comes after the last load.
        yield Commands([("yank", {"instances": [{"type": "migration"}]})], oob=True)
        ended = yield self.gate.wait(self._stream_over, EXIT_EVENT_MS)
        if not ended and self._was_blind and (yield from self._exited_unseen()):
            self._not_whole(HALF_LOADED.format(how="inside a checkpoint while nobody looked"))
        if self.gate.disk_error:
            answer(Denied(f"this copy is not whole: {self.gate.disk_error}"))
            return
        if self.gate.qemu.condition != "running":  # it is going: what it still loads has no end to wait for
            answer(Denied("the copy does not run: QEMU is gone"))
            return
        self._following, self._took, self._held = self._following and not ended, True, True
        replies: list[Message] = []
        for command in ("nbd-server-stop", "stop", "x-colo-lost-heartbeat"):
            self._send(replies, command)
        if not ended and not (yield from self._until_no_colo(replies)):
            answer(Denied("QEMU does not end the checkpoint stream: neither COLO_EXIT nor colo mode none"))
            return
        yield from self._retire_overlays(COMMIT_POLL_MS, boottime_ms() + COMMIT_WAIT_MS)
        if problem := (yield from self._go_on(replies)):
            answer(Denied(problem))
            return
        self.gate.state.mode = "pass"
        self.gate.persist()
        answer({"running": True, "timing_ms": self.timing()})
        self.gate.loop.spawn(self._retire_overlays(LATE_COMMIT_POLL_MS))

    def _go_on(self, replies: list[Message]) -> Task:
        """Resume the guest, and read back that it runs. Empty, or why it does not."""
        if self.gate.state.tcg:
            self._send(replies, *tcg.lead_command())
        self._held = False
        self._timing.pop("resume", None)  # (an earlier try's)
        # Not waited for: QEMU says RESUME before its main loop, perhaps still busy committing, comes to the last reply.
        self._send(replies, "cont")
        ran = yield self.gate.wait(self._runs_or_gone, 300.0)
        status = "running" if ran and self.gate.qemu.condition == "running" else ""
        deadline_ms = boottime_ms() + TAKE_DEADLINE_MS
        while status != "running" and boottime_ms() < deadline_ms and self.gate.qemu.condition == "running":
            _, reply = yield Commands([("cont", {}), ("query-status", {})])
            status = str(reply.get("return", {}).get("status", ""))
            if status != "running":
                yield self.gate.wait(self._runs_or_gone, 5.0)
        self._timing["running"] = boottime_ms()
        errors = "; ".join(r["error"]["desc"] for r in replies if "error" in r)
        return "" if status == "running" else f"the copy does not run: {status or 'QEMU is gone'} {errors}".strip()

    def _retire_overlays(self, poll_ms: float, until_ms: float = float("inf")) -> Task:
        """Remove the name of each `active` overlay as soon as QEMU has committed it.

        From then on the guest writes to the disk itself. An overlay that is still there when the guest or the host ends is
        committed offline, and would put old blocks over those writes (seen in the lab while libvirtd stood still): so a
        take-over waits for it, with the guest stopped. Only a commit that takes longer than `COMMIT_WAIT_MS` (a slow or a full
        disk) goes on beneath a running guest. QEMU keeps the file open until the agent takes the node away.
        """
        state = self.gate.state
        while state.overlays and self.gate.qemu.condition == "running" and boottime_ms() < until_ms:
            (reply,) = yield Commands([("query-named-block-nodes", {"flat": True})])
            if "return" in reply:
                for target in [t for t in state.overlays if t not in uncommitted(reply["return"])]:
                    _forget_file(state.overlays.pop(target))
                    self.gate.persist()
            if state.overlays:
                yield self.gate.wait(lambda: self.gate.qemu.condition != "running", poll_ms)
        if not state.overlays:
            self._timing.setdefault("committed", boottime_ms())

    def _send(self, replies: list[Message], command: str, arguments: dict[str, Any] | None = None) -> None:
        self.gate.qemu.send(Commands([(command, arguments or {})]), replies.extend)

    def _until_no_colo(self, replies: list[Message]) -> Task:
        """COLO_EXIT was missed (this gate was restarted): the failover ends QEMU's COLO thread, and with it any load."""
        deadline_ms = boottime_ms() + STREAM_END_MS
        while boottime_ms() < deadline_ms and self.gate.qemu.condition == "running":
            (reply,) = yield Commands([("query-colo-status", {})])
            if reply.get("return", {}).get("mode") == "none":
                self._following = False
                self._send(replies, "stop")
                return True
            yield self.gate.wait(self._stream_over, 5.0)
        return False

    def _exited_unseen(self) -> Task:
        """QEMU left the stream before our yank, and inside a checkpoint: that one was cut off, or failed; nobody can tell."""
        (reply,) = yield Commands([("query-status", {})])
        return reply.get("return", {}).get("status") == "colo"

    def _stream_over(self) -> bool:
        return self._exited or self.gate.qemu.condition != "running"

    def _runs_or_gone(self) -> bool:
        return "resume" in self._timing or self.gate.qemu.condition != "running"

    def timing(self) -> dict[str, float]:
        """Of the last take-over: ms from the verdict (or the win, if the agent asked) to each step."""
        start = self._timing.get("verdict", self._timing.get("won", 0.0))
        return {name: round(at - start, 2) for name, at in self._timing.items()}

    def _speak(self, answer: Answer) -> Task:
        """spoken(g+1) is on disk: open the NICs and tell the switches where the guest is now."""
        errors = self._open_nics()
        replies = yield Commands([("announce-self", ANNOUNCE)])
        errors += [r["error"]["desc"] for r in replies if "error" in r]
        answer({"errors": errors, "timing_ms": self.timing(), "time": time.time()})

    def _open_nics(self) -> list[str]:
        """Free of the drop filter, and up; what went wrong, a line each."""
        errors = []
        for ifname in self.gate.state.silenced:
            try:
                remove_drop_filter(ifname)
                set_link(ifname, up=True)
            except OSError as error:
                errors.append(f"{ifname}: {error}")
        self._timing["open"] = boottime_ms()
        return errors

    # ---- for the watcher, the keepalives and status ----

    def stream_age_ms(self, now_ms: float) -> float:
        return now_ms - self._load_ms

    def stream_dead(self) -> str:
        return self._dead

    def counts(self) -> tuple[int, int]:
        return self.loads, 0

    def closed(self) -> bool:
        return True

    def status(self, now_ms: float) -> dict[str, Any]:
        return {
            "mode": "silent" if self._following else "active", "loads": self.loads,
            "last_load_age_ms": round(now_ms - self._load_ms, 1), "timing_ms": self.timing(), "took": self._took,
        }  # fmt: skip
