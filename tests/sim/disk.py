"""Stands in for disk images, overlays, and the guest's history.

The guest counts: each tick raises `n` in RAM and writes it to its disk. A history is a branch and how far it came; a copy
that goes on from a checkpoint, or a guest that is started from a disk, begins a new branch at that point. So "does this
state hold that write?" has one answer, also after two sides went on.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Moment:
    """A point of the guest's history: branch, and the newest count in it."""

    branch: int
    n: int


class History:
    """The tree of branches: who forked from whom, and where."""

    def __init__(self) -> None:
        self.parents: list[Moment | None] = [None]

    def fork(self, at: Moment) -> int:
        self.parents.append(at)
        return len(self.parents) - 1

    def holds(self, state: Moment, wanted: Moment) -> bool:
        """Whether `state` lies at or behind `wanted`."""
        branch, n = state.branch, state.n
        while branch != wanted.branch:
            parent = self.parents[branch]
            if parent is None:
                return False
            branch, n = parent.branch, min(n, parent.n)
        return n >= wanted.n


@dataclass
class Image:
    """A disk's file. content: what its blocks show; None: empty. torn: some blocks are not of that moment."""

    content: Moment | None = None
    torn: str = ""
    fresh: bool = False  # made empty, nothing was written yet
    missed: Moment | None = None  # a write that failed here and that the guest was told is done

    def write(self, moment: Moment) -> None:
        if self.missed is not None:
            self.torn = self.torn or f"it lacks {self.missed} and has what was written after it"
        self.content, self.fresh = moment, False

    def failed(self, moment: Moment) -> None:
        self.missed = self.missed or moment

    def whole(self, moment: Moment) -> None:
        """All of it was written anew."""
        self.content, self.fresh, self.missed, self.torn = moment, False, None, ""


@dataclass
class Overlay:
    """`active` or `hidden` over a standby's disk. content: what it shows in place of the disk's; None: it is empty.
    flushed: whether a power loss leaves it whole."""

    content: Moment | None = None
    flushed: bool = True
    lost: bool = False
