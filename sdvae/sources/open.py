"""Where photos come from: what a user names, and the source that reads it."""

import re
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sdvae.errors import SourceError
from sdvae.sources import archives, arrow, tables
from sdvae.sources.archives import ArchiveSource
from sdvae.sources.arrow import ArrowSource, open_hub, open_saved, open_tables
from sdvae.sources.entries import Entry, Source
from sdvae.sources.folders import FolderSource
from sdvae.sources.lists import ListSource
from sdvae.sources.mnist import MnistSource, is_idx

__all__ = ["Entry", "FolderSource", "Source", "open_source"]

_HUB = "hf://"
_MAGIC = re.compile(r"[*?\[{]")


def open_source(spec: str | Path | Iterable[Any]) -> Source:
    """The source that a user means; SourceError where there is none.

    A path to a folder, zip file, tar, Parquet or Arrow file, list (.csv, .tsv, .jsonl), saved Hugging Face dataset or
    MNIST's images; a pattern of such paths (`shards/{000..099}.tar`, `photos/**/*.jpg`); `hf://org/name:split`; or
    an iterable of images.
    """
    if not isinstance(spec, str | Path):
        from sdvae.sources.memory import MemorySource

        return MemorySource(spec)
    text = str(spec)
    if text.startswith(_HUB):
        _require("datasets")
        return open_hub(text.removeprefix(_HUB))
    path = Path(spec)
    if path.exists() or not _MAGIC.search(text):
        return _open_path(path)
    return _open_pattern(text)


def _open_path(path: Path) -> Source:
    if not path.exists():
        raise SourceError(f"there is no {path}")
    if path.is_dir():
        is_saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
        return _open_saved(path) if is_saved else FolderSource(path)
    if is_idx(path):
        return MnistSource(path)
    for suffixes, opened in _KINDS.items():
        if path.suffix.lower() in suffixes:
            return opened(path)
    known = ", ".join(suffix for suffixes in _KINDS for suffix in suffixes)
    raise SourceError(f"{path} is neither a folder nor one of {known}; give the folder that holds the photos")


def _open_saved(folder: Path) -> ArrowSource:
    _require("pyarrow")
    return open_saved(folder)


def _open_table(path: Path) -> ArrowSource:
    _require("pyarrow")
    return ArrowSource(path, {"": ["."]})


def _open_tables(root: Path, paths: Sequence[str]) -> ArrowSource:
    _require("pyarrow")
    return open_tables(root, paths)


_KINDS: dict[tuple[str, ...], Callable[[Path], Source]] = {
    archives.SUFFIXES: ArchiveSource,
    arrow.SUFFIXES: _open_table,
    tables.SUFFIXES: ListSource,
}


def _open_pattern(pattern: str) -> Source:
    root, found = _matches(pattern)
    for suffixes, opened in ((archives.SUFFIXES, ArchiveSource), (arrow.SUFFIXES, _open_tables)):
        matching = [name for name in found if Path(name).suffix.lower() in suffixes]
        if len(matching) == len(found):
            return opened(root, tuple(found))
        if matching:
            raise SourceError(f"{pattern} matches {matching[0]} and files of other kinds; a source is of one kind")
    return FolderSource(root, found)


def _matches(pattern: str) -> tuple[Path, list[str]]:
    """The folder before the first special character, and what matches below it, sorted."""
    magic = _MAGIC.search(pattern)
    assert magic is not None
    folder, slash, _ = pattern[: magic.start()].rpartition("/")
    root = Path(folder + slash or ".")
    names: set[str] = set()
    for each in _without_braces(pattern.removeprefix(folder + slash)):
        found = [path.relative_to(root).as_posix() for path in root.glob(each)]
        if not found:  # of a hundred numbered tars, one that is missing is to be told
            raise SourceError(f"nothing matches {root / each}")
        names.update(found)
    return root, sorted(names)


def _without_braces(pattern: str) -> Iterable[str]:
    if "{" not in pattern:
        return [pattern]
    _require("braceexpand")
    from braceexpand import braceexpand

    expanded: Iterable[str] = braceexpand(pattern)
    return expanded


def _require(library: str) -> None:
    if find_spec(library) is None:
        raise SourceError(f"reading this needs {library}, which is not installed; pip install 'sdvae[data]'")
