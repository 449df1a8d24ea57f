"""What is asked for and can't or must not be done: its exit code, a sentence that says what to do, and nothing changed.

Every test would fail if the act were tried after all (what it changes is in the snapshot), or if the sentence did not
name what is wrong. The lab has one QEMU only: one without COLO is that one with the name of the capability spelled
otherwise in its binary; those of broken versions are refused in `tests/unit/test_engine.py`.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import CompletedProcess

import pytest
import snapshot
from watching import Observer
from world import GATE, H1, H2, HOSTS, IMAGE, LAB, LIBVIRTD, UUID, Host, configured, guest, protect, until

HOOK = "/etc/libvirt/hooks/qemu"
QEMU = "/usr/bin/qemu-system-x86_64"
WITHOUT_COLO = "/usr/local/bin/qemu-without-colo"
OTHER_UUID = "99999999-2222-3333-4444-555555555555"
SETTLE_S = 5.0


def refused(host: Host, code: int, *names: str, command: tuple[str, ...]) -> CompletedProcess[str]:
    """The command ends with that code, on stderr stands a sentence with these words, and nothing on stdout."""
    done = host.mcft(*command, check=False, timeout=90)
    assert done.returncode == code, done
    said = done.stderr
    assert "Traceback" not in said and said.strip(), done
    for name in names:
        assert name in said, f"'{name}' is not in: {said}"
    return done


@contextmanager
def unchanged(*hosts: Host) -> Iterator[None]:
    """Within it nothing changes on these hosts."""
    before = {host: snapshot.take(host) for host in hosts}
    yield
    left: list[str] = []

    def equal() -> bool:
        left[:] = [f"{h}: {line}" for h in hosts for line in snapshot.diff(before[h], snapshot.take(h))]
        return not left

    until(equal, SETTLE_S, lambda: "nothing changed:\n" + "\n".join(left))


def one_more(name: str) -> str:
    """A further peer, at an address where nobody is."""
    return f"printf '[peers.{name}]\\naddresses = [\"10.99.0.99\"]\\n' >> $file"


# ---- nothing needs to run for these ----


def test_names_that_nobody_has() -> None:
    """Fails if a name is taken for something else, or if 3 is confused with 2 or 4."""
    with unchanged(H1, H2):
        refused(H1, 3, "nobody", command=("protect", "nobody", "--to", "host2"))
        refused(H1, 3, "nowhere", "host2", command=("protect", "vm1", "--to", "nowhere"))
        refused(H1, 3, "nobody", command=("status", "nobody"))
        refused(H1, 3, "nobody", command=("unprotect", "nobody"))
        refused(H1, 3, "vm1", command=("set", "vm1", "--delay", "50ms"))
        refused(H1, 3, "vm1", command=("solo", "vm1"))
        refused(H1, 3, "nowhere", command=("--host", "nowhere", "status"))


@pytest.mark.parametrize("delay", ["0", "-5", "abc", "100", "5ms", "11s", "0ms", "-5ms", "1e3ms", "nan", ""])
def test_delays(delay: str) -> None:
    """Fails if a number without a unit, or outside 10ms to 10s, gets as far as the agent."""
    refused(H1, 2, "delay", command=("protect", "vm1", "--to", "host2", f"--delay={delay}"))
    assert not H1.status()


def test_a_number_without_a_unit_is_told_how_to_say_it() -> None:
    """Fails if the refusal does not say the word to type."""
    refused(H1, 2, "100ms", command=("protect", "vm1", "--to", "host2", "--delay", "100"))


def test_usage() -> None:
    """Fails if `forget` goes without the word that only this host is touched, or if a missing option is guessed."""
    with unchanged(H1):
        refused(H1, 2, "--local", command=("forget", "vm1"))
        refused(H1, 2, "--to", command=("protect", "vm1"))
        refused(H1, 2, "--yes", command=("solo", "vm1", "--peer-is-off"))
        refused(H1, 2, "--netbuffer", command=("protect", "vm1", "--to", "host2", "--netbuffer", "magic"))
        refused(H1, 2, "--disk vda=", command=("protect", "vm1", "--to", "host2", "--disk", "vda"))


def test_unprotect_of_what_is_not_protected() -> None:
    """It is as asked already: 0. Fails if the absence of a protection is an error."""
    with unchanged(H1, H2):
        done = H1.mcft("unprotect", "vm1", check=False)
        assert done.returncode == 0 and "not protected" in done.stdout, done


def test_to_itself() -> None:
    """Fails if a host can be its own standby."""
    with unchanged(H1):
        refused(H1, 4, "host1", "this host", command=("protect", "vm1", "--to", "host1"))


# ---- peers ----


def test_peers_that_do_not_answer_or_are_not_who_they_should_be() -> None:
    """Fails if silence (5) and a certificate of another name (4) are not told apart, or if either is gone past."""
    # host2's agent under another name: its certificate does not carry that one.
    with configured(H1, f"sed -i s/peers.host2/peers.wrong/ $file && {one_more('silent')}"), unchanged(H1, H2):
        refused(H1, 5, "silent", command=("protect", "vm1", "--to", "silent"))
        refused(H1, 4, "wrong", "certificate", command=("protect", "vm1", "--to", "wrong"))


def test_a_peer_that_does_not_know_this_host() -> None:
    """host2 has forgotten that host1 is its peer. Fails if a certificate of the CA is enough."""
    with configured(H2, "sed -i s/peers.host1/peers.somebody/ $file"), unchanged(H1, H2):
        refused(H1, 4, "host1", command=("protect", "vm1", "--to", "host2"))


@contextmanager
def a_listener_of_another_ca() -> Iterator[None]:
    """On cl, at the agents' port, with a certificate that our CA did not sign."""
    pki = "/etc/pki/test"
    server = subprocess.Popen(
        [LAB, "run", "cl", "--", "openssl", "s_server", "-accept", "10.77.0.100:16520", "-quiet",
         "-cert", f"{pki}/foreign-cert.pem", "-key", f"{pki}/foreign-key.pem"],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        listening = [LAB, "run", "cl", "--", "ss", "-Hltn", "sport = 16520"]
        until(lambda: subprocess.run(listening, capture_output=True, timeout=20).stdout, 10, "another CA's listener")
        yield
    finally:
        server.terminate()
        server.wait(10)


def test_a_peer_of_another_ca() -> None:
    """Who answers there has no certificate of our CA. Fails if any TLS server is taken for an agent."""
    change = "printf '[peers.host5]\\naddresses = [\"10.77.0.100\"]\\n' >> $file"
    with a_listener_of_another_ca(), configured(H1, change), unchanged(H1, H2):
        refused(H1, 4, "host5", "certificate", command=("protect", "vm1", "--to", "host5"))


def test_no_agent() -> None:
    """Fails if the command waits, or if it does not say which agent is missing."""
    H1.sh("systemctl stop mcft-agent")
    try:
        refused(H1, 5, "agent", command=("status",))
        refused(H1, 5, "agent", command=("protect", "vm1", "--to", "host2"))
        refused(H1, 5, command=("status", "--check"))
    finally:
        H1.sh("systemctl start mcft-agent")
        until(H1.answers, 20, "h1: the agent answers")
    H2.sh("systemctl stop mcft-agent")
    try:
        with unchanged(H1):
            refused(H1, 5, "host2", command=("protect", "vm1", "--to", "host2"))
    finally:
        H2.sh("systemctl start mcft-agent")
        until(H2.answers, 20, "h2: the agent answers")


# ---- domains ----


def probe(name: str, host: Host, *, uuid: str = OTHER_UUID, nic: str = "", start: bool = True, emulator: str = QEMU) -> None:
    """A small domain beside vm1 that never boots anything. nic: its further devices."""
    xml = (
        f"<domain type='qemu'><name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>32</memory><vcpu>1</vcpu>"
        f"<os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type></os><devices><emulator>{emulator}</emulator>{nic}"
        "<controller type='usb' model='none'/><memballoon model='none'/></devices></domain>"
    )
    host.sh(f"cat > /run/probe.xml << 'END'\n{xml}\nEND\nvirsh -q define /run/probe.xml && rm /run/probe.xml")
    if start:
        host.sh(f"virsh -q start {name}")


def gone(name: str, host: Host) -> None:
    host.sh(f"virsh -q destroy {name}; virsh -q undefine {name}", check=False)


def test_a_domain_that_does_not_run() -> None:
    """Fails if a stopped or a paused guest is protected."""
    probe("sleeper", H1, start=False)
    try:
        with unchanged(H1, H2):
            refused(H1, 4, "sleeper", "not running", command=("protect", "sleeper", "--to", "host2"))
    finally:
        gone("sleeper", H1)
    H1.sh("virsh -q suspend vm1")
    try:
        with unchanged(H1, H2):
            refused(H1, 4, "vm1", "paused", "virsh resume", command=("protect", "vm1", "--to", "host2"))
    finally:
        H1.sh("virsh -q resume vm1")


def test_a_nic_that_cannot_be_buffered() -> None:
    """Fails if such a NIC is a silent hole in the buffer."""
    probe("leaky", H1, nic="<interface type='user'><mac address='52:54:00:00:00:77'/><model type='e1000'/></interface>")
    try:
        with unchanged(H1, H2):
            refused(H1, 4, "NIC", "user", "--netbuffer none", command=("protect", "leaky", "--to", "host2"))
    finally:
        gone("leaky", H1)


def test_devices_that_cannot_follow() -> None:
    """Fails if a disk that another domain may write, or a device with a state of its own, is passed over in silence."""
    shared = (
        "<disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/>"
        "<source file='/var/lib/libvirt/images/shared.img'/><target dev='vda' bus='virtio'/><shareable/></disk>"
    )
    H1.sh("truncate -s 1M /var/lib/libvirt/images/shared.img")
    probe("sharing", H1, nic=shared)
    try:
        with unchanged(H1, H2):
            refused(H1, 4, "vda", "shareable", command=("protect", "sharing", "--to", "host2"))
    finally:
        gone("sharing", H1)
        H1.sh("rm -f /var/lib/libvirt/images/shared.img")


@pytest.fixture
def without_colo() -> str:
    """The path, on both hosts, of a QEMU that has no capability x-colo."""
    new = f"{WITHOUT_COLO}.new"
    for host in HOSTS:
        host.sh(
            f"[ -e {WITHOUT_COLO} ] || {{ sed s/x-colo/x-cola/g {QEMU} > {new} && chmod 755 {new} && mv {new} {WITHOUT_COLO}; }}"
        )
    return WITHOUT_COLO


def test_a_qemu_without_the_engine(without_colo: str) -> None:
    """Of the domain itself. Fails if the engine is guessed from the version and not asked of QEMU."""
    probe("plain", H1, emulator=without_colo)
    try:
        with unchanged(H1, H2):
            refused(H1, 4, "plain", "without COLO", command=("protect", "plain", "--to", "host2"))
    finally:
        gone("plain", H1)


def test_a_peer_without_the_engine(without_colo: str, observer: Observer) -> None:
    """Of the peer alone. Fails if only the primary's is asked, or if the refusal comes back as a failure."""
    observer.hears()
    with unchanged(H1, H2):
        H2.sh(f"mount --bind {without_colo} {QEMU}")
        try:
            refused(H1, 4, "host2", "can't follow vm1", "without COLO", command=("protect", "vm1", "--to", "host2"))
        finally:
            H2.sh(f"umount {QEMU}")
    observer.hears()
    observer.clean()


def test_a_name_that_is_taken_on_the_peer() -> None:
    """host2 has another domain named vm1. Fails if a domain is known by its name alone."""
    probe("vm1", H2, start=False)
    try:
        with unchanged(H1, H2):
            refused(H1, 4, "vm1", "host2", OTHER_UUID, command=("protect", "vm1", "--to", "host2"))
    finally:
        gone("vm1", H2)


def test_the_same_domain_runs_on_the_peer() -> None:
    """Fails if a copy that somebody started by hand is overrun."""
    probe("vm1", H2, uuid=UUID)
    try:
        with unchanged(H1, H2):
            refused(H1, 4, "vm1", "runs on host2", command=("protect", "vm1", "--to", "host2"))
    finally:
        gone("vm1", H2)


def test_a_file_in_the_way() -> None:
    """A file of the disk's name that mcft does not know is not overwritten without a word; with it, it is.

    Fails if the label is not asked for (the file's content would be another).
    """
    H2.sh(f"echo precious > {IMAGE}")
    try:
        with unchanged(H1, H2):
            refused(H1, 4, IMAGE, f"--overwrite {IMAGE}", command=("protect", "vm1", "--to", "host2"))
        assert H2.sh(f"cat {IMAGE}") == "precious\n"
        protect(H1, "--overwrite", IMAGE)
        assert H1.mcft("unprotect", "vm1", check=False).returncode == 0
    finally:
        H2.sh(f"rm -f {IMAGE}")


# ---- the hook ----


@pytest.mark.parametrize("host", [H1, H2], ids=str)
def test_no_hook(host: Host) -> None:
    """Fails if a host is trusted on which nothing stops a stale copy from starting; also with the file alone there."""
    host.sh(f"cp -p {HOOK} /root/mcft-hook")
    try:
        host.sh(f"rm {HOOK} && systemctl restart {LIBVIRTD}")
        with unchanged(H1, H2):
            refused(H1, 4, "hook", "not installed", host.name, command=("protect", "vm1", "--to", "host2"))
        # Added to a daemon that runs: libvirt does not call it before its next start.
        host.sh(f"cp -p /root/mcft-hook {HOOK}")
        with unchanged(H1, H2):
            refused(H1, 4, "inert", host.name, f"restart {LIBVIRTD}", command=("protect", "vm1", "--to", "host2"))
    finally:
        host.sh(f"[ -e {HOOK} ] || cp -p /root/mcft-hook {HOOK}; rm -f /root/mcft-hook; systemctl restart {LIBVIRTD}")
        until(lambda: host.run("virsh", "list", check=False).returncode == 0, 20, f"{host}: {LIBVIRTD} answers")
    assert guest("ping") == "pong"


def test_an_rdma_device_where_there_is_none() -> None:
    """Fails if a device that was named is done without, or if a name that is none is tried."""
    with unchanged(H1, H2):
        for command in (("protect",), ("check",)):
            wanted = (*command, "vm1", "--to", "host2", "--rdma-device")
            refused(H1, 2, "--rdma-device", '"auto"', command=(*wanted, "no name"))
            done = H1.mcft(*wanted, "mlx9_0", check=False, timeout=90)
            assert done.returncode == 4 and "RDMA" in done.stdout + done.stderr, done


# ---- while it is protected ----


def test_asked_again_while_protected() -> None:
    """Fails if asking twice does something twice, or if other settings are taken for the same."""
    with configured(H1, one_more("host3")):
        refused(H1, 3, "vm1", command=("wait", "vm1", "--for", "protected", "--timeout", "1s"))
        protect(H1)
        with unchanged(H1, H2):
            again = H1.mcft("protect", "vm1", "--to", "host2", check=False)
            assert again.returncode == 0 and "already" in again.stdout, again
            refused(H1, 4, "mcft set vm1 --delay 50ms", command=("protect", "vm1", "--to", "host2", "--delay", "50ms"))
            refused(H1, 4, "host2", "unprotect", command=("protect", "vm1", "--to", "host3"))
            refused(H2, 4, "host1", command=("protect", "vm1", "--to", "host1"))
            refused(H2, 4, "host1", command=("unprotect", "vm1"))
            refused(H2, 4, "host1", command=("set", "vm1", "--delay", "50ms"))
            refused(H1, 2, "delay", command=("set", "vm1", "--delay", "5ms"))
            refused(H1, 6, command=("wait", "vm1", "--for", "solo", "--timeout", "1s"))
            refused(H1, 2, "--local", command=("forget", "vm1"))
        assert H1.main_pid(GATE), "the gate runs"
        assert H1.status()["state"] == "protected" and H1.status()["delay_ms"] == 100
        assert H1.mcft("unprotect", "vm1", check=False).returncode == 0


def test_asked_again_while_it_protects() -> None:
    """Fails if the end of waiting cancels the set-up, or if a second one begins beside it."""
    refused(H1, 6, "still goes on", "mcft status vm1", command=("protect", "vm1", "--to", "host2", "--timeout", "300ms"))
    refused(H1, 4, "vm1", command=("protect", "vm1", "--to", "host2", "--delay", "200ms"))
    H1.await_state("protected", timeout=40)
    assert H1.status()["delay_ms"] == 100


@contextmanager
def without_agent(host: Host) -> Iterator[None]:
    host.sh("systemctl stop mcft-agent")
    try:
        yield
    finally:
        host.sh("systemctl start mcft-agent")
        until(host.answers, 20, f"{host}: the agent answers")


def test_the_other_agent_is_silent(observer: Observer) -> None:
    """An agent that does not answer is no dead host: what needs its word is refused, and nobody is muted or taken over.

    Fails if solo or unprotect go on without the standby's word, or failover without the primary's while its gate sends.
    """
    protect(H1)
    observer.hears()
    generation, pids = H1.status()["generation"], [host.qemu_pid() for host in HOSTS]
    with without_agent(H2):
        for act in ("solo", "unprotect"):
            refused(H1, 4, "host2", "does not answer", "mcft solo vm1 --peer-is-off", command=(act, "vm1"))
        refused(H1, 2, "--yes", command=("solo", "vm1", "--force"))
        observer.hears(2.0)
        assert H1.state() == "protected"
    H2.await_state("protected")
    with without_agent(H1):
        refused(H2, 4, "host1", "still sends keepalives", command=("failover", "vm1"))
        refused(H2, 4, "--peer-is-off", command=("failover", "vm1", "--force", "--yes"))
        observer.hears(2.0)
        assert H2.state() == "protected"
    assert H1.await_state("protected")["generation"] == generation
    assert [host.qemu_pid() for host in HOSTS] == pids
    observer.clean()
