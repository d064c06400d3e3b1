"""Tables of photos as people write them: CSV, TSV, JSON lines and Parquet with a path, a caption, a label."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from sdvae.errors import SourceError
from sdvae.sources.entries import DoubtError, as_text, shown, some_of, why_no_name

SUFFIXES = (".csv", ".tsv", ".jsonl")
CAPTIONS = ("caption", "text")
_ROWS_AT_ONCE = 2**12  # of Parquet as Python's objects
# Two spellings of one thing; a table that has both leaves open which is meant.
_SPELLINGS = {"path": ("path", "file_name"), "key": ("key",), "caption": CAPTIONS, "label": ("label",)}


@dataclass(frozen=True, slots=True)
class Row:
    """One line: what it says of the photo at `path`, relative to the folder of the table; why it must not be taken."""

    number: int  # of the line, as an editor counts
    path: str
    key: str | None = None
    caption: str | None = None
    label: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Table:
    """A table's lines, and the names of all its columns."""

    rows: list[Row]
    columns: frozenset[str]

    def remarks(self, name: str) -> list[str]:
        """What there is to say where no column of captions was found, but others were."""
        others = self.columns.difference(*_SPELLINGS.values())
        return [no_captions(name, others)] if others and self.columns.isdisjoint(CAPTIONS) else []


def no_captions(name: str, columns: frozenset[str]) -> str:
    """The remark on a table without captions that has other columns."""
    return f"{name} has no column 'caption' or 'text'; --caption takes another of its columns: {some_of(columns)}"


def column_name(name: str) -> str:
    """A column's name as it is compared: people and spreadsheets put blanks and capitals into it."""
    return name.strip().lower()


def read_table(name: str, data: bytes, caption: str | None = None) -> Table:
    """The lines of a table whose file is called `name`; SourceError, with the line, where it is none.

    Captions are the column `caption`, or those named `caption` or `text`. Columns that mean nothing are left alone.
    """
    lines = _read_parquet(name, data) if name.lower().endswith(".parquet") else _read_lines(name, data)
    spellings = _SPELLINGS | {"caption": (column_name(caption),)} if caption else _SPELLINGS
    rows: list[Row] = []
    columns: set[str] = set()
    for number, values in lines:
        columns.update(values)
        rows.append(_row(f"{name}, line {number}", number, values, spellings))
    return Table(rows, frozenset(columns))


def _read_lines(name: str, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = data.decode("utf-8-sig")  # Excel begins with a byte order mark
    except UnicodeDecodeError as error:
        raise SourceError(f"{name} is not UTF-8 (byte {error.start:,}); save it as UTF-8") from error
    return _read_jsonl(name, text) if name.lower().endswith(".jsonl") else _read_csv(name, text)


def _read_parquet(name: str, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows count as lines, the first as line 1."""
    if find_spec("pyarrow") is None:
        raise SourceError(f"reading {name} needs pyarrow, which is not installed; pip install 'sdvae[data]'")
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(io.BytesIO(data))
        columns = [column_name(shown(column)) for column in table.column_names]
        _require_unlike(name, columns)
        for start in range(0, len(table), _ROWS_AT_ONCE):
            values = (column.to_pylist() for column in table.slice(start, _ROWS_AT_ONCE).columns)
            for number, row in enumerate(zip(*values, strict=True), start + 1):
                yield number, dict(zip(columns, row, strict=True))
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{name} is damaged or no Parquet file ({error}); write it again") from error


def _read_csv(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    dialect = "excel-tab" if name.lower().endswith(".tsv") else "excel"
    # Strict: a quotation mark that is never closed would make all that follows one caption.
    reader = csv.reader(io.StringIO(text, newline="\n"), dialect, strict=True, skipinitialspace=True)
    try:
        columns = [column_name(column) for column in next(reader, [])]
        _require_unlike(name, columns)
        for values in reader:
            if not values:
                continue
            if len(values) != len(columns):
                raise SourceError(f"{name}, line {reader.line_num} has not as many fields as the first line")
            yield reader.line_num, {column: value or None for column, value in zip(columns, values, strict=True)}
    except csv.Error as error:
        raise SourceError(f"{name}, line {reader.line_num} is no CSV: {error}") from error


def _read_jsonl(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{name}, line {number} is no JSON: {error}") from error
        if not isinstance(values, dict):
            raise SourceError(f"{name}, line {number} is not a JSON object")
        columns = [column_name(shown(column)) for column in values]
        _require_unlike(f"{name}, line {number}", columns)
        yield number, dict(zip(columns, values.values(), strict=True))


def _require_unlike(where: str, columns: list[str]) -> None:
    if len(set(columns)) == len(columns):
        return
    twice = next((column for column, count in Counter(columns).items() if column and count > 1), None)
    if twice:  # spreadsheets leave columns without a name, which mean nothing
        raise SourceError(f"{where} has two columns {twice!r}; keep the one that is meant")


def _row(where: str, number: int, values: dict[str, Any], spellings: dict[str, tuple[str, ...]]) -> Row:
    told = {member: _told(where, values, names) for member, names in spellings.items()}
    path, key = told["path"], told["key"]
    if path is None:
        raise SourceError(f"{where} has no path; a table of photos has one under 'path' or 'file_name'")
    for text in (path, key):
        if not isinstance(text, str | None):
            raise SourceError(f"{where}: {json.dumps(text)[:60]} is no text, and so no path and no key")
    if reason := why_no_name(path) or why_no_name(key or ""):
        return Row(number, shown(path), key and shown(key), reason=reason)
    try:
        return Row(number, path, key, as_text(told["caption"], "caption"), as_text(told["label"], "label"))
    except DoubtError as doubt:
        return Row(number, path, key, reason=str(doubt))


def _told(where: str, values: dict[str, Any], names: tuple[str, ...]) -> Any:
    told = [name for name in names if values.get(name) is not None]
    if len(told) > 1:
        raise SourceError(f"{where} has both {' and '.join(map(repr, told))}; keep the one that is meant")
    return values[told[0]] if told else None
