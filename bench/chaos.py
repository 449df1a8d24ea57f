"""`make chaos MINUTES=…`: random real faults against a guest under load, by each arbiter in turn; ends with a table.

`make recovery`: each fault alone, so many times in turn, with etcd: how long a client hears nothing after it.

Checked all the while: the outside observer, one open connection, every write that redis acknowledged (those under way at a
failure may or may not be there), and the LAN's switch. At the end of each round: both disks compared after a planned switch,
the guest rebooted, and the writes read again from its disk. MCFT_SEED repeats the faults; their moments are as exact as the
machine is.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from arbiters import Bmc, Etcd, all_arbiters
from rich.console import Console
from rich.table import Table
from watching import Client, Load, settled, verified
from world import H1, HOSTS, IMAGE, NOT_AGAIN, Host, configured, guest, hosts_on, lab, now, other, pause, restore, until, up

from bench.chaosfaults import FAULTS, Fault, Scene, choose, inject, on_again

ARBITERS = ("etcd", "fence", "standby")
SETTLES_WITHIN_S = 120.0
RECORDED_WITHIN_S = 3.0  # after its guest's first frame; an agent that is killed in between tells when it is back (seen: 1.09 s)
NOTICED_WITHIN_S = 1.0
console = Console(highlight=False, soft_wrap=True)


# Of an arbiter and a round's dice: one fault, or two at once, after another.
Plan = Callable[[str, random.Random], Iterator[list[Fault]]]


@dataclass
class Tally:
    """What the table tells. times in seconds."""

    faults: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    gaps_s: dict[str, list[float]] = field(default_factory=dict)
    outcomes_s: dict[str, list[float]] = field(default_factory=dict)
    detection_s: list[float] = field(default_factory=list)
    settling_s: list[float] = field(default_factory=list)
    writes: int = 0
    from_disk: int = 0
    lines: int = 0
    frames: int = 0
    operator: int = 0
    violations: list[str] = field(default_factory=list)


class Chaos:
    """One run."""

    def __init__(self, seed: int, etcd: Etcd, bmc: Bmc) -> None:
        self.seed, self.etcd, self.bmc = seed, etcd, bmc
        self.tally = Tally()
        self.seen: set[tuple[str, int]] = set()  # events that were counted
        self.switches: list[tuple[float, Host]] = []

    def round(self, kind: str, number: int, plan: Plan) -> None:
        """One arbiter and the faults of one plan, from a fresh guest to its disk."""
        moments = random.Random(f"{self.seed} {kind} {number}")
        restore(thorough=number == 0)
        self.look()
        self.switches = [(now(), H1)]
        primary = H1
        flush = ("run", "cl", "--", "redis-cli", "-e", "-h", "vm1", "flushall")
        until(lambda: lab(*flush, check=False).returncode == 0, 30, "redis is empty")
        protect(primary, kind)
        switch, load = Client("switchwatch", "sw"), Load()
        try:
            load.flowing()
            for faults in plan(kind, moments):
                primary = self.one(kind, primary, load, faults, moments)
            self.finish(primary, load)
            self.frames_came_from_one_port(switch)
        finally:
            load.close(), switch.close()

    def one(self, kind: str, primary: Host, load: Load, faults: list[Fault], moments: random.Random) -> Host:
        """One fault (or two): made, ended, settled, checked. Who leads then."""
        names = " + ".join(fault.name for fault in faults)
        scene = Scene(primary, self.etcd, self.bmc, moments)
        at_s = inject(faults, scene)
        leads = self.settle(kind, primary)
        back_s = now()
        load.goes_on(timeout=60)
        load.unhurt()
        self.count(faults, at_s, back_s, load, moved=leads is not primary)
        where = "stayed on" if leads is primary else "moved to"
        console.print(f"[dim]{kind:8}[/] {names}: {where} {leads.name}, protected again after {back_s - at_s:.1f} s")
        return leads

    def settle(self, kind: str, primary: Host) -> Host:
        """Until it is protected on whichever host, and either could be lost; who leads. Where only an operator can help, do."""
        asked: dict[str, float] = {}
        whole: dict[Host, float] = {}

        def protected() -> Host | None:
            for host in HOSTS:
                if not host.on:
                    self._help(asked, f"power {host}", 3.0, lambda host=host: on_again(host))  # type: ignore[misc]
            leader = next((h for h in HOSTS if h.status().get("role") == "primary" and h.state() not in ("lost", "")), None)
            if leader is None:
                return None
            status, theirs = leader.status(), other(leader).status()
            if status.get("state") == "protected" and status["survives_host_loss"] and theirs.get("survives_host_loss"):
                if status["arbiter"]["kind"] != kind:
                    raise AssertionError(f"asked for with arbiter {kind}, protected by {status['arbiter']['kind']}")
                # A fault of a moment ago may not be noticed yet.
                return leader if now() - whole.setdefault(leader, now()) > NOTICED_WITHIN_S else None
            whole.clear()
            self._operate(asked, kind, leader, status)
            return None

        def what() -> str:
            return f"protected again; {[(str(h), h.state(), h.status().get('reason')) for h in HOSTS]}"

        leader = until(protected, SETTLES_WITHIN_S, what)
        assert leader is not None
        return leader

    def _operate(self, asked: dict[str, float], kind: str, leader: Host, status: dict[str, Any]) -> None:
        """What the docs tell an operator to type."""
        peer, state, job = other(leader), status.get("state"), status.get("job")
        if state == "muted" and kind == "standby" and not peer.on:
            self._help(asked, "solo", 5.0, lambda: leader.mcft("solo", "vm1", "--peer-is-off", "--yes", check=False))
        elif state in ("solo", "active", "failed") and not job and not (status.get("next_step") or "").endswith("enough)"):
            again = ("protect", "vm1", "--to", peer.name, "--arbiter", kind, "--no-wait")
            self._help(asked, "protect", 2.0, lambda: leader.mcft(*again, check=False))
        elif state == "protected" and any(word in (status["arbiter"]["reason"] or "") for word in ("missing", "went back")):
            self._help(asked, "arm anew", 1.0, lambda: (leader.mcft("unprotect", "vm1", check=False), protect(leader, kind)))

    def _help(self, asked: dict[str, float], name: str, after_s: float, act: Any) -> None:
        """Only what does not come by itself: so much later."""
        first_s = asked.setdefault(name, now())
        if now() - first_s < after_s:
            return
        asked[name] = now() + after_s
        if not name.startswith("power"):
            self.tally.operator += 1
            console.print(f"[dim]operator[/] {name}")
        act()

    # ---- counting ----

    def look(self) -> list[dict[str, Any]]:
        """The events that are new since the last look, of both hosts, with their time in s of CLOCK_BOOTTIME."""
        fresh = []
        offset_s = time.time() - now()
        for host in HOSTS:
            for event in host.events():
                mark = (f"{host} {event['time']}", event["id"])
                if mark not in self.seen:
                    self.seen.add(mark)
                    at_s = datetime.fromisoformat(event["time"].replace("Z", "+00:00")).timestamp() - offset_s
                    fresh.append(event | {"at_s": at_s})
                    if event["kind"] == "take-over" and "runs here now" in event["text"]:
                        self.tally.events["take-overs"] += 1
                        self.switches.append((at_s, host))
        return fresh

    def count(self, faults: list[Fault], at_s: float, back_s: float, load: Load, *, moved: bool) -> None:
        tally, solos = self.tally, self.tally.events["solos"]
        tally.faults.update(fault.name for fault in faults)
        decided_s = []
        for event in self.look():
            text, kind = event["text"], event["kind"]
            tally.events["solos"] += kind == "state" and text.startswith("solo")
            decision = kind == "verdict" or (kind == "state" and text.startswith(("taking-over", "muted", "solo")))
            if decision and at_s <= event["at_s"] <= back_s:
                decided_s.append(event["at_s"])
        if decided_s:
            tally.detection_s.append(min(decided_s) - at_s)
        gap_s = load.observer.gap(at_s, back_s - at_s + 1)
        for fault in faults:
            tally.gaps_s.setdefault(fault.name, []).append(gap_s)
        outcome = "was taken over" if moved else "went on alone" if tally.events["solos"] > solos else "stayed protected"
        tally.outcomes_s.setdefault(outcome, []).append(gap_s)
        tally.settling_s.append(back_s - at_s)

    # ---- the end of a round ----

    def finish(self, primary: Host, load: Load) -> None:
        """Everything acknowledged is there: in memory, on both disks, and after a reboot."""
        load.connection.ask("finish"), load.writer.ask("finish")
        self.tally.lines += settled(load.connection)["echoed"]
        settled(load.writer)
        self.tally.writes += verified(load.writer)
        load.observer.clean()
        self.disks_are_equal(primary)
        leader = other(primary)
        leader.mcft("unprotect", "vm1", timeout=60)
        begun_s = now()
        assert guest("reboot") == "ok"
        until(lambda: _uptime() < now() - begun_s, 90, "the guest has booted anew")
        assert guest("fsck").startswith("rc=0"), guest("fsck")
        self.tally.from_disk += verified(load.writer)

    def disks_are_equal(self, primary: Host) -> None:
        """A quiet guest changes hosts on purpose: what it leaves behind is what it goes on with, byte for byte."""
        guest("sync")
        target = other(primary)
        with ExitStack() as stack:
            for host in HOSTS:
                stack.enter_context(configured(host, NOT_AGAIN))
            until(lambda: all(host.state() == "protected" for host in HOSTS), 20, "protected by the restarted agents")
            assert guest("sync") == "ok"
            primary.mcft("failover", "vm1")
            target.await_state("active", timeout=20)
            target.await_committed()
            self.look()
            sums = {host: host.sh(f"sha256sum {IMAGE}").split()[0] for host in HOSTS}
            assert sums[target] == sums[primary], f"the disks differ after a planned switch of a quiet guest: {sums}"

    def frames_came_from_one_port(self, switch: Client) -> None:
        """Each change of the guest's port on the switch was a take-over that its host recorded."""
        report = switch.ask("report")
        self.tally.frames += sum(report["frames"].values())
        self.switches.sort(key=lambda row: row[0])
        for at_s, port in report["changes"]:
            # Whose it was, and whose it became: the first frame comes a moment before the journal's line.
            was = [host for recorded_s, host in self.switches if recorded_s <= at_s][-1:]
            becomes = [host for recorded_s, host in self.switches if at_s < recorded_s <= at_s + RECORDED_WITHIN_S]
            told = [(round(t, 3), str(h)) for t, h in self.switches]
            fits = any(port == f"{host.key}-lan" for host in was + becomes)
            assert fits, f"frames from {port} at {at_s:.3f}, but recorded were {told}: {report['changes']}"


def at_random(seconds: float) -> Plan:
    """For so long whatever comes."""

    def plan(kind: str, moments: random.Random) -> Iterator[list[Fault]]:
        end_s = now() + seconds
        while now() < end_s:
            pause(moments.uniform(0.2, 1.5))
            yield choose(kind, moments)

    return plan


def each(times: int, word: str) -> Plan:
    """Each fault by itself whose name holds the word, so many times in turn."""

    def plan(kind: str, moments: random.Random) -> Iterator[list[Fault]]:
        for fault in [fault for fault in FAULTS if kind in fault.only and word in fault.name] * times:
            pause(moments.uniform(0.2, 1.5))
            yield [fault]

    return plan


def protect(primary: Host, kind: str) -> None:
    done = primary.mcft("protect", "vm1", "--to", other(primary).name, "--arbiter", kind, check=False, timeout=60)
    if done.returncode and "busy" not in done.stderr:
        console.print(f"[dim]protect[/] exit {done.returncode}: {done.stderr.strip()}")
    primary.await_state("protected", timeout=60)


def _uptime() -> float:
    said = ""
    with suppress(Exception):
        said = lab("guest", "say", "uptime", check=False, timeout=10).stdout.strip()
    return float(said) if said else float("inf")


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else 0.0


def row(values: list[float]) -> list[str]:
    return [f"{v:.2f}" if values else "" for v in (quantile(values, 0.5), quantile(values, 0.99), max(values, default=0.0))]


def table(tally: Tally, seed: int) -> Table:
    made = Table(title=f"chaos, MCFT_SEED={seed}")
    for name in ("", "count", "p50 s", "p99 s", "max s"):
        made.add_column(name, justify="left" if not name else "right")
    for fault in FAULTS:
        if count := tally.faults[fault.name]:
            made.add_row(fault.name, str(count), *row(tally.gaps_s.get(fault.name, [])))
    made.add_section()
    made.add_row("detection (fault to the first decision)", str(len(tally.detection_s)), *row(tally.detection_s))
    everything = [gap for gaps in tally.gaps_s.values() for gap in gaps]
    made.add_row("recovery (the client hears nothing)", str(len(everything)), *row(everything))
    for outcome, gaps_s in sorted(tally.outcomes_s.items()):
        made.add_row(f"… where the guest {outcome}", str(len(gaps_s)), *row(gaps_s))
    made.add_row("protected again", str(len(tally.settling_s)), *row(tally.settling_s))
    made.add_section()
    for name, value in (
        ("take-overs", tally.events["take-overs"]), ("solos", tally.events["solos"]), ("an operator had to help", tally.operator),
        ("acknowledged writes checked, memory", tally.writes), ("… after a reboot, disk", tally.from_disk),
        ("lines through open connections", tally.lines), ("frames at the switch", tally.frames),
        ("violations", len(tally.violations)),
    ):  # fmt: skip
        made.add_row(name, str(value))
    return made


def rounds(kinds: list[str], minutes: float, times: int, word: str) -> Iterator[tuple[str, Plan]]:
    """Each arbiter once; at random: again in turn, by rounds of 5 minutes at most, until the time is over."""
    if times:
        yield from ((kind, each(times, word)) for kind in kinds)
        return
    end_s, number = now() + minutes * 60, 0
    while now() < end_s or number < len(kinds):
        # A round's beginning and end take some 30 s.
        left_s = max(end_s - now(), 0.0) / max(1, len(kinds) - number)
        yield kinds[number % len(kinds)], at_random(min(300.0, max(10.0, left_s - 35.0)))
        number += 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.chaos")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--each", type=int, default=0, help="instead: each fault alone, so many times in turn")
    parser.add_argument("--only", default="", metavar="WORD", help="of those, the faults whose name holds it")
    parser.add_argument("--arbiters", default=",".join(ARBITERS))
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    amount = f"each fault {options.each} times" if options.each else f"{options.minutes:g} minutes"
    console.print(f"chaos: {amount}, MCFT_SEED={seed}; delay and loss on links are left out: no netem here")
    up()
    hosts_on()
    with ExitStack() as stack:
        etcd, bmc = stack.enter_context(all_arbiters())
        chaos = Chaos(seed, etcd, bmc)
        for number, (kind, plan) in enumerate(rounds(options.arbiters.split(","), options.minutes, options.each, options.only)):
            try:
                chaos.round(kind, number, plan)
            except Exception as error:
                chaos.tally.violations.append(f"{kind}, round {number}: {error}")
                console.print(f"[red]VIOLATION[/] {kind}, round {number}: {error}")
                traceback.print_exc()
                for host in HOSTS:
                    for event in host.events()[-30:]:
                        console.print(f"  {host} {event['time']} {event['kind']}: {event['text']}", style="dim", markup=False)
                break
    console.print(table(chaos.tally, seed))
    for violation in chaos.tally.violations:
        console.print(f"VIOLATION: {violation}", markup=False)
    return 1 if chaos.tally.violations else 0


if __name__ == "__main__":
    sys.exit(main())
