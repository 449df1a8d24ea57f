"""Which QEMU engine `colo` refuses, and with which words: the lab has one QEMU only, so a fake one answers here."""

from __future__ import annotations

from typing import Any, cast

import pytest

from mcft.engines import tcg
from mcft.engines.colo import Colo
from mcft.errors import Failed
from mcft.qmp_passthrough import Qmp


class FakeQmp:
    """Answers what `unsupported` asks, as a QEMU of that version would."""

    def __init__(
        self, major: int, minor: int, *, colo: bool = True, monitor: bool = True, tcg_only: bool = True, arch: str = "x86_64",
    ) -> None:  # fmt: skip
        capabilities = ["events", "return-path", *(["x-colo"] if colo else [])]
        self.answers: dict[str, Any] = {
            "query-version": {"qemu": {"major": major, "minor": minor, "micro": 0}},
            "query-migrate-capabilities": [{"capability": name, "state": False} for name in capabilities],
            "query-kvm": {"enabled": not tcg_only, "present": True},
            "query-target": {"arch": arch},
            "qom-list-types": [{"name": "monitor-qmp"}] if monitor else [],
        }

    async def execute(self, command: str, **_arguments: Any) -> Any:
        return self.answers[command]


@pytest.mark.parametrize(
    ("qemu", "words"),
    [
        (FakeQmp(11, 1, colo=False), ("11.1", "x-colo", "without COLO")),
        (FakeQmp(7, 2), ("7.2", "deadlocks", "11.1 or newer")),
        (FakeQmp(10, 0), ("10.0", "ends as", "11.1 or newer")),
        (FakeQmp(11, 0), ("11.0", "11.1 or newer")),
        (FakeQmp(8, 1), ("8.1", "11.1 or newer")),
        (FakeQmp(11, 1, monitor=False), ("11.1", "monitor")),
        (FakeQmp(11, 1, arch="aarch64"), ("without KVM", "x86")),
    ],
    ids=["no-colo", "7.2", "10.0", "11.0", "8.1", "no-monitor", "tcg-on-arm"],
)
async def test_refused_by_name_and_with_the_reason(qemu: FakeQmp, words: tuple[str, ...]) -> None:
    """Fails if such a QEMU is taken, or if the sentence does not say which it is and why."""
    said = await Colo().unsupported(cast(Qmp, qemu))
    for word in words:
        assert word in said


@pytest.mark.parametrize("version", [(11, 1), (11, 2), (12, 0)])
async def test_taken(version: tuple[int, int]) -> None:
    assert await Colo().unsupported(cast(Qmp, FakeQmp(*version))) == ""


class Machine:
    """A FAKE of a TCG machine's two PCI ports and of the human monitor's `i` and `o`."""

    def __init__(self, latched: int = 0x80000008, command: int = 0x507, fails_at: int = 0) -> None:
        self.latched, self.command, self.fails_at = latched, command, fails_at
        self.hidden = 0  # how often the function was hidden: each is a flush
        self.lines: list[str] = []

    async def execute(self, command: str, **arguments: Any) -> Any:
        if command == "query-pci":
            nothing = {"class_info": {"desc": "Host bridge"}, "slot": 0, "function": 0, "regions": []}
            bridge = {"class_info": {}, "slot": 1, "function": 0, "regions": [{"address": 4096}], "pci_bridge": {}}
            off = {"class_info": {}, "slot": 2, "function": 0, "regions": [{"address": -1}]}
            sata = {"class_info": {}, "slot": 31, "function": 2, "regions": [{"address": 8192}]}
            return [{"bus": 0, "devices": [nothing, bridge, off, sata]}]
        assert command == "human-monitor-command"
        line = arguments["command_line"]
        self.lines.append(line)
        if len(self.lines) == self.fails_at:
            return "unknown command"
        verb, size, port, *value = line.split()
        assert (size, port) in (("/w", "0xcf8"), ("/h", "0xcfc"))
        if verb == "i":
            return f"port[{port}] = {self.latched if port == '0xcf8' else self.command:#x}\r\n"
        if port == "0xcf8":
            self.latched = int(value[0], 16)
        else:
            assert self.latched == 1 << 31 | 31 << 11 | 2 << 8 | 4
            self.hidden += not int(value[0], 16) & 3
            self.command = int(value[0], 16)
        return ""


async def test_tlbs_are_flushed_and_the_guest_sees_nothing() -> None:
    machine = Machine()
    function = await tcg.function_to_hide(machine)
    assert function == tcg.Function(31, 2), "a plain function that is mapped: hiding a bridge would hide all behind it"
    await tcg.flush_tlbs(machine, function)
    assert (machine.hidden, machine.latched, machine.command) == (1, 0x80000008, 0x507)


@pytest.mark.parametrize("step", range(1, 7))
async def test_a_failed_flush_leaves_the_registers_and_says_so(step: int) -> None:
    machine = Machine(fails_at=step)
    with pytest.raises(Failed):
        await tcg.flush_tlbs(machine, tcg.Function(31, 2))
    if step not in (5, 6):  # there the line that puts them back is the one that failed
        assert (machine.latched, machine.command) == (0x80000008, 0x507)


async def test_a_hidden_function_is_no_flush() -> None:
    machine = Machine(command=0x500)
    with pytest.raises(Failed, match="try again"):
        await tcg.flush_tlbs(machine, tcg.Function(31, 2))
    assert machine.latched == 0x80000008
