"""Labels of disks: what a receiver may overwrite, and who has a file open. Files and /proc are real."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mcft.agent import model
from mcft.agent.life import Life
from mcft.agent.overwriting import refuse_overwriting, user_of
from mcft.agent.peerverbs import PeerVerbs
from mcft.diskreplica import Disk
from mcft.errors import Refused
from mcft.generations import Kind, Ledger


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


def test_a_label_that_a_full_disk_kept_back_is_written_before_it_is_asked_for(tmp_path: Path) -> None:
    """The host lost its domain while its disk was full: the record was written, the label was not, and its file was no old copy.

    Fails if `_prepare_once` does not recompute (found by chaos: protected again only after the agent's restart).
    """
    body = model.Body("u", "vm1", "p", 5, "primary", "host2", disks=[Disk("vda", "", "n", 1, str(tmp_path / "d"), "raw", False)])
    life = object.__new__(Life)
    life.body, life.site = body, cast(Any, SimpleNamespace(config=SimpleNamespace(state_dir=tmp_path)))
    life.ledger = Ledger("p", "primary", 5)
    for kind in (Kind.PREPARING, Kind.ARMING, Kind.PROTECTED):
        life.ledger.append(kind)
    life.recompute_labels()
    label = tmp_path / "labels" / "u" / "vda"
    assert not label.read_text().startswith("stale")
    (tmp_path / "labels").rename(tmp_path / "away")
    (tmp_path / "labels").write_text("")  # no room for a folder
    life.ledger.append(Kind.LOST)
    life.recompute_labels()
    (tmp_path / "labels").unlink()
    (tmp_path / "away").rename(tmp_path / "labels")

    async def refused(*_: Any) -> None:
        raise Refused("seen", "the label was looked at")

    verbs = object.__new__(PeerVerbs)
    verbs.core = cast(Any, SimpleNamespace(lives={"u": life}, may_receive=refused))
    with pytest.raises(Refused):
        asyncio.run(verbs._prepare_once("host2", cast(Any, SimpleNamespace(uuid="u"))))
    assert label.read_text().startswith("stale(5)")
