"""The watcher: each branch of `decide` with its sentence, both roles; and `Silence`."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcft.failover import Act, Settings, Silence, View, decide, stream_state

T, DELAY = 300.0, 100.0
SETTINGS = Settings(T, DELAY)
HEALTHY = View(
    role="primary", armed=True, own_qemu="running", shutdown_for_ms=0.0, stream_dead="", stream_age_ms=50.0,
    monitor_silent_ms=10.0, disk_error="", silent_ms=30.0, stream_silent_ms=30.0, peer_qemu="running",
    peer_closed=False, peer_shutdown_for_ms=0.0, peer_claiming=False, lan_ok=True,
)  # fmt: skip
OVERDUE = {"stream_age_ms": DELAY + T + 1}
ADAPTER = {"rdma_error": "RETRY_EXC_ERR", "rdma_silent_ms": 60000.0}  # a hint, alone worth nothing
SILENT = {"silent_ms": T + 1, "stream_silent_ms": T + 1}

PRIMARY: list[tuple[dict[str, Any], Act, str]] = [
    ({}, Act.WAIT, "stream alive"),
    ({"armed": False}, Act.WAIT, "stream alive"),
    ({"own_qemu": "shutdown", "own_ended": True}, Act.ENDED, "guest shut down"),
    ({"own_qemu": "shutdown", "shutdown_for_ms": 1999.0, "disk_error": "vda"}, Act.WAIT, "it may be rebooted"),
    ({"own_qemu": "shutdown", "shutdown_for_ms": 2000.0}, Act.ENDED, "guest shut down"),
    ({"own_qemu": "gone"}, Act.DIED, "gone without a shutdown"),
    ({"own_qemu": "gone", "armed": False}, Act.DIED, "gone without a shutdown"),
    ({"own_qemu": "gone", "disk_error": "vda"}, Act.DIED, "gone without a shutdown"),
    ({"disk_error": "the primary's own disk: EIO"}, Act.WAIT, "the gate ends this QEMU"),
    ({"own_qemu": "gone", "disk_error": "the primary's own disk: EIO"}, Act.DIED, "disk error: the primary's own disk: EIO"),
    ({"disk_error": "QUORUM_REPORT_BAD vda"}, Act.BREAK, "disk error: QUORUM_REPORT_BAD vda"),
    ({"buffer_broken": "vnet0 was set down", "stream_dead": "x"}, Act.BREAK, "changed by somebody else: vnet0 was set down"),
    ({"buffer_broken": "vnet0 is gone", "own_qemu": "gone"}, Act.DIED, "gone without a shutdown"),
    ({"stream_dead": "COLO_EXIT (error)"}, Act.BREAK, "stream broke: COLO_EXIT (error)"),
    ({"stream_dead": "x", "armed": False}, Act.BREAK, "stream broke"),
    ({"peer_claiming": True}, Act.BREAK, "standby claims"),
    ({"peer_qemu": "gone"}, Act.BREAK, "standby's QEMU is gone"),
    (OVERDUE, Act.WAIT, "stream overdue"),
    (SILENT, Act.WAIT, "stream alive"),
    ({**OVERDUE, **SILENT}, Act.BREAK, "standby is silent on every link for 301 ms"),
    ({**OVERDUE, "stream_silent_ms": T + 1}, Act.BREAK, "replication link is silent for 301 ms"),
    ({"stream_silent_ms": T + 1}, Act.WAIT, "stream alive"),
    ({**OVERDUE, **SILENT, "armed": False}, Act.WAIT, "stream overdue"),
    ({"stream_age_ms": DELAY + 10001}, Act.BREAK, "no checkpoint for 10 s though"),
    ({"stream_age_ms": DELAY + 10001, "monitor_silent_ms": 10001}, Act.HUNG, "no answer of QEMU's monitor for 10 s"),
    ({"stream_age_ms": DELAY + 9999, "monitor_silent_ms": 10001}, Act.WAIT, "stream overdue"),
    ({"monitor_silent_ms": 60000}, Act.WAIT, "stream alive"),
    ({"stream_age_ms": 60000, "monitor_silent_ms": 60000, "armed": False}, Act.WAIT, "stream overdue"),
    ({"lan_ok": False, **OVERDUE, **SILENT}, Act.BREAK, "silent on every link"),
    ({**OVERDUE, **ADAPTER}, Act.WAIT, "stream overdue"),
    ({**OVERDUE, **SILENT, **ADAPTER}, Act.BREAK, "silent on every link for 301 ms (RDMA: RETRY_EXC_ERR)"),
]
STANDBY: list[tuple[dict[str, Any], Act, str]] = [
    ({}, Act.WAIT, "stream alive"),
    ({"armed": False, "peer_qemu": "gone", "peer_closed": True, **SILENT, **OVERDUE}, Act.WAIT, "unarmed standby"),
    ({"armed": False, "stream_dead": "x", "silent_ms": 60000}, Act.WAIT, "unarmed standby"),
    ({"disk_error": "vda", "peer_qemu": "gone", "peer_closed": True}, Act.ALARM, "not whole: vda"),
    ({**OVERDUE, **ADAPTER}, Act.WAIT, "stream overdue"),
    ({**OVERDUE, **SILENT, **ADAPTER}, Act.CLAIM, "the stream is overdue (RDMA: RETRY_EXC_ERR)"),
    ({"disk_error": "vda", **SILENT, **OVERDUE}, Act.ALARM, "not whole"),
    ({"own_qemu": "gone", "peer_qemu": "gone", "peer_closed": True}, Act.ALARM, "standby's own QEMU is gone"),
    ({"own_qemu": "unknown"}, Act.ALARM, "own QEMU is gone"),
    ({"peer_qemu": "shutdown", "peer_shutdown_for_ms": 10}, Act.WAIT, "waiting for its agent's word"),
    ({"peer_qemu": "shutdown", "peer_shutdown_for_ms": 3000}, Act.ALARM, "an operator must decide"),
    ({"peer_qemu": "shutdown", "peer_closed": True, **SILENT, "stream_dead": "x"}, Act.WAIT, "waiting for its agent"),
    ({"peer_qemu": "gone", "peer_closed": True}, Act.CLAIM, "QEMU is gone and its gate is closed"),
    ({"peer_qemu": "gone", "peer_closed": False}, Act.WAIT, "stream alive"),
    ({"peer_closed": True}, Act.WAIT, "stream alive"),
    ({"peer_closed": True, "stream_dead": "x"}, Act.WAIT, "stream dead"),
    ({**SILENT, "stream_dead": "COLO_EXIT"}, Act.CLAIM, "silent on every link for 301 ms and the stream is dead"),
    ({**SILENT, **OVERDUE}, Act.CLAIM, "the stream is overdue"),
    (SILENT, Act.WAIT, "stream alive"),
    (OVERDUE, Act.WAIT, "stream overdue"),
    ({"stream_dead": "x"}, Act.WAIT, "stream dead"),
    ({**OVERDUE, "stream_silent_ms": 60000}, Act.WAIT, "stream overdue"),
    ({"stream_dead": "x", "stream_silent_ms": 60000}, Act.WAIT, "stream dead"),
    ({"silent_ms": T, **OVERDUE}, Act.WAIT, "stream overdue"),
    ({**SILENT, **OVERDUE, "lan_ok": False}, Act.ALARM, "own LAN does not answer"),
    ({"silent_ms": 2999}, Act.WAIT, "stream alive"),
    ({"silent_ms": 3001}, Act.CLAIM, "although checkpoints flow"),
    ({"silent_ms": 3001, "lan_ok": False}, Act.ALARM, "own LAN does not answer"),
    ({"peer_claiming": True}, Act.WAIT, "stream alive"),
    ({"lan_ok": False}, Act.WAIT, "stream alive"),
]


@pytest.mark.parametrize(("changes", "act", "reason"), PRIMARY)
def test_primary(changes: dict[str, Any], act: Act, reason: str) -> None:
    verdict = decide(replace(HEALTHY, **changes), SETTINGS)
    assert verdict.act is act and reason in verdict.reason


@pytest.mark.parametrize(("changes", "act", "reason"), STANDBY)
def test_standby(changes: dict[str, Any], act: Act, reason: str) -> None:
    verdict = decide(replace(HEALTHY, role="standby", **changes), SETTINGS)
    assert verdict.act is act and reason in verdict.reason


def test_a_gate_has_as_long_as_t() -> None:
    """T of 6 s. Fails if a silent gate with a live stream is judged sooner than one with a dead one."""
    slow = Settings(6000.0, DELAY)
    view = replace(HEALTHY, role="standby", silent_ms=6000.0)
    assert decide(view, slow).act is Act.WAIT
    verdict = decide(replace(view, silent_ms=6001.0), slow)
    assert verdict.act is Act.CLAIM and "for 6 s although checkpoints flow" in verdict.reason


ages = st.sampled_from([0.0, T - 1, T, T + 1, DELAY + T, DELAY + T + 1, 2999.0, 3001.0, 10001.0, 20000.0])
views = st.builds(
    View,
    role=st.sampled_from(["primary", "standby"]), armed=st.booleans(),
    own_qemu=st.sampled_from(["running"] * 6 + ["unknown", "gone", "shutdown"]), shutdown_for_ms=ages,
    stream_dead=st.sampled_from(["", "x"]), stream_age_ms=ages, monitor_silent_ms=ages,
    disk_error=st.sampled_from(["", "vda"]), silent_ms=ages, stream_silent_ms=ages,
    peer_qemu=st.sampled_from(["unknown", "running", "gone", "shutdown"]), peer_closed=st.booleans(),
    peer_shutdown_for_ms=ages, peer_claiming=st.booleans(), lan_ok=st.booleans(),
)  # fmt: skip


@settings(max_examples=2000, deadline=None)
@given(views)
def test_what_no_view_may_lead_to(view: View) -> None:
    """The protocol's prohibitions, whatever else is so."""
    verdict = decide(view, SETTINGS)
    assert verdict.reason
    if view.role == "primary":
        assert verdict.act is not Act.CLAIM
        return
    assert verdict.act in (Act.WAIT, Act.CLAIM, Act.ALARM)
    if verdict.act is Act.CLAIM:
        assert view.armed and not view.disk_error and view.own_qemu == "running" and view.peer_qemu != "shutdown"
        died = view.peer_qemu == "gone" and view.peer_closed
        assert died or (view.silent_ms > T and view.lan_ok)
        if not died and view.silent_ms <= 3000:
            assert stream_state(view, SETTINGS) != "alive"


# ---- silence ----


def test_silence_counts_from_the_newest_word_on_any_link() -> None:
    silence = Silence(T, 0.0)
    silence.heard("rep", 100)
    silence.heard("lan", 150)
    silence.tick(160)
    assert silence.silent_ms(200) == 50
    assert silence.silent_ms(200, "rep") == 100
    assert silence.silent_ms(200, "never") == 200, "a link that never spoke is silent since the start"


def test_one_silent_link_is_not_the_loss_of_the_peer() -> None:
    silence = Silence(T, 0.0)
    silence.heard("rep", 0)
    for now in range(0, 5000, 50):
        silence.tick(now)
        silence.heard("lan", now)
    assert silence.silent_ms(5000) <= 50 and silence.silent_ms(5000, "rep") == 5000
    view = replace(HEALTHY, role="standby", silent_ms=silence.silent_ms(5000), stream_silent_ms=5000.0, **OVERDUE)
    assert decide(view, SETTINGS).act is Act.WAIT


def test_own_stall_restarts_the_silence() -> None:
    silence = Silence(T, 0.0)
    silence.heard("rep", 0)
    assert not silence.tick(0)
    assert not silence.tick(T / 3), "exactly T/3 is no stall"
    assert silence.tick(1000)
    assert (silence.stalls, silence.silent_ms(1000), silence.silent_ms(1000, "rep")) == (1, 0, 0)
    assert not silence.tick(1050)
    assert silence.silent_ms(1250) == 250


@given(st.lists(st.tuples(st.floats(0, 400), st.booleans()), max_size=30))
def test_silence_beyond_t_means_that_we_watched_all_that_time(steps: list[tuple[float, bool]]) -> None:
    """Whatever the turns: a silence of d was seen by a watcher that never slept longer than T/3 within it."""
    silence, now, turns, heard = Silence(T, 0.0), 0.0, [0.0], 0.0
    silence.tick(0.0)
    for gap, hears in steps:
        now += gap
        silence.tick(now)
        turns.append(now)
        if hears:
            silence.heard("rep", now)
            heard = now
        began = now - silence.silent_ms(now)
        assert began >= heard - 1e-6
        within = [t for t in turns if t >= began - 1e-6]
        gaps = [b - a for a, b in itertools.pairwise(within)]
        assert all(g <= T / 3 + 1e-6 for g in gaps)
