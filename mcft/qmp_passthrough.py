"""Typed QMP calls through libvirt's monitor passthrough: the one place where a QMP error becomes an exception.

`Qmp` is what engines and the disk replica are given; a test can give them anything that has `execute`.
QEMU: `docs/interop/qmp-spec.rst`, `qapi/*.json`.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, Protocol

from mcft.errors import Failed

if TYPE_CHECKING:  # so that what knows no libvirt can be tested without it
    from mcft.libvirt_bridge import LibvirtHost


class QmpError(Failed):
    """QEMU refused a command. qmp_class: `GenericError`, `CommandNotFound`, `DeviceNotFound`…"""

    def __init__(self, command: str, qmp_class: str, desc: str) -> None:
        super().__init__("qmp", f"QEMU refused {command}: {desc}")
        self.command, self.qmp_class, self.desc = command, qmp_class, desc


class Executor(Protocol):
    """Anything that carries out QMP commands, one or several in a row."""

    async def execute(self, command: str, **arguments: Any) -> Any: ...


def wire(arguments: dict[str, Any]) -> dict[str, Any]:
    """Python's names as QMP's (`node_name` → `node-name`); what already has a dash or is nested is left alone."""
    return {name.replace("_", "-"): value for name, value in arguments.items() if value is not None}


def result(command: str, reply: dict[str, Any]) -> Any:
    """The `return` of a reply. Raises: QmpError."""
    if "error" in reply:
        raise QmpError(command, str(reply["error"].get("class", "")), str(reply["error"].get("desc", reply["error"])))
    return reply.get("return")


class Qmp:
    """The passthrough of one running domain."""

    def __init__(self, host: LibvirtHost, uuid: str) -> None:
        self.host, self.uuid = host, uuid

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run one command; underscores in argument names become dashes, None is left out. Raises: QmpError, Failed."""
        body: dict[str, Any] = {"execute": command}
        if wired := wire(arguments):
            body["arguments"] = wired
        return result(command, await self.host.qmp(self.uuid, body))

    async def attempt(self, command: str, **arguments: Any) -> str:
        """`execute` for undo: the error's text instead of an exception, empty if it went well."""
        try:
            await self.execute(command, **arguments)
        except Failed as error:
            return error.message
        return ""

    async def pass_fd(self, name: str, fd: int) -> None:
        """`getfd`: QEMU keeps a duplicate under this name until a chardev takes it."""
        await self._with_fds({"execute": "getfd", "arguments": {"fdname": name}}, fd)

    async def _with_fds(self, command: dict[str, Any], *fds: int) -> Any:
        return result(command["execute"], await self.host.qmp(self.uuid, command, fds))

    async def status(self) -> str:
        """`query-status`' status word: running, paused, colo, inmigrate…"""
        return str((await self.execute("query-status"))["status"])


async def add_monitor(qmp: Qmp, path: str) -> None:
    """Add mcft's own monitor while the domain runs; QEMU listens on a socket that it is handed, root alone reaches it.

    Before libvirt 8.2 nothing can be handed over: it listens on its own, which its user reaches too; path is a link to it.
    QEMU >= 11.1: `chardev-add` + `object-add monitor-qmp`. Raises: QmpError, Failed.
    """
    import socket

    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    if os.path.lexists(path):
        os.unlink(path)
    address: dict[str, Any] = {"type": "fd", "data": {"str": "mcft-mon-fd"}}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(1)
        try:
            await qmp.pass_fd("mcft-mon-fd", listener.fileno())
        except Failed as error:
            if error.code != "old-libvirt" or not (folder := own_folder((await qmp.host.info(qmp.uuid)).qemu_pid)):
                raise
            address = {"type": "unix", "data": {"path": os.path.join(folder, "mcft.sock")}}
            os.unlink(path)
            os.symlink(address["data"]["path"], path)
    backend = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
    await qmp.execute("chardev-add", id="mcft-mon", backend=backend)
    await qmp.execute("object-add", **{"qom-type": "monitor-qmp"}, id="mcft-qmp", chardev="mcft-mon")


def own_folder(qemu_pid: int) -> str:
    """libvirt's folder for this QEMU alone, where it may make a socket whatever confines it; empty if it isn't known.

    `/var/lib/libvirt/qemu/domain-ID-NAME`: the master key is in it, and QEMU was told where.
    """
    try:
        with open(f"/proc/{qemu_pid}/cmdline", "rb") as file:
            found = re.search(rb"(/[^\0\",]+)/master-key\.aes", file.read())
    except OSError:
        return ""
    return os.fsdecode(found[1]) if found else ""


async def remove_monitor(qmp: Qmp, path: str) -> None:
    """Take it away again; what is not there is fine."""
    objects = {row["name"] for row in await qmp.execute("qom-list", path="/objects")}
    if "mcft-qmp" in objects:
        await qmp.execute("object-del", id="mcft-qmp")
    chardevs = {row["label"] for row in await qmp.execute("query-chardev")}
    if "mcft-mon" in chardevs:
        await qmp.execute("chardev-remove", id="mcft-mon")
    if os.path.lexists(path):
        os.unlink(path)
