"""The release rules, against a small model of QEMU, the standby and a gate that reads late.

In the model every packet has a number, and the truth is known: which packets lie in the newest checkpoint that the
standby really holds. A release of anything newer is the bug that mcft exists to prevent.
"""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mcft.commit import (
    PAUSED_RETRY_MS,
    Acknowledged,
    Action,
    AskCount,
    CommitGate,
    Release,
    SendMarker,
    SetBarrier,
)

T = 300.0
MARGIN = 20.0


def gate() -> CommitGate:
    made = CommitGate(T, MARGIN)
    made.hold()
    return made


def leased(now_ms: float = 0.0) -> CommitGate:
    made = gate()
    made.lease_renewed(now_ms, now_ms)
    return made


def releases(actions: list[Action]) -> list[int]:
    return [a.epoch for a in actions if isinstance(a, Release)]


class World(RuleBasedStateMachine):
    """QEMU (truth), its monitor (a queue that the gate reads late), the standby's counts, and the gate under test."""

    @initialize(in_capture=st.booleans(), sent_before=st.integers(0, 3))
    def start(self, in_capture: bool, sent_before: int) -> None:
        self.gate = CommitGate(T, MARGIN)
        self.now = 1000.0
        self.sent = sent_before  # packets that the guest ever sent
        self.state = "running"
        self.captured = -1  # packets in the checkpoint under way
        self.held = -1  # packets in the newest checkpoint that the standby holds: the truth
        self.loads = self.counted = 0  # the standby's gate may hear of its newest load after the primary went on
        self.true_acks = 0
        self.exited = False
        self.written: deque[tuple[str, int, str]] = deque()  # what QEMU wrote to the monitor, unread
        self.commands: deque[int] = deque()  # markers on their way to QEMU
        self.unanswered: list[int] = []  # markers whose reply the gate has not read
        self.timers: list[int] = []
        self.counts: deque[tuple[int, int]] = deque()  # (loads, epoch asked): the standby's answers on their way
        self.asked = 0
        self.barriers: dict[int, int] = {}  # outstanding epoch -> packets before its barrier
        self.newest_epoch = self.newest_release = 0
        self.acks_told = 0
        self.told_dead = False
        self.leases: list[float] = []  # sending times that were echoed since the last withdrawal
        if in_capture:
            self.begin_checkpoint()
            self.read_monitor()
            self.captured = -1  # began before the hold: packets of before it were never held, and it must not count
        self.gate.hold()

    # ---- obey the gate ----

    def obey(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, SetBarrier):
                assert not self.barriers, "two barriers outstanding"
                assert action.epoch == self.newest_epoch + 1
                self.newest_epoch = action.epoch
                self.barriers[action.epoch] = self.sent
            elif isinstance(action, SendMarker):
                if action.after_ms:
                    self.timers.append(action.capture)
                else:
                    self.send_marker(action.capture)
            elif isinstance(action, AskCount):
                self.asked = action.epoch
            elif isinstance(action, Release):
                assert action.epoch > self.newest_release, "released twice, or out of order"
                assert self.barriers.pop(action.epoch) <= self.held, "released output that no checkpoint holds"
                assert any(self.now < sent + T - MARGIN for sent in self.leases), "released without a lease"
                self.newest_release = action.epoch
            elif isinstance(action, Acknowledged):
                self.acks_told += 1
                assert not self.told_dead, "acknowledged on a dead stream"
                assert action.count == self.acks_told <= self.true_acks

    def send_marker(self, capture: int) -> None:
        self.commands.append(capture)
        self.unanswered.append(capture)

    # ---- QEMU and the guest ----

    @precondition(lambda self: self.state == "running")
    @rule(packets=st.integers(1, 3))
    def guest_sends(self, packets: int) -> None:
        self.sent += packets

    @precondition(lambda self: self.state in ("running", "paused") and not self.exited)
    @rule()
    def begin_checkpoint(self) -> None:
        if self.state == "running":  # a guest that is paused already gives no second STOP
            self.written.append(("STOP", 0, ""))
        self.captured, self.state = self.sent, "colo"

    @precondition(lambda self: self.state == "colo")
    @rule()
    def checkpoint_done(self) -> None:
        if self.captured >= 0:
            self.held = self.captured
            self.true_acks += 1
        self.counted = self.loads
        self.loads += 1
        self.state = "running"
        self.written.append(("RESUME", 0, ""))

    @rule(
        packets=st.integers(0, 2),
        seen=st.sampled_from(["in time", "stop", "nothing", "nothing"]),
        outcome=st.sampled_from(["done", "done", "done", "fails"]),
        lease=st.booleans(),
        drain=st.booleans(),
        noticed=st.sampled_from(["before", "between", "later"]),
    )
    def whole_checkpoint(self, packets: int, seen: str, outcome: str, lease: bool, drain: bool, noticed: str) -> None:
        """The common cases in one step, so that long runs of checkpoints, late and in time, are searched as well."""
        if self.state == "running":
            self.sent += packets
        if self.state in ("running", "paused") and not self.exited:
            self.begin_checkpoint()
        if seen != "nothing":
            self.read_all()
        if seen == "in time":
            self.answer_all()
        if self.state == "colo" and outcome == "done":
            self.checkpoint_done()
        elif self.state == "colo" and not self.exited:
            self.checkpoint_fails()
        if lease:
            self.lease(0.0)
        if self.state == "running":
            self.sent += packets
        if noticed == "before":
            self.standby_notices()
        if drain:
            self.read_all()
            self.answer_all()
            for _ in range(2 if self.asked else 0):
                self.standby_counts()
                while self.counts:
                    self.count_arrives()
                if noticed == "between":
                    self.standby_notices()

    def read_all(self) -> None:
        while self.written:
            self.read_monitor()

    def answer_all(self) -> None:
        while self.commands:
            self.marker_processed()
        self.read_all()

    @precondition(lambda self: self.state == "colo" and not self.exited)
    @rule()
    def checkpoint_fails(self) -> None:
        self.exited, self.state = True, "running"
        self.written.append(("COLO_EXIT", 0, ""))
        self.written.append(("RESUME", 0, ""))

    @precondition(lambda self: self.state == "running")
    @rule()
    def operator_pauses(self) -> None:
        self.state = "paused"
        self.written.append(("STOP", 0, ""))

    @precondition(lambda self: self.state == "paused")
    @rule()
    def operator_continues(self) -> None:
        self.state = "running"
        self.written.append(("RESUME", 0, ""))

    @precondition(lambda self: self.commands)
    @rule()
    def marker_processed(self) -> None:
        self.written.append(("REPLY", self.commands.popleft(), self.state))

    # ---- the gate ----

    @precondition(lambda self: self.written)
    @rule()
    def read_monitor(self) -> None:
        what, capture, status = self.written.popleft()
        if what == "STOP":
            self.obey(self.gate.stop_seen(self.now))
        elif what == "RESUME":
            self.obey(self.gate.resume_seen(self.now))
        elif what == "COLO_EXIT":
            self.gate.stream_died("COLO_EXIT")
            self.told_dead = True
        else:
            self.unanswered.remove(capture)
            self.obey(self.gate.marker_answered(capture, status, self.now))

    @precondition(lambda self: self.timers)
    @rule()
    def timer(self) -> None:
        self.send_marker(self.timers.pop(0))

    @rule()
    def monitor_reconnects(self) -> None:
        """What was written is lost with the connection; whoever waits is told so, then the gate."""
        self.written.clear()
        self.commands.clear()
        waiting, self.unanswered = self.unanswered, []
        for capture in waiting:
            self.obey(self.gate.marker_answered(capture, "error", self.now))
        self.gate.monitor_reconnected()

    @precondition(lambda self: self.asked)
    @rule()
    def standby_counts(self) -> None:
        """The answer is put together after the question went out; it may be read much later."""
        self.counts.append((self.counted, self.asked))

    @rule()
    def standby_notices(self) -> None:
        self.counted = self.loads

    @precondition(lambda self: self.counts)
    @rule()
    def count_arrives(self) -> None:
        loads, asked = self.counts.popleft()
        self.obey(self.gate.count_read(loads, asked, self.now))

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
            assert len(self.barriers) <= 1
            assert self.gate.outstanding == bool(self.barriers)


World.TestCase.settings = settings(max_examples=400, stateful_step_count=60, deadline=None)
TestWorld = World.TestCase


checkpoints = st.tuples(
    st.integers(0, 2),
    st.sampled_from(["in time", "stop", "nothing", "nothing", "nothing"]),
    st.sampled_from(["done"] * 9 + ["fails"]),
    st.sampled_from([True, True, False]),
    st.sampled_from([True, True, False]),
    st.sampled_from(["before", "between", "later"]),
)


@settings(max_examples=600, deadline=None)
@given(st.lists(checkpoints, min_size=5, max_size=25))
def test_long_runs(run: list[tuple[int, str, str, bool, bool, str]]) -> None:
    """Nothing but checkpoints, most of them seen late: how streams look where only the counts can tell."""
    world = World()
    world.start(False, 0)
    for checkpoint in run:
        world.whole_checkpoint(*checkpoint)
        world.one_barrier()
        world.time_passes(20.0)


# ---- each rule by itself, so that a failure names it ----


def test_a_whole_checkpoint_releases_its_epoch() -> None:
    g = leased()
    assert g.stop_seen(0) == [SetBarrier(1), SendMarker(1)]
    assert g.marker_answered(1, "colo", 1) == []
    assert g.resume_seen(2) == [Release(1), Acknowledged(1)]


def test_resume_without_a_marker_is_foreign() -> None:
    g = leased()
    g.stop_seen(0)
    assert g.resume_seen(1) == []
    assert g.stats.foreign_resumes == 1 and g.outstanding


def test_resume_without_a_stop_is_foreign() -> None:
    g = leased()
    assert g.resume_seen(1) == [] and g.stats.foreign_resumes == 1


@pytest.mark.parametrize("status", ["running", "paused", "error", "shutdown", "io-error", "finish-migrate"])
def test_only_colo_confirms(status: str) -> None:
    g = leased()
    g.stop_seen(0)
    g.marker_answered(1, status, 1)
    assert g.resume_seen(2) == []


def test_paused_marker_is_asked_again_after_a_while() -> None:
    g = leased()
    g.stop_seen(0)
    assert g.marker_answered(1, "paused", 1) == [SendMarker(1, PAUSED_RETRY_MS)]
    assert g.marker_answered(1, "paused", 6) == [SendMarker(1, PAUSED_RETRY_MS)]
    assert g.marker_answered(1, "colo", 11) == []  # QEMU goes from paused into a checkpoint without a second STOP
    assert releases(g.resume_seen(12)) == [1]


def test_a_late_barrier_is_merged_and_leaves_with_the_next_acknowledgement() -> None:
    g = leased()
    g.stop_seen(0)
    assert g.resume_seen(1) == []  # the gate read both late
    assert g.marker_answered(1, "running", 2) == []
    assert g.stop_seen(3) == [SendMarker(2)], "no second barrier"
    g.marker_answered(2, "colo", 4)
    assert releases(g.resume_seen(5)) == [1]
    assert (g.stats.merged_epochs, g.stats.late_markers) == (1, 1)


def test_barrier_without_its_own_marker_is_not_covered() -> None:
    """A confirmed RESUME acknowledges, but a barrier whose marker was never answered stays."""
    g = leased()
    g.stop_seen(0)
    g.resume_seen(1)
    g.stop_seen(2)
    g.marker_answered(2, "colo", 3)
    assert g.resume_seen(4) == [Acknowledged(1)]
    assert g.outstanding


def test_captures_that_began_before_the_hold_do_not_count() -> None:
    g = CommitGate(T, MARGIN)
    assert g.stop_seen(0) == []
    g.hold()
    g.lease_renewed(0, 0)
    assert g.marker_answered(0, "colo", 1) == []
    assert g.resume_seen(2) == []


def test_nothing_is_acknowledged_once_the_stream_died() -> None:
    g = leased()
    g.stop_seen(0)
    g.marker_answered(1, "colo", 1)
    g.stream_died("COLO_EXIT")
    g.stream_died("later")
    assert g.dead == "COLO_EXIT"
    assert g.resume_seen(2) == [] and g.stop_seen(3) == [] and g.count_read(9, 1, 4) == []
    assert g.lease_renewed(5, 5) == []


def test_lease_ends_before_the_standby_may_act() -> None:
    g = gate()
    g.lease_renewed(100, 110)
    assert g.lease_holds(100 + T - MARGIN - 0.1)
    assert not g.lease_holds(100 + T - MARGIN)
    g.lease_renewed(50, 120)  # an older echo, come late, takes nothing away and gives nothing
    assert g.lease_holds(100 + T - MARGIN - 0.1) and not g.lease_holds(100 + T - MARGIN)


def test_release_waits_for_a_lease_and_its_acknowledgement_is_not_lost() -> None:
    g = gate()
    g.stop_seen(0)
    g.marker_answered(1, "colo", 1)
    assert g.resume_seen(2) == [Acknowledged(1)]
    assert g.stats.waits_for_lease == 1
    assert g.lease_renewed(3 - T, 3) == [], "an echo so old gives no lease"
    assert g.lease_renewed(3, 3) == [Release(1)]


def test_withdrawn_lease_stops_at_once() -> None:
    g = leased()
    g.lease_withdrawn()
    g.stop_seen(0)
    g.marker_answered(1, "colo", 1)
    assert g.resume_seen(2) == [Acknowledged(1)]


def late(g: CommitGate, capture: int, now: float) -> list[Action]:
    """A checkpoint of which the gate read STOP and RESUME in one go."""
    actions = g.stop_seen(now) + g.resume_seen(now)
    return actions + g.marker_answered(capture, "running", now + 1)


def test_two_late_markers_switch_to_counting_and_one_in_time_back() -> None:
    g = leased()
    assert not [a for a in late(g, 1, 0) if isinstance(a, AskCount)] and g.rule == "marker"
    assert late(g, 2, 10)[-1] == AskCount(1) and g.rule == "count"
    g.stop_seen(20)
    g.marker_answered(3, "colo", 21)
    assert g.rule == "marker"


def test_counting_needs_two_more_than_was_read_behind_the_barrier() -> None:
    """c + 1 may be a checkpoint whose capture was before the barrier and whose acknowledgement was under way."""
    g = leased()
    late(g, 1, 0)
    late(g, 2, 10)
    assert g.count_read(7, 1, 11) == []
    assert g.count_read(8, 1, 12) == []
    assert g.count_read(9, 1, 13) == [Release(1), Acknowledged(1)]


def test_count_that_fell_starts_again() -> None:
    """A restarted standby's gate counts from nought."""
    g = leased()
    late(g, 1, 0)
    late(g, 2, 10)
    g.count_read(100, 1, 11)
    g.count_read(0, 1, 12)
    assert g.count_read(1, 1, 13) == []
    assert releases(g.count_read(2, 1, 14)) == [1]


def test_count_of_another_epoch_is_ignored() -> None:
    g = leased()
    late(g, 1, 0)
    late(g, 2, 10)
    assert g.count_read(0, 2, 11) == [] and g.count_read(50, 2, 12) == [] and g.outstanding


def test_reconnected_monitor_voids_markers() -> None:
    g = leased()
    g.stop_seen(0)
    g.monitor_reconnected()
    assert g.marker_answered(1, "colo", 1) == []
    assert g.resume_seen(2) == [], "its STOP was on another connection"
    g.stop_seen(3)
    g.marker_answered(2, "colo", 4)
    assert releases(g.resume_seen(5)) == [1]


@pytest.mark.parametrize("lag", ["none", "marker", "always"])
def test_healthy_streams_release_each_epoch_within_two_checkpoints(lag: str) -> None:
    """none: markers in time. marker: every other one late. always: only the counts tell."""
    g, loads, born, asked = leased(), 0, {}, 0

    def obey(actions: list[Action], checkpoint: int) -> None:
        nonlocal asked
        for action in actions:
            if isinstance(action, SetBarrier):
                born[action.epoch] = checkpoint
            elif isinstance(action, Release):
                # The two late markers that switch to counting cost the first epoch one checkpoint more.
                assert checkpoint - born.pop(action.epoch) <= (3 if action.epoch == 1 else 2)
            elif isinstance(action, AskCount):
                asked = action.epoch
                obey(g.count_read(loads, asked, now), checkpoint)

    for checkpoint in range(1, 60):
        now = checkpoint * 100.0
        obey(g.lease_renewed(now, now), checkpoint)
        obey(g.stop_seen(now), checkpoint)
        is_late = lag == "always" or (lag == "marker" and checkpoint % 2 == 1)
        if not is_late:
            obey(g.marker_answered(checkpoint, "colo", now), checkpoint)
        loads += 1
        obey(g.resume_seen(now + 5), checkpoint)
        if is_late:
            obey(g.marker_answered(checkpoint, "running", now + 6), checkpoint)
        if asked:
            obey(g.count_read(loads, asked, now + 7), checkpoint)
    assert len(born) <= 1 and g.stats.released_epochs >= {"none": 59, "marker": 25, "always": 15}[lag]
