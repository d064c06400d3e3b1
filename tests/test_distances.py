import sys

import numpy as np
import pytest
import torch

from sdvae.perceptual import distances
from sdvae.perceptual.distances import FeatureStatistics, frechet_distance, kernel_distance


def statistics(features: np.ndarray, chunk: int = 7) -> FeatureStatistics:
    gathered = FeatureStatistics()
    for start in range(0, len(features), chunk):
        gathered.add(features[start : start + chunk])
    return gathered


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> FeatureStatistics:
    return FeatureStatistics(2, mean, covariance)  # N - 1 is 1


def test_statistics_are_numpys() -> None:
    features = np.random.default_rng(0).normal(3.0, 2.0, (50, 6)).astype(np.float32)
    gathered = statistics(features)
    np.testing.assert_allclose(gathered.mean, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(gathered.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-10)


def test_frechet_distance_of_gaussians_that_commute_has_its_closed_form() -> None:
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    first, second = rng.uniform(0.1, 4.0, (2, 8))
    shift = rng.normal(size=8)
    expected = shift @ shift + np.square(np.sqrt(first) - np.sqrt(second)).sum()
    found = frechet_distance(
        gaussian(shift, basis @ np.diag(first) @ basis.T), gaussian(np.zeros(8), basis @ np.diag(second) @ basis.T)
    )
    assert abs(found - expected) < 1e-6


def test_frechet_distance_of_two_by_two_covariances_has_its_closed_form() -> None:
    """tr((AB)^(1/2)) = sqrt(tr(AB) + 2 sqrt(det(AB))): matrices that do not commute."""
    first, second = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
    product = first @ second
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.trace(first) + np.trace(second) - 2 * root
    assert abs(frechet_distance(gaussian(np.zeros(2), first), gaussian(np.zeros(2), second)) - expected) < 1e-6


def test_frechet_distance_is_that_of_torchmetrics() -> None:
    from torchmetrics.image.fid import _compute_fid

    rng = np.random.default_rng(0)
    first = rng.normal(size=(60, 12)) @ rng.normal(size=(12, 12))
    second = rng.normal(0.3, 1.0, size=(60, 12)) @ rng.normal(size=(12, 12))
    means = [torch.from_numpy(features.mean(0)) for features in (first, second)]
    covariances = [torch.from_numpy(np.cov(features, rowvar=False)) for features in (first, second)]
    theirs = float(_compute_fid(means[0], covariances[0], means[1], covariances[1]))
    ours = frechet_distance(statistics(first), statistics(second))
    assert abs(ours - theirs) < 1e-6 * max(1.0, theirs)


def test_frechet_distance_of_fewer_images_than_features_is_finite_and_zero_to_itself() -> None:
    features = np.random.default_rng(0).normal(size=(5, 40))
    assert abs(frechet_distance(statistics(features), statistics(features))) < 1e-6


def test_the_kernel_distance_is_unbiased() -> None:
    """Two sets of one distribution: the mean over many draws is zero, within four standard errors."""
    rng = np.random.default_rng(0)
    found = [kernel_distance(rng.normal(size=(8, 3)), rng.normal(size=(8, 3))) for _ in range(4000)]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 4 * error
    # The biased estimate, with the diagonal, would be far outside.
    assert error < 0.1


def test_the_kernel_distance_of_shifted_sets_is_the_kernels() -> None:
    """One dimension, points at a and b: k(a, a) + k(b, b) - 2 k(a, b)."""
    first, second = np.full((4, 1), 1.0), np.full((4, 1), 2.0)
    assert kernel_distance(first, second) == pytest.approx(8.0 + 125.0 - 2 * 27.0)


def test_many_features_are_compared_in_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "SUBSET", 10)
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(200, 4)), rng.normal(0.5, 1.0, size=(200, 4))
    in_subsets = kernel_distance(first, second)
    assert in_subsets == kernel_distance(first, second)
    monkeypatch.setattr(distances, "SUBSET", sys.maxsize)
    assert in_subsets == pytest.approx(kernel_distance(first, second), rel=0.3)
