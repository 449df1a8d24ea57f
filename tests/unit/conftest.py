"""A STUB of libvirt's bindings, where the distribution's are not seen: modules of the agent can be imported, none called."""

import sys
import types

try:
    import libvirt  # noqa: F401
except ModuleNotFoundError:
    for _name in ("libvirt", "libvirt_qemu"):
        sys.modules[_name] = types.ModuleType(_name)
