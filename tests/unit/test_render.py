"""What people see: each state in 80 columns with its next step; muted unmistakable; plain progress."""

from __future__ import annotations

import io
from typing import get_args

import click
import pytest
from fake_agent import PROTECTED, changed, job, status
from hypothesis import given
from hypothesis import strategies as st

from mcft import api, render

WORDS = st.lists(st.text("abc-.'", min_size=1, max_size=30), min_size=1, max_size=12).map(" ".join)


def plain(text: str) -> str:
    return click.unstyle(text)


PROTECTED_TEXT = """
vm1  PROTECTED  primary here on host1, standby on host2
  engine       colo, periodic, delay 100ms, generation 3, arbiter standby
  since        2026-01-01T00:00:00Z
  checkpoints  9.8/s, last ack 43 ms ago, pause 4.1 ms (p99 9.9 ms), 1234 so far
  network      flowing, plug (vnet0 in mcft-vnet0), 3 packets (412 B) held,
               holds 61 ms (p99 110 ms)
  disks        vda replicating
  keepalives   udp 10.99.0.2 21 ms ago
  last event   2026-01-01T00:00:01Z protected in generation 3
  next         nothing; mcft failover vm1 switches to the other host
  note         if host2 dies, vm1 is unreachable until `mcft solo vm1`
"""


def test_a_protected_domain_reads_like_this() -> None:
    assert plain(render.status_text(status(PROTECTED))) == PROTECTED_TEXT.strip()


@pytest.mark.parametrize("state", get_args(api.State))
@pytest.mark.parametrize("role", get_args(api.Role))
def test_every_state_says_what_to_type(state: str, role: str) -> None:
    text = plain(render.protection_text("host1", changed(state=state, role=role)))
    assert state.upper() in text
    assert "  next " in text
    assert "{" not in text
    assert max(map(len, text.splitlines())) <= render.WIDTH


@given(
    domain=st.text("abcdefgh-", min_size=1, max_size=40),
    state=st.sampled_from(get_args(api.State)),
    reason=st.none() | WORDS,
    unsafe=st.lists(WORDS, max_size=3),
    next_step=st.none() | WORDS,
    keepalive=st.lists(
        st.builds(api.LinkStatus, st.just("udp"), st.just("10.99.0.2"), st.none() | st.floats(0, 1e9)),
        max_size=4,
    ),
    engine=st.sampled_from(["colo", "mc"]),
    delay_ms=st.integers(10, 10_000),
)
def test_a_block_fits_eighty_columns(**fields: object) -> None:
    text = plain(render.protection_text("host1", changed(**fields)))
    assert max(map(len, text.splitlines())) <= render.WIDTH


def test_the_agents_next_step_goes_before_the_states() -> None:
    text = plain(render.protection_text("host1", changed(state="failed", next_step="free the disk")))
    assert "free the disk" in text
    assert "mcft events" not in text


def test_muted_cannot_be_overlooked() -> None:
    text = render.protection_text(
        "host1", changed(state="muted", output_flowing=False, reason="no word from host2")
    )
    assert "!! MUTED: no packet of vm1 leaves" in plain(text)
    assert "NOT flowing" in plain(text)
    assert "no word from host2" in plain(text)
    assert click.style("MUTED", fg="red", bold=True) in text
    assert "MUTED" not in render.protection_text("host1", PROTECTED)


def test_a_muted_standby_is_told_of_failover_not_solo() -> None:
    text = plain(render.protection_text("host2", changed(state="muted", role="standby", peer="host1")))
    assert "if host1 is gone for good: mcft failover vm1" in text
    assert "NOT flowing" not in text


def test_unsafe_is_shown() -> None:
    text = plain(render.protection_text("host1", changed(unsafe=["nothing holds the packets"])))
    assert "UNSAFE       nothing holds the packets" in text


def test_an_arbiter_that_cannot_decide_is_a_line_of_check() -> None:
    """Fails if a dead arbiter shows nowhere until a host is lost."""
    away = api.ArbiterStatus("etcd", False, 6000.0, "no answer in time")
    there = api.ArbiterStatus("etcd", True, 300.0, None, False)
    for arbiter, word in ((away, "can't decide: no answer in time"), (there, "can't decide for host2")):
        p = changed(arbiter=arbiter, survives_host_loss=False)
        assert word in render.check_lines(api.Status("host1", [p]))[0]
        assert "CAN'T DECIDE" in " ".join(render.protection_text("host1", p).split())
    fine = changed(arbiter=api.ArbiterStatus("etcd", True, 300.0, None, True))
    assert "arbiter etcd (300 ms ago)" in " ".join(render.protection_text("host1", fine).split())


def test_without_an_arbiter_the_hint_names_the_standbys_host() -> None:
    assert "if host2 dies, vm1 is unreachable until `mcft solo vm1`" in render.standby_arbiter_hint(
        "host1", PROTECTED
    )
    assert "if host1 dies" in render.standby_arbiter_hint("host1", changed(role="standby"))
    assert not render.standby_arbiter_hint("host1", changed(arbiter=api.ArbiterStatus("etcd")))
    assert not render.standby_arbiter_hint("host1", changed(state="solo"))


def test_nothing_protected_says_how_to_begin() -> None:
    assert "mcft protect" in render.status_text(status())


def test_check_has_a_line_for_each_that_would_not_survive() -> None:
    exposed = changed(domain="vm2", state="muted", survives_host_loss=False, reason="no standby")
    assert render.check_lines(status(PROTECTED)) == []
    assert render.check_lines(status(PROTECTED, exposed)) == [
        "vm2: does not survive the loss of a host: muted, no standby"
    ]
    assert "1 protected" in render.check_summary(status(PROTECTED))
    assert "nothing" in render.check_summary(status())


def test_events_in_one_line_each_with_their_alarm() -> None:
    event = api.EventBody(1, "2026-01-01T00:00:00Z", "vm1", "lan-lost", "its LAN is silent", "alarm")
    assert plain(render.event_line(event)) == "2026-01-01T00:00:00Z  vm1  lan-lost  ALARM: its LAN is silent"


def test_peers_are_a_table() -> None:
    peers = api.Peers("host1", [
        api.PeerBody("host2", ["10.99.0.2", "192.0.2.2"], True, "0.1.0"),
        api.PeerBody("h3", ["192.0.2.3"], False, "", "connection refused"),
    ])  # fmt: skip
    assert render.peers_text(peers).splitlines() == [
        "PEER   AGENT    MCFT   ADDRESSES",
        "host2  answers  0.1.0  10.99.0.2, 192.0.2.2",
        "h3     SILENT   -      192.0.2.3 (connection refused)",
    ]
    assert "no peer" in render.peers_text(api.Peers("host1"))


@pytest.mark.parametrize("known", [None, ("host2", changed(role="standby", peer="host1", state="muted"))])
def test_the_stake_of_an_override_is_named(known: tuple[str, api.Protection] | None) -> None:
    text = render.stake("failover", "vm1", True, True, known)
    assert "powered off" in text
    assert "two of it" in text.replace("\n", " ")
    assert max(map(len, text.splitlines())) <= render.WIDTH
    if known:
        assert "vm1 is muted on host2" in text
        assert "what came later is lost" in text.replace("\n", " ")


def test_progress_without_a_terminal_is_a_line_per_step_or_tenth() -> None:
    out = io.StringIO()
    with render.progress("protect vm1", out) as show:
        for step, done in (
            ("copy disks", 0.0),
            ("copy disks", 0.05),
            ("copy disks", 0.31),
            ("arm", None),
            ("arm", None),
        ):
            show(job(step=step, progress=done))
        show(job("done"))
    assert out.getvalue().splitlines() == [
        "protect vm1: copy disks 0%",
        "protect vm1: copy disks 31%",
        "protect vm1: arm",
    ]


def test_progress_on_a_terminal_is_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with render.progress("protect vm1", out) as show:
        show(job(step="copy [vda]", progress=0.5))
        show(job(step="copy [vda]"))
    assert "copy [vda]" in out.getvalue()


def test_maintenance_is_said_first() -> None:
    text = render.status_text(api.Status("host1", maintenance=True))
    assert "MAINTENANCE" in text and "mcft maintenance off" in text
