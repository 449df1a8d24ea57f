"""What the primary's agent does with a verdict of its gate, by itself: without libvirt, a store or a peer."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from mcft.agent import model
from mcft.agent.copy import Copy
from mcft.agent.core import Core
from mcft.agent.decisions import Deciding
from mcft.agent.ends import DESTROYED, LibvirtsWord
from mcft.agent.outcomes import alone
from mcft.agent.protection import Primary
from mcft.errors import Failed
from mcft.failover import BUFFER_BROKEN
from mcft.generations import Kind, Ledger, Side

FAILED = 5  # VIR_DOMAIN_EVENT_STOPPED_FAILED


class Decided(Deciding):
    """Remembers what it said and how it went on."""

    def __init__(self) -> None:  # the real one wants a whole site
        self.body: Any = SimpleNamespace(domain="vm1", peer="host2", manual="", quick_return=False)
        self.said: list[tuple[str, str, str]] = []
        self.resolved: list[str] = []

    def event(self, kind: str, text: str, level: Any = "info") -> None:
        self.said.append((kind, text, level))

    async def _resolve(self, reason: str) -> None:
        self.resolved.append(reason)


@pytest.mark.parametrize("what", ["a qdisc of mcft-vnet0 was deleted", "mcft-vnet0 was set down"])
def test_a_buffer_that_somebody_changed_is_told_and_not_protected_again_by_itself(what: str) -> None:
    """Fails if `_note_buffer` is not called, leaves `manual` empty (it would be protected again at once, and changed again),
    or does not say what was changed and what to type."""
    life, reason = Decided(), f"{BUFFER_BROKEN}: {what}"
    asyncio.run(life._after({"act": "break", "reason": reason}))
    assert life.resolved == [reason] and life.body.manual == reason
    (alarm,) = [text for kind, text, level in life.said if (kind, level) == ("buffer", "alarm")]
    assert what in alarm and "mcft protect vm1 --to host2" in alarm
    assert alone(reason) == "failed" and alone("the stream is dead: COLO_EXIT") == "solo"


def test_any_other_broken_stream_is_protected_again_by_itself() -> None:
    """Fails if every verdict counts as somebody's doing."""
    life = Decided()
    asyncio.run(life._after({"act": "break", "reason": "the stream is dead: COLO_EXIT"}))
    assert life.body.manual == "" and life.body.quick_return and [kind for kind, _, _ in life.said] == ["verdict"]


class Dying(Decided):
    """Its QEMU lives for some looks more."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks, self.asked = looks, []
        self.libvirts_word = LibvirtsWord()
        self.gate: Any = SimpleNamespace(insist=self._insist)

    asked: list[str]

    async def _insist(self, do: str, **_: Any) -> None:
        self.asked.append(do)

    async def record(self, kind: Kind, g: int | None = None, detail: str = "") -> None:
        self.asked.append(kind.value)

    def qemu_alive(self) -> bool:
        self.looks -= 1
        return self.looks > 0

    async def _ended(self, why: str) -> None:
        self.asked.append(f"ended: {why}")

    async def _resolve(self, reason: str) -> None:
        self.asked.append(f"asks the standby, {'alive' if self.looks > 0 else 'dead'}")


def test_a_primary_that_killed_its_hung_qemu_waits_for_its_death_before_it_asks_the_standby() -> None:
    """Asked a few ms too early, the standby would hear that the primary's QEMU runs, and give up: nobody would have the guest.

    Fails if `Deciding._after` does not wait for `_until_dead`.
    """
    life = Dying(4)
    life.libvirts_word.heard("stopped", FAILED)
    asyncio.run(life._after({"act": "hung", "reason": "no answer of QEMU's monitor"}))
    assert life.asked == ["died", "kill", "asks the standby, dead"]


def test_a_guest_that_was_destroyed_while_its_qemu_hung_is_not_raised() -> None:
    """Seen once, by engine mc's stand-in: `virsh destroy` waits 10 s for a QEMU that does not obey SIGTERM, as long as the gate.

    Fails if libvirt's word is not asked for after the kill.
    """
    life = Dying(4)
    life.libvirts_word.heard("stopped", DESTROYED)
    asyncio.run(life._after({"act": "hung", "reason": "no answer of QEMU's monitor"}))
    assert life.asked == ["died", "kill", "ended: the guest was destroyed while its QEMU hung"]


class Resolving(Deciding):
    """A primary whose QEMU is gone, and a gate that says why; the standby gives up, or takes over, as it is told."""

    def __init__(self, status: dict[str, Any], tmp: Any) -> None:
        self.body: Any = SimpleNamespace(domain="vm1", uuid="u", peer="host2", pid="p", g=3, state="protected", engine="colo")
        self.ledger = Ledger("p", "primary", 3)
        for kind in (Kind.PREPARING, Kind.ARMING, Kind.PROTECTED):
            self.ledger.append(kind)
        (tmp / "state").write_text("")
        self.status, self.asked, self.libvirts_word = status, [], LibvirtsWord()
        self.gate: Any = SimpleNamespace(state_path=str(tmp / "state"), adopt=self._nothing, ask=self._status)
        self.arbiter: Any = SimpleNamespace(pending=False, may_claim=lambda: "standby: the primary never claims")
        self.site: Any = SimpleNamespace(ask=self._ask)

    asked: list[str]

    def qemu_alive(self) -> bool:
        return False

    async def _nothing(self, _timeout_s: float) -> None: ...

    async def _status(self, _do: str, _timeout_s: float) -> dict[str, Any]:
        return self.status

    async def record(self, kind: Kind, g: int | None = None, detail: str = "") -> None:
        self.ledger.append(kind)

    async def _ask(self, _peer: str, verb: str, about: model.About, _reply: Any, _timeout_s: float) -> model.Records:
        self.asked.append(f"{verb}, {'runs' if about.qemu_runs else 'gone'}")
        return model.Records("host2", "u", 3, "p", 3, "standby", "", [("standby", 3, "armed"), ("standby", 3, "taken")])

    async def _lose(self, known: model.Records | None) -> None:
        self.asked.append("lost")

    async def _ended(self, why: str) -> None:
        self.asked.append(f"ended: {why}")


@pytest.mark.parametrize(("own", "reason", "asked"), [
    ("shutdown", "guest-shutdown", ["ended: the guest was shut down"]),
    ("shutdown", "host-signal", ["give-up, gone", "lost"]),
    ("gone", "", ["give-up, gone", "lost"]),
])  # fmt: skip
def test_a_qemu_that_ended_while_something_else_was_decided_is_asked_why(
    own: str, reason: str, asked: list[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest shut itself down while its gate stood still: the verdict is "the standby claims", and the end is intended.

    Fails if `_resolve` does not look (seed 20162: the standby raised a machine that its user had shut down).
    """
    life = Resolving({"own_qemu": own, "shutdown": reason}, tmp_path)
    life.libvirts_word.heard("stopped", 5)  # VIR_DOMAIN_EVENT_STOPPED_FAILED: not `destroyed`
    asyncio.run(life._resolve("the standby claims the generation"))
    assert life.asked == asked
    assert life.ledger.newest is (Kind.PROTECTED if reason.startswith("guest-") else Kind.DIED)


def test_a_guest_that_shut_itself_down_while_its_gate_was_gone_is_not_raised(tmp_path: Any) -> None:
    """The new gate finds QEMU gone, and says that it died; libvirt has heard the guest's word.

    Fails if `_after` does not look (seed 40327: the standby raised a machine that its user had shut down).
    """
    life = Resolving({"own_qemu": "gone", "shutdown": ""}, tmp_path)
    life.event = lambda *_words: None  # type: ignore[method-assign, assignment]
    life.libvirts_word.heard("shutdown", 1)  # VIR_DOMAIN_EVENT_SHUTDOWN_GUEST
    asyncio.run(life._after({"act": "died", "reason": "QEMU is gone without a shutdown of the guest"}))
    assert life.asked == ["ended: the guest was shut down"]


def asking_core(life: Any, ask: Any) -> Any:
    """A core of one protection, whose peer answers by `ask`."""
    core: Any = Core.__new__(Core)
    core.lives, core.site = {"u": life}, SimpleNamespace(ask=ask)
    return core


@pytest.mark.parametrize(("spoken", "state", "goes"), [
    (True, "failed", True), (False, "failed", False), (True, "protected", False)
])  # fmt: skip
def test_an_armed_copy_goes_only_if_it_can_not_take_over_and_its_primary_has_spoken(spoken: bool, state: str, goes: bool) -> None:
    """Fails if a copy that could still take over is given away, or by less than the primary's own solo(g) and spoken(g+1)."""

    async def main() -> bool:
        gone: list[str] = []

        async def ask(*_: Any) -> model.Records:
            rows: list[tuple[Side, int, str]] = [("primary", 3, kind) for kind in ("preparing", "arming", "protected", "solo")]
            return model.Records("host1", "u", 0, "p", 3, "primary", "unprotected", rows + [("primary", 4, "spoken")] * spoken)

        async def left_behind() -> None:
            gone.append("lost")

        body = SimpleNamespace(uuid="u", pid="p", g=3, domain="vm1", peer="host1", state=state)
        life: Any = SimpleNamespace(body=body, ledger=Ledger("p", "standby", 3), left_behind=left_behind)
        life.ledger.append(Kind.PREPARING)
        life.ledger.append(Kind.ARMED)
        return await asking_core(life, ask)._left_behind(life) and gone == ["lost"]

    assert asyncio.run(main()) is goes


@pytest.mark.parametrize(("kinds", "discarded"), [
    ((Kind.PREPARING, Kind.ARMING), False), ((Kind.PREPARING, Kind.ARMING, Kind.SOLO), True), ((Kind.PREPARING, Kind.ENDED), True)
])  # fmt: skip
def test_an_unarmed_copy_whose_primary_went_on_without_it_is_discarded(kinds: tuple[Kind, ...], discarded: bool) -> None:
    """Arming failed while the standby's gate stood still, and the arbiter decided for the primary: nobody asked the copy.

    Fails if `still_wanted` looks at the instance alone (seed 20542: a paused copy blocked every later protect).
    """

    async def main() -> list[str]:
        done: list[str] = []

        async def discard() -> None:
            done.append("discarded")

        async def ask(*_: Any) -> model.Records:
            if len(done) == 2:
                core.lives.clear()  # the end of this test's patience
            done.append("asked")
            rows: list[tuple[Side, int, str]] = [("primary", 3, kind.value) for kind in kinds]
            return model.Records("host1", "u", 3, "p", 3, "primary", "solo", rows)

        body = SimpleNamespace(uuid="u", pid="p", g=3, domain="vm1", peer="host1")
        life: Any = SimpleNamespace(body=body, ledger=Ledger("p", "standby", 3), discard=discard)
        life.ledger.append(Kind.PREPARING)
        core: Any = asking_core(life, ask)
        core.gone = lambda _life: done.append("gone")
        await core.still_wanted(life)
        return done

    assert asyncio.run(main()) == (["asked", "discarded", "gone"] if discarded else ["asked"] * 3)


class Undoing(Primary):
    """An undo that finds libvirtd away twice."""

    def __init__(self) -> None:
        self.body: Any = SimpleNamespace(domain="vm1")
        self.states: list[str] = []
        self.tries = 0
        self.site: Any = SimpleNamespace(spawn=lambda work, _name: asyncio.create_task(work))

    def to_state(self, state: Any, reason: str = "") -> None:
        self.states.append(f"{state}: {reason}")

    async def _undo_set_up(self) -> None:
        self.tries += 1
        if self.tries < 3:
            raise Failed("libvirt", "the daemon is away")


def test_an_undo_that_found_libvirtd_away_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if it is given up: the guest stood for ever, or kept mcft's nodes (seeds 21187 and 20821)."""
    monkeypatch.setattr("mcft.agent.life.UNDO_AGAIN_S", 0.001)

    async def main() -> Undoing:
        life = Undoing()
        life.undo_until_done("what remains: put quorum over the disks")
        assert life.deciding is not None
        await asyncio.wait_for(life.deciding, 5.0)
        return life

    life = asyncio.run(main())
    assert life.tries == 3 and "what remains" in life.states[0]


class CutOff(Primary):
    """solo(3) is on disk; the agent died there. What it does then, in order."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.body: Any = SimpleNamespace(state="muted", reason="the standby is off", dismantling=False, g=3)
        self.ledger = Ledger("p", "primary", 3)
        for kind in (Kind.PREPARING, Kind.ARMING, Kind.PROTECTED, Kind.SOLO):
            self.ledger.append(kind)
        self.gate: Any = SimpleNamespace(stands=lambda: True, adopt=self._note("adopt"), insist=self._insist)
        for name in ("_leave", "free", "dismantle_all", "look"):
            setattr(self, name, self._note(name))

    def _note(self, name: str) -> Any:
        async def work() -> None:
            self.did.append(name)

        return work

    async def _insist(self, do: str, **fields: Any) -> None:
        self.did.append(f"{do} {' '.join(fields.values())}")

    async def record(self, kind: Kind, g: int | None = None, detail: str = "") -> None:
        self.ledger.append(kind, g if g is not None else self.ledger.g)
        self.did.append(kind.value)

    def qemu_alive(self) -> bool:
        return True

    def to_state(self, state: Any, reason: str = "") -> None:
        self.did.append(state)


def test_a_going_solo_that_was_cut_off_lets_out_first() -> None:
    """Fails if it opens last, behind what has to be undone: that may take minutes, and libvirtd."""
    life = CutOff()
    asyncio.run(life.adopt_won())
    assert life.did == ["adopt", "_leave", "spoken", "update solo", "open solo", "solo", "free", "dismantle_all", "look"]


class Left(Copy):
    """A copy that a dead agent left behind, with these records."""

    def __init__(self, *kinds: tuple[int, Kind]) -> None:
        self.body: Any = SimpleNamespace(uuid="u", domain="vm1", qemu_pid=77)
        self.ledger = Ledger("p", "standby", 3)
        for g, kind in kinds:
            self.ledger.append(kind, g)
        self.killed: list[str] = []
        self.site: Any = SimpleNamespace(host=SimpleNamespace(find=self._find))

    async def _find(self, _uuid: str) -> None: ...

    def kill_qemu(self) -> None:
        self.killed.append("kill -9")


def test_a_copy_whose_win_was_given_back_is_ended_also_by_the_next_agent() -> None:
    """Fails if `_destroy` counts every `taken` as a guest that may run: the paused copy stayed for ever, and every later
    `protect` was refused ("busy-there"; seed 80151, the agent killed behind `resigned`)."""
    armed = [(3, Kind.PREPARING), (3, Kind.ARMED), (3, Kind.TAKEN)]
    given_back, taken = Left(*armed, (4, Kind.RESIGNED)), Left(*armed)
    asyncio.run(given_back._destroy())
    asyncio.run(taken._destroy())
    assert given_back.killed == ["kill -9"] and taken.killed == []
