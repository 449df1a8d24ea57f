"""Labels of disks: what a receiver may overwrite, and who has a file open. Files and /proc are real."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mcft.agent.overwriting import refuse_overwriting, user_of
from mcft.errors import Refused


class Receiver:
    """A copy's view of one disk that exists already."""

    def __init__(self, root: Path) -> None:
        self.path = root / "vm1.img"
        self.path.write_text("old")
        self.labels = root / "labels" / "u"
        self.labels.mkdir(parents=True)
        self.overwrite: list[str] = []

    def refusal(self, label: str | None) -> str:
        if label is not None:
            (self.labels / "vda").write_text(label.replace("PATH", str(self.path)))
        try:
            refuse_overwriting(str(self.labels / "vda"), str(self.path), "vda", "host2", self.overwrite)
        except Refused as refused:
            return refused.code
        return ""


@pytest.fixture
def receiver(tmp_path: Path) -> Receiver:
    return Receiver(tmp_path)


@pytest.mark.parametrize("state", ["stale(3)", "syncing", "bad(3)", "following(3)"])
def test_an_old_copy_is_overwritten(receiver: Receiver, state: str) -> None:
    assert receiver.refusal(f"{state} pid PATH\n") == ""


@pytest.mark.parametrize(
    "label", [None, "", "truth pid PATH\n", "chain(3) pid PATH\n", "truth, contested(3) pid PATH\n", "stale(3) pid PATH.other\n"]
)
def test_what_may_be_the_truth_is_not(receiver: Receiver, label: str | None) -> None:
    """Fails if a file without a label, another file's label, or a label that is no copy's lets a disk be overwritten."""
    assert receiver.refusal(label) == "file-exists"
    receiver.overwrite = [str(receiver.path)]
    assert receiver.refusal(label) == ""


def test_a_file_that_is_open_is_never_replaced(receiver: Receiver) -> None:
    """Not even with its name in --overwrite: its user would go on writing into a file that has no name any more."""
    receiver.overwrite = [str(receiver.path)]
    with receiver.path.open():
        assert str(os.getpid()) in user_of(str(receiver.path))
        assert receiver.refusal("stale(3) pid PATH\n") == "file-in-use"
    assert user_of(str(receiver.path)) == ""
