"""Every error that a user can meet: its slug, its exit code, its next step.

The agent raises these, the API carries them as `api.ErrorBody`, the CLI prints them.
Exit codes are the contract of `docs/` and `man/mcft.1`:

0 done · 1 failed and undone (or says what remains) · 2 usage · 3 no such domain, peer or protection ·
4 refused: not safe or not possible as asked · 5 agent not reachable · 6 timed out, still going on · 130 detached
"""

from __future__ import annotations

import errno

OK, FAILED, USAGE, NOT_FOUND, REFUSED, UNREACHABLE, TIMED_OUT, DETACHED = 0, 1, 2, 3, 4, 5, 6, 130

_HTTP_OF_EXIT = {FAILED: 500, USAGE: 400, NOT_FOUND: 404, REFUSED: 409, UNREACHABLE: 502, TIMED_OUT: 504}


class McftError(Exception):
    """One refused or failed act, in words for the person who asked for it.

    code: a stable slug ("no-such-domain"); message: what; reason: why; next_step: what to type or change.
    """

    exit_code = FAILED

    def __init__(self, code: str, message: str, reason: str = "", next_step: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.reason, self.next_step = code, message, reason, next_step

    def __str__(self) -> str:
        return ". ".join(part.rstrip(".") for part in (self.message, self.reason, self.next_step) if part) + "."

    @property
    def http_status(self) -> int:
        """The status that carries this error over the API."""
        return _HTTP_OF_EXIT.get(self.exit_code, 500)


class Failed(McftError):
    """It was tried, it failed, and what had been done was undone (or the text says what remains)."""


class Remains(Failed):
    """It failed, and so did its undoing: the text says what remains. Whoever began it undoes it again, until that is done."""


class Usage(McftError):
    """The words of the request are off; nothing was tried."""

    exit_code = USAGE


class NotFound(McftError):
    """No such domain, peer, protection or job."""

    exit_code = NOT_FOUND


class Refused(McftError):
    """Not safe or not possible as asked; nothing was changed."""

    exit_code = REFUSED


class Unreachable(McftError):
    """An agent (this host's or the peer's) did not answer."""

    exit_code = UNREACHABLE


class TimedOut(McftError):
    """Waiting ended; what was waited for still goes on."""

    exit_code = TIMED_OUT


BY_EXIT_CODE: dict[int, type[McftError]] = {
    cls.exit_code: cls for cls in (Failed, Usage, NotFound, Refused, Unreachable, TimedOut)
}


def unforeseen(error: BaseException) -> McftError:
    """What nobody meant to raise, in words: a disk that is full or fails says so, anything else is mcft's to mend."""
    if isinstance(error, McftError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
        where = f"{error.filename}: " if error.filename else ""
        so = "df -h /var/lib/mcft; make room there, or mend that disk"
        return Failed("disk", f"a file can't be written: {where}{error.strerror}", "", so)
    return Failed("internal", f"mcft failed inside: {type(error).__name__}: {error}", "", "see the agent's log")
