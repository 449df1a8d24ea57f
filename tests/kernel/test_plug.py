"""Real frames through real plug qdiscs, driven by `PlugBuffer` as the gate drives it."""

from __future__ import annotations

import os
import random
import select
import socket
import time
from collections.abc import Iterator

import pytest
from frames import Wire, nic, sh
from switches import datagram, on_open_vswitch, routed

from mcft.commit import CommitGate, Release, SetBarrier
from mcft.errors import Failed, Refused
from mcft.plugbuffer import Limit, PlugBuffer

LIMIT = 16 << 20
CRAM_S = float(os.environ.get("MCFT_PLUG_S", "60" if os.environ.get("MCFT_EVIDENCE") else "10"))


def attached(wire: Wire, limit: int = LIMIT) -> PlugBuffer:
    buffer = PlugBuffer()
    buffer.attach([nic(tap) for tap in wire.taps], Limit(limit))
    return buffer


@pytest.fixture
def buffer(wire: Wire) -> Iterator[PlugBuffer]:
    made = attached(wire)
    yield made
    made.shut()


def held(buffer: PlugBuffer) -> int:
    buffer.poll()
    return sum(row.packets for row in buffer.backlog())


def test_pass_through_until_the_hold_then_nothing(wire: Wire, buffer: PlugBuffer) -> None:
    """Fails if `attach` leaves the plug closed, or `hold` does not close it."""
    sent = wire.send(0, 12)
    assert wire.comes(12) == sent
    buffer.hold()
    wire.send(1, 12)
    assert held(buffer) == 12 and wire.arrived() == []


def epochs_leave_in_order(wire: Wire, buffer: PlugBuffer, *, epochs: int, packets: int) -> list[tuple[int, int, int]]:
    """Held from now on, each leaves when it is released, whole and alone; the last one is still held: its packets."""
    buffer.hold()
    before = wire.send(0, packets)
    for epoch in range(1, epochs):
        buffer.barrier()
        now = wire.send(epoch, packets)
        assert wire.arrived() == []
        buffer.release()
        assert wire.comes(packets) == before
        before = now
    return before


def test_epochs_leave_exactly_and_in_order(wire: Wire, buffer: PlugBuffer) -> None:
    """Every protocol. Fails if `barrier` counts one packet more or less, or the filter takes IPv4 only."""
    epochs_leave_in_order(wire, buffer, epochs=20, packets=50)
    assert held(buffer) == 50 and not buffer.broken


def test_epochs_leave_in_order_on_open_vswitch(wire: Wire) -> None:
    """Its datapath takes what comes from a tap by the same hook as a bridge. Fails if the redirect does not come before that."""
    on_open_vswitch("vnet0", "c0")
    wire.kinds = tuple(kind for kind in wire.kinds if kind != 0x8100)  # another flow's
    sent = wire.send(0, 12)
    assert wire.comes(12) == sent, "the datapath itself passes everything"
    buffer = attached(wire)
    last = epochs_leave_in_order(wire, buffer, epochs=10, packets=24)
    buffer.open()
    assert wire.comes(24) == last and not buffer.broken
    buffer.detach()
    sent = wire.send(0, 12)
    assert wire.comes(12) == sent


def test_epochs_leave_in_order_into_the_hosts_own_routes(wire: Wire) -> None:
    """A tap on no bridge. Fails if what leaves the IFB does not come back as the tap's, or leaves before its release."""
    mac = routed("vnet0", "10.5.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.bind(("10.5.0.1", 5005))
        host.settimeout(10)

        def say(*words: bytes) -> None:
            for word in words:
                os.write(wire.fds["vnet0"], datagram(mac, "10.5.0.10", "10.5.0.1", 5005, word))

        say(b"before")
        assert host.recv(100) == b"before"
        buffer = attached(wire)
        buffer.hold()
        say(b"1", b"2")
        buffer.barrier()
        say(b"3")
        assert select.select([host], [], [], 0.2)[0] == []
        buffer.release()
        assert [host.recv(100), host.recv(100)] == [b"1", b"2"] and select.select([host], [], [], 0.2)[0] == []
        buffer.open()
        buffer.detach()
        say(b"4")
        assert [host.recv(100), host.recv(100)] == [b"3", b"4"]


def test_two_nics_share_each_epoch(two: Wire) -> None:
    """Fails if the second NIC's messages are not sent with the first's."""
    buffer = attached(two)
    buffer.hold()
    first = two.send(0, 5, tap="vnet0") + two.send(0, 5, tap="vnet1")
    buffer.barrier()
    second = two.send(1, 5, tap="vnet1") + two.send(1, 5, tap="vnet0")
    buffer.release()
    assert sorted(two.comes(10)) == sorted(first) and two.arrived() == []
    buffer.barrier()
    buffer.release()
    assert sorted(two.comes(10)) == sorted(second)
    buffer.detach()


def test_cram(wire: Wire, buffer: PlugBuffer) -> None:
    """200 epochs a second with acknowledgements late at random, as `commit.py` asks for them: nothing early, nothing lost,
    nothing lagging at the end. Fails if `barrier` sends a second BUFFER while one is outstanding (they then lag for ever)."""
    dice = random.Random(seed := int(os.environ.get("MCFT_SEED", time.time())))
    print("MCFT_SEED =", seed)
    commit = CommitGate(loss_ms=1e9)
    commit.lease_renewed(0.0, 0.0)
    buffer.hold()
    commit.hold()
    expected: list[tuple[int, int, int]] = []
    came: list[tuple[int, int, int]] = []
    acknowledged = 0  # packets that a checkpoint covers: at most these may have come
    end, epoch = time.monotonic() + CRAM_S, 0
    next_at = time.monotonic()
    pending: list[tuple[int, int]] = []

    def act(actions: list[object], covered: int) -> None:
        nonlocal acknowledged
        for action in actions:
            if isinstance(action, SetBarrier):
                buffer.barrier()
                pending.append((action.epoch, len(expected)))
            elif isinstance(action, Release):
                while pending and pending[0][0] <= action.epoch:
                    acknowledged = pending.pop(0)[1]
                buffer.release()

    while time.monotonic() < end:
        epoch += 1
        expected += wire.send(epoch, dice.randrange(0, 6))
        asked = commit.stop_seen(0.0)
        act(list(asked), len(expected))
        if not any(isinstance(action, SetBarrier) for action in asked):
            buffer.barrier()  # it keeps the rule by itself too
        late = dice.random() < 0.3  # the marker's reply comes behind the RESUME: the barrier stays for the next one
        if not late:
            act(list(commit.marker_answered(epoch, "colo", 0.0)), 0)
        expected += wire.send(epoch, dice.randrange(0, 3))
        if dice.random() < 0.3:
            time.sleep(dice.random() * 0.004)
        came += wire.arrived()
        assert len(came) <= acknowledged, "early"
        act(list(commit.resume_seen(0.0)), 0)
        if late:
            act(list(commit.marker_answered(epoch, "running", 0.0)), 0)
        next_at += 0.005
        time.sleep(max(0.0, next_at - time.monotonic()))
    assert not buffer.broken
    for last in (1, 2):
        act(list(commit.stop_seen(0.0)), len(expected))
        act(list(commit.marker_answered(epoch + last, "colo", 0.0)), 0)
        act(list(commit.resume_seen(0.0)), 0)
    came += wire.comes(len(expected) - len(came))
    print(f"{epoch} epochs, {commit.stats.merged_epochs} merged, {len(expected)} packets, {epoch / CRAM_S:.0f} Hz")
    assert came == expected
    assert held(buffer) == 0 and commit.stats.merged_epochs > epoch / 20


def test_the_limit_drops_the_newest_and_counts_them(wire: Wire) -> None:
    """Fails if the plug is made without a limit (then pyroute2's 0 drops everything), or drops are not read."""
    buffer = attached(wire, limit=2000)
    buffer.hold()
    sent = wire.send(0, 20, size=200)
    assert held(buffer) == 10
    (row,) = buffer.backlog()
    assert (row.target, row.dropped) == ("vnet0", 10) and 1900 < row.bytes <= 2000  # a VLAN's tag is not in its frame
    buffer.barrier()
    buffer.release()
    assert wire.comes(10) == sent[:10]


def test_the_limit_follows_the_delay(wire: Wire) -> None:
    """What is held stays, also by a limit that is smaller now. Fails if a longer epoch meets the limit of the delay of before."""
    buffer = attached(wire, limit=2000)
    buffer.hold()
    sent = wire.send(0, 20, size=200)[:10]
    buffer.limit_to(Limit(LIMIT))
    sent += wire.send(1, 20, size=200)
    assert held(buffer) == 30
    buffer.limit_to(Limit(2000))
    wire.send(2, 5, size=200)
    assert held(buffer) == 30 and not buffer.broken
    buffer.barrier()
    buffer.release()
    assert wire.comes(30) == sent
    buffer.look()
    assert not buffer.broken


def test_unprotecting_lets_everything_go_in_order_while_traffic_flows(wire: Wire, buffer: PlugBuffer) -> None:
    """Fails if `detach` deletes the IFB before it is empty, or the filter after it."""
    buffer.hold()
    sent = wire.send(0, 300)
    buffer.barrier()
    sent += wire.send(1, 300)
    child = os.fork()
    if not child:
        for _ in range(20):
            wire.send(2, 50)
            time.sleep(0.001)
        os._exit(0)
    buffer.open()
    buffer.detach()
    os.waitpid(child, 0)
    came = wire.comes(1600)
    assert came[:600] == sent and len(came) == 1600
    assert [number for _, _, number in came] == sorted(number for _, _, number in came)
    assert "mcft" not in sh("ip link") and sh("tc qdisc show dev vnet0").find("clsact") < 0


def test_what_was_closed_stays_until_it_is_opened(wire: Wire, buffer: PlugBuffer) -> None:
    """Fails if `close` or `reopen` lets anything out."""
    buffer.hold()
    sent = wire.send(0, 5)
    buffer.close()
    with pytest.raises(AssertionError):
        buffer.release()
    buffer.reopen()
    sent += wire.send(1, 5)
    assert wire.arrived() == [] and held(buffer) == 10
    buffer.open()
    assert wire.comes(10) == sent


def test_what_passed_is_closed_too(wire: Wire, buffer: PlugBuffer) -> None:
    """Fails if only the word changes: all would still leave."""
    assert buffer.mode == "pass"
    buffer.close()
    sent = wire.send(0, 5)
    assert wire.arrived() == [] and held(buffer) == 5
    buffer.open()
    assert wire.comes(5) == sent


def test_a_large_packet_that_the_card_would_segment_passes_whole(wire: Wire, buffer: PlugBuffer) -> None:
    """A guest whose card segments (TSO) sends up to 64 KiB at once. Fails if the limit is smaller than that."""
    sh("ip link set vnet0 mtu 65521; ip link set br0 mtu 65521; ip link set c0 mtu 65521; ip link set c1 mtu 65521")
    buffer.hold()
    sent = wire.send(0, 5, size=60_000)
    buffer.barrier()
    buffer.release()
    assert wire.comes(5) == sent


def test_the_ifb_sends_nothing_of_its_own(wire: Wire, buffer: PlugBuffer) -> None:
    """Fails if IPv6 is on there: its solicitations wait with the guest's packets, and nobody can explain the number."""
    buffer.hold()
    with open("/proc/sys/net/ipv6/conf/mcft-vnet0/disable_ipv6", encoding="ascii") as file:
        assert file.read().strip() == "1"
    assert "inet6" not in sh("ip address show mcft-vnet0") and held(buffer) == 0


# ---- others ----


def test_a_bandwidth_limit_of_libvirts_goes_on_limiting(wire: Wire) -> None:
    """`<bandwidth><outbound>` is a policer at the tap's ingress, made before; it is as it was after.

    Fails if our filter comes behind (then nothing is held), or the policer's filter is not copied (then nothing is limited).
    """
    sh("tc qdisc add dev vnet0 ingress")
    sh("tc filter add dev vnet0 parent ffff: protocol all u32 match u32 0 0 police rate 8kbps burst 4k mtu 64kb drop flowid :1")

    def filters() -> str:  # the kernel shows the way in which the last one was named: `parent ffff:` or `ingress`
        return sh("tc filter show dev vnet0 parent ffff:").replace("filter ingress ", "filter ")

    before = filters()
    buffer = attached(wire)
    buffer.hold()
    wire.send(0, 40, size=1000)
    assert 1 <= held(buffer) <= 8, "not limited"
    buffer.barrier()
    buffer.release()
    assert 1 <= len(wire.comes(1)) <= 8
    buffer.open()
    buffer.detach()
    assert filters() == before
    assert len(wire.send(1, 40, size=1000)) > len(wire.comes(1, 0.5))


@pytest.mark.parametrize("rule", ["u32 match ip protocol 17 0xff action drop", "matchall action gact drop"])
def test_an_operators_drop_rule_goes_on_dropping(wire: Wire, rule: str) -> None:
    """Fails if filters of others are not copied to the IFB."""
    sh(f"tc qdisc add dev vnet0 clsact; tc filter add dev vnet0 ingress protocol ip pref 9 {rule}")
    before = sh("tc filter show dev vnet0 ingress; tc qdisc show dev vnet0")
    buffer = attached(wire)
    buffer.hold()
    sent = wire.send(0, 12)
    dropped = 2 if "matchall" in rule else 0  # of 12 frames two are IPv4, and none of them is UDP
    assert held(buffer) == len(sent) - dropped
    buffer.open()
    buffer.detach()
    assert sh("tc filter show dev vnet0 ingress; tc qdisc show dev vnet0") == before


@pytest.mark.parametrize(
    ("rule", "word"),
    [
        ("pref 9 protocol all matchall action mirred egress mirror dev c0", "mirred"),
        ("pref 1 protocol ip matchall action drop", "priority"),
        ("pref 9 chain 3 protocol ip matchall action drop", "chains"),
    ],
)  # fmt: skip
def test_a_filter_that_would_pass_packets_by_refuses_and_leaves_all_as_it_was(wire: Wire, rule: str, word: str) -> None:
    """Fails if `copies` takes every filter, or a refusal leaves an IFB behind."""
    sh(f"tc qdisc add dev vnet0 clsact; tc filter add dev vnet0 ingress {rule}")
    before = sh("tc filter show dev vnet0 ingress; tc qdisc; ip -o link | cut -d: -f2")
    with pytest.raises(Refused, match="not mcft's") as refusal:
        attached(wire)
    assert word in str(refusal.value.reason)
    assert sh("tc filter show dev vnet0 ingress; tc qdisc; ip -o link | cut -d: -f2") == before


def test_a_taken_name_is_refused(wire: Wire) -> None:
    """Fails if an interface of that name is taken over, or deleted by the undo."""
    sh("ip link add mcft-vnet0 type bridge")
    with pytest.raises(Refused, match="not mcft's"):
        attached(wire)
    assert "mcft-vnet0" in sh("ip link") and "clsact" not in sh("tc qdisc")


def test_no_such_tap(wire: Wire) -> None:
    """In another namespace, say. Fails if the first NIC's pieces stay when the second can't be attached."""
    buffer = PlugBuffer()
    with pytest.raises(Failed, match="vnet9"):
        buffer.attach([nic("vnet0"), nic("vnet9")], Limit(LIMIT))
    assert "mcft-vnet0" not in sh("ip link") and "clsact" not in sh("tc qdisc")


# ---- tampering ----

TAMPERING = [
    ("tc qdisc del dev mcft-vnet0 root", "qdisc of mcft-vnet0 was deleted"),
    ("tc qdisc replace dev mcft-vnet0 root pfifo", "qdisc of mcft-vnet0 was"),
    ("tc qdisc change dev mcft-vnet0 root handle 4d01: plug release_indefinite", "qdisc of mcft-vnet0 was changed"),
    ("ip link set mcft-vnet0 down", "mcft-vnet0 was set down"),
    ("ip link set mcft-vnet0 down; ip link set mcft-vnet0 up", "mcft-vnet0 was set down"),
    ("ip link del mcft-vnet0", "mcft-vnet0 was"),
    ("tc filter del dev vnet0 ingress pref 1", "filter that sends what vnet0"),
    ("tc filter del dev vnet0 ingress", "vnet0"),
    ("tc qdisc del dev vnet0 clsact", "vnet0"),
    ("ip link set vnet0 down", "vnet0 was set down"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "says"), TAMPERING, ids=[c for c, _ in TAMPERING])
def test_tampering_is_heard_and_nothing_is_released_after(wire: Wire, buffer: PlugBuffer, command: str, says: str) -> None:
    """Fails if its notification is not subscribed to, filtered out, or judged harmless."""
    buffer.hold()
    wire.send(0, 5)
    buffer.barrier()
    sh(command)
    came = wire.arrived()
    buffer.release()
    assert says in buffer.broken
    assert wire.arrived() == []
    assert came == [] or "release_indefinite" in command
    assert buffer.watch is not None and not select.select([buffer.watch], [], [], 0)[0], "its socket would keep the loop busy"
    buffer.open()
    assert "mcft" not in sh("ip link") and "matchall" not in sh("tc filter show dev vnet0 ingress")


def test_ifb_down_up_would_leak(wire: Wire, buffer: PlugBuffer) -> None:
    """The kernel purges the queue and keeps its counts, so the next release would let the open epoch out. It is not sent.

    Fails if `release` does not read the notifications first (then the kernel lets 5 of epoch 1 out).
    """
    buffer.hold()
    wire.send(0, 5)
    buffer.barrier()
    sh("ip link set mcft-vnet0 down; ip link set mcft-vnet0 up")
    wire.send(1, 9)
    buffer.release()
    assert "set down" in buffer.broken and wire.comes(1, 0.3) == []


def test_what_others_may_do(wire: Wire, buffer: PlugBuffer) -> None:
    """Fails if `judge` is too strict: another interface's changes, shaping towards the guest, our own steps."""
    buffer.hold()
    sh("ip link add x type bridge; ip link set x up; ip link del x; ip link set vnet0 mtu 1400; ip link set vnet0 alias hello")
    sh("tc qdisc add dev vnet0 root handle 1: tbf rate 1mbit burst 9k limit 9k")
    sh("tc filter add dev vnet0 egress pref 1 protocol all matchall action ok")
    buffer.barrier()
    buffer.look()
    assert not buffer.broken and not buffer.remarks
    sh("tc filter add dev vnet0 ingress protocol ip matchall action drop")
    buffer.look()
    assert not buffer.broken and "no effect" in buffer.remarks[0]


def test_a_closed_plug_is_watched_on(wire: Wire, buffer: PlugBuffer) -> None:
    """It holds by itself, with its tap up. Fails if closing sets the tap down, or if whoever does so meanwhile is not noticed."""
    buffer.hold()
    buffer.close()
    sent = wire.send(0, 6)
    buffer.look()
    assert not buffer.broken and wire.arrived() == []
    buffer.open()
    assert wire.comes(6) == sent and buffer.verify() == ""
    buffer.hold()
    buffer.close()
    sh("ip link set vnet0 down")
    buffer.look()
    assert "vnet0 was set down" in buffer.broken


# ---- a gate dies ----


@pytest.mark.parametrize("mode", ["hold", "closed"])
def test_adoption_leaks_nothing(wire: Wire, mode: str) -> None:
    """What the dead gate had marked can't be known, so a new plug takes the place of the old. Fails if the old one is kept:
    the first release after would let packets of an open epoch out."""
    old = attached(wire)
    old.hold()
    wire.send(0, 5)
    old.barrier()
    wire.send(1, 5)
    old.shut()  # as the kernel does for a process that died
    wire.send(2, 5)
    assert wire.arrived() == []
    new = PlugBuffer()
    new.adopt([nic("vnet0")], Limit(LIMIT), mode)  # type: ignore[arg-type]
    assert not new.broken
    sent = wire.send(3, 5)
    if mode == "closed":
        new.reopen()
    new.barrier()
    wire.send(4, 5)
    new.release()
    assert wire.comes(5) == sent
    new.detach()


def test_adoption_in_pass_through_drops_nothing(wire: Wire) -> None:
    """Fails if adoption replaces a plug that lets everything pass."""
    attached(wire).shut()
    new = PlugBuffer()
    new.adopt([nic("vnet0")], Limit(LIMIT), "pass")
    sent = wire.send(0, 5)
    assert wire.comes(5) == sent and not new.broken
    new.detach()


CHANGES = (
    "tc filter del dev vnet0 ingress",
    "ip link del mcft-vnet0",
    "tc qdisc del dev mcft-vnet0 root",
    "ip link set mcft-vnet0 down",
)


@pytest.mark.parametrize("command", CHANGES)
def test_adoption_sees_what_was_changed_while_nobody_watched(wire: Wire, command: str) -> None:
    """Fails if adoption takes the pieces for granted."""
    old = attached(wire)
    old.hold()
    old.shut()
    sh(command)
    new = PlugBuffer()
    new.adopt([nic("vnet0")], Limit(LIMIT), "hold")
    assert new.broken
    new.open()
    assert "mcft" not in sh("ip link") and "matchall" not in sh("tc filter show dev vnet0 ingress")


def test_an_attach_that_was_cut_off_is_done_anew(wire: Wire) -> None:
    """Fails if what it left counts as somebody else's."""
    attached(wire).shut()
    buffer = attached(wire)
    sent = wire.send(0, 5)
    assert wire.comes(5) == sent
    buffer.detach()
    assert "clsact" not in sh("tc qdisc show dev vnet0")


# ---- the mc engine's naming ----


@pytest.mark.parametrize("ready", [False, True])
def test_tap_and_ifb_by_number(ready: bool) -> None:
    """`ifb3` beside `tap3`, also one that was loaded ready-made and stays. Fails if that one is refused, or deleted after."""
    with Wire(taps=("tap3",)) as wire:
        if ready:
            sh("ip link add ifb3 type ifb")
        buffer = attached(wire)
        assert "mcft holds what tap3 sends" in sh("ip link show ifb3")
        buffer.hold()
        sent = wire.send(0, 5, tap="tap3")
        buffer.open()
        assert wire.comes(5) == sent
        buffer.detach()
        after = sh("ip -o -d link show")
        assert "mcft" not in after and "clsact" not in sh("tc qdisc")
        assert ("ifb3" in after) == ready and (not ready or "state DOWN" in sh("ip link show ifb3"))
