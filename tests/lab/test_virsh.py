"""Colleagues who type `virsh` at a protected guest: what is refused, what works, and a take-over that is whole afterwards.

`docs/living-with-mcft.md` has a row for each of these.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from test_disks import quiet_sum
from watching import Load, Observer
from world import H1, H2, HOSTS, guest_answers, protect, restore, until

MAC = "52:54:00:00:00:10"
ENDS_IT = "x-colo-lost-heartbeat"
BACKUP = "/var/lib/libvirt/images/vm1.backup"
BACKUP_XML = {
    "push": f"""<domainbackup><disks>
        <disk name='vda' type='file'><target file='{BACKUP}'/><driver type='raw'/></disk></disks></domainbackup>""",
    "pull": "<domainbackup mode='pull'><server transport='tcp' name='127.0.0.1' port='10809'/></domainbackup>",
}
DISK = "/var/lib/libvirt/images/extra.img"
NIC = "bridge br0 --model virtio --live"

REFUSED = (
    "blockresize vm1 vda 128M",
    f"attach-disk vm1 {DISK} vdb --live",
    f"attach-interface vm1 {NIC}",
    "detach-interface vm1 bridge --live",
    "detach-disk vm1 vda --live",
    "save vm1 /root/vm1.save",
    "managedsave vm1",
    "snapshot-create-as vm1 internal",
    "blockcommit vm1 vda --active --wait",
    "migrate vm1 --live qemu+tcp://host2/system",
    "domrename vm1 vm2",
    "snapshot-create-as vm1 s1 --memspec file=/root/s1.mem,snapshot=external --diskspec vda,snapshot=external --no-metadata",
    "setmem vm1 128M --live",
    "blockcopy vm1 vda /var/lib/libvirt/images/vm1.copy --transient-job --wait --finish",
    "blockjob vm1 vda --abort",
    "change-media vm1 vda --eject --live",
    "dump vm1 /root/vm1.core --memory-only --live",
)
HARMLESS = (
    "suspend vm1", "dommemstat vm1", "domblkinfo vm1 vda", "domblkstat vm1 vda", "dumpxml vm1",
    "blockjob vm1 vda --info", "blockpull vm1 vda --wait",
)
EITHER = ("resume vm1",)  # refused while a checkpoint is under way, without effect otherwise


@pytest.fixture
def extra_disk() -> Iterator[None]:
    H1.sh(f"truncate -s 8M {DISK}")
    yield
    H1.sh(f"rm -f {DISK}")


@pytest.fixture
def snapshots(fresh_world: None) -> Iterator[None]:
    """vm1 is another domain afterwards, its disk an overlay: it all goes."""
    yield
    restore(thorough=True)
    for host in HOSTS:
        host.sh("rm -f /var/lib/libvirt/images/vm1.s?*")


def virsh(line: str) -> tuple[int, str]:
    done = H1.run("virsh", *line.split(), check=False, timeout=60)
    return done.returncode, (done.stdout + done.stderr).strip()


def succeeds(line: str) -> None:
    """Where a checkpoint falls into the moment in which QEMU formats the new file, QEMU refuses, leaving nothing: again."""
    for _ in range(5):
        code, said = virsh(line)
        if "Permission conflict" not in said:
            break
    assert code == 0, said


def take_snapshot() -> None:
    succeeds("snapshot-create-as vm1 s1 --disk-only --atomic --no-metadata")


def test_what_virsh_does_to_a_protected_guest(load: Load, extra_disk: None) -> None:
    """Fails if one of them ends the protection, or changes the guest in a way that its standby does not follow."""
    protect(H1)
    instance = H1.status()["instance"]
    load.flowing()
    for line in REFUSED:
        code, said = virsh(line)
        assert code != 0, f"virsh {line}: {said}"
    for line in HARMLESS:
        code, said = virsh(line)
        assert code == 0, f"virsh {line}: {said}"
    for line in EITHER:
        virsh(line)
    assert (H1.state(), H1.status()["instance"]) == ("protected", instance)
    load.goes_on()
    H1.kill_qemu()
    H2.await_took_over()
    load.goes_on()
    load.finished()


def test_the_link_and_the_definition_of_a_protected_guest(observer: Observer) -> None:
    """A NIC that is set down speaks on no side; the copy that takes over is defined as the domain was at `protect`.

    Fails if `undefine` or `define` behind mcft's back leaves the new owner without a definition, or ends the protection.
    """
    H1.sh("virsh dumpxml vm1 --inactive | sed '/<name>/a<description>edited</description>' > /root/edited.xml")
    protect(H1)
    observer.hears()
    for line in (f"domif-setlink vm1 {MAC} down", "undefine vm1", "autostart vm1"):
        virsh(line)
    heard = observer.ask("last")
    assert not guest_answers()
    for line in ("define /root/edited.xml", "autostart vm1", f"domif-setlink vm1 {MAC} up"):
        assert virsh(line)[0] == 0, line
    assert observer.hears() > heard["at_s"]
    assert H1.state() == "protected"
    H1.kill_qemu()
    H2.await_took_over()
    observer.hears()
    observer.clean()
    until(lambda: H2.run("virsh", "dumpxml", "vm1", "--inactive", check=False).returncode == 0, 10, "h2: vm1 is defined")
    assert "edited" not in H2.sh("virsh dumpxml vm1 --inactive")


@pytest.mark.parametrize("mode", ["push", "pull"])
def test_a_backup_of_a_protected_guest(mode: str) -> None:
    """libvirt's backup job runs below mcft's quorum: the file is the disk of its instant, and the protection goes on.

    Fails if the backup is not the disk, or if the standby does not follow any more afterwards.
    """
    protect(H1)
    instance, seen = H1.status()["instance"], quiet_sum()
    H1.sh(f"rm -f {BACKUP}; cat > /root/backup.xml <<X\n{BACKUP_XML[mode]}\nX\n")
    succeeds("backup-begin vm1 /root/backup.xml")
    if mode == "pull":
        H1.sh(f"qemu-img convert -O raw nbd://127.0.0.1:10809/vda {BACKUP} && virsh domjobabort vm1")
    until(lambda: "None" in virsh("domjobinfo vm1")[1], 30, "the backup has ended")
    assert H1.sh(f"sha256sum {BACKUP}").split()[0] == seen
    H1.sh(f"rm {BACKUP}")
    assert (H1.state(), H1.status()["instance"]) == ("protected", instance)
    H1.kill_qemu()
    H2.await_took_over()
    assert quiet_sum() == seen


def test_monitor_commands_of_others(load: Load) -> None:
    """`stop` and `cont` change nothing, one that ends the stream ends the protection: alone, talking, and never two.

    Fails if one of them lets a packet out early, or lets the standby take over while the primary runs.
    """
    protect(H1)
    load.flowing()
    for command in ("stop", "cont", "system_wakeup"):
        H1.run("virsh", "qemu-monitor-command", "vm1", f'{{"execute": "{command}"}}')
        load.goes_on()
    assert H1.state() == "protected"
    since, before = H1.events()[-1]["id"], H2.events()[-1]["id"]
    H1.qmp(ENDS_IT)
    until(lambda: any(e["text"].startswith("solo") for e in H1.events() if e["id"] > since), 20, "h1 goes on alone")
    assert "take-over" not in [e["kind"] for e in H2.events() if e["id"] > before]
    load.goes_on()
    load.finished()
    H1.await_state("protected", timeout=60)


def test_an_external_snapshot_is_followed(snapshots: None, load: Load) -> None:
    """`snapshot-create-as --disk-only` slides its overlay under mcft's quorum: what the guest writes is on both sides still."""
    protect(H1)
    load.flowing()
    take_snapshot()
    load.goes_on()
    assert H1.state() == "protected"
    H1.kill_qemu()
    H2.await_took_over()
    load.goes_on()
    load.finished()


def test_unprotect_after_an_external_snapshot_keeps_the_overlay(snapshots: None, load: Load) -> None:
    """Fails if the undo puts the node back that libvirt no longer calls the disk: later writes would bypass the overlay."""
    protect(H1)
    load.flowing()
    take_snapshot()
    H1.mcft("unprotect", "vm1")
    load.goes_on()
    overlay = H1.sh("virsh domblklist vm1 | awk '$1 == \"vda\" { print $2 }'").strip()
    used = int(H1.sh(f"stat -c %b {overlay}"))
    until(lambda: int(H1.sh(f"stat -c %b {overlay}")) > used, 30, "the guest's writes go to the overlay")
    load.finished()


def test_a_guest_that_took_over_and_was_started_anew_is_let_go() -> None:
    """Its host's only one since, and an operator wants to be rid of mcft. Fails if a promoted copy is undone like a primary."""
    protect(H1)
    H1.power_off()
    H2.await_took_over()
    H2.sh("virsh -q destroy vm1")
    until(lambda: H2.state() == "stopped", 20, "h2: it is stopped")
    H2.sh("virsh -q start vm1")
    until(lambda: H2.state() == "unprotected", 20, lambda: f"h2 sees it: {H2.status()}")
    H2.mcft("unprotect", "vm1", timeout=90)
    assert not H2.status() and "running" in H2.sh("virsh domstate vm1")
