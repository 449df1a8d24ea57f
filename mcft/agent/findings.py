"""What a check found, collected: refusals are the very errors that `protect` would raise, caught one by one."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

from mcft.api import Finding
from mcft.errors import OK, REFUSED, UNREACHABLE, McftError

T = TypeVar("T")


class Findings:
    """A list that is added to in the order in which `protect` would look."""

    def __init__(self) -> None:
        self.found: list[Finding] = []

    def ok(self, code: str, message: str) -> None:
        self.found.append(Finding("ok", code, message))

    def warn(self, code: str, message: str, reason: str = "", next_step: str = "") -> None:
        self.found.append(Finding("warning", code, message, reason, next_step))

    def refuse(self, error: McftError) -> None:
        """What `protect` would end with."""
        self.found.append(refusal(error))

    async def tried(self, work: Awaitable[T], code: str = "", ok: str = "") -> T | None:
        """The work's value, with a line that it is fine (if one is given); None and its refusal if it raised one."""
        try:
            value = await work
        except McftError as error:
            self.refuse(error)
            return None
        if ok:
            self.ok(code, ok)
        return value


def refusal(error: McftError) -> Finding:
    return Finding("refusal", error.code, error.message, error.reason, error.next_step, error.exit_code)


def exit_code(found: list[Finding]) -> int:
    """A peer that is silent is asked first by `protect`; of the others any makes the request refused."""
    codes = {finding.exit_code or REFUSED for finding in found if finding.level == "refusal"}
    if UNREACHABLE in codes:
        return UNREACHABLE
    return REFUSED if REFUSED in codes else min(codes, default=OK)
