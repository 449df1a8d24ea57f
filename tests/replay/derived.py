"""What a recorded run must bring, derived from the bare lines of its transcript by the page that describes that QEMU, and by
nothing of mcft's: neither its engine nor the player is imported. `test_expected.py` holds `expected.toml` against it.

The page's sentences that are used, each marked where it counts:

 1. `checkpoints` = acknowledged - 1; RESUME count at rest = `checkpoints` + 2 (one for the first pass, then one per checkpoint).
 2. Capture k + 1 starts only after acknowledgement k: so no more than one capture is without its acknowledgement.
 3. A barrier set, then c read, may be released at c + 2.
 4. A failure is the status `failed` and no more; a source's end is the end of its monitor.
 5. A power-off, `quit` or SIGTERM of the source says SHUTDOWN first, and is no reason for a take-over.
 6. `checkpointing` with the counter at 0 does not mean protected. An unarmed standby never takes over.
 7. Destination killed: the guest runs on at the source.
 8. Links cut without a word: both sides must decide, the standby within its loss time, not after 70 s.
 9. Started with -S the standby says `paused` and `cont` takes over; without, it runs by itself.
10. A source whose counter is frozen *and* whose monitor is silent (10 s) is killed, and the standby takes over.
11. Only `mc`, `mc-net-disable` and `mc-disk-disable` are what mcft sets by itself; `blk` hangs; `exec:` fails.
"""

from __future__ import annotations

import json
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "transcripts"
OURS = {"mc", "mc-net-disable", "mc-disk-disable"}
HANG_S = 10.0
ENDS_WITHIN_S = 0.2
IN_FLIGHT_S = 1.0


@dataclass(frozen=True)
class Facts:
    """Of one `migrate` of a run. Counts are of what QEMU said; `None` where it never did.

    resumes: RESUME events of the source from the `migrate` on. counter: the highest `checkpoints` that it showed. Of a stream
    whose link was cut without a word both end with the cut: what QEMU did once it was healed came long behind the decision (8).
    """

    resumes: int
    counter: int
    checkpointing: bool
    failed: bool
    shut_down: bool  # the source said SHUTDOWN
    source_ended: bool
    standby_ended_first: bool
    cut: bool  # the link, while it was checkpointing
    hung: bool
    held_back: bool  # the standby was started with -S
    as_ours: bool  # set up with what mcft would set

    @property
    def most(self) -> int:
        """The highest `checkpoints` that QEMU can have shown: every capture but the first pass, acknowledged (1)."""
        return max(self.counter, self.resumes - 2)

    @property
    def least(self) -> int:
        """The lowest that it had at the end: the last capture may not be acknowledged (1, 2)."""
        return max(self.counter, self.resumes - 3)

    @property
    def takes_over(self) -> bool:
        """For a stream that was armed: whether the standby must go on."""
        died = self.source_ended and not self.shut_down and not self.standby_ended_first  # 5, 7
        return died or self.cut or self.hung  # 8, 10


def facts(name: str, index: int = 0) -> Facts:
    """index: which `migrate` of the run. Raises: IndexError if it has fewer."""
    with lzma.open(FOLDER / f"{name}.jsonl.xz", "rt", encoding="utf-8") as file:
        rows = _under_libvirt([json.loads(line) for line in file])
    begins = [i for i, row in enumerate(rows) if _told(row) == "migrate" and "error" not in _reply(rows, i)]
    begin = begins[index]
    end = begins[index + 1] if index + 1 < len(begins) else len(rows)
    source = rows[begin]["side"]
    standby = "dst2" if source == "dst" or index else "dst"
    stream = rows[begin:end]
    said = [(row["t"], row["msg"]) for row in stream if row.get("side") == source and row.get("dir") == "in"]
    answers = [(t, m["return"]) for t, m in said if isinstance(m.get("return"), dict) and "status" in m["return"]]
    migrations = [(t, a) for t, a in answers if "running" not in a]
    events = [(t, m["event"]) for t, m in said if "event" in m]
    began = next((t for t, a in migrations if a["status"] == "checkpointing"), float("inf"))
    cut = next((row["t"] for row in stream if row.get("summary") == "PARTITION" and row["t"] > began), float("inf"))
    ends = _ends(stream)
    return Facts(
        resumes=sum(event == "RESUME" for t, event in events if t < cut + IN_FLIGHT_S),
        counter=max((a["mc"]["checkpoints"] for t, a in migrations if "mc" in a and t < cut + IN_FLIGHT_S), default=0),
        checkpointing=began < float("inf"),
        failed=any(a["status"] in ("failed", "completed", "cancelled") for _, a in migrations),
        shut_down=any(event == "SHUTDOWN" for _, event in events),
        source_ended=source in ends,
        standby_ended_first=ends.get(standby, float("inf")) < ends.get(source, float("inf")),
        cut=cut < float("inf"),
        hung=_silent_s(stream, source, ends.get(source, float("inf"))) >= HANG_S,
        held_back=_held_back(rows, standby),
        as_ours=_as_ours(rows[:begin], rows[begin], source),
    )


def _under_libvirt(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs 60 and later spoke through virsh: the same lines as if they had spoken to QEMU."""
    domain = ""
    found = []
    for row in rows:
        way, said = row.get("dir"), row.get("msg")
        if way == "virsh":
            domain = said[1] if said[0] == "qemu-monitor-command" else ""
            if domain:
                row = {"t": row["t"], "side": domain, "dir": "out", "msg": json.loads(said[2])}
            elif said[0] == "create":
                row = {"t": row["t"], "side": said[1][3:6], "dir": "argv", "msg": "qemu -S" if said[-1] == "--paused" else "qemu"}
        elif way == "virsh-out" and domain:
            row = {"t": row["t"], "side": domain, "dir": "in", "msg": json.loads(said)} if said[:1] == "{" else row
            domain = ""
        elif str(row.get("summary")).startswith("killed src"):
            row = {"t": row["t"], "side": "src", "dir": "eof", "msg": ""}
        found.append(row)
    return found


def _told(row: dict[str, Any]) -> str:
    return str(row["msg"].get("execute", "")) if row.get("dir") == "out" and isinstance(row["msg"], dict) else ""


def _reply(rows: list[dict[str, Any]], at: int) -> dict[str, Any]:
    """What that QEMU answered to the command in this row; empty if it did not."""
    for row in rows[at + 1 :]:
        if row.get("side") == rows[at]["side"] and row.get("dir") == "in" and "event" not in row["msg"]:
            return dict(row["msg"])
    return {}


def _ends(stream: list[dict[str, Any]]) -> dict[str, float]:
    """When each QEMU's monitor closed, without the run's own tidying up behind its last word (4)."""
    words = [row["t"] for row in stream if row.get("dir") in ("in", "out")]
    kills = [row["t"] + ENDS_WITHIN_S for row in stream if row.get("dir") == "mark" and row["msg"] == "signal SIGKILL"]
    last = max(words + kills, default=0.0)
    found: dict[str, float] = {}
    for row in stream:
        if row.get("dir") == "eof" and row["t"] <= last:
            found.setdefault(row["side"], row["t"])
    return found


def _silent_s(stream: list[dict[str, Any]], side: str, ended: float) -> float:
    """The longest time for which a question to this QEMU stood without a reply, until the run's last word."""
    longest, asked = 0.0, None
    for row in stream:
        if row.get("side") != side or row["t"] > ended:
            continue
        if row.get("dir") == "out":
            asked = row["t"] if asked is None else asked
        elif row.get("dir") == "in" and "event" not in row["msg"]:
            longest, asked = max(longest, row["t"] - asked if asked is not None else 0.0), None
    last = min(ended, max(row["t"] for row in stream if "t" in row))
    return max(longest, last - asked if asked is not None else 0.0)


def _held_back(rows: list[dict[str, Any]], side: str) -> bool:
    """9."""
    return any(row.get("dir") == "argv" and row["side"] == side and str(row["msg"]).split()[-1] == "-S" for row in rows)


def _as_ours(before: list[dict[str, Any]], migrate: dict[str, Any], source: str) -> bool:
    """11."""
    on: dict[str, bool] = {}
    for at, row in enumerate(before):
        if row.get("side") == source and _told(row) == "migrate-set-capabilities" and "error" not in _reply(before, at):
            for capability in row["msg"]["arguments"]["capabilities"]:
                on[capability["capability"]] = capability["state"]
    asked = migrate["msg"]["arguments"]
    plain = "blk" not in asked and str(asked["uri"]).startswith(("tcp:", "unix:"))
    return {name for name, state in on.items() if state} == OURS and plain
