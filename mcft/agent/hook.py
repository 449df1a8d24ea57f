"""The start marker and libvirt's hook: a stale instance can't start (`protocol.md`; the hook itself is `mcft/hook.sh`).

A marker is a small file per domain uuid under the state directory, `banned` or `free`; the hook reads it without agent
or database. A token under the run directory lets one attempt through. A hook that was added to a running daemon is
inert until that daemon restarts; the only proof that it lives is a start that it refuses.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid as uuids
from pathlib import Path
from typing import TYPE_CHECKING

from mcft.config import Config
from mcft.errors import Failed, McftError, Refused
from mcft.libvirt_unit import daemon_unit

if TYPE_CHECKING:  # so that it can be tested without libvirt
    from mcft.libvirt_bridge import LibvirtHost

TOKEN_LIFE_S = 60
PROBE_NAME = "mcft-hook-probe"
PROBE_LOG = Path(f"/var/log/libvirt/qemu/{PROBE_NAME}.log")
HOOK_PATHS = ("/etc/libvirt/hooks/qemu.d/mcft", "/etc/libvirt/hooks/qemu")


def boot_id() -> str:
    """This boot's id, as the kernel names it."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


class Markers:
    """The files that the hook reads."""

    def __init__(self, config: Config) -> None:
        self.ban_dir = Path(config.state_dir) / "start"
        self.token_dir = Path(config.run_dir) / "token"

    def _write(self, path: Path, text: str) -> None:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        with open(fresh, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def ban(self, uuid: str, why: str) -> None:
        """From now on this domain starts here only with a token. Durable when it returns."""
        self._write(self.ban_dir / uuid, f"banned {why}\n")

    def free(self, uuid: str) -> None:
        """This domain may start here."""
        self._write(self.ban_dir / uuid, "free\n")

    def forget(self, uuid: str) -> None:
        """As if mcft had never known it."""
        (self.ban_dir / uuid).unlink(missing_ok=True)
        (self.token_dir / uuid).unlink(missing_ok=True)

    def banned(self, uuid: str) -> bool:
        try:
            return (self.ban_dir / uuid).read_text(encoding="ascii").startswith("banned")
        except FileNotFoundError:
            return False

    def grant(self, uuid: str, pid: str, g: int, purpose: str) -> None:
        """A token for one attempt: this boot, 60 s of life, purpose `start` or `standby`."""
        expires = int(time.clock_gettime(time.CLOCK_BOOTTIME)) + TOKEN_LIFE_S
        self._write(self.token_dir / uuid, f"{uuid} {pid} {g} {boot_id()} {purpose} {expires}\n")

    def revoke(self, uuid: str) -> None:
        (self.token_dir / uuid).unlink(missing_ok=True)


class HookProof:
    """Proves once per daemon and hook file that libvirt calls the hook: a probe domain must be refused by it."""

    def __init__(self, host: LibvirtHost, markers: Markers) -> None:
        self._host, self._markers = host, markers
        self._proven = ""

    def _identity(self) -> str:
        """Changes with the hook's file and with the daemon's process."""
        parts = []
        for path in HOOK_PATHS:
            if os.path.exists(path):
                stat = os.stat(path)
                parts.append(f"{path}:{stat.st_ino}:{stat.st_mtime_ns}")
        for pid_file in ("/run/libvirtd.pid", "/run/virtqemud.pid"):
            try:
                pid = int(Path(pid_file).read_text(encoding="ascii"))
                parts.append(f"{pid}:{os.stat(f'/proc/{pid}').st_ctime_ns}")
            except (OSError, ValueError):
                continue
        return " ".join(parts)

    async def prove(self, host_name: str, machine_xml: str) -> None:
        """Raises: Refused ("no-hook") if the hook is not installed or not live; machine_xml: `<os>` of a domain."""
        if not any(os.path.exists(path) for path in HOOK_PATHS):
            raise Refused(
                "no-hook",
                f"libvirt's hook is not installed on {host_name}",
                "without it a host that returns could start a second copy",
                f"install mcft's hook.sh as {HOOK_PATHS[0]} and restart {daemon_unit()}",
            )
        identity = self._identity()
        if identity and identity == self._proven:
            return
        probing = asyncio.ensure_future(self._probe(host_name, machine_xml))
        try:
            refused = await asyncio.shield(probing)
        except asyncio.CancelledError:
            # libvirt's thread can't be called back: without the marker it would start the probe after all.
            await asyncio.gather(probing, return_exceptions=True)
            raise
        if refused:
            self._proven = identity
            return
        raise Refused(
            "no-hook",
            f"libvirt's hook on {host_name} is inert",
            f"a hook that was added while {daemon_unit()} ran is not called until that daemon restarts",
            f"on {host_name}: systemctl restart {daemon_unit()} (running guests are not touched)",
        )

    async def _probe(self, host_name: str, machine_xml: str) -> bool:
        """Whether the hook refused the probe; one that started is ended. Raises: Failed ("hook-probe")."""
        probe = str(uuids.uuid4())
        self._markers.ban(probe, "probe")
        try:
            await self._host.create_paused(_probe_xml(probe, machine_xml))
            await self._host.destroy(probe)
        except McftError as error:
            if "hook" in str(error).lower():
                return True
            raise Failed("hook-probe", f"can't find out whether libvirt's hook lives on {host_name}", str(error)) from None
        finally:
            self._markers.forget(probe)
            PROBE_LOG.unlink(missing_ok=True)
        return False


def _probe_xml(uuid: str, machine_xml: str) -> str:
    # Without it libvirt 7.0 says -no-acpi, which QEMU 11.1 has no more. (Others than PCs may not have it.)
    acpi = "<features><acpi/></features>" if "x86_64" in machine_xml or "i686" in machine_xml else ""
    return (
        f"<domain type='qemu'><name>{PROBE_NAME}</name><uuid>{uuid}</uuid><memory unit='MiB'>16</memory><vcpu>1</vcpu>"
        f"{machine_xml}{acpi}<devices><controller type='usb' model='none'/><memballoon model='none'/></devices></domain>"
    )
