"""Each disk's replication with QEMU's block layer: interpose, copy, swap, promote, dismantle.

On the primary a `quorum` is put between the device and libvirt's own node, through a `null-co` node (permissions forbid
the direct way). A `blockdev-mirror` copies to the standby's NBD export and *keeps running* until the guest stands
still in `pre-switchover`; only there it is swapped for the `replication` node. The obvious order (swap, then migrate)
loses writes silently. Under the replication node sits a one-child quorum, because replication swallows write errors.

On the standby `active` over `hidden` over libvirt's node, a `replication` node (secondary) and a quorum of the name
that the primary's has. Nothing here remembers node names of others: libvirt's are read each time.
Source: QEMU `docs/block-replication.rst`, `docs/COLO-FT.rst`, `qapi/block-core.json`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import msgspec

from mcft.blockgraph import REPLICATION, children, uncommitted
from mcft.errors import Failed
from mcft.qmp_passthrough import Qmp
from mcft.streams import CREDENTIALS, Endpoint

MIRROR_POLL_S = 0.02
OVERLAYS = ("active", "hidden")


class Disk(msgspec.Struct, frozen=True):
    """One writable disk of a domain on one host. qom: path of the device that has `drive`; node: libvirt's top node."""

    target: str
    qom: str
    node: str
    size_bytes: int
    path: str
    format: str
    direct: bool


def quorum(target: str) -> str:
    return f"mcft-q-{target}"


def _replication(target: str) -> str:
    return f"{REPLICATION}{target}"


def nbd_node(target: str) -> str:
    """The node that talks to the standby's export; QEMU's `yank` knows it by this name."""
    return f"mcft-n-{target}"


def _null(target: str) -> str:
    return f"mcft-0-{target}"


def export_name(target: str) -> str:
    return f"mcft-{target}"


async def nodes(qmp: Qmp) -> dict[str, dict[str, str]]:
    """Every named node and its children: {"mcft-q-vda": {"children.0": "libvirt-1-storage", …}, …}."""
    return children(await qmp.execute("query-named-block-nodes", flat=True))


async def drive_of(qmp: Qmp, device: str) -> tuple[str, dict[str, Any]] | None:
    """(QOM path of what has `drive`, `inserted` of query-block) of the device with this alias; None without medium."""
    for row in await qmp.execute("query-block"):
        path = row.get("qdev") or ""
        parts = path.split("/")
        if device not in parts or not row.get("inserted"):
            continue
        properties = await qmp.execute("qom-list", path=path)
        if not any(p["name"] == "drive" for p in properties):
            path += "/virtio-backend"
        return path, row["inserted"]
    return None


# ---- the primary's side ----


async def _set_drive(qmp: Qmp, disk: Disk, node: str) -> None:
    await qmp.execute("qom-set", path=disk.qom, property="drive", value=node)


async def _add_nulls(qmp: Qmp, disks: list[Disk]) -> None:
    for disk in disks:
        await qmp.execute("blockdev-add", driver="null-co", node_name=_null(disk.target), size=disk.size_bytes)


async def _drop_nulls(qmp: Qmp, disks: list[Disk]) -> None:
    for disk in disks:
        await qmp.attempt("blockdev-del", node_name=_null(disk.target))


def _quorum_node(target: str, child: str) -> dict[str, Any]:
    return {"driver": "quorum", "node_name": quorum(target), "vote_threshold": 1, "read_pattern": "fifo", "children": [child]}


async def interpose(qmp: Qmp, disks: list[Disk]) -> None:
    """Put a quorum over each disk's node while the guest stands still for a few ms (`stop` … `cont`).

    On any error the drives go back to libvirt's nodes before the guest continues. Raises: QmpError, Failed ("resumed") if
    somebody else let the guest run on a null node: nobody can keep it from that, but it is not hidden.
    """
    running = False
    try:
        await _add_nulls(qmp, disks)
        running = await qmp.status() == "running"
        await qmp.execute("stop")  # a paused one too: it may be resumed just now
        for disk in disks:
            await _set_drive(qmp, disk, _null(disk.target))
            await qmp.execute("blockdev-add", **_quorum_node(disk.target, disk.node))
            await _set_drive(qmp, disk, quorum(disk.target))
        if await qmp.status() == "running":
            raise Failed(
                "resumed", "somebody resumed the guest in the few ms in which its disks were put under mcft's nodes",
                "what it wrote then is lost, and what it read was zeros", "check its file systems, then protect it again",
            )
    except BaseException:
        await restore(qmp, disks, was_running=running)
        raise
    if running:
        await qmp.execute("cont")
    await _drop_nulls(qmp, disks)


async def _inserted(qmp: Qmp) -> dict[str, str]:
    """QOM path of each device → the node that it uses now."""
    rows = await qmp.execute("query-block")
    return {row["qdev"]: row["inserted"]["node-name"] for row in rows if row.get("qdev") and row.get("inserted")}


def _node_of(disk: Disk, inserted: dict[str, str]) -> str:
    return next((node for qdev, node in inserted.items() if disk.qom in (qdev, f"{qdev}/virtio-backend")), "")


def _any_on_null(disks: list[Disk], inserted: dict[str, str]) -> bool:
    return any(_node_of(disk, inserted) == _null(disk.target) for disk in disks)


async def on_null(qmp: Qmp, disks: list[Disk]) -> bool:
    """Whether a drive is on its null node, where writes vanish: only `restore` lets that guest go on. Raises: QmpError."""
    return bool(disks) and _any_on_null(disks, await _inserted(qmp))


async def _back_to_libvirt(qmp: Qmp, disk: Disk) -> None:
    graph = await nodes(qmp)
    under = graph.get(quorum(disk.target), {}).get("children.0", disk.node)
    under = disk.node if under.startswith("mcft-") else under
    if _node_of(disk, await _inserted(qmp)) != _null(disk.target):
        if _null(disk.target) not in graph:
            await _add_nulls(qmp, [disk])
        await _set_drive(qmp, disk, _null(disk.target))
    # A secondary replication node refuses its children's reopening while it lives: quorum first, then what it held.
    for name in (quorum(disk.target), _replication(disk.target), f"mcft-a-{disk.target}", f"mcft-h-{disk.target}"):
        if name in graph:
            await qmp.attempt("blockdev-del", node_name=name)
    await _set_drive(qmp, disk, under)


async def restore(qmp: Qmp, disks: list[Disk], *, was_running: bool = False) -> None:
    """Undo `interpose` (also of a promoted standby): each drive goes to the node that is *now* under the quorum.

    Looks at what each device uses now; one that uses no node of mcft's is left alone. The guest continues only with
    every drive on a real disk: otherwise it stays stopped, to be called again. Raises: QmpError, Failed.
    """
    inserted = await _inserted(qmp)
    ours = [disk for disk in disks if _node_of(disk, inserted).startswith("mcft-")]
    # A guest that stands on a null node was stopped by us, by an attempt that was cut off.
    cut_off = _any_on_null(ours, inserted)
    running = await qmp.status() == "running"
    if ours:
        await qmp.execute("stop")
        for disk in ours:
            await _back_to_libvirt(qmp, disk)
        still = await _inserted(qmp)
        if left := [d.target for d in disks if _node_of(d, still).startswith("mcft-")]:
            raise Failed("drive-left", f"disk {', '.join(left)} could not be given back; the guest stays stopped")
    if (running and ours) or ((cut_off or was_running) and await qmp.status() == "paused"):
        await qmp.execute("cont")
    for name in [name for name in await nodes(qmp) if name.startswith("mcft-0-")]:
        await qmp.attempt("blockdev-del", node_name=name)


def _nbd(target: str, node: str, there: Endpoint) -> dict[str, Any]:
    server = {"type": "inet", "host": there.address, "port": str(there.port)}
    tls = {"tls-creds": CREDENTIALS, "tls-hostname": there.hostname} if there.hostname else {}
    return {"driver": "nbd", "node-name": node, "export": export_name(target), "server": server, "discard": "unmap", **tls}


async def start_mirrors(qmp: Qmp, disks: list[Disk], there: Endpoint) -> None:
    """Begin copying every disk to the standby's exports. Raises: QmpError (standby not reachable, export missing…).

    What is exported was made empty for this instance, so holes need not be written: they stay holes.
    """
    for disk in disks:
        await qmp.execute("blockdev-add", **_nbd(disk.target, f"mcft-s-{disk.target}", there))
        await qmp.execute(
            "blockdev-mirror", job_id=f"mcft-m-{disk.target}", device=quorum(disk.target),
            target=f"mcft-s-{disk.target}", sync="full", auto_dismiss=False, target_is_zero=True,
        )  # fmt: skip


async def mirrors_ready(qmp: Qmp, disks: list[Disk], on_progress: Callable[[float], None]) -> None:
    """Wait until every copy is complete (and goes on copying). Raises: Failed ("mirror-failed") if one ended."""
    wanted = {f"mcft-m-{disk.target}" for disk in disks}
    while True:
        jobs = {j["id"]: j for j in await qmp.execute("query-jobs") if j["id"] in wanted}
        for name in wanted - jobs.keys():
            raise Failed("mirror-failed", f"copying disk {name[7:]} to the standby ended early", "standby or link is gone")
        bad = next((j for j in jobs.values() if j.get("error")), None)
        if bad:
            raise Failed("mirror-failed", f"copying disk {bad['id'][7:]} failed: {bad['error']}")
        total = sum(j["total-progress"] for j in jobs.values()) or 1
        on_progress(sum(j["current-progress"] for j in jobs.values()) / total)
        if all(j["status"] == "ready" for j in jobs.values()):
            return
        await asyncio.sleep(MIRROR_POLL_S)


async def _mirrors(qmp: Qmp) -> list[dict[str, Any]]:
    return [j for j in await qmp.execute("query-jobs") if j["id"].startswith("mcft-m-")]


async def swap_to_replication(qmp: Qmp, disks: list[Disk], there: Endpoint) -> None:
    """In `pre-switchover`, the guest standing still: end the mirrors, put replication in their place.

    Raises: Failed if a mirror ended with an error: then the copy is not the disk.
    """
    for disk in disks:
        await qmp.execute("block-job-cancel", device=f"mcft-m-{disk.target}")
    while running := [j for j in await _mirrors(qmp) if j["status"] != "concluded"]:
        await asyncio.sleep(0.001 * len(running))
    # Not dismissed by itself: a mirror that fails while it drains would vanish without a word.
    for job in await _mirrors(qmp):
        if job.get("error"):
            raise Failed("mirror-failed", f"copying disk {job['id'][7:]} failed at the end: {job['error']}")
        await qmp.execute("job-dismiss", id=job["id"])
    for disk in disks:
        target = disk.target
        await qmp.execute("blockdev-del", node_name=f"mcft-s-{target}")
        witness = {
            "driver": "quorum", "node-name": f"mcft-w-{target}", "vote-threshold": 1,
            "children": [_nbd(target, nbd_node(target), there)],
        }  # fmt: skip
        await qmp.execute(
            "blockdev-add", driver="replication", mode="primary", node_name=_replication(target), file=witness, discard="unmap"
        )
        await qmp.execute("x-blockdev-change", parent=quorum(target), node=_replication(target))


def drop_replication_commands(targets: list[str]) -> list[dict[str, Any]]:
    """The commands by which a primary lets go of a lost standby's disks, for one pipelined send after `yank`."""
    commands: list[dict[str, Any]] = []
    for target in targets:
        change = {"parent": quorum(target), "child": "children.1"}
        commands.append({"execute": "x-blockdev-change", "arguments": change})
        commands.append({"execute": "blockdev-del", "arguments": {"node-name": _replication(target)}})
    return commands


async def dismantle_copy(qmp: Qmp, disks: list[Disk]) -> None:
    """Undo of copying and of replication, whatever of it is there; the quorum stays for `restore`."""
    for _ in range(500):
        jobs = await _mirrors(qmp)
        for job in jobs:
            if job["status"] == "concluded":
                await qmp.attempt("job-dismiss", id=job["id"])
            else:
                await qmp.attempt("block-job-cancel", device=job["id"], force=True)
        if not jobs:
            break
        await asyncio.sleep(0.01)
    graph = await nodes(qmp)
    for disk in disks:
        for child, node in graph.get(quorum(disk.target), {}).items():
            if node == _replication(disk.target) and child != "children.0":
                await qmp.attempt("x-blockdev-change", parent=quorum(disk.target), child=child)
        for name in (_replication(disk.target), f"mcft-s-{disk.target}"):
            if name in graph:
                await qmp.attempt("blockdev-del", node_name=name)


def yank_instances(disks: list[Disk], *, copying: bool = False) -> list[dict[str, str]]:
    """What `yank` must break besides the migration: while the disks are copied, and once replication is in place.

    Without it a cancelled mirror waits for what is under way to a host that fell silent, and the guest with it (QEMU, mirror.c).
    """
    return [{"type": "block-node", "node-name": f"mcft-s-{d.target}" if copying else nbd_node(d.target)} for d in disks]


# ---- the standby's side ----


def overlay_path(disk: Disk, layer: str, g: int) -> str:
    """New per generation, beside the disk, so on storage as durable as the disk's."""
    return f"{disk.path}.mcft-{g}-{layer}"


async def prepare_secondary(qmp: Qmp, disks: list[Disk], g: int, here: Endpoint) -> None:
    """Overlays (already created, empty, owned by QEMU's user) under replication; the disk itself exported, writable."""
    await _add_nulls(qmp, disks)
    for disk in disks:
        cache = {"direct": disk.direct, "no-flush": False}

        def layer(name: str, backing: Any, disk: Disk = disk, cache: dict[str, bool] = cache) -> dict[str, Any]:
            file = {"driver": "file", "filename": overlay_path(disk, name, g), "discard": "unmap", "cache": cache,
                    "node-name": f"mcft-{name[0]}f-{disk.target}"}  # fmt: skip
            return {"driver": "qcow2", "node-name": f"mcft-{name[0]}-{disk.target}", "discard": "unmap", "cache": cache,
                    "file": file, "backing": backing}  # fmt: skip

        await qmp.execute("blockdev-add", **layer("active", layer("hidden", disk.node)))
        await qmp.execute(
            "blockdev-add", driver="replication", mode="secondary", node_name=_replication(disk.target),
            top_id=quorum(disk.target), file=f"mcft-a-{disk.target}",
        )  # fmt: skip
        await _set_drive(qmp, disk, _null(disk.target))
        await qmp.execute("blockdev-add", **_quorum_node(disk.target, _replication(disk.target)))
        await _set_drive(qmp, disk, quorum(disk.target))
    await _drop_nulls(qmp, disks)
    listener = {"type": "inet", "data": {"host": here.address, "port": str(here.port)}}
    await qmp.execute("nbd-server-start", addr=listener, tls_creds=CREDENTIALS if here.hostname else None)
    for disk in disks:
        name = export_name(disk.target)
        await qmp.execute("block-export-add", type="nbd", id=name, node_name=disk.node, writable=True, name=name)


async def committed(qmp: Qmp, disks: list[Disk]) -> bool:
    """After take-over: whether QEMU has committed every `active` into its disk (it says so by no job and no event)."""
    rows = await qmp.execute("query-named-block-nodes", flat=True)
    return uncommitted(rows).isdisjoint(disk.target for disk in disks)


async def drop_overlays(qmp: Qmp, disks: list[Disk], g: int) -> None:
    """Once committed: libvirt's nodes back under the devices, the overlays' nodes and files away.

    A guest that took over runs: one that stands was stopped by an attempt of ours that was cut off (the agent killed).
    """
    await restore(qmp, disks, was_running=True)
    graph = await nodes(qmp)
    for disk in disks:
        for name in (f"mcft-a-{disk.target}", f"mcft-h-{disk.target}"):
            if name in graph:
                await qmp.attempt("blockdev-del", node_name=name)
    remove_overlay_files(disks, g)


def remove_overlay_files(disks: list[Disk], g: int) -> None:
    """The files of the overlays; missing ones are fine."""
    for disk in disks:
        for layer in OVERLAYS:
            path = overlay_path(disk, layer, g)
            if os.path.exists(path):
                os.unlink(path)


