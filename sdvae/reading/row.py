"""One record on its way into another trainer's format, and what such a format declares."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from sdvae.posterior import DiagonalGaussian
from sdvae.reading.dataset import LatentDataset, record_stream
from sdvae.reading.declaration import LatentFiles
from sdvae.store.buckets import Size
from sdvae.store.shard import Shard

Settings = dict[str, Any]
File = tuple[str, bytes | Iterable[bytes | memoryview]]  # path below the folder of the export, content


@dataclass(frozen=True)
class Row:
    """One record on its way out."""

    number: int  # counted over the whole store
    name: str  # for a file, without an ending: the record's key, made safe
    shard: Shard
    record: dict[str, Any]  # its line of the index
    label: int | None  # index into the dataset's classes
    moments: dict[str, NDArray[Any]]  # mean, logvar, of mirrored photos mean_flip, logvar_flip: (C, h, w) raw
    seed: int

    @property
    def size_px(self) -> Size:
        """(height, width) of the pixels that were encoded."""
        assert self.shard.bucket_px is not None
        return self.shard.bucket_px

    def posterior(self, ending: str = "") -> DiagonalGaussian:  # of (C, h, w) float32
        """What the encoder said of the photo, or with "_flip" of the mirrored one."""
        mean, logvar = (torch.from_numpy(self.moments[name + ending].astype(np.float32)) for name in ("mean", "logvar"))
        return DiagonalGaussian(mean, logvar)

    def samples(self) -> dict[str, Tensor]:  # raw (C, h, w) float32
        """One draw from each posterior, under "" and, where it is stored, "_flip"; the same in every export."""
        noise = Generator(record_stream(self.seed, self.record["key"], epoch=0))
        drawn = {}
        for ending in ("", "_flip"):
            if f"mean{ending}" in self.moments:
                posterior = self.posterior(ending)
                values = noise.standard_normal(posterior.mean.shape, np.float32)
                drawn[ending] = posterior.mean + posterior.std * torch.from_numpy(values)
        return drawn


@dataclass(frozen=True)
class Format:
    """What a format holds, whose reader says so, and what a store must be for it to hold the truth."""

    reader: str
    value: Literal["sample", "mean", "mean and std", "mean and logvar"]
    scaling: str
    flips: str
    latent_spaces: tuple[str, ...] | None  # None: any
    settings: Callable[[LatentDataset], Settings]  # what to tell the trainer; StoreError for a store it would misread
    files: Callable[[LatentDataset, Iterator[Row]], Iterator[File]]
    latent_files: LatentFiles
    config: Callable[[Settings, Path], File] | None = None  # the trainer's own, for an export in that folder
    training: Callable[[LatentDataset], str] | None = None  # the command that trains with it; OUT is its folder
