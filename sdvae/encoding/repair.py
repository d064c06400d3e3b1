"""A damaged store restored, byte for byte: all but the numbers follows from what else the store holds.

What follows from what: manifest.json and the changes of a roster have copies in the journal; the rest of a roster
follows from the indexes, the commit of a roster from that roster, an index from roster, numbers and quarantine, a
`done` from index and numbers, the quarantine from the indexes. Nothing is written that a digest elsewhere, or a second
derivation, does not confirm. Numbers are in no other file: the photos have to be encoded again.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from sdvae import atomic, sealed
from sdvae.config import VAEConfig
from sdvae.encoding.manifest import require_same_vae
from sdvae.encoding.tasks import encode_tasks
from sdvae.errors import StoreError, VerifyError
from sdvae.journal import read_journal
from sdvae.progress import Progress, silent
from sdvae.sources.entries import Source
from sdvae.store.generations import Change, View, parse_changes
from sdvae.store.paths import StorePaths
from sdvae.store.records import Line, Record, quarantined_line, read_roster, written_line
from sdvae.store.roster import Roster, Task, roster_lines
from sdvae.store.shard import CommittedFile, TensorPlaces, row_sha256, shard_files
from sdvae.store.store import OLD_VERSION, Store, seal_generation
from sdvae.store.verify import Damage, Verdict, verify
from sdvae.vae import VAE


@dataclass(frozen=True)
class Repair:
    """What `repair` could do."""

    restored: list[Path]
    verdict: Verdict  # of the store as it is now


@dataclass(frozen=True)
class Photos:
    """What lost numbers are encoded from again; the VAE is loaded for the dtype ("bf16") the store was computed in."""

    source: Source
    load_vae: Callable[[str], VAE]


def repair(root: Path, photos: Photos | None = None, progress: Progress = silent) -> Repair:
    """Restore what `verify` finds damaged in `root`; shards that are not encoded yet are left to who encodes.

    Without `photos`, lost numbers stay lost. Raises StoreError, with the differences listed, where photos, VAE or
    machine are not those that the store was made with. After a kill it may be run again.
    """
    paths = StorePaths(root)
    restored: list[Path] = []
    verdict = verify(root, progress)
    while (path := verdict.stopped_at) and path not in restored and _restore_foundation(paths, path):
        restored.append(path)
        verdict = verify(root, progress)
    before = [damage.path for damage in verdict.damages]
    if not verdict.stopped_at:
        _restore_contents(Store.open(root), verdict.damages, photos)
        verdict = verify(root, progress)
    still = {damage.path for damage in verdict.damages}
    return Repair([*restored, *(path for path in before if path not in still)], verdict)


def remedy(damage: Damage) -> str:
    """What a person can still do about a file that `repair` left damaged."""
    if damage.path.parent.parent.name == "streams":
        return "it was attached, or made from pictures of yours; remove its folder, and make the stream again"
    match damage.path.parent.name, damage.path.suffix:
        case "roster", ".jsonl":
            return (
                "it follows from the indexes of all its shards, and its changes from their copy in journal/; mend or "
                "encode those first"
            )
        case "roster", _:
            return "it follows from the roster beside it and the indexes of all its shards; mend those first"
        case (("shards" | "index" | "done"), _):
            return "its numbers are in no other file; name the photos and the VAE: --repair --source SRC --vae VAE"
    if damage.path.name == "quarantine.jsonl":
        return "it follows from the indexes; mend those first"
    return "its copy in journal/ is gone or damaged, too; put back a copy of your own, or encode into a new folder"


# --- Manifest and commits of rosters: what everything else rests on ---


def _restore_foundation(paths: StorePaths, path: Path) -> bool:
    return _restore_manifest(paths) if path == paths.manifest else _restore_generation(paths, int(path.stem))


def _restore_manifest(paths: StorePaths) -> bool:
    copy = paths.journal / "manifest.json"
    data = copy.read_bytes() if copy.is_file() else b""
    committed = [*paths.done(0).parent.glob("*.json"), *paths.generation(0).parent.glob("*.json")]
    commits = [sealed.unseal(path.read_bytes()) for path in committed]
    named = {commit["manifest_sha256"] for commit in commits if commit}
    if sealed.unseal(data) is None or not named <= {hashlib.sha256(data).hexdigest()}:
        return False
    atomic.write_bytes(paths.manifest, data)
    return True


def _restore_generation(paths: StorePaths, generation: int) -> bool:
    path = paths.roster(generation)
    data = path.read_bytes() if path.is_file() else b""
    header = _parse(data.partition(b"\n")[0])
    if header is None or _roster_bytes(paths, header) != data:
        return False
    commit = seal_generation(Store.open(paths.root), header, hashlib.sha256(data).hexdigest(), len(data))
    _replace(paths.generation(generation), commit)
    return True


def _roster_bytes(paths: StorePaths, header: Mapping[str, Any]) -> bytes | None:
    """The roster that the indexes and the copy of its changes tell of; None where one of these is not to be had."""
    tasks: list[Task] = []
    for number in range(header["first_shard"], header["first_shard"] + header["num_shards"]):
        path = paths.index(number)
        records = _records(path.read_bytes().splitlines()) if path.is_file() else None
        if not records:
            return None
        tasks.append(Task(number, records[0].bucket_px, tuple(records)))
    changes: list[Change] | None = None
    if "changes" in header:
        path = paths.changes(header["generation"])
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != header["changes"]["sha256"]:
            return None
        changes = parse_changes(data)
    first = header["first_shard"]
    return b"".join(roster_lines(tasks, header["generation"], header["previous"], first, changes))


def _records(lines: Sequence[bytes]) -> list[Record] | None:
    """The records of an index, as they were before they were encoded; None where it cannot be parsed."""
    records: list[Record] = []
    for line in map(_parse, lines):
        try:
            record = Record.from_json(line or {})
        except (KeyError, TypeError, IndexError):  # damage that is still JSON
            return None
        # One that was placed had no flaw then: whatever went wrong came after.
        records.append(record if record.bucket_px is None else replace(record, step=None, reason=None))
    return records


# --- Everything else ---


def _restore_contents(store: Store, damages: Sequence[Damage], photos: Photos | None) -> None:
    damaged = {damage.path for damage in damages}
    for generation, roster in enumerate(store.rosters):
        if roster.path in damaged:
            _restore_roster(store, generation, roster)
    numbers = sorted({damage.shard for damage in damages if damage.shard is not None and _was_encoded(damage)})
    rest = _Rest(store, numbers)
    lost = [number for number in numbers if not rest.restore(number)]
    if photos is not None and lost and all(roster.is_whole() for roster in store.rosters):
        _encode_again(store, lost, photos)
    with suppress(VerifyError):  # an index or a commit is still damaged, so its quarantine cannot be told
        if len(store.shards(len(store.rosters) - 1)) == store.num_shards:
            store.finalise()


def _encode_again(store: Store, numbers: Sequence[int], photos: Photos) -> None:
    roster = Roster(file.path for file in store.rosters)
    changed = [
        record.key
        for number in numbers
        for record in roster.task(number).records
        if _has_changed(record, photos.source)
    ]
    if changed:
        names = ", ".join(changed[:5]) + ", ..." * (len(changed) > 5)
        raise StoreError(
            f"{len(changed)} photos in {photos.source.name} are not those the store was made of: {names}; "
            "put those back, or restore the store from a copy"
        )
    vae = photos.load_vae(store.manifest["compute"]["dtype"])
    require_same_vae(store, vae)
    for number in numbers:
        path = store.paths.done(number)
        if path.is_file() and sealed.unseal(path.read_bytes()) is None:  # commits are created, never replaced
            atomic.remove(path)
    encode_tasks(store, numbers, photos.source, vae)


def _has_changed(record: Record, source: Source) -> bool:
    if record.geometry is None:  # it was refused in the scan, whatever it is now
        return False
    try:
        return hashlib.sha256(source.read(record.key)).hexdigest() != record.source_sha256
    except OSError:
        return True


def _was_encoded(damage: Damage) -> bool:
    return damage.state != "not encoded yet"


def _restore_roster(store: Store, generation: int, roster: CommittedFile) -> None:
    if generation == 0 and store.version == OLD_VERSION:
        entry = store.manifest["roster"] | {"generation": 0, "previous": None, "first_shard": 0}
    else:
        entry = sealed.read_json(store.paths.generation(generation))
    data = _roster_bytes(store.paths, entry)
    if data is not None and hashlib.sha256(data).hexdigest() == roster.sha256:
        atomic.write_bytes(roster.path, data)


class _Rest:
    """What rosters, numbers and quarantine.jsonl say of some shards: enough to tell their indexes and commits."""

    def __init__(self, store: Store, numbers: Collection[int]) -> None:
        self.store = store
        self.paths = store.paths
        self.records: dict[int, list[Record]] = {number: [] for number in numbers}
        for roster in store.rosters:
            for number, record in read_roster(roster.path) if numbers and roster.is_whole() else ():
                if number in self.records:
                    self.records[number].append(record)
        path = store.paths.quarantine
        found = [_parse(line) for line in path.read_bytes().splitlines()] if path.is_file() else []
        self._quarantined = {line["key"]: line for line in found if line is not None and "key" in line}
        self._view: View = {}
        with suppress(VerifyError):  # changes are damaged, so the quarantine cannot be read by the names in it
            self._view = store.view()

    def restore(self, number: int) -> bool:
        """Restore index or commit of a shard; False where that takes the photos."""
        if not self.records[number]:
            return False
        tensors = self._tensors(number)
        if tensors is None:
            return False
        bucket_px = self.records[number][0].bucket_px
        lines = self._lines(number, tensors)
        files, _ = shard_files(self.paths, number, bucket_px, lines, tensors)
        content = {path: b"".join(chunks) for path, chunks in files.items()}
        try:
            shard = self.store.shard(number)
        except StoreError:  # two witnesses agree on every byte of the shard, so it may be committed
            if any(not path.is_file() or path.read_bytes() != data for path, data in content.items()):
                return False
            degraded = self._degraded(number)
            if degraded:
                _, done = shard_files(self.paths, number, bucket_px, lines, tensors, degraded[-1])
                _replace(self.paths.done(number), done)
            return bool(degraded)
        if hashlib.sha256(content[shard.index_file.path]).hexdigest() != shard.index_file.sha256:
            return False
        atomic.write_bytes(shard.index_file.path, content[shard.index_file.path])
        return shard.tensors_file is None or shard.tensors_file.is_whole()

    def _failures(self, number: int) -> list[tuple[str, str] | None]:
        """Why each record of a shard has no latents, None where it has some; of a retired one nothing more is known."""
        failures: list[tuple[str, str] | None] = []
        changes = self._view.get(number, {})
        for place, record in enumerate(self.records[number]):
            change = changes.get(place)
            line = self._quarantined.get(change.key if change else record.key)
            if record.step is not None:
                failures.append((record.step, record.reason or ""))
            elif line is not None and not (change and change.is_retired):
                failures.append((line["step"], line["reason"]))
            else:
                failures.append(None)
        return failures

    def _tensors(self, number: int) -> dict[str, NDArray[Any]] | None:
        """The tensors of a shard by their place; None where the file has not the length it should have."""
        num_rows = self._failures(number).count(None)
        bucket_px = self.records[number][0].bucket_px
        if bucket_px is None or not num_rows:
            return {}
        config = VAEConfig.from_diffusers(self.store.manifest["vae"]["config"])
        height, width = (side // config.downscale for side in bucket_px)
        places = TensorPlaces.of_manifest(self.store.manifest, (num_rows, config.latent_channels, height, width))
        path = self.paths.tensors(number, bucket_px)
        if not path.is_file() or path.stat().st_size != places.file_bytes:
            return None
        return places.map(path)

    def _lines(self, number: int, tensors: Mapping[str, NDArray[Any]]) -> list[Line]:
        """The index, as roster, numbers and quarantine have it."""
        lines: list[Line] = []
        row = 0
        for record, failure in zip(self.records[number], self._failures(number), strict=True):
            if failure is not None:
                lines.append(quarantined_line(record, *failure))
            else:
                lines.append(written_line(record, row, row_sha256(tensors, row)))
                row += 1
        return lines

    def _degraded(self, number: int) -> list[int | None]:
        """What the journal says of a shard, each time that it was encoded; beside it only the commit does."""
        notes = read_journal(self.paths.timings)
        return [note["degraded"] for note in notes if note["shard"] == number and "degraded" in note]


def _replace(path: Path, data: bytes) -> None:
    """Put a commit in the place of a damaged one."""
    atomic.remove(path)
    atomic.create_bytes(path, data)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:  # JSONDecodeError and UnicodeDecodeError alike
        return None
    return value if isinstance(value, dict) else None
