"""Captions and labels: which file beside a photo, or which line of a table, speaks of it. In doubt none does."""

import json
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from unicodedata import normalize

from sdvae.errors import SourceError
from sdvae.sources.entries import DoubtError, Entry, as_text, some_of, why_unsafe
from sdvae.sources.kinds import can_be_read
from sdvae.sources.tables import CAPTIONS, Table, column_name, read_table

TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of Hugging Face's imagefolder
_JSON = ".json"
MAX_TEXT_BYTES = 2**20  # more is no caption

ReadText = Callable[[str], bytes]  # the bytes of a text; OSError with a `strerror`


class Pairing:
    """Finds the captions and labels of photos, in one folder or in one archive after the other.

    Captions are files that end in `.txt` or `.caption`, and the columns `caption` or `text` of tables and of JSON files
    beside photos. `caption` names the ending (`.tags`) or the column (`prompt`) that is meant instead.
    """

    def __init__(self, caption: str | None = None) -> None:
        self._caption = caption
        endings = ("." + caption.lower().removeprefix("."),) if caption else (".txt", ".caption")
        self._columns = (column_name(caption),) if caption and _JSON not in endings else CAPTIONS
        self._endings = tuple(dict.fromkeys((*endings, ".cls", _JSON)))
        self._has_captions = False
        self.aside: list[str] = []  # JSON files that say nothing of photos
        self._telling_json: set[str] = set()
        self._left: list[str] = []
        self._table_remarks: list[str] = []

    def is_text(self, name: str) -> bool:
        """Whether a file of this path may tell something about photos."""
        return name.lower().endswith(self._endings) or is_table(name)

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
        beside = _Beside((name for name in texts if name not in tables), self._endings)
        own = {entry.key: beside.of(entry.key) for entry in photos}
        sharing = Counter(_stem(_same(key)) for key in own if can_be_read(key) and all(map(_is_json, own[key])))
        alike = Counter(_same(key) for key in own)
        paired: list[Entry] = []
        for entry in photos:
            told = lines.pop(_same(entry.key), [])
            try:
                if alike[_same(entry.key)] > 1:
                    raise DoubtError("another photo has the same name in another of Unicode's forms; rename one")
                if not entry.reason:
                    told = [*told, *self._told_beside(entry.key, own[entry.key], beside, sharing, read)]
                paired.append(entry if entry.reason else _with(entry, told))
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

    def _told_beside(
        self, key: str, own: Sequence[str], beside: "_Beside", sharing: Mapping[str, int], read: ReadText
    ) -> "list[_Told]":
        """What the texts called `a.jpg.txt` tell, or else those called `a.txt`."""
        if told := self._telling(own, read):
            return told
        stem = _stem(_same(key))
        told = self._telling(beside.of(stem), read)
        if told and sharing[stem] > 1:
            raise DoubtError(f"{told[0].where} fits other photos, too; call what belongs to this one {key}.txt")
        return told

    def _telling(self, names: Sequence[str], read: ReadText) -> "list[_Told]":
        told = (self._read_beside(name, read) for name in names)
        return [each for each in told if each.caption is not None or each.label is not None]

    def _read_beside(self, name: str, read: ReadText) -> "_Told":
        ending = _ending(name, self._endings)
        if ending == ".cls":
            return _Told(name, name, None, read_caption(name, read))
        if ending != _JSON:
            return _Told(name, name, read_caption(name, read), None)
        return _Told(name, name, self._caption_in_json(name, read), None)

    def _caption_in_json(self, name: str, read: ReadText) -> str | None:
        """What a JSON file says under the names of captions; most that lie beside photos say other things."""
        data = _read(name, read)
        try:
            values = json.loads(data) if len(data) <= MAX_TEXT_BYTES else None
        except (ValueError, RecursionError):
            return None
        members = values.items() if isinstance(values, dict) else ()
        captions = [value for member, value in members if column_name(member) in self._columns and value is not None]
        if not captions:
            return None
        self._telling_json.add(name)
        self._has_captions = True
        if any(other != captions[0] for other in captions):
            raise DoubtError(f"{name} has captions that differ; --caption names the one that is meant")
        return as_text(captions[0], "caption")

    def _read_table(self, name: str, read: ReadText) -> Table:
        try:
            data = read(name)
        except OSError as error:
            raise SourceError(f"cannot read {name}: {error.strerror}") from error
        return read_table(name, data, self._caption)

    def _note(self, tables: Mapping[str, Table], beside: "_Beside", prefix: str) -> None:
        silent = set(filter(_is_json, beside.names)) - self._telling_json
        self.aside += [prefix + name for name in silent]
        self._left += [prefix + name for name in beside.names - beside.used - silent]
        self._telling_json.clear()
        if self._caption is None:
            self._table_remarks += [remark for name, table in tables.items() for remark in table.remarks(name)]
            return
        columns = {column for table in tables.values() for column in table.columns}
        is_there = any(_ending(name, self._endings) not in (".cls", _JSON) for name in beside.names)
        self._has_captions |= column_name(self._caption) in columns or is_there


def read_caption(name: str, read: ReadText) -> str:
    """The text of a caption file; DoubtError for one that cannot be read, is no UTF-8 or too long."""
    data = _read(name, read)
    if len(data) > MAX_TEXT_BYTES:
        raise DoubtError(f"{name} is larger than {MAX_TEXT_BYTES:,} bytes")
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DoubtError(f"{name} is not UTF-8") from error


def _read(name: str, read: ReadText) -> bytes:
    try:
        return read(name)
    except OSError as error:
        raise DoubtError(f"{name} cannot be read: {error.strerror}") from error


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


def _with(entry: Entry, told: Sequence[_Told]) -> Entry:
    caption, label = _agreed(told, "caption"), _agreed(told, "label")
    return replace(entry, caption=caption, label=entry.label if label is None else label)


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


def _is_json(name: str) -> bool:
    return name.lower().endswith(_JSON)


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _same(name: str) -> str:
    """A name in the one of Unicode's forms in which names are compared: systems differ in which they store."""
    return name if name.isascii() else normalize("NFC", name)
