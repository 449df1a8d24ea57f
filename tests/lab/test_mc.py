"""Engine `mc` on real domains: libvirt, gates, agents are real; QEMU is the stand-in (`tests/mcqemu`: its first line says so).

A guest without a disk of the host's. This machine's kernel has no plug, and that QEMU no filter, so nothing is buffered here
(`--netbuffer none`): what leaves when is shown by the replays (`tests/replay`), who goes on and how fast by these.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator

import pytest
import world
from mcworld import definition, hang_next, traced, without_tls
from world import H1, H2, HOSTS, LIBVIRTD, REPO, configured, guest, guest_answers, lab, link, now, protect, redefined, until

pytestmark = pytest.mark.skipif(not (REPO / "tests/mcqemu/emulator").exists(), reason="the stand-in is not in this tree")


@pytest.fixture(scope="module")
def hosts_without_tls(the_lab: None) -> Iterator[None]:
    """For all tests here; afterwards the lab's own configuration and guest."""
    for host in HOSTS:
        if not host.on:
            host.power_on()
    world.wipe()
    for host in HOSTS:
        without_tls(host)
        traced(host)
    yield
    world.wipe()
    lab("install")
    lab("vm", "start", "h1")


@pytest.fixture(autouse=True)
def fresh_world(hosts_without_tls: None) -> None:
    """Not the world of the other tests: vm1 by the stand-in, on h1, unprotected; links up, both hosts on."""
    for name in ("rep", "lan:h1"):
        link(name, "up")
    for host in HOSTS:
        if not host.on:
            host.power_on()
        without_tls(host)
    if H1.status() or H2.status() or H1.qemu_pid() is None or not guest_answers():
        world.wipe()
        redefined(definition())


def follow() -> None:
    protect(H1, "--engine", "mc", "--netbuffer", "none", "--delay", "100ms")


def runs_on_h2() -> None:
    """libvirt's own idea of it lags by some ms."""
    H2.await_took_over()
    until(lambda: H2.status()["guest_running"], 5, "libvirt shows it running")


def take_overs() -> int:
    return sum("runs here now" in event["text"] for event in H2.events())


def test_protect_set_and_let_go() -> None:
    """Chosen by asking QEMU; its statistics shown; the delay changed; nothing left. Fails if `auto` took colo."""
    refused = H1.mcft("protect", "vm1", "--to", "host2", check=False)
    assert refused.returncode == 4, refused.stderr
    follow()
    shown = H1.status()
    assert (shown["engine"], shown["mc"]["transport"], shown["mc"]["monitor"]) == ("mc", "tcp", "libvirt")
    assert {"mc", "mc-net-disable", "mc-disk-disable"} <= set(shown["mc"]["capabilities"])
    assert {"xmit-time", "ram-copy-time", "downtime"} <= set(shown["mc"]["statistics"])
    H1.mcft("set", "vm1", "--delay", "400ms")
    until(lambda: 1.0 < H1.status()["checkpoints"]["rate_hz"] < 3.5, 15, "its checkpoints come at the new delay")
    H1.mcft("unprotect", "vm1")
    assert guest_answers() and H2.qemu_pid() is None
    assert {row["state"] for row in H1.qmp("query-migrate-capabilities") if row["capability"].startswith("mc")} == {False}


@pytest.mark.parametrize("loss", ["kill", "power"])
def test_take_over(loss: str, measure: Callable[[str, float], float]) -> None:
    """The primary's QEMU killed, or its host's power cut; protected back afterwards. Fails if the copy resumed by itself."""
    follow()
    until(lambda: H2.status()["survives_host_loss"], 10, "the standby is whole")
    at_s = H1.kill_qemu() if loss == "kill" else H1.power_off()
    until(guest_answers, 30, "the guest answers on host2")
    measure(f"mc: guest answers after {loss}", now() - at_s)
    runs_on_h2()
    if loss == "power":
        H1.power_on()
        without_tls(H1)
    protect(H2, "--engine", "mc", "--netbuffer", "none")
    H2.mcft("unprotect", "vm1")


@contextlib.contextmanager
def libvirt_by(host: world.Host, uri: str) -> Iterator[None]:
    """The agent's way to its libvirtd; over TCP that one listens on the host itself, and asks nobody who he is; with TLS it looks
    at his certificate, as he does at its."""
    unit = "libvirtd" if LIBVIRTD == "libvirtd" else "virtproxyd"  # of modular daemons only that one does
    conf = f"/etc/libvirt/{unit}.conf"
    with contextlib.ExitStack() as stack:
        if way := next((way for way in ("tcp", "tls") if f"+{way}:" in uri), ""):
            # Its sockets too: an agent that asks again would start it by them, and a daemon that listens takes no further socket.
            stop = f"systemctl stop {unit}.socket {unit}-ro.socket {unit}-admin.socket {unit}-{way}.socket {unit}"
            stack.callback(host.sh, f"{stop}; mv {conf}.kept {conf}; systemctl start {unit}")
            host.sh(f"cp {conf} {conf}.kept; echo 'auth_tcp = \"none\"' >> {conf}; {stop}; "
                    f"systemctl start {unit}-{way}.socket {unit}")  # fmt: skip
        stack.enter_context(configured(host, f"printf '\\n[agent]\\nlibvirt_uri = \"{uri}\"\\n' >> $file"))
        yield


WAYS = ["qemu+unix:///system?socket=/run/libvirt/libvirt-sock", "qemu+tcp://localhost/system", "qemu+tls://{host}/system"]


@pytest.mark.parametrize("uri", WAYS)
def test_other_ways_to_libvirt(uri: str) -> None:
    """As to an old daemon's socket, and to one that listens on TCP, also with TLS: protected, the delay set, taken over, let go.

    Fails if anything but the monitor passthrough's plain commands is needed (over TCP no descriptor can be handed over), or if a
    daemon that was restarted is asked no more (behind virtproxyd the agent's own connection outlives virtqemud).
    """
    with contextlib.ExitStack() as stack:
        for host in HOSTS:
            stack.enter_context(libvirt_by(host, uri.format(host=host.name)))
        follow()
        for host in HOSTS:
            host.run("systemctl", "restart", LIBVIRTD)
        until(lambda: H1.mcft("set", "vm1", "--delay", "200ms", check=False).returncode == 0, 20, "the delay is set")
        until(lambda: H2.status()["survives_host_loss"], 10, "the standby is whole")
        H1.kill_qemu()
        runs_on_h2()
        until(guest_answers, 30, "the guest answers on host2")
        H2.mcft("unprotect", "vm1")


def test_partition() -> None:
    """Both links cut: the standby breaks its deaf QEMU's socket and goes on; the other side loses when they are back.

    Fails without SOCK_DESTROY: that QEMU would wait for 70 s.
    """
    follow()
    began_s = now()
    link("lan:h1", "down")  # (first: a lost replication link alone makes the standby give up)
    link("rep", "down")
    H2.await_took_over(timeout=15)
    assert now() - began_s < 20
    link("lan:h1", "up")
    link("rep", "up")
    H1.await_lost()
    until(lambda: H1.qemu_pid() is None, 10, "host1's stale guest is gone")
    assert guest_answers()


def test_planned_switch() -> None:
    follow()
    H1.mcft("failover", "vm1")
    runs_on_h2()
    H1.await_lost()
    assert guest_answers()


@pytest.mark.parametrize("way", ["virsh destroy", "guest"])
def test_an_intended_end_is_no_take_over(way: str) -> None:
    """Its operator's word, or the guest's own: the copy goes too. Fails if QEMU's end counts before libvirt has told why."""
    before = take_overs()
    follow()
    until(lambda: H2.status()["survives_host_loss"], 10, "the standby is whole")
    if way == "guest":
        with contextlib.suppress(subprocess.TimeoutExpired):  # its answer stays behind
            guest("poweroff", timeout=3)
    else:
        H1.run("virsh", "-q", "destroy", "vm1")
    H1.await_state("stopped")
    until(lambda: H2.qemu_pid() is None, 20, "the copy is gone")
    assert take_overs() == before


def test_a_hang_is_handed_over() -> None:
    """A checkpoint without a dirty page hangs that QEMU for ever: counter frozen, monitor silent; it is killed, the copy goes on.

    Fails if nobody kills it: its monitor's end would never come.
    """
    follow()
    until(lambda: H2.status()["survives_host_loss"], 10, "the standby is whole")
    hung = H1.qemu_pid()
    hang_next(H1)
    H2.await_took_over(timeout=40)
    until(guest_answers, 20, "the guest answers on host2")
    H1.await_lost()
    until(lambda: H1.qemu_pid() != hung, 10, "the QEMU that hung is gone")


def test_a_hang_at_the_first_checkpoint_is_handed_over() -> None:
    """No page was dirty since the first pass, so the copy has exactly the guest's state: it is armed all the same and goes on.

    Fails if `protect` is undone: the guest that hung can't be brought back.
    """
    before = take_overs()
    hung = H1.qemu_pid()
    hang_next(H1)
    words = ("protect", "vm1", "--to", "host2", "--engine", "mc", "--netbuffer", "none")
    told = H1.mcft(*words, check=False, timeout=90)
    assert told.returncode == 1 and "hung at the first checkpoint" in told.stderr and "vm1 runs on host2 now" in told.stderr, told
    until(guest_answers, 20, "the guest answers on host2")
    assert take_overs() == before + 1
    until(lambda: H1.qemu_pid() != hung, 10, "the QEMU that hung is gone")


IMAGE = "/var/lib/libvirt/images/written.img"
DISK = f"<disk type='file' device='disk'><source file='{IMAGE}'/><target dev='vda' bus='virtio'/></disk>"


@pytest.mark.parametrize("wrong", ["a disk that is written", "offloads"])
def test_a_domain_that_this_engine_can_not_follow(wrong: str) -> None:
    """Said by `check` and by `protect` (4), on the real domain; nothing is made. Fails if one of them goes on."""
    world.wipe()
    if wrong == "offloads":
        redefined(definition(offloads=""))
    else:
        H1.sh(f"truncate -s 4M {IMAGE}")
        redefined(definition().replace("<interface", f"{DISK}<interface", 1))
    code, said = ("mc-offloads", "ctrl_guest_offloads") if wrong == "offloads" else ("mc-disk", "disk vda")
    words = ("vm1", "--to", "host2", "--netbuffer", "none")
    found = json.loads(H1.mcft("check", *words, "--json", check=False).stdout)["findings"]
    assert [row for row in found if row["code"] == code and said in row["message"]], found
    refused = H1.mcft("protect", *words, check=False)
    assert refused.returncode == 4 and said in refused.stderr, refused
    assert not H1.status() and not H2.status() and H2.qemu_pid() is None and guest_answers()
    world.wipe()
    H1.sh(f"rm -f {IMAGE}")


def test_the_standby_dies() -> None:
    """Its QEMU killed: the primary says `failed` and goes on, and is protected again. Fails if the guest was touched."""
    follow()
    generation = H1.status()["generation"]
    H2.kill_qemu()
    until(lambda: H1.state() == "protected" and H1.status()["generation"] > generation, 60, "protected again")
    assert guest_answers()
