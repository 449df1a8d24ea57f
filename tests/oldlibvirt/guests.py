"""Guests for libvirtd 7.0: domains of one disk at most, all their program its boot sector; that daemon, ended and begun again."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid as uuids
from collections.abc import Callable
from pathlib import Path

ROOT = Path("/run/old/root")  # the daemon's
SHARED = Path("/run/old/guests")  # the same path for it, for its QEMU and for us
SOCKET = "/run/libvirt/libvirt-sock"
MACHINE = "pc-i440fx-2.4"  # that of the micro-checkpointing QEMU (docs/engines.md)
EMULATOR = "/usr/bin/qemu-system-x86_64"
NEWER = "/run/old/qemu11"  # the lab's own, which engine colo needs
QEMU_NS = "xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'"

# 16-bit code. A guest that does nothing; that powers itself off by ACPI (SLP_TYP S5 at SeaBIOS' 0x604); that resets itself by the
# keyboard controller; that writes its disk beyond 32 KiB for ever (int 13h).
IDLE = bytes.fromhex("f4 eb fd")
POWERS_OFF = bytes.fromhex("ba 04 06 b8 00 20 ef f4 eb fd")
RESETS = bytes.fromhex("b0 fe e6 64 f4 eb fd")
WRITES = bytes.fromhex("b8 01 03 b9 05 00 ba 80 01 bb 00 7e cd 13 eb f0")


def boot_disk(name: str, code: bytes, folder: Path = SHARED) -> Path:
    """A raw disk of 1 MiB, sparse, that begins with this code."""
    path = folder / f"{name}.img"
    with open(path, "wb") as file:
        file.write(code.ljust(510, b"\0") + b"\x55\xaa")
        file.truncate(1 << 20)
    return path


def disk_xml(path: Path, more: str = "") -> str:
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'{more}/><source file='{path}'/>"
        "<target dev='hda' bus='ide'/></disk>"
    )


def domain(name: str, devices: str = "", *, boot: str = "", arguments: tuple[str, ...] = ()) -> tuple[str, str]:
    """(uuid, XML) of a new domain."""
    uuid = str(uuids.uuid4())
    words = "".join(f"<qemu:arg value='{word}'/>" for word in arguments)
    commandline = f"<qemu:commandline>{words}</qemu:commandline>" if words else ""
    return uuid, (
        f"<domain type='qemu' {QEMU_NS}><name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>32</memory><vcpu>1</vcpu>"
        f"<os><type arch='x86_64' machine='{MACHINE}'>hvm</type>{boot}</os><features><acpi/></features>"
        f"<devices><emulator>{EMULATOR}</emulator><controller type='usb' model='none'/><memballoon model='none'/>{devices}"
        f"</devices>{commandline}</domain>"
    )


def until(what: str, true: Callable[[], object], within_s: float = 20.0) -> None:
    end_s = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end_s, f"not within {within_s:g} s: {what}"
        time.sleep(0.02)


def daemon_pid() -> int:
    return int(Path("/run/libvirtd.pid").read_text())


def end_daemon() -> None:
    """libvirtd only: its guests go on."""
    pid = daemon_pid()
    os.kill(pid, signal.SIGKILL)
    until("libvirtd ends", lambda: not Path(f"/proc/{pid}").exists())


def begin_daemon() -> None:
    """Nobody's child: it is PID 1 that buries it."""
    Path(SOCKET).unlink(missing_ok=True)
    words = f"env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot {ROOT} libvirtd --listen"
    subprocess.run(["sh", "-c", f"{words} < /dev/null >> /run/old/libvirtd.log 2>&1 &"], check=True)
    until("libvirtd's socket", Path(SOCKET).is_socket)
