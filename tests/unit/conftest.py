"""A STUB of libvirt's bindings, where the distribution's are not seen: modules of the agent can be imported, none called."""

import os
import sys
import types

from hypothesis import HealthCheck, settings

# An example that took long says something of the machine only; `make test` (MCFT_SEED) judges by the same examples each time.
settings.register_profile(
    "mcft", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("MCFT_SEED"))
)
settings.load_profile("mcft")

try:
    import libvirt  # noqa: F401
except ModuleNotFoundError:
    for _name in ("libvirt", "libvirt_qemu"):
        sys.modules[_name] = types.ModuleType(_name)
