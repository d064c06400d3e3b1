"""Tables of photos as people write them: CSV, TSV and JSON lines with a path, a caption, a label."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sdvae.errors import SourceError

SUFFIXES = (".csv", ".tsv", ".jsonl")
# Two spellings of one thing; a table that has both leaves open which is meant.
_SPELLINGS = {"path": ("path", "file_name"), "key": ("key",), "caption": ("caption", "text"), "label": ("label",)}


@dataclass(frozen=True, slots=True)
class Row:
    """One line: what it says of the photo at `path`, relative to the folder of the table."""

    number: int  # of the line, as an editor counts
    path: str
    key: str | None = None
    caption: str | None = None
    label: str | None = None


def read_rows(name: str, data: bytes) -> Iterator[Row]:
    """The lines of a table whose file is called `name`; other columns are left alone. SourceError, with the line."""
    try:
        text = data.decode("utf-8-sig")  # Excel begins with a byte order mark
    except UnicodeDecodeError as error:
        raise SourceError(f"{name} is not UTF-8 (byte {error.start:,}); save it as UTF-8") from error
    lines = _read_jsonl(name, text) if name.lower().endswith(".jsonl") else _read_csv(name, text)
    for number, values in lines:
        told = {member: _told(f"{name}, line {number}", values, member) for member in _SPELLINGS}
        if told["path"] is None:
            raise SourceError(
                f"{name}, line {number} has no path; a table of photos has one under 'path' or 'file_name'"
            )
        yield Row(number, told["path"], told["key"], told["caption"], told["label"])


def _read_csv(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text), dialect="excel-tab" if name.lower().endswith(".tsv") else "excel")
    try:
        for values in reader:
            if None in values or None in values.values():
                raise SourceError(f"{name}, line {reader.line_num} has not as many fields as the first line")
            yield reader.line_num, {column: value or None for column, value in values.items()}
    except csv.Error as error:
        raise SourceError(f"{name}, line {reader.line_num} is no CSV: {error}") from error


def _read_jsonl(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise SourceError(f"{name}, line {number} is no JSON: {error}") from error
        if not isinstance(values, dict):
            raise SourceError(f"{name}, line {number} is not a JSON object")
        yield number, values


def _told(where: str, values: dict[str, Any], member: str) -> str | None:
    told = [spelling for spelling in _SPELLINGS[member] if values.get(spelling) is not None]
    if len(told) > 1:
        raise SourceError(f"{where} has both {' and '.join(map(repr, told))}; keep the one that is meant")
    value = values[told[0]] if told else None
    if isinstance(value, int) and member == "label":
        return str(value)
    if value is not None and not isinstance(value, str):
        raise SourceError(f"{where}: {told[0]} is {json.dumps(value)[:60]}, which is no text")
    return value
