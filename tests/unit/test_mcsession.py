"""When a micro-checkpointed primary is asked for its counter: against a FAKE QEMU that acknowledges some ms after its RESUME."""

from __future__ import annotations

import random

import pytest

from mcft.commit import CommitGate, Release
from mcft.engines.mcsession import Leader

DELAY_MS = 100.0
ROUNDS = 200


def run(ack_ms: float, *, lost: float = 0.0, foreign: float = 0.0, seed: int = 1) -> tuple[int, int]:
    """(questions, releases) in ROUNDS checkpoints. lost: share of RESUMEs that never arrive; foreign: of others' RESUMEs."""
    chance = random.Random(seed)
    commit = CommitGate(300.0, rule="counter")
    commit.hold()
    leader = Leader(DELAY_MS, commit)
    capture_ms = [1000.0 + n * (DELAY_MS + 3.0) for n in range(ROUNDS)]
    events = [at for at in capture_ms if chance.random() >= lost] + [at + 40 for at in capture_ms if chance.random() < foreign]
    events.sort()
    released, now = 0, 900.0
    while now < capture_ms[-1]:
        now = min(max(now, leader.due_ms()), events[0] if events else float("inf"), capture_ms[-1])
        commit.lease_renewed(now, now)
        actions = []
        if events and events[0] <= now:
            actions += leader.resume_seen(events.pop(0))
        elif leader.due_ms() <= now:
            ticket = leader.ask(now)
            count = sum(at + ack_ms <= now for at in capture_ms) - 1
            actions += leader.answered(ticket, {"status": "checkpointing", "mc": {"checkpoints": max(0, count)}}, now + 0.5)
        released += sum(isinstance(action, Release) for action in actions)
    return leader.polls, released


@pytest.mark.parametrize("ack_ms", [0.1, 2.0, 8.0, 15.0, 45.0, 90.0, 99.0])
def test_every_second_checkpoint_releases_and_few_questions_are_asked(ack_ms: float) -> None:
    """One question behind the barrier, and those that await the second acknowledgement. Fails if the first one is asked for."""
    polls, released = run(ack_ms)
    assert released >= ROUNDS // 2 - 4
    assert polls <= ROUNDS / 2 * (2 + ack_ms / 10) + 20


@pytest.mark.parametrize(("lost", "foreign"), [(0.1, 0.0), (0.0, 0.1), (0.1, 0.1)])
@pytest.mark.parametrize("ack_ms", [2.0, 15.0, 60.0])
def test_a_lost_or_foreign_resume_costs_questions_and_no_standstill(ack_ms: float, lost: float, foreign: float) -> None:
    """What rest is, is learned anew. Fails if asking ceases, or goes on at every interval for good."""
    polls, released = run(ack_ms, lost=lost, foreign=foreign)
    assert released >= ROUNDS * 0.39
    assert polls <= ROUNDS * 7
