"""The streams of a store, as a batch of LatentDataset has them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sdvae.config import LatentScaling
from sdvae.errors import StoreError, VerifyError
from sdvae.latents import scale
from sdvae.store.shard import DATA_START, Shard
from sdvae.store.streams import Flip, Stream, StreamShard

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class StreamReader:
    """Reads the rows of one stream. Raises StoreError where shards lack theirs, VerifyError where one is damaged."""

    def __init__(self, stream: Stream, shards: Sequence[Shard], scaling: LatentScaling) -> None:
        self.name, self.kind = stream.name, stream.declaration.kind
        self._flip, self._dtype = stream.declaration.flip, _DTYPES[stream.declaration.dtype]
        self._scaling = scaling
        left = [shard.number for shard in shards if not stream.commit_path(shard.number).exists()]
        if left:
            raise StoreError(
                f"{stream.folder} lacks the rows of {len(left)} of {len(shards)} shards; make the stream again, or "
                "leave it out with streams=[...]"
            )
        self._shards = {shard.number: stream.shard(shard.number) for shard in shards}
        there = [shard for shard in shards if self._shards[shard.number].num_missing < shard.num_rows]
        self._others = {shard.bucket_px: self._shards[shard.number].shape[1:] for shard in there}  # axes but the first
        self._open: dict[int, _MappedRows] = {}

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": {}}  # a map goes to no other process

    def read(self, shards: Sequence[Shard], rows: Sequence[int], flips: Sequence[bool]) -> dict[str, Tensor]:
        """The rows of records of one size, stacked, and how long each is; shorter ones end in zeros.

        Where a record has none the length is 0 and the row zeros, of a mask ones.
        """
        places = zip(shards, rows, flips, strict=True)
        found = [self._row(shard.number, row, is_flipped) for shard, row, is_flipped in places]
        lengths = torch.tensor([0 if row is None else len(row) for row in found], dtype=torch.int64, device="cpu")
        shape = self._shape(shards[0], int(lengths.max()))
        batch = torch.zeros((len(found), *shape), dtype=self._dtype, device="cpu")
        for place, row in zip(batch, found, strict=True):
            if row is not None:
                place[: len(row)] = row
        if self.kind != "tensor":
            batch = batch.float()
            batch = (
                F.avg_pool2d(batch, self._scaling.latents_patch) if self.kind == "mask" else scale(batch, self._scaling)
            )
            batch[lengths == 0] = 1.0 if self.kind == "mask" else 0.0
        return {self.name: batch, f"{self.name}_length": lengths}

    def _row(self, number: int, row: int, flip: bool) -> Tensor | None:
        if number not in self._open:
            self._open[number] = _MappedRows(self._shards[number], self._dtype, self._flip == "stored")
        return self._open[number].row(row, self._flip if flip else "same")

    def _shape(self, shard: Shard, length: int) -> tuple[int, ...]:
        """The shape of a batch's rows, also where none of its records has one."""
        if self.kind == "tensor":
            return length, *self._others.get(shard.bucket_px, next(iter(self._others.values()), ()))
        channels, height, width = shard.places.shape[1:]
        return 1 if self.kind == "mask" else channels, height, width


class _MappedRows:
    """The rows of one shard under a memory map."""

    def __init__(self, shard: StreamShard, dtype: torch.dtype, has_flips: bool) -> None:
        file = shard.file
        if not file.is_present():
            raise VerifyError(f"{file.path} is missing, or is not the {file.num_bytes:,} bytes committed")
        data = torch.from_file(str(file.path), shared=False, size=file.num_bytes, dtype=torch.uint8)
        self._starts: list[int] = data[DATA_START : shard.values_at()].view(torch.int64).tolist()
        self._values = {
            is_flipped: data[shard.values_at(is_flipped) :][: shard.values_bytes].view(dtype).view(shard.shape)
            for is_flipped in ([False, True] if has_flips else [False])
        }

    def row(self, row: int, flip: Flip) -> Tensor | None:
        """A row, or None where the record has none; `flip` as the stream declares it, "same" for a photo as it is."""
        start, end = self._starts[row], self._starts[row + 1]
        if start == end:
            return None
        values = self._values[flip == "stored"][start:end]
        return values.flip(-1) if flip == "mirror" else values
