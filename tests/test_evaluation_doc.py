"""docs/evaluation.md quotes lines that exist, and names every recipe and every network's file."""

from itertools import takewhile
from pathlib import Path

import pytest

from benchmarks import quality
from sdvae.evaluate.recipes import RECIPES
from sdvae.metrics import METRICS
from sdvae.perceptual.files import FILES
from tests.test_theory import is_quoted_truly, quotes

ROOT = Path(__file__).parents[1]
DOC = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("file", "lines"), quotes(DOC))
def test_every_quoted_line_is_in_the_code(file: str, lines: list[str]) -> None:
    assert lines
    assert is_quoted_truly(lines, (ROOT / file).read_text(encoding="utf-8")), f"{file} no longer has {lines}"


def test_every_code_block_is_checked() -> None:
    assert len(quotes(DOC)) == DOC.count("```python") >= 12


def test_every_recipe_metric_and_file_is_named() -> None:
    assert [name for name in RECIPES if f"`{name}`" not in DOC] == []
    assert [metric.label for metric in METRICS.values() if metric.label not in DOC] == []
    assert [file.file for file in FILES.values() if file.file not in DOC or file.sha256 not in DOC] == []


@pytest.mark.parametrize("document", quality.DOCUMENTS)
def test_the_table_of_kodak_is_the_benchmarks(document: str) -> None:
    """`benchmarks/quality.py --write` writes it."""
    text = (ROOT / document).read_text(encoding="utf-8")
    lines = text.partition(quality.MARK)[2].splitlines()
    assert "\n".join(takewhile(lambda line: line.startswith("|"), lines)) == quality.stored_table()
    assert len(lines) > 10
