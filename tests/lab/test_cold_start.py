"""Both hosts lost power. `mcft start`, on either of them: where vm1 belongs, or what is not known yet."""

from __future__ import annotations

import subprocess

import pytest
from conftest import EVIDENCE
from world import H1, H2, IMAGE, Host, other, protect, redis, until


def back(host: Host) -> None:
    host.power_on()
    until(host.answers, 20, f"{host}: the agent answers")


def start(host: Host, *more: str) -> subprocess.CompletedProcess[str]:
    return host.mcft("start", "vm1", *more, check=False)


def answered(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str] | None:
    return None if done.returncode == 4 else done


def refused(host: Host) -> None:
    """4, with what is known and unknown; nothing runs, and `--peer-is-off` is no way round it."""
    done = start(host)
    assert done.returncode == 4, done
    for said in ("Known:", "Unknown:", other(host).name, "--accept-lost-data"):
        assert said in done.stderr, (said, done)
    if host is H1:
        assert H1.mcft("solo", "vm1", "--peer-is-off", "--yes", check=False).returncode == 4
    assert host.qemu_pid() is None


def both_off() -> None:
    """The standby first: the other way round it would take over."""
    H2.power_off()
    H1.power_off()


@pytest.mark.parametrize("first", [H1, H2], ids=str)
def test_neither_went_on(first: Host) -> None:
    """The first one back can't know that; with both back its primary starts, from either host, and is protected again.

    Fails if the standby's host starts its copy, if one host alone decides, or if a second `start` starts a second vm1.
    """
    protect(H1)
    both_off()
    back(first)
    refused(first)
    back(other(first))
    # Refused until each has heard the other's records, some tenths of a second.
    done = until(lambda: answered(start(first)), 10, "each has heard what the other knows")
    assert done.returncode == 0 and "vm1 runs on host1" in done.stdout, done
    assert H1.qemu_pid() is not None
    for host in (H1, H2):
        said = start(host)
        assert said.returncode == 0 and "already runs on host1" in said.stdout, said
    H1.await_state("protected", timeout=60)


def test_the_standby_had_taken_over() -> None:
    """Its generation is the newer one: it starts there, with what was written there, though `start` is typed on host1.

    Fails if host1 starts its stale disk, or if host2 starts its disk without the overlays of its take-over.
    """
    protect(H1)
    H1.power_off()
    H2.await_took_over()
    until(lambda: redis("vm1", "set", "after-take-over", "yes") == "OK", 20, "redis writes")
    H2.power_off()
    back(H1)
    refused(H1)
    H1.mcft("maintenance", "on")  # protected to at once, the guest would boot three times as slowly
    back(H2)
    done = start(H1)
    assert done.returncode == 0 and "vm1 runs on host2" in done.stdout, done
    assert H1.qemu_pid() is None
    H1.await_lost()
    until(lambda: redis("vm1", "get", "after-take-over") == "yes", 60, "redis has what was written after the take-over")
    H1.mcft("maintenance", "off")


# What a host that died before QEMU had committed leaves: overlays beside the disk, and a record that they count.
UNCOMMITTED = """
import json, sqlite3, subprocess, sys
db = sqlite3.connect("/var/lib/mcft/mcft.db")
body = json.loads(db.execute("SELECT body FROM protection").fetchone()[0])
body["overlays_g"] = body["g"]
db.execute("UPDATE protection SET body = ?", (json.dumps(body).encode(),))
db.commit()
hidden, active = ("%s.mcft-%d-%s" % (sys.argv[1], body["g"], layer) for layer in ("hidden", "active"))
for overlay in (hidden, active):
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", overlay, "64M"], check=True)
subprocess.run(["qemu-io", "-c", "write -P 0xab %s 64k" % sys.argv[2], active], check=True)
"""
UNUSED = str((64 << 20) - (64 << 10))  # the disk's last bytes: no file system of the guest's is there


def test_overlays_that_were_not_committed_are_committed_first() -> None:
    """The chain is made by hand, as QEMU commits within milliseconds. Fails if the guest starts on the disk alone."""
    protect(H1)
    H1.mcft("failover", "vm1")
    H2.await_took_over()
    H2.await_committed()
    H2.run("virsh", "destroy", "vm1")
    H2.await_state("stopped")
    H2.sh("systemctl stop mcft-agent")
    H2.run("python3", "-c", UNCOMMITTED, IMAGE, UNUSED)
    H2.sh("systemctl start mcft-agent")
    done = start(H1)
    assert done.returncode == 0 and "vm1 runs on host2" in done.stdout, done
    assert H2.run("qemu-io", "-U", "-r", "-f", "raw", "-c", f"read -P 0xab {UNUSED} 64k", IMAGE).returncode == 0
    assert H2.sh(f"ls {IMAGE}.mcft-* || true") == ""
    assert "truth " in H2.sh("cat /var/lib/mcft/labels/*/vda")


@pytest.mark.parametrize("survivor", [H1, H2] if EVIDENCE else [H2], ids=str)
def test_the_other_host_is_gone_for_good(survivor: Host) -> None:
    """The operator accepts that data may be lost; should the other return after all, it starts nothing and gives way.

    Fails if it starts without that word, or if it is protected by itself after it.
    """
    protect(H1)
    both_off()
    back(survivor)
    refused(survivor)
    assert start(survivor, "--accept-lost-data").returncode == 2, "it must ask, and there is no terminal"
    done = start(survivor, "--accept-lost-data", "--yes")
    assert done.returncode == 0 and f"vm1 runs on {survivor.name}" in done.stdout, done
    assert survivor.qemu_pid() is not None
    back(other(survivor))
    other(survivor).await_state("lost")
    assert other(survivor).qemu_pid() is None
    assert survivor.status()["state"] == "unprotected", survivor.status()
    said = start(other(survivor))
    assert said.returncode == 0 and f"already runs on {survivor.name}" in said.stdout, said
