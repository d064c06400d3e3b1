"""A journal: sealed lines appended one by one, which a kill may tear and whose loss costs only time."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from sdvae import atomic
from sdvae.sealed import seal, unseal


class Journal:
    """Sealed lines appended one by one: cheap notes that a kill may tear, and whose loss costs only time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with atomic.explained(path, ()):
            atomic.hook("open", path)
            self._file = path.open("ab", buffering=0)
            if self._file.tell() and not _ends_in_newline(path):
                self._file.write(b"\n")  # closes the line a kill has torn; it will not unseal

    def append(self, value: dict[str, Any]) -> None:
        """Add one line."""
        line = seal(value)
        with atomic.explained(self.path, (line,)):
            atomic.hook("append", self.path)
            atomic.write_all(self._file.fileno(), line)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal that are whole; a torn or damaged one is passed over."""
    if path.exists():
        with path.open("rb") as lines:
            yield from (value for value in map(unseal, lines) if value is not None)


def _ends_in_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"
