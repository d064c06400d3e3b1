"""Photos in Parquet and Arrow files: Hugging Face datasets, downloaded, saved, or on the hub."""

import errno
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

from sdvae.errors import SourceError
from sdvae.sources.entries import (
    MAX_FILE_BYTES,
    PARSER_FAILURES,
    DoubtError,
    Entry,
    absolute,
    as_text,
    failing_as_one_photo,
    shown,
    sorted_by_key,
    why_no_file,
    why_no_name,
    why_unsafe,
)
from sdvae.sources.tables import CAPTIONS, column_name, no_captions

SUFFIXES = (".parquet", ".arrow")
_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes")  # columns of binaries that hold image files
_NUM_GROUPS = 4


class ArrowSource:
    """The rows of one table, of several that are one dataset, or of many that a pattern names.

    A record's key is the number of its row; with a pattern, the path of the table below `root`, without its suffix,
    stands before it. Images are a column of Hugging Face's feature `Image`, of structs with `bytes`, or of binaries;
    captions are `caption` or `text`, or the column that `caption` names; labels are `label`, by name where the table
    knows names.

    `tables` are the files of each prefix, relative to `root`. With `is_local` a row may name a file instead of holding
    it: the library that wrote the table put it there.
    """

    def __init__(
        self, root: Path, tables: Mapping[str, Sequence[str]], *, is_local: bool = False, caption: str | None = None
    ) -> None:
        self.name, self._root = str(root), absolute(root)
        self.root: Path | None = self._root
        self.remarks: Sequence[str] = ()
        self._caption = caption
        self._tables = {prefix: tuple(paths) for prefix, paths in tables.items()}
        self._is_local = is_local
        self._known_starts: dict[str, list[int]] = {}

    def entries(self) -> list[Entry]:
        """Every row with an image, sorted by key. `num_bytes` is 0: only reading an image tells its length."""
        first = next((self._open(path) for paths in self._tables.values() for path in paths), None)
        self.remarks = first.remarks() if first and self._caption is None else ()
        return sorted_by_key((entry for prefix in self._tables for entry in self._entries(prefix)), self.name)

    def read(self, key: str) -> bytes:
        """The image file of one row; OSError where the table cannot be read, or the row holds none."""
        folder, _, number = key.rpartition("/")
        prefix, row = folder + "/" if folder else "", int(number)
        with failing_as_one_photo():
            starts = self._starts(prefix)
            place = bisect_right(starts, row) - 1
            image = self._open(self._tables[prefix][place]).image(row - starts[place])
        data, path = (image.get("bytes"), image.get("path")) if isinstance(image, Mapping) else (image, None)
        if data is None and isinstance(path, str) and "\0" not in path and self._is_local:
            if reason := why_no_file(Path(path).stat()):
                raise OSError(errno.EINVAL, reason)
            with Path(path).open("rb") as file:
                return file.read(MAX_FILE_BYTES)
        if not isinstance(data, bytes):
            raise OSError(errno.ENODATA, "the row holds no image" + (", only the name of a file" if path else ""))
        return data

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_known_starts": {}}

    def _entries(self, prefix: str) -> Iterator[Entry]:
        for path, start in zip(self._tables[prefix], self._starts(prefix), strict=False):
            table = self._open(path)
            mtime_ns = table.path.stat().st_mtime_ns
            values = zip(table.captions(self._caption), table.labels(), strict=True)
            for row, (caption, label) in enumerate(values):
                key, uri = f"{prefix}{start + row:09d}", f"{table.path.name if path == '.' else path}#{row}"
                try:
                    told = {"caption": as_text(caption, "caption"), "label": as_text(label, "label")}
                except DoubtError as doubt:
                    told = {"reason": str(doubt)}
                yield Entry(key, 0, mtime_ns, uri=uri, **told)

    def _starts(self, prefix: str) -> list[int]:
        """The number of the first row of each table, and behind them that of all rows."""
        if prefix not in self._known_starts:
            sizes = (self._open(path).num_rows for path in self._tables[prefix])
            self._known_starts[prefix] = [0, *accumulate(sizes)]
        return self._known_starts[prefix]

    def _open(self, path: str) -> "_Table":
        place = self._root / path
        try:
            status = place.stat()
        except OSError as error:
            raise SourceError(f"cannot read {place}: {error.strerror}") from error
        return _open(place, (status.st_mtime_ns, status.st_size, os.getpid()))


@lru_cache(maxsize=4)  # by version: a file that changed is another, and a forked process opens its own
def _open(path: Path, version: tuple[int, ...]) -> "_Table":
    return _Table(path)


class _Table:
    """One file; of a Parquet file a few groups of rows are in memory, for threads that read neighbours."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_group = lru_cache(maxsize=_NUM_GROUPS)(self._read_group_now)
        self._lock = Lock()
        self._is_parquet = path.suffix.lower() == ".parquet"
        with self._failing():
            if self._is_parquet:
                self._open_parquet()
            else:
                self._table = _read_arrow(path)
                self._schema = self._table.schema
            self._columns = {name: number for number, name in enumerate(self._schema.names)}
            self._image_column = self._find_image_column()
            if not self._is_parquet:
                self._images = self._column(self._image_column)

    def image(self, row: int) -> Any:
        if not self._is_parquet:
            return self._images[row].as_py()
        number = bisect_right(self._starts, row) - 1
        with self._lock:
            group = self._read_group(number)
        return group[row - self._starts[number]].as_py()

    def captions(self, named: str | None) -> list[Any]:
        """The captions of all rows, each a text or None."""
        import pyarrow as pa

        columns = self._find((column_name(named),) if named else CAPTIONS)
        if named and not columns:
            raise SourceError(f"{self.path} has no column {named!r} of captions, only {', '.join(self._schema.names)}")
        if len(columns) > 1:
            raise SourceError(
                f"{self.path} has the columns {' and '.join(map(repr, columns))}; --caption names the one that is meant"
            )
        if not columns:
            return [None] * self.num_rows
        kind = self._schema.types[self._columns[columns[0]]]
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (_is_text(kind) or pa.types.is_null(kind)):
            raise SourceError(
                f"{self.path} has {kind} in column {columns[0]!r}, which is no text; "
                "make it a column of texts, or name another with --caption"
            )
        return self._values(columns[0])

    def labels(self) -> list[Any]:
        """The labels of all rows: names where the table knows them, or else what stands there."""
        columns = self._find(("label",))
        if len(columns) > 1:
            raise SourceError(
                f"{self.path} has the columns {' and '.join(map(repr, columns))}; keep the one that is meant"
            )
        if not columns:
            return [None] * self.num_rows
        classes = self._feature(columns[0]).get("names")
        values = self._values(columns[0])
        if not isinstance(classes, list):
            return values
        return [_class_name(value, classes) for value in values]

    def remarks(self) -> list[str]:
        """What there is to say where no column of captions was found, but other texts."""
        if self._find(CAPTIONS):
            return []
        kinds = zip(self._schema.names, self._schema.types, strict=True)
        others = frozenset(name for name, kind in kinds if _is_text(kind) and column_name(name) != "label")
        return [no_captions(self.path.name, others)] if others else []

    @property
    def num_rows(self) -> int:
        return int(self._starts[-1] if self._is_parquet else self._table.num_rows)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Run a parser of pyarrow's, and turn what it raises on a bad file into SourceError."""
        import pyarrow as pa

        try:
            yield
        except OSError as error:  # pyarrow's own has no number, for bytes that do not decompress
            why = f"cannot read {self.path}: {error.strerror}" if error.errno else self._damaged(error)
            raise SourceError(why) from error
        except (pa.ArrowException, *PARSER_FAILURES) as error:
            raise SourceError(self._damaged(error)) from error

    def _damaged(self, error: Exception) -> str:
        reason = " ".join(str(error).split())[:200]
        return f"{self.path} is damaged or no table ({reason}); fetch it again"

    def _open_parquet(self) -> None:
        import pyarrow.parquet as pq

        self._file = pq.ParquetFile(self.path)
        self._schema = self._file.schema_arrow
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        if min(sizes, default=0) < 0:
            raise SourceError(f"{self.path} is damaged; fetch it again")
        self._starts = [0, *accumulate(sizes)]

    def _read_group_now(self, number: int) -> Any:
        with self._failing():
            columns = self._file.read_row_group(number, columns=[self._image_column], use_threads=False)
            return self._whole(columns.column(0), self._starts[number + 1] - self._starts[number])

    def _values(self, name: str) -> list[Any]:
        with self._failing():
            values: list[Any] = self._column(name).to_pylist()
        return values

    def _column(self, name: str) -> Any:
        if not self._is_parquet:
            return self._whole(self._table.column(self._columns[name]), self.num_rows)
        return self._whole(self._file.read(columns=[name], use_threads=False).column(0), self.num_rows)

    def _whole(self, column: Any, num_rows: int) -> Any:
        column.validate(full=True)  # or offsets that lead out of it would be followed
        if len(column) != num_rows:
            raise SourceError(f"{self.path} is damaged: {len(column)} values for {num_rows} rows; fetch it again")
        return column

    def _find(self, names: Sequence[str]) -> list[str]:
        return [name for name in self._schema.names if column_name(name) in names]

    def _feature(self, name: str) -> Mapping[str, Any]:
        """What Hugging Face's metadata say of a column; metadata that make no sense say nothing."""
        feature = self._features.get(name)
        return feature if isinstance(feature, Mapping) else {}

    @cached_property
    def _features(self) -> Mapping[str, Any]:
        try:
            info = json.loads((self._schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        except PARSER_FAILURES:
            return {}
        return info if isinstance(info, Mapping) else {}

    def _find_image_column(self) -> str:
        import pyarrow as pa

        names = self._schema.names
        if len(self._columns) < len(names):
            raise SourceError(f"{self.path} has two columns of one name; keep the one that is meant")
        declared = [name for name in names if self._feature(name).get("_type") == "Image"]
        structs = [
            field.name for field in self._schema if pa.types.is_struct(field.type) and "bytes" in _names(field.type)
        ]
        binaries = [field.name for field in self._schema if _is_binary(field.type)]
        named = [name for name in binaries if name.lower() in _IMAGES]
        for found in (declared, structs, named, binaries):
            if len(found) == 1:
                return str(found[0])
            if found:
                raise SourceError(f"{self.path} has images in {', '.join(found)}; keep the column that is meant")
        raise SourceError(f"{self.path} has no column of images, only {', '.join(names)}")


def _read_arrow(path: Path) -> Any:
    """A table as `datasets` writes it, a stream, or as others do, a file with an index."""
    import pyarrow as pa

    memory = pa.memory_map(str(path))
    is_file = memory.read(6) == b"ARROW1"
    memory.seek(0)
    return (pa.ipc.open_file if is_file else pa.ipc.open_stream)(memory).read_all()


def _class_name(value: Any, classes: list[Any]) -> Any:
    if not isinstance(value, int) or value >= len(classes):
        return value
    return None if value < 0 else classes[value]  # -1 is a label that was held back


def _names(kind: Any) -> list[str]:
    return [kind.field(i).name for i in range(kind.num_fields)]


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def open_tables(root: Path, paths: Sequence[str], caption: str | None = None) -> ArrowSource:
    """Tables that a pattern names, each a part of the dataset under its own name."""
    tables = {f"{Path(path).with_suffix('').as_posix()}/": [path] for path in paths}
    if len(tables) < len(paths):
        raise SourceError(f"two tables in {root} have one name but for the suffix; rename one")
    source = ArrowSource(root, tables, caption=caption)
    source.root = None  # what lies beside the tables is no part of the source: the store may
    return source


def open_saved(folder: Path, caption: str | None = None) -> ArrowSource:
    """What `Dataset.save_to_disk` wrote into `folder`."""
    splits = folder / "dataset_dict.json"
    place = splits if splits.exists() else folder / "state.json"
    try:
        notes = json.loads(place.read_bytes())
        if place == splits:
            names = ", ".join(str(folder / split) for split in notes["splits"])
            raise SourceError(f"{folder} holds several splits; give one of them: {names}")
        files = [file["filename"] for file in notes["_data_files"]]
        outside = [name for name in files if why_unsafe(name) or why_no_name(name)]
    except OSError as error:
        raise SourceError(f"cannot read {place}: {error.strerror}") from error
    except PARSER_FAILURES as error:
        raise SourceError(f"{place} is damaged ({error}); save the dataset again") from error
    if outside:
        raise SourceError(f"{place} names {shown(outside[0])!r}, which does not lie in its folder; save it again")
    return ArrowSource(folder, {"": files}, caption=caption)


def open_hub(name: str, caption: str | None = None) -> ArrowSource:
    """A dataset of the Hugging Face hub, `org/name` or `org/name/config`, with or without `:split`; else SourceError.

    It is downloaded into the library's cache, and read there.
    """
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetsError

    where, _, split = name.partition(":")
    organisation, _, rest = where.partition("/")
    dataset, _, config = rest.partition("/")
    if not (organisation and dataset):
        raise SourceError(f"hf://{name} is no dataset; write hf://org/name, or hf://org/name/config:split")
    try:
        loaded = load_dataset(f"{organisation}/{dataset}", config or None, split=split or None)
    except (OSError, DatasetsError, *PARSER_FAILURES) as error:
        raise SourceError(f"cannot load hf://{name}: {error}") from error
    if not isinstance(loaded, Dataset):
        if len(loaded) > 1:
            raise SourceError(
                f"hf://{name} has the splits {', '.join(loaded)}; give one: hf://{where}:{next(iter(loaded))}"
            )
        (loaded,) = loaded.values()
    files = [Path(file["filename"]) for file in loaded.cache_files]
    if not files:
        raise SourceError(f"hf://{name} holds no photos")
    source = ArrowSource(files[0].parent, {"": [file.name for file in files]}, is_local=True, caption=caption)
    source.name = f"hf://{name}"
    return source
