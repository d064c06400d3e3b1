"""Where photos come from: what a user names, and the source that reads it."""

import re
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sdvae.errors import SourceError
from sdvae.sources import archives, arrow, kohya, tables
from sdvae.sources.archives import ArchiveSource
from sdvae.sources.arrow import ArrowSource, open_hub, open_saved, open_tables
from sdvae.sources.entries import Entry, Source, shown, why_no_name
from sdvae.sources.folders import FolderSource
from sdvae.sources.kohya import KohyaSource
from sdvae.sources.lists import ListSource
from sdvae.sources.mnist import MnistSource, is_idx

__all__ = ["Entry", "FolderSource", "Source", "open_source"]

_HUB = "hf://"
_MAGIC = re.compile(r"[*?\[{]")


def open_source(spec: str | Path | Source | Iterable[Any], caption: str | None = None) -> Source:
    """The source that a user means; SourceError where there is none.

    A path to a folder, zip file, tar, Parquet or Arrow file, list (.csv, .tsv, .jsonl), dataset config of sd-scripts
    (.toml), saved Hugging Face dataset or MNIST's images; a pattern of such paths (`shards/{000..099}.tar`,
    `photos/**/*.jpg`); `hf://org/name:split`; or an iterable of images. A source is returned as it is. `caption` names
    the ending of the files (`.tags`) or the column (`prompt`) that holds captions.
    """
    if isinstance(spec, Source):
        return spec
    if not isinstance(spec, str | Path):
        from sdvae.sources.memory import MemorySource

        return MemorySource(spec, caption=caption or "caption")
    text = str(spec)
    if not text or why_no_name(text):
        raise SourceError(f"there is no {shown(text)!r}; give the folder that holds the photos")
    if text.startswith(_HUB):
        _require("datasets")
        return open_hub(text.removeprefix(_HUB), caption)
    path = Path(spec)
    if path.exists() or not _MAGIC.search(text):
        return _open_path(path, caption)
    return _open_pattern(text, caption)


def _open_path(path: Path, caption: str | None) -> Source:
    if not path.exists():
        raise SourceError(f"there is no {path}")
    if path.is_dir():
        is_saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
        return _open_saved(path, caption) if is_saved else FolderSource(path, caption=caption)
    if is_idx(path):
        return MnistSource(path)
    for suffixes, opened in _KINDS.items():
        if path.suffix.lower() in suffixes:
            return opened(path, caption)
    known = ", ".join(suffix for suffixes in _KINDS for suffix in suffixes)
    raise SourceError(f"{path} is neither a folder nor one of {known}; give the folder that holds the photos")


def _open_saved(folder: Path, caption: str | None) -> ArrowSource:
    _require("pyarrow")
    return open_saved(folder, caption)


def _open_table(path: Path, caption: str | None) -> ArrowSource:
    _require("pyarrow")
    return ArrowSource(path, {"": ["."]}, caption=caption)


def _open_tables(root: Path, paths: Sequence[str], caption: str | None) -> ArrowSource:
    _require("pyarrow")
    return open_tables(root, paths, caption)


def _open_archive(path: Path, caption: str | None) -> ArchiveSource:
    return ArchiveSource(path, caption=caption)


_KINDS: dict[tuple[str, ...], Callable[[Path, str | None], Source]] = {
    archives.SUFFIXES: _open_archive,
    arrow.SUFFIXES: _open_table,
    tables.SUFFIXES: ListSource,
    kohya.SUFFIXES: KohyaSource,
}


def _open_pattern(pattern: str, caption: str | None) -> Source:
    root, found = _matches(pattern)
    for suffixes, opened in ((archives.SUFFIXES, ArchiveSource), (arrow.SUFFIXES, _open_tables)):
        matching = [name for name in found if Path(name).suffix.lower() in suffixes]
        if len(matching) == len(found):
            return opened(root, tuple(found), caption)
        if matching:
            raise SourceError(f"{pattern} matches {matching[0]} and files of other kinds; a source is of one kind")
    return FolderSource(root, found, caption)


def _matches(pattern: str) -> tuple[Path, list[str]]:
    """The folder that a pattern begins with, and what matches below it, sorted."""
    folder, rest = _split(pattern)
    root = Path(folder or ".")
    names: set[str] = set()
    try:
        for each in _without_braces(rest):
            found = [path.relative_to(root).as_posix() for path in root.glob(each)]
            if not found:  # of a hundred numbered tars, one that is missing is to be told
                raise SourceError(f"nothing matches {root / each}")
            names.update(found)
    except (ValueError, IndexError, NotImplementedError) as error:  # glob's and braceexpand's
        raise SourceError(f"{pattern} is no pattern: {error}") from error
    return root, sorted(names)


def _split(pattern: str) -> tuple[str, str]:
    """The folders a pattern begins with, and the rest; special characters of a folder that exists are its name."""
    parts = pattern.split("/")
    num_folders = next(number for number, part in enumerate(parts) if _MAGIC.search(part))
    while num_folders < len(parts) - 1 and Path("/".join(parts[: num_folders + 1])).is_dir():
        num_folders += 1
    folder = "/".join(parts[:num_folders])
    return folder + "/" if num_folders else "", "/".join(parts[num_folders:]).lstrip("/")


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
