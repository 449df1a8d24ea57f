"""Tests on a kernel that has plug and IFB, as root, each in a network namespace of its own: `make test-plug`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcft.netbuffer import kernel_has_plug

sys.path.insert(0, str(Path(__file__).parent))
from frames import Wire


def pytest_configure(config: pytest.Config) -> None:
    if os.geteuid() or not kernel_has_plug():
        pytest.exit("these tests need root on a kernel with sch_plug and ifb: make test-plug", 2)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A skipped test has shown nothing: it counts as a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = 1


@pytest.fixture
def wire() -> Iterator[Wire]:
    """A guest's tap on a bridge, and the outside."""
    with Wire() as made:
        yield made


@pytest.fixture
def two() -> Iterator[Wire]:
    """A guest with two taps."""
    with Wire(taps=("vnet0", "vnet1")) as made:
        yield made
