"""Tests of `libvirt_bridge` on a real libvirtd 7.0 with QEMU 5.2, as root: `make test-oldlibvirt`."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import guests


def pytest_configure(config: pytest.Config) -> None:
    if not Path(guests.NEWER).exists():
        pytest.exit("these tests need libvirtd 7.0, which lab/old --lab runs (root): make test-oldlibvirt", 2)
    try:
        import libvirt  # noqa: F401
        import libvirt_qemu  # noqa: F401
    except ImportError as error:
        pytest.exit(f"these tests need libvirt's binding for the venv's Python, which is the distribution's: {error}", 2)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A skipped test has shown nothing: it counts as a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = 1


class Heard:
    """What `LibvirtHost` handed on, in order: (uuid, event, detail) of lifecycles, (uuid, message) of QEMU's events."""

    def __init__(self) -> None:
        self.lifecycle: list[tuple[str, str, int]] = []
        self.disk: list[tuple[str, dict[str, Any]]] = []
        self.watched: list[tuple[str, dict[str, Any]]] = []

    def of(self, uuid: str) -> list[str]:
        return [event for whose, event, _ in self.lifecycle if whose == uuid]

    def details(self, uuid: str, event: str) -> list[int]:
        return [detail for whose, what, detail in self.lifecycle if (whose, what) == (uuid, event)]

    def named(self, uuid: str) -> list[str]:
        return [message["event"] for whose, message in self.watched if whose == uuid]


async def comes(what: str, true: Callable[[], object], within_s: float = 20.0) -> None:
    end_s = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end_s, f"not within {within_s:g} s: {what}"
        await asyncio.sleep(0.02)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture(scope="session")
def bridge() -> str:
    """One with an IPv4 address: where only IPv6 has one, a libvirtd that listens on 127.0.0.1 does not start."""
    subprocess.run(["ip", "link", "add", "br-old", "type", "bridge"], check=True)
    subprocess.run(["ip", "address", "add", "10.77.0.1/24", "dev", "br-old"], check=True)
    subprocess.run(["ip", "link", "set", "br-old", "up"], check=True)
    return "br-old"


@pytest.fixture
async def host(heard: Heard) -> AsyncIterator[Any]:
    """As the agent has it (`agent/main.py`). Every domain is gone afterwards."""
    from mcft.libvirt_bridge import LibvirtHost

    guests.SHARED.mkdir(mode=0o777, exist_ok=True)
    guests.SHARED.chmod(0o777)
    made = LibvirtHost("qemu:///system", lambda uuid, event, detail: heard.lifecycle.append((uuid, event, detail)))
    made.on_disk_event = lambda uuid, message: heard.disk.append((uuid, message))
    made.on_watched_event = lambda uuid, message: heard.watched.append((uuid, message))
    await made.start()
    yield made
    for domain in await made.call(lambda conn: conn.listAllDomains(0)):
        uuid = domain.UUIDString()
        await made.destroy(uuid)
        if (info := await made.find(uuid)) is not None and info.persistent:
            await made.undefine(uuid)
    made._loop = None  # what comes now is nobody's
    await made.call(lambda conn: conn.close())
