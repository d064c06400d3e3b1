"""Photos in Parquet and Arrow files: Hugging Face datasets, downloaded, saved, or on the hub."""

import errno
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

from sdvae.errors import SourceError
from sdvae.sources.entries import Entry, absolute, failing_as_one_photo, sorted_by_key, why_no_file

SUFFIXES = (".parquet", ".arrow")
_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes")  # columns of binaries that hold image files
_NUM_GROUPS = 4
_CAPTIONS = ("caption", "text")


class ArrowSource:
    """The rows of one table, of several that are one dataset, or of many that a pattern names.

    A record's key is the number of its row; with a pattern, the path of the table below `root`, without its suffix,
    stands before it. Images are a column of Hugging Face's feature `Image`, of structs with `bytes`, or of binaries;
    captions are `caption` or `text`; labels are `label`, by name where the table knows names.

    `tables` are the files of each prefix, relative to `root`. With `is_local` a row may name a file instead of holding
    it: the library that wrote the table put it there.
    """

    def __init__(self, root: Path, tables: Mapping[str, Sequence[str]], *, is_local: bool = False) -> None:
        self.name, self._root = str(root), absolute(root)
        self.root: Path | None = self._root
        self._tables = {prefix: tuple(paths) for prefix, paths in tables.items()}
        self._is_local = is_local
        self._known_starts: dict[str, list[int]] = {}

    def entries(self) -> list[Entry]:
        """Every row with an image, sorted by key. `num_bytes` is 0: only reading an image tells its length."""
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
        if data is None and path and self._is_local:
            if reason := why_no_file(Path(path).stat()):
                raise OSError(errno.EINVAL, reason)
            return Path(path).read_bytes()
        if data is None:
            raise OSError(errno.ENODATA, "the row holds no image" + (", only the name of a file" if path else ""))
        return bytes(data)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_known_starts": {}}

    def _entries(self, prefix: str) -> Iterator[Entry]:
        for path, start in zip(self._tables[prefix], self._starts(prefix), strict=False):
            table = self._open(path)
            mtime_ns = table.path.stat().st_mtime_ns
            texts = zip(table.texts(_CAPTIONS), table.texts(("label",)), strict=True)
            for row, (caption, label) in enumerate(texts):
                key, uri = f"{prefix}{start + row:09d}", f"{table.path.name if path == '.' else path}#{row}"
                yield Entry(key, 0, mtime_ns, uri=uri, caption=caption, label=label)

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
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        self._read_group = lru_cache(maxsize=_NUM_GROUPS)(self._read_group_now)
        self._lock = Lock()
        try:
            if path.suffix == ".parquet":
                self._file = pq.ParquetFile(path)
                self._schema = self._file.schema_arrow
                sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
                self._starts = [0, *accumulate(sizes)]
            else:
                self._table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
                self._schema = self._table.schema
        except pa.ArrowInvalid as error:
            raise SourceError(f"{path} is damaged or no table ({error}); fetch it again") from error
        except OSError as error:
            raise SourceError(f"cannot read {path}: {error.strerror}") from error
        self._image_column = self._find_image_column()

    def image(self, row: int) -> Any:
        if self.path.suffix != ".parquet":
            return self._table.column(self._image_column)[row].as_py()
        number = bisect_right(self._starts, row) - 1
        with self._lock:
            group = self._read_group(number)
        return group[row - self._starts[number]].as_py()

    def _read_group_now(self, number: int) -> Any:
        try:
            return self._file.read_row_group(number, columns=[self._image_column], use_threads=False).column(0)
        except OSError as error:  # pyarrow's own, for bytes that do not decompress
            raise SourceError(f"{self.path} is damaged ({error}); fetch it again") from error

    def texts(self, names: Sequence[str]) -> list[str | None]:
        """The column that has one of `names`, as texts; None for every row where there is no such column."""
        found = [name for name in names if name in self._schema.names]
        if len(found) > 1:
            raise SourceError(
                f"{self.path} has the columns {' and '.join(map(repr, found))}; keep the one that is meant"
            )
        if not found:
            return [None] * self.num_rows
        values = self._column(found[0]).to_pylist()
        classes = self._features.get(found[0], {}).get("names")
        if classes:
            return [None if value is None or value < 0 else classes[value] for value in values]
        if odd := next((value for value in values if not isinstance(value, str | int | None)), None):
            raise SourceError(f"{self.path} has {type(odd).__name__}s in column {found[0]!r}, which are no texts")
        return [None if value is None else str(value) for value in values]

    @property
    def num_rows(self) -> int:
        return int(self._starts[-1] if self.path.suffix == ".parquet" else self._table.num_rows)

    def _column(self, name: str) -> Any:
        if self.path.suffix == ".parquet":
            return self._file.read(columns=[name], use_threads=False).column(0)
        return self._table.column(name)

    @cached_property
    def _features(self) -> Mapping[str, Any]:
        metadata = (self._schema.metadata or {}).get(b"huggingface", b"{}")
        features: Mapping[str, Any] = json.loads(metadata).get("info", {}).get("features", {})
        return features

    def _find_image_column(self) -> str:
        import pyarrow as pa

        declared = [name for name, feature in self._features.items() if feature.get("_type") == "Image"]
        structs = [
            field.name for field in self._schema if pa.types.is_struct(field.type) and "bytes" in _names(field.type)
        ]
        binaries = [field.name for field in self._schema if _is_binary(field.type)]
        named = [name for name in binaries if name.lower() in _IMAGES]
        for found in (declared, structs, named, binaries):
            if len(found) == 1:
                return found[0]
            if found:
                raise SourceError(f"{self.path} has images in {', '.join(found)}; keep the column that is meant")
        raise SourceError(f"{self.path} has no column of images, only {', '.join(self._schema.names)}")


def _names(kind: Any) -> list[str]:
    return [kind.field(i).name for i in range(kind.num_fields)]


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def open_tables(root: Path, paths: Sequence[str]) -> ArrowSource:
    """Tables that a pattern names, each a part of the dataset under its own name."""
    tables = {f"{Path(path).with_suffix('').as_posix()}/": [path] for path in paths}
    if len(tables) < len(paths):
        raise SourceError(f"two tables in {root} have one name but for the suffix; rename one")
    source = ArrowSource(root, tables)
    source.root = None  # what lies beside the tables is no part of the source: the store may
    return source


def open_saved(folder: Path) -> ArrowSource:
    """What `Dataset.save_to_disk` wrote into `folder`."""
    splits = folder / "dataset_dict.json"
    if splits.exists():
        names = ", ".join(str(folder / split) for split in json.loads(splits.read_bytes())["splits"])
        raise SourceError(f"{folder} holds several splits; give one of them: {names}")
    state = json.loads((folder / "state.json").read_bytes())
    return ArrowSource(folder, {"": [file["filename"] for file in state["_data_files"]]})


def open_hub(name: str) -> ArrowSource:
    """A dataset of the Hugging Face hub, `org/name` or `org/name/config`, with or without `:split`; else SourceError.

    It is downloaded into the library's cache, and read there.
    """
    from datasets import Dataset, load_dataset

    where, _, split = name.partition(":")
    organisation, _, rest = where.partition("/")
    dataset, _, config = rest.partition("/")
    if not (organisation and dataset):
        raise SourceError(f"hf://{name} is no dataset; write hf://org/name, or hf://org/name/config:split")
    try:
        loaded = load_dataset(f"{organisation}/{dataset}", config or None, split=split or None)
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot load hf://{name}: {error}") from error
    if not isinstance(loaded, Dataset):
        if len(loaded) > 1:
            raise SourceError(
                f"hf://{name} has the splits {', '.join(loaded)}; give one: hf://{where}:{next(iter(loaded))}"
            )
        (loaded,) = loaded.values()
    files = [Path(file["filename"]) for file in loaded.cache_files]
    source = ArrowSource(files[0].parent, {"": [file.name for file in files]}, is_local=True)
    source.name = f"hf://{name}"
    return source
