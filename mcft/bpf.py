"""bpf(2), as little of it as mcft needs: small programs at a tap's ingress, and one number that they and a process share.

Source: bpf(2), linux/bpf.h; RFC 9669 for the instructions. No library of Debian's does this without a compiler.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import struct
import sys

_SYSCALL = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
MAP_CREATE, PROG_LOAD, LINK_CREATE = 0, 5, 28
_ARRAY, _MMAPABLE = 2, 1 << 10
_SCHED_CLS = 3
TCX_INGRESS = 46
DROP, NEXT = 2, -1  # TC_ACT_SHOT and TC_ACT_UNSPEC; TCX names them TCX_DROP and TCX_NEXT
_ATTRIBUTES_BYTES = 128


def bpf(command: int, attributes: bytes) -> int:
    """One call; the descriptor that it made. Raises: OSError."""
    number = _SYSCALL.get(platform.machine())
    if number is None:
        raise OSError(f"bpf(2) is not known on {platform.machine()}")
    buffer = ctypes.create_string_buffer(attributes, _ATTRIBUTES_BYTES)
    made = ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), command, buffer, _ATTRIBUTES_BYTES)
    if made < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(made)


def instruction(code: int, *, dst: int = 0, src: int = 0, offset: int = 0, value: int = 0) -> bytes:
    """`struct bpf_insn`."""
    registers = src << 4 | dst if sys.byteorder == "little" else dst << 4 | src
    return struct.pack("=BBhi", code, registers, offset, value)


def returning(value: int) -> bytes:
    """`return value`."""
    return instruction(0xB7, value=value) + instruction(0x95)


def load(instructions: bytes) -> int:
    """A descriptor of this program for packets (BPF_PROG_TYPE_SCHED_CLS). Raises: OSError."""
    code, license_ = ctypes.create_string_buffer(instructions, len(instructions)), ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack(
        "=IIQQ", _SCHED_CLS, len(instructions) // 8, ctypes.addressof(code), ctypes.addressof(license_)
    )
    return bpf(PROG_LOAD, attributes)


def attach_ingress(program: int, index: int) -> int:
    """Run it on what the interface of this index receives, before any qdisc, for as long as the descriptor is open.

    TCX, from Linux 6.6 on. Raises: OSError.
    """
    return bpf(LINK_CREATE, struct.pack("=IIII", program, index, TCX_INGRESS, 0))


class Number:
    """64 bits without sign that programs read and this process writes, by a store to memory (BPF_F_MMAPABLE, Linux 5.5)."""

    def __init__(self) -> None:
        """Raises: OSError."""
        self.fd = bpf(MAP_CREATE, struct.pack("=IIIII", _ARRAY, 4, 8, 1, _MMAPABLE))
        try:
            memory = mmap.mmap(self.fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError:
            os.close(self.fd)
            raise
        self._cell = ctypes.c_uint64.from_buffer(memory)  # one aligned store, never half a number

    @property
    def value(self) -> int:
        return int(self._cell.value)

    @value.setter
    def value(self, value: int) -> None:
        self._cell.value = value

    def into(self, register: int) -> bytes:
        """Instructions that read it (BPF_PSEUDO_MAP_VALUE)."""
        address = instruction(0x18, dst=register, src=2, value=self.fd) + instruction(0)
        return address + instruction(0x79, dst=register, src=register)
