"""What nobody meant to raise, in words."""

from __future__ import annotations

import errno
import os

from mcft import api
from mcft.errors import Refused, unforeseen


def test_a_full_disk_says_so() -> None:
    """Fails if an operator reads of an error of mcft's where making room is all there is to do."""
    body = api.error_body(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/var/lib/mcft/start/x"))
    assert (body.code, body.exit_code) == ("disk", 1)
    assert "/var/lib/mcft/start/x: No space left on device" in body.message and "df -h" in body.next_step


def test_an_error_of_mcfts_own_says_that_it_is_one() -> None:
    assert unforeseen(KeyError("x")).code == "internal"
    assert unforeseen(ConnectionResetError(errno.ECONNRESET, "reset")).code == "internal"


def test_what_has_words_keeps_them() -> None:
    said = Refused("a", "b", "c", "d")
    assert unforeseen(said) is said
