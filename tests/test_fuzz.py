"""Parsers of strangers' data end in a value or in one sentence; `python -m tests.fuzz 20000` tries more of the same."""

from pathlib import Path

import pytest

from tests.fuzz import PARSERS, fuzz

_NUM_INPUTS = 250


@pytest.mark.parametrize("name", PARSERS)
def test_odd_files_are_read_or_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    found = fuzz(name, _NUM_INPUTS, tmp_path)
    assert found.total() == _NUM_INPUTS
    assert len(found) > 1 or name == "bare pickle", "nothing was odd, or everything"
