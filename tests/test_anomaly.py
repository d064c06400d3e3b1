"""Anomalies: scores that can be computed on paper, a planted outlier, a threshold that is exact."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdvae import VAE, rank_anomalies
from sdvae.errors import ConfigError, SourceError
from sdvae.explore.anomaly import Ranking, Scorer, reconstruct_worst
from sdvae.explore.photos import Item
from sdvae.sources.entries import Entry
from sdvae.sources.open import open_source
from sdvae.store.geometry import Preprocess
from tests.linear_vae import LinearVAE

OWN_SIZE = Preprocess(None, "none")


def items(*seeds: int, size: tuple[int, int] = (4, 6)) -> list[Item]:
    return [
        Item(Entry(f"{seed}.png"), np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)) for seed in seeds
    ]


def pixels(item: Item) -> np.ndarray:
    return item.image.astype(np.float64) / 127.5 - 1


def nats(item: Item, vae: LinearVAE) -> float:
    """-log p(x) per value, on paper."""
    std = vae.evidence_std
    return float(np.mean(0.5 * (pixels(item) / std) ** 2 + math.log(std * math.sqrt(2 * math.pi))))


def test_the_error_is_the_mean_square_of_what_is_lost() -> None:
    vae = LinearVAE(slope=0.8, noise=0.4)
    lost = 1 - vae.slope**2 / vae.evidence_std**2
    found = Scorer(vae)(items(0, 1))
    assert found == pytest.approx([lost**2 * np.mean(pixels(item) ** 2) for item in items(0, 1)], rel=1e-6)


@pytest.mark.parametrize("samples", [1, 5])
def test_with_the_true_posterior_every_sample_gives_the_likelihood(samples: int) -> None:
    vae = LinearVAE(slope=0.8, noise=0.4)
    found = Scorer(vae, "likelihood", noise_std=0.4, num_samples=samples)(items(0, 1))
    assert found == pytest.approx([nats(item, vae) for item in items(0, 1)], abs=1e-5)


def test_the_elbo_tends_to_the_likelihood_and_importance_sampling_is_nearer_with_another_posterior() -> None:
    (item,) = items(2, size=(2, 1))
    true, wide = LinearVAE(noise=0.5), LinearVAE(noise=0.5, width=1.5)
    exact = nats(item, true)
    assert Scorer(true, "elbo", 0.5, num_samples=4000)([item])[0] == pytest.approx(exact, abs=0.02)  # 5 standard errors
    gap = 0.5 * (1.5**2 - 1 - math.log(1.5**2))  # KL to the true posterior, for each latent number
    elbo = Scorer(wide, "elbo", 0.5, num_samples=4000)([item])[0]
    assert elbo == pytest.approx(exact + gap, abs=0.04)
    likelihood = Scorer(wide, "likelihood", 0.5, num_samples=4000)([item])[0]
    assert likelihood == pytest.approx(exact, abs=0.03) and likelihood < elbo - 0.1


def test_scores_depend_on_seed_and_key_and_not_on_the_batch() -> None:
    vae = LinearVAE()
    together = Scorer(vae, "elbo", 0.5, seed=1)(items(0, 1, 2))
    alone = [Scorer(vae, "elbo", 0.5, seed=1)([item])[0] for item in items(0, 1, 2)]
    assert together == pytest.approx(alone, rel=1e-9)
    assert Scorer(vae, "elbo", 0.5, seed=2)(items(0))[0] != together[0]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Nine photos near grey, and one with the full contrast that this VAE shrinks most; of odd sizes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(9):
        noise = np.random.default_rng(number).integers(108, 148, (5 + number % 3, 7, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    odd = np.random.default_rng(9).choice(np.array([0, 255], np.uint8), (6, 7, 3))
    Image.fromarray(odd).save(folder / "odd.png")
    return folder


@pytest.mark.parametrize("by", ["error", "elbo", "likelihood"])
def test_a_planted_outlier_is_first(photos: Path, by: str) -> None:
    vae = LinearVAE(slope=0.3, noise=0.3)
    found = rank_anomalies(photos, vae, by=by, preprocess=OWN_SIZE, batch_size=3)  # type: ignore[arg-type]
    assert found.scores[0][0] == "odd.png" and found.scores[0][1] > 1.5 * abs(found.scores[1][1])
    assert [score for _, score in found.scores] == sorted((score for _, score in found.scores), reverse=True)
    assert len(found.scores) == 10 and not found.left_out and found.threshold is None and not found.anomalies
    assert (found.noise_std is None) == (by == "error")


def test_the_threshold_is_a_quantile_of_clean_photos_exactly(photos: Path, tmp_path: Path) -> None:
    clean = tmp_path / "clean"
    clean.mkdir()
    for path in photos.glob("[0-9].png"):
        path.rename(clean / path.name)
    vae = LinearVAE(slope=0.3, noise=0.3)
    own = [score for _, score in rank_anomalies(clean, vae, preprocess=OWN_SIZE).scores]
    for quantile, place in ((1.0, 0), (0.85, 1), (0.5, 4)):
        found = rank_anomalies(photos, vae, clean, quantile=quantile, preprocess=OWN_SIZE)
        assert found.threshold == own[place]
        assert [key for key, _ in found.anomalies] == ["odd.png"]
        among_clean = rank_anomalies(clean, vae, clean, quantile=quantile, preprocess=OWN_SIZE)
        assert len(among_clean.anomalies) == place <= (1 - quantile) * 9
    by_likelihood = rank_anomalies(photos, vae, clean, by="likelihood", preprocess=OWN_SIZE)
    errors = [score for _, score in rank_anomalies(clean, vae, preprocess=OWN_SIZE).scores]
    assert by_likelihood.noise_std == pytest.approx(math.sqrt(np.mean(errors)))


def test_crops_are_those_of_encode_and_batches_stay_small(photos: Path) -> None:
    vae = LinearVAE()
    rank_anomalies(photos, vae, preprocess=Preprocess(4), batch_size=3)
    assert vae.largest_batch == 3
    rank_anomalies(photos, vae, preprocess=Preprocess(4))
    assert vae.largest_batch == 10
    with pytest.raises(SourceError, match="can be scored: too small"):
        rank_anomalies(photos, vae, preprocess=Preprocess(4, min_size_px=100))


def test_photos_that_cannot_be_read_are_left_out_with_their_reason(photos: Path) -> None:
    (photos / "x.png").write_bytes(b"no photo")
    found = rank_anomalies(photos, LinearVAE(), preprocess=OWN_SIZE)
    assert list(found.left_out) == ["x.png"] and len(found.scores) == 10


def test_the_worst_are_shown_beside_what_the_vae_makes_of_them(photos: Path) -> None:
    vae, source = LinearVAE(slope=0.3, noise=0.3), open_source(photos)
    ranking = rank_anomalies(source, vae, preprocess=OWN_SIZE)
    shown = reconstruct_worst(source, vae, ranking, 3, OWN_SIZE)
    assert [(key, score) for key, score, _, _ in shown] == ranking.scores[:3]
    _, _, before, after = shown[0]
    assert np.array_equal(before, np.asarray(Image.open(photos / "odd.png")))
    assert np.abs(after.astype(float) - (127.5 + 0.5 * (before - 127.5))).max() <= 1


def test_a_perfect_vae_has_a_likelihood_too(photos: Path, small_vae: VAE) -> None:
    found = rank_anomalies(photos, LinearVAE(noise=1e-6), by="likelihood", preprocess=OWN_SIZE)
    assert found.noise_std == pytest.approx(1 / 255)
    assert isinstance(rank_anomalies(photos, small_vae, by="elbo", preprocess=Preprocess(16)), Ranking)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"by": "colour"}, "unknown score 'colour'; it is error, elbo or likelihood"),
        ({"quantile": 0.0}, "a quantile of 0.0 is none"),
        ({"num_samples": 0}, "0 samples estimate nothing"),
    ],
)
def test_settings_that_mean_nothing_are_refused(photos: Path, settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        rank_anomalies(photos, LinearVAE(), **settings)  # type: ignore[arg-type]
