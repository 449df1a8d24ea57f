"""Which QEMU engine `colo` refuses, and with which words: the lab has one QEMU only, so a fake one answers here."""

from __future__ import annotations

from typing import Any, cast

import pytest

from mcft.engines.colo import Colo
from mcft.qmp_passthrough import Qmp


class FakeQmp:
    """Answers what `unsupported` asks, as a QEMU of that version would."""

    def __init__(self, major: int, minor: int, *, colo: bool = True, monitor: bool = True) -> None:
        capabilities = ["events", "return-path", *(["x-colo"] if colo else [])]
        self.answers: dict[str, Any] = {
            "query-version": {"qemu": {"major": major, "minor": minor, "micro": 0}},
            "query-migrate-capabilities": [{"capability": name, "state": False} for name in capabilities],
            "qom-list-types": [{"name": "monitor-qmp"}] if monitor else [],
        }

    async def execute(self, command: str, **_arguments: Any) -> Any:
        return self.answers[command]


@pytest.mark.parametrize(
    ("qemu", "words"),
    [
        (FakeQmp(11, 1, colo=False), ("11.1", "x-colo", "without COLO")),
        (FakeQmp(7, 2), ("7.2", "deadlocks", "11.1 or newer")),
        (FakeQmp(10, 0), ("10.0", "ends as", "11.1 or newer")),
        (FakeQmp(11, 0), ("11.0", "11.1 or newer")),
        (FakeQmp(8, 1), ("8.1", "11.1 or newer")),
        (FakeQmp(11, 1, monitor=False), ("11.1", "monitor")),
    ],
    ids=["no-colo", "7.2", "10.0", "11.0", "8.1", "no-monitor"],
)
async def test_refused_by_name_and_with_the_reason(qemu: FakeQmp, words: tuple[str, ...]) -> None:
    """Fails if such a QEMU is taken, or if the sentence does not say which it is and why."""
    said = await Colo().unsupported(cast(Qmp, qemu))
    for word in words:
        assert word in said


@pytest.mark.parametrize("version", [(11, 1), (11, 2), (12, 0)])
async def test_taken(version: tuple[int, int]) -> None:
    assert await Colo().unsupported(cast(Qmp, FakeQmp(*version))) == ""
