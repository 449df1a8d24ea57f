"""The faults of `bench/chaos.py`: each is begun at a random moment, held for a random while, and ended. Real ones, in the lab."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass

from arbiters import Bmc, Etcd
from world import GATE, LIBVIRTD, Host, link, now, other, pause

Act = Callable[[], None]


@dataclass(frozen=True)
class Scene:
    """Where the guest is led and who may be hurt. busy: what else is at hand."""

    primary: Host
    etcd: Etcd
    bmc: Bmc
    moments: random.Random

    @property
    def standby(self) -> Host:
        return other(self.primary)

    def side(self, name: str) -> Host:
        return self.primary if name == "primary" else self.standby


@dataclass(frozen=True)
class Fault:
    """begin: makes it; end: takes it back (after `hold_s`). deadly: the guest's QEMU or host on that side is gone or unreachable
    ("primary", "standby", ""): two of those at once would be a loss of both. asks: the side on which something is run to make or
    to end it: a frozen host answers nobody, the bench included. only: arbiters it makes sense with."""

    name: str
    begin: Callable[[Scene], object]
    end: Callable[[Scene], object] = lambda _scene: None
    hold_s: tuple[float, float] = (0.0, 0.0)
    deadly: str = ""
    weight: int = 2
    only: tuple[str, ...] = ("standby", "etcd", "fence")
    asks: str = ""
    freezes: str = ""

    def goes_with(self, other: Fault) -> bool:
        frozen_and_asked = (self.freezes and self.freezes == other.asks) or (other.freezes and other.freezes == self.asks)
        return not (self.deadly and other.deadly) and not frozen_and_asked


def pids(host: Host, what: str) -> list[int]:
    """The machine's numbers of that process on that host; none if it is not there just now."""
    units = {"gate": GATE, "agent": "mcft-agent", "libvirtd": LIBVIRTD}
    if not host.on:
        return []
    try:
        inside = host.qemu_pid() if what == "QEMU" else host.main_pid(units[what])
        return [host._pid_outside(inside)] if inside else []
    except AssertionError:
        return []


def send(host: Host, what: str, number: signal.Signals) -> None:
    for pid in pids(host, what):
        os.kill(pid, number)


def fill(host: Host) -> None:
    host.sh("dd if=/dev/zero of=/var/lib/mcft/ballast bs=64k 2>/dev/null; :", check=False)


def empty(host: Host) -> None:
    host.sh("rm -f /var/lib/mcft/ballast", check=False)


def on_again(host: Host) -> None:
    """A fence agent may pull the plug once more while it boots; `chaos.settle` switches it on then. Its store may be full."""
    if not host.on:
        with contextlib.suppress(AssertionError):
            host.power_on()
            empty(host)


def _killing(side: str, what: str, weight: int = 2) -> Fault:
    deadly = side if what == "QEMU" else ""
    return Fault(
        f"SIGKILL {what}, {side}", lambda s: send(s.side(side), what, signal.SIGKILL), deadly=deadly, weight=weight, asks=side,
    )  # fmt: skip


def _stopping(side: str, what: str) -> Fault:
    hold_s = (0.2, 4.0)
    deadly = side if what in ("QEMU", "gate") else ""
    return Fault(
        f"SIGSTOP {what}, {side}", lambda s: send(s.side(side), what, signal.SIGSTOP),
        lambda s: send(s.side(side), what, signal.SIGCONT), hold_s, deadly, 1, asks=side,
    )  # fmt: skip


def _link(name: str, of: str, deadly: str = "", hold_s: tuple[float, float] = (0.1, 5.0), weight: int = 2) -> Fault:
    def to(state: str) -> Callable[[Scene], object]:
        return lambda s: [link(w.format(p=s.primary.key, s=s.standby.key), state) for w in of.split()]

    return Fault(name, to("down"), to("up"), hold_s, deadly, weight)


def _freezing(side: str, weight: int) -> Fault:
    begin, end = (lambda s: s.side(side).freeze(True)), (lambda s: s.side(side).freeze(False))
    return Fault(f"host frozen, {side}", begin, end, (0.2, 4.0), side, weight, freezes=side)


def _restarting(side: str) -> Fault:
    return Fault(
        f"libvirtd restarted, {side}", lambda s: s.side(side).run("systemctl", "restart", LIBVIRTD, check=False), asks=side,
    )  # fmt: skip


def _filling(side: str) -> Fault:
    return Fault(f"store full, {side}", lambda s: fill(s.side(side)), lambda s: empty(s.side(side)), (0.5, 3.0), asks=side)


def _fence_agent(name: str, mode: str) -> Fault:
    begin, end = (lambda s: setattr(s.bmc, "mode", mode)), (lambda s: setattr(s.bmc, "mode", "good"))
    return Fault(f"fence agent {name}", begin, end, (0.5, 5.0), only=("fence",))


FAULTS = [
    *(_killing(side, what) for side in ("primary", "standby") for what in ("QEMU", "gate", "agent", "libvirtd")),
    *(_stopping(side, what) for side in ("primary", "standby") for what in ("QEMU", "gate", "agent", "libvirtd")),
    Fault("power, primary", lambda s: s.primary.power_off(), lambda s: on_again(s.primary), (1.0, 6.0), "primary", 6),
    Fault("power, standby", lambda s: s.standby.power_off(), lambda s: on_again(s.standby), (1.0, 6.0), "standby", 5),
    *(_freezing(side, weight) for side, weight in (("primary", 3), ("standby", 2))),
    _link("replication link cut", "rep", "standby", weight=3),
    _link("LAN cable, standby", "lan:{s}"),
    _link("LAN cable, primary", "lan:{p}", "primary", (0.1, 2.0)),
    _link("both links, primary", "rep:{p} lan:{p}", "primary", weight=3),
    _link("both links, standby", "rep:{s} lan:{s}", "standby", weight=3),
    _link("hosts apart, both reach the third", "lan:{p} rep:{s}", "standby"),
    *(_restarting(side) for side in ("primary", "standby")),
    *(_filling(side) for side in ("primary", "standby")),
    Fault("etcd killed", lambda s: s.etcd.kill(), lambda s: s.etcd.start(), (0.2, 5.0), only=("etcd",), weight=3),
    Fault("etcd stopped", lambda s: s.etcd.signal("STOP"), lambda s: s.etcd.signal("CONT"), (0.2, 5.0), only=("etcd",), weight=3),
    Fault("etcd wiped", lambda s: s.etcd.wipe(), lambda s: s.etcd.start(), (0.2, 2.0), only=("etcd",), weight=1),
    *(_fence_agent(name, mode) for name, mode in (("lies", "lies"), ("can't tell", "vague"))),
]  # fmt: skip
BOTH = 0.3  # how often a second fault comes with the first


def choose(kind: str, moments: random.Random) -> list[Fault]:
    """One fault or two at once, of which at most one takes a side away."""
    fit = [f for f in FAULTS if kind in f.only]
    first = moments.choices(fit, [f.weight for f in fit])[0]
    if moments.random() > BOTH:
        return [first]
    rest = [f for f in fit if f is not first and f.goes_with(first)]
    return [first, moments.choices(rest, [f.weight for f in rest])[0]]


def inject(faults: list[Fault], scene: Scene) -> float:
    """Begin all, hold each, end all; when the first began (CLOCK_BOOTTIME, s)."""
    at_s = now()
    for fault in faults:
        pause(scene.moments.uniform(0, 0.3) if fault is not faults[0] else 0)
        if fault is faults[0]:
            at_s = now()
        fault.begin(scene)
    ends = sorted((now() + scene.moments.uniform(*fault.hold_s), n, fault) for n, fault in enumerate(faults))
    for end_s, _, fault in ends:
        pause(max(0.0, end_s - now()))
        fault.end(scene)
    return at_s
