"""The third exhaustive world: two claims of one generation and an etcd (`exhaustive.py` tells)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from mcft.arbiter.base import Ask, Intent, Standing
from mcft.arbiter.etcd import Create, EtcdClaim, Key, Reply, Seen, Swap, Word
from tests.sim.exhaustive import Broken

ARMED = Word("armed-x", 1, "primary").text()


@dataclass
class _Side:
    """One agent: its claim, and what of its I/O is under way."""

    name: str
    claim: EtcdClaim | None = None
    intent: bool = False  # on disk
    waiting: Ask | None = None
    won: bool = False  # on disk
    unknown: bool = False
    withdrawn: bool = False


@dataclass
class EtcdWorld:
    sides: tuple[_Side, _Side] = field(default_factory=lambda: (_Side("primary"), _Side("standby")))
    held: tuple[tuple[str, str, int], ...] = (("k", ARMED, 5),)
    revision: int = 5
    wiped: bool = False
    requests: frozenset[tuple[int, int, Create | Swap]] = frozenset()  # side, number, what
    answers: frozenset[tuple[int, int, Reply]] = frozenset()
    now: float = 0.0
    crashes: int = 2
    timeouts: int = 3
    wipes: int = 1

    def clone(self) -> EtcdWorld:
        sides = []
        for side in self.sides:
            claim = copy.copy(side.claim)
            sides.append(replace(side, claim=claim))
        return replace(self, sides=(sides[0], sides[1]))

    def key(self) -> Any:
        inside = []
        for side in self.sides:
            c = side.claim
            state = c and (c.standing, c._unanswered, c._failures, c._withdrawn, c.seen, c._out is not None, c._number)
            waiting = side.waiting and side.waiting.number
            inside.append((state, side.intent, waiting, side.won, side.unknown, side.withdrawn))
        return (tuple(inside), self.held, self.revision, self.wiped, self.requests, self.answers,
                self.crashes, self.timeouts, self.wipes)  # fmt: skip

    def check(self) -> None:
        if self.sides[0].won and self.sides[1].won:
            raise Broken("both sides won")
        for side in self.sides:
            if side.won and side.withdrawn:
                raise Broken(f"the {side.name} won what it had withdrawn")

    def moves(self) -> Iterator[tuple[str, Callable[[EtcdWorld], None]]]:
        for number, side in enumerate(self.sides):
            other = self.sides[1 - number]
            if side.claim is None and not side.won and not side.unknown and not side.withdrawn:
                yield f"{side.name}: intent on disk, claims", lambda w, n=number: w._begin(n)  # type: ignore[misc]
            claim = side.claim
            if claim is None:
                continue
            if side.waiting is None and claim.standing is Standing.OPEN and claim.next(1e9) is not None:
                claim._out = None  # looking alone changes nothing
                claim._number -= 1
                yield f"{side.name}: sends", lambda w, n=number: w._send(n)  # type: ignore[misc]
            if side.waiting is not None and self.timeouts:
                yield f"{side.name}: no answer in time", lambda w, n=number: w._timeout(n, sent=True)  # type: ignore[misc]
                if (number, side.waiting.number) in {(s, k) for s, k, _ in self.requests}:
                    yield f"{side.name}: never left the host", lambda w, n=number: w._timeout(n, sent=False)  # type: ignore[misc]
            if self.crashes:
                yield f"{side.name}: the agent ends and goes on", lambda w, n=number: w._crash(n)  # type: ignore[misc]
            if side.waiting is None and claim.standing is Standing.OPEN and not side.withdrawn and not other.won:
                yield f"{side.name}: withdraws", lambda w, n=number: w._withdraw(n)  # type: ignore[misc]
        for request in sorted(self.requests, key=str):
            yield f"etcd carries out {request[0]}", lambda w, r=request: w._carry_out(r)  # type: ignore[misc]
        for answer in sorted(self.answers, key=str):
            yield f"an answer reaches {answer[0]}", lambda w, a=answer: w._answer(a)  # type: ignore[misc]
            yield "an answer is lost", lambda w, a=answer: w._forget(a)  # type: ignore[misc]
        if self.wipes:
            yield "etcd is wiped", EtcdWorld._wipe
            yield "the keys are deleted", EtcdWorld._delete

    def _begin(self, number: int) -> None:
        side = self.sides[number]
        side.intent = True
        self._make(side, before=False)

    def _make(self, side: _Side, *, before: bool) -> None:
        name: Any = side.name
        side.claim = EtcdClaim(Intent(f"id-{name}", name, 1), Key("k", ARMED, 5), Seen("c", 5), sent_before=before)
        side.claim.made_durable()

    def _send(self, number: int) -> None:
        side = self.sides[number]
        assert side.claim is not None
        ask = side.claim.next(1e9)
        assert ask is not None
        side.waiting = ask
        self.requests |= {(number, ask.number, ask.what)}

    def _timeout(self, number: int, *, sent: bool) -> None:
        side = self.sides[number]
        assert side.claim is not None and side.waiting is not None
        self.timeouts -= 1
        if not sent:
            self.requests = frozenset(r for r in self.requests if (r[0], r[1]) != (number, side.waiting.number))
        side.claim.no_answer(side.waiting, sent=sent, now_ms=0.0)
        side.waiting = None

    def _crash(self, number: int) -> None:
        self.crashes -= 1
        side = self.sides[number]
        side.waiting, side.claim = None, None
        self.answers = frozenset(a for a in self.answers if a[0] != number)
        if not side.won and not side.unknown and not side.withdrawn:
            self._make(side, before=True)

    def _withdraw(self, number: int) -> None:
        side = self.sides[number]
        assert side.claim is not None
        if side.claim.withdraw():
            side.withdrawn, side.intent = True, False

    def _carry_out(self, request: tuple[int, int, Create | Swap]) -> None:
        self.requests -= {request}
        number, asked, what = request
        cluster = "other" if self.wiped else "c"
        held = {key: (value, mod) for key, value, mod in self.held}
        found = held.get(what.key)
        wanted = None if isinstance(what, Create) else (what.value, what.mod_revision)
        if found == wanted:
            self.revision += 1
            held[what.key] = (what.value if isinstance(what, Create) else what.put, self.revision)
            self.held = tuple((key, *rest) for key, rest in sorted(held.items()))
            reply = Reply(cluster, self.revision, True)
        else:
            value, mod = found or (None, 0)
            reply = Reply(cluster, self.revision, False, value, mod)
        self.answers |= {(number, asked, reply)}

    def _answer(self, answer: tuple[int, int, Reply]) -> None:
        self.answers -= {answer}
        number, asked, reply = answer
        side = self.sides[number]
        if side.waiting is None or side.waiting.number != asked or side.claim is None:
            return  # its connection is gone
        side.claim.answered(side.waiting, reply, 0.0)
        side.waiting = None
        if side.claim.standing is Standing.WON:
            side.won = True
        elif side.claim.standing is Standing.UNKNOWN:
            side.unknown = True

    def _forget(self, answer: tuple[int, int, Reply]) -> None:
        self.answers -= {answer}

    def _wipe(self) -> None:
        self.wipes -= 1
        self.held, self.revision, self.wiped = (), 1, True

    def _delete(self) -> None:
        self.wipes -= 1
        self.held, self.revision = (), self.revision + 1
