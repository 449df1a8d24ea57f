"""What a host looks like to everybody but mcft, to be compared before and after: `diff(before, take(host))`.

The same file runs inside the host (as a program) and collects. Left out is what changes by itself (counters, times,
numbers that the kernel or QEMU deals out anew) and what mcft keeps on purpose: its database, its events and the
definitions of lost domains.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from world import Host

# What a standby leaves as any migration's target would: the guest's own serial log, written by its QEMU.
LEFT_BY_ANY_MIGRATION = ("/var/log/libvirt/qemu/vm1.serial",)
NOT_LOOKED_INTO = ("/var/lib/mcft/definitions", "/var/lib/mcft/lost+found")
PARAMETERS = ("max-bandwidth", "x-checkpoint-delay", "downtime-limit", "tls-creds", "tls-hostname")


def take(host: Host) -> dict[str, Any]:
    """The host's snapshot: a flat dict, key → what was found."""
    text = host.run("/usr/bin/python3", "-E", "/opt/mcft/tests/lab/snapshot.py", timeout=60).stdout
    return dict(json.loads(text))


def diff(before: dict[str, Any], after: dict[str, Any], ignore: tuple[str, ...] = LEFT_BY_ANY_MIGRATION) -> list[str]:
    """What differs, a line each; nothing if all is as it was. ignore: keys (or files) that may differ."""
    lines = []
    for key in sorted(before.keys() | after.keys()):
        if any(key == name or key == f"file {name}" for name in ignore):
            continue
        if key not in after:
            lines.append(f"gone: {key}: {before[key]}")
        elif key not in before:
            lines.append(f"new: {key}: {after[key]}")
        elif before[key] != after[key]:
            lines.append(f"changed: {key}: {before[key]} -> {after[key]}")
    return lines


# ---- inside the host ----


def _run(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout


def _collect() -> dict[str, Any]:
    import libvirt

    connection = libvirt.open("qemu:///system")
    while True:
        try:
            found = dict(_domains(connection))
            break
        except libvirt.libvirtError as error:
            if error.get_error_code() not in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
                raise  # else: it ended while it was looked at
    found.update(_network())
    for folder in ("/var/lib/libvirt/images", "/etc/libvirt", "/run/mcft", "/var/lib/mcft", "/var/log/libvirt/qemu"):
        found.update(_files(folder))
    units = _run("systemctl", "list-units", "--all", "--plain", "--no-legend", "mcft*").splitlines()
    found["units"] = sorted(" ".join(u.split()[:4]) for u in units if " inactive " not in u)
    found["processes of QEMU"] = _run("pgrep", "-c", "qemu-system").strip()
    return found


def _domains(connection: Any) -> Iterator[tuple[str, Any]]:
    import libvirt
    import libvirt_qemu

    for domain in connection.listAllDomains():

        def ask(command: str, domain: Any = domain, **arguments: Any) -> Any:
            line = json.dumps({"execute": command, "arguments": arguments})
            return json.loads(libvirt_qemu.qemuMonitorCommand(domain, line, 0)).get("return")

        persistent = bool(domain.isPersistent())
        state = "checkpointed" if domain.isActive() and _checkpointed(ask) else domain.state()[0]
        yield (
            f"domain {domain.name()}",
            {"uuid": domain.UUIDString(), "state": state, "persistent": persistent,
             "autostart": bool(domain.autostart()) if persistent else None,
             "definition": domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE) if persistent else None},
        )  # fmt: skip
        if domain.isActive():
            for key, value in _qemu(ask):
                yield f"qemu {domain.name()} {key}", value


def _qemu(ask: Any) -> Iterator[tuple[str, Any]]:
    """The running domain, as QEMU tells of it."""
    for node in ask("query-named-block-nodes", flat=True):
        children = sorted(f"{c.get('child')}={_name(c.get('node-name', ''))}" for c in node.get("children", []))
        yield f"node {_name(node['node-name'])}", [node["drv"], node["ro"], node.get("cache"), *children]
    for block in ask("query-block"):
        inserted = block.get("inserted") or {}
        found = [_name(inserted.get("node-name", "")), block.get("io-status")]
        yield f"drive {block.get('qdev') or block['device']}", found
    yield "objects", sorted(f"{o['name']}: {o['type']}" for o in ask("qom-list", path="/objects"))
    yield "chardevs", sorted(f"{c['label']}: {c['filename']}" for c in ask("query-chardev"))
    yield "block jobs", [job["device"] for job in ask("query-block-jobs")]
    yield "jobs", [job["id"] for job in ask("query-jobs")]
    yield "block exports", [export["id"] for export in ask("query-block-exports")]
    yield "yank instances", sorted(json.dumps(i, sort_keys=True) for i in ask("query-yank"))
    yield "migration capabilities", sorted(c["capability"] for c in ask("query-migrate-capabilities") if c["state"])
    checkpointed = _checkpointed(ask)
    parameters = ask("query-migrate-parameters")
    if checkpointed:
        del parameters["x-checkpoint-delay"]  # mcft keeps the pace
    yield "migration parameters", {name: parameters.get(name) for name in PARAMETERS}
    status = ask("query-status")
    yield "status", "checkpointed" if checkpointed else [status["status"], status["running"]]


def _checkpointed(ask: Any) -> bool:
    """Then whether it runs or stands just now is a matter of the moment."""
    return bool((ask("query-colo-status") or {}).get("mode", "none") != "none")


def _name(node: str) -> str:
    """A node's name; those that QEMU deals out by itself are all one."""
    return re.sub(r"^#block\d+$", "#block", node)


def _network() -> Iterator[tuple[str, Any]]:
    for line in _run("ip", "-j", "-d", "link").splitlines():
        for link in json.loads(line):
            name = link["ifname"]
            flags, kind = sorted(link["flags"]), link.get("linkinfo", {}).get("info_kind")
            same = {key: link.get(key) for key in ("operstate", "mtu", "master", "qdisc", "promiscuity", "txqlen")}
            yield f"link {name}", {"kind": kind, "flags": flags, **same}
            for parent in ("root", "ingress", "egress"):
                yield f"filters {name} {parent}", _run("tc", "filter", "show", "dev", name, parent).splitlines()
    qdiscs = _run("tc", "qdisc").splitlines()
    yield "qdiscs", sorted(re.sub(r"^qdisc (\w+) [0-9a-f]+:", r"qdisc \1", line).strip() for line in qdiscs)
    yield "routes", sorted(r.strip() for r in _run("ip", "route", "show", "table", "all").splitlines())
    yield "neighbours by hand", sorted(r.strip() for r in _run("ip", "neigh", "show", "nud", "permanent").splitlines())
    sockets = (line.split() for line in _run("ss", "-Hlntu").splitlines())
    yield "listening", sorted({f"{words[0]} {words[4]}" for words in sockets})


def _files(folder: str) -> Iterator[tuple[str, Any]]:
    """Name, kind, owner, mode and size; what is small and in /etc also by its content."""
    for root, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if f"{root}/{f}" not in NOT_LOOKED_INTO]
        for name in names:
            path = os.path.join(root, name)
            if path.startswith("/var/lib/mcft/mcft.db"):
                continue
            if path == "/var/log/libvirt/qemu/vm1.log":
                continue
            try:
                info = os.lstat(path)
            except FileNotFoundError:
                continue
            what: list[Any] = [stat.filemode(info.st_mode), info.st_uid, info.st_gid]
            growing = folder.startswith(("/var/log", "/run"))
            if stat.S_ISREG(info.st_mode) and not growing:
                what.append(info.st_size)
            if stat.S_ISREG(info.st_mode) and folder.startswith("/etc"):
                with open(path, "rb") as file:
                    what.append(hashlib.sha256(file.read()).hexdigest()[:16])
            yield f"file {path}", what


if __name__ == "__main__":
    json.dump(_collect(), sys.stdout)
