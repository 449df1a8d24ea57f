"""What the simulation found in mcft, each as the few faults that show it (`docs/correctness.md`, track record)."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from tests.sim import play, wiring
from tests.sim.faults import Fault
from tests.sim.oracle import state_of
from tests.sim.run import one


def holds(*rounds: list[Fault], seeds: Iterable[int] = range(1, 7)) -> None:
    """These faults in worlds of several seeds: no violation in any."""
    for seed in seeds:
        world, found = one(seed, list(rounds))
        play.over(world)
        assert found is None, f"seed {seed}: {found}"


def test_going_solo_while_libvirtd_is_away_leaves_nothing_half_undone() -> None:
    """libvirtd was away just when a primary that had gone solo took its set-up down; nobody tried again, and its disks kept
    mcft's nodes: protecting it anew was refused for ever.

    Fails if `Deciding.adopt_won` does not look at `dismantling`.
    """
    holds([Fault(100.0, "libvirtd away", 0, 900.0), Fault(110.0, "kill QEMU", 1)])


def test_a_take_over_is_cleaned_up_though_libvirtd_was_away() -> None:
    """libvirtd was away while the new primary waited for its overlays' commit: taken for the end of it, nobody came back.

    Fails if `Life.commit_online` returns on any error.
    """
    holds([Fault(100.0, "mcft failover", 0), Fault(200.0, "libvirtd away", 1, 300.0)])
    holds([Fault(100.0, "mcft failover", 0), Fault(140.0, "libvirtd away", 1, 900.0)])


def test_what_an_older_instance_left_at_work_does_not_touch_a_newer_one() -> None:
    """A take-over that could not be cleaned up was still being gone on with after the domain was protected anew, and taken over
    back: it let the hook start the stale disk, while the guest ran on the other host.

    Fails if `Protecting.now` does not wait for `Life.at_rest`, and `Standby.go_on` insists on a gate that is ended.
    """
    holds(
        [Fault(13.59, "libvirtd away", 1, 8000.0), Fault(2388.93, "mcft failover", 1)],
        [Fault(130.07, "virsh suspend and resume", 1, 428.37), Fault(131.76, "mcft failover", 0),
         Fault(267.36, "libvirtd away", 0, 260.95)],
        [Fault(152.51, "virsh suspend and resume", 0, 8000.0), Fault(319.04, "mcft failover", 0)],
        seeds=range(26, 27),
    )  # fmt: skip


def test_a_standby_that_was_shot_does_not_shoot_back() -> None:
    """`fence`: a standby with a claim of its own was switched off, came back without its memory, went on with that claim, and
    switched off the primary that had won.

    Fails if `Standby.adopt` goes on with a claim although its QEMU is gone.
    """
    holds([Fault(100.0, "cut both links", 0, 600.0)], seeds=range(2, 15, 3))


def test_a_verdict_just_before_arming_is_not_forgotten() -> None:
    """The stream died behind the set-up's last look and before arming(g): the gate was closed, and its verdict ignored; the
    domain was "protected", muted, for ever.

    Fails if `Deciding._arm` does not ask its gate for a verdict at the end.
    """
    holds(
        [Fault(0.0, "mcft maintenance", 1)],
        [Fault(157.0, "mcft protect", 0, 931.5, 1), Fault(593.0, "disk fails", 0, 8000.0, 3)],
        seeds=range(120, 124),
    )


def test_a_load_that_failed_under_a_silent_primary_leaves_no_whole_copy() -> None:
    """The standby's disk failed inside a load while the primary's gate stood still: with no keepalive, the end of the stream was
    taken for the primary's death, and a half loaded copy took over.

    Fails if `Standby._stream_is_open` is always False.
    """
    holds([Fault(100.0, "stop the gate", 0, 3000.0), Fault(110.0, "disk fails", 1, 300.0)], seeds=range(4, 7))


def test_a_guest_that_shut_itself_down_is_not_raised() -> None:
    """Its gate stood still meanwhile, and was told by the standby that it claims; the agent then said that QEMU is gone, and no
    word of the shutdown. And `virsh destroy` that crosses a guest's shutdown: the signal's reason came first, and was kept.

    Fails if `_resolve` does not ask the gate why QEMU ended and `Gate._turn` does not read its monitor first; if `Gate._event`
    keeps the first reason.
    """
    holds([Fault(100.0, "stop the gate", 0, 400.0), Fault(130.0, "the guest shuts down", 0)], seeds=range(5, 9, 3))
    holds([Fault(100.0, "virsh destroy", 0), Fault(101.0, "the guest shuts down", 0)], seeds=range(1, 3))


def test_a_protect_that_failed_while_libvirtd_was_away_is_undone_all_the_same() -> None:
    """Its undo failed too, and nobody tried again: the guest stood for ever in the switch-over, or its disks kept mcft's nodes.

    Fails if `Protecting.now` does not call `undo_until_done`.
    """
    holds([Fault(522.9, "libvirtd away", 0, 410.0)], seeds=(3, 13, 27))


def test_a_copy_that_was_never_armed_goes_once_its_primary_went_on_without_it() -> None:
    """Arming failed because the standby's gate stood still, and etcd decided for the primary: the copy stood there for ever, and
    every later protect was refused.

    Fails if `Core.still_wanted` looks at the instance alone.
    """
    holds(
        [Fault(74.7, "cut a link", 0, 8000.0, 2), Fault(405.6, "cut a link", 1, 49.0)],
        [Fault(110.4, "stop the gate", 1, 8000.0, 2), Fault(2216.2, "arbiter slow", 0, 8000.0)],
        seeds=range(20542, 20543),
    )


def test_a_standby_whose_etcd_went_back_says_what_to_type() -> None:
    """etcd was rolled back, then the primary's host lost: nobody can tell who goes on. `taking-over` for ever told nobody.

    Fails if `Standby._undecidable` leaves it in `taking-over`.
    """
    seed = next(seed for seed in range(3) if play.KINDS[seed] == "etcd")
    world = play.make(seed)
    world.run(2500.0)
    play.protect(world.hosts[0])
    play.until_protected(world)
    world.run(world.now + 12_000.0)  # what was seen of etcd is durable within 10 s
    world.etcd.roll_back()
    world.run(world.now + 5000.0)
    world.hosts[0].machine.power_off()
    world.run(world.now + 5000.0)
    state = state_of(world.hosts[1])
    play.over(world)
    assert state == "failed"


def test_a_claim_has_no_more_to_say_once_the_peer_has_decided() -> None:
    """The standby said that it had taken over while the primary's claim waited for an etcd that was away: the claim's wait then
    made `muted` of `lost`, for ever, and every later protect was refused by that host.

    Fails if `Deciding._obey_peer` does not cancel the claim first.
    """
    cut = [Fault(668.56, "cut both links", 0, 352.67, 2)]
    holds([Fault(542.43, "at the next record", 0, 2393.25, 1)], cut, seeds=range(30505, 30506))


def test_a_guest_that_shut_itself_down_while_its_gate_was_killed_is_not_raised() -> None:
    """The new gate found QEMU gone and said that it had died; only libvirt had heard the guest's word.

    Fails if `Deciding._after` does not ask `LibvirtsWord`.
    """
    both = [Fault(843.85, "the guest shuts down", 0, 356.47), Fault(843.88, "kill the gate", 0, 8000.0)]
    holds(both, seeds=range(40327, 40328))


def test_a_switch_whose_qemu_hangs_in_a_dead_stream_ends_in_a_decision() -> None:
    """The standby's QEMU was killed in the midst of a planned switch: the other QEMU answered no `stop`, and its gate, which
    decides nothing while it switches, decided nothing for ever.

    Fails if `Gate.decide` waits beyond the switch's deadline.
    """
    holds(
        [Fault(58.61, "at the next record", 0, 323.35, 3)],
        [Fault(143.54, "mcft maintenance", 0, 489.62, 1), Fault(145.33, "between acknowledgement and release", 1, 19.54, 1),
         Fault(505.3, "kill QEMU", 1, 42.49, 3)],
        seeds=range(40268, 40269),
    )  # fmt: skip


def test_unprotect_waits_for_a_going_solo_that_is_under_way() -> None:
    """The standby had given up, and the gate was killed just then: `unprotect` took away what the going solo still needed.

    Fails if `Primary.unprotect` does not wait for `at_rest`.
    """
    holds(
        [Fault(576.67, "kill QEMU", 1, 386.02, 1)],
        [Fault(2552.51, "at the next record", 1, 331.58, 3), Fault(4257.39, "cut a link", 0, 708.75, 2),
         Fault(4656.7, "mcft unprotect", 0, 357.11, 3)],
        seeds=range(50212, 50213),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["kill the gate", "kill the agent", "kill QEMU", "power", "freeze the host", "cut a link"])
@pytest.mark.parametrize("host", [0, 1])
def test_one_fault_is_survived(kind: str, host: int) -> None:
    """Any single one of these: mended, the guest talks and is protected again.

    Fails if a decision is not gone on with from its records (`Life.carry_through`).
    """
    holds([Fault(50.0, kind, host, 400.0)], seeds=range(1, 3))


def test_a_copy_that_broke_under_a_claim_that_nobody_could_decide_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy was not whole while its claim waited for a slow etcd, which was wiped: "can't tell" came, and the record of the
    copy's state never. Its primary, back from a loss of power, waited for ever for a take-over that could not come.
    (The kernel's word is forced here: a stream that ends by its host's loss is no longer open by the time QEMU says so.)

    Fails if `Standby._win` does not write that record once its claim is over.
    """
    monkeypatch.setattr(wiring.SimSockbreak, "is_open", staticmethod(lambda _port: True))
    faults = [
        Fault(158.86, "arbiter wiped", 1), Fault(162.05, "cut one way", 1, 187.0, 3), Fault(635.27, "arbiter slow", 1, 8000.0, 3),
        Fault(692.26, "power", 0, 295.0, 1),
    ]  # fmt: skip
    holds(faults, seeds=range(91120, 91121))


def test_a_guest_that_shut_down_under_a_killed_gate_is_not_raised_by_the_new_gates_word() -> None:
    """The new gate told the standby "gone" before its agent had told it that libvirt heard the guest shut down.

    Fails if `OwnQemu.watch` says so at once.
    """
    holds([Fault(1000.0, "kill the gate", 0, 463.0, 3), Fault(1001.1, "the guest shuts down", 0, 8000.0, 3)], seeds=range(1, 20))


def test_a_guest_that_shuts_down_while_arming_waits_for_etcd_stays_stopped() -> None:
    """Both had recorded its end; then the arming that still waited failed, and made `muted` of `stopped`: no `mcft start`.

    Fails if `Deciding._arming_failed` decides though the records say that it is decided.
    """
    holds([Fault(180.0, "arbiter slow", 1, 8000.0, 2), Fault(620.0, "the guest shuts down", 0)], seeds=range(7, 20, 6))


def test_a_standby_that_gave_up_settles_what_etcd_can_not() -> None:
    """The standby's host died, etcd got the claim and was restored before it answered: it can't tell, for ever. That
    host came back and gave up, and the primary stayed muted all the same.

    Fails if a claim that etcd does not resolve counts for more than given-up(g).
    """
    holds(
        [Fault(299.0, "arbiter slow", 0, 3000.0, 3), Fault(300.0, "power", 1, 30.0), Fault(1200.0, "arbiter rolled back")],
        seeds=range(1, 11, 3),
    )  # fmt: skip


def test_a_win_that_was_given_back_is_taken_up_after_a_power_loss_too() -> None:
    """The copy that had taken over died before it ran, and the win was given back; the old primary had that on its disk when its
    power went: it came back as `lost`, like the other, and nobody could start the guest.

    Fails if `Primary.adopt` looks at its newest record of g alone.
    """
    holds(
        [Fault(100.0, "kill QEMU", 0), Fault(160.0, "at the next record", 0, 346.0, 2), Fault(162.0, "kill QEMU", 1)],
        seeds=range(6, 18, 6),
    )  # fmt: skip


def test_a_standby_that_gives_up_does_not_claim_any_more() -> None:
    """A standby that had stood still claimed, and was asked to give up before that claim was durable: it did, and etcd decided
    for it all the same. Neither host had the guest.

    Fails if giving up and claiming do not exclude each other (`Standby._letting_go`).
    """
    holds(
        [Fault(460.0, "freeze the host", 1, 8000.0), Fault(630.0, "cut both links", 0, 499.0, 2),
         Fault(1626.0, "virsh destroy", 0)],
        seeds=range(22, 23),
    )  # fmt: skip


def test_an_arming_that_was_written_all_the_same_is_settled_by_a_discarded_copy() -> None:
    """The store said EIO for arming(g), the set-up was undone; the record was on the disk. The standby had discarded its copy
    and knew of nothing that it could give up; and going solo waited for a gate that the undo had ended. Muted, for ever.

    Fails if `PeerVerbs._give_up` has no answer for an instance that is only in the records, or `go_solo` and `adopt_won` insist
    on a gate that is not there.
    """
    for seed, fails_ms, then, host in ((21, 448.45, "power", 1), (31, 311.05, "kill the agent", 1), (51, 519.17, "power", 0)):
        planned = [
            Fault(0.0, "mcft unprotect", 0), Fault(100.0, "mcft protect", 0, 0.0, 3),
            Fault(fails_ms, "records fail", 0, 1500.0), Fault(fails_ms + 1500.0, then, host, 2000.0),
        ]  # fmt: skip
        holds(planned, seeds=[seed])


def test_a_copy_that_can_not_take_over_goes_once_its_primary_went_on() -> None:
    """The standby's store failed and its gate stood still while `unprotect` won at etcd, ended the protection and took its key
    away. Nobody told the standby: its copy was not whole, the key was missing, and it refused every later `protect`.

    Fails if `Core.still_wanted` asks for unarmed copies alone.
    """
    planned = [
        Fault(940.02, "records fail", 1, 12.38, 1), Fault(940.16, "mcft unprotect", 0, 708.39),
        Fault(994.36, "stop the gate", 1, 8000.0, 3),
    ]  # fmt: skip
    holds(planned, seeds=(1, 28, 190234))


def test_a_guest_that_was_shut_down_and_taken_over_all_the_same_can_be_started() -> None:
    """Both links were cut as it was destroyed, so the standby took over; its copy was destroyed before it ran, and the win was
    given back. The old primary called itself `lost` for good: nobody could start the guest.

    Fails if `_ended` gives way before the other side has spoken.
    """
    destroyed = [
        Fault(71.34, "cut a link", 1, 328.39), Fault(83.98, "virsh destroy", 0, 8000.0, 1),
        Fault(86.51, "cut a link", 0, 996.67, 1), Fault(388.85, "virsh destroy", 1, 8000.0, 2),
    ]  # fmt: skip
    holds(destroyed, seeds=(6, 18, 25))


def test_a_copy_that_libvirt_started_though_it_went_away_is_ended() -> None:
    """libvirtd went away as it started the copy, so that failed, and its undo too; nobody tried again, and every later `protect`
    was refused: "runs there".

    Fails if `PeerVerbs._prepare_once` forgets a copy whose undo is not complete.
    """
    for at_ms in range(80, 99):
        holds([Fault(float(at_ms), "libvirtd away", 1, 385.0)], seeds=(7, 21))
