"""Fixtures of the lab's tests: one lab for the session, the same world before each test, what was measured at the end.

MCFT_LAB names the instance. MCFT_EVIDENCE=1 runs the long versions. MCFT_SEED repeats an earlier run's random moments.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import world
from watching import Load, Observer

EVIDENCE = bool(os.environ.get("MCFT_EVIDENCE"))
SEED = int(os.environ.get("MCFT_SEED") or random.SystemRandom().randrange(1 << 32))

_measured: dict[str, list[float]] = {}
_failed = [True]  # the first test of a session trusts nothing that it finds
_began_s = [0.0]


@pytest.fixture(scope="session")
def the_lab() -> None:
    if os.geteuid():
        pytest.skip("the lab needs root")
    world.up()


@pytest.fixture(autouse=True)
def fresh_world(the_lab: None) -> None:
    """Before the test and not after it, so that what a failed one left can be looked at."""
    world.restore(thorough=_failed[0])
    _failed[0] = False
    _began_s[0] = world.now()


@pytest.fixture
def moments(request: pytest.FixtureRequest) -> random.Random:
    """Where the random moments of failures come from: the same for the same seed and test."""
    return random.Random(f"{SEED} {request.node.nodeid}")


@pytest.fixture
def load() -> Iterator[Load]:
    """The three observers; a test starts them with `.flowing()` where it wants them to have begun."""
    made = Load()
    yield made
    made.close()


@pytest.fixture
def observer() -> Iterator[Observer]:
    made = Observer()
    yield made
    made.close()


@pytest.fixture
def measure() -> Callable[[str, float], float]:
    """measure("client's gap, kill", 0.21): kept for the summary."""

    def keep(what: str, seconds: float) -> float:
        _measured.setdefault(what, []).append(seconds)
        return seconds

    return keep


@pytest.fixture
def vm2(fresh_world: None) -> Iterator[None]:
    """vm2 runs on h2; afterwards it is nowhere."""
    world.lab("vm", "start", "h2", "vm2")
    try:
        yield
    finally:
        for host in world.HOSTS:
            if not host.on:
                host.power_on()
        for host in world.HOSTS:
            world.until(host.answers, 20, f"{host}: the agent answers")
            host.sh("virsh -q destroy vm2; mcft forget vm2 --local --yes; mcft maintenance off", check=False)
        world.lab("vm", "clean", "vm2")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """A failed test shows what both sides' agents and gates said during it."""
    report = yield
    if report.failed and report.when in ("setup", "call"):
        _failed[0] = True
        for host in world.HOSTS:
            report.sections.append((f"{host}", _journal(host)))
    return report


def _journal(host: world.Host) -> str:
    if not host.on:
        return "it is off"
    since_s = max(world.now() - _began_s[0], 1.0)
    try:
        said = host.sh(
            "journalctl -u mcft-agent -u 'mcft-gate@*' -o short-iso-precise --no-hostname -q -n 60 "
            f"--since -{since_s:.0f}s",
            check=False,
        )
        return f"{host.status()}\n{said}{_threads(host)}"
    except Exception as error:
        return f"its journal can't be read: {error}"


def _threads(host: world.Host) -> str:
    """In what each thread of vm1's QEMU waits: a stalled checkpoint stream shows there, and nowhere else."""
    root, pid = host.root, host.qemu_pid()
    if root is None or pid is None:
        return "vm1 has no QEMU here"
    lines = []
    for task in sorted((root / f"proc/{pid}/task").iterdir()):
        name, wchan, syscall = ((task / what).read_text().strip() for what in ("comm", "wchan", "syscall"))
        lines.append(f"{task.name} {name}: {wchan} {syscall}")
    return "\n".join(lines)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _measured:
        return
    terminalreporter.section(f"measured (MCFT_SEED={SEED})")
    for what, values in sorted(_measured.items()):
        ordered = sorted(values)
        median, worst = ordered[len(ordered) // 2] * 1000, ordered[-1] * 1000
        terminalreporter.write_line(f"{what:<60} median {median:6.0f} ms   worst {worst:6.0f} ms   n={len(ordered)}")
