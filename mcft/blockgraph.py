"""PURE: QEMU's block graph, read from `query-named-block-nodes`. Light, so that a gate may import it too."""

from __future__ import annotations

from typing import Any

REPLICATION = "mcft-r-"  # the replication node of a disk is called this and the disk's target


def children(rows: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Every named node and its children: {"mcft-q-vda": {"children.0": "libvirt-1-storage", …}, …}."""
    return {r["node-name"]: {c["child"]: c["node-name"] for c in r.get("children", [])} for r in rows}


def uncommitted(rows: list[dict[str, Any]]) -> set[str]:
    """After a take-over: the disks whose replication still reads its `active` overlay (QEMU says so by no job and no event)."""
    graph = children(rows)
    return {
        name.removeprefix(REPLICATION)
        for name, below in graph.items()
        if name.startswith(REPLICATION) and below.get("file", "").startswith("mcft-")
    }
