"""The recorded runs of the micro-checkpointing QEMU, played to both sides of mcft; and played with errors in them.

What each is expected to bring is in `expected.toml`, how they are played in `player.py`, what of mcft is real in `rig.py`.
"""

from __future__ import annotations

import asyncio
import random
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from player import Broken, Silent, Stream, names
from rig import Played, Rig

from mcft.api import McOptions
from mcft.engines.mc import Mc
from mcft.errors import Refused, Usage
from mcft.streams import Endpoint

EXPECTED = tomllib.loads((Path(__file__).parent / "expected.toml").read_text(encoding="utf-8"))
# Whole streams of some hundred replies at most, of every kind of end: those that are played with errors in them.
MUTATED = [
    "03b-delay-10", "03b-delay-100", "03b-delay-50", "05-tight-poll", "11-commands-during-mc", "12b-src-kill-dst-S",
    "13-dst-kill#2", "15-dst-sigstop", "19-system-reset", "22-reprotect#2", "27-dirty-load", "40-partition-mute-10s-heal",
    "42-partition-dstS-then-heal", "92-src-hang-zero-dirty-delay10",
]  # fmt: skip


def stream(key: str) -> Stream:
    name, _, index = key.partition("#")
    return Stream(name, int(index or 1) - 1)


@pytest.mark.parametrize("key", EXPECTED)
def test_replay(key: str) -> None:
    """Fails if a side decides otherwise than is written down, leaks, or sends what that QEMU would not have survived."""
    expected = EXPECTED[key]
    rig = Rig(stream(key), watch_only=expected.get("watched", False)).run()
    assert rig.leaks == []
    assert rig.acts == expected["acts"]
    assert rig.released >= expected["released"]
    assert rig.acknowledged == expected["acknowledged"]


def test_enough_runs_are_played() -> None:
    """At least 50 of the transcripts, and those that are not are named here (README.md has the reason)."""
    played = {key.partition("#")[0] for key in EXPECTED}
    assert len(played) >= 50
    under_libvirt = {name for name in names() if name[0] in "67"} - {"60-libvirt-dst-running", "61-libvirt-dst-paused"}
    bad_input_only = {"02-mc-delay-input", "93-delay-zero-idle-src-SIGFPE"}
    assert set(names()) - played == under_libvirt | bad_input_only | {"00-boot"}


def test_polls_are_few() -> None:
    """While checkpoints flow, what is asked stays at a few questions for each. Fails if it asks at every interval."""
    rig = Rig(stream("03b-delay-100")).run()
    first_ms, last_ms = rig.truth_ms[1], rig.truth_ms[-1]
    asked = rig.polls_until(last_ms) - rig.polls_until(first_ms)
    assert asked < 0.6 * (last_ms - first_ms) / rig.leader.interval_ms
    assert asked / (len(rig.truth_ms) - 2) < 6


# ---- with errors ----


def mutations(seed: int, lost: float, late: float, twice: float) -> Any:
    """Replies lost, late, doubled (the second one stale), and RESUMEs lost or late; by chance, the same for a seed."""
    chance = random.Random(seed)

    def mutate(_n: int, answer: dict[str, Any], _now_ms: float) -> list[tuple[float, dict[str, Any] | None]]:
        played: list[tuple[float, dict[str, Any] | None]] = []
        draw = chance.random()
        if draw < lost:
            return [(chance.uniform(0, 50), None)]
        played.append((chance.uniform(1, 400) if draw < lost + late else 0.0, answer))
        if chance.random() < twice:
            played.append((played[0][0] + chance.uniform(0, 300), answer))
        return played

    def event(_n: int) -> float | None:
        draw = chance.random()
        return None if draw < lost else chance.uniform(1, 180) if draw < lost + late else 0.0

    return mutate, event


@settings(max_examples=200, deadline=None)
@given(
    key=st.sampled_from(MUTATED), seed=st.integers(0, 2**31), lost=st.sampled_from([0.0, 0.1, 0.5]),
    late=st.sampled_from([0.0, 0.2, 0.6]), twice=st.sampled_from([0.0, 0.3]),
)  # fmt: skip
@example(key="12b-src-kill-dst-S", seed=0, lost=1.0, late=0.0, twice=0.0)
@example(key="05-tight-poll", seed=1, lost=0.0, late=1.0, twice=1.0)
def test_mutated_replays_never_leak(key: str, seed: int, lost: float, late: float, twice: float) -> None:
    """Fails if any loss, delay or doubling lets out what no acknowledged checkpoint held."""
    mutate, event = mutations(seed, lost, late, twice)
    rig = Rig(stream(key), mutate=mutate, event=event).run()
    assert rig.leaks == []


def test_without_any_resume_the_counter_alone_releases() -> None:
    """Events may be lost for good (libvirt was restarted): slower, never stuck."""
    rig = Rig(stream("03b-delay-100"), event=lambda _n: None).run()
    assert rig.leaks == [] and rig.released >= 8


def test_without_any_reply_nothing_is_released() -> None:
    rig = Rig(stream("03b-delay-100"), mutate=lambda _n, _answer, _now: [(1.0, None)]).run()
    assert rig.released == 0 and "armed" not in rig.acts


@pytest.mark.parametrize("wrong", ["one too early", "the barrier not looked at"])
def test_the_replays_see_a_wrong_rule(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rule that releases at c + 1, or that counts a reply of before the barrier, some replay must leak."""
    from mcft.commit import CommitGate

    def two_more(barrier: Any, count: int, epoch_asked: int) -> bool:
        if wrong == "the barrier not looked at":
            barrier.count_at = count if barrier.count_at is None else barrier.count_at
            return count >= barrier.count_at + 1
        if barrier.epoch != epoch_asked:
            return False
        barrier.count_at = count if barrier.count_at is None else barrier.count_at
        return count >= barrier.count_at + 1

    monkeypatch.setattr(CommitGate, "_two_more", staticmethod(two_more))
    leaks = []
    for seed in range(30):
        mutate, event = mutations(seed, 0.1, 0.4, 0.2)
        leaks += Rig(stream("05-tight-poll"), mutate=mutate, event=event).run().leaks
    assert leaks


# ---- what the player does not survive ----


@pytest.mark.parametrize(
    ("side", "command", "arguments"),
    [
        ("src", "migrate-set-mc-delay", {"value": 0}), ("src", "migrate-set-mc-delay", {"value": -1}),
        ("src", "migrate-set-mc-delay", {"value": 10**12}), ("src", "migrate-set-mc-delay", {"value": True}),
        ("src", "migrate", {"uri": "tcp:127.0.0.1:1", "blk": True}), ("src", "stop", {}), ("src", "migrate_cancel", {}),
        ("src", "device_add", {"driver": "virtio-rng-pci"}), ("src", "quit", {}), ("src", "x-colo-lost-heartbeat", {}),
        ("dst", "query-status", {}), ("dst", "cont", {}), ("dst", "quit", {}), ("dst", "query-migrate", {}),
    ],
)  # fmt: skip
def test_the_player_fails_where_qemu_would(side: str, command: str, arguments: dict[str, Any]) -> None:
    played = stream("12b-src-kill-dst-S")
    played.now_s = played.acknowledged_s()[5]
    with pytest.raises(Broken):
        played.ask(side, command, arguments)


def test_the_player_is_silent_where_qemu_was() -> None:
    played = stream("92-src-hang-zero-dirty-delay10")
    played.now_s = 12.0
    with pytest.raises(Silent):
        played.ask("src", "query-migrate")


def test_a_capability_too_many_is_seen() -> None:
    """The player compares what is switched on with what the run switched on."""
    played = stream("12b-src-kill-dst-S")
    with pytest.raises(Broken):
        asyncio.run(Mc(McOptions("rdma", rdma_copy=True)).start(Played(played, "src"), Endpoint("127.0.0.1", 1), 100, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("delay_ms", [0, -1, 5, 10_001, 10**12, 100.5, True])
def test_no_delay_that_would_crash_is_ever_sent(delay_ms: Any) -> None:
    """Fails if anything reaches QEMU: the capabilities neither."""
    sent: list[str] = []

    class Qemu:
        async def execute(self, command: str, **_arguments: Any) -> Any:
            sent.append(command)

    with pytest.raises(Usage):
        asyncio.run(Mc().start(Qemu(), Endpoint("127.0.0.1", 1), delay_ms, 1))  # type: ignore[arg-type]
    assert sent == []


def test_a_lacking_capability_is_named_and_nothing_is_set() -> None:
    sent: list[str] = []

    class Qemu:
        async def execute(self, command: str, **_arguments: Any) -> Any:
            sent.append(command)
            if command == "query-commands":
                return [{"name": "migrate-set-mc-delay"}]
            return [{"capability": name, "state": False} for name in ("mc", "mc-net-disable")]

    with pytest.raises(Refused, match="mc-rdma-copy"):
        asyncio.run(Mc(McOptions("rdma", rdma_copy=True)).start(Qemu(), Endpoint("127.0.0.1", 1), 100, 1))  # type: ignore[arg-type]
    assert "migrate-set-capabilities" not in sent
