"""Encoded batches to committed shards, on a thread beside the network."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdvae.encoding.kept import EncodedBatch, KeptBatches
from sdvae.encoding.load_photo import Failure
from sdvae.encoding.times import Times
from sdvae.store.records import Line, Record, quarantined_line, written_line
from sdvae.store.roster import Task
from sdvae.store.shard import STORE_DTYPES, Tensors, commit_shard, row_sha256
from sdvae.store.store import Store

Moments = dict[str, Tensor]  # the tensors of a shard by name, each (rows, C, h, w) raw

_QUEUED_WRITES = 4  # of batches and commits, before the encoder waits for the disk


class Writer:
    """Does what it is given on a thread, one after the other; what fails there is raised by a later call.

    After a failure it does nothing more: no shard is committed without a batch that could not be kept.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "sdvae-write")
        self._pending: deque[Future[None]] = deque()
        self._has_failed = False

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish everything, on the way out of an error, too: what the network has done is not lost."""
        try:
            while kind is None and self._pending:
                self._pending.popleft().result()
        finally:
            self._thread.shutdown()

    def submit(self, function: Callable[..., None], *arguments: Any) -> None:
        """Have `function` called once all that was submitted before is done; waits while too much is queued."""
        while self._pending and (len(self._pending) >= _QUEUED_WRITES or self._pending[0].done()):
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(self._do, function, *arguments))

    def _do(self, function: Callable[..., None], *arguments: Any) -> None:
        if self._has_failed:
            return
        self._has_failed = True  # unless it comes to its end
        function(*arguments)
        self._has_failed = False


class ShardBuilder:
    """A shard in the making: rows and index lines, gathered by the writer.

    `rows_at_once` of a batch go through the network where memory does not suffice for all.
    """

    def __init__(
        self,
        store: Store,
        task: Task,
        kept: KeptBatches,
        rows_at_once: int | None,
        device: torch.device,
        times: Times,
    ) -> None:
        self.task = task
        self.degraded = rows_at_once
        self._store, self._kept, self._times = store, kept, times
        self._dtype = STORE_DTYPES[store.manifest["store_dtype"]]
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._rows: dict[str, NDArray[Any]] = {}  # by tensor, (records, C, h, w); the first `_num_rows` are there
        self._num_rows = 0
        self._lines: list[Line] = []
        if task.bucket_px is None:
            for record in task.records:
                self._lines.append(quarantined_line(record, record.step or "", record.reason or ""))

    def add(
        self,
        number: int,
        records: Sequence[Record],
        failures: Sequence[Failure | None],
        moments: Moments,
        ready: "torch.cuda.Event | None",
    ) -> None:
        """Take in batch `number`, once the device has computed it, and keep it until the commit."""
        begun = time.monotonic()
        values = {name: self._to_host(tensor, ready) for name, tensor in moments.items()}
        outcomes = tuple(self._outcome(values, row, failure) for row, failure in enumerate(failures))
        is_written = [isinstance(outcome, str) for outcome in outcomes]
        tensors = values if all(is_written) else {name: tensor[is_written] for name, tensor in values.items()}
        batch = EncodedBatch(outcomes, tensors)
        self._kept.keep(self.task, number, records, batch, self.degraded)
        self.take(records, batch)
        self._times.write += time.monotonic() - begun

    def take(self, records: Sequence[Record], batch: EncodedBatch) -> None:
        """Take in a batch as it was kept."""
        if not self._rows:
            self._rows = {
                name: np.empty((len(self.task.records), *tensor.shape[1:]), self._dtype)
                for name, tensor in batch.tensors.items()
            }
        num_before = self._num_rows
        for record, outcome in zip(records, batch.outcomes, strict=True):
            if isinstance(outcome, Failure):
                self._lines.append(quarantined_line(record, outcome.step, outcome.reason))
            else:
                self._lines.append(written_line(record, self._num_rows, outcome))
                self._num_rows += 1
        for name, tensor in batch.tensors.items():
            self._rows[name][num_before : self._num_rows] = tensor

    def commit(self) -> None:
        """Write the shard."""
        rows = {name: tensor[: self._num_rows] for name, tensor in self._rows.items()} if self._num_rows else {}
        commit_shard(self._store.paths, self.task.number, self.task.bucket_px, self._lines, rows, self.degraded)

    def _outcome(self, values: Tensors, row: int, failure: Failure | None) -> str | Failure:
        if failure is not None:
            return failure
        if all(np.isfinite(tensor[row]).all() for tensor in values.values()):
            return row_sha256(values, row)
        # The VAE has tried fp32 before it gave this.
        return Failure("encode", f"the latents are not finite, or do not fit {self._dtype.name}")

    def _to_host(self, tensor: Tensor, ready: "torch.cuda.Event | None") -> NDArray[Any]:
        if self._copies is not None and ready is not None:  # beside the next batch, not behind it
            with torch.cuda.stream(self._copies):
                self._copies.wait_event(ready)
                tensor.record_stream(self._copies)
                tensor = tensor.cpu()
        with np.errstate(over="ignore"):  # what does not fit the store's dtype becomes infinite, and is caught
            return np.ascontiguousarray(tensor.cpu(), self._dtype)


def mark(device: torch.device) -> "torch.cuda.Event | None":
    """What the device has to do first."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
