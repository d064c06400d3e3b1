"""Captions and labels: which file beside a photo, or which line of a table, speaks of it. In doubt none does."""

import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from sdvae.errors import SourceError
from sdvae.sources.entries import Entry, why_unsafe
from sdvae.sources.tables import read_rows

TEXTS = {".txt": "caption", ".caption": "caption", ".cls": "label"}  # what a file beside a photo tells
TABLES = ("metadata.csv", "metadata.jsonl")  # of Hugging Face's imagefolder
MAX_TEXT_BYTES = 2**20  # more is no caption

ReadText = Callable[[str], bytes]  # the bytes of a text; OSError with a `strerror`


def is_text(name: str) -> bool:
    """Whether a file of this path may tell something about photos."""
    return name.lower().endswith(tuple(TEXTS)) or posixpath.basename(name) in TABLES


def pair(photos: Iterable[Entry], texts: Iterable[str], read: ReadText) -> Iterator[Entry]:
    """Every photo with what the files `texts` tell of it.

    Of `a.jpg` speak `a.jpg.txt`, or else `a.txt` where no other photo is called `a`, and the lines of a `metadata.csv`
    or `.jsonl` in its folder or above. A photo with two captions that differ, or with one that may be another's, gets
    a reason instead: it is quarantined, not trained on with the wrong words. So does a photo that only a table knows.
    """
    photos, texts = list(photos), list(texts)
    tables = [name for name in texts if posixpath.basename(name) in TABLES]
    lines = _lines_by_key(tables, read)
    beside = {_with_lower_suffix(name): name for name in texts if name not in tables}
    sharing = Counter(_stem(entry.key) for entry in photos if not _texts_of(entry.key, beside))
    for entry in photos:
        told = lines.pop(entry.key, [])
        if entry.reason is None:
            try:
                told += [_read(name, read) for name in _texts_beside(entry.key, beside, sharing)]
                caption, label = _agreed(told, "caption"), _agreed(told, "label")
                entry = replace(entry, caption=caption, label=entry.label if label is None else label)
            except _DoubtError as doubt:
                entry = replace(entry, reason=str(doubt))
        yield entry
    for key, told in lines.items():
        yield Entry(key, reason=why_unsafe(key) or f"{told[0].where} names it, but there is no such photo")


@dataclass(frozen=True, slots=True)
class _Told:
    """What one place tells of a photo: its caption, its label."""

    where: str
    caption: str | None
    label: str | None


class _DoubtError(Exception):
    """Why it is not certain what a photo's caption or label is."""


def _agreed(told: list[_Told], member: str) -> str | None:
    places = {getattr(each, member): each.where for each in told if getattr(each, member) is not None}
    if len(places) > 1:
        raise _DoubtError(f"it has {member}s that differ, in {' and '.join(sorted(places.values()))}")
    return next(iter(places), None)


def _lines_by_key(tables: list[str], read: ReadText) -> dict[str, list[_Told]]:
    found: dict[str, list[_Told]] = {}
    for name in sorted(tables):
        try:
            data = read(name)
        except OSError as error:
            raise SourceError(f"cannot read {name}: {error.strerror}") from error
        for row in read_rows(name, data):
            key = posixpath.normpath(posixpath.join(posixpath.dirname(name), row.path))
            found.setdefault(key, []).append(_Told(f"{name}, line {row.number}", row.caption, row.label))
    return found


def _texts_beside(key: str, beside: Mapping[str, str], sharing: Mapping[str, int]) -> list[str]:
    if own := _texts_of(key, beside):
        return own
    shared = _texts_of(_stem(key), beside)
    if shared and sharing[_stem(key)] > 1:
        raise _DoubtError(f"{shared[0]} fits other photos, too; call what belongs to this one {key}.txt")
    return shared


def _texts_of(name: str, beside: Mapping[str, str]) -> list[str]:
    return [beside[name + suffix] for suffix in TEXTS if name + suffix in beside]


def _read(name: str, read: ReadText) -> _Told:
    try:
        data = read(name)
        text = data.decode("utf-8-sig").strip()
    except OSError as error:
        raise _DoubtError(f"{name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _DoubtError(f"{name} is not UTF-8") from error
    if len(data) > MAX_TEXT_BYTES:
        raise _DoubtError(f"{name} is larger than {MAX_TEXT_BYTES:,} bytes")
    is_caption = TEXTS[posixpath.splitext(name)[1].lower()] == "caption"
    return _Told(name, text if is_caption else None, None if is_caption else text)


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _with_lower_suffix(name: str) -> str:
    stem, suffix = posixpath.splitext(name)
    return stem + suffix.lower()
