"""The posteriors of many photos, of a source or of a store, as one batch."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch

from sdvae.encoding.prepare import list_entries
from sdvae.engine.run import Budget
from sdvae.errors import SourceError, StoreError
from sdvae.explore.photos import cut_photos, encode, in_batches
from sdvae.posterior import DiagonalGaussian
from sdvae.progress import Progress, silent
from sdvae.reading.spaces import require_space
from sdvae.sources.entries import Source
from sdvae.store.geometry import Preprocess
from sdvae.store.store import Store
from sdvae.vae import VAE

MOST_PHOTOS = 1000  # of 512 px: 130 MB of moments
_Any = TypeVar("_Any")


def of_photos(
    source: Source,
    vae: VAE,
    size_px: int,
    *,
    batch_size: int | None = None,
    budget: Budget = None,
    left_out: dict[str, str],
    progress: Progress = silent,
) -> DiagonalGaussian:
    """The posteriors of a source's photos, of at most MOST_PHOTOS, evenly spread; SourceError where none can be read.

    Each is the centre square of a photo at `size_px`. `left_out` is told key and reason of those that cannot be read.
    """
    entries = _evenly(list_entries(source), MOST_PHOTOS)
    means, logvars = [], []
    num_done = 0
    progress("encode", 0, len(entries))
    for batch in in_batches(cut_photos(source, entries, Preprocess(size_px), left_out), batch_size):
        posterior = encode(vae, batch, budget)
        means.append(posterior.mean.cpu())
        logvars.append(posterior.logvar.cpu())
        num_done += len(batch)
        progress("encode", num_done, len(entries))
    if not means:
        raise SourceError(f"no photo of {source.name} can be read: {next(iter(left_out.values()))}")
    return DiagonalGaussian(torch.cat(means), torch.cat(logvars))


def of_store(store: Store, vae: VAE, space: str | None = None) -> DiagonalGaussian:
    """The posteriors of a store's records, of at most MOST_PHOTOS, evenly spread; StoreError for more than one size.

    `space` names the latent space of both where it is not proved that they share one (StoreError).
    """
    require_space(store, vae, space)
    rows_of = [(shard, rows) for shard in store.shards() if (rows := shard.rows)]
    if not rows_of:
        raise StoreError(f"{store.paths.root} holds no latents; run sdvae encode to its end")
    sizes = {shard.bucket_px for shard, _ in rows_of}
    if len(sizes) > 1:
        raise StoreError(
            f"{store.paths.root} holds latents of {len(sizes)} sizes, and a distribution has one; give the photos "
            "instead of the store"
        )
    places = _evenly(range(sum(len(rows) for _, rows in rows_of)), MOST_PHOTOS)
    means, logvars = [], []
    first = 0
    for shard, rows in rows_of:  # one map open at a time: a store may have more shards than a process may open files
        chosen = [rows[place - first] for place in places if first <= place < first + len(rows)]
        mean, logvar = shard.moments()
        means.append(mean[chosen].astype(np.float32))
        logvars.append(logvar[chosen].astype(np.float32))
        first += len(rows)
    return DiagonalGaussian(torch.from_numpy(np.concatenate(means)), torch.from_numpy(np.concatenate(logvars)))


def _evenly(items: Sequence[_Any], most: int) -> list[_Any]:
    number = min(most, len(items))
    return [items[place * len(items) // number] for place in range(number)]
