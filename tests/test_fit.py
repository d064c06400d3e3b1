"""Distributions fitted to latents: moments, planted clusters, and where posteriors come from."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sdvae import VAE, fit_latents
from sdvae.errors import ConfigError, SourceError, StoreError
from sdvae.explore import posteriors
from sdvae.explore.posteriors import of_photos, of_store
from sdvae.posterior import DiagonalGaussian
from sdvae.sources.open import open_source
from tests.linear_vae import IdentityVAE
from tests.made_stores import make_store


def posterior_of(means: Tensor, std: float = 0.3) -> DiagonalGaussian:  # means (N, D)
    shaped = means.view(len(means), 1, 1, -1)
    return DiagonalGaussian(shaped, torch.full_like(shaped, 2.0 * np.log(std)))


def test_a_gaussian_has_mean_and_covariance_of_the_aggregate_posterior() -> None:
    generator = torch.Generator().manual_seed(1)
    means = torch.randn((40, 6), generator=generator) @ torch.randn((6, 6), generator=generator) + 3.0
    fitted = fit_latents(posterior_of(means, std=0.3))
    assert fitted.directions.shape == (6, 6) and fitted.weights.tolist() == [1.0]
    covariance = fitted.directions.T @ torch.diag(fitted.rest_std**2) @ fitted.directions + 0.09 * torch.eye(6)
    expected = torch.cov(means.T, correction=0) + 0.09 * torch.eye(6)
    assert torch.allclose(covariance, expected, atol=1e-4) and torch.allclose(fitted.mean, means.mean(0), atol=1e-5)
    drawn = fitted.sample(20_000, torch.Generator().manual_seed(0)).flatten(1)
    assert torch.allclose(drawn.mean(0), means.mean(0), atol=0.15)  # 5 standard errors of a std of 4
    assert (torch.cov(drawn.T) - expected).norm() / expected.norm() < 0.05


def test_more_numbers_than_images_leave_the_directions_between_the_images() -> None:
    means = torch.randn((5, 300), generator=torch.Generator().manual_seed(2))
    fitted = fit_latents(posterior_of(means, std=1e-6))
    assert fitted.directions.shape == (4, 300)
    drawn = fitted.sample(7, torch.Generator().manual_seed(0)).flatten(1) - means.mean(0)
    spanned = drawn @ fitted.directions.T @ fitted.directions
    assert (drawn - spanned).abs().max() < 1e-4 < drawn.abs().max()


def test_one_image_gives_its_own_posterior() -> None:
    fitted = fit_latents(posterior_of(torch.tensor([[2.0, -1.0]]), std=0.5))
    assert fitted.directions.shape == (0, 2)
    drawn = fitted.sample(4000, torch.Generator().manual_seed(0)).flatten(1)
    assert torch.allclose(drawn.mean(0), torch.tensor([2.0, -1.0]), atol=0.05)
    assert torch.allclose(drawn.std(0), torch.tensor([0.5, 0.5]), atol=0.05)


def planted(num_images: int) -> tuple[Tensor, Tensor]:
    """Three clusters in eight dimensions, of std 0.5: their centers, and images of them in turn."""
    centers = torch.zeros(3, 8)
    centers[0, 0], centers[1, 1], centers[2, 2] = 10.0, 10.0, 10.0
    noise = 0.5 * torch.randn((num_images, 8), generator=torch.Generator().manual_seed(3))
    return centers, centers[torch.arange(num_images) % 3] + noise


def test_a_mixture_recovers_planted_clusters() -> None:
    pytest.importorskip("sklearn", reason="mixtures need scikit-learn")
    centers, means = planted(300)
    fitted = fit_latents(posterior_of(means, std=0.1), num_components=3)
    assert fitted.factors.shape == (3, 8, 8) and torch.allclose(fitted.weights, torch.full((3,), 1 / 3), atol=1e-3)
    found = fitted.mean + fitted.centers @ fitted.directions
    distances = torch.cdist(centers, found)
    assert distances.min(1).values.max() < 0.25 and sorted(distances.argmin(1).tolist()) == [0, 1, 2]
    drawn = fitted.sample(600, torch.Generator().manual_seed(0)).flatten(1)
    nearest, which = torch.cdist(drawn, centers).min(1)
    assert nearest.max() < 4.0  # in eight dimensions of std 0.5; the gap between two clusters is 14
    assert torch.bincount(which, minlength=3).min() > 150
    gaussian = fit_latents(posterior_of(means)).sample(600, torch.Generator().manual_seed(0)).flatten(1)
    assert torch.cdist(gaussian, centers).min(1).values.max() > 4.0, "one Gaussian draws between them"


def test_a_mixture_of_few_images_takes_the_largest_directions_and_leaves_the_rest_one_gaussian() -> None:
    pytest.importorskip("sklearn", reason="mixtures need scikit-learn")
    _, means = planted(36)
    fitted = fit_latents(posterior_of(means, std=1e-3), num_components=3)
    assert fitted.factors.shape == (3, 3, 3) and fitted.rest_std.shape == (5,)
    again = fit_latents(posterior_of(means, std=1e-3), num_components=3)
    assert torch.equal(fitted.sample(2, torch.Generator()), again.sample(2, torch.Generator()))


def test_too_few_images_for_a_mixture_are_refused() -> None:
    with pytest.raises(ConfigError, match="a mixture of 3 needs at least 12 images that differ, these are 11"):
        fit_latents(posterior_of(planted(11)[1]), num_components=3)


def test_a_mixture_without_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr("sdvae.explore.fit.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs scikit-learn, .* pip install 'sdvae\[explore\]'"):
        fit_latents(posterior_of(planted(60)[1]), num_components=3)


# --- Where posteriors come from ---


def test_posteriors_of_photos_are_those_of_their_centers(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (12, 8), (number * 50,) * 3).save(tmp_path / f"{number}.png")
    (tmp_path / "x.png").write_bytes(b"no photo")
    left_out: dict[str, str] = {}
    seen: list[tuple[str, int, int]] = []
    found = of_photos(
        open_source(tmp_path), IdentityVAE(), 8, batch_size=2, left_out=left_out,
        progress=lambda *told: seen.append(told),
    )  # fmt: skip
    assert found.mean.shape == (3, 3, 8, 8)
    assert [float(mean.mean()) for mean in found.mean] == pytest.approx([-1.0, 100 / 255 - 1, 200 / 255 - 1])
    assert list(left_out) == ["x.png"]
    assert seen[0] == ("encode", 0, 4)


def test_many_photos_are_thinned_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(posteriors, "MOST_PHOTOS", 4)
    for number in range(10):
        Image.new("RGB", (8, 8), (number * 20,) * 3).save(tmp_path / f"{number}.png")
    found = of_photos(open_source(tmp_path), IdentityVAE(), 8, left_out={})
    levels = ((found.mean.mean((1, 2, 3)) + 1) * 127.5 / 20).round().int().tolist()
    assert levels == [0, 2, 5, 7]


def test_photos_that_cannot_be_read_are_no_distribution(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no photo")
    with pytest.raises(SourceError, match=r"no photo of .* can be read: not an image"):
        of_photos(open_source(tmp_path), IdentityVAE(), 8, left_out={})


def test_posteriors_of_a_store_are_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_vae: VAE) -> None:
    store = make_store(tmp_path, {(64, 64): 6}, shard_rows=4, latent_space=small_vae.latent_space)
    rows = np.concatenate([shard.moments()[0] for shard in store.shards()]).astype(np.float32)
    assert np.array_equal(of_store(store, small_vae).mean.numpy(), rows)
    monkeypatch.setattr(posteriors, "MOST_PHOTOS", 3)
    assert np.array_equal(of_store(store, small_vae).mean.numpy(), rows[[0, 2, 4]])


def test_a_store_of_two_sizes_or_another_space_is_refused(tmp_path: Path, small_vae: VAE) -> None:
    two = make_store(tmp_path / "two", {(64, 64): 1, (64, 128): 1}, latent_space=small_vae.latent_space)
    with pytest.raises(StoreError, match="holds latents of 2 sizes"):
        of_store(two, small_vae)
    other = make_store(tmp_path / "other", {(64, 64): 1}, latent_space="elsewhere")
    with pytest.raises(StoreError, match="holds latents of the space elsewhere"):
        of_store(other, small_vae)
