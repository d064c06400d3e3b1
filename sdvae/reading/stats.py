"""What the latents of a store are like: mean and std of each channel, and the scaling factor they ask for."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdvae.amounts import size_text
from sdvae.errors import StoreError
from sdvae.store.records import written
from sdvae.store.store import Store

_CHUNK_VALUES = 2**20  # of mean, widened to fp64 at once


@dataclass(frozen=True)
class StoreStats:
    """Statistics of raw latents as a reader draws them: of samples of the posterior, mirrored ones included.

    Variances add up: `std[c]**2` is the variance of the posteriors' means and `posterior_std[c]**2`, which is the
    mean of their variances.
    """

    num_written: int
    num_quarantined: int
    buckets: dict[str, int]  # "768x512" (width x height) -> records
    num_enlarged: int  # of those written: they have more pixels than the photo had
    quarantined: dict[str, int]  # reason -> records, the most frequent first
    mean: list[float]  # of each channel, as are
    std: list[float]
    posterior_std: list[float]
    overall_mean: float
    overall_std: float

    @property
    def scaling_factor(self) -> float:
        """What brings the latents to unit std: 1 / std of all channels together, as Stable Diffusion's was measured."""
        return 1.0 / self.overall_std


@dataclass
class _Running:
    """Mean and squared deviations of each channel, merged chunk by chunk (Chan, Golub and LeVeque 1979)."""

    count: int = 0
    mean: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))
    squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))

    def add(self, values: NDArray[np.float64]) -> None:  # (rows, C, h, w)
        count = values[:, 0].size
        mean = values.mean((0, 2, 3))
        squares = np.square(values - mean[:, None, None]).sum((0, 2, 3))
        total = self.count + count
        step = mean - self.mean
        self.squares = self.squares + squares + step**2 * (self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total


def measure(store: Store) -> StoreStats:
    """Read every committed number once, in fp64; the memory needed does not grow with the store."""
    means, variances = _Running(), _Running()
    buckets: Counter[str] = Counter()
    num_enlarged = 0
    num_written = 0
    for shard in store.shards():
        rows = shard.rows
        if not rows:
            continue
        assert shard.bucket_px is not None
        num_written += len(rows)
        buckets[size_text(*shard.bucket_px)] += len(rows)
        num_enlarged += sum(map(_is_enlarged, written(shard.records())))
        tensors = shard.tensors()
        chunk_rows = max(1, _CHUNK_VALUES // tensors["mean"][0].size)
        for start in range(0, len(rows), chunk_rows):
            for name, values in tensors.items():
                chunk = values[list(rows[start : start + chunk_rows])].astype(np.float64)
                if name.startswith("mean"):
                    means.add(chunk)
                else:
                    variances.add(np.exp(chunk))
    if not means.count:
        raise StoreError(f"{store.paths.root} holds no latents yet; run sdvae encode")
    quarantined = store.quarantined()
    of_means = means.squares / means.count
    overall_mean = float(means.mean.mean())
    variance = of_means + variances.mean
    return StoreStats(
        num_written=num_written,
        num_quarantined=len(quarantined),
        buckets=dict(sorted(buckets.items())),
        num_enlarged=num_enlarged,
        quarantined=dict(Counter(line["reason"] for line in quarantined).most_common()),
        mean=means.mean.tolist(),
        std=np.sqrt(variance).tolist(),
        posterior_std=np.sqrt(variances.mean).tolist(),
        overall_mean=overall_mean,
        overall_std=float(np.sqrt((variance + (means.mean - overall_mean) ** 2).mean())),
    )


def _is_enlarged(record: dict[str, Any]) -> bool:
    sides = zip(record["resized_px"], record["original_px"], strict=True)
    return any(resized > original for resized, original in sides)
