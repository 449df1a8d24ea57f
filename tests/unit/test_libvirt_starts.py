"""A domain's start takes as long as it takes, while libvirtd answers: `libvirt_bridge` on a daemon made of two calls."""

from __future__ import annotations

import asyncio
import importlib
import sys
import threading
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from mcft.errors import Failed

UUID = "11111111-2222-3333-4444-555555555555"


class LibvirtError(Exception):
    def get_error_code(self) -> int:
        return 0


class Domain:
    def UUIDString(self) -> str:
        return UUID

    name = UUIDString

    def isActive(self) -> int:
        return 1

    isPersistent = isActive

    def state(self) -> list[int]:
        return [3]

    def autostart(self) -> int:
        return 0


class Daemon:
    """Its `createXML` lasts until `started` is set; while `hangs`, it answers nothing else either."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.begun = threading.Event()
        self.over = threading.Event()  # the test is: nothing waits any more
        self.hangs = False
        self.asked = 0

    def isAlive(self) -> int:
        return 1

    def getLibVersion(self) -> int:
        self.asked += 1
        if self.hangs:
            self.over.wait()
        return 11003000

    def createXML(self, _xml: str, _flags: int) -> Domain:
        self.begun.set()
        while not self.started.wait(0.01) and not self.over.is_set():
            pass
        return Domain()

    def lookupByUUIDString(self, _uuid: str) -> Domain:
        return Domain()


@pytest.fixture
def bridge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module on a libvirt that is not there, its deadlines a thousandth of the real ones."""
    binding: Any = ModuleType("libvirt")
    binding.libvirtError = LibvirtError
    binding.VIR_DOMAIN_START_PAUSED = binding.VIR_DOMAIN_SHUTOFF = 1
    binding.VIR_DOMAIN_PAUSED = 3
    monkeypatch.setitem(sys.modules, "libvirt", binding)
    monkeypatch.setitem(sys.modules, "libvirt_qemu", ModuleType("libvirt_qemu"))
    monkeypatch.delitem(sys.modules, "mcft.libvirt_bridge", raising=False)
    module = importlib.import_module("mcft.libvirt_bridge")
    monkeypatch.setattr(module, "START_S", 0.06)
    monkeypatch.setattr(module, "START_MOST_S", 0.24)
    monkeypatch.setattr(module, "LIVENESS_EVERY_S", 1.0)
    monkeypatch.setattr(module, "qemu_pid", lambda _name, _uuid: 4711)
    yield module
    sys.modules.pop("mcft.libvirt_bridge", None)


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    made = Daemon()
    yield made
    made.over.set()


def host(bridge: Any, daemon: Daemon) -> Any:
    made = bridge.LibvirtHost("qemu:///system")
    made._conn = daemon
    return made


async def test_a_slow_start_is_waited_for_while_the_daemon_answers(bridge: Any, daemon: Daemon) -> None:
    """Fails if a start has a fixed deadline: a slow host's QEMU takes more than a minute (400 questions by libvirt)."""
    bridge.START_MOST_S = 3600.0
    starting = asyncio.create_task(host(bridge, daemon).create_paused("<domain/>"))
    await asyncio.to_thread(daemon.begun.wait)
    asked = daemon.asked
    while daemon.asked < asked + 2:  # it is looked after: START_S is over
        assert not starting.done(), starting
        await asyncio.sleep(0.005)
    daemon.started.set()
    assert (await starting).qemu_pid == 4711


async def test_a_daemon_that_answers_nothing_is_not_waited_for(bridge: Any, daemon: Daemon) -> None:
    """Fails if a start on a stopped libvirtd (SIGSTOP, a deadlock) waits for the longest deadline."""
    bridge.START_MOST_S = 3600.0
    daemon.hangs = True
    with pytest.raises(Failed, match="did not answer") as failed:
        await host(bridge, daemon).create_paused("<domain/>")
    assert failed.value.code == "libvirt-timeout"


async def test_no_start_is_waited_for_without_end(bridge: Any, daemon: Daemon) -> None:
    """Fails if a QEMU that never comes up keeps `protect` for ever."""
    began_s = time.monotonic()
    with pytest.raises(Failed) as failed:
        await host(bridge, daemon).create("<domain/>")
    assert failed.value.code == "libvirt-timeout" and time.monotonic() - began_s >= 0.24
