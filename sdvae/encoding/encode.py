"""Photos of a source into a latent store: scan, roster, tasks, and the end, where every shard is committed."""

import logging
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sdvae import atomic
from sdvae.encoding.kept import KeptBatches
from sdvae.encoding.manifest import EncodeSettings, fit_settings, row_bytes
from sdvae.encoding.prepare import (
    find_difference,
    find_store,
    identify,
    list_photos,
    one_at_a_time,
    prepare,
    require_apart,
)
from sdvae.encoding.runners import Ranks, Runner, uploading
from sdvae.encoding.scan import scan
from sdvae.encoding.tasks import Work, encode_tasks
from sdvae.encoding.times import Times
from sdvae.errors import StoreError
from sdvae.progress import Progress, silent
from sdvae.sources.entries import Source
from sdvae.sources.open import open_source
from sdvae.store.buckets import Size
from sdvae.store.generations import Difference
from sdvae.store.paths import StorePaths
from sdvae.store.remote import local_copy, open_mirror
from sdvae.store.roster import Roster, plan_records
from sdvae.store.store import Store
from sdvae.vae import VAE

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodeReport:
    """What became of every record: num_seen == num_written + sum(quarantined.values()) when no shard is left."""

    num_seen: int
    num_written: int
    quarantined: dict[str, int]  # reason -> records
    num_shards_left: int  # of other ranks, not committed yet
    num_degraded: int  # shards for which memory was short
    images_per_s: float  # of this run, without the scan; 0 where nothing was left to do
    seconds: float
    times: Times
    remarks: tuple[str, ...] = ()  # what the source left aside: texts of no photo, files that are no photos
    changes: dict[str, int] = field(default_factory=dict)  # kind -> records: what was not so in the store before


@dataclass(frozen=True)
class Survey:
    """What `encode_dataset` would do."""

    num_seen: int
    sizes: dict[Size, int]  # (height, width) in pixels -> photos that would be encoded, those of the store not counted
    quarantined: dict[str, int]  # reason -> photos that would not
    num_bytes: int  # of the latents
    changes: dict[str, int]  # kind -> records: what is not so in the store


def survey(
    source: str | Path | Source | Iterable[Any],
    out: str | Path,
    vae: VAE,
    settings: EncodeSettings | None = None,
    *,
    limit: int | None = None,
    keep_vanished: bool = False,
    progress: Progress = silent,
) -> Survey:
    """Scan `source` as `encode_dataset` does, and tell what would be encoded; nothing is written.

    Raises what `encode_dataset` raises before it encodes.
    """
    settings = fit_settings(settings or EncodeSettings(), vae)
    source = open_source(source)
    store = find_store(StorePaths(local_copy(out).resolve()), restart=False)
    identify(store, vae, settings, Ranks())
    listing = list_photos(source, limit, keep_vanished)
    preprocess = settings.preprocess
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "scan.jsonl"
        records = scan(source, listing.entries, preprocess.max_pixels, journal, partial(progress, "scan"))
    planned = list(plan_records(records, preprocess, vae.config.scaled_downscale))
    found = (
        find_difference(store, planned, listing)
        if store
        else Difference([one.key for one in planned], to_encode=planned)
    )
    new = found.to_encode
    num_tensors = 4 if preprocess.flip else 2
    sizes = Counter(record.bucket_px for record in new if record.bucket_px)
    return Survey(
        num_seen=len(listing.entries),
        sizes=dict(sorted(sizes.items())),
        quarantined=dict(Counter(record.reason for record in new if record.reason).most_common()),
        num_bytes=num_tensors * sum(count * row_bytes(vae, settings, size) for size, count in sizes.items()),
        changes=found.counts(),
    )


def encode_dataset(
    source: str | Path | Source | Iterable[Any],
    out: str | Path,
    vae: VAE,
    settings: EncodeSettings | None = None,
    *,
    restart: bool = False,
    limit: int | None = None,
    keep_vanished: bool = False,
    work: Work | None = None,
    runner: Runner = encode_tasks,
    ranks: Ranks | None = None,
    progress: Progress = silent,
) -> EncodeReport:
    """Encode every photo of `source` into the store `out`, a folder or a URL; a store begun before is continued.

    The bytes of the store are a function of the photos, the VAE, the settings and the compute block that the first
    run recorded, whatever happened in between, and however many `ranks` and workers there are. Where the source has
    changed since, the store gets a generation that says how: new and changed photos are encoded, new names, captions
    and labels are noted, and vanished photos retired (unless `keep_vanished`). `restart` deletes what is there; `limit`
    takes the first photos only.

    Raises StoreError where `out` holds anything else, was begun with other settings (all are listed), where none of
    its photos is in the source, or where it cannot be written; committed shards stay whole in any case.
    """
    begun = time.monotonic()
    settings, ranks = fit_settings(settings or EncodeSettings(), vae), ranks or Ranks()
    source = open_source(source)
    mirror = open_mirror(out)
    if mirror is not None and restart:
        raise StoreError(f"sdvae does not delete {mirror.url}; remove it with the tools of its storage")
    if mirror is not None:
        mirror.pull()
        runner = uploading(runner, mirror)
    paths = StorePaths((mirror.local if mirror else Path(out)).resolve())
    if source.root is not None:
        require_apart(source.root.resolve(), paths.root)
    if restart and ranks.world_size > 1:
        raise StoreError(
            f"{ranks.world_size} processes cannot all delete what is in {paths.root}, each would delete the work "
            "of the others; remove the folder, then run them without --restart"
        )
    store = find_store(paths, restart)
    identity = identify(None if restart else store, vae, settings, ranks)
    listing = list_photos(source, limit, keep_vanished)
    for remark in source.remarks if ranks.rank == 0 else ():
        _LOG.warning("%s: %s", source.name, remark)
    if restart:
        paths.clear()
    paths.make_folders()
    with one_at_a_time(paths):
        atomic.sweep(paths.root)
        if paths.manifest.exists():  # it may be another rank's, of this moment
            identity = identify(Store.open(paths.root), vae, settings, ranks)
        store, found = prepare(paths, source, listing, identity, vae, settings, partial(progress, "scan"))
        KeptBatches(store).remove_stale()
    times = _run(store, source, vae, work or Work(), runner, ranks, progress)
    if store.is_finished:
        store.finalise()
    if mirror is not None:
        mirror.finish()
    newest = len(store.rosters) - 1
    shards, quarantined = store.shards(newest), store.quarantined(newest)
    return EncodeReport(
        num_seen=len(listing.entries),
        num_written=sum(len(shard.rows) for shard in shards),
        quarantined=dict(Counter(line["reason"] for line in quarantined)),
        num_shards_left=store.num_shards - len(shards),
        num_degraded=sum(shard.degraded is not None for shard in shards),
        images_per_s=times.num_images / times.all if times.num_images else 0.0,
        seconds=time.monotonic() - begun,
        times=times,
        remarks=tuple(source.remarks),
        changes=found.counts(),
    )


def count_kept(out: str | Path) -> tuple[int, int]:
    """How many photos an interrupted run into `out` leaves encoded, and of how many; (0, 0) before it has a roster."""
    mirror = open_mirror(out)
    store = Store.find(mirror.local if mirror else Path(out))
    if store is None:
        return 0, 0
    shards = Roster(file.path for file in store.rosters).shards
    num_committed = sum(shards[number].num_images for number in store.paths.committed())
    return num_committed + KeptBatches(store).num_records(), sum(shard.num_images for shard in shards)


def _run(store: Store, source: Source, vae: VAE, work: Work, runner: Runner, ranks: Ranks, progress: Progress) -> Times:
    """Encode and commit what is not committed yet of this rank's share."""
    shards = Roster(file.path for file in store.rosters).shards
    share = ranks.share(range(len(shards)))
    left = [number for number in share if not _is_committed(store, number)]
    num_all = sum(shards[number].num_images for number in share)
    num_done = num_all - sum(shards[number].num_images for number in left)
    progress("encode", num_done, num_all)
    if not left:
        return Times()
    return runner(store, left, source, vae, work, lambda num_images: progress("encode", num_done + num_images, num_all))


def _is_committed(store: Store, number: int) -> bool:
    """A shard whose files are gone or cut short counts as not committed: encoding it again mends it."""
    return store.paths.done(number).exists() and all(file.is_present() for file in store.shard(number).files)
