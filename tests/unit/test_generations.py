"""Records: what may follow what, who may arm, take, give up, open; what a peer's records mean; the disks' labels."""

from __future__ import annotations

import itertools

import pytest

from mcft.generations import (
    IllegalRecord,
    Kind,
    Ledger,
    Side,
    belongs,
    disk_labels,
    first_generation,
    knows_who_went_on,
    may_arm,
    may_give_up,
    may_open_primary,
    may_take,
    verdict_on_peer_records,
)

G = 5
P, S = Kind.PREPARING, Kind.SOLO
# One legal way to each newest record; each pair below starts from these.
WAYS: dict[Side, dict[Kind, list[Kind]]] = {
    "primary": {
        Kind.PREPARING: [P],
        Kind.ARMING: [P, Kind.ARMING],
        Kind.PROTECTED: [P, Kind.ARMING, Kind.PROTECTED],
        Kind.DIED: [P, Kind.ARMING, Kind.PROTECTED, Kind.DIED],
        Kind.RESIGNED: [P, Kind.ARMING, Kind.PROTECTED, Kind.RESIGNED],
        Kind.SOLO: [P, Kind.ARMING, Kind.PROTECTED, Kind.SOLO],
        Kind.LOST: [P, Kind.ARMING, Kind.PROTECTED, Kind.LOST],
        Kind.ENDED: [P, Kind.ARMING, Kind.PROTECTED, Kind.ENDED],
    },
    "standby": {
        Kind.PREPARING: [P],
        Kind.ARMED: [P, Kind.ARMED],
        Kind.TAKEN: [P, Kind.ARMED, Kind.TAKEN],
        Kind.GIVEN_UP: [P, Kind.ARMED, Kind.GIVEN_UP],
        Kind.LOST: [P, Kind.ARMED, Kind.LOST],
        Kind.NOT_WHOLE: [P, Kind.ARMED, Kind.NOT_WHOLE],
        Kind.ENDED: [P, Kind.ARMED, Kind.ENDED],
    },
}
# newest -> what the protocol's table lets follow (written out here again, on purpose).
NEXT: dict[Side, dict[Kind, set[Kind]]] = {
    "primary": {
        Kind.PREPARING: {Kind.ARMING, Kind.DIED, Kind.ENDED},
        Kind.ARMING: {Kind.PROTECTED, Kind.DIED, Kind.SOLO, Kind.LOST, Kind.ENDED},
        Kind.PROTECTED: {Kind.DIED, Kind.RESIGNED, Kind.SOLO, Kind.LOST, Kind.ENDED},
        Kind.DIED: {Kind.SOLO, Kind.LOST, Kind.ENDED},
        Kind.RESIGNED: {Kind.SOLO, Kind.LOST},
        Kind.SOLO: {Kind.ENDED},
        Kind.LOST: set(),
        Kind.ENDED: set(),
    },
    "standby": {
        Kind.PREPARING: {Kind.ARMED, Kind.GIVEN_UP, Kind.LOST, Kind.NOT_WHOLE, Kind.ENDED},
        Kind.ARMED: {Kind.TAKEN, Kind.GIVEN_UP, Kind.LOST, Kind.NOT_WHOLE, Kind.ENDED},
        Kind.NOT_WHOLE: {Kind.GIVEN_UP, Kind.LOST, Kind.ENDED},
        Kind.TAKEN: set(),
        Kind.GIVEN_UP: set(),
        Kind.LOST: set(),
        Kind.ENDED: set(),
    },
}
OF_G_PLUS_1 = (Kind.SPOKEN,)
PAIRS = [(side, a, b) for side, ways in WAYS.items() for a, b in itertools.product(ways, Kind) if b not in OF_G_PLUS_1]


def ledger(side: Side, *kinds: Kind, pid: str = "p", g: int = G) -> Ledger:
    made = Ledger(pid, side, g)
    for kind in kinds:
        made.append(kind, g + 1 if kind is Kind.SPOKEN else g)
    return made


def standby(*kinds: Kind, pid: str = "p", g: int = G) -> Ledger:
    return ledger("standby", *kinds, pid=pid, g=g)


def primary(*kinds: Kind) -> Ledger:
    return ledger("primary", *kinds)


def refused(made: Ledger, kind: Kind, g: int | None = None) -> bool:
    before = list(made.records)
    try:
        made.append(kind, g)
    except IllegalRecord:
        assert made.records == before
        return True
    return False


@pytest.mark.parametrize(("side", "newest", "kind"), PAIRS)
def test_every_pair(side: Side, newest: Kind, kind: Kind) -> None:
    made = ledger(side, *WAYS[side][newest])
    if kind in WAYS[side][newest]:
        count = len(made.records)
        made.append(kind)
        assert len(made.records) == count, "each at most once; writing it again changes nothing"
    else:
        assert refused(made, kind) == (kind not in NEXT[side][newest])


@pytest.mark.parametrize("side", ["primary", "standby"])
@pytest.mark.parametrize("kind", list(Kind))
def test_first_record_is_preparing(side: Side, kind: Kind) -> None:
    assert refused(Ledger("p", side, G), kind) == (kind is not Kind.PREPARING)


@pytest.mark.parametrize(("side", "newest"), [(s, k) for s, ways in WAYS.items() for k in ways])
@pytest.mark.parametrize("after", [Kind.SPOKEN, Kind.RESIGNED])
def test_only_a_winner_speaks_or_resigns_of_the_next_generation(side: Side, newest: Kind, after: Kind) -> None:
    wins = newest in (Kind.TAKEN, Kind.SOLO)
    assert refused(ledger(side, *WAYS[side][newest]), after, G + 1) == (not wins)
    if wins:
        other = Kind.RESIGNED if after is Kind.SPOKEN else Kind.SPOKEN
        made = ledger(side, *WAYS[side][newest])
        made.append(after, G + 1)
        assert refused(made, other, G + 1)


@pytest.mark.parametrize("g", [G - 1, G + 1, G + 2])
def test_records_of_other_generations_are_refused(g: int) -> None:
    for side, ways in WAYS.items():
        for newest, kind in itertools.product(ways, Kind):
            if g == G + 1 and kind in (Kind.SPOKEN, Kind.RESIGNED):
                continue
            takes_up_what_was_given_back = (side, newest, kind, g) == ("primary", Kind.LOST, Kind.TAKEN, G + 1)
            assert refused(ledger(side, *ways[newest]), kind, g) != takes_up_what_was_given_back


def test_spoken_of_g_itself_is_refused() -> None:
    assert refused(standby(*WAYS["standby"][Kind.TAKEN]), Kind.SPOKEN, G)


def test_load_is_what_was_written() -> None:
    made = Ledger.load("p", "standby", G, [(G, "preparing"), (G, "armed"), (G, "taken"), (G + 1, "spoken")])
    assert made.newest is Kind.TAKEN and made.won and made.spoken and not made.resigned_win


def test_first_generation() -> None:
    assert first_generation() == 1 and first_generation(0, 0) == 1 and first_generation(3, 7, 2) == 8


# ---- who may ----


@pytest.mark.parametrize("newest", list(WAYS["standby"]))
def test_may_arm_and_may_take(newest: Kind) -> None:
    made = standby(*WAYS["standby"][newest])
    assert (may_arm(made) == "") == (newest in (Kind.PREPARING, Kind.ARMED))
    assert (may_take(made) == "") == (newest in (Kind.ARMED, Kind.TAKEN)), "an unarmed standby never takes over"


def test_nothing_written_may_nothing() -> None:
    assert may_arm(standby()) and may_take(standby())


@pytest.mark.parametrize(("gone", "dead", "claim"), list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("newest", list(WAYS["standby"]))
def test_may_give_up(newest: Kind, gone: bool, dead: bool, claim: bool) -> None:
    made = standby(*WAYS["standby"][newest])
    allowed = may_give_up(made, own_qemu_gone=gone, stream_dead=dead, claim_under_way=claim) == ""
    if newest is Kind.GIVEN_UP:
        assert allowed
    elif newest in (Kind.TAKEN, Kind.LOST, Kind.ENDED) or claim:
        assert not allowed
    elif newest is Kind.ARMED:
        assert allowed == (gone or dead)
    else:
        assert allowed
    if allowed and newest is not Kind.GIVEN_UP:
        made.append(Kind.GIVEN_UP)
        assert may_arm(made) and may_take(made), "whoever gave up refuses every later ARM, and never takes"


def test_taken_never_becomes_given_up() -> None:
    made = standby(*WAYS["standby"][Kind.TAKEN])
    for gone, dead in itertools.product([False, True], repeat=2):
        assert may_give_up(made, own_qemu_gone=gone, stream_dead=dead, claim_under_way=False)
    with pytest.raises(IllegalRecord):
        made.append(Kind.GIVEN_UP)
    with pytest.raises(IllegalRecord):
        standby(*WAYS["standby"][Kind.GIVEN_UP]).append(Kind.TAKEN)


@pytest.mark.parametrize("newest", list(WAYS["primary"]))
def test_may_open(newest: Kind) -> None:
    made = primary(*WAYS["primary"][newest])
    assert (may_open_primary(made) == "") == (newest in (Kind.PREPARING, Kind.ENDED))
    if newest is Kind.SOLO:
        made.append(Kind.SPOKEN, G + 1)
        assert may_open_primary(made) == ""


def test_may_open_before_anything() -> None:
    assert may_open_primary(primary()) == ""


# ---- the peer's records ----


@pytest.mark.parametrize("newest", list(WAYS["standby"]))
def test_peer_records_mean_only_given_up_or_taken(newest: Kind) -> None:
    own = primary(*WAYS["primary"][Kind.PROTECTED])
    expected = {Kind.GIVEN_UP: "solo", Kind.TAKEN: "lost"}.get(newest, "unknown")
    assert verdict_on_peer_records(own, standby(*WAYS["standby"][newest])) == expected


@pytest.mark.parametrize("newest", [Kind.GIVEN_UP, Kind.TAKEN])
def test_others_records_are_no_consent(newest: Kind) -> None:
    own = primary(*WAYS["primary"][Kind.PROTECTED])
    way = WAYS["standby"][newest]
    assert verdict_on_peer_records(own, None) == "unknown"
    assert verdict_on_peer_records(own, standby()) == "unknown"
    assert verdict_on_peer_records(own, standby(*way, pid="older instance")) == "unknown"
    assert verdict_on_peer_records(own, standby(*way, g=G - 1)) == "unknown"
    assert verdict_on_peer_records(own, primary(*WAYS["primary"][Kind.LOST])) == "unknown"


def test_a_win_given_back_is_the_primarys() -> None:
    peer = standby(*WAYS["standby"][Kind.TAKEN])
    peer.append(Kind.RESIGNED, G + 1)
    assert verdict_on_peer_records(primary(*WAYS["primary"][Kind.RESIGNED]), peer) == "solo"


def test_both_words_at_once_are_never_a_consent() -> None:
    """Two writers that raced (the ledger forbids it): whatever else stands there, taken is taken."""
    both = Ledger.load("p", "standby", G, [(G, "preparing"), (G, "armed"), (G, "given-up"), (G, "taken")])
    assert verdict_on_peer_records(primary(*WAYS["primary"][Kind.PROTECTED]), both) == "lost"


@pytest.mark.parametrize(("side", "newest"), [(s, k) for s, ways in WAYS.items() for k in ways])
def test_cold_start(side: Side, newest: Kind) -> None:
    knows = newest not in (Kind.ARMING, Kind.PROTECTED, Kind.ARMED, Kind.DIED, Kind.RESIGNED)
    assert knows_who_went_on(ledger(side, *WAYS[side][newest])) == knows


# ---- disks ----

LABELS = [
    (None, None, True, "truth"),
    ([P], None, True, "truth"),
    (WAYS["primary"][Kind.ARMING], None, True, "truth"),
    (WAYS["primary"][Kind.PROTECTED], None, True, "truth"),
    (WAYS["primary"][Kind.RESIGNED], None, True, f"truth, contested({G})"),
    (WAYS["primary"][Kind.LOST], None, True, f"stale({G})"),
    (WAYS["primary"][Kind.SOLO], None, True, "truth"),
    (WAYS["primary"][Kind.ENDED], None, True, "truth"),
    (None, [P], True, "syncing"),
    (None, WAYS["standby"][Kind.ARMED], True, f"following({G})"),
    (None, WAYS["standby"][Kind.TAKEN], False, f"chain({G})"),
    (None, WAYS["standby"][Kind.TAKEN], True, "truth"),
    (None, [*WAYS["standby"][Kind.TAKEN], Kind.SPOKEN], False, f"chain({G})"),
    (None, WAYS["standby"][Kind.GIVEN_UP], True, f"stale({G})"),
    (None, WAYS["standby"][Kind.LOST], True, f"stale({G})"),
    (None, WAYS["standby"][Kind.ENDED], True, f"stale({G})"),
    (None, WAYS["standby"][Kind.NOT_WHOLE], True, f"bad({G})"),
]


@pytest.mark.parametrize(("own", "copy", "committed", "label"), LABELS)
def test_disk_labels(own: list[Kind] | None, copy: list[Kind] | None, committed: bool, label: str) -> None:
    made = disk_labels(primary(*own) if own else None, standby(*copy) if copy else None, committed=committed)
    assert made == label


def test_a_whole_story_never_has_two_truths() -> None:
    """The two hosts' labels through a take-over, step by step: never both the truth by themselves."""
    for own, copy in [
        (Kind.PROTECTED, Kind.ARMED), (Kind.RESIGNED, Kind.ARMED), (Kind.LOST, Kind.TAKEN), (Kind.SOLO, Kind.GIVEN_UP),
        (Kind.PROTECTED, Kind.NOT_WHOLE), (Kind.ENDED, Kind.ENDED),
    ]:  # fmt: skip
        labels = (
            disk_labels(primary(*WAYS["primary"][own]), None),
            disk_labels(None, standby(*WAYS["standby"][copy])),
        )
        assert labels.count("truth") <= 1, labels


def test_a_resigned_win_is_not_the_truth() -> None:
    copy = standby(*WAYS["standby"][Kind.TAKEN])
    copy.append(Kind.RESIGNED, G + 1)
    assert disk_labels(None, copy, committed=False) not in ("truth", f"chain({G})")


def test_a_loser_may_take_up_a_win_given_back() -> None:
    own = primary(*WAYS["primary"][Kind.LOST])
    peer = standby(*WAYS["standby"][Kind.TAKEN])
    peer.append(Kind.RESIGNED, G + 1)
    assert verdict_on_peer_records(own, peer) == "solo"
    own.append(Kind.TAKEN, G + 1)
    assert own.won and own.owned == G + 2 and may_open_primary(own)
    own.append(Kind.SPOKEN, G + 2)
    assert own.spoken and not may_open_primary(own)


# ---- after both hosts were down ----

COLD: dict[str, tuple[Side, list[Kind]]] = {
    "led": ("primary", WAYS["primary"][Kind.PROTECTED]),
    "died": ("primary", WAYS["primary"][Kind.DIED]),
    "resigned": ("primary", WAYS["primary"][Kind.RESIGNED]),
    "solo": ("primary", WAYS["primary"][Kind.SOLO]),
    "lost": ("primary", WAYS["primary"][Kind.LOST]),
    "shut down": ("primary", WAYS["primary"][Kind.ENDED]),
    "followed": ("standby", [P, Kind.ARMED]),
    "took over": ("standby", [P, Kind.ARMED, Kind.TAKEN]),
    "gave up": ("standby", [P, Kind.ARMED, Kind.GIVEN_UP]),
    "not whole": ("standby", [P, Kind.NOT_WHOLE]),
    "half a copy": ("standby", [P]),
    "let go": ("standby", [P, Kind.ARMED, Kind.ENDED]),
}


def cold(word: str, g: int = G, pid: str = "p") -> Ledger:
    side, kinds = COLD[word]
    ledger = Ledger(pid, side, g)
    for kind in kinds:
        ledger.append(kind)
    if ledger.won:
        ledger.append(Kind.SPOKEN, ledger.owned)
    return ledger


@pytest.mark.parametrize(
    ("ours", "theirs", "where"),
    [
        ("led", "followed", "here"), ("died", "followed", "here"), ("resigned", "followed", "here"), ("died", "gave up", "here"),
        ("died", "half a copy", "here"), ("died", "not whole", "here"), ("died", "took over", "there"),
        ("resigned", "took over", "there"), ("lost", "took over", "there"), ("solo", "gave up", "here"),
        ("solo", "took over", "both"), ("solo", "followed", "here"), ("shut down", "let go", "here"),
        ("shut down", "took over", "there"),
        ("led", "", "unknown"), ("died", "", "unknown"), ("resigned", "", "unknown"), ("followed", "", "unknown"),
        ("solo", "", "here"), ("took over", "", "here"), ("shut down", "", "here"), ("lost", "", "there"),
        ("gave up", "", "there"), ("not whole", "", "there"), ("half a copy", "", "there"), ("let go", "", "there"),
    ],
)  # fmt: skip
def test_where_a_domain_belongs_after_both_hosts_were_down(ours: str, theirs: str, where: str) -> None:
    other_way = {"here": "there", "there": "here"}
    assert belongs(cold(ours), cold(theirs) if theirs else None) == where
    if theirs:
        assert belongs(cold(theirs), cold(ours)) == other_way.get(where, where)


def test_the_newer_generation_starts_whatever_instance_it_is_of() -> None:
    assert belongs(cold("solo", 2, "old"), cold("took over", 5)) == "there"
    assert belongs(cold("solo", 5), cold("solo", 2, "old")) == "here"
    assert belongs(cold("solo", 2, "old"), cold("led", 5)) == "there"
    assert belongs(cold("died", 5), cold("solo", 2, "old")) == "unknown"
    assert belongs(cold("died", 5), cold("followed", 5, "other")) == "unknown"


def test_a_win_that_was_given_back_starts_on_the_other_side() -> None:
    ledger = Ledger("p", "standby", G)
    for kind in (P, Kind.ARMED, Kind.TAKEN):
        ledger.append(kind)
    ledger.append(Kind.RESIGNED, G + 1)
    assert belongs(ledger, cold("died")) == "there"
    assert belongs(cold("died"), ledger) == "here"


def test_no_two_hosts_both_start_it() -> None:
    """Whatever the two sides' records of one instance are."""
    for ours, theirs in itertools.product(COLD, COLD):
        if COLD[ours][0] != COLD[theirs][0]:
            pair = {belongs(cold(ours), cold(theirs)), belongs(cold(theirs), cold(ours))}
            assert pair in ({"here", "there"}, {"both"}, {"unknown"}), (ours, theirs, pair)
