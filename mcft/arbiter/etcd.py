"""PURE: arbiter `etcd`: one key per protection instance, made at arming; whoever's claim it holds has won.

The key's value is {claim, g, owner}. A claim is one transaction that compares the exact value *and* mod-revision and
writes this side's claim id. Of two claims etcd lets exactly one through; one whose answer was lost is repeated, and finds
either that it still can win or whose claim the key holds. A key that is missing, or an etcd whose revision is below
the highest seen (wiped, or restored from a backup), or that is another cluster, can't tell: UNKNOWN until an
operator arms anew (protects again). All reads are linearizable: a transaction, or a range that is not `serializable`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import msgspec

from mcft.arbiter.base import Ask, Intent, Side, Standing

FIRST_TIMEOUT_MS, LONGEST_TIMEOUT_MS = 500.0, 8000.0
RETRY_MS = 100.0
WATCH_EVERY_MS, WATCH_TIMEOUT_MS = 1000.0, 2000.0
SILENT_MS = 5000.0  # without an answer for this long it counts as not reachable


# ---- what is asked and answered ----


@dataclass(frozen=True, slots=True)
class Create:
    """Transaction: if the key does not exist, put; else read it."""

    key: str
    value: str


@dataclass(frozen=True, slots=True)
class Swap:
    """Transaction: if the key has exactly this value and mod-revision, put; else read it."""

    key: str
    value: str
    mod_revision: int
    put: str


@dataclass(frozen=True, slots=True)
class Read:
    """A linearizable range of the one key."""

    key: str


@dataclass(frozen=True, slots=True)
class Reply:
    """etcd's answer. value: of the key as it was read, None: it does not exist (or was not read, if `succeeded`)."""

    cluster_id: str
    revision: int
    succeeded: bool = False
    value: str | None = None
    mod_revision: int = 0


class Seen(msgspec.Struct, frozen=True):
    """The newest that was seen of this etcd. Revisions only ever rise in one history of one cluster."""

    cluster_id: str = ""
    revision: int = 0

    def doubt(self, reply: Reply) -> str:
        """Empty, or why this answer does not belong to the history that was seen. Compare with what was seen at the asking."""
        if self.cluster_id and reply.cluster_id != self.cluster_id:
            return f"etcd is another cluster ({reply.cluster_id} instead of {self.cluster_id})"
        if reply.revision < self.revision:
            return f"etcd went back to revision {reply.revision} after {self.revision}: wiped, or restored from a backup"
        return ""

    def after(self, reply: Reply) -> Seen:
        """With this answer seen too."""
        return Seen(reply.cluster_id, max(self.revision, reply.revision))


class Key(msgspec.Struct, frozen=True):
    """An instance's key as it was when armed: what a claim compares with. name "": none was made."""

    name: str = ""
    value: str = ""
    mod_revision: int = 0


class Word(msgspec.Struct, frozen=True):
    """A key's value."""

    claim: str
    g: int
    owner: Side

    def text(self) -> str:
        """Always the same bytes for the same word."""
        return json.dumps({"claim": self.claim, "g": self.g, "owner": self.owner}, separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> Word | None:
        """None for anything that mcft did not write."""
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.MsgspecError:
            return None


def key_name(prefix: str, uuid: str, pid: str) -> str:
    return f"{prefix.rstrip('/')}/{uuid}/{pid}"


# ---- arming ----


class Arming:
    """Makes the key and reads it back. Done when `key.name` is set; `failed` says why it can't be."""

    def __init__(self, name: str, g: int, nonce: str, seen: Seen) -> None:
        """nonce: random, so that a repeated creation finds its own and nobody else's."""
        self._put = Word(f"armed-{nonce}", g, "primary").text()
        self._name, self.seen, self.key, self.failed = name, seen, Key(), ""
        self._number, self._made = 0, False
        self._asked_seen = seen

    def next(self, now_ms: float) -> Ask | None:
        if self.key.name or self.failed:
            return None
        self._number += 1
        self._asked_seen = self.seen
        what = Read(self._name) if self._made else Create(self._name, self._put)
        return Ask(self._number, what, FIRST_TIMEOUT_MS * 4)

    def answered(self, ask: Ask, reply: Reply, now_ms: float) -> None:
        if doubt := self._asked_seen.doubt(reply):
            self.failed = doubt
            return
        self.seen = self.seen.after(reply)
        if isinstance(ask.what, Create) and reply.succeeded:
            self._made = True
        elif reply.value == self._put:
            self.key = Key(self._name, self._put, reply.mod_revision)
        else:
            self.failed = f"the key {self._name} is not as it was just made: {reply.value}"

    def no_answer(self, ask: Ask, *, sent: bool, now_ms: float) -> None:
        """Asked again by `next`; the caller's patience ends it."""


# ---- claiming ----


class EtcdClaim:
    """One side's claim. See `base.Claim`."""

    def __init__(self, intent: Intent, key: Key, seen: Seen, *, sent_before: bool = False) -> None:
        """sent_before: an agent that died since may have sent it already."""
        self.intent, self.key, self.seen = intent, key, seen
        self.standing, self.reason = Standing.OPEN, ""
        self._put = Word(intent.id, intent.g, intent.side).text()
        self._durable = False
        self._unanswered = sent_before  # something that was sent may still win
        self._out: Ask | None = None
        self._out_seen = seen
        self._number, self._failures, self._wake_ms = 0, 0, float("-inf")
        self._withdrawn = False
        if not key.name:
            self.standing, self.reason = Standing.UNKNOWN, "no key was made for this protection"

    def made_durable(self) -> None:
        self._durable = True

    def next(self, now_ms: float) -> Ask | None:
        if not self._durable or self.standing is not Standing.OPEN or self._out is not None or self._withdrawn:
            return None
        if now_ms < self._wake_ms:
            return None
        self._number += 1
        timeout_ms = min(FIRST_TIMEOUT_MS * 2**self._failures, LONGEST_TIMEOUT_MS)
        self._out = Ask(self._number, Swap(self.key.name, self.key.value, self.key.mod_revision, self._put), timeout_ms)
        self._out_seen = self.seen
        return self._out

    @property
    def wake_ms(self) -> float:
        return self._wake_ms if self.standing is Standing.OPEN else float("inf")

    def answered(self, ask: Ask, reply: Reply, now_ms: float) -> None:
        seen_when_asked = self._out_seen if self._out is ask else self.seen
        self._out = None
        if self.standing is not Standing.OPEN:
            return
        if doubt := seen_when_asked.doubt(reply):
            self._end(Standing.UNKNOWN, doubt)
            return
        self.seen = self.seen.after(reply)
        if reply.succeeded:
            self._end(Standing.WON, "etcd took the claim")
            return
        word = Word.parse(reply.value) if reply.value is not None else None
        if reply.value is None:
            self._end(Standing.UNKNOWN, f"the key {self.key.name} is missing in etcd")
        elif word is None or word.g != self.intent.g or reply.mod_revision <= self.key.mod_revision:
            self._end(Standing.UNKNOWN, f"the key {self.key.name} was changed by somebody else: {reply.value}")
        elif word.claim == self.intent.id:
            self._end(Standing.WON, "etcd holds this claim")
        elif word.owner != self.intent.side:
            self._end(Standing.LOST, f"etcd holds the other side's claim {word.claim}")
        else:
            self._end(Standing.UNKNOWN, f"etcd holds another claim of the {word.owner}: {word.claim}")

    def no_answer(self, ask: Ask, *, sent: bool, now_ms: float) -> None:
        self._out = None
        self._unanswered = self._unanswered or sent
        self._failures += 1
        self._wake_ms = now_ms + RETRY_MS
        self.reason = "etcd has not answered yet" if sent else "etcd can't be reached"

    def withdraw(self) -> bool:
        """Only a claim that no etcd can have heard; whatever may have been sent must be resolved."""
        if self.standing is Standing.OPEN and not self._unanswered and self._out is None:
            self._withdrawn = True
        return self._withdrawn

    @property
    def void(self) -> bool:
        """UNKNOWN, and every transaction that was sent was answered as not done: this claim can't win any more."""
        return self.standing is Standing.UNKNOWN and not self._unanswered

    def _end(self, standing: Standing, reason: str) -> None:
        self.standing, self.reason = standing, reason


# ---- watching ----


class EtcdWatch:
    """Reads the key every second. `trouble` is sticky: a history that was broken stays so until an operator arms anew."""

    def __init__(self, key: Key, seen: Seen, trouble: str = "") -> None:
        self.key, self.seen, self.trouble = key, seen, trouble
        self.last_ok_ms: float | None = None
        self.said = "not asked yet"
        self.word: Word | None = None
        self._out: Ask | None = None
        self._out_seen = seen
        self._number, self._wake_ms = 0, float("-inf")

    def next(self, now_ms: float) -> Ask | None:
        if self._out is not None or now_ms < self._wake_ms:
            return None
        self._number += 1
        self._out, self._out_seen = Ask(self._number, Read(self.key.name), WATCH_TIMEOUT_MS), self.seen
        return self._out

    @property
    def wake_ms(self) -> float:
        return self._wake_ms

    def answered(self, ask: Ask, reply: Reply, now_ms: float) -> None:
        self._out, self._wake_ms = None, now_ms + WATCH_EVERY_MS
        if doubt := self._out_seen.doubt(reply):
            self._doubt(doubt)
            return
        self.seen = self.seen.after(reply)
        if reply.value is None:
            self._doubt(f"the key {self.key.name} is missing in etcd")
            return
        self.word = Word.parse(reply.value)
        if self.word is None or reply.mod_revision < self.key.mod_revision:
            self._doubt(f"the key {self.key.name} was changed by somebody else: {reply.value}")
            return
        self.last_ok_ms, self.said = now_ms, ""

    def no_answer(self, ask: Ask, *, sent: bool, now_ms: float) -> None:
        self._out, self._wake_ms = None, now_ms + WATCH_EVERY_MS
        self.said = "no answer in time" if sent else "not reachable"

    def reachable(self, now_ms: float) -> bool:
        """It answered lately, and in the history that was seen before."""
        return not self.trouble and self.last_ok_ms is not None and now_ms - self.last_ok_ms <= SILENT_MS

    def _doubt(self, why: str) -> None:
        self.trouble = self.trouble or why
        self.said = why
