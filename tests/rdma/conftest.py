"""Tests of the RDMA keepalive on rxe, in a VM as root: `make test-rdma`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fabric import Fabric


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "evidence: with MCFT_EVIDENCE=1 only")
    if os.geteuid() or not Path("/sys/module/rdma_rxe").exists():
        pytest.exit("these tests need root and rdma_rxe: make test-rdma", 2)
    try:
        importlib.import_module("pyverbs.device")
    except ImportError as error:
        pytest.exit(f"these tests need pyverbs for the venv's Python, which is the distribution's: {error}", 2)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What only gives figures waits for MCFT_EVIDENCE=1: gates start slowly there."""
    if os.environ.get("MCFT_EVIDENCE"):
        return
    figures = [item for item in items if item.get_closest_marker("evidence")]
    config.hook.pytest_deselected(items=figures)
    items[:] = [item for item in items if item not in figures]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """At once: a VM that runs out of its time tells nothing afterwards."""
    if report.failed:
        print(f"\n{report.nodeid}\n{report.longreprtext[-3000:]}", flush=True)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A skipped test has shown nothing: it counts as a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = 1


@pytest.fixture(scope="session")
def wire() -> Fabric:
    return Fabric()


@pytest.fixture
def fabric(wire: Fabric) -> Iterator[Fabric]:
    """Whole before each test: after the one before it."""
    yield wire
    wire.mend()
