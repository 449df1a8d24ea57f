"""The trace check: does the stand-in (not the micro-checkpointing QEMU) show what the real one showed in the same scenario?

Both runs are lists of lines in the recorded runs' format (`tests/replay/transcripts`). What must be equal is what does not depend
on the guest, the machine or the number of polls: see `Shape`. What must hold in each run alone: `broken_rules`.
"""

from __future__ import annotations

import json
import lzma
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).resolve().parent.parent / "replay" / "transcripts"
BEHIND = 3  # counter 0 for one acknowledged, and one more captured than acknowledged, beside the RESUME of the first pass
BRIEF = ("setup", "cancelling")  # statuses that a poll may miss

Row = dict[str, Any]


def recorded(name: str) -> list[Row]:
    with lzma.open(RECORDED / f"{name}.jsonl.xz", "rt") as lines:
        return [json.loads(line) for line in lines]


def parsed(text: str) -> list[Row]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def until_command(rows: list[Row], command: str) -> list[Row]:
    """The run up to a command, if it was given: what follows was not played."""
    for number, row in enumerate(rows):
        if row.get("dir") == "out" and row["msg"].get("execute") == command:
            return rows[:number]
    return rows


@dataclass
class Shape:
    """What two runs of one scenario have in common.

    statuses: of `query-migrate` per side, each change once; states: of `query-status` likewise. events: names per
    side, RESUMEs in a row once. silent: commands left unanswered. refused: every error's words by command. fields: of each
    status' description. acts: signals, in their order. exits: the codes of the emulators that ended otherwise than by SIGKILL.
    """

    statuses: dict[str, list[str]] = field(default_factory=dict)
    states: dict[str, list[str]] = field(default_factory=dict)
    events: dict[str, list[str]] = field(default_factory=dict)
    silent: dict[str, list[str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    fields: dict[str, list[str]] = field(default_factory=dict)
    acts: list[str] = field(default_factory=list)
    exits: dict[str, list[int]] = field(default_factory=dict)


def exchanges(rows: list[Row]) -> list[tuple[int, str, Row, Row | None]]:
    """(place of the reply, side, command, reply or None) in the replies' order. QMP answers in order, so no ids are needed."""
    waiting: dict[str, list[Row]] = {}
    found: list[tuple[int, str, Row, Row | None]] = []
    for place, row in enumerate(rows):
        side, direction, said = row.get("side", ""), row.get("dir"), row.get("msg")
        if direction == "out" and isinstance(said, dict):
            waiting.setdefault(side, []).append(said)
        elif direction == "in" and isinstance(said, dict) and ("return" in said or "error" in said) and waiting.get(side):
            found.append((place, side, waiting[side].pop(0), said))
        elif direction in ("argv", "eof"):
            found += [(place, side, command, None) for command in waiting.pop(side, [])]
    return found + [(len(rows), side, command, None) for side, left in waiting.items() for command in left]


def once(words: list[str]) -> list[str]:
    return [word for word, _ in groupby(words)]


def is_said(row: Row) -> bool:
    """A command, an act or a reply, but no event."""
    said = row.get("msg")
    return row.get("dir") in ("out", "mark") or (row.get("dir") == "in" and "event" not in said)


def shape(rows: list[Row]) -> Shape:
    made = Shape()
    end = max((number for number, row in enumerate(rows) if "summary" in row or is_said(row)), default=0)  # then: tidying up
    for _, side, command, reply in exchanges(rows):
        name = str(command.get("execute"))
        if reply is None:
            continue
        if "error" in reply:
            made.refused[json.dumps(command, sort_keys=True)] = reply["error"]["desc"]
        elif name == "query-migrate":
            status = str(reply["return"].get("status", "nothing"))
            made.statuses.setdefault(side, []).append(status)
            if "ram" in reply["return"] or status not in made.fields:
                made.fields[status] = described(reply["return"])
        elif name == "query-status":
            made.states.setdefault(side, []).append(str(reply["return"]["status"]))
    for row in rows[:end]:
        side, direction, said = row.get("side", ""), row.get("dir"), row.get("msg")
        if direction == "in" and isinstance(said, dict) and "event" in said:
            made.events.setdefault(side, []).append(said["event"])
        elif direction == "mark" and str(said).startswith("no reply"):
            made.silent.setdefault(side, []).append("no reply")
        elif direction == "mark" and str(said).startswith("signal"):
            made.acts.append(f"{side} {said}")
    for row in rows:
        if row.get("dir") == "log" and row.get("exit") not in (-9, None):
            made.exits.setdefault(row["side"], []).append(row["exit"])
    made.statuses = {side: once([w for w in words if w not in BRIEF]) for side, words in made.statuses.items()}
    made.states = {side: once(words) for side, words in made.states.items()}
    made.events = {side: once(words) for side, words in made.events.items()}
    made.silent = {side: once(words) for side, words in made.silent.items()}
    return made


def described(said: Row) -> list[str]:
    inner = [f"{name}.{key}" for name, value in said.items() if isinstance(value, dict) for key in value]
    return sorted([*said, *inner])


def broken_rules(rows: list[Row]) -> list[str]:
    """What every run must keep, recorded or not: the counter against the RESUMEs, one STOP, deaf once followed."""
    broken: list[str] = []
    places = {place: (side, command, reply) for place, side, command, reply in exchanges(rows)}
    resumes: dict[str, int] = {}
    counter: dict[str, int] = {}
    stopped: dict[str, bool] = {}  # by the first pass; a guest that stood already makes no STOP, and no RESUME for it
    for place, row in enumerate(rows):
        side, said = row.get("side", ""), row.get("msg")
        if row.get("dir") == "in" and isinstance(said, dict) and "event" in said:
            if said["event"] == "RESUME":
                resumes[side] = resumes.get(side, 0) + 1
            elif said["event"] == "STOP":
                stopped[side] = True
            elif said["event"].startswith(("MIGRATION", "COLO", "QUORUM")):
                broken.append(f"line {place + 1}: event {said['event']}")
        if place not in places:
            continue
        side, command, reply = places[place]
        if reply is None or "return" not in reply:
            continue
        if command.get("execute") == "migrate":
            resumes[side] = counter[side] = 0
            stopped[side] = False
        if command.get("execute") != "query-migrate":
            continue
        status, mc = reply["return"].get("status"), reply["return"].get("mc")
        if (status == "checkpointing") != (mc is not None):
            broken.append(f"line {place + 1}: status {status} {'with' if mc else 'without'} mc")
        if mc is None:
            continue
        behind = resumes.get(side, 0) - mc["checkpoints"] + (not stopped.get(side))
        if behind > BEHIND or (mc["checkpoints"] and behind < BEHIND - 1):
            broken.append(f"line {place + 1}: counter {mc['checkpoints']} after {resumes.get(side, 0)} RESUMEs")
        if mc["checkpoints"] < counter.get(side, 0):
            broken.append(f"line {place + 1}: counter falls to {mc['checkpoints']}")
        counter[side] = mc["checkpoints"]
    return broken


def without_short_pass(mine: dict[str, list[str]], other: dict[str, list[str]]) -> dict[str, list[str]]:
    """A first pass may be shorter than the other run's polls: `active` counts where both saw it."""
    return {side: [w for w in words if w != "active" or "active" in other.get(side, words)] for side, words in mine.items()}


def differences(played: list[Row], real: list[Row]) -> list[str]:
    """Empty, or what the stand-in showed otherwise. Errors and fields are compared where both runs have them."""
    ours, theirs = shape(played), shape(real)
    found = [f"the stand-in: {what}" for what in broken_rules(played)]
    for name in (f.name for f in fields(Shape)):
        mine, other = getattr(ours, name), getattr(theirs, name)
        if name in ("refused", "fields"):
            both = mine.keys() & other.keys()
            mine, other = {k: mine[k] for k in both}, {k: other[k] for k in both}
        if name == "statuses":
            mine, other = without_short_pass(mine, other), without_short_pass(other, mine)
        if mine != other:
            found.append(f"{name}: here {mine}, there {other}")
    return found
