"""Distances between two sets of features: Frechet's, and the kernel's."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
SUBSET, NUM_SUBSETS = 1000, 100  # of KID, as torch-fidelity draws them


@dataclass
class FeatureStatistics:
    """Mean and covariance of features that come a few at a time (Chan, Golub and LeVeque 1979)."""

    num: int = 0
    mean: Array | float = 0.0
    squares: Array | float = 0.0

    def add(self, features: NDArray[np.floating]) -> None:  # (N, D)
        """Take in features, in fp64."""
        values = features.astype(np.float64)
        count, mean = len(values), values.mean(0)
        centred = values - mean
        step = mean - self.mean
        total = self.num + count
        self.squares = self.squares + centred.T @ centred + np.outer(step, step) * (self.num * count / total)
        self.mean = self.mean + step * (count / total)
        self.num = total

    @property
    def covariance(self) -> Array:
        """With N - 1, as numpy's and every FID's."""
        return np.asarray(self.squares) / (self.num - 1)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), of two Gaussians with these means and covariances.

    The trace of the root is the sum of the singular values of S1^(1/2) S2^(1/2): unlike the roots of eigenvalues, they
    are exact to rounding where there are fewer images than features.
    """
    difference = np.asarray(first.mean) - np.asarray(second.mean)
    crossed = np.linalg.svd(_root(first.covariance) @ _root(second.covariance), compute_uv=False).sum()
    trace = np.trace(first.covariance) + np.trace(second.covariance) - 2.0 * crossed
    return float(difference @ difference + trace)


def _root(covariance: Array) -> Array:
    values, vectors = np.linalg.eigh(covariance)
    root: Array = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    return root


def kernel_distance(first: NDArray[np.floating], second: NDArray[np.floating], seed: int = 0) -> float:
    """KID (Binkowski et al. 2018): the unbiased squared MMD under the kernel (x.y / D + 1)^3; it may be negative.

    Of more than SUBSET features, the mean over NUM_SUBSETS subsets of that size.
    """
    pairs = [_unbiased_mmd(first[ours], second[theirs]) for ours, theirs in _subsets(len(first), len(second), seed)]
    return float(np.mean(pairs))


def _subsets(num_first: int, num_second: int, seed: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    size = min(num_first, num_second)
    if size <= SUBSET:
        yield np.arange(num_first), np.arange(num_second)
        return
    rng = np.random.default_rng(seed)
    for _ in range(NUM_SUBSETS):
        yield rng.choice(num_first, SUBSET, replace=False), rng.choice(num_second, SUBSET, replace=False)


def _unbiased_mmd(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    ours, theirs = first.astype(np.float64), second.astype(np.float64)
    within = [_mean_without_diagonal(_kernel(one, one)) for one in (ours, theirs)]
    return float(sum(within) - 2.0 * _kernel(ours, theirs).mean())


def _kernel(first: Array, second: Array) -> Array:
    kernel: Array = (first @ second.T / first.shape[1] + 1.0) ** 3
    return kernel


def _mean_without_diagonal(kernel: Array) -> float:
    num = len(kernel)
    return float((kernel.sum() - np.trace(kernel)) / (num * (num - 1)))
