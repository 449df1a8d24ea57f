"""What checkpoints need from a QEMU without KVM (`<domain type='qemu'>`), whose translator TCG keeps books of its own.

Two books, both wrong for COLO, as found in QEMU 11.1 (`include/system/ram_addr.h`, `accel/tcg/cputlb.c`, `accel/tcg/tcg-all.c`):

* **Written pages.** The soft TLB marks a page as already known to be dirty. When QEMU fetches its dirty log it resets those
  marks only if a page was found that was not waiting to be sent anyway. At the end of the first pass it fetches twice with
  nothing sent in between; the second time every page waits already, no mark is reset, and what the guest writes before
  the first checkpoint is logged nowhere: the copy lacks it (6 of 10 standby guests crashed). An ordinary migration does
  not notice, as its source never runs again. Any change of the memory map flushes every vCPU's TLB, and the marks with it.
* **Translations.** A checkpoint that is loaded writes the guest's memory behind TCG's back. Only a run state that COLO does not
  use flushes what was translated from the memory before. The standby, which runs for a moment after each load, therefore
  translates for `one-insn-per-tb`; turned off at the take-over, it finds none of those translations (they are kept by flags).

With KVM neither exists; nothing here is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mcft.errors import Failed
from mcft.qmp_passthrough import Executor

CONFIG_ADDRESS, CONFIG_DATA = 0xCF8, 0xCFC  # PCI Local Bus 3.0, 3.2.2.3.2, "configuration mechanism"
COMMAND_REGISTER, DECODES = 0x04, 0b11  # memory and I/O decoding of a function
UNMAPPED = (-1, 2**64 - 1, 2**32 - 1)
FOLLOW = "one-insn-per-tb on"
LEAD = "one-insn-per-tb off"


@dataclass(frozen=True)
class Function:
    """A PCI function on bus 0 with something mapped: hiding and showing it changes the memory map."""

    slot: int
    function: int

    @property
    def address(self) -> int:
        """For port 0xcf8: this function's command register."""
        return 1 << 31 | self.slot << 11 | self.function << 8 | COMMAND_REGISTER


async def translates(qmp: Executor) -> bool:
    """Whether this QEMU runs its guest by TCG. QEMU: `query-kvm`."""
    return not (await qmp.execute("query-kvm"))["enabled"]


async def hmp(qmp: Executor, line: str) -> str:
    """One line of the human monitor; its answer, stripped. Raises: QmpError."""
    return str(await qmp.execute("human-monitor-command", command_line=line)).strip()


async def function_to_hide(qmp: Executor) -> Function | None:
    """The function that `flush_tlbs` uses, None if the machine has none. QEMU: `query-pci`."""
    for bus in await qmp.execute("query-pci"):
        for device in bus["devices"] if bus["bus"] == 0 else []:
            mapped = [r for r in device["regions"] if r["address"] not in UNMAPPED]
            if mapped and "pci_bridge" not in device and not device["class_info"].get("desc", "").startswith("VGA"):
                return Function(device["slot"], device["function"])
    return None


async def flush_tlbs(qmp: Executor, function: Function) -> None:
    """Flush the TLB of every vCPU while the guest stands still; it cannot see that anything was done.

    QEMU: HMP `i`, `o`; `hw/pci/pci.c` maps and unmaps by the command register, `tcg_commit` then flushes.
    Raises: QmpError, Failed ("tcg"), with the registers as they were.
    """
    latched = await _read(qmp, "w", CONFIG_ADDRESS)
    await _write(qmp, "w", CONFIG_ADDRESS, function.address)
    try:
        command = await _read(qmp, "h", CONFIG_DATA)
        if not command & DECODES:
            raise Failed("tcg", "the guest hid a PCI device in this moment, so its TLB can't be flushed", "", "try again")
        try:
            await _write(qmp, "h", CONFIG_DATA, command & ~DECODES)
        finally:
            await _write(qmp, "h", CONFIG_DATA, command)
    finally:
        await _write(qmp, "w", CONFIG_ADDRESS, latched)


async def _read(qmp: Executor, size: str, port: int) -> int:
    said = await hmp(qmp, f"i /{size} {port:#x}")
    try:
        return int(said.rpartition("=")[2].strip(), 16)
    except ValueError:
        raise Failed("tcg", f"QEMU does not tell what port {port:#x} holds: {said!r}") from None


async def _write(qmp: Executor, size: str, port: int, value: int) -> None:
    if said := await hmp(qmp, f"o /{size} {port:#x} {value:#x}"):
        raise Failed("tcg", f"QEMU does not write port {port:#x}: {said}")


async def follow(qmp: Executor) -> None:
    """On a standby, before its first load. Raises: QmpError, Failed ("tcg")."""
    if said := await hmp(qmp, FOLLOW):
        raise Failed("tcg", f"QEMU refused '{FOLLOW}': {said}")


def lead_command() -> tuple[str, dict[str, Any]]:
    """The QMP command that a standby which takes over gives before its guest runs."""
    return "human-monitor-command", {"command-line": LEAD}
