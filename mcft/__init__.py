"""mcft: fault tolerance for running, unmodified libvirt domains."""

__version__ = "0.1.0"
