"""Rule `counter` (engine `mc`) under the invariants of `test_commit.World`: the same truth, another QEMU.

That QEMU tells of a capture by a RESUME alone, counts acknowledgements (less one) when it is asked, and starts capture k + 1 only
after acknowledgement k. Events and replies are read late, in their order each, but not in that of one another (libvirt).
"""

from __future__ import annotations

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mcft.commit import Acknowledged, Action, AskCount, CommitGate, Release, SetBarrier

T = 300.0
MARGIN = 20.0


def gate() -> CommitGate:
    made = CommitGate(T, MARGIN, rule="counter")
    made.hold()
    return made


class McWorld(RuleBasedStateMachine):
    """QEMU (truth), its events and replies (queues read late), and the gate under test."""

    @initialize(before=st.integers(0, 3), capturing=st.booleans())
    def start(self, before: int, capturing: bool) -> None:
        self.gate = CommitGate(T, MARGIN, rule="counter")
        self.now = 1000.0
        self.sent = 0
        self.acks = 0
        self.captured = -1  # packets in the checkpoint on its way
        self.held = -1  # packets in the newest checkpoint that the standby holds: the truth
        self.failed = False
        self.events: deque[str] = deque()
        self.asked: deque[int] = deque()  # questions on their way to QEMU: the newest epoch when each was sent
        self.replies: deque[tuple[int, int]] = deque()
        self.epoch = 0
        self.barriers: dict[int, int] = {}
        self.newest_release = self.told = 0
        self.leases: list[float] = []
        for _ in range(before):
            self.capture_ends()
            self.acknowledged()
        if capturing:
            self.capture_ends()
        self.gate.hold()

    def obey(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, SetBarrier):
                assert not self.barriers, "two barriers outstanding"
                self.barriers[action.epoch] = self.sent
            elif isinstance(action, AskCount):
                self.epoch = action.epoch
            elif isinstance(action, Release):
                assert action.epoch > self.newest_release, "released twice, or out of order"
                assert self.barriers.pop(action.epoch) <= self.held, "released output that no checkpoint holds"
                assert any(self.now < sent + T - MARGIN for sent in self.leases), "released without a lease"
                self.newest_release = action.epoch
            elif isinstance(action, Acknowledged):
                assert not self.gate.dead
                assert self.told < action.count <= self.acks
                self.told = action.count

    @rule(packets=st.integers(1, 3))
    def guest_sends(self, packets: int) -> None:
        self.sent += packets

    @precondition(lambda self: self.captured < 0 and not self.failed)
    @rule()
    def capture_ends(self) -> None:
        """Stop, copy and resume are one instant for the guest; the RESUME is written at its end."""
        self.captured = self.sent
        self.events.append("RESUME")

    @precondition(lambda self: self.captured >= 0 and not self.failed)
    @rule()
    def acknowledged(self) -> None:
        self.held, self.captured = self.captured, -1
        self.acks += 1

    @rule()
    def somebody_continues(self) -> None:
        self.events.append("RESUME")

    @rule()
    def stream_breaks(self) -> None:
        self.failed = True

    @precondition(lambda self: self.events)
    @rule(lost=st.booleans())
    def event_arrives(self, lost: bool) -> None:
        self.events.popleft()
        if not lost:
            self.obey(self.gate.capture_seen(self.now))

    @rule()
    def gate_asks(self) -> None:
        self.asked.append(self.epoch)

    @precondition(lambda self: self.asked)
    @rule()
    def qemu_answers(self) -> None:
        self.replies.append((self.asked.popleft(), -1 if self.failed else max(0, self.acks - 1)))

    @precondition(lambda self: self.replies)
    @rule(lost=st.booleans())
    def reply_arrives(self, lost: bool) -> None:
        epoch, count = self.replies.popleft()
        if lost:
            return
        if count < 0:
            self.gate.stream_died("failed")
        else:
            self.obey(self.gate.counter_read(count, epoch, self.now))

    @rule(
        packets=st.integers(0, 2), resume=st.sampled_from(["before the ack", "after it", "never"]),
        asks=st.sampled_from(["at once", "behind", "both", "never"]), lease=st.booleans(),
    )  # fmt: skip
    def whole_checkpoint(self, packets: int, resume: str, asks: str, lease: bool) -> None:
        """The common cases in one step, so that long runs are searched too."""
        if self.failed:
            return
        self.sent += packets
        if self.captured < 0:
            self.capture_ends()
        self.sent += packets
        if resume == "before the ack":
            self.drain_events()
        if asks in ("at once", "both"):
            self.ask_now()
        self.acknowledged()
        if lease:
            self.lease(0.0)
        if resume == "after it":
            self.drain_events()
        if asks in ("behind", "both"):
            self.ask_now()

    def drain_events(self) -> None:
        while self.events:
            self.event_arrives(False)

    def ask_now(self) -> None:
        self.gate_asks()
        while self.asked:
            self.qemu_answers()
        while self.replies:
            self.reply_arrives(False)

    @rule(ms=st.sampled_from([1.0, 20.0, 100.0, T]))
    def time_passes(self, ms: float) -> None:
        self.now += ms

    @rule(age_ms=st.sampled_from([0.0, 50.0, T - MARGIN, T]))
    def lease(self, age_ms: float) -> None:
        self.leases.append(self.now - age_ms)
        self.obey(self.gate.lease_renewed(self.now - age_ms, self.now))

    @rule()
    def lease_withdrawn(self) -> None:
        self.leases.clear()
        self.gate.lease_withdrawn()

    @invariant()
    def one_barrier(self) -> None:
        if hasattr(self, "gate"):
            assert self.gate.outstanding == bool(self.barriers)


McWorld.TestCase.settings = settings(max_examples=400, stateful_step_count=60, deadline=None)
TestMcWorld = McWorld.TestCase

checkpoints = st.tuples(
    st.integers(0, 2), st.sampled_from(["before the ack", "after it", "never"]),
    st.sampled_from(["at once", "behind", "both", "never"]), st.booleans(),
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(checkpoints, min_size=5, max_size=25))
def test_long_runs(run: list[tuple[int, str, str, bool]]) -> None:
    world = McWorld()
    world.start(0, False)
    for checkpoint in run:
        world.whole_checkpoint(*checkpoint)
        world.one_barrier()
        world.time_passes(20.0)


def test_two_more_acknowledgements_release() -> None:
    g = gate()
    g.lease_renewed(0, 0)
    assert g.capture_seen(0) == [SetBarrier(1), AskCount(1)]
    assert g.counter_read(5, 1, 1) == [] and g.counter_read(6, 1, 2) == []
    assert g.counter_read(7, 1, 3) == [Release(1), Acknowledged(1)]


def test_what_was_asked_before_the_barrier_does_not_count() -> None:
    g = gate()
    g.lease_renewed(0, 0)
    g.counter_read(3, 0, 0)
    g.capture_seen(0)
    assert g.counter_read(3, 0, 1) == []  # asked before: the barrier's own count is still to come
    assert g.counter_read(4, 1, 2) == [] and g.counter_read(5, 1, 3) == []
    assert Release(1) in g.counter_read(6, 1, 4)


def test_a_counter_that_falls_is_another_streams() -> None:
    g = gate()
    g.capture_seen(0)
    g.counter_read(9, 1, 1)
    assert g.counter_read(0, 1, 2) == [] and "another migrate" in g.dead
    assert g.counter_read(11, 1, 3) == []


def test_a_lost_resume_is_seen_by_the_counter() -> None:
    g = gate()
    assert g.counter_read(4, 0, 0) == []
    assert g.counter_read(5, 0, 1) == [SetBarrier(1), AskCount(1)]


def test_zero_is_before_and_after_the_first() -> None:
    """`checkpoints` is 0 with no acknowledgement and with one: two more from 0 are at least one whole."""
    g = gate()
    g.lease_renewed(0, 0)
    g.capture_seen(0)
    for count in (0, 0, 1):
        assert g.counter_read(count, 1, 1) == []
    assert Release(1) in g.counter_read(2, 1, 2)
