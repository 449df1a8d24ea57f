"""Import a package's modules without what its `__init__` imports: a gate must start fast, for while it is dead packets wait."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def bare(package: str) -> Iterator[None]:
    """Within, `package` is an empty module that only leads to its submodules; after, it is as if it had never been imported.

    The submodules stay as they are, also for whoever imports the package as a whole later. One that is imported already, or that
    can't be found, is left alone.
    """
    spec = None if package in sys.modules else importlib.util.find_spec(package)
    if spec is None:
        yield
        return
    sys.modules[package] = importlib.util.module_from_spec(spec)
    try:
        yield
    finally:
        del sys.modules[package]
