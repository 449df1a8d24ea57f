"""The files under a standby's copy: what they are on the primary, and how they are made here.

A disk's file is new, empty and as sparse as the primary's; one that takes all its space there (or `[disks] reserve =
"full"`) takes it here too, beforehand. Owner, group and mode are those that the primary's file gets back when its guest
ends: libvirt of either host gives the file to its QEMU at start, and remembers them (`security_driver.c`, extended
attribute `trusted.libvirt.security.dac`). The firmware's variables (NVRAM) are copied with the same care.
"""

from __future__ import annotations

import contextlib
import grp
import hashlib
import os
import pwd
import stat
import zlib
from typing import TYPE_CHECKING, Any

from mcft.agent import model
from mcft.agent.process import run
from mcft.diskreplica import Disk
from mcft.errors import Failed, Refused
from mcft.units import format_bytes

if TYPE_CHECKING:  # so that it can be tested without libvirt
    from mcft.libvirt_bridge import Pool

NVRAM = "nvram"  # what the file of the firmware's variables is called among the disks' targets
NVRAM_MAX_BYTES = 512 << 10  # as it is sent, packed; a message between agents holds 1 MiB
ALLOCATE_S = 60.0
OVERLAYS_BYTES = 256 << 20  # per disk: what is written between two checkpoints, with its old content; emptied at each
_REMEMBERED = "trusted.libvirt.security.dac"  # "+UID:+GID", as long as libvirt has given the file to QEMU

# ---- on the primary ----


def look(path: str, taken_bytes: int) -> model.DiskFile:
    """A file as the other host shall make it. Raises: OSError."""
    info = os.stat(path)
    uid, gid = info.st_uid, info.st_gid
    # Without it libvirt did not touch the file, or the file system has no such attributes.
    with contextlib.suppress(OSError, ValueError):
        uid, gid = _owner(os.getxattr(path, _REMEMBERED))
    return model.DiskFile(taken_bytes, _user(uid), _group(gid), stat.S_IMODE(info.st_mode))


def _owner(remembered: bytes) -> tuple[int, int]:
    uid, gid = remembered.rstrip(b"\0").split(b":")
    return int(uid), int(gid)


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def read_nvram(path: str) -> model.Nvram:
    """The firmware's variables, packed. Raises: Refused if they can't be read or are too many."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        about = look(path, len(content))
    except OSError as error:
        raise Refused(
            "nvram-unreadable", f"the firmware's variables in {path} can't be read", error.strerror or str(error),
            "look at that file",
        ) from None  # fmt: skip
    packed = zlib.compress(content)
    if len(packed) > NVRAM_MAX_BYTES:
        raise Refused(
            "nvram-too-big", f"the firmware's variables in {path} are {format_bytes(len(packed))} packed",
            f"at most {format_bytes(NVRAM_MAX_BYTES)} are sent to the other host", "is that the right file?",
        )  # fmt: skip
    return model.Nvram(path, packed, hashlib.sha256(content).hexdigest(), about)


async def taken_bytes(life: Any) -> dict[str, int]:
    """Target → what the disk, with its backing chain, takes now. QEMU: `query-block`."""
    nodes: dict[str, int] = {}
    for row in await life.qmp.execute("query-block"):
        if inserted := row.get("inserted"):
            nodes[inserted.get("node-name", "")] = chain_bytes(inserted.get("image", {}))
    return {disk.target: nodes.get(disk.node, 0) for disk in life.body.disks}


def chain_bytes(image: dict[str, Any]) -> int:
    """actual-size of an image and of all that back it. QEMU: `ImageInfo`."""
    total = 0
    while image:
        total += int(image.get("actual-size", 0))
        image = image.get("backing-image", {})
    return total


async def of_domain(life: Any) -> dict[str, model.DiskFile]:
    """Target → its file, for `prepare`; a disk whose file can't be looked at is only sized."""
    found = {}
    taken = await taken_bytes(life)
    for disk in life.body.disks:
        try:
            found[disk.target] = look(disk.path, taken[disk.target])
        except OSError:
            found[disk.target] = model.DiskFile(taken[disk.target])
    return found


# ---- on the standby ----


def paths(request: model.Prepare) -> dict[str, str]:
    """Target → its file here; the firmware's variables among them."""
    found = {disk.target: request.disk_paths.get(disk.target, disk.path) for disk in request.disks}
    return found | ({NVRAM: request.nvram.path} if request.nvram else {})


def whole(disk: Disk, file: model.DiskFile, reserve: str) -> bool:
    """Whether all of the disk's space is taken beforehand."""
    return reserve == "full" or file.taken_bytes >= disk.size_bytes


def needs(disk: Disk, file: model.DiskFile, reserve: str) -> tuple[int, int]:
    """(bytes that the copy of this disk takes at once, bytes that it may come to), its overlays included. Pure."""
    overlays = min(2 * disk.size_bytes, OVERLAYS_BYTES)
    now = disk.size_bytes if whole(disk, file, reserve) else file.taken_bytes
    return now + overlays, disk.size_bytes + overlays


async def make(path: str, disk: Disk, file: model.DiskFile, reserve: str) -> None:
    """An empty file that reads as zeroes, in place of whatever is there. Raises: Failed, Refused ("no-room")."""
    temporary = _beside(path)
    allocate = ["-o", "preallocation=falloc"] if whole(disk, file, reserve) else []
    try:
        await run(
            "qemu-img", "create", "-q", "-f", disk.format, *allocate, temporary, str(disk.size_bytes), timeout_s=ALLOCATE_S
        )
        _own(temporary, path, file)
        os.replace(temporary, path)
    except Failed as error:
        if "No space left" in str(error):
            raise Refused("no-room", f"no room for disk {disk.target} in {os.path.dirname(path)}", str(error)) from None
        raise
    finally:
        _remove(temporary)


def make_nvram(nvram: model.Nvram, path: str) -> None:
    """The firmware's variables as they are on the primary, durable. Raises: Failed ("nvram-garbled"), OSError."""
    content = zlib.decompress(nvram.data)
    temporary = _beside(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with open(temporary, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != nvram.sha256:
                raise Failed("nvram-garbled", f"the firmware's variables did not arrive whole in {path}", "", "try again")
        _own(temporary, path, nvram.file)
        os.replace(temporary, path)
    finally:
        _remove(temporary)


def _beside(path: str) -> str:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return f"{path}.mcft-new"


def _remove(path: str) -> None:
    if os.path.exists(path):
        os.unlink(path)


def _own(temporary: str, path: str, file: model.DiskFile) -> None:
    """As the file that it replaces; else as the primary's, by name. Root's where this host has no such name."""
    if os.path.exists(path):
        there = look(path, 0)
        file = model.DiskFile(0, there.user, there.group, there.mode)
    os.chown(temporary, _number(file.user, _uid), _number(file.group, _gid))
    os.chmod(temporary, file.mode)


def _uid(name: str) -> int:
    return pwd.getpwnam(name).pw_uid


def _gid(name: str) -> int:
    return grp.getgrnam(name).gr_gid


def _number(name: str, known: Any) -> int:
    try:
        return int(known(name))
    except KeyError:
        return 0


# ---- libvirt's storage pools ----


def refuse_unmounted(pools: list[Pool], path: str, host: str) -> None:
    """Raises: Refused ("pool-inactive") for a path below a pool that is a mount and is not there now."""
    for pool in pools:
        if pool.mounted and not pool.active and pool.target and path.startswith(f"{pool.target.rstrip('/')}/"):
            raise Refused(
                "pool-inactive", f"{path} lies in the storage pool {pool.name}, which is not active on {host}",
                "the disk would land below the mount point", f"on {host}: virsh pool-start {pool.name}",
            )  # fmt: skip


def pools_of(pools: list[Pool], files: list[str]) -> list[str]:
    """Names of the active pools whose volumes the files are: those that lie directly in a pool's target. Pure."""
    folders = {os.path.realpath(os.path.dirname(path)) for path in files}
    return [pool.name for pool in pools if pool.active and pool.target and os.path.realpath(pool.target) in folders]
