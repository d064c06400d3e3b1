"""A list file: CSV, TSV or JSON lines that name photos, with their keys, captions and labels."""

import os
import stat
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from sdvae.errors import SourceError
from sdvae.sources.entries import MAX_FILE_BYTES, Entry, absolute, failing_as_one_photo, sorted_by_key, why_no_file
from sdvae.sources.tables import Row, Table, column_name, read_table


class ListSource:
    """The photos that a table names under `path` (or `file_name`), with `key`, `caption` (or `text`) and `label`.

    Paths are relative to the folder of the list. A record's key is the path below that folder; a photo elsewhere
    needs a key, since a store holds no path of this machine. `caption` names another column of captions.
    """

    def __init__(self, path: Path, caption: str | None = None) -> None:
        self.name, self.root, self._caption = str(path), absolute(path), caption

    def __reduce__(self) -> tuple[type["ListSource"], tuple[Path, str | None]]:
        return type(self), (self.root, self._caption)

    @property
    def remarks(self) -> Sequence[str]:
        """A table without a column of captions, where it has other columns."""
        return [] if self._caption else self._table.remarks(self.root.name)

    def entries(self) -> list[Entry]:
        """Every photo of the list, sorted by key; what is missing or no file is an entry with a reason."""
        return sorted_by_key((self._entry(key, row) for key, row in self._rows.items()), self.name)

    def read(self, key: str) -> bytes:
        """The bytes of one file; OSError as the file system gives it."""
        with failing_as_one_photo():
            place = self._path_of(self._rows[key].path)
        with place.open("rb") as file:
            return file.read(MAX_FILE_BYTES)

    @cached_property
    def _table(self) -> Table:
        try:
            data = self.root.read_bytes()
        except OSError as error:
            raise SourceError(f"cannot read {self.name}: {error.strerror}") from error
        table = read_table(self.root.name, data, self._caption)
        if self._caption and table.rows and column_name(self._caption) not in table.columns:
            raise SourceError(
                f"{self.name} has no column {self._caption!r} of captions, only {', '.join(sorted(table.columns))}"
            )
        return table

    @cached_property
    def _rows(self) -> Mapping[str, Row]:
        rows: dict[str, Row] = {}
        for row in self._table.rows:
            key = row.key or self._key(row)
            if key in rows:
                raise SourceError(
                    f"{self.name}, lines {rows[key].number} and {row.number} have one key, {key!r}; give them two"
                )
            rows[key] = row
        return rows

    def _key(self, row: Row) -> str:
        if "://" in row.path:
            raise SourceError(f"{self.name}, line {row.number}: {row.path} is no file; fetch it first")
        key = self._below(row)
        if key is None:
            raise SourceError(
                f"{self.name}, line {row.number}: {row.path} is not below {self.root.parent}; give the line a 'key'"
            )
        return key

    def _below(self, row: Row) -> str | None:
        """The path below the folder of the list; None for one elsewhere."""
        place = Path(os.path.normpath(self.root.parent / row.path))
        is_below = place.is_relative_to(self.root.parent)
        return place.relative_to(self.root.parent).as_posix() if is_below else None

    def _entry(self, key: str, row: Row) -> Entry:
        entry = Entry(key, uri=self._below(row), caption=row.caption, label=row.label, reason=row.reason)
        if row.reason is not None:
            return entry
        try:
            status = self._path_of(row.path).stat()
        except OSError as error:
            return replace(entry, reason=f"cannot be opened: {error.strerror}")
        if stat.S_ISDIR(status.st_mode):
            return replace(entry, reason="a folder, not a file")
        if reason := why_no_file(status):
            return replace(entry, reason=reason)
        return replace(entry, num_bytes=status.st_size, mtime_ns=status.st_mtime_ns)

    def _path_of(self, path: str) -> Path:
        """Where a file lies, whichever of Unicode's forms its name has there: systems differ."""
        folder = self.root.parent
        forms = (path, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD"))) if not path.isascii() else ()
        return next((folder / form for form in forms if os.path.lexists(folder / form)), folder / path)
