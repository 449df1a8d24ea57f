"""PURE: records, claims, who may open. The tables of `protocol.md`, as code that refuses what they don't allow.

A `Ledger` holds one side's records of one protection instance. Nothing here is durable: the agent stores a record
first, and acts after. `Ledger.check` raises `IllegalRecord` for a record that would break the protocol; that is an
assertion of the product, not a message for users.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

Side = Literal["primary", "standby"]


class Kind(StrEnum):
    """What a record says. Each at most once per (instance, generation, side)."""

    PREPARING = "preparing"
    ARMING = "arming"
    PROTECTED = "protected"
    ARMED = "armed"
    DIED = "died"
    RESIGNED = "resigned"
    SOLO = "solo"
    LOST = "lost"
    TAKEN = "taken"
    GIVEN_UP = "given-up"
    NOT_WHOLE = "not-whole"
    SPOKEN = "spoken"
    ENDED = "ended"


class IllegalRecord(AssertionError):
    """A record that the protocol forbids after what is already written."""


@dataclass(frozen=True, slots=True)
class Record:
    """One durable statement of one side about generation g."""

    g: int
    kind: Kind


# What may be written after what, in one generation. SPOKEN belongs to g + 1 and is checked apart.
_AFTER: dict[Side, dict[Kind, frozenset[Kind]]] = {
    "primary": {
        Kind.PREPARING: frozenset(),
        Kind.ARMING: frozenset({Kind.PREPARING}),
        Kind.PROTECTED: frozenset({Kind.ARMING}),
        Kind.DIED: frozenset({Kind.PREPARING, Kind.ARMING, Kind.PROTECTED}),
        Kind.RESIGNED: frozenset({Kind.PROTECTED}),
        Kind.SOLO: frozenset({Kind.ARMING, Kind.PROTECTED, Kind.DIED, Kind.RESIGNED}),
        Kind.LOST: frozenset({Kind.ARMING, Kind.PROTECTED, Kind.DIED, Kind.RESIGNED}),
        Kind.ENDED: frozenset({Kind.PREPARING, Kind.ARMING, Kind.PROTECTED, Kind.SOLO, Kind.DIED}),
    },
    "standby": {
        Kind.PREPARING: frozenset(),
        Kind.ARMED: frozenset({Kind.PREPARING}),
        Kind.TAKEN: frozenset({Kind.ARMED}),
        Kind.GIVEN_UP: frozenset({Kind.PREPARING, Kind.ARMED, Kind.NOT_WHOLE}),
        Kind.LOST: frozenset({Kind.PREPARING, Kind.ARMED, Kind.NOT_WHOLE}),
        Kind.NOT_WHOLE: frozenset({Kind.PREPARING, Kind.ARMED}),
        Kind.ENDED: frozenset({Kind.PREPARING, Kind.ARMED, Kind.NOT_WHOLE}),
    },
}
UNDECIDED = (Kind.ARMING, Kind.PROTECTED, Kind.DIED, Kind.RESIGNED)  # of a primary: who goes on is not known yet
FINAL = frozenset({Kind.SOLO, Kind.LOST, Kind.TAKEN, Kind.GIVEN_UP, Kind.ENDED})


@dataclass
class Ledger:
    """One side's records of one instance (pid), generation g first. Append only what was made durable."""

    pid: str
    side: Side
    g: int
    records: list[Record] = field(default_factory=list)

    @classmethod
    def load(cls, pid: str, side: Side, g: int, kinds: Iterable[tuple[int, str]]) -> Ledger:
        """From (g, kind) pairs in the order of writing."""
        return cls(pid, side, g, [Record(n, Kind(k)) for n, k in kinds])

    def has(self, kind: Kind, g: int | None = None) -> bool:
        """Whether this record stands; g defaults to the instance's own generation."""
        return Record(self.g if g is None else g, kind) in self.records

    @property
    def newest(self) -> Kind | None:
        """The newest record of generation g; None before the first."""
        return next((r.kind for r in reversed(self.records) if r.g == self.g), None)

    @property
    def owned(self) -> int:
        """The generation that this side won: g + 1, or g + 2 where the other side gave its win back; 0 if none."""
        if self.has(Kind.TAKEN, self.g + 1):
            return self.g + 2
        return self.g + 1 if self.has(Kind.TAKEN) or self.has(Kind.SOLO) else 0

    @property
    def won(self) -> bool:
        """This side owns a later generation than g (unless it gave it back: `resigned_win`)."""
        return self.owned > 0

    @property
    def spoken(self) -> bool:
        """This side's win was followed by a guest that runs: only now may its gate open."""
        return self.won and self.has(Kind.SPOKEN, self.owned)

    @property
    def resigned_win(self) -> bool:
        """A winner that could not run its guest gave the generation back."""
        return self.has(Kind.RESIGNED, self.g + 1)

    def check(self, kind: Kind, g: int | None = None) -> Record:
        """The record to make durable next.

        Raises: IllegalRecord where the protocol forbids it (and names both records).
        """
        record = Record(self.g if g is None else g, kind)
        if record in self.records:
            return record
        if record == Record(self.g + 1, Kind.TAKEN):
            if self.side != "primary" or self.newest is not Kind.LOST:
                raise IllegalRecord(f"taken({record.g}) without a lost({self.g}) before it")
            return record
        if record.g > self.g and kind in (Kind.SPOKEN, Kind.RESIGNED):
            if record.g != self.owned:
                raise IllegalRecord(f"{kind.value}({record.g}) without a win of {record.g - 1}")
            other = Kind.RESIGNED if kind is Kind.SPOKEN else Kind.SPOKEN
            if self.has(other, record.g):
                raise IllegalRecord(f"{kind.value}({record.g}) after {other.value}({record.g})")
            return record
        newest = self.newest
        if record.g != self.g or kind is Kind.SPOKEN:
            raise IllegalRecord(f"{kind.value}({record.g}) in an instance of generation {self.g}")
        if newest is None:
            if kind is not Kind.PREPARING:
                raise IllegalRecord(f"{kind.value}({self.g}) as the first record")
        elif newest not in _AFTER[self.side].get(kind, frozenset()):
            raise IllegalRecord(f"{kind.value}({self.g}) after {newest.value}({self.g}) on the {self.side}")
        return record

    def append(self, kind: Kind, g: int | None = None) -> Record:
        """`check`, and remember: call it after the store has the record on disk."""
        record = self.check(kind, g)
        if record not in self.records:
            self.records.append(record)
        return record


def first_generation(*highest: int) -> int:
    """A new instance starts at 1 + the highest generation in either side's records; both must have been read."""
    return 1 + max(highest, default=0)


def may_arm(standby: Ledger) -> str:
    """Empty, or why the standby refuses ARM: it gave up, lost, saw an error, or has ended."""
    if standby.newest in (Kind.PREPARING, Kind.ARMED):
        return ""
    return f"this standby wrote {standby.newest.value if standby.newest else 'nothing'} already"


def may_take(standby: Ledger) -> str:
    """Empty, or why this standby must not take the generation."""
    if standby.newest in (Kind.ARMED, Kind.TAKEN):
        return ""
    return f"its newest record is {standby.newest.value if standby.newest else 'none'}, not armed"


def may_give_up(standby: Ledger, *, own_qemu_gone: bool, stream_dead: bool, claim_under_way: bool) -> str:
    """Empty, or why this standby can't give the generation up. Taken never becomes given-up."""
    if standby.newest is Kind.GIVEN_UP:
        return ""
    if standby.newest in (Kind.TAKEN, Kind.LOST, Kind.ENDED):
        return f"its newest record is {standby.newest.value}"
    if claim_under_way:
        return "a claim of its own is under way"
    if standby.newest is Kind.ARMED and not (own_qemu_gone or stream_dead):
        return "its copy and its stream are alive"
    return ""


def may_open_primary(primary: Ledger) -> str:
    """Empty, or why the primary's buffer must not be opened (undo, unprotect, adoption and solo all ask here)."""
    if primary.newest in (None, Kind.PREPARING):
        return ""
    if primary.newest is Kind.ENDED:
        return ""
    if primary.newest is Kind.SOLO:
        return "" if primary.spoken else "the win is not spoken yet"
    if primary.newest is Kind.LOST and primary.spoken:
        return ""
    return f"{primary.newest.value}({primary.g}) stands, and neither given-up({primary.g}) nor a win of it is known"


def verdict_on_peer_records(primary: Ledger, peer: Ledger | None) -> Literal["solo", "lost", "unknown"]:
    """What the standby's records mean for a primary that asked: only exactly given-up or taken mean anything."""
    if peer is None or peer.pid != primary.pid or peer.g != primary.g or peer.side != "standby":
        return "unknown"
    if peer.has(Kind.TAKEN):
        return "solo" if peer.resigned_win else "lost"
    if peer.has(Kind.GIVEN_UP):
        return "solo"
    return "unknown"


def knows_who_went_on(ledger: Ledger) -> bool:
    """After a cold start: whether this side's own records tell; else it needs the peer's, or the operator."""
    return ledger.newest not in (Kind.ARMING, Kind.PROTECTED, Kind.ARMED, Kind.DIED, Kind.RESIGNED)


def entitled(ledger: Ledger) -> int | None:
    """The generation in which this side may start the guest, by its own records alone.

    0: none, the other side has it. None: these records don't tell (`protocol.md`, "Cold start").
    """
    if ledger.resigned_win:
        return 0
    if ledger.won:
        return ledger.owned
    if not knows_who_went_on(ledger):
        return None
    return ledger.g if ledger.side == "primary" and ledger.newest is not Kind.LOST else 0


def belongs(ours: Ledger, theirs: Ledger | None) -> Literal["here", "there", "both", "unknown"]:
    """After both hosts were down: where the guest may start. theirs: None if the other side is silent or has no records.

    The newer generation starts; equal, its primary. "both": each side won the same one by an operator's word.
    """
    here = entitled(ours)
    if theirs is None:
        return "unknown" if here is None else "here" if here else "there"
    there = entitled(theirs)
    if here and there:
        return "here" if here > there else "there" if there > here else "both"
    if here:
        return "there" if there is None and theirs.g > here else "here"
    if there:
        return "there" if here == 0 or there > ours.g or ours.pid == theirs.pid else "unknown"
    if ours.pid != theirs.pid or (here, there) == (0, 0):
        return "unknown"
    if here is None and there is None:
        return "here" if ours.side == "primary" else "there"
    return "here" if here is None else "there"


def disk_labels(primary: Ledger | None, standby: Ledger | None, *, committed: bool = True) -> str:
    """This host's label for each disk of the domain, computed from its own records (`protocol.md`, "Disks")."""
    if standby is not None:
        if standby.resigned_win:
            return f"stale({standby.g})"
        if standby.has(Kind.TAKEN):
            return "truth" if committed else f"chain({standby.g})"
        if standby.newest is Kind.NOT_WHOLE:
            return f"bad({standby.g})"
        if standby.newest is Kind.ARMED:
            return f"following({standby.g})"
        return "syncing" if standby.newest is Kind.PREPARING else f"stale({standby.g})"
    if primary is None:
        return "truth"
    if primary.newest is Kind.LOST and not primary.won:
        return f"stale({primary.g})"
    if primary.newest is Kind.RESIGNED:
        return f"truth, contested({primary.g})"
    return "truth"
