"""vminitrd.py KERNEL INIT OUT MODULE…: an initramfs of busybox, INIT, and modules unpacked in the order in which they load.

KERNEL is the unpacked package. What a module needs stands in itself (`depends=`), so that no depmod is wanted here.
"""

from __future__ import annotations

import gzip
import lzma
import pathlib
import re
import sys

S_DIR, S_FILE = 0o040755, 0o100755


def entry(name: str, mode: int, data: bytes = b"") -> bytes:
    """One member of a cpio archive, format newc (cpio(5))."""
    path = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def main(kernel: pathlib.Path, init: pathlib.Path, out: pathlib.Path, wanted: list[str]) -> None:
    files = {path.name.split(".")[0].replace("-", "_"): path for path in kernel.rglob("*.ko*")}
    order: dict[str, bytes] = {}

    def load(name: str) -> None:
        path = files.get(name)
        if path is None or name in order:  # built in, or there already
            return
        module = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        found = re.search(rb"\0depends=([^\0]*)\0", module)
        for other in found[1].decode().split(",") if found and found[1] else []:
            load(other.replace("-", "_"))
        order[name] = module

    for name in wanted:
        load(name)
    members = [entry(folder, S_DIR) for folder in ("bin", "modules")]
    members.append(entry("bin/busybox", S_FILE, next(kernel.rglob("bin/busybox")).read_bytes()))
    members.append(entry("init", S_FILE, init.read_bytes()))
    members += [entry(f"modules/{number:03}-{name}.ko", S_FILE, module) for number, (name, module) in enumerate(order.items())]
    out.write_bytes(gzip.compress(b"".join([*members, entry("TRAILER!!!", 0)]), 1))


main(*(pathlib.Path(word) for word in sys.argv[1:4]), sys.argv[4:])
