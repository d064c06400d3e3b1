"""One task: encode shard k, from its photos to its commit.

While a batch is in the network, the next ones are decoded and the last ones written. Batches that an interrupted run
has kept are taken up, and neither decoded nor encoded again.
"""

import hashlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from sdvae.amounts import memory_text, size_text
from sdvae.encoding.kept import EncodedBatch, KeptBatches, TakenUp
from sdvae.encoding.load_photo import Failure
from sdvae.encoding.manifest import fixed_threads, num_cores
from sdvae.encoding.pipeline import Decoders
from sdvae.encoding.times import Times
from sdvae.encoding.writing import Moments, ShardBuilder, Writer, mark
from sdvae.engine.memory import parse_bytes
from sdvae.engine.run import Engine
from sdvae.errors import BudgetError, DeviceError
from sdvae.journal import Journal
from sdvae.metrics import psnr
from sdvae.pixels import fit_channels, to_device, to_images
from sdvae.sources.entries import Source
from sdvae.store.buckets import Size
from sdvae.store.geometry import Preprocess
from sdvae.store.records import Record
from sdvae.store.roster import Roster, Task, rows_in_batch
from sdvae.store.shard import STORE_DTYPES
from sdvae.store.store import Store
from sdvae.vae import VAE

Count = Callable[[int], None]  # told how many photos went through the network so far

_NO_DIFFERENCE_DB = 100.0  # PSNR of equal images, which JSON could not tell


@dataclass(frozen=True)
class Work:
    """How to work. No byte depends on it, but where memory is short and shards may be degraded.

    `num_workers` processes decode (None: chosen for the machine; 0: a thread of this process does). `audit` is the
    share of photos to decode back and compare. `budget_bytes` is the memory a batch may take beside the weights (None:
    what the device has free).
    """

    num_workers: int | None = None
    on_oom: Literal["stop", "degrade"] = "stop"
    audit: float = 0.0
    budget_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.budget_bytes is not None:
            parse_bytes(self.budget_bytes)


def encode_tasks(
    store: Store,
    numbers: Sequence[int],
    source: Source,
    vae: VAE,
    work: Work | None = None,
    count: Count = lambda num_records: None,
) -> Times:
    """Encode the shards of these numbers, in this order, and commit each; a second commit changes nothing.

    The bytes follow from the store's rosters and manifest: the caller sees to it that VAE and machine are those of the
    manifest (`require_same_run`). Raises StoreError where the disk or the decoding processes fail, and DeviceError
    where memory does not suffice.
    """
    run = _Encoder(store, source, vae, work or Work(), count)
    left = deque(numbers)
    begun = time.monotonic()
    compute = store.manifest["compute"]
    with fixed_threads(compute["num_threads"]), vae.deterministic(compute.get("images_at_once", 0)):
        while left:
            try:
                run.encode(left)
            except _Smaller as smaller:  # its shard begins again: all of it goes through the network the same way
                run.rows_at_once[smaller.bucket_px] = smaller.num_rows
    run.times.all = time.monotonic() - begun
    return run.times


class _Smaller(Exception):  # noqa: N818 (no error: the shard is to be begun again)
    """Only so many rows fit into memory at once."""

    def __init__(self, bucket_px: Size, num_rows: int) -> None:
        super().__init__(bucket_px, num_rows)
        self.bucket_px, self.num_rows = bucket_px, num_rows


class _Encoder:
    """What `encode_tasks` does: the network here, decoding in processes, writing on a thread."""

    def __init__(self, store: Store, source: Source, vae: VAE, work: Work, count: Count) -> None:
        self.store, self.source, self.vae, self.work, self.count = store, source, vae, work, count
        self.roster = Roster(file.path for file in store.rosters)
        self.preprocess = Preprocess.from_json(store.manifest["preprocess"])
        self.kept = KeptBatches(store)
        self.batch_rows: int = store.manifest["compute"]["batch_rows"]
        self.rows_at_once: dict[Size, int] = {}  # where whole batches are too much for the memory
        self.num_committed = 0  # records
        num_workers = choose_workers(vae.device) if work.num_workers is None else work.num_workers
        self.times = Times(num_workers=num_workers)

    def encode(self, left: deque[int]) -> None:
        """Encode shards, and take each off `left` when it is committed."""
        numbers = list(left)
        taken_up = TakenUp(self._take_up)
        decoders = Decoders(
            self.source,
            self.preprocess,
            (batch for number in numbers for batch in self._plan(number, taken_up)),
            max(map(self._batch_bytes, numbers)),
            partial(to_device, device=self.vae.device),
            self.times,
        )
        num_before = self.num_committed
        with Journal(self.store.paths.timings) as journal, Writer() as writer, decoders:
            batches = iter(decoders)
            for number in numbers:
                task = self.roster.task(number)
                shard = ShardBuilder(self.store, task, self.kept, self._rows_at_once(task), self.vae.device, self.times)
                self._encode_shard(shard, taken_up, batches, writer, num_before)
                writer.submit(self._commit, shard, journal, left)
                num_before += task.num_images
                self.count(num_before)

    def _plan(self, number: int, taken_up: TakenUp) -> Iterator[tuple[Size, Sequence[Record]]]:
        """The batches of a shard that are to be decoded."""
        task = self.roster.task(number)
        for place, batch in enumerate(task.batches(self.batch_rows)):
            if task.bucket_px and not taken_up.has(number, place):
                yield task.bucket_px, batch

    def _take_up(self, number: int) -> dict[int, EncodedBatch]:
        task = self.roster.task(number)
        return self.kept.read(task, task.batches(self.batch_rows), self._rows_at_once(task))

    def _rows_at_once(self, task: Task) -> int | None:
        """How many rows go through the network at once where whole batches are too much."""
        return self.rows_at_once.get(task.bucket_px) if task.bucket_px else None

    def _batch_bytes(self, number: int) -> int:
        shard = self.roster.shards[number]
        if shard.bucket_px is None:
            return 0
        height, width = shard.bucket_px
        num_rows = min(shard.num_records, rows_in_batch(shard.bucket_px, self.batch_rows))
        return num_rows * height * width * self.preprocess.num_channels

    def _encode_shard(
        self,
        shard: ShardBuilder,
        taken_up: TakenUp,
        batches: Iterator[tuple[Tensor, list[Failure | None]]],
        writer: Writer,
        num_done: int,
    ) -> None:
        task = shard.task
        num_after = num_done + task.num_images
        for place, records in enumerate(task.batches(self.batch_rows)):
            if taken_up.has(task.number, place):
                writer.submit(shard.take, records, taken_up.take(task.number, place))
            else:
                begun = time.monotonic()
                photos, failures = next(batches)
                pixels = fit_channels(photos, self.vae.config.in_channels)
                ready = time.monotonic()
                moments = self._encode_batch(pixels, task)
                if self.work.audit:
                    self._audit(records, failures, pixels, moments["mean"])
                self.times.waiting += ready - begun
                self.times.encode += time.monotonic() - ready
                self.times.num_images += len(records)
                writer.submit(shard.add, place, records, failures, moments, mark(self.vae.device))
            if (num_done := num_done + len(records)) < num_after:
                self.count(num_done)

    def _commit(self, shard: ShardBuilder, journal: Journal, left: deque[int]) -> None:
        begun = time.monotonic()
        spent = {step: round(seconds, 6) for step, seconds in self.times.steps().items()}
        journal.append({"shard": shard.task.number, "degraded": shard.degraded} | spent)  # before: repair asks for it
        shard.commit()
        self.kept.remove(shard.task.number)
        self.times.write += time.monotonic() - begun
        self.num_committed += shard.task.num_images
        left.popleft()

    # --- The network ---

    def _encode_batch(self, pixels: Tensor, task: Task) -> Moments:
        """The moments of a batch, in as few runs of the network as memory allows."""
        assert task.bucket_px is not None
        num_rows = self._rows_at_once(task) or len(pixels)
        moments = self._try(pixels, num_rows)
        if moments is not None:
            return moments
        fitting = next((rows for rows in _halves(num_rows) if self._try(pixels[:rows], rows) is not None), 0)
        if not fitting or self.work.on_oom == "stop":
            raise DeviceError(_explain(self.vae, pixels, num_rows, fitting, self.batch_rows))
        raise _Smaller(task.bucket_px, fitting)

    def _try(self, pixels: Tensor, num_rows: int) -> Moments | None:
        """The moments, with `num_rows` at once; None where memory does not suffice for that."""
        try:
            parts = [self._forward(pixels[start : start + num_rows]) for start in range(0, len(pixels), num_rows)]
        except (RuntimeError, MemoryError, BudgetError) as error:
            if not _is_out_of_memory(error) or (
                isinstance(error, BudgetError) and num_rows == 1
            ):  # it says what one needs
                raise
            parts = []
        if not parts and self.vae.device.type == "cuda":  # here the traceback no longer holds tensors
            torch.cuda.empty_cache()
        if len(parts) > 1:
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return parts[0] if parts else None

    def _forward(self, pixels: Tensor) -> Moments:
        posterior = self.vae.encode(pixels, self.work.budget_bytes)
        moments = {"mean": posterior.mean, "logvar": posterior.logvar}
        if self.preprocess.flip:
            mirrored = self.vae.encode(pixels.flip(3), self.work.budget_bytes)
            moments |= {"mean_flip": mirrored.mean, "logvar_flip": mirrored.logvar}
        return moments

    def _audit(
        self, records: Sequence[Record], failures: Sequence[Failure | None], pixels: Tensor, mean: Tensor
    ) -> None:
        """Decode a sample back, as it is stored; the key decides whether a record is in it."""
        dtype = {2: torch.float16, 4: torch.float32}[STORE_DTYPES[self.store.manifest["store_dtype"]].itemsize]
        for row, (record, failure) in enumerate(zip(records, failures, strict=True)):
            lot = int.from_bytes(hashlib.sha256(record.key.encode()).digest()[:8], "big") / 2**64
            stored = mean[row : row + 1].to(dtype).float()
            if failure is None and lot < self.work.audit and bool(stored.isfinite().all()):
                after = to_images(self.vae.decode(stored, self.work.budget_bytes))[0]
                before = to_images(pixels[row : row + 1])[0]
                self.times.psnr_db[record.key] = min(psnr(after, before), _NO_DIFFERENCE_DB)


def choose_workers(device: torch.device) -> int:
    """As many as keep the encoder busy: a CPU takes ten times as long to encode a photo as to decode it."""
    return max(1, num_cores() // 8 if device.type == "cpu" else min(num_cores() - 1, 16))


def _is_out_of_memory(error: Exception) -> bool:
    from accelerate.utils.memory import should_reduce_batch_size  # knows how each device says it

    return isinstance(error, MemoryError | BudgetError) or bool(should_reduce_batch_size(error))


def _halves(num_rows: int) -> Iterator[int]:
    while num_rows := num_rows // 2:
        yield num_rows


def _explain(vae: VAE, pixels: Tensor, num_rows: int, fitting: int, batch_rows: int) -> str:
    height, width = pixels.shape[2:]
    free = f" with {torch.cuda.mem_get_info(vae.device)[0] / 2**30:.1f} GiB free" if vae.device.type == "cuda" else ""
    found = (
        f"out of memory on {vae.device}{free}: {num_rows} photos of {size_text(height, width)} px at once are too many"
    )
    needed = _predict_memory(vae, pixels, fitting or 1)
    if not fitting:
        return f"{found}, and one is, too{needed}; use a smaller --size or another --device"
    batch_size = max(rows for rows in range(1, batch_rows) if rows_in_batch((height, width), rows) <= fitting)
    return (
        f"{found}, {fitting} fit{needed}; start again with --batch-size {batch_size} --restart, "
        "or go on with --on-oom degrade, which marks the shards"
    )


def _predict_memory(vae: VAE, pixels: Tensor, num_rows: int) -> str:
    """What a budget has to be for so many photos; nothing for a TAESD, which keeps none."""
    if not isinstance(vae.engine, Engine):
        return ""
    height, width = pixels.shape[2:]
    needed = vae.engine.plan("encode", height, width, budget=sys.maxsize).predict_bytes(num_rows)
    return f" ({memory_text(needed)} beside the weights)"
