"""BucketBatchSampler: which records make a batch, the same for every world size, and resumed where it stopped."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from numpy.random import Philox
from numpy.typing import NDArray
from torch.utils.data import Sampler

from sdvae.errors import ConfigError
from sdvae.reading.dataset import LatentDataset
from sdvae.store.store import differences

_LOG = logging.getLogger(__name__)


class BucketBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (record, epoch), each of one size, for `DataLoader(dataset, batch_sampler=...)`.

    Or, with one copy less, for `DataLoader(dataset, sampler=..., batch_size=None)`: the dataset makes whole batches.

    A global batch is `global_batch_size` records of one bucket; each of `world_size` ranks gets its share, and all
    ranks have the same shape at the same step. (accelerate's `prepare` would share a second time: leave the loader
    out of it.) Which records form which batch, and their order, follow from the seed and the epoch alone: a run may
    go on with another number of ranks. Of a bucket's last records that fill no batch, "drop" leaves out as many,
    others in each epoch; "pad" repeats some to fill it.

    One iteration is one epoch, and the next goes on to the next epoch unless `set_epoch` says otherwise.
    `state_dict` is where the newest iteration is. A plain DataLoader with workers runs ahead of the training
    loop, and the state with it; torchdata's StatefulDataLoader keeps the one that belongs to the last batch.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        global_batch_size: int,
        *,
        shuffle: bool = True,
        last: Literal["drop", "pad"] = "drop",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank is {rank}; it must be one of the {world_size} ranks, counted from 0")
        if global_batch_size < 1 or global_batch_size % world_size:
            raise ConfigError(f"a global batch of {global_batch_size} records cannot be shared by {world_size} ranks")
        if last not in ("drop", "pad"):
            raise ConfigError(f"last is {last!r}; choose 'drop' or 'pad'")
        self.global_batch_size, self.rank, self.world_size = global_batch_size, rank, world_size
        self.is_shuffled, self.last, self.seed = shuffle, last, seed
        self._buckets = list(dataset.buckets.values())
        self._num_batches = sum(len(self._fill(records)) for records in self._buckets) // global_batch_size
        never = sum(len(records) for records in self._buckets if len(records) < global_batch_size)
        if never and last == "drop":
            hint = "make the batch smaller, or pad with last='pad'"
            if not self._num_batches:
                raise ConfigError(f"no bucket holds a global batch of {global_batch_size} records; {hint}")
            _LOG.warning("%d records lie in buckets that fill no batch and are never drawn; %s", never, hint)
        self._next = self._at = (0, 0)  # (epoch, step): where the next iteration begins, where the newest one is

    def __repr__(self) -> str:
        rank = f", rank {self.rank} of {self.world_size}" if self.world_size > 1 else ""
        return f"BucketBatchSampler({len(self)} batches of {self.global_batch_size}{rank}, epoch {self._at[0]})"

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, step = self._next
        self._next = (epoch, 0) if step < len(self) else (epoch + 1, 0)
        return self._batches(epoch, step)

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be of `epoch`; where a loaded state stopped in that epoch, it still goes on there."""
        if epoch != self._next[0]:
            self._next = self._at = (epoch, 0)

    def state_dict(self) -> dict[str, Any]:
        """Epoch and batches drawn of it, with what they mean something for; the world size is not part of it."""
        epoch, step = self._at
        return {"epoch": epoch, "step": step} | self._identity()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration go on after the last batch of `state`; ConfigError where its batches were others."""
        now = self._identity()
        found = differences({name: state.get(name) for name in now}, now)
        if found:
            raise ConfigError(f"this sampler draws other batches than the one whose state it is given: {found}")
        self._next = self._at = (state["epoch"], state["step"])

    def _batches(self, epoch: int, first_step: int) -> Iterator[list[tuple[int, int]]]:
        order = self._global_batches(epoch)[:, self.rank :: self.world_size]
        for step in range(first_step, len(order)):
            self._at = (epoch, step + 1)
            yield [(record, epoch) for record in order[step].tolist()]
        self._next = self._at = (epoch + 1, 0)

    def _global_batches(self, epoch: int) -> NDArray[np.int64]:  # (batches, global_batch_size) records
        bits = Philox(key=self.seed << 64, counter=epoch << 192)

        def shuffled(values: NDArray[np.int64]) -> NDArray[np.int64]:
            # By sorting raw bits: numpy promises those for ever, its own permutations only within a version.
            return values[np.argsort(bits.random_raw(len(values)), kind="stable")] if self.is_shuffled else values

        rows = [self._fill(shuffled(records)).reshape(-1, self.global_batch_size) for records in self._buckets]
        return shuffled(np.concatenate(rows))

    def _fill(self, records: NDArray[np.int64]) -> NDArray[np.int64]:
        """As many records as whole batches hold: some dropped, or some repeated."""
        surplus = len(records) % self.global_batch_size
        if self.last == "drop" or not surplus:
            return records[: len(records) - surplus]
        return np.resize(records, len(records) - surplus + self.global_batch_size)

    def _identity(self) -> dict[str, Any]:
        return {
            "num_records": sum(map(len, self._buckets)),
            "global_batch_size": self.global_batch_size,
            "is_shuffled": self.is_shuffled,
            "last": self.last,
            "seed": self.seed,
        }
