"""The photos of a source as images, cut as `encode` cuts them; a few are in memory at a time."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sdvae.encoding.resize import apply, choose_resizer
from sdvae.engine.run import Budget
from sdvae.errors import ImageError
from sdvae.evaluate.photos import read_photos
from sdvae.pixels import pad_to_multiple, to_pixels
from sdvae.posterior import DiagonalGaussian
from sdvae.sources.entries import Entry, Source
from sdvae.store.geometry import Preprocess, plan_geometry
from sdvae.vae import VAE

_AUTO_PIXELS = 512**2


@dataclass(frozen=True)
class Item:
    """A photo, cut."""

    entry: Entry
    image: NDArray[np.uint8]  # (H, W, 3)


def cut_photos(
    source: Source, entries: Sequence[Entry], preprocess: Preprocess, left_out: dict[str, str]
) -> Iterator[Item]:
    """Photos as images, in the order of `entries`; `left_out` is told key and reason of those that cannot be read."""
    resizer = choose_resizer(preprocess.resample)  # as `encode` chooses
    for photo in read_photos(source, list(enumerate(entries))):
        if photo.image is None:
            left_out[photo.key] = photo.reason
            continue
        height, width, _ = photo.image.shape
        try:
            geometry = plan_geometry(height, width, preprocess, downscale=1, key=photo.key)
        except ImageError as error:
            left_out[photo.key] = str(error)
            continue
        yield Item(entries[photo.index], apply(photo.image, geometry, preprocess.resample, resizer))


def in_batches(items: Iterable[Item], batch_size: int | None) -> Iterator[list[Item]]:
    """Neighbours of one size together: `batch_size` of them, or as many as have the pixels of one of 512x512."""
    batch: list[Item] = []
    for item in items:
        height, width, _ = item.image.shape
        most = batch_size or max(1, _AUTO_PIXELS // (height * width))
        if batch and (len(batch) == most or item.image.shape != batch[0].image.shape):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def encode(vae: VAE, items: Sequence[Item], budget: Budget = None) -> DiagonalGaussian:
    """The posteriors of images of one size, padded by reflection to a whole number of latents."""
    padded = [pad_to_multiple(item.image, vae.config.downscale) for item in items]
    return vae.encode(to_pixels(np.stack(padded)), budget)


def decode(vae: VAE, latents: Tensor, items: Sequence[Item], budget: Budget = None) -> Tensor:  # (N, 3, H, W)
    """The pixels of latents that `encode` gave, or of moved ones, without the padding."""
    height, width, _ = items[0].image.shape
    return vae.decode(latents, budget)[:, :, :height, :width]
