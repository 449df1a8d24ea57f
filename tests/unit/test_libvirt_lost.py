"""A daemon that was restarted is connected to anew, also behind another one: `libvirt_bridge` on connections of two calls."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mcft.errors import Failed
from mcft.libvirt_unit import daemon_unit


class LibvirtError(Exception):
    def get_error_code(self) -> int:
        return 1  # VIR_ERR_INTERNAL_ERROR: "client socket is closed"


class Connection:
    """To virtproxyd: alive whatever happens. behind: virtqemud has its other end still; deaf: it takes no registration."""

    deaf = False

    def __init__(self) -> None:
        self.behind = True

    def isAlive(self) -> int:
        return 1

    def getLibVersion(self) -> int:
        if not self.behind:
            raise LibvirtError("client socket is closed")
        return 11_003_000

    def setKeepAlive(self, _every: int, _times: int) -> None:
        pass

    def domainEventRegisterAny(self, *_: Any) -> int:
        if self.deaf:
            raise LibvirtError("client socket is closed")
        return 0


@pytest.fixture
def opened() -> list[Connection]:
    return []


@pytest.fixture
def bridge(monkeypatch: pytest.MonkeyPatch, opened: list[Connection]) -> Iterator[Any]:
    binding: Any = ModuleType("libvirt")
    binding.libvirtError = LibvirtError
    for number, name in enumerate(("INTERNAL_ERROR", "NO_DOMAIN", "RPC", "SYSTEM_ERROR", "NO_CONNECT"), 1):
        setattr(binding, f"VIR_ERR_{name}", number)
    binding.VIR_DOMAIN_EVENT_ID_LIFECYCLE = 0
    binding.open = lambda _uri: opened.append(Connection()) or opened[-1]  # type: ignore[func-returns-value]
    calls: Any = ModuleType("libvirt_qemu")
    calls.qemuMonitorEventRegister = lambda *_: 0
    monkeypatch.setitem(sys.modules, "libvirt", binding)
    monkeypatch.setitem(sys.modules, "libvirt_qemu", calls)
    monkeypatch.delitem(sys.modules, "mcft.libvirt_bridge", raising=False)
    yield importlib.import_module("mcft.libvirt_bridge")
    sys.modules.pop("mcft.libvirt_bridge", None)


async def test_a_daemon_restarted_behind_virtproxyd_is_connected_to_anew(bridge: Any, opened: list[Connection]) -> None:
    """Fails if isAlive alone is believed: each call then failed until the agent's restart (seen in the lab with 11.3)."""
    host = bridge.LibvirtHost("qemu+tcp://localhost/system")
    await host.call(lambda conn: conn.getLibVersion())
    opened[0].behind = False
    assert await host.call(lambda conn: conn.getLibVersion()) == 11_003_000
    assert len(opened) == 2


async def test_a_call_that_failed_alone_costs_no_connection(bridge: Any, opened: list[Connection]) -> None:
    """Fails if any internal error of libvirt makes the agent connect anew, and do the act twice."""
    done = []

    def work(conn: Connection) -> None:
        done.append(conn)
        raise LibvirtError("cannot do this")

    with pytest.raises(Failed, match="cannot do this"):
        await bridge.LibvirtHost("qemu:///system").call(work)
    assert len(done) == len(opened) == 1


async def test_a_connection_that_hears_no_events_is_not_kept(bridge: Any, opened: list[Connection]) -> None:
    """Fails if a daemon that goes away between `open` and the registration leaves a connection that is used deaf."""
    host = bridge.LibvirtHost("qemu:///system")
    Connection.deaf = True
    try:
        with pytest.raises(Failed, match="socket is closed"):
            await host.call(lambda conn: conn.getLibVersion())
    finally:
        Connection.deaf = False
    before = len(opened)
    await host.call(lambda conn: conn.getLibVersion())
    assert len(opened) == before + 1


def test_the_unit_is_the_one_whose_socket_is_there(tmp_path: Path) -> None:
    """Fails if people with modular daemons are told to restart libvirtd: starting that one ends virtqemud."""
    assert daemon_unit(str(tmp_path)) == "libvirtd"
    (tmp_path / "virtqemud-sock").touch()
    assert daemon_unit(str(tmp_path)) == "virtqemud"
