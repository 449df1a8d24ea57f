"""Deliberate errors in the product: the simulation must find each, or it proves nothing.

`python -m tests.sim.errors [WORD…]` (`make sim-errors`): each edit is applied to a copy of the tree, random worlds are played
there until one fails. An edit that no longer applies fails loudly: the code has moved on, so must the edit.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
WITHIN_S = 60


@dataclass(frozen=True)
class Error:
    """name: what is broken; edits: (file, old, new), old exactly once in file.

    exhaustive: found by walking the small worlds, not at random.
    """

    name: str
    edits: tuple[tuple[str, str, str], ...]
    exhaustive: bool = False


ETCD = "mcft/arbiter/etcd.py"
COMMIT, FAILOVER, GENERATIONS = "mcft/commit.py", "mcft/failover.py", "mcft/generations.py"
FILTER, GATE_STANDBY = "mcft/gate/filter.py", "mcft/gate/standby.py"
PRIMARY, STANDBY, SETUP = "mcft/gate/primary.py", "mcft/agent/standby.py", "mcft/agent/setup.py"
DECISIONS, LIFE, VERBS = "mcft/agent/decisions.py", "mcft/agent/life.py", "mcft/agent/peerverbs.py"

ERRORS = [
    Error("release at the barrier", (
        (COMMIT, "            actions.append(SetBarrier(self._epoch))\n",
         "            actions += [SetBarrier(self._epoch), Release(self._epoch)]\n            self._barrier = None\n"),
    )),
    Error("merge rule left out", (  # a barrier that came too late for its acknowledgement is released by it all the same
        (COMMIT, "            return self._marker_was_late(now_ms)\n",
         "            if barrier is not None:\n                barrier.covered = True\n"
         "            return self._release_if_allowed(now_ms)\n"),
    )),
    Error("foreign RESUME taken as an ack", (
        (COMMIT, "if not (was_in_capture and confirmed):", "if not was_in_capture:"),
        (COMMIT, "if barrier is not None and barrier.marker_answered:", "if barrier is not None:"),
    )),
    Error("wall-clock barrier", (  # in time is what the wall clock says, not what followed what
        (PRIMARY, "            self._apply(self.commit.resume_seen(now_ms), now_ms)\n",
         "            barrier = self.commit._barrier\n"
         "            if barrier is not None and at_ms > self.barrier_wall_ms:\n"
         "                barrier.marker_answered = self.commit._confirmed = True\n"
         "            self._apply(self.commit.resume_seen(now_ms), now_ms)\n"),
        (PRIMARY, "                self.buffer.barrier()\n",
         "                self.buffer.barrier()\n                self.barrier_wall_ms = time.time() * 1000\n"),
    )),
    Error("lease ignored after a thaw", (  # looked at with a time of before the freeze
        (PRIMARY, "            now_ms = boottime_ms()\n            self._apply(self.commit.resume_seen(now_ms), now_ms)\n",
         "            now_ms = self.gate._last_send_ms\n            self._apply(self.commit.resume_seen(now_ms), now_ms)\n"),
    )),
    Error("no lease at the tap", (  # what QEMU has taken from the gate and not said yet outlives a freeze
        (FILTER, "            self.lease.until(at_ms)\n", '            self.lease.until(float("inf"))\n'),
    )),
    Error("one silent link is loss", (
        (FAILOVER, 'if view.silent_ms > settings.loss_ms and stream != "alive":',
         'if view.stream_silent_ms > settings.loss_ms and stream != "alive":'),
    )),
    Error("own stall counted as the peer's silence", (
        (FAILOVER, "        self._floor_ms = now_ms\n        return True", "        return True"),
    )),
    Error("solo without a win", (
        (DECISIONS, "                if await self._obey_peer(reason, *pull.result(), claiming):\n",
         "                if pull.result()[0] is None:\n                    await self.go_solo(reason)\n"
         "                    return\n                if await self._obey_peer(reason, *pull.result(), claiming):\n"),
    )),
    Error("unknown taken as given-up", (
        (GENERATIONS, "    if peer.has(Kind.GIVEN_UP):\n        return \"solo\"\n    return \"unknown\"", "    return \"solo\""),
    )),
    Error("give-up after taken", (
        (GENERATIONS, "standby.newest in (Kind.TAKEN, Kind.LOST, Kind.ENDED):", "standby.newest in (Kind.LOST, Kind.ENDED):"),
        (GENERATIONS, "Kind.GIVEN_UP: frozenset({Kind.PREPARING, Kind.ARMED, Kind.NOT_WHOLE})",
         "Kind.GIVEN_UP: frozenset({Kind.PREPARING, Kind.ARMED, Kind.NOT_WHOLE, Kind.TAKEN})"),
        (STANDBY, "        if self.ledger.newest in (Kind.TAKEN, Kind.GIVEN_UP, Kind.LOST, Kind.ENDED):\n            return\n",
         "        if self.ledger.newest in (Kind.GIVEN_UP, Kind.LOST, Kind.ENDED):\n            return\n"),
    )),
    Error("claim not durable before acting", (
        (LIFE, "            await self.site.store.append(\n", "            self.site.spawn(self.site.store.append(\n"),
        (LIFE, "detail, model.encode(self.body)\n            )\n", "detail, model.encode(self.body)\n            ), 'record')\n"),
    )),
    Error("etcd create instead of compare", (
        (ETCD, "Swap(self.key.name, self.key.value, self.key.mod_revision, self._put), timeout_ms)",
         "Create(self.key.name + '/won', self._put), timeout_ms)"),
        (ETCD, "        if doubt := seen_when_asked.doubt(reply):\n            self._end",
         "        if doubt := '':\n            self._end"),
    ), exhaustive=True),
    Error("undo opens the buffer", (
        (DECISIONS, "        if self.ledger.newest is Kind.PREPARING:\n", "        if True:\n"),
        (SETUP, "        if refusal := generations.may_open_primary(self.ledger):\n"
         '            raise Refused("may-not-open", "the network buffer stays closed", refusal)\n'
         '        because = "solo" if self.ledger.won else', '        because = "solo" if True else'),
        (SETUP, "        if refusal := generations.may_open_primary(self.ledger):\n"
         '            raise Refused("may-not-open", "the gate is kept, its buffer closed", refusal)\n', ""),
    )),
    Error("take-over unarmed", (
        (FAILOVER, "    if not view.armed:\n        return Verdict(Act.WAIT, \"not armed",
         "    if False:\n        return Verdict(Act.WAIT, \"not armed"),
        (GENERATIONS, "standby.newest in (Kind.ARMED, Kind.TAKEN):",
         "standby.newest in (Kind.PREPARING, Kind.ARMED, Kind.TAKEN):"),
        (GENERATIONS, "Kind.TAKEN: frozenset({Kind.ARMED})", "Kind.TAKEN: frozenset({Kind.PREPARING, Kind.ARMED})"),
        (STANDBY, "        if self.ledger.newest is Kind.ARMED:\n            if not override",
         "        if self.ledger.newest in (Kind.PREPARING, Kind.ARMED):\n            if not override"),
    )),
    Error("intended end taken for a loss", (
        (DECISIONS, 'if shutdown_reason.startswith("guest-") or', 'if False and shutdown_reason.startswith("guest-") or'),
    )),
    Error("adopt and release at once", (
        ("mcft/gate/filter.py", "        self.buffer.mode = self.gate.state.mode\n", '        self.buffer.mode = "pass"\n'),
    )),
    Error("old instance's records accepted", (
        (VERBS, "not isinstance(life, Standby) or life.body.pid != about.pid or", "not isinstance(life, Standby) or"),
        (VERBS, "        return isinstance(life, Standby) and life.body.pid == about.pid\n",
         "        return isinstance(life, Standby)\n"),
        (VERBS, "        if isinstance(life, Standby) and life.body.pid == about.pid and life.body.peer == peer:\n",
         "        if isinstance(life, Standby):\n"),
        (VERBS, "if life is not None and (not about.pid or life.body.pid == about.pid):\n", "if life is not None:\n"),
        (GENERATIONS, "if peer is None or peer.pid != primary.pid or peer.g != primary.g or", "if peer is None or"),
    )),
    Error("synchronisation resumed after a crash", (
        ("mcft/agent/copy.py", "            if target in disks:\n",
         "            if target in disks and path in self.body.created_files:\n"),
    )),
    Error("chain started as a bare disk", (
        (LIFE, "        await overlays.commit_files(self.body.disks, self.body.overlays_g)\n", ""),
    )),
    Error("the guest speaks before its overlay is gone", (
        (GATE_STANDBY, "        yield from self._retire_overlays(COMMIT_POLL_MS, boottime_ms() + COMMIT_WAIT_MS)\n", ""),
    )),
    Error("disk error not sticky", (
        (PRIMARY, "            self.gate.saw_disk_error(what)\n            self.commit.stream_died(\"disk error\")\n",
         "            pass\n"),
    )),
]  # fmt: skip


def applied(error: Error, tree: Path) -> str:
    """Empty, or why an edit no longer fits its file."""
    for file, old, new in error.edits:
        text = (tree / file).read_text()
        if (count := text.count(old)) != 1:
            return f"the old text occurs {count} times in {file}: {old.strip()[:70]}"
        (tree / file).write_text(text.replace(old, new))
    for file in {file for file, _, _ in error.edits}:
        compile((tree / file).read_text(), file, "exec")
    return ""


def hunt(error: Error, within_s: float) -> str:
    """Empty if the simulation found it, else what is wrong."""
    with tempfile.TemporaryDirectory(prefix="sim-error-") as name:
        tree = Path(name)
        for folder in ("mcft", "tests/sim"):
            shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
        if reason := applied(error, tree):
            return f"does not apply: {reason}"
        began = time.monotonic()
        if error.exhaustive:
            return walk(error, tree, within_s)
        done = subprocess.run(
            [sys.executable, "-m", "tests.sim.run", "--seconds", str(within_s), "--cpu", "--first", "1", "--no-shrink"],
            cwd=tree, env={**os.environ, "PYTHONPATH": str(tree), "PYTHONHASHSEED": "0"}, capture_output=True, text=True,
        )  # fmt: skip
        said = next((line for line in done.stdout.splitlines() if line.startswith("seed ")), done.stderr[-500:])
        if done.returncode != 1 or "violations: 1" not in done.stdout:
            return f"not found in {within_s:.0f} s of CPU ({done.returncode}): {said}"
        if ": an exception" in said:
            return f"found by an exception only: {said}"
        seed = said.split(":")[0].removeprefix("seed ")
        clean = subprocess.run(
            [sys.executable, "-m", "tests.sim.run", "--seed", seed], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"},
        )  # fmt: skip
        if clean.returncode:
            return f"seed {seed} fails without the error too: {clean.stdout.splitlines()[-1][:200]}"
        print(f"found    {error.name}: {time.monotonic() - began:.0f} s: {said[:170]}", flush=True)
        return ""


def walk(error: Error, tree: Path, within_s: float) -> str:
    """Empty if walking the small worlds finds it."""
    began = time.monotonic()
    command = [sys.executable, "-m", "tests.sim.exhaustive", "etcd", "--seconds", str(within_s)]
    done = subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    said = next((line for line in lines if line.startswith("COUNTER")), done.stdout[-200:] + done.stderr[-300:])
    if done.returncode != 1 or not said.startswith("COUNTER"):
        return f"not found in {within_s:.0f} s: {said}"
    print(f"found    {error.name}: {time.monotonic() - began:.0f} s, every interleaving: {said}", flush=True)
    return ""


def main(words: list[str]) -> int:
    chosen = [error for error in ERRORS if not words or any(word in error.name for word in words)]
    wrong = 0
    for error in chosen:
        if reason := hunt(error, WITHIN_S):
            wrong += 1
            print(f"SURVIVED {error.name}: {reason}", flush=True)
    print(f"{len(chosen)} deliberate errors, {wrong} not found")
    return 1 if wrong or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
