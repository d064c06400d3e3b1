"""A dataset config of kohya-ss/sd-scripts (`--dataset_config my_dataset.toml`): the photos of all its subsets."""

import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from sdvae.errors import SourceError
from sdvae.sources.entries import (
    DoubtError,
    Entry,
    absolute,
    as_text,
    class_folder,
    failing_as_one_photo,
    shown,
    sorted_by_key,
    why_no_name,
    why_unsafe,
)
from sdvae.sources.folders import FolderSource
from sdvae.sources.kinds import remarks_on
from sdvae.sources.pairing import read_caption

SUFFIXES = (".toml",)
_TAKEN_OVER = {
    "subsets", "image_dir", "metadata_file", "caption_extension", "class_tokens", "enable_wildcard", "caption_separator"
}  # fmt: skip
_SIZES = {
    "resolution", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"
}  # fmt: skip


@dataclass(frozen=True)
class _Subset:
    """One folder of photos, and what the config says of their captions."""

    prefix: str  # of its keys: "cats/", or "" beside the config
    folder: Path
    options: Mapping[str, Any]  # its own before those of its dataset before the general ones
    metadata_file: Path | None = None


@dataclass
class _Found:
    entries: list[Entry] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)


class KohyaSource:
    """The photos of all subsets; keys are paths below the config, or below the folder of a subset that lies elsewhere.

    A photo's caption is what sd-scripts trains with before it shuffles and drops: the file beside it that ends in
    `caption_extension`, or else `class_tokens`, or what `metadata_file` says. `caption` names another ending. What is
    not taken over is named in `remarks`. A folder that several subsets name is taken once, as the first has it.
    """

    def __init__(self, path: Path, caption: str | None = None) -> None:
        self.name, self.root, self._caption = str(path), absolute(path), caption
        self.remarks: Sequence[str] = ()

    def __reduce__(self) -> tuple[type["KohyaSource"], tuple[Path, str | None]]:
        return type(self), (self.root, self._caption)

    def entries(self) -> list[Entry]:
        """Every photo of every subset, sorted by key."""
        entries, aside = list[Entry](), list[str]()
        for subset in self._subsets.values():
            found = self._with_metadata(subset) if subset.metadata_file else self._with_files(subset)
            entries += (
                replace(entry, key=subset.prefix + entry.key, label=class_folder(subset.prefix + entry.key))
                for entry in found.entries
            )
            aside += (subset.prefix + name for name in found.aside)
        self.remarks = [*self._not_taken_over(), *remarks_on(aside)]
        return sorted_by_key(entries, self.name)

    def read(self, key: str) -> bytes:
        """The bytes of one file; OSError as the file system gives it."""
        with failing_as_one_photo():
            prefix = max((prefix for prefix in self._subsets if key.startswith(prefix)), key=len)
            folder = FolderSource(self._subsets[prefix].folder)
        return folder.read(key[len(prefix) :])

    @cached_property
    def _config(self) -> dict[str, Any]:
        try:
            config = tomllib.loads(self.root.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise SourceError(f"cannot read {self.name}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{self.name} is no TOML: {error}") from error
        if not any(_tables(dataset.get("subsets")) for dataset in _tables(config.get("datasets"))):
            raise SourceError(f"{self.name} has no [[datasets.subsets]], as a dataset config of sd-scripts has")
        return config

    def _options(self) -> Iterator[dict[str, Any]]:  # of each subset
        general = self._config.get("general")
        for dataset in _tables(self._config["datasets"]):
            for subset in _tables(dataset.get("subsets")):
                yield (general if isinstance(general, dict) else {}) | dataset | subset

    @cached_property
    def _subsets(self) -> dict[str, _Subset]:
        subsets: dict[str, _Subset] = {}
        for options in self._options():
            if options.get("num_repeats", 1) == 0:  # sd-scripts leaves such a subset out
                continue
            metadata_file = options.get("metadata_file")
            if not isinstance(options.get("image_dir"), str):
                raise SourceError(f"{self.name} has a subset without image_dir, the folder of its photos; add it")
            folder = self._place(options["image_dir"])
            if not folder.is_dir():
                raise SourceError(f"{self.name}: there is no folder {options['image_dir']}, an image_dir")
            prefix = self._prefix(folder)
            subset = _Subset(prefix, folder, options, metadata_file and self._place(str(metadata_file)))
            if subsets.setdefault(prefix, subset).folder != folder:
                raise SourceError(
                    f"{self.name} has two subsets called {prefix[:-1]}, {subsets[prefix].folder} and {folder}: "
                    "rename one, or put the config into a folder above both"
                )
        self._require_unmistakable(subsets)
        return subsets

    def _require_unmistakable(self, subsets: Mapping[str, _Subset]) -> None:
        """Refuse a metadata file whose photos in deeper folders could be taken for those of another subset."""
        for above in (subset for subset in subsets.values() if subset.metadata_file):
            for subset in subsets.values():
                is_below = subset.prefix.startswith(above.prefix)
                if is_below and subset.folder != above.folder / subset.prefix[len(above.prefix) :]:
                    raise SourceError(
                        f"{self.name}: the photos of {subset.folder} could be confused with those of {above.folder}; "
                        "put the config into a folder above both"
                    )

    def _place(self, path: str) -> Path:
        """Where a path of the config leads: from its folder, or else, as in sd-scripts, from the current one."""
        beside = self.root.parent / path
        return absolute(beside if beside.exists() else Path(path))

    def _prefix(self, folder: Path) -> str:
        home = self.root.parent.resolve()
        below = folder.relative_to(home).as_posix() if folder.is_relative_to(home) else folder.name
        return "" if below == "." else below + "/"

    def _with_files(self, subset: _Subset) -> _Found:
        ending = str(self._caption or subset.options.get("caption_extension", ".caption"))
        ending = "." + ending.removeprefix(".")
        names = [child.name for child in os.scandir(subset.folder) if not child.is_dir()]
        folder = FolderSource(subset.folder, names)
        listing = folder.listing(lambda name: name.endswith(ending))
        texts, found = set(listing.texts), _Found(aside=listing.aside)
        for entry in listing.photos:
            text = str(PurePosixPath(entry.key).with_suffix(ending))
            try:
                told = read_caption(text, folder.read_text) if text in texts else None
                found.entries.append(replace(entry, caption=_of_lines(told, subset.options)))
            except DoubtError as doubt:
                found.entries.append(replace(entry, reason=entry.reason or str(doubt)))
        return found

    def _with_metadata(self, subset: _Subset) -> _Found:
        assert subset.metadata_file is not None
        told = dict(self._read_metadata(subset))
        found, missing = _Found(), f"{subset.metadata_file.name} names it, but there is no such photo"
        unsafe = {name: why_no_name(name) or why_unsafe(name) for name in told}
        names = [name for name in told if not unsafe[name] and (subset.folder / name).parent.is_dir()]
        listing = FolderSource(subset.folder, names).listing(lambda name: False)
        photos = {entry.key: entry for entry in listing.photos}
        for name, values in told.items():
            entry = photos.get(name, Entry(shown(name), reason=unsafe[name] or missing))
            separator = str(subset.options.get("caption_separator", ","))
            try:
                texts = (as_text(values.get(member), "caption") for member in ("caption", "tags"))
                caption = separator.join(text for text in texts if text)
                found.entries.append(replace(entry, caption=caption))
            except DoubtError as doubt:
                found.entries.append(replace(entry, reason=entry.reason or str(doubt)))
        return found

    def _read_metadata(self, subset: _Subset) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The photos that a metadata file names, as paths below the folder of the subset, and what it says of each."""
        path = subset.metadata_file
        assert path is not None
        try:
            text = path.read_text(encoding="utf-8-sig")
            if path.suffix == ".jsonl":
                lines = [json.loads(line) for line in text.splitlines() if line.strip()]
                metadata = {line["image_path"]: line for line in lines}
            else:
                metadata = json.loads(text)
            for name, values in metadata.items():
                place = Path(os.path.normpath(subset.folder / name))
                is_below = place.is_relative_to(subset.folder)
                yield place.relative_to(subset.folder).as_posix() if is_below else name, dict(values)
        except OSError as error:
            raise SourceError(f"{self.name}: cannot read {path.name}, a metadata_file: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise SourceError(f"{self.name}: {path.name} is no metadata_file of sd-scripts ({error})") from error

    def _not_taken_over(self) -> list[str]:
        named = {name for options in self._options() for name in options}
        folders = [self._place(options["image_dir"]) for options in self._options() if "image_dir" in options]
        left = [
            f"{name} (here: --size, --buckets)" if name == "resolution" else name
            for name in sorted(named - _TAKEN_OVER)
        ]
        remarks = [f"not taken over from {self.root.name}, tell the trainer again: {', '.join(left)}"] if left else []
        if len(set(folders)) < len(folders):
            remarks.append(f"{self.root.name} names a folder in several subsets; its photos are taken once")
        return remarks


def _of_lines(caption: str | None, options: Mapping[str, Any]) -> str | None:
    """What sd-scripts takes of a caption file: its first line, or with wildcards all of them."""
    if caption is None:
        class_tokens = options.get("class_tokens")
        return None if class_tokens is None else str(class_tokens)
    lines = [line.strip() for line in caption.splitlines()]
    return "\n".join(filter(None, lines)) if options.get("enable_wildcard") else next(iter(lines), "")


def _tables(value: Any) -> list[dict[str, Any]]:
    return [table for table in value if isinstance(table, dict)] if isinstance(value, list) else []
