"""Of the stand-in (not the micro-checkpointing QEMU): QEMU's command line read and written anew. Pure."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field


@dataclass
class Line:
    """arguments: for QEMU, with `@MONITOR@` where its monitor's descriptor belongs.

    fds: descriptors of listening sockets handed over by libvirt; paths: monitors to listen on ourselves.
    incoming: None, "defer", or a URI that QEMU shall wait at.
    """

    arguments: list[str]
    fds: list[int] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    incoming: str | None = None
    autostart: bool = True
    stays: bool = False
    name: str = "qemu"

    @property
    def monitored(self) -> bool:
        return bool(self.fds or self.paths)


def options(value: str) -> dict[str, str]:
    return dict(part.partition("=")[::2] for part in value.split(","))


def read(argv: list[str]) -> Line:
    """The arguments without the program's name. A probe (`-machine none`, `-daemonize`) comes back untouched."""
    if "-daemonize" in argv or any(a == "-machine" and b.startswith("none") for a, b in itertools.pairwise(argv)):
        return Line(list(argv))
    line, ours, words = Line([]), "", iter(argv)
    for word in words:
        if word == "-S":
            line.autostart = False
        elif word == "-no-shutdown":
            line.stays = True
        if word not in ("-chardev", "-mon", "-qmp", "-incoming", "-name"):
            line.arguments.append(word)
            continue
        value = next(words)
        if word == "-name":
            line.name = options(value).get("guest") or value.split(",")[0]
        elif word == "-incoming":
            line.incoming, value = value, "defer"
        elif word == "-qmp":
            line.paths.append(value.split(",")[0].removeprefix("unix:"))
            continue
        elif word == "-chardev" and value.startswith("socket,id=charmonitor,"):
            ours = "charmonitor"
            line.fds += [int(options(value)["fd"])] if "fd" in options(value) else []
            line.paths += [options(value)["path"]] if "path" in options(value) else []
            value = "socket,id=charmonitor,fd=@MONITOR@"
        line.arguments += [word, value]
    if line.monitored and not ours:
        line.arguments += ["-chardev", "socket,id=charmonitor,fd=@MONITOR@", "-mon", "chardev=charmonitor,mode=control"]
    if line.incoming is not None and line.autostart:
        line.arguments.append("-S")  # whether it goes on after a take-over is decided here, not by QEMU
    return line
