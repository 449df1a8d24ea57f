"""The deliberate errors still fit the code: one that no longer applies proves nothing, and nobody runs all of them daily."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import mutants  # noqa: E402

from tests.sim import errors  # noqa: E402


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.name)
def test_a_mutant_applies_and_its_test_is_there(mutant: mutants.Mutant) -> None:
    assert not mutants.applies(mutant, ROOT)
    file, _, node = mutant.test.partition("::")
    function = node.split("[")[0].split("::")[-1]
    assert function in (ROOT / f"{mutants.TESTS}{file}").read_text()


@pytest.mark.parametrize("error", errors.ERRORS, ids=lambda e: e.name)
def test_an_error_of_the_simulations_applies(error: errors.Error) -> None:
    for file, old, _new in error.edits:
        assert (ROOT / file).read_text().count(old) == 1, f"{file}: {old}"
