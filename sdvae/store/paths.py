"""Where each file of a store lies, and which files are a store's own."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from sdvae import atomic
from sdvae.store.buckets import Size

_OWN_FOLDERS = ("roster", "shards", "index", "done", "journal")
_OWN_FILE = re.compile(
    r"manifest\.json|quarantine\.jsonl|roster/\d{5,}\.jsonl?"
    r"|journal/((scan|timings|changes-\d{5,})\.jsonl|(manifest|listing)\.json|lock|\d{5,}-\d{5,}\.batch)"
    r"|shards/\d{5,}-\d+x\d+\.safetensors|index/\d{5,}\.jsonl|done/\d{5,}\.json"
    r"|streams/[a-z][a-z0-9_]*/(stream\.json|\d{5,}\.(json|safetensors))"
)


@dataclass(frozen=True)
class StorePaths:
    """Where each file of a store lies."""

    root: Path

    @property
    def manifest(self) -> Path:
        """What every shard has in common; never rewritten."""
        return self.root / "manifest.json"

    def roster(self, generation: int) -> Path:
        """Which record is in which shard."""
        return self.root / "roster" / f"{generation:05d}.jsonl"

    def generation(self, generation: int) -> Path:
        """The commit of a roster; in a store of version 1 that of the first is the manifest."""
        return self.root / "roster" / f"{generation:05d}.json"

    def changes(self, generation: int) -> Path:
        """A copy of a generation's changes, which nothing else could restore."""
        return self.journal / f"changes-{generation:05d}.jsonl"

    @property
    def quarantine(self) -> Path:
        """The records that were not encoded, with reasons; present when the store is finished."""
        return self.root / "quarantine.jsonl"

    @property
    def journal(self) -> Path:
        """Notes of the writer, which readers ignore."""
        return self.root / "journal"

    @property
    def timings(self) -> Path:
        """The journal of encoded shards: the time each took, and whether it was degraded."""
        return self.journal / "timings.jsonl"

    def batch(self, shard: int, number: int) -> Path:
        """A finished batch of a shard under way."""
        return self.journal / f"{shard:05d}-{number:05d}.batch"

    def batches(self, shard: int | None = None) -> list[Path]:
        """All that is kept of a shard under way, or of all of them."""
        pattern = "*.batch" if shard is None else f"{shard:05d}-*.batch"
        return [path for path in sorted(self.journal.glob(pattern)) if self._is_own(f"journal/{path.name}")]

    def stream(self, name: str) -> Path:
        """The folder of a stream."""
        return self.root / "streams" / name

    def tensors(self, number: int, bucket_px: Size) -> Path:
        """The numbers of a shard."""
        return self.root / "shards" / f"{number:05d}-{bucket_px[0]}x{bucket_px[1]}.safetensors"

    def index(self, number: int) -> Path:
        """The records of a shard."""
        return self.root / "index" / f"{number:05d}.jsonl"

    def done(self, number: int) -> Path:
        """The commit of a shard."""
        return self.root / "done" / f"{number:05d}.json"

    def committed(self) -> list[int]:
        """The numbers of the shards that have a commit, whole or not, in ascending order."""
        return sorted(
            int(path.stem) for path in self.done(0).parent.glob("*.json") if self._is_own(f"done/{path.name}")
        )

    def make_folders(self) -> None:
        """Make the root and the folders in it."""
        for name in _OWN_FOLDERS:
            atomic.make_folder(self.root / name)

    def contents(self) -> tuple[list[Path], list[Path]]:
        """All files below the root: those that a store writes, and others; a link is other, wherever it leads."""
        own: list[str] = []
        other: list[str] = []
        folders = [""] if self.root.is_dir() else []
        while folders:
            folder = folders.pop()
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    name = folder + entry.name
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{name}/")
                    else:
                        is_own = entry.is_file(follow_symlinks=False) and self._is_own(name)
                        (own if is_own else other).append(name)
        return [self.root / name for name in sorted(own)], [self.root / name for name in sorted(other)]

    def clear(self) -> None:
        """Remove the files of the store; a clearing that is killed leaves no commit without its manifest."""
        own, _ = self.contents()
        commits_first = sorted(own, key=lambda path: (path == self.manifest, path.parent.name != "done"))
        for path in commits_first:
            atomic.remove(path)

    def _is_own(self, name: str) -> bool:
        folder, _, file = name.rpartition("/")
        is_here = not folder or folder.partition("/")[0] in (*_OWN_FOLDERS, "streams")
        return _OWN_FILE.fullmatch(name) is not None or (is_here and atomic.is_temporary(file))
