"""PURE: the watcher. From what a gate sees of the other side to its next action, every branch with its sentence.

Like Patroni's loop: `decide(view)` is one readable function; the gate fills a `View` and obeys the `Verdict`.
`Silence` keeps what needs memory: when each link last spoke, and our own stalls. No I/O, no clock: times are
CLOCK_BOOTTIME in milliseconds, given as arguments. The conditions are `protocol.md`'s, "The end of a generation".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

Qemu = Literal["unknown", "running", "gone", "shutdown"]
Stream = Literal["alive", "overdue", "dead"]

GATE_SILENT_MS = 3000.0  # (c): no keepalive, although checkpoints flow: the primary's gate does not come back; T, if more
SHUTDOWN_WORD_MS = 3000.0  # after SHUTDOWN the agent has this long to say whether it was intended
NO_STANDBY_ANY_MORE = ("not-whole", "given-up", "lost", "ended")
OWN_DISK = "the primary's own disk"  # how a disk error of that side begins
REBOOT_MS = 2000.0  # `virsh reboot` is a guest's SHUTDOWN whose QEMU lives on: libvirt resets and continues it
BUFFER_BROKEN = "the network buffer was changed by somebody else"
HUNG_MS = 10000.0  # (e): the stream overdue by this much and the monitor silent
MONITOR_SILENT_MS = HUNG_MS / 2  # it may have been asked a good while after the last checkpoint


class Act(Enum):
    """What the gate does next. WAIT: nothing; the others are described where they are decided."""

    WAIT = "wait"
    CLAIM = "claim"  # standby: say `claiming`, ask the agent for the generation
    BREAK = "break"  # primary: close the gate, yank the stream, let the agent pull the giving up
    DIED = "died"  # primary: our QEMU is gone without a guest's shutdown
    ENDED = "ended"  # primary: the guest shut itself down
    HUNG = "hung"  # primary: the agent closes, records `died`, kills QEMU
    ALARM = "alarm"  # nothing is safe to do without an operator; said once


@dataclass(frozen=True, slots=True)
class Verdict:
    """An action with its sentence for the log and the operator."""

    act: Act
    reason: str


@dataclass(frozen=True, slots=True)
class Settings:
    """loss_ms: T. delay_ms: between checkpoints. standby_arbiter: a stalled watcher also needs its own LAN.

    sees_stream: whether the standby sees checkpoints arrive (engine `mc`: no, its QEMU says nothing while it follows).
    """

    loss_ms: float = 300.0
    delay_ms: float = 100.0
    standby_arbiter: bool = True
    sees_stream: bool = True

    @property
    def overdue_ms(self) -> float:
        """A checkpoint that has not come for this long is overdue."""
        return self.delay_ms + self.loss_ms


@dataclass(frozen=True, slots=True)
class View:
    """What one gate sees at one instant.

    silent_ms: since the newest accepted keepalive on any link (our own stalls already taken out).
    stream_silent_ms: the same for the replication link alone. stream_age_ms: since the last acknowledgement or load.
    rdma_silent_ms: since the peer's counter last rose in our memory (None: it was never connected); rdma_error: what the
    adapter says of a write of ours that did not arrive. That is a hint: it may come before the silence, from a mere
    flap of the link, and decides nothing; a write that does arrive says nothing of the peer's process.
    """

    role: Literal["primary", "standby"]
    armed: bool
    own_qemu: Qemu
    shutdown_for_ms: float
    stream_dead: str
    stream_age_ms: float
    monitor_silent_ms: float
    disk_error: str
    silent_ms: float
    stream_silent_ms: float
    peer_qemu: Qemu
    peer_closed: bool
    peer_shutdown_for_ms: float
    peer_claiming: bool
    lan_ok: bool
    peer_record: str = ""
    own_ended: bool = False
    buffer_broken: str = ""
    rdma_silent_ms: float | None = None
    rdma_error: str = ""


def decide(view: View, settings: Settings) -> Verdict:
    """The next action of a gate that follows (standby) or leads (primary) a stream."""
    return _primary(view, settings) if view.role == "primary" else _standby(view, settings)


def stream_state(view: View, settings: Settings) -> Stream:
    """dead: QEMU said so; overdue: no checkpoint completed for delay + T."""
    if view.stream_dead:
        return "dead"
    return "overdue" if view.stream_age_ms > settings.overdue_ms else "alive"


def _primary(view: View, settings: Settings) -> Verdict:
    if view.own_qemu == "shutdown":
        if not view.own_ended and view.shutdown_for_ms < REBOOT_MS:
            return Verdict(Act.WAIT, "the guest shut down; its QEMU lives: it may be rebooted")
        return Verdict(Act.ENDED, "the guest shut down")
    if view.own_qemu == "gone" and view.disk_error.startswith(OWN_DISK):
        return Verdict(Act.DIED, f"disk error: {view.disk_error}")
    if view.own_qemu == "gone":
        return Verdict(Act.DIED, "QEMU is gone without a shutdown of the guest")
    if view.disk_error.startswith(OWN_DISK):
        return Verdict(Act.WAIT, "the gate ends this QEMU: its disk lost a write that the guest was told is done")
    if view.disk_error:
        return Verdict(Act.BREAK, f"disk error: {view.disk_error}")
    if view.buffer_broken:
        return Verdict(Act.BREAK, f"{BUFFER_BROKEN}: {view.buffer_broken}")
    if view.stream_dead:
        return Verdict(Act.BREAK, f"the checkpoint stream broke: {view.stream_dead}")
    if view.peer_claiming:
        return Verdict(Act.BREAK, "the standby claims the generation")
    if view.peer_qemu == "gone":
        return Verdict(Act.BREAK, "the standby's QEMU is gone")
    if view.armed and view.peer_record in NO_STANDBY_ANY_MORE:
        return Verdict(Act.BREAK, f"the standby says {view.peer_record}")
    stream = stream_state(view, settings)
    if view.armed and stream == "overdue" and view.silent_ms > settings.loss_ms:
        return Verdict(Act.BREAK, f"the standby is silent on every link for {view.silent_ms:.0f} ms{_adapter(view)}")
    if view.armed and stream == "overdue" and view.stream_silent_ms > settings.loss_ms:
        return Verdict(
            Act.BREAK,
            f"the replication link is silent for {view.stream_silent_ms:.0f} ms and no checkpoint came for "
            f"{view.stream_age_ms:.0f} ms, though the standby answers elsewhere",
        )
    if view.armed and view.stream_age_ms > settings.delay_ms + HUNG_MS:
        if view.monitor_silent_ms > MONITOR_SILENT_MS:
            return Verdict(Act.HUNG, "no checkpoint and no answer of QEMU's monitor for 10 s")
        return Verdict(Act.BREAK, "no checkpoint for 10 s though QEMU's monitor answers")
    return Verdict(Act.WAIT, f"stream {stream}")


def _standby(view: View, settings: Settings) -> Verdict:
    if not view.armed:
        return Verdict(Act.WAIT, "not armed: an unarmed standby never takes over")
    if view.disk_error:
        return Verdict(Act.ALARM, f"this copy is not whole: {view.disk_error}")
    if view.own_qemu != "running":
        return Verdict(Act.ALARM, "the standby's own QEMU is gone")
    if view.peer_qemu == "shutdown":
        if view.peer_shutdown_for_ms < SHUTDOWN_WORD_MS:
            return Verdict(Act.WAIT, "the primary's guest shut down; waiting for its agent's word")
        return Verdict(Act.ALARM, "the primary's guest shut down and its agent says nothing: an operator must decide")
    if view.peer_qemu == "gone" and view.peer_closed:
        return Verdict(Act.CLAIM, "the primary's QEMU is gone and its gate is closed")
    if not settings.sees_stream:
        return _standby_by_silence(view, settings)
    stream = stream_state(view, settings)
    if view.silent_ms > settings.loss_ms and stream != "alive":
        if not view.lan_ok:
            return Verdict(Act.ALARM, "the primary is silent, but this host's own LAN does not answer")
        return Verdict(
            Act.CLAIM,
            f"the primary is silent on every link for {view.silent_ms:.0f} ms and the stream is {stream}{_adapter(view)}",
        )
    gate_silent_ms = max(GATE_SILENT_MS, settings.loss_ms)
    if view.silent_ms > gate_silent_ms and stream == "alive":
        if not view.lan_ok:
            return Verdict(Act.ALARM, "the primary's gate is gone, but this host's own LAN does not answer")
        silence = f"no keepalive for {gate_silent_ms / 1000:g} s"
        return Verdict(Act.CLAIM, f"{silence} although checkpoints flow: the primary's gate is gone")
    return Verdict(Act.WAIT, f"stream {stream}")


def _standby_by_silence(view: View, settings: Settings) -> Verdict:
    """Engine `mc`: silence on every link is all there is; progress is what the primary last reported."""
    if view.silent_ms <= settings.loss_ms:
        return Verdict(Act.WAIT, "the primary speaks")
    if not view.lan_ok:
        return Verdict(Act.ALARM, "the primary is silent, but this host's own LAN does not answer")
    return Verdict(Act.CLAIM, f"the primary is silent on every link for {view.silent_ms:.0f} ms{_adapter(view)}")


def _adapter(view: View) -> str:
    return f" (RDMA: {view.rdma_error})" if view.rdma_error else ""


@dataclass
class Silence:
    """When each link's peer last spoke, with our own stalls taken out.

    A watcher that was itself stalled for more than T/3 can't tell the peer's silence from its own: its silence starts anew.
    """

    loss_ms: float
    started_ms: float
    links: dict[str, float] = field(default_factory=dict)
    stalls: int = 0
    _last_tick_ms: float | None = None
    _floor_ms: float = 0.0

    def __post_init__(self) -> None:
        self._floor_ms = self.started_ms

    def heard(self, link: str, now_ms: float) -> None:
        """A keepalive was accepted on this link."""
        self.links[link] = now_ms

    def tick(self, now_ms: float) -> bool:
        """Call at every turn of the loop, at least every T/6. True: we were stalled; silence starts anew."""
        last, self._last_tick_ms = self._last_tick_ms, now_ms
        if last is None or now_ms - last <= self.loss_ms / 3:
            return False
        self.stalls += 1
        self._floor_ms = now_ms
        return True

    def silent_ms(self, now_ms: float, link: str | None = None) -> float:
        """Since the newest keepalive on this link (None: on any), or since our own last stall."""
        heard = self.links.get(link, float("-inf")) if link is not None else max(self.links.values(), default=float("-inf"))
        return now_ms - max(heard, self._floor_ms)
