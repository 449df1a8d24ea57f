"""Of the stand-in (not the micro-checkpointing QEMU): what that QEMU's monitor offers, as recorded. Pure tables and checks.

Recorded runs: 01-basic-tcp (capabilities), 02-mc-delay-input (every error text below), 11-commands-during-mc (busy).
"""

from __future__ import annotations

from typing import Any

CAPABILITIES = (
    "xbzrle", "rdma-pin-all", "auto-converge", "zero-blocks", "mc", "mc-net-disable", "mc-disk-disable", "mc-ppc-cheat-tce",
    "mc-rdma-copy", "rdma-keepalive", "compress",
)  # fmt: skip
PARAMETERS = {"decompress-threads": 2, "compress-threads": 8, "compress-level": 1}
ADDED = ("migrate-set-mc-delay", "migrate_set_speed", "migrate_set_downtime")
# What came after 2.3, and what an engine for that QEMU might be tempted to use. (libvirt needs newer commands than 2.3's, so
# not everything that came later can be refused.)
HIDDEN = frozenset({
    "announce-self", "calc-dirty-rate", "migrate-continue", "migrate-pause", "migrate-recover", "migrate-start-postcopy",
    "query-colo-status", "query-vcpu-dirty-limit", "query-yank", "set-vcpu-dirty-limit", "snapshot-load", "snapshot-save",
    "x-blockdev-change", "x-colo-lost-heartbeat", "yank",
})  # fmt: skip
HIDDEN_OBJECTS = ("monitor-qmp", "filter-")
PROTOCOLS = ("tcp:", "unix:", "exec:", "fd:", "rdma:")
# libvirt from 11 on sets it without asking whether it is there. It is taken, not listed, and without effect.
LIBVIRTS_OWN = "events"
BUSY = "There's a migration process in progress"
INT64 = range(-(1 << 63), 1 << 63)


def error(desc: str, kind: str = "GenericError") -> dict[str, Any]:
    return {"error": {"class": kind, "desc": desc}}


def not_found(command: str) -> dict[str, Any]:
    return error(f"The command {command} has not been found", "CommandNotFound")


def only(arguments: dict[str, Any], name: str, kind: str) -> str:
    """Empty, or what that QEMU says about the arguments of a command that takes exactly `name`. kind: `int` or `number`."""
    if name not in arguments:
        return f"Parameter '{name}' is missing"
    value = arguments[name]
    whole = isinstance(value, int) and not isinstance(value, bool) and value in INT64
    if not whole and not (kind == "number" and isinstance(value, float)):
        return f"Invalid parameter type for '{name}', expected: {kind}"
    for other in arguments:
        if other != name:
            return f"Invalid parameter '{other}'"
    return ""


def capabilities_asked(arguments: dict[str, Any]) -> dict[str, bool] | str:
    """What to set, or the error. The list is applied as a whole or not at all."""
    rows = arguments.get("capabilities")
    if not isinstance(rows, list):
        return "Parameter 'capabilities' is missing"
    asked = {}
    for row in rows:
        if row.get("capability") == LIBVIRTS_OWN:
            continue
        if row.get("capability") not in CAPABILITIES:
            return f"Invalid parameter '{row.get('capability')}'"
        if not isinstance(row.get("state"), bool):
            return "Invalid parameter type for 'state', expected: boolean"
        asked[row["capability"]] = row["state"]
    return asked


def bad_uri(uri: str) -> str:
    """Empty, or the words with which that QEMU refuses it at once."""
    if not uri.startswith(PROTOCOLS):
        return "Parameter 'uri' expects a valid migration protocol"
    if uri.startswith("rdma:"):
        return "RDMA ERROR: could not initialize local rdma queue pairs!"
    if uri.startswith("tcp:") and ":" not in uri[4:]:
        return f"error parsing address '{uri[4:]}'"
    return ""


def hidden_object(arguments: dict[str, Any]) -> str:
    kind = str(arguments.get("qom-type", ""))
    return f"invalid object type: {kind}" if kind.startswith(HIDDEN_OBJECTS) else ""
