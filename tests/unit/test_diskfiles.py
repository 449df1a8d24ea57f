"""The files under a standby's copy: what is told of them on the primary, and how they are made on the standby."""

from __future__ import annotations

import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from mcft.agent import diskfiles, model
from mcft.diskreplica import Disk
from mcft.errors import Failed, Refused

MIB = 1 << 20
needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed here")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@dataclass(frozen=True)
class Pool:
    """As `libvirt_bridge.Pool`, which needs libvirt's binding."""

    name: str
    target: str
    active: bool = True
    mounted: bool = False


def disk(size_bytes: int = 8 * MIB, kind: str = "raw") -> Disk:
    return Disk("vda", "/dev", "node", size_bytes, "/srv/vm.img", kind, True)


def request(**fields: object) -> model.Prepare:
    values: dict[str, object] = dict.fromkeys(("uuid", "domain", "pid", "key", "engine", "xml", "persistent_xml"), "")
    values |= {"g": 1, "delay_ms": 100, "loss_ms": 300, "autostart": False, "disks": [disk()], "primary_ports": []}
    return msgspec.convert(values | fields, model.Prepare)


# ---- what is told ----


def test_owner_is_what_libvirt_gives_back_at_the_end() -> None:
    assert diskfiles._owner(b"+64055:+108") == (64055, 108)
    assert diskfiles._owner(b"+0:+0\0") == (0, 0)


def test_a_file_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x")
    path.chmod(0o640)
    seen = diskfiles.look(str(path), 7)
    assert (seen.taken_bytes, seen.mode) == (7, 0o640)
    assert diskfiles._number(seen.user, diskfiles._uid) == path.stat().st_uid


def test_an_owner_that_is_not_known_here_is_root() -> None:
    """Never the same number: that may be anybody here."""
    assert diskfiles._number("nobody-of-this-name", diskfiles._uid) == 0
    assert diskfiles._number("64055", diskfiles._uid) == 0


# ---- space ----


@pytest.mark.parametrize(
    ("taken", "reserve", "at_once"),
    [(0, "used", 0), (3 * MIB, "used", 3 * MIB), (8 * MIB, "used", 8 * MIB), (9 * MIB, "used", 8 * MIB), (0, "full", 8 * MIB)],
)
def test_what_a_copy_needs(taken: int, reserve: str, at_once: int) -> None:
    """Its overlays are counted; fails if a thick disk counts as thin, or a chain for more than the disk."""
    now, most = diskfiles.needs(disk(), model.DiskFile(taken), reserve)
    assert (now - 16 * MIB, most) == (at_once, 24 * MIB)


def test_overlays_are_bounded() -> None:
    now, most = diskfiles.needs(disk(1 << 40), model.DiskFile(), "used")
    assert now == diskfiles.OVERLAYS_BYTES and most == (1 << 40) + now


@needs_qemu_img
@needs_root
@pytest.mark.parametrize(("taken", "reserve", "thick"), [(MIB, "used", False), (8 * MIB, "used", True), (MIB, "full", True)])
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
async def test_sparse_stays_sparse_and_thick_thick(tmp_path: Path, taken: int, reserve: str, thick: bool, kind: str) -> None:
    path = tmp_path / "new" / "disk"
    await diskfiles.make(str(path), disk(kind=kind), model.DiskFile(taken, "root", "root", 0o640), reserve)
    assert (path.stat().st_blocks * 512 >= 8 * MIB) is thick
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(path.parent) == ["disk"]


@needs_qemu_img
async def test_what_can_not_be_made_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Failed):
        await diskfiles.make(str(tmp_path / "disk"), disk(-1), model.DiskFile(), "used")
    assert not list(tmp_path.iterdir())


# ---- the firmware's variables ----


@needs_root
def test_nvram_arrives_as_it_was(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "a_VARS.fd", tmp_path / "there" / "a_VARS.fd"
    ours.write_bytes(os.urandom(1000) + bytes(MIB))
    ours.chmod(0o600)
    sent = msgspec.json.decode(msgspec.json.encode(diskfiles.read_nvram(str(ours))), type=model.Nvram)
    assert len(sent.data) < 10_000
    diskfiles.make_nvram(sent, str(theirs))
    assert theirs.read_bytes() == ours.read_bytes() and stat.S_IMODE(theirs.stat().st_mode) == 0o600
    garbled = msgspec.structs.replace(sent, sha256="0" * 64)
    with pytest.raises(Failed, match="whole"):
        diskfiles.make_nvram(garbled, str(theirs))
    assert theirs.read_bytes() == ours.read_bytes() and os.listdir(theirs.parent) == ["a_VARS.fd"]


def test_nvram_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="can't be read"):
        diskfiles.read_nvram(str(tmp_path / "none"))
    (tmp_path / "disk").write_bytes(os.urandom(MIB))
    with pytest.raises(Refused, match="packed"):
        diskfiles.read_nvram(str(tmp_path / "disk"))


def test_files_of_a_copy() -> None:
    """The firmware's variables are one of them, under the same rules for overwriting."""
    assert diskfiles.paths(request(disk_paths={"vda": "/x/y"})) == {"vda": "/x/y"}
    both = diskfiles.paths(request(nvram={"path": "/n", "data": "", "sha256": ""}))
    assert both == {"vda": "/srv/vm.img", "nvram": "/n"}


# ---- pools ----


def test_pools_that_get_to_know_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    pools = [Pool("a", str(tmp_path)), Pool("b", f"{tmp_path}/link/"), Pool("off", str(tmp_path), False), Pool("up", "/")]
    assert diskfiles.pools_of(pools, [str(tmp_path / "disk")]) == ["a", "b"]  # type: ignore[arg-type]
    assert diskfiles.pools_of(pools, []) == []  # type: ignore[arg-type]


def test_a_path_below_a_mount_that_is_not_there_is_refused() -> None:
    pools = [Pool("nfs", "/srv/nfs", False, True), Pool("dir", "/srv/dir", False)]
    with pytest.raises(Refused, match="nfs") as refused:
        diskfiles.refuse_unmounted(pools, "/srv/nfs/a/disk", "host2")  # type: ignore[arg-type]
    assert "pool-start nfs" in refused.value.next_step
    for fine in ("/srv/nfs2/disk", "/srv/dir/disk"):
        diskfiles.refuse_unmounted(pools, fine, "host2")  # type: ignore[arg-type]
