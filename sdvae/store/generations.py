"""Generations: what each says of records that older ones placed, and the view that all of them make together.

A change names a record by its place, as the deletion vectors of Delta Lake and the overlays of Lance do: whoever reads
a view needs the changes alone, not the keys of all records.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sdvae.sealed import canonical_json
from sdvae.store.records import Line, Record

Place = tuple[int, int]  # a shard, and the number of a record in it
View = Mapping[int, Mapping[int, "Change"]]  # by shard and record: where the index alone does not say what holds


@dataclass(frozen=True, slots=True)
class Change:
    """What a generation says of a record of an older one: its name and texts from now on, or that it is retired."""

    shard: int
    record: int
    key: str
    uri: str
    caption: str | None
    label: str | None
    is_retired: bool = False

    @classmethod
    def of(cls, place: Place, record: Record, is_retired: bool = False) -> "Change":
        """The latents at `place` are those of `record`, or were until now."""
        return cls(*place, record.key, record.uri or record.key, record.caption, record.label, is_retired)

    @property
    def texts(self) -> dict[str, Any]:
        """The members of the index that it replaces."""
        return {"key": self.key, "uri": self.uri, "caption": self.caption, "label": self.label}

    def line(self) -> bytes:
        """Its line in the roster."""
        place = {"shard": self.shard, "record": self.record}
        return canonical_json(self.texts | place | {"is_retired": self.is_retired})


def parse_changes(data: bytes) -> list[Change]:
    """The inverse of `Change.line`, line by line."""
    names = ("shard", "record", "key", "uri", "caption", "label", "is_retired")
    return [Change(*(line[name] for name in names)) for line in map(json.loads, data.splitlines())]


def fold(changes: Iterable[Change]) -> View:
    """The view after these changes, the oldest first: of each place the newest holds."""
    view: defaultdict[int, dict[int, Change]] = defaultdict(dict)
    for change in changes:
        view[change.shard][change.record] = change
    return dict(view)


def viewed(lines: Iterable[Line], changes: Mapping[int, Change]) -> list[Line]:
    """The lines of an index as a view has them, without retired records."""
    changed = ((changes.get(number), line) for number, line in enumerate(lines))
    return [line | change.texts if change else line for change, line in changed if not (change and change.is_retired)]


@dataclass(frozen=True, slots=True)
class Known:
    """A record that a store has, as a view names it."""

    place: Place
    record: Record
    is_retired: bool


@dataclass
class Difference:
    """What a source has that the view of a store has not, and what the next generation says of it; all by key."""

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)  # other bytes
    vanished: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)  # the new keys
    texts: list[str] = field(default_factory=list)  # another caption, label or place in the source
    to_encode: list[Record] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    num_before: int = 0  # records in the view

    def __bool__(self) -> bool:
        return bool(self.to_encode or self.changes)

    def keys(self) -> dict[str, list[str]]:
        """The keys of each kind."""
        return {
            "added": self.added, "changed": self.changed, "vanished": self.vanished, "renamed": self.renamed,
            "texts": self.texts,
        }  # fmt: skip

    def counts(self) -> dict[str, int]:
        """How many records of each kind."""
        return {kind: len(keys) for kind, keys in self.keys().items()}


def compare(
    known: Iterable[Known],
    planned: Iterable[Record],
    has_latents: Callable[[Place], bool],
    is_kept: Callable[[str], bool] = lambda key: False,
) -> Difference:
    """What makes the view of a store that of a source with the records `planned`.

    Latents that no record of the view has any longer are taken for a photo of the same bytes: a renamed one, or one
    that is back. `has_latents` says where there are some already. Keys that `is_kept` names do not count as vanished.
    """
    found, idle = Difference(), _Idle()
    unseen = {record.key: record for record in planned}
    again: list[Record] = []
    for one in known:
        if one.is_retired:
            idle.add(one)
            continue
        found.num_before += 1
        now = unseen.pop(one.record.key, None)
        if now is None:
            if not is_kept(one.record.key):
                idle.add(one)
        elif _content(now) != _content(one.record):
            idle.add(one)
            again.append(now)
        elif _texts(now) != _texts(one.record):
            found.texts.append(now.key)
            found.changes.append(Change.of(one.place, now))
    found.changed = sorted(record.key for record in again)
    gone = {record.key for record in idle.leaving.values()}.difference(found.changed)
    for record in sorted([*again, *unseen.values()], key=lambda record: record.key):
        place = idle.take(record, has_latents)
        if place is None:
            found.to_encode.append(record)
        else:
            found.changes.append(Change.of(place, record))
        was = idle.leaving.pop(place, None) if place else None
        if record.key in unseen and was is not None and was.key in gone:
            gone.remove(was.key)
            found.renamed.append(record.key)
        elif record.key in unseen:
            found.added.append(record.key)
    found.changes += [Change.of(place, record, is_retired=True) for place, record in idle.leaving.items()]
    found.changes.sort(key=lambda change: (change.shard, change.record))
    found.vanished = sorted(gone)
    return found


class _Idle:
    """Latents that no photo has any longer: of retired records, and of those in `leaving`, which are to be."""

    def __init__(self) -> None:
        self.leaving: dict[Place, Record] = {}
        self._places: defaultdict[tuple[Any, ...], list[Place]] = defaultdict(list)

    def add(self, one: Known) -> None:
        self._places[_content(one.record)].append(one.place)
        if not one.is_retired:
            self.leaving[one.place] = one.record

    def take(self, record: Record, has_latents: Callable[[Place], bool]) -> Place | None:
        """A place whose latents are those of this photo; nobody else gets it."""
        places = self._places.get(_content(record), [])
        place = next(filter(has_latents, places), None)
        if place is not None:
            places.remove(place)
        return place


def name_known(placed: Iterable[tuple[int, Record]], view: View) -> Iterator[Known]:
    """The records of rosters, each with its shard and in their order, as a view names them."""
    numbers: defaultdict[int, int] = defaultdict(int)
    for shard, record in placed:
        place = (shard, numbers[shard])
        numbers[shard] += 1
        change = view.get(shard, {}).get(place[1])
        if change is None:
            yield Known(place, record, False)
        else:
            yield Known(place, replace(record, **change.texts), change.is_retired)


def _content(record: Record) -> tuple[Any, ...]:
    """All that latents follow from, besides the settings of the store."""
    return (
        record.source_bytes, record.source_sha256, record.original_px, record.geometry, record.step, record.reason,
    )  # fmt: skip


def _texts(record: Record) -> tuple[Any, ...]:
    return record.uri or record.key, record.caption, record.label
