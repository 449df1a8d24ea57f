"""The tests that the docs name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMED = re.compile(r"`((?:unit|lab|kernel|rdma)/test_\w+\.py)(?:::(\w+))?`")


def tables(page: str) -> list[list[str]]:
    """The rows of a page's tables, without the heads and the table of measured times."""
    text = (ROOT / "docs" / page).read_text().split("## Measured")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if not line.endswith("| test |")]


@pytest.mark.parametrize("page", ["failures.md", "living-with-mcft.md"])
def test_each_row_names_a_test_that_exists(page: str) -> None:
    """Fails if a row has no test, or a test was renamed or removed."""
    rows = tables(page)
    assert len(rows) > 10
    for row in rows:
        found = NAMED.findall(row[-1])
        assert found, f"{page}: no test is named for: {row[0]}"
        for file, function in found:
            source = (ROOT / "tests" / file).read_text()
            there = re.search(rf"^(?:async )?def {function}\(", source, re.MULTILINE)
            assert not function or there, f"{page}: {file}::{function}"
