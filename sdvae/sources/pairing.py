"""Captions and labels: which file beside a photo, or which line of a table, speaks of it. In doubt none does."""

import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from unicodedata import normalize

from sdvae.errors import SourceError
from sdvae.sources.entries import DoubtError, Entry, some_of, why_unsafe
from sdvae.sources.kinds import can_be_read
from sdvae.sources.tables import Table, column_name, read_table

TABLES = ("metadata.csv", "metadata.jsonl")  # of Hugging Face's imagefolder
MAX_TEXT_BYTES = 2**20  # more is no caption

ReadText = Callable[[str], bytes]  # the bytes of a text; OSError with a `strerror`


class Pairing:
    """Finds the captions and labels of photos, in one folder or in one archive after the other.

    Captions are files that end in `.txt` or `.caption`, and the columns `caption` or `text` of tables. `caption` names
    the ending (`.tags`) or the column (`prompt`) that is meant instead.
    """

    def __init__(self, caption: str | None = None) -> None:
        self._caption = caption
        endings = ("." + caption.lower().removeprefix("."),) if caption else (".txt", ".caption")
        self._members = {".cls": "label"} | dict.fromkeys(endings, "caption")  # what a file beside a photo tells
        self._has_captions = False
        self._left: list[str] = []
        self._table_remarks: list[str] = []

    def is_text(self, name: str) -> bool:
        """Whether a file of this path may tell something about photos."""
        return name.lower().endswith(tuple(self._members)) or is_table(name)

    def pair(self, photos: Iterable[Entry], texts: Iterable[str], read: ReadText, prefix: str = "") -> list[Entry]:
        """Every photo with what the files `texts` tell of it; remarks name texts with `prefix`.

        Of `a.jpg` speak `a.jpg.txt`, or else `a.txt` where no other photo is called `a`, and the lines of a
        `metadata.csv` or `.jsonl` in its folder or above. A photo with two captions that differ, or with one that may
        be another's, gets a reason instead: it is quarantined, not trained on with the wrong words. So does a photo
        that only a table knows.
        """
        photos, texts = list(photos), list(texts)
        tables = {name: self._read_table(name, read) for name in sorted(texts) if is_table(name)}
        lines = _lines_by_key(tables)
        beside = _Beside((name for name in texts if name not in tables), tuple(self._members))
        own = {entry.key: beside.of(entry.key) for entry in photos}
        sharing = Counter(_stem(_same(key)) for key, found in own.items() if not found and can_be_read(key))
        alike = Counter(_same(key) for key in own)
        paired: list[Entry] = []
        for entry in photos:
            told = lines.pop(_same(entry.key), [])
            try:
                if alike[_same(entry.key)] > 1:
                    raise DoubtError("another photo has the same name in another of Unicode's forms; rename one")
                names = own[entry.key] or _shared(entry.key, beside, sharing)
                paired.append(entry if entry.reason else self._with(entry, told, names, read))
            except DoubtError as doubt:
                paired.append(replace(entry, reason=str(doubt)))
        for told in lines.values():
            reason = why_unsafe(told[0].key) or f"{told[0].where} names it, but there is no such photo"
            paired.append(Entry(told[0].key, reason=told[0].reason or reason))
        self._note(tables, beside, prefix)
        return paired

    def remarks(self) -> list[str]:
        """What there is to say of texts that tell nothing; SourceError where what was named is nowhere."""
        if self._caption and not self._has_captions:
            ending = "." + self._caption.removeprefix(".")
            raise SourceError(f"no file of captions ends in {ending!r}, and no table has a column {self._caption!r}")
        if not self._left:
            return self._table_remarks
        texts = "text belongs" if len(self._left) == 1 else "texts belong"
        return [*self._table_remarks, f"{len(self._left)} {texts} to no photo: {some_of(self._left)}"]

    def _with(self, entry: Entry, told: "Sequence[_Told]", names: Sequence[str], read: ReadText) -> Entry:
        told = [*told, *(self._read_text(name, read) for name in names)]
        caption, label = _agreed(told, "caption"), _agreed(told, "label")
        return replace(entry, caption=caption, label=entry.label if label is None else label)

    def _read_text(self, name: str, read: ReadText) -> "_Told":
        try:
            data = read(name)
            text = data.decode("utf-8-sig").strip()
        except OSError as error:
            raise DoubtError(f"{name} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise DoubtError(f"{name} is not UTF-8") from error
        if len(data) > MAX_TEXT_BYTES:
            raise DoubtError(f"{name} is larger than {MAX_TEXT_BYTES:,} bytes")
        is_caption = self._is_caption(name)
        return _Told(name, name, text if is_caption else None, None if is_caption else text)

    def _is_caption(self, name: str) -> bool:
        return self._members[_ending(name, self._members)] == "caption"

    def _read_table(self, name: str, read: ReadText) -> Table:
        try:
            data = read(name)
        except OSError as error:
            raise SourceError(f"cannot read {name}: {error.strerror}") from error
        return read_table(name, data, self._caption)

    def _note(self, tables: Mapping[str, Table], beside: "_Beside", prefix: str) -> None:
        self._left += [prefix + name for name in beside.names - beside.used]
        if self._caption is None:
            self._table_remarks += [remark for name, table in tables.items() for remark in table.remarks(name)]
            return
        columns = {column for table in tables.values() for column in table.columns}
        self._has_captions |= column_name(self._caption) in columns or any(map(self._is_caption, beside.names))


def is_table(name: str) -> bool:
    """Whether a file of this path is a table of the photos in its folder."""
    return posixpath.basename(name).lower() in TABLES


@dataclass(frozen=True, slots=True)
class _Told:
    """What one place tells of a photo: its caption, its label, or why it must not be taken."""

    where: str
    key: str
    caption: str | None
    label: str | None
    reason: str | None = None


class _Beside:
    """The texts beside photos, found by the name of a photo."""

    def __init__(self, names: Iterable[str], endings: tuple[str, ...]) -> None:
        self.names, self.used = set(names), set[str]()
        self._endings = endings
        self._alike: defaultdict[str, list[str]] = defaultdict(list)
        for name in sorted(self.names):
            ending = _ending(name, endings)
            self._alike[_same(name[: -len(ending)]) + ending].append(name)

    def of(self, name: str) -> list[str]:
        """The texts that are called `name` and an ending."""
        found = [text for ending in self._endings for text in self._alike.get(_same(name) + ending, ())]
        self.used.update(found)
        return found


def _shared(key: str, beside: _Beside, sharing: Mapping[str, int]) -> list[str]:
    stem = _stem(_same(key))
    found = beside.of(stem)
    if found and sharing[stem] > 1:
        raise DoubtError(f"{found[0]} fits other photos, too; call what belongs to this one {key}.txt")
    return found


def _lines_by_key(tables: Mapping[str, Table]) -> dict[str, list[_Told]]:
    found: dict[str, list[_Told]] = {}
    for name, table in tables.items():
        for row in table.rows:
            key = posixpath.normpath(posixpath.join(posixpath.dirname(name), row.path))
            told = _Told(f"{name}, line {row.number}", key, row.caption, row.label, row.reason)
            found.setdefault(_same(key), []).append(told)
    return found


def _agreed(told: Iterable[_Told], member: str) -> str | None:
    told = list(told)
    if unclear := next((each for each in told if each.reason), None):
        raise DoubtError(f"{unclear.where}: {unclear.reason}")
    places = {getattr(each, member): each.where for each in told if getattr(each, member) is not None}
    if len(places) > 1:
        raise DoubtError(_differing(member, sorted(places.values())))
    return next(iter(places), None)


def _differing(member: str, places: list[str]) -> str:
    hint = "; --caption names the ending or the column that is meant" if member == "caption" else ""
    return f"it has {member}s that differ, in {' and '.join(places)}{hint}"


def _ending(name: str, endings: Iterable[str]) -> str:
    return next(ending for ending in endings if name.lower().endswith(ending))


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _same(name: str) -> str:
    """A name in the one of Unicode's forms in which names are compared: systems differ in which they store."""
    return name if name.isascii() else normalize("NFC", name)
