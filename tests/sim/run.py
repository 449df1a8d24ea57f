"""`make sim SECONDS=60 [SEED=n]`: random worlds until the time is over; a failing one is shrunk and told.

0: no violation; 1: one was found (its seed replays it: SEED=n plays that world alone, with its trace).
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import traceback

from tests.sim import faults, play
from tests.sim.faults import Fault
from tests.sim.world import Violation, World

SETTLE_MS = 1500.0


def one(seed: int, rounds: list[list[Fault]], *, trace: bool = False) -> tuple[World, Violation | None]:
    """Play one world. Every exception of the product's or the model's is a violation too."""
    world = play.make(seed, trace=trace)
    found: Violation | None = None
    try:
        world.run(2500.0)
        play.protect(world.hosts[0])
        for number, planned in enumerate(rounds):
            # Sometimes what goes wrong goes wrong in the middle of protecting.
            if random.Random(seed * 8 + number).random() < 0.65:
                play.until_protected(world)
            for fault in planned:
                world.at(fault.at_ms, world.outside, faults.apply, world, fault)
            last = max((fault.at_ms for fault in planned), default=0.0)
            world.run(world.now + last + SETTLE_MS * (1 + number % 2))
            faults.mend(world)
            play.until_it_flows(world)
            if number + 1 == len(rounds):
                play.until_protected(world)
            play.until_settled(world)
            world.note("world", f"round {number + 1} is over")
    except Violation as violation:
        found = violation
    except Exception:
        found = Violation("an exception", traceback.format_exc(limit=-6))
    return world, found


def shrink(seed: int, rounds: list[list[Fault]], kind: str, patience_s: float) -> list[list[Fault]]:
    """Leave out what is not needed for a violation of this kind."""
    end = time.monotonic() + patience_s

    def fails(tried: list[list[Fault]]) -> bool:
        world, found = one(seed, tried)
        play.over(world)
        return found is not None and found.kind == kind

    for number in range(len(rounds), 0, -1):
        while number <= len(rounds) and time.monotonic() < end:
            fewer = rounds[: number - 1] + rounds[number:]
            if not fewer or not fails(fewer):
                break
            rounds = fewer
    for number in range(len(rounds)):
        for fault in list(rounds[number]):
            if time.monotonic() > end:
                return rounds
            fewer = [[f for f in planned if f is not fault] for planned in rounds]
            if fails(fewer):
                rounds = fewer
    return rounds


def tell(seed: int, rounds: list[list[Fault]], lines: int) -> None:
    """Play it once more with its trace, from a little before the first fault on."""
    world, found = one(seed, rounds, trace=True)
    print(f"\nseed {seed}: {found}\n")
    assert world.trace is not None
    for number, planned in enumerate(rounds):
        for fault in planned:
            print(f"  round {number + 1}: {fault}")
    first = next((i for i, line in enumerate(world.trace) if "FAULT" in line), len(world.trace))
    shown = world.trace[max(0, first - 4):]
    print("\n".join([*shown[:20], "…", *shown[-lines:]] if len(shown) > lines + 20 else shown))
    play.over(world)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.run")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--steps", type=int, default=0, help="go on until so many steps, whatever the time")
    parser.add_argument("--first", type=int, default=None, help="the first seed (default: from the clock)")
    parser.add_argument("--lines", type=int, default=60, help="of a failing world's trace")
    parser.add_argument("--no-shrink", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="seconds are of CPU: on a busy machine it takes longer")
    parser.add_argument("--keep-going", action="store_true", help="tell every violation in a line and go on")
    asked = parser.parse_args()
    if asked.seed is not None:
        world, found = one(asked.seed, faults.plan(asked.seed), trace=True)
        assert world.trace is not None
        print("\n".join(world.trace))
        print(f"seed {asked.seed}: {world.steps} steps, {world.now / 1000:.1f} s of its time: {found or 'no violation'}")
        play.over(world)
        return 1 if found else 0
    clock = time.process_time if asked.cpu else time.monotonic
    began = clock()
    first = asked.first if asked.first is not None else int(time.time() * 1000) % 1_000_000_000
    counts: dict[str, int] = {}
    steps = worlds = violations = 0
    lived = 0.0
    seed = first
    print(f"seeds from {first}", flush=True)
    while steps < asked.steps or (not asked.steps and clock() - began < asked.seconds):
        rounds = faults.plan(seed)
        world, found = one(seed, rounds)
        steps, worlds, lived = steps + world.steps, worlds + 1, lived + world.now
        for kind, number in world.counts.items():
            counts[kind] = counts.get(kind, 0) + number
        play.over(world)
        if found is not None:
            violations += 1
            if asked.keep_going:
                print(f"seed {seed}: {str(found)[:300]}", flush=True)
            else:
                if not asked.no_shrink:
                    rounds = shrink(seed, rounds, found.kind, 60.0)
                tell(seed, rounds, asked.lines)
                break
        seed += 1
    took = clock() - began
    print(f"{worlds} worlds (seeds {first} to {first + worlds - 1}), {lived / 1000:.0f} s of their time, "
          f"{steps} steps, {steps / took:.0f} steps/s")  # fmt: skip
    for kind in sorted(counts):
        print(f"{counts[kind]:8}  {kind}")
    print(f"violations: {violations}")
    return 1 if violations else 0


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # sets of strings in the same order each time
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.sim.run", *sys.argv[1:]])
    sys.exit(main())
