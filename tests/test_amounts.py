"""Amounts as people read them."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdvae.amounts import count, memory_text, size_text
from sdvae.engine.memory import parse_bytes


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1024, "1 KiB"),
        (800 << 20, "800 MiB"),
        (8 << 30, "8 GiB"),
        (500_000_000, "500 MB"),  # as it was given
        (2_500_000_000, "2.5 GB"),
        (2**30 + 1, "1.01 GiB"),
        (1023 * 2**20 + 1, "1024 MiB"),
    ],
)
def test_memory_has_the_unit_it_was_given_in_and_three_digits(num_bytes: int, text: str) -> None:
    assert memory_text(num_bytes) == text


@given(st.integers(10**6, 2**45), st.integers(1, 2**45))
def test_what_is_needed_is_enough_and_what_is_there_is_no_more(num_bytes: int, like: int) -> None:
    """So that a budget as it is told is kept, and a need above a limit reads as more than the limit."""
    assert parse_bytes(memory_text(num_bytes)) >= num_bytes >= parse_bytes(memory_text(num_bytes, is_limit=True))
    assert parse_bytes(memory_text(num_bytes, like=like)) >= num_bytes


PACKAGE = Path(__file__).parents[1] / "sdvae"
# Names of files and of tensors in them, which are formats, and a number of channels behind a size.
_OTHERS = {"amounts.py", "store/paths.py", "reading/formats.py", "reading/sd_scripts.py", "engine/describe.py"}


def test_one_function_writes_sizes() -> None:
    """So that no message can say the height first again."""
    written = {
        path.relative_to(PACKAGE).as_posix(): found
        for path in PACKAGE.rglob("*.py")
        if (found := re.findall(r"\{[^{}\n]*\}x\{[^{}\n]*\}", path.read_text(encoding="utf-8")))
    }
    assert written.keys() <= _OTHERS, written
    assert sum(map(len, written.values())) == 8


def test_sizes_are_width_times_height_and_one_is_no_plural() -> None:
    assert size_text(768, 1024) == "1024x768"
    assert [count(number, "image") for number in (0, 1, 1000)] == ["0 images", "1 image", "1,000 images"]
