"""A deterministic world for mcft's real decision code: see `docs/correctness.md`."""

import sys
import types

try:
    import libvirt  # noqa: F401
except ModuleNotFoundError:  # the bindings come with the distribution; nothing of them is used here
    for _name in ("libvirt", "libvirt_qemu"):
        sys.modules[_name] = types.ModuleType(_name)
