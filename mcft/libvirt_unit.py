"""Which unit is this host's libvirt: for what mcft tells people to type. Imports no libvirt."""

from __future__ import annotations

import os


def daemon_unit(run_dir: str = "/run/libvirt") -> str:
    """The unit that has this host's domains: `virtqemud` where its socket is, which is how libvirt's client library decides."""
    return "virtqemud" if os.path.exists(os.path.join(run_dir, "virtqemud-sock")) else "libvirtd"
