"""What must hold, whatever fails. It sees everything at once, as no part of the product can."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from mcft.generations import Kind, Ledger, Side
from tests.sim.disk import Image, Moment
from tests.sim.machine import DISK, DOMAIN, STATE, UUID
from tests.sim.world import Host, Violation, World

if TYPE_CHECKING:
    from tests.sim.qemu import Qemu


LOSS_MS = 300.0


class Oracle:
    """The outside observer, and who looks at disks, labels and records."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.last: Moment | None = None  # the newest packet that anybody outside has seen
        self.last_at = 0.0
        self.last_host = world.hosts[0]
        self.packets = 0
        self.lied = False  # an operator said that the other host is off, and it was not
        self.accepted_loss = False
        self.arbiter_broken = False
        self.ended = False  # the guest shut itself down
        self.not_asked: set[str] = set()  # instances whose standby was never asked to arm
        self.instances: dict[tuple[str, int], dict[tuple[Side, Host], list[tuple[int, str]]]] = {}

    # ---- what leaves ----

    def left(self, qemu: Qemu, moment: Moment, mode: str) -> None:
        """A packet left a tap. mode: of the gate's buffer as it wrote it ("": no filter was there)."""
        history, host = self.world.history, qemu.host
        if self.lied:
            return
        copy = qemu.copy
        following = copy is not None and copy.proc.alive and copy.colo == "secondary" and not copy.failover
        if mode == "hold" and copy is not None and following and not history.holds(copy.ram, moment):
            raise Violation(
                "output commit", f"{host.name} let {moment} out; the newest whole checkpoint of its standby is {copy.ram}"
            )
        if mode != "hold" and copy is not None:
            self._opened(host)
        last = self.last
        if last is not None and not (history.holds(moment, last) and moment.n > last.n):
            raise Violation("observer monotonic", f"{host.name} sent {moment} after {last} was seen")
        if host.machine.lan_up:
            self.last, self.last_at, self.last_host = moment, self.world.now, host
            self.packets += 1

    def _never_asked(self, host: Host, pid: str) -> bool:
        """The write of `arming` failed and is on the disk all the same: the standby was not asked, and the set-up is undone."""
        agent = host.machine.agent
        life = agent.core.lives.get(UUID) if agent is not None and agent.alive and agent.serving else None
        if life is not None and life.body.pid == pid and not life.ledger.has(Kind.ARMING):
            self.not_asked.add(pid)
        return pid in self.not_asked

    def _opened(self, host: Host) -> None:
        """A buffer that was opened, or taken away, after arming: only given-up or a won generation allows it, durable."""
        rows = host.machine.records["record"]
        pid = rows[-1].pid if rows else ""
        kinds = [r.kind for r in rows if r.pid == pid]
        armed = Kind.ARMING.value in kinds
        if armed and self._never_asked(host, pid):
            return
        if armed and not (Kind.SPOKEN.value in kinds or Kind.ENDED.value in kinds):
            raise Violation("opened without a win", f"{host.name} lets packets pass with the records {', '.join(kinds)}")

    def takes_over(self, copy: Qemu, image: Image) -> None:
        """A copy begins to run as the guest."""
        host = copy.host
        kinds = [r.kind for r in host.machine.records["record"]]
        if not kinds or kinds[-1] not in (Kind.TAKEN.value, Kind.SPOKEN.value):
            raise Violation("durable first", f"{host.name} runs its copy, and its newest durable record is {kinds[-1:]}")
        if image.torn not in ("", "committing"):
            raise Violation("the truth", f"the copy on {host.name} runs on a disk that is {image.torn}")
        if image.missed is not None and self.world.history.holds(copy.ram, image.missed):
            raise Violation("the truth", f"the copy on {host.name} runs, and its disk lacks {image.missed}")
        self.ended = False  # it goes on from before its end, which nobody could hear
        image.missed = None  # a write of the epoch that is forgotten: `hidden` has what was there before it

    # ---- disks ----

    def boots(self, host: Host, image: Image) -> None:
        """A guest starts from this disk."""
        self.ended = False
        if self.lied or self.accepted_loss:
            self.accepted_loss = False
            self.last = image.missed = None
            image.torn = ""
            return
        self._truth(host, image, "was started from")
        image.missed = None  # a machine that was off goes on from what is there; what was seen of it was looked at
        other = host.other
        for qemu in other.machine.qemus():
            if not qemu.colo and not qemu.failover and qemu.runstate in ("running", "paused") and qemu.copy is None:
                raise Violation("one at a time", f"{host.name} starts the guest while it runs on {other.name}")

    def _truth(self, host: Host, image: Image, what: str) -> None:
        if self.last is None:
            return
        if image.torn:
            raise Violation("the truth", f"the disk of {host.name} {what}: {image.torn}")
        if image.content is None or not self.world.history.holds(image.content, self.last):
            said = f"the disk of {host.name} {what} has {image.content}, {self.last} was seen"
            raise Violation("no acknowledged write lost", said)

    def freed(self, host: Host) -> None:
        """From now on anybody may start it here by hand: so its disk must be the truth, and no other may be."""
        if self.lied or self.accepted_loss:
            return
        if any(not q.colo and not q.failover and q.runstate != "inmigrate" for q in host.machine.qemus()):
            return  # it runs; its disk moves on with it
        if any(q.failover for q in host.machine.qemus()):
            return
        image = self._image(host)
        if image is not None and UUID in host.machine.domains:
            self._truth(host, image, "that may be started by hand now")

    def _image(self, host: Host) -> Image | None:
        found = host.files.held.get(DISK)
        return found if isinstance(found, Image) else None

    def startable(self, host: Host) -> bool:
        """Whether `virsh start` works there, as far as mcft has a say."""
        marker = host.files.held.get(f"{STATE}/start/{UUID}")
        return marker is not None and not marker.startswith("banned")

    def look(self) -> None:
        """Now and then: never two startable truths."""
        if self.lied:
            return
        one, two = self.world.hosts
        if self.startable(one) and self.startable(two):
            both = [h for h in (one, two) if h.machine.domains.get(UUID) and h.machine.domains[UUID].definition]
            if len(both) == 2 and not self._ended_both():
                raise Violation("one startable truth", "both hosts' hooks let the guest start")

    def _ended_both(self) -> bool:
        return False

    # ---- records ----

    def recorded(self, host: Host, pid: str, g: int, side: Side, kind: str, detail: str) -> None:
        """A record became durable: the same rules as the ledger's, and those between the two sides."""
        if kind == Kind.TAKEN.value and self.ended and "QEMU is gone" in detail:
            raise Violation("intended end", f"{host.name} takes over a guest that shut itself down ({detail})")
        base = g
        known = self.instances.setdefault((pid, 0), {})
        known.setdefault((side, host), []).append((g, kind))
        kinds = {(s, n, k) for (s, _), rows in known.items() for n, k in rows}
        if kind == Kind.TAKEN.value and side == "standby" and ("standby", g, Kind.GIVEN_UP.value) in kinds:
            raise Violation("one winner", f"taken({g}) after given-up({g})")
        if kind == Kind.GIVEN_UP.value and ("standby", g, Kind.TAKEN.value) in kinds:
            raise Violation("one winner", f"given-up({g}) after taken({g})")
        if self.lied:
            return
        resigned = ("standby", g + 1, Kind.RESIGNED.value) in kinds
        if kind == Kind.SOLO.value and ("standby", g, Kind.TAKEN.value) in kinds and not resigned:
            raise Violation("one winner", f"solo({base}) though the standby has taken({base})")
        if kind == Kind.TAKEN.value and side == "standby" and ("primary", g, Kind.SOLO.value) in kinds and not self.accepted_loss:
            raise Violation("one winner", f"taken({base}) though the primary has solo({base})")
        if kind == Kind.TAKEN.value and side == "standby" and ("standby", g, Kind.ARMED.value) not in kinds:
            raise Violation("unarmed", f"taken({g}) without armed({g})")

    def claims(self, host: Host, reason: str) -> None:
        """A standby's gate claims: what it gives as its reason is true."""
        found = re.search(r"silent on every link for (\d+) ms", reason)
        if found:
            silent = self.world.now - max(host.machine.heard_at, host.machine.awake_since)
            if int(found[1]) < LOSS_MS - 1 or silent < LOSS_MS - 20.0:
                said = f"{host.name} says: {reason}; the last keepalive came {silent:.0f} ms ago"
                raise Violation("loss without silence", said)

    # ---- at the end of a round ----

    def settled(self) -> str:
        """Empty, or what is half made or half undone on either host while nothing is at work."""
        for host in self.world.hosts:
            core = host.machine.agent.core if host.machine.agent is not None and host.machine.agent.serving else None
            life: Any = core.lives.get(UUID) if core is not None else None
            for qemu in host.machine.qemus():
                plain = life is None or life.body.state in ("solo", "active", "unprotected", "stopped")
                ours = [n for n in qemu.nodes if n.startswith("mcft-")] + [n for n in qemu.filters]
                if plain and ours and not (life is not None and life.body.overlays_g):
                    return f"{host.name}: nodes {ours} in a QEMU that is not protected ({life.body.state if life else 'unknown'})"
        return ""


def ledger_of(host: Host) -> Ledger | None:
    agent = host.machine.agent
    if agent is None or not agent.serving:
        return None
    life = agent.core.lives.get(UUID)
    return life.ledger if life is not None else None


def state_of(host: Host) -> str:
    agent = host.machine.agent
    if agent is None or not agent.alive or not agent.serving:
        return "-"
    life = agent.core.lives.get(UUID)
    return life.body.state if life is not None else ""


__all__ = ["DOMAIN", "Oracle", "ledger_of", "state_of"]
