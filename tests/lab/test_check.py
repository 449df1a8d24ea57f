"""`mcft check`: what it says is what `protect` does, on both hosts, and nothing is touched by it."""

from __future__ import annotations

import json
from typing import Any

import snapshot
from test_bad_input import unchanged
from world import H1, H2, guest, protect


def check(*more: str) -> tuple[int, dict[str, Any]]:
    """Exit code, and the agent's object."""
    done = H1.mcft("check", "vm1", "--to", "host2", "--json", *more, check=False)
    return done.returncode, json.loads(done.stdout)


def codes(answer: dict[str, Any], level: str) -> set[str]:
    return {finding["code"] for finding in answer["findings"] if finding["level"] == level}


def test_a_guest_that_can_be_protected() -> None:
    """Fails if something is left of the check, if an unbuffered output goes unnamed, or if the rate is not measured."""
    assert guest("dirty", "40") == "ok"
    try:
        with unchanged(H1, H2):
            code, answer = check()
    finally:
        guest("dirty", "0")
    assert (code, answer["exit_code"], codes(answer, "refusal")) == (0, 0, set())
    assert {"unbuffered-serial", "no-kvm", "arbiter"} <= codes(answer, "warning")
    assert {"engine", "hook", "machine", "networks", "memory", "room", "engine-there"} <= codes(answer, "ok")
    assert 10 << 20 < answer["prediction"]["dirty_bytes_per_s"] < 200 << 20
    protect(H1)
    code, answer = check()
    assert code == 0 and codes(answer, "ok") == {"already"}


def test_what_the_peer_lacks_is_refused_by_both() -> None:
    """Fails if only one of `check` and `protect` refuses, or if the file is named by neither."""
    path = "/var/lib/libvirt/images/somebodys.img"
    H2.sh(f"truncate -s 1M {path}; ip link set br0 name br1")
    try:
        code, answer = check("--disk", f"vda={path}")
        assert code == 4 and {"no-network", "file-exists"} <= codes(answer, "refusal")
        done = H1.mcft("protect", "vm1", "--to", "host2", "--disk", f"vda={path}", check=False)
        assert done.returncode == 4 and "br0" in done.stderr
    finally:
        H2.sh(f"ip link set br1 name br0; rm -f {path}")


def test_a_silent_peer_and_unknown_names() -> None:
    """Fails if 3, 4 and 5 are confused, or if what can be said without the peer is not said."""
    before = snapshot.take(H1)
    H2.sh("systemctl stop mcft-agent")
    try:
        code, answer = check()
    finally:
        H2.sh("systemctl start mcft-agent")
    assert code == 5 and "peer-unreachable" in codes(answer, "refusal") and "engine" in codes(answer, "ok")
    assert H1.mcft("check", "nobody", "--to", "host2", check=False).returncode == 3
    assert H1.mcft("check", "vm1", "--to", "nowhere", check=False).returncode == 3
    assert not snapshot.diff(before, snapshot.take(H1))
