"""Descriptors that libvirt can't hand over (before 8.2): refused in words by the bridge, done without for the monitor."""

from __future__ import annotations

import asyncio
import importlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from mcft import qmp_passthrough
from mcft.errors import Failed
from mcft.qmp_passthrough import Qmp, add_monitor, own_folder

UUID = "11111111-2222-3333-4444-555555555555"


class Daemon:
    """A libvirtd of this version, and what it was sent."""

    def __init__(self, version: int) -> None:
        self.version, self.sent = version, 0

    def isAlive(self) -> int:
        return 1

    def getLibVersion(self) -> int:
        return self.version

    def lookupByUUIDString(self, _uuid: str) -> Daemon:
        return self

    def take(self, *_: Any) -> str:
        self.sent += 1
        return '{"return": {}}'


@pytest.fixture
def bridge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module on a binding that has the call with files."""
    for name in ("libvirt", "libvirt_qemu"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    binding: Any = sys.modules["libvirt"]
    binding.libvirtError = type("libvirtError", (Exception,), {})
    calls: Any = sys.modules["libvirt_qemu"]
    calls.qemuMonitorCommandWithFiles = calls.qemuMonitorCommand = lambda domain, *_: domain.take()
    monkeypatch.delitem(sys.modules, "mcft.libvirt_bridge", raising=False)
    yield importlib.import_module("mcft.libvirt_bridge")
    sys.modules.pop("mcft.libvirt_bridge", None)


async def getfd(bridge: Any, daemon: Daemon) -> Any:
    host = bridge.LibvirtHost("qemu:///system")
    host._conn = daemon
    return await host.qmp(UUID, {"execute": "getfd"}, [0])


@pytest.mark.parametrize("version", [7_000_000, 8_001_000])
async def test_an_old_daemon_is_not_sent_descriptors(bridge: Any, version: int) -> None:
    """Fails if a new binding sends them to a libvirtd that says "unknown procedure: 7" (seen with 7.0)."""
    daemon = Daemon(version)
    with pytest.raises(Failed, match=r"libvirtd is [78]\.[01]\.0") as failed:
        await getfd(bridge, daemon)
    assert failed.value.code == "old-libvirt" and daemon.sent == 0


async def test_an_old_binding_sends_none(bridge: Any) -> None:
    """Fails if a missing call of the binding is an AttributeError."""
    del bridge.libvirt_qemu.qemuMonitorCommandWithFiles
    with pytest.raises(Failed, match="Python binding") as failed:
        await getfd(bridge, Daemon(11_003_000))
    assert failed.value.code == "old-libvirt"


async def test_a_new_daemon_is(bridge: Any) -> None:
    """Fails if 8.2 itself is taken for too old."""
    daemon = Daemon(8_002_000)
    assert await getfd(bridge, daemon) == {"return": {}} and daemon.sent == 1


class FakeQmp:
    """NOT QEMU: `chardev-add` listens where it is told."""

    uuid = UUID

    def __init__(self) -> None:
        self.host = SimpleNamespace(info=self._info)
        self.commands: list[str] = []
        self.listener: socket.socket | None = None

    async def _info(self, _uuid: str) -> Any:
        return SimpleNamespace(qemu_pid=4_194_305)

    async def pass_fd(self, _name: str, _fd: int) -> None:
        raise Failed("old-libvirt", "this libvirt can't hand descriptors to QEMU")

    async def execute(self, command: str, **arguments: Any) -> Any:
        self.commands.append(command)
        if command == "chardev-add":
            address = arguments["backend"]["data"]["addr"]
            assert address["type"] == "unix"
            self.listener = socket.socket(socket.AF_UNIX)
            self.listener.bind(address["data"]["path"])
            self.listener.listen(1)


async def test_a_monitor_without_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if engine colo gets no monitor where libvirt hands no descriptors over, or one that is not at its usual path."""
    monkeypatch.setattr(qmp_passthrough, "own_folder", lambda pid: str(tmp_path) if pid == 4_194_305 else "")
    qmp, path = FakeQmp(), tmp_path / "run" / "vm1.sock"
    for _ in range(2):  # the first one's link dangles: its QEMU ended
        await add_monitor(cast(Qmp, qmp), str(path))
        assert qmp.commands[-2:] == ["chardev-add", "object-add"] and qmp.listener is not None
        with socket.socket(socket.AF_UNIX) as client:
            await asyncio.to_thread(client.connect, str(path))
        qmp.listener.close()
        (tmp_path / "mcft.sock").unlink()


async def test_a_monitor_that_qemu_has_no_room_for(tmp_path: Path) -> None:
    """Fails if anything but libvirt's own refusal is said where QEMU's folder isn't known (no process has that number)."""
    with pytest.raises(Failed) as failed:
        await add_monitor(cast(Qmp, FakeQmp()), str(tmp_path / "vm1.sock"))
    assert failed.value.code == "old-libvirt"


@pytest.mark.parametrize("word", ["secret,id=masterKey0,format=raw,file=%s", '{"qom-type":"secret","file":"%s","id":"m"}'])
def test_its_own_folder_is_read_from_its_command_line(word: str) -> None:
    """Fails if the folder is not found as old and newer libvirts write it, or one is made up."""
    key = "/var/lib/libvirt/qemu/domain-1-vm1/master-key.aes"
    for argument, folder in ((word % key, "/var/lib/libvirt/qemu/domain-1-vm1"), ("nothing", "")):
        words = ["cat", "-u", "--", "/dev/fd/0", argument]
        with subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(b"x")
            assert process.stdout.read(1) == b"x"  # it runs: its command line is there
            assert own_folder(process.pid) == folder
    assert own_folder(0) == ""
