"""beta-VAE on sprites: does each factor get a latent of its own? The mutual information gap counts it."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from theory.dense import DenseVAE
from theory.draw_sprites import FACTORS, SIDE, every_sprite
from theory.figures import Grid, draw_grids
from theory.fit import Schedule
from theory.grey import Shape, latent_means, train_grey_vae
from theory.work import Findings, Row, Work

NUM_BINS = 20  # of a latent, as Locatello et al. 2019 (arXiv 1811.12359) count mutual information
NUM_MOVES = 9  # of a latent, in the picture
LITTLE = 0.1  # of a factor's entropy: less is not named there
Factors = NDArray[np.float32]


@dataclass(frozen=True)
class Settings:
    """All 28,224 sprites; each VAE takes about two minutes.

    Small first weights let latents begin one after the other, each along an axis of its own. Under weights that keep
    the scale all begin at once, mixed: after 12 epochs the gap was 0.03 for beta 4 and 0.06 for beta 1.
    """

    shape: Shape = field(default_factory=lambda: Shape(num_latents=10, width=256, keeps_scale=False))
    schedule: Schedule = field(default_factory=lambda: Schedule(25))
    betas: tuple[float, float] = (1.0, 4.0)
    num_seeds: int = 3
    every: int = 1  # of the sprites, which ones are used


def information(latents: NDArray[np.float32], factors: Factors) -> NDArray[np.float64]:  # (N, L), (N, K) -> (L, K)
    """Mutual information of each latent and each factor, in units of the factor's entropy: 1 tells it exactly."""
    from sklearn.metrics import mutual_info_score

    codes = [np.digitize(column, np.histogram_bin_edges(column, NUM_BINS)[1:-1]) for column in latents.T]
    values = [np.unique(column, return_inverse=True)[1] for column in factors.T]
    entropies = [mutual_info_score(column, column) for column in values]
    return np.array([[mutual_info_score(code, of) / nats for of, nats in zip(values, entropies, strict=True)]
                     for code in codes])  # fmt: skip


def gaps(information: NDArray[np.float64]) -> NDArray[np.float64]:  # (L, K) -> (K,)
    """How much more of each factor the best latent tells than the second best (Chen et al. 2018, arXiv 1802.04942)."""
    ranked = np.sort(information, axis=0)
    return ranked[-1] - ranked[-2]


def sprite_vae(work: Work, beta: float, seed: int, settings: Settings = Settings()) -> DenseVAE:
    """The VAE of one beta and one seed; `work` is the folder of this part."""
    images, _ = _sprites(settings)
    return train_grey_vae(work, f"beta-{beta:g}-seed-{seed}", images, settings.shape, settings.schedule, beta, seed)


def run(work: Work, settings: Settings = Settings()) -> Findings:
    """The mutual information gap of each beta and seed."""
    images, factors = _sprites(settings)
    numbers, found = {}, {beta: [] for beta in settings.betas}
    for seed in range(settings.num_seeds):
        for beta in settings.betas:
            told = information(latent_means(sprite_vae(work, beta, seed, settings), images).numpy(), factors.numpy())
            found[beta].append(float(gaps(told).mean()))
            numbers[f"beta {beta:g}, seed {seed}"] = {
                "gap": found[beta][-1],
                "gaps": dict(zip(FACTORS, gaps(told).tolist(), strict=True)),
                "information": told.round(4).tolist(),
            }
    first, second = settings.betas
    plain, strong = found.values()
    row = Row(
        f"beta-VAE on {len(images):,} sprites: mutual information gap, beta {second:g} against {first:g}, by seed",
        f"{_listed(strong)} against {_listed(plain)}: mean {np.mean(strong):.2f} against {np.mean(plain):.2f}",
        "larger",
        bool(np.mean(strong) > np.mean(plain)),
        "Higgins et al. 2017; Chen et al. 2018",
    )
    grids = [_grid(beta, sprite_vae(work, beta, 0, settings), images, factors) for beta in settings.betas]
    text = (
        "Each row moves one latent from -2 to 2 and holds the others. Left of it: the factor that this latent tells "
        "most of, and how much of its entropy."
    )
    return Findings([row], numbers, {draw_grids(work, "latents", grids): text})


def _sprites(settings: Settings) -> tuple[Tensor, Tensor]:  # (N, D), (N, 5)
    images, factors = every_sprite()
    return images.flatten(1)[:: settings.every], factors[:: settings.every]


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


@torch.inference_mode()
def _grid(beta: float, model: DenseVAE, images: Tensor, factors: Tensor) -> Grid:
    """A row for each latent: those that tell something first, in the order of the factors."""
    told = information(latent_means(model, images).numpy(), factors.numpy())
    order = sorted(range(len(told)), key=lambda row: (told[row].max() < LITTLE, told[row].argmax(), -told[row].max()))
    start = model.encode(images[len(images) // 2, None]).mode()
    places = start.repeat(len(order), NUM_MOVES, 1)
    for row, latent in enumerate(order):
        places[row, :, latent] = torch.linspace(-2.0, 2.0, NUM_MOVES, dtype=torch.float32, device="cpu")
    moved = model.mean_image(places.flatten(0, 1)).view(len(order), NUM_MOVES, SIDE, SIDE)
    title = f"beta {beta:g}: mutual information gap {gaps(told).mean():.2f}"
    return Grid(title, moved, [_named(told[row]) for row in order])


def _named(told: NDArray[np.float64]) -> str:
    factor = list(FACTORS)[int(told.argmax())]
    return f"{factor} {told.max():.0%}" if told.max() >= LITTLE else "nothing"
