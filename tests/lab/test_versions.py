"""mcft is upgraded one host at a time: agents, gates and records of the version before, beside and under this one's."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from watching import Load
from world import H1, H2, HOSTS, REPO, Host, protect, until

BEFORE = "02e3f8a"  # the last that landed before the arbiters, engine mc and the RDMA keepalive
OLD = "/var/lib/mcft-before"
UNITS = ("mcft-agent.service", "mcft-gate@.service")
DROP_IN = "zz-before.conf"  # after the lab's own, which sets PYTHONPATH too


def archive() -> bytes:
    made = subprocess.run(["git", "-C", REPO, "archive", BEFORE, "mcft"], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"this clone's history lacks {BEFORE} (a shallow one?): {made.stderr.decode().strip()}")
    return made.stdout


@contextmanager
def downgraded(host: Host) -> Iterator[None]:
    """The host's agent, and every gate that starts, is of the version before."""
    assert host.root is not None
    files = host.root / OLD.lstrip("/")
    files.mkdir(exist_ok=True)
    subprocess.run(["tar", "-x", "-C", files], input=archive(), check=True)
    for unit in UNITS:
        host.sh(f"mkdir -p /etc/systemd/system/{unit}.d && cat > /etc/systemd/system/{unit}.d/{DROP_IN} << 'EOF'\n"
                f"[Service]\nEnvironment=PYTHONPATH={OLD}\nEOF")  # fmt: skip
    restarted(host)
    loaded = host.sh("tr '\\0' '\\n' < /proc/$(systemctl show -P MainPID mcft-agent)/environ")
    assert f"PYTHONPATH={OLD}" in loaded, loaded
    try:
        yield
    finally:
        if not host.on:
            host.power_on()
        upgrade(host)


def upgrade(host: Host) -> None:
    """This version's files, and the agent restarted, as a package does it: the gates go on as they are."""
    host.sh("rm -rf " + " ".join(f"/etc/systemd/system/{unit}.d/{DROP_IN}" for unit in UNITS))
    restarted(host)


def restarted(host: Host) -> None:
    host.sh("systemctl daemon-reload && systemctl reset-failed mcft-agent; systemctl restart mcft-agent")
    until(host.answers, 20, f"{host}: the agent answers")


@pytest.mark.parametrize("older", HOSTS, ids=str)
def test_one_side_is_older(older: Host, load: Load) -> None:
    """Protected by and to the version before; the primary's host is lost; the standby goes on.

    Fails if a datagram, a record or a request changed its form without a default for who does not know it.
    """
    with downgraded(older):
        protect(H1)
        load.flowing()
        H1.power_off()
        H2.await_took_over()
        load.goes_on()
        load.finished()


def test_upgraded_while_protected(load: Load) -> None:
    """Both hosts upgraded under a protected guest: old records, old gates under new agents; then a loss, and protected again.

    Fails if an agent can't read what the one before it wrote, or asks a gate what that does not know.
    """
    with ExitStack() as stack:
        for host in HOSTS:
            stack.enter_context(downgraded(host))
        protect(H1)
        load.flowing()
        instance = H1.status()["instance"]
        for host in (H2, H1):
            upgrade(host)
            until(lambda host=host: host.status().get("survives_host_loss"), 20, f"{host}: still protected")  # type: ignore[misc]
        assert H1.status()["instance"] == instance and H1.state() == "protected"
        load.goes_on()
        H1.kill_qemu()
        H2.await_took_over()
        load.goes_on()
        protect(H2)
        load.finished()
