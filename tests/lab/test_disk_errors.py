"""A disk that is full or broken, on either side and under load: loud, sticky, and never a guest on wrong data."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from test_disks import stopped_writer
from watching import Load, watching
from world import H1, H2, Host, guest, guest_answers, lab, pause, protect, until, wipe

IMAGES = "/var/lib/libvirt/images"
THIN = "/run/thin"
FILL = "cat /dev/zero > {}/fill 2> /dev/null; :"

# Full: a small file system holds the disk and its overlays, with the room that `protect` asks for. Broken: it lies on a loop
# device, which answers EIO once it was shrunk.
FULL = f"mount -t tmpfs -o size=160M,mode=711 thin {IMAGES}"
POOL = f"mkdir -p {THIN} && mount -t tmpfs -o size=90M thin {THIN} && truncate -s 200M {THIN}/device"
BROKEN = f"""mkfs.ext4 -q -E lazy_itable_init=0 -O ^has_journal {THIN}/device && rm -f /dev/thin &&
    mknod /dev/thin b 7 {{minor}} && mount /dev/thin {IMAGES} && chmod 711 {IMAGES}"""


def mount_broken(host: Host) -> str:
    """The host has no loop devices of its own: one of the machine's, which goes with its last user."""
    host.sh(POOL)
    made = subprocess.run(
        ["losetup", "--find", "--show", f"{host.root}{THIN}/device"], capture_output=True, text=True, check=True
    )  # fmt: skip
    device = made.stdout.strip()
    try:
        host.sh(BROKEN.format(minor=device.removeprefix("/dev/loop")))
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    return device


@dataclass
class Storage:
    """A host's folder of images, on storage that can be made to fail."""

    host: Host
    kind: str
    device: str = ""

    def fail(self) -> None:
        if self.kind == "full":
            self.host.sh(f"cat /dev/zero > {IMAGES}/fill 2> /dev/null; :")
        else:
            self._resize("4M")

    def mend(self) -> None:
        if self.kind == "full":
            self.host.sh(f"rm {IMAGES}/fill")
        else:
            self._resize("200M")

    def _resize(self, size: str) -> None:
        self.host.sh(f"truncate -s {size} {THIN}/device")
        subprocess.run(["losetup", "--set-capacity", self.device], check=True)


@contextmanager
def storage(host: Host, kind: str) -> Iterator[Storage]:
    """What ran there is gone afterwards."""
    try:
        made = Storage(host, kind)
        if kind == "full":
            host.sh(FULL)
        else:
            made.device = mount_broken(host)
        fresh_agent(host)
        yield made
    finally:
        wipe()
        host.sh(f"umount -l {IMAGES}; umount -l {THIN}", check=False)
        fresh_agent(host)


def fresh_agent(host: Host) -> None:
    """The agent lives in a mount namespace of its own, a copy from when it was started."""
    host.sh("systemctl restart mcft-agent")
    until(host.answers, 20, f"{host}: the agent answers")


def label(host: Host) -> str:
    return host.sh("cat /var/lib/mcft/labels/*/vda", check=False).split(" ")[0].strip()


def alarms(host: Host) -> list[str]:
    return [e["text"] for e in host.events() if e["level"] == "alarm"]


@pytest.mark.parametrize("kind", ["full", "broken"])
def test_the_standbys_disk(kind: str, load: Load) -> None:
    """The copy is given up at the first failed write: the guest goes on alone, and no later loss of it is a take-over.

    Fails if a copy that missed a write may take over, or if it is protected again by itself onto that disk.
    """
    with storage(H2, kind) as disk:
        protect(H1)
        load.flowing()
        assert guest("writer", "start", "1").startswith("writer run=1")
        disk.fail()
        H1.await_state("solo", timeout=20)
        assert any("not protected again by itself" in text for text in alarms(H1)), alarms(H1)
        assert "not by itself" in H1.status()["next_step"]
        H2.await_state("lost", "failed")
        load.goes_on()
        stopped_writer()
        load.unhurt()
        H1.kill_qemu()
        H1.await_state("stopped")
        pause(1.0)
        assert H2.qemu_pid() is None and H2.state() in ("lost", "failed"), H2.status()
        assert label(H2).startswith(("stale(", "bad(")), label(H2)
        disk.mend()
        H1.sh("virsh -q start vm1")
        until(guest_answers, 60, "the guest answers")
        protect(H1)


def test_the_standbys_disk_inside_a_load_while_the_primary_is_silent() -> None:
    """The primary's gate stands still, so no keepalive tells this error of the copy from the primary's death; the kernel does.

    Fails if a copy takes over whose last checkpoint was half loaded (`Standby._stream_is_open` always False).
    """
    for _attempt in range(5):
        with storage(H2, "broken") as disk:
            lab("vm", "start", "h1")
            protect(H1)
            gate = str(H1.main_pid(f"mcft-gate@{H1.status()['uuid']}.service"))
            disk.fail()
            if H1.run("kill", "-STOP", gate, check=False).returncode:
                continue  # the error came first, and the primary has gone solo upon it
            try:
                status = H2.await_state("failed", "active", "taking-over", "lost")
            finally:
                H1.run("kill", "-CONT", gate, check=False)
            if status["state"] == "lost":
                continue
            reason = status["reason"]
            assert "the primary's end of it is open" in reason, reason
            H1.await_state("solo")
            return
    pytest.fail("its gate was never stopped before the disk's error was noticed")


@pytest.mark.parametrize("kind", ["full", "broken"])
def test_the_primarys_disk(kind: str) -> None:
    """A write that the primary's disk lost is on the standby's: that one goes on, and the guest never hears of it.

    Fails if the guest goes on over the disk that lost what QEMU told it was written.
    """
    with storage(H1, kind) as disk:
        lab("vm", "start", "h1")
        protect(H1)
        assert guest("writer", "start", "1").startswith("writer run=1")
        with watching() as load:
            disk.fail()
            H2.await_took_over(timeout=20)
            load.goes_on()
            load.finished()
        assert any("the primary's own disk" in text for text in alarms(H2)), alarms(H2)
        assert "not by itself" in H2.status()["next_step"], H2.status()
        stopped_writer()
        H1.await_lost()
        H2.await_committed()
