"""Keepalives without sockets: what is believed, what is refused, what is echoed. And one link over loopback."""

from __future__ import annotations

import select
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcft.keepalive import DATAGRAM_BYTES, MAC_BYTES, QEMU, RECORDS, ROLES, Heard, Link, Session, Word, pack

KEY, PID = bytes(range(32)), bytes(16)
ARMED = Word("standby", 3, "armed", "running", True, False, 12, 0)


def session(key: bytes = KEY, pid: bytes = PID) -> Session:
    return Session(key, pid)


def met() -> tuple[Session, Session]:
    """Two gates that believe each other."""
    a, b = session(), session()
    assert b.accept(a.next(Word(), 0), "l", 0) is None, "an unknown nonce is not believed"
    assert a.accept(b.next(ARMED, 1), "l", 1) is not None, "it echoed what we sent just now"
    assert b.accept(a.next(Word(), 2), "l", 2) is not None
    return a, b


def heard(to: Session, datagram: bytes, now_ms: float = 3.0) -> Heard:
    found = to.accept(datagram, "l", now_ms)
    assert found is not None
    return found


@given(
    st.builds(
        Word, st.sampled_from(ROLES), st.integers(0, 2**64 - 1), st.sampled_from(RECORDS), st.sampled_from(QEMU),
        st.booleans(), st.booleans(), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1),
    )
)  # fmt: skip
def test_round_trip(word: Word) -> None:
    a, b = met()
    datagram = b.next(word, 5)
    assert len(datagram) == DATAGRAM_BYTES
    assert heard(a, datagram) == Heard("l", word, 2, 2)


@given(st.integers(0, DATAGRAM_BYTES - 1), st.integers(1, 255))
def test_any_changed_byte_is_refused(at: int, flip: int) -> None:
    a, b = met()
    datagram = bytearray(b.next(ARMED, 5))
    datagram[at] ^= flip
    assert a.accept(bytes(datagram), "l", 5) is None and a.refused == 1


@given(st.binary(max_size=2 * DATAGRAM_BYTES))
def test_garbage_is_refused(data: bytes) -> None:
    assert session().accept(data, "l", 0) is None


def test_other_key_other_instance_and_our_own_reflection_are_refused() -> None:
    a, b = met()
    others = (Session(bytes(32), PID, nonce=b.nonce), Session(KEY, bytes(15) + b"x", nonce=b.nonce))
    for other in others:
        other.counter, other.peer_nonce, other.peer_counter = 50, a.nonce, a.counter
        assert a.accept(other.next(ARMED, 5), "l", 5) is None
    assert a.accept(a.next(Word(), 6), "l", 6) is None
    assert a.refused == 3 and a.peer_nonce == b.nonce


@pytest.mark.parametrize(("role", "record", "qemu"), [(9, 0, 0), (0, 99, 0), (0, 0, 9)])
def test_words_of_a_later_version_are_refused_not_misread(role: int, record: int, qemu: int) -> None:
    import hmac
    from hashlib import sha256

    a, b = met()
    body = bytearray(b.next(ARMED, 5)[:-MAC_BYTES])
    body[28:31] = bytes((role, record, qemu))
    assert a.accept(bytes(body) + hmac.digest(KEY, body, sha256)[:MAC_BYTES], "l", 5) is None


# ---- order ----


def test_reordered_is_refused_and_a_duplicate_on_the_other_link_is_heard_there() -> None:
    a, b = met()
    first, second = b.next(ARMED, 5), b.next(ARMED, 6)
    assert heard(a, second).counter == 3
    assert a.accept(first, "l", 7) is None
    other = a.accept(second, "other", 7)
    assert other is not None and other.link == "other"
    assert a.accept(second, "other", 3000) is None, "the same one, recorded and repeated much later"


@given(st.permutations(range(8)))
def test_counters_that_are_believed_never_fall(order: list[int]) -> None:
    a, b = met()
    datagrams = [b.next(ARMED, 5) for _ in range(8)]
    counters = [h.counter for i in order if (h := a.accept(datagrams[i], "l", 6)) is not None]
    assert counters == sorted(counters) and counters[-1] == b.counter


# ---- echoes and nonces ----


def test_the_echo_is_the_newest_that_was_believed() -> None:
    a, b = met()
    for _ in range(5):
        heard(b, a.next(Word(), 5))
    assert heard(a, b.next(ARMED, 6)).echo == a.counter


def test_echo_of_a_foreign_nonce_gives_nothing() -> None:
    """The peer still echoes our dead predecessor: heard it is, but no lease may rest on that."""
    a, b = met()
    foreign = pack(KEY, PID, ARMED, b.nonce, b.counter + 1, bytes(7) + b"x", a.counter)
    assert heard(a, foreign).echo == 0
    ahead = pack(KEY, PID, ARMED, b.nonce, b.counter + 2, a.nonce, a.counter + 1)
    assert heard(a, ahead).echo == 0, "an echo of what we have not sent yet"


def test_old_datagrams_mean_nothing_to_a_restarted_gate() -> None:
    a, b = met()
    recorded = []
    for _ in range(20):
        recorded.append(b.next(ARMED, 5))
        heard(a, recorded[-1])
        heard(b, a.next(Word(), 5))
    again = session()
    again.next(Word(), 100)
    assert [again.accept(d, "l", 101 + i) for i, d in enumerate(recorded)] == [None] * 20
    assert again.peer_nonce == bytes(8)


def test_new_nonce_is_believed_once_it_echoed_ours() -> None:
    a, _ = met()
    restarted = session()
    assert a.accept(restarted.next(ARMED, 500), "l", 500) is None
    # What the old peer sends now echoes the newcomer's own counter: that is its proof.
    assert heard(restarted, a.next(Word(), 550), 550).echo == 1
    found = heard(a, restarted.next(ARMED, 600), 600)
    assert found.echo == a.counter and a.peer_nonce == restarted.nonce
    assert heard(restarted, a.next(Word(), 650), 650).echo == restarted.counter


def test_an_unproven_nonce_does_not_interrupt_a_peer_that_talks() -> None:
    a, b = met()
    for now in range(10, 500, 10):
        assert a.accept(session().next(ARMED, now), "l", now) is None
        found = heard(b, a.next(Word(), now), now)
        assert found.echo == b.counter
        assert heard(a, b.next(ARMED, now), now).echo == a.counter


@settings(max_examples=30)
@given(st.integers(0, 300))
def test_sending_times_are_remembered_for_a_while(count: int) -> None:
    a = session()
    for i in range(count):
        a.next(Word(), i * 10.0)
    assert a.sent_ms(0) is None and a.sent_ms(count + 1) is None
    for counter in range(1, count + 1):
        assert a.sent_ms(counter) == ((counter - 1) * 10.0 if counter > count - 128 else None)


@pytest.mark.parametrize("seed", list(product([False, True], repeat=4)))
def test_two_gates_meet_whatever_is_lost(seed: tuple[bool, ...]) -> None:
    """The first datagrams are lost in any pattern; after that each is heard within two round trips."""
    a, b = session(), session()
    got = 0
    for i in range(10):
        lost = i < 2 and (seed[2 * i], seed[2 * i + 1])
        to_b, to_a = a.next(Word(), i * 50.0), b.next(ARMED, i * 50.0)
        if not (lost and lost[0]):
            b.accept(to_b, "l", i * 50.0)
        if not (lost and lost[1]):
            got += a.accept(to_a, "l", i * 50.0 + 1) is not None
    assert got >= 5


def test_a_dead_process_is_not_believed_again() -> None:
    """Its last datagram comes late over the slow link, after its successor was believed."""
    a, b = met()
    slow = b.next(Word("standby", 3, "armed", "running", True, False, 100, 0), 10)
    restarted = session()
    a.accept(restarted.next(ARMED, 300), "l", 300)
    restarted.accept(a.next(Word(), 310), "l", 310)
    heard(a, restarted.next(ARMED, 320), 320)
    assert a.accept(slow, "slow", 330) is None


def test_an_unproven_nonce_does_not_let_old_counters_in() -> None:
    a, b = met()
    old = b.next(ARMED, 5)
    heard(a, b.next(ARMED, 6), 6)
    assert a.accept(session().next(ARMED, 200), "l", 200) is None
    assert a.accept(old, "l", 210) is None, "its counter is lower than what was believed before"


# ---- one link ----


def test_links_carry_and_swallow_the_errors_of_the_path() -> None:
    a = Link.open("127.0.0.1", 0, "127.0.0.1", 9)
    b = Link.open("127.0.0.1", 0, "127.0.0.1", a.sock.getsockname()[1])
    a.sock.connect(b.sock.getsockname())
    try:
        assert b.receive() == []
        assert a.send(b"one") and a.send(b"two")
        select.select([b.sock], [], [], 5)
        assert b.receive() == [b"one", b"two"]
        b.sock.close()
        a.send(b"nobody is there")
        a.send(b"and the ICMP error of the first is no exception")
        assert a.receive() == []
    finally:
        a.sock.close()
        b.sock.close()
