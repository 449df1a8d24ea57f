"""A recorded run of the micro-checkpointing QEMU, played to mcft's engine in place of that QEMU.

Transcripts: `transcripts/NAME.jsonl.xz`, one JSON object a line (`transcripts/INDEX.md` says what each run did). Keys:

* `t`: seconds from the run's begin. `side`: `src`, `dst` or `dst2`; which leads is seen by who was told `migrate`.
* `dir`: `out` (the run sent this to QEMU), `in` (QEMU sent this: greeting, reply or event), `argv` (how that QEMU was started),
  `mark` (the run did something: a signal, or it waited in vain: `no reply in 3s`), `eof` (that QEMU's monitor closed),
  `log` (its stderr). Runs 60 and later: `virsh`, `virsh-out`, `libvirt-event`, `client`. What `virsh qemu-monitor-command` sent
  and printed is played as `out` and `in` of that domain, the remark `killed src` as its `eof`, `virsh create … --paused` as `-S`.
* `msg`: the QMP message, or text. Lines with `summary` are the run's own remarks; `PARTITION` and `HEALED` there are the link's.

A run may hold several streams (a survivor that was protected again): one per `migrate`. Each is played by itself.

What is played, at a time of the player's own clock, which never runs slower than the run's:

* **A command that the run sent too**: its reply, at the run's pace or faster. Set-up commands must ask for what the run asked for
  (capabilities: the same ones on, in any order; delay; transport); ports and speeds are free.
* **A query that the run did not send just then**: the newest answer that the run had seen by that time, for QEMU's state
  does not depend on who asks. In a stretch where the run asked nothing, `checkpoints` is what follows from the RESUMEs: with
  n of them seen, n - 3 at least (capture k + 1 starts only after acknowledgement k). Never more than QEMU could have said.
* **No answer** from a side that did not answer the run at that time, until the run saw it speak again.
* **Anything that crashed, hung or was without effect** (in this run or any other): `Broken`. So the player fails on a delay
  below 1 ms or absurd, `blk`, `migrate_cancel`, `stop`, `device_add` under checkpointing, and every command to a standby that
  follows.
* **Anything else that the run did not send**: `Broken` too. Nobody knows what QEMU would have said.
* **A broken socket** (SOCK_DESTROY; no run did that): as the run's end of that stream: the standby answers again, `paused` if it
  was started with `-S`, else `running`; the source says `failed` and runs.
"""

from __future__ import annotations

import json
import lzma
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "transcripts"
KILLED_WITHIN_S = 0.2  # the ends that a kill brought about; later ones are the run's tidying up
ABSURD_MS = 1_000_000
SIGNALS = ("signal SIGKILL", "signal SIGTERM", "signal SIGSTOP", "signal SIGCONT")
CUT = {"PARTITION": True, "HEALED": False}
FREE = ("migrate_set_speed",)  # what it is told has no part in what was recorded
QUERIES = ("query-migrate", "query-status", "query-migrate-capabilities", "query-commands", "query-version")


class Broken(AssertionError):
    """The real QEMU would have crashed, hung, lost the guest or done nothing; or nobody knows what it would have done."""


class Silent(Exception):
    """No reply: that monitor was dead at this time."""


@dataclass(frozen=True)
class Line:
    t: float
    side: str
    dir: str
    msg: Any


@cache
def lines(name: str) -> tuple[tuple[Line, ...], tuple[tuple[float, bool], ...]]:
    """All lines, and when the link was cut (True) and healed."""
    rows, cuts = [], []
    asked = ""
    with lzma.open(FOLDER / f"{name}.jsonl.xz", "rt", encoding="utf-8") as file:
        for text in file:
            row = json.loads(text)
            asked = _by_libvirt(row, asked)
            if row.get("summary") in CUT:
                cuts.append((row["t"], CUT[row["summary"]]))
            if "dir" in row:
                rows.append(Line(row["t"], row.get("side", ""), row["dir"], row["msg"]))
    return tuple(rows), tuple(cuts)


def _by_libvirt(row: dict[str, Any], asked: str) -> str:
    """A row of a run under libvirt becomes what its QEMU was told or said. asked, returned: the domain whose reply comes next."""
    said, words = row.get("msg"), row.get("summary", "")
    if row.get("dir") == "virsh" and said[0] == "qemu-monitor-command":
        row.update(side=said[1], dir="out", msg=json.loads(said[2]))
        return str(said[1])
    if row.get("dir") == "virsh-out" and asked and said.startswith("{"):
        row.update(side=asked, dir="in", msg={k: v for k, v in json.loads(said).items() if k != "id"})
    elif row.get("dir") == "virsh" and said[0] == "create":
        row.update(side="dst" if "dst" in said[1] else "src", dir="argv", msg="-S" if "--paused" in said else "by libvirt")
    elif words.startswith("killed src"):
        row.update(side="src", dir="eof", msg=words)
    return ""


def names() -> list[str]:
    return sorted(path.name.removesuffix(".jsonl.xz") for path in FOLDER.glob("*.xz"))


@cache
def common(command: str) -> Any:
    """The answer to a query about what that QEMU has, as run 01 recorded it."""
    wanted = False
    for line in lines("01-basic-tcp")[0]:
        if line.side == "src" and line.dir == "out":
            wanted = line.msg.get("execute") == command
        elif line.side == "src" and line.dir == "in" and wanted and "return" in line.msg:
            return line.msg["return"]
    raise Broken(f"no run asked {command}")


@dataclass
class Stream:
    """One `migrate` of a run, played. now_s is the player's clock; `events` hands out what came since it was last asked."""

    name: str
    index: int = 0
    source: str = ""
    standby: str = ""
    now_s: float = 0.0
    setup_s: float = 0.0  # when the run began to set this stream up
    begin_s: float = 0.0  # when the run's `migrate` was answered
    end_s: float = 0.0  # from here on the run tells nothing
    broken_s: float = float("inf")  # when the engine broke the stream's socket
    lines: tuple[Line, ...] = ()
    cuts: tuple[tuple[float, bool], ...] = ()
    continued: bool = False
    uri: str = ""
    _migrations: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    _resumes: list[float] = field(default_factory=list)
    _silences: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    _events: list[tuple[float, str, str]] = field(default_factory=list)
    _event_at: int = 0

    def __post_init__(self) -> None:
        every, self.cuts = lines(self.name)
        migrations = [i for i, row in enumerate(every) if row.dir == "out" and _command(row) == "migrate" and _accepted(every, i)]
        first = migrations[self.index]
        last = migrations[self.index + 1] if self.index + 1 < len(migrations) else len(every)
        self.source = every[first].side
        self.standby = {"src": "dst2" if self.index else "dst", "dst": "dst2"}[self.source]
        begin = migrations[self.index - 1] + 1 if self.index else 0
        self.lines = every[begin:last]
        self.begin_s, self.uri = every[first].t, str(every[first].msg["arguments"].get("uri", ""))
        self.setup_s = self.now_s = next(
            (row.t for row in self.lines if row.dir == "out" and row.side == self.source and _command(row) in
             ("migrate-set-capabilities", "migrate-set-mc-delay", "migrate")), self.begin_s
        )  # fmt: skip
        killed = [row.t + KILLED_WITHIN_S for row in self.lines if row.dir == "mark" and row.msg == "signal SIGKILL"]
        self.end_s = max([row.t for row in self.lines if row.dir in ("in", "out")] + killed)
        for row in self.lines:
            if row.side == self.source and row.dir == "in" and row.t >= self.begin_s:
                answer = row.msg.get("return")
                if isinstance(answer, dict) and (answer == {} or "status" in answer) and "running" not in answer:
                    if "status" in answer:
                        self._migrations.append((row.t, answer))
                elif row.msg.get("event") == "RESUME":
                    self._resumes.append(row.t)
        for row in self.lines:
            if row.t >= self.begin_s and row.dir == "in" and "event" in row.msg:
                self._events.append((row.t, row.side, row.msg["event"]))
            elif row.t >= self.begin_s and row.dir == "eof" and row.t <= self.end_s:
                self._events.append((row.t, row.side, "EOF"))
        self._eofs = {side: t for t, side, name in reversed(self._events) if name == "EOF"}
        self._began_s = next((t for t, said in self._migrations if said.get("status") == "checkpointing"), float("inf"))
        for side in {row.side for row in self.lines}:
            self._silences[side] = self._find_silences(side)

    # ---- what the run tells ----

    def _find_silences(self, side: str) -> list[tuple[float, float]]:
        """From a question without an answer (or a SIGSTOP) to when that side next spoke; for ever if it never did."""
        found: list[tuple[float, float]] = []
        asked: float | None = None
        for row in self.lines:
            if row.side != side:
                continue
            if row.dir == "out":
                asked = row.t if asked is None else asked
            elif row.dir == "in" and "event" not in row.msg:
                if asked is not None and row.t - asked > 0.9:
                    found.append((asked, row.t))
                asked = None
            elif row.dir == "eof":
                break
        ended = self.eof_s(side)
        if asked is not None and ended - asked > 0.9:
            found.append((asked, ended))
        return found

    def silent(self, side: str, at_s: float) -> bool:
        """Whether that monitor gave the run no answer then."""
        return at_s >= self.eof_s(side) or any(a <= at_s < b for a, b in self._silences.get(side, []))

    def eof_s(self, side: str) -> float:
        """When that QEMU ended, if it did before the run's last word; else never."""
        return self._eofs.get(side, float("inf"))

    def cut(self, at_s: float) -> bool:
        state = False
        for t, cut in self.cuts:
            state = cut if t <= at_s else state
        return state

    @property
    def held_back(self) -> bool:
        """Whether the run's standby was started with -S, as mcft always starts it."""
        started = [str(row.msg).split() for row in lines(self.name)[0] if row.dir == "argv" and row.side == self.standby]
        return any(words[-1] == "-S" for words in started)

    def delay_ms(self) -> int:
        sent = [row.msg["arguments"].get("value") for row in self.lines if row.side == self.source and row.dir == "out"
                and _command(row) == "migrate-set-mc-delay" and row.t < self.begin_s and "arguments" in row.msg]  # fmt: skip
        return int(sent[-1]) if sent and isinstance(sent[-1], int) else 100

    def acknowledged_s(self) -> list[float]:
        """[k - 1]: when the player's QEMU first shows that checkpoint k is acknowledged. The truth for who looks for leaks.

        The first acknowledgement does not show: it is taken for as early as it can be.
        """
        times: list[float] = [self._resumes[1]] if len(self._resumes) > 1 else []
        marks = sorted({t for t, _ in self._migrations} | set(self._resumes))
        for t in marks:
            count = self._checkpoints(t)
            while count is not None and len(times) < count + 1:
                times.append(t)
        return times

    def _checkpoints(self, at_s: float) -> int | None:
        answer = self._migration(at_s)
        return answer["mc"]["checkpoints"] if isinstance(answer.get("mc"), dict) else None

    def _migration(self, at_s: float) -> dict[str, Any]:
        if at_s >= self.broken_s:
            return {"status": "failed"}
        at = bisect_right(self._migrations, at_s, key=lambda row: row[0])
        answer = self._migrations[at - 1][1] if at else {}
        if answer.get("status") == "checkpointing" and "mc" in answer:
            n = bisect_right(self._resumes, at_s)
            answer = {**answer, "mc": {**answer["mc"], "checkpoints": max(answer["mc"]["checkpoints"], n - 3)}}
        return answer

    # ---- being QEMU ----

    def events(self, until_s: float) -> list[tuple[float, str, str]]:
        """(time, side, name) of the events (`EOF` for the end of a QEMU) up to then, each once."""
        found = []
        while self._event_at < len(self._events) and self._events[self._event_at][0] <= until_s:
            found.append(self._events[self._event_at])
            self._event_at += 1
        return found

    def next_line_s(self) -> float:
        """When the next event comes; infinite after the last."""
        return self._events[self._event_at][0] if self._event_at < len(self._events) else float("inf")

    def ask(self, side: str, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """The `return`. Raises: Silent, Broken."""
        arguments = arguments or {}
        self._refuse_fatal(side, command, arguments)
        if side == self.source:
            return self._source(command, arguments)
        return self._standby(command)

    def following(self) -> bool:
        """Whether the standby's monitor is dead: from the first checkpoint to the stream's end."""
        over = min(self.broken_s, self.eof_s(self.source))
        return self._began_s <= self.now_s < over

    def _refuse_fatal(self, side: str, command: str, arguments: dict[str, Any]) -> None:
        if command == "migrate-set-mc-delay":
            value = arguments.get("value")
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= ABSURD_MS:
                raise Broken(f"delay {value}: SIGFPE, or a stall for ever (runs 02, 02b, 04, 93)")
        if command == "migrate" and arguments.get("blk"):
            raise Broken("blk: the monitor hangs (run 34)")
        if side == self.standby and command not in ("migrate-incoming",) and self.following():
            raise Broken(f"{command} to a standby that follows: blocks, and runs at the take-over (runs 16, 31, 32)")
        if side == self.standby and command == "quit":
            raise Broken("quit to the standby: the guest is lost (run 32)")
        if side == self.source and self.following() and command in ("stop", "migrate_cancel", "device_add", "quit"):
            raise Broken(f"{command} under checkpointing: undone, without effect, or the standby's end (runs 11, 17, 18)")

    def _source(self, command: str, arguments: dict[str, Any]) -> Any:
        asks_state = command in ("query-migrate", "query-status")
        if asks_state and self.silent(self.source, self.now_s) and self.now_s < self.broken_s:
            raise Silent(command)
        if command == "query-migrate":
            return self._migration(self.now_s)
        if command == "query-status":
            return {"status": "running", "running": True}
        if command in QUERIES:
            return common(command)
        if command in FREE:
            return {}
        if self.now_s >= self.broken_s and command == "migrate-set-capabilities":
            return {}
        # (What an earlier stream of this QEMU set stays set: capabilities survive a failed migration.)
        sent = [row for row in lines(self.name)[0] if row.side == self.source and row.dir == "out" and row.t <= self.begin_s
                and _command(row) == command]  # fmt: skip
        if command == "migrate-set-mc-delay" and not sent and arguments == {"value": 100}:
            return {}  # that QEMU's own
        if not sent or not any(_same(command, arguments, row.msg.get("arguments", {})) for row in sent):
            raise Broken(f"the run did not send {command} {arguments}")
        if command == "migrate":
            self.now_s = max(self.now_s, self.begin_s)
        return {}

    def _standby(self, command: str) -> Any:
        if command == "migrate-incoming":
            return {}
        if command == "query-status":
            if self.eof_s(self.standby) <= self.now_s:
                raise Silent(command)
            if self.now_s < self._began_s and not bisect_right(self._resumes, self.now_s):
                return {"status": "inmigrate", "running": False}
            running = self.continued or not self.held_back
            return {"status": "running" if running else "paused", "running": running}
        if command == "cont":
            self.continued = True
            return {}
        raise Broken(f"{command} to the standby: no run sent it")


def _command(row: Line) -> str:
    return str(row.msg.get("execute", "")) if isinstance(row.msg, dict) else ""


def _accepted(rows: tuple[Line, ...], at: int) -> bool:
    """Whether that `migrate` was answered without an error (a refused URI is no stream)."""
    for row in rows[at + 1 :]:
        if row.side == rows[at].side and row.dir == "in" and "event" not in row.msg:
            return "error" not in row.msg
    return True


def _same(command: str, ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    if command == "migrate-set-capabilities":
        return _on(ours) == _on(theirs)
    if command == "migrate":
        return str(ours.get("uri", "")).partition(":")[0] == str(theirs.get("uri", "")).partition(":")[0] and "blk" not in theirs
    return ours == theirs


def _on(arguments: dict[str, Any]) -> set[str]:
    return {row["capability"] for row in arguments.get("capabilities", []) if row["state"] is True}
