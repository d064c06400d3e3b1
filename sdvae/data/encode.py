"""A folder of photos into a latent store: scan, roster, then one task a shard, each committed by itself."""

import hashlib
import json
import os
import platform
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import features

from sdvae import atomic
from sdvae.atomic import Journal
from sdvae.data import store as stores
from sdvae.data.preprocess import Preprocess, apply, plan_geometry
from sdvae.data.roster import Record, Size, Task, place, read_roster, require_same_records, roster_lines
from sdvae.data.scan import scan
from sdvae.data.sources import FolderSource
from sdvae.data.store import STORE_DTYPES, Layout, Store, commit_shard, differences, row_sha256
from sdvae.engine.precision import DTYPES
from sdvae.errors import ConfigError, ImageError, StoreError, VerifyError
from sdvae.images import read_image
from sdvae.pixels import to_pixels
from sdvae.vae import VAE

Progress = Callable[[Literal["scan", "encode"], int, int], None]  # (phase, records done, records in all)

MAX_SHARD_BYTES = 2**27  # of each of mean and logvar: a shard is in memory until it is written
REFERENCE_PX = 512 * 512  # a batch of larger photos has fewer rows, in proportion

_BATCH_ROWS = {"cpu": 4}  # larger batches only cost memory there
_GPU_BATCH_ROWS = 16
_CODECS = ("libjpeg_turbo", "jpg_2000", "libtiff", "webp", "avif", "zlib", "littlecms2")


@dataclass(frozen=True)
class EncodeSettings:
    """What decides about the bytes of a store, besides the VAE and the photos.

    `batch_rows` and `num_threads` are chosen for the machine where None, and then belong to the store.
    """

    preprocess: Preprocess = field(default_factory=Preprocess)
    store_dtype: Literal["fp16", "fp32"] = "fp16"
    shard_rows: int = 1024
    batch_rows: int | None = None
    num_threads: int | None = None


@dataclass(frozen=True)
class EncodeReport:
    """What became of every record: num_seen == num_written + sum(quarantined.values())."""

    num_seen: int
    num_written: int
    quarantined: dict[str, int]  # reason -> records
    images_per_s: float  # of this run, without the scan; 0 where nothing was left to do
    seconds: float


def encode_source(
    source: Path,
    out: Path,
    vae: VAE,
    settings: EncodeSettings | None = None,
    *,
    restart: bool = False,
    progress: Progress = lambda phase, num_done, num_all: None,
) -> EncodeReport:
    """Encode every photo below `source` into the store `out`; a store begun before is continued.

    The bytes of the store are a function of the photos, the VAE, the settings and the compute block that
    the first run recorded, whatever happened in between. `restart` throws away what is there.

    Raises StoreError where `out` holds anything else, was begun with other settings (all are listed) or
    cannot be written; committed shards stay whole in any case.
    """
    begun = time.monotonic()
    settings = settings or EncodeSettings()
    _require_possible(settings, vae)
    folder, layout = FolderSource(source), Layout(out.resolve())
    _require_apart(folder.root, layout.root)
    store = _find_store(layout, restart)
    identity = _identity(vae, settings, store.manifest["compute"] if store and not restart else {})
    if store and not restart:
        _require_same_identity(store, identity)
    entries = folder.entries()
    if not entries:
        raise StoreError(f"{source} holds no photos")
    if restart:
        layout.clear()
        store = None
    layout.make_folders()
    atomic.sweep(layout.root)
    preprocess = settings.preprocess
    records = scan(folder, entries, preprocess.max_pixels, layout.journal / "scan.jsonl", partial(progress, "scan"))
    tasks = place(records, preprocess, vae.config.downscale, partial(_max_rows, vae, settings))
    with _threads(identity["compute"]["num_threads"]):
        if store is None:
            store = _begin(layout, identity, tasks, vae)
        else:
            _require_same_roster(store, tasks)
        num_encoded, encode_s = _run(store, tasks, folder, vae, identity["compute"]["batch_rows"], progress)
    store.finalise()
    return EncodeReport(
        num_seen=len(records),
        num_written=sum(shard.num_rows for shard in store.shards()),
        quarantined=dict(Counter(line["reason"] for line in store.quarantined())),
        images_per_s=num_encoded / encode_s,
        seconds=time.monotonic() - begun,
    )


def recorded_dtype(out: Path) -> str | None:
    """The dtype ("bf16") that a store begun in `out` is computed in, None where there is none.

    Whoever chooses a dtype by timing, as "auto" does on a CPU, chooses this one instead: the clock may say
    something else each time, and a store holds latents of one dtype.
    """
    if not Layout(out).manifest.exists():
        return None
    return str(Store.open(out).manifest["compute"]["dtype"])


# --- Before work ---


def _require_possible(settings: EncodeSettings, vae: VAE) -> None:
    for name in ("shard_rows", "batch_rows", "num_threads"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if settings.store_dtype not in STORE_DTYPES:
        raise ConfigError(f"store_dtype is {settings.store_dtype!r}; choose {' or '.join(STORE_DTYPES)}")
    plan_geometry(512, 512, settings.preprocess, vae.config.downscale)  # says now what it would say after the scan


def _require_apart(source: Path, out: Path) -> None:
    if out == source or out.is_relative_to(source):
        raise StoreError(
            f"{out} lies in the source {source}: latents and photos would mix; give a folder outside of it"
        )
    if source.is_relative_to(out):
        raise StoreError(f"the source {source} lies in {out}; give the store a folder of its own")


def _find_store(layout: Layout, restart: bool) -> Store | None:
    """The store to continue (or to throw away), None for a new one; StoreError for a folder that is something else."""
    root = layout.root
    if root.exists() and not root.is_dir():
        raise StoreError(f"{root} is not a folder; give the store a folder of its own")
    store = Store.open(root) if layout.manifest.exists() else None
    own, other = layout.contents()
    if other and (store is None or restart):
        names = ", ".join(path.relative_to(root).as_posix() for path in other[:5])
        raise StoreError(f"{root} holds files that no store has ({names}); nothing was touched, give another folder")
    if store is None and not restart and any(path.parent == layout.done(0).parent for path in own):
        raise StoreError(f"{root} holds shards, but its manifest.json is gone; start again with --restart")
    return store


def _identity(vae: VAE, settings: EncodeSettings, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What the bytes of a store depend on, besides the photos; `recorded` is the compute block to continue with."""
    return {
        "format": stores.FORMAT,
        "version": stores.VERSION,
        "latents": "raw",  # scaling belongs to whoever trains on them
        "pixel_range": [-1, 1],
        "vae": {"fingerprint": vae.fingerprint, "latent_space": vae.latent_space, "config": vae.config.to_diffusers()},
        "preprocess": settings.preprocess.to_json(),
        "decoder": {
            "library": "pillow",
            "version": PIL.__version__,
            "codecs": {name: features.version(name) for name in _CODECS},
        },
        "store_dtype": settings.store_dtype,
        "shard_rows": settings.shard_rows,
        "compute": {
            "device": _device_model(vae.device),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
            "dtype": next(name for name, dtype in DTYPES.items() if dtype == vae.dtype),
            "batch_rows": settings.batch_rows
            or recorded.get("batch_rows")
            or _BATCH_ROWS.get(vae.device.type, _GPU_BATCH_ROWS),
            "num_threads": settings.num_threads or recorded.get("num_threads") or _num_cores(),
        },
    }


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device_model(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if device.type == "cpu" and cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else f"{device.type} ({platform.machine()})"


def _require_same_identity(store: Store, identity: dict[str, Any]) -> None:
    now = json.loads(atomic.canonical_json(identity))
    found = differences({name: store.manifest.get(name) for name in now}, now)
    if found:
        raise StoreError(
            f"{store.layout.root} was begun with other settings, and a store holds one kind of latents: "
            f"{'; '.join(found)}. Encode as before, or into another folder, or start again with --restart"
        )


def _require_same_roster(store: Store, tasks: Sequence[Task]) -> None:
    if hashlib.sha256(b"".join(roster_lines(tasks))).hexdigest() == store.rosters[0].sha256:
        return
    if not store.rosters[0].is_whole():
        raise VerifyError(f"{store.rosters[0].path} is damaged or missing; start again with --restart")
    require_same_records(read_roster(store.rosters[0].path), tasks)
    raise StoreError(
        f"{store.layout.root} was begun by an sdvae that cuts shards otherwise; start again with --restart"
    )


def _max_rows(vae: VAE, settings: EncodeSettings, bucket_px: Size | None) -> int:
    if bucket_px is None:
        return settings.shard_rows
    num_latents = vae.config.latent_channels * bucket_px[0] * bucket_px[1] // vae.config.downscale**2
    row_bytes = num_latents * STORE_DTYPES[settings.store_dtype].itemsize
    return min(settings.shard_rows, max(1, MAX_SHARD_BYTES // row_bytes))


def _begin(layout: Layout, identity: dict[str, Any], tasks: Sequence[Task], vae: VAE) -> Store:
    """Write roster and manifest. From the manifest on, the folder is a store."""
    roster = list(roster_lines(tasks))
    entry = {
        "sha256": atomic.write_bytes(layout.roster(0), *roster),
        "num_bytes": sum(map(len, roster)),
        "num_records": sum(len(task.records) for task in tasks),
        "num_shards": len(tasks),
    }
    manifest = atomic.seal(identity | {"roster": entry, "latent_error": vae.latent_error()})
    atomic.write_bytes(layout.journal / "manifest.json", manifest)  # a copy: nothing else could restore it
    atomic.create_bytes(layout.manifest, manifest)
    return Store.open(layout.root)


# --- Work ---


@dataclass(frozen=True)
class _Failure:
    step: str
    reason: str


_Row = dict[str, NDArray[Any]]  # mean and logvar of one record, (C, h, w)
_Images = list[NDArray[np.uint8] | _Failure]


def _run(
    store: Store, tasks: Sequence[Task], source: FolderSource, vae: VAE, batch_rows: int, progress: Progress
) -> tuple[int, float]:  # photos encoded, seconds
    """Encode and commit every task that is not committed yet; one thread reads one batch ahead."""
    begun = time.monotonic()
    left = [task for task in tasks if not _is_committed(store, task.number)]
    num_all = sum(len(task.records) for task in tasks)
    num_done = num_all - sum(len(task.records) for task in left)
    progress("encode", num_done, num_all)
    preprocess = Preprocess.from_json(store.manifest["preprocess"])
    dtype = STORE_DTYPES[store.manifest["store_dtype"]]
    batches = [_batches(task, batch_rows) for task in left]
    load = partial(_load_batch, source, preprocess)
    num_encoded = 0
    with (
        closing(_ahead(load, (batch for of_task in batches for batch in of_task))) as loaded,
        Journal(store.layout.journal / "timings.jsonl") as timings,
    ):
        for task, of_task in zip(left, batches, strict=True):
            clock = _Clock()
            outcomes: list[_Row | _Failure] = []
            if task.bucket_px is None:
                outcomes += [_Failure(record.step or "", record.reason or "") for record in task.records]
            for batch in of_task:
                images = next(loaded)
                clock.lap("wait_s")
                outcomes += _encode_batch(vae, images, dtype)
                clock.lap("encode_s")
                num_encoded += len(batch)
                progress("encode", num_done + len(outcomes), num_all)
            _commit(store, task, outcomes)
            clock.lap("write_s")
            timings.append({"shard": task.number, **clock.laps})
            num_done += len(task.records)
    progress("encode", num_done, num_all)
    return num_encoded, time.monotonic() - begun


def _is_committed(store: Store, number: int) -> bool:
    """A shard whose files are gone or cut short counts as not committed: encoding it again mends it."""
    return store.layout.done(number).exists() and all(file.is_present() for file in store.shard(number).files)


def _batches(task: Task, batch_rows: int) -> list[Sequence[Record]]:
    """The records of a task in batches; only the records decide which, so that no restart changes a batch."""
    if task.bucket_px is None:
        return []
    height, width = task.bucket_px
    num_rows = max(1, min(batch_rows, batch_rows * REFERENCE_PX // (height * width)))
    return [task.records[start : start + num_rows] for start in range(0, len(task.records), num_rows)]


def _ahead(
    load: Callable[[Sequence[Record]], _Images], batches: Iterable[Sequence[Record]]
) -> Generator[_Images, None, None]:
    """`map(load, batches)`, with the next batch in the making on a thread."""
    with ThreadPoolExecutor(1, "sdvae-read") as pool:
        coming: deque[Future[_Images]] = deque()
        for batch in batches:
            coming.append(pool.submit(load, batch))
            if len(coming) == 2:
                yield coming.popleft().result()
        yield from (future.result() for future in coming)


def _load_batch(source: FolderSource, preprocess: Preprocess, batch: Sequence[Record]) -> _Images:
    return [_load(source, preprocess, record) for record in batch]


def _load(source: FolderSource, preprocess: Preprocess, record: Record) -> NDArray[np.uint8] | _Failure:
    assert record.geometry is not None
    try:
        data = source.read(record.key)
    except FileNotFoundError:
        return _Failure("read", "vanished after the scan")
    except OSError as error:
        return _Failure("read", f"cannot be read: {error.strerror}")
    if hashlib.sha256(data).hexdigest() != record.source_sha256:
        return _Failure("read", "changed after the scan")
    try:
        image = read_image(data, background=preprocess.background, max_pixels=preprocess.max_pixels)
        if image.shape[:2] != record.original_px:
            raise ImageError(f"its header says {record.original_px}, its picture is {image.shape[:2]}")
        return apply(image, record.geometry)
    except ImageError as error:
        return _Failure("decode", str(error))


def _encode_batch(vae: VAE, images: _Images, dtype: np.dtype[Any]) -> list[_Row | _Failure]:
    pictures = [image for image in images if not isinstance(image, _Failure)]
    if not pictures:
        return [image for image in images if isinstance(image, _Failure)]
    # A failed image keeps its place, all zeros: the others run in the batch they would have run in.
    batch = np.stack([np.zeros_like(pictures[0]) if isinstance(image, _Failure) else image for image in images])
    posterior = vae.encode(to_pixels(batch))
    with np.errstate(over="ignore"):  # what does not fit the store's dtype becomes infinite, and is caught below
        mean, logvar = (np.ascontiguousarray(values.cpu(), dtype) for values in (posterior.mean, posterior.logvar))
    outcomes: list[_Row | _Failure] = []
    for row, image in enumerate(images):
        if isinstance(image, _Failure):
            outcomes.append(image)
        elif np.isfinite(mean[row]).all() and np.isfinite(logvar[row]).all():
            outcomes.append({"mean": mean[row], "logvar": logvar[row]})
        else:  # the VAE has tried fp32 before it gave this
            outcomes.append(_Failure("encode", f"the latents are not finite, or do not fit {dtype.name}"))
    return outcomes


def _commit(store: Store, task: Task, outcomes: Sequence[_Row | _Failure]) -> None:
    rows = [outcome for outcome in outcomes if not isinstance(outcome, _Failure)]
    moments = {name: np.stack([row[name] for row in rows]) for name in ("logvar", "mean")} if rows else {}
    lines: list[dict[str, Any]] = []
    num_written = 0
    for record, outcome in zip(task.records, outcomes, strict=True):
        line = record.to_json()
        if isinstance(outcome, _Failure):
            line |= {"status": "quarantined", "step": outcome.step, "reason": outcome.reason}
            line |= {"row": None, "latents_sha256": None}
        else:
            line |= {"status": "written", "row": num_written, "latents_sha256": row_sha256(moments, num_written)}
            num_written += 1
        lines.append(line)
    commit_shard(store.layout, task.number, task.bucket_px, lines, moments)


class _Clock:
    """Adds up what the time between laps went into."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = round(self.laps.get(name, 0.0) + now - self._last, 6)
        self._last = now


@contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    """Set torch's threads: they decide about the order of sums, whatever a launcher exported."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
