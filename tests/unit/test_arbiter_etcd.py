"""The rules of arbiter `etcd`, against an etcd of a few lines that can be slow, wiped and rolled back."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcft.arbiter.base import Ask, Intent, Standing
from mcft.arbiter.etcd import Arming, Create, EtcdClaim, EtcdWatch, Key, Read, Reply, Seen, Swap, Word

G = 3
NAME = "/mcft/u/p"


@dataclass
class Store:
    """What etcd promises of one key space: linear, exact compares, revisions that rise."""

    cluster: str = "c1"
    revision: int = 10
    keys: dict[str, tuple[str, int]] = field(default_factory=dict)

    def do(self, what: Create | Swap | Read) -> Reply:
        value, mod = self.keys.get(what.key, (None, 0))
        if isinstance(what, Read):
            return Reply(self.cluster, self.revision, False, value, mod)
        fits = value is None if isinstance(what, Create) else (value, mod) == (what.value, what.mod_revision)
        if not fits:
            return Reply(self.cluster, self.revision, False, value, mod)
        self.revision += 1
        self.keys[what.key] = (what.value if isinstance(what, Create) else what.put, self.revision)
        return Reply(self.cluster, self.revision, True)


def armed(store: Store) -> tuple[Key, Seen]:
    arming = Arming(NAME, G, "n", Seen())
    while not arming.key.name:
        assert not arming.failed
        ask = arming.next(0.0)
        assert ask
        arming.answered(ask, store.do(ask.what), 0.0)
    return arming.key, arming.seen


def claim(key: Key, seen: Seen, side: str = "standby", ident: str = "", sent_before: bool = False) -> EtcdClaim:
    made = EtcdClaim(Intent(ident or f"id-{side}", side, G), key, seen, sent_before=sent_before)  # type: ignore[arg-type]
    made.made_durable()
    return made


def ask_of(made: EtcdClaim, now_ms: float = 0.0) -> Ask:
    ask = made.next(now_ms)
    assert ask is not None
    return ask


def test_arming_makes_the_key_and_reads_it_back() -> None:
    store = Store()
    key, seen = armed(store)
    assert store.keys[NAME] == (key.value, key.mod_revision) and seen == Seen("c1", 11)


def test_arming_again_after_a_lost_answer_finds_its_own() -> None:
    store = Store()
    arming = Arming(NAME, G, "n", Seen())
    ask = arming.next(0.0)
    assert ask
    store.do(ask.what)
    arming.no_answer(ask, sent=True, now_ms=0.0)
    again = arming.next(0.0)
    assert again
    arming.answered(again, store.do(again.what), 0.0)
    assert arming.key.mod_revision == store.revision


def test_arming_refuses_a_key_that_is_there() -> None:
    """Fails if somebody else's key is taken for this instance's."""
    store = Store(keys={NAME: ("other", 5)})
    arming = Arming(NAME, G, "n", Seen())
    ask = arming.next(0.0)
    assert ask
    arming.answered(ask, store.do(ask.what), 0.0)
    assert arming.failed and not arming.key.name


def test_nothing_is_sent_before_the_intent_is_durable() -> None:
    """Fails if a claim hands out a question whose id a crash could forget."""
    key, seen = armed(Store())
    made = EtcdClaim(Intent("i", "standby", G), key, seen)
    assert made.next(0.0) is None and made.next(1e9) is None
    made.made_durable()
    assert made.next(0.0) is not None


def test_of_two_claims_one_wins_and_the_other_knows() -> None:
    store = Store()
    key, seen = armed(store)
    first, second = claim(key, seen, "primary"), claim(key, seen, "standby")
    for made in (second, first):
        made.answered(ask := ask_of(made), store.do(ask.what), 0.0)
    assert (second.standing, first.standing) == (Standing.WON, Standing.LOST)


def test_the_answer_that_was_lost_was_a_win() -> None:
    """Fails if a claim whose answer was lost is taken for refused, or is claimed under another id."""
    store = Store()
    key, seen = armed(store)
    made = claim(key, seen)
    ask = ask_of(made)
    store.do(ask.what)
    made.no_answer(ask, sent=True, now_ms=0.0)
    assert made.standing is Standing.OPEN and not made.withdraw()
    assert made.next(50.0) is None, "not at once again"
    ask = ask_of(made, 100.0)
    made.answered(ask, store.do(ask.what), 100.0)
    assert made.standing is Standing.WON


def test_a_slow_etcd_gets_more_time_each_time() -> None:
    """Fails if each attempt ends after the same time: an etcd slower than that would never be heard."""
    key, seen = armed(Store())
    made, now, given_ms = claim(key, seen), 0.0, []
    for _ in range(7):
        ask = ask_of(made, now)
        given_ms.append(ask.timeout_ms)
        now += ask.timeout_ms + 100
        made.no_answer(ask, sent=True, now_ms=now - 100)
    assert given_ms == [500, 1000, 2000, 4000, 8000, 8000, 8000]


def test_a_missing_key_is_unknown() -> None:
    """Fails if a wiped etcd is written to as if nobody had ever won there (create instead of compare)."""
    store = Store()
    key, seen = armed(store)
    store.keys.clear()
    made = claim(key, seen)
    ask = ask_of(made)
    made.answered(ask, store.do(ask.what), 0.0)
    assert made.standing is Standing.UNKNOWN and "missing" in made.reason and made.void and not store.keys


@pytest.mark.parametrize("answer_was_lost", [False, True])
def test_an_etcd_that_went_back_is_unknown(answer_was_lost: bool) -> None:
    """Fails if a revision below the highest seen is accepted: the claim of the other side may be what was forgotten."""
    store = Store()
    key, seen = armed(store)
    backup = copy.deepcopy(store)
    watch = EtcdWatch(key, seen)
    store.revision += 5  # others write too
    read = watch.next(0.0)
    assert read
    watch.answered(read, store.do(read.what), 0.0)
    won = claim(key, watch.seen, "primary")
    ask = ask_of(won)
    won.answered(ask, store.do(ask.what), 0.0)
    assert won.standing is Standing.WON
    late = claim(key, watch.seen, "standby", sent_before=answer_was_lost)
    ask = ask_of(late)
    late.answered(ask, backup.do(ask.what), 0.0)
    assert late.standing is Standing.UNKNOWN and "went back" in late.reason
    assert late.void is not answer_was_lost, "what was sent into the lost history may still win there"


def test_another_cluster_is_unknown() -> None:
    store = Store()
    key, seen = armed(store)
    made = claim(key, seen)
    ask = ask_of(made)
    made.answered(ask, Store("c2", 100, dict(store.keys)).do(ask.what), 0.0)
    assert made.standing is Standing.UNKNOWN and "another cluster" in made.reason


@pytest.mark.parametrize("value", ["garbage", Word("x", G + 1, "primary").text(), Word("other", G, "standby").text(), ""])
def test_a_key_that_somebody_wrote_is_unknown(value: str) -> None:
    store = Store()
    key, seen = armed(store)
    store.revision += 1
    store.keys[NAME] = (value, store.revision)
    made = claim(key, seen)
    ask = ask_of(made)
    made.answered(ask, store.do(ask.what), 0.0)
    assert made.standing is Standing.UNKNOWN


def test_an_older_answer_that_comes_after_a_newer_one_is_no_step_back() -> None:
    """Fails if an answer is compared with what was seen after its question was asked."""
    store = Store()
    key, seen = armed(store)
    made = claim(key, seen)
    ask = ask_of(made)
    reply = store.do(ask.what)
    made.seen = Seen("c1", store.revision + 50)
    made.answered(ask, reply, 0.0)
    assert made.standing is Standing.WON


def test_only_what_was_never_sent_can_be_withdrawn() -> None:
    """Fails if a side that may have won gives up (or says armed again)."""
    key, seen = armed(Store())
    made = claim(key, seen)
    ask = ask_of(made)
    assert not made.withdraw(), "it is on its way"
    made.no_answer(ask, sent=False, now_ms=0.0)
    assert made.withdraw() and made.next(1e9) is None
    assert not claim(key, seen, sent_before=True).withdraw()


def test_without_a_key_there_is_no_claim() -> None:
    made = claim(Key(), Seen())
    assert made.standing is Standing.UNKNOWN and made.next(0.0) is None


# ---- whatever comes ----

steps = st.lists(
    st.tuples(st.sampled_from(["primary", "standby"]), st.sampled_from(["answer", "lose", "refuse", "deliver", "wipe", "crash"])),
    max_size=40,
)


@settings(max_examples=1500, deadline=None)
@given(steps)
def test_never_two_winners_and_never_both_let_go(script: list[tuple[str, str]]) -> None:
    """Whatever is lost, late, refused, wiped or crashed: at most one side has won; one that won is never withdrawn."""
    store, now = Store(), 0.0
    key, seen = armed(store)
    claims = {side: claim(key, seen, side) for side in ("primary", "standby")}
    sent_before = {side: False for side in claims}
    late: list[Swap] = []
    for side, act in script:
        now += 10_000.0
        made = claims[side]
        if act == "wipe":
            store.keys.clear()
        elif act == "deliver" and late:
            store.do(late.pop(0))
        elif act == "crash":
            sent_before[side] = sent_before[side] or made.standing is not Standing.OPEN or made._number > 0
            if made.standing is Standing.OPEN:
                claims[side] = claim(key, seen, side, sent_before=True)
        elif (ask := made.next(now)) is not None:
            if act == "answer":
                made.answered(ask, store.do(ask.what), now)
            elif act == "refuse":
                made.no_answer(ask, sent=False, now_ms=now)
            else:
                late.append(ask.what)
                made.no_answer(ask, sent=True, now_ms=now)
        won = [s for s, c in claims.items() if c.standing is Standing.WON]
        assert len(won) <= 1
        lost = [s for s, c in claims.items() if c.standing is Standing.LOST]
        assert len(lost) <= 1


# ---- watching ----


def test_the_watch_asks_every_second_and_knows_when_it_was_answered() -> None:
    store = Store()
    key, seen = armed(store)
    watch = EtcdWatch(key, seen)
    ask = watch.next(0.0)
    assert ask and isinstance(ask.what, Read) and watch.next(0.0) is None and not watch.reachable(0.0)
    watch.answered(ask, store.do(ask.what), 5.0)
    assert watch.reachable(5.0) and watch.next(900.0) is None and not watch.reachable(5006.0)
    ask = watch.next(1005.0)
    assert ask
    watch.no_answer(ask, sent=False, now_ms=1010.0)
    assert watch.reachable(1010.0) and watch.said == "not reachable"


@pytest.mark.parametrize("how", ["wiped", "older", "another", "written"])
def test_trouble_stays(how: str) -> None:
    """Fails if an etcd that has forgotten is believed again once it answers well."""
    store = Store()
    key, seen = armed(store)
    broken = {
        "wiped": Store(revision=1000),
        "older": Store(revision=seen.revision - 1, keys=dict(store.keys)),
        "another": Store("c2", 1000, dict(store.keys)),
        "written": Store(revision=1000, keys={NAME: ("x", 1000)}),
    }[how]
    watch = EtcdWatch(key, seen)
    ask = watch.next(0.0)
    assert ask
    watch.answered(ask, broken.do(ask.what), 0.0)
    assert watch.trouble and not watch.reachable(0.0)
    ask = watch.next(5000.0)
    assert ask
    watch.answered(ask, store.do(ask.what), 5000.0)
    assert watch.trouble and not watch.reachable(5000.0)
