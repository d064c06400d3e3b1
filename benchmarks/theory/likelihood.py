"""How probable a VAE makes digits that it has not seen, in nats: the figure that papers compare."""

from dataclasses import dataclass, field

import torch

from theory.bernoulli import Shape, binary_test_images, elbo, evidence, train_vae
from theory.dense import DenseVAE
from theory.digits import SIDE
from theory.figures import draw_panels
from theory.fit import Schedule, generator_of
from theory.work import Findings, Row, Work, sheet

TO_REACH = 85.5  # nats
SIGMAS = 3.0  # standard errors within which an image's gap may lie below 0


@dataclass(frozen=True)
class Settings:
    """Burda et al.'s batch of 100 is close to their 20; 60 epochs take a quarter of an hour."""

    shape: Shape = field(default_factory=Shape)
    schedule: Schedule = field(default_factory=lambda: Schedule(60, batch_size=100, learning_rate=2e-3))
    num_samples: int = 5000
    num_elbo_samples: int = 100


def trained_vae(work: Work, settings: Settings = Settings()) -> DenseVAE:
    """The VAE of this part, which others go on from."""
    return train_vae(work, "vae", settings.shape, settings.schedule)


def run(work: Work, settings: Settings = Settings()) -> Findings:
    """-log p(x) of all test images by importance samples, the negative ELBO, and the gap between the two."""
    model, images = trained_vae(work, settings), binary_test_images(work)
    nll = -evidence(work, f"evidence-{settings.num_samples}", model, images, settings.num_samples)
    bound, error = elbo(model, images, settings.num_elbo_samples)
    gap = -bound - nll
    num_below = int((gap < 0.0).sum())
    num_beyond = int((gap < -SIGMAS * error).sum())
    standard_error = nll.std().item() / len(nll) ** 0.5
    count = f"{len(images):,} test images"
    rows = [
        Row(
            f"VAE: -log p(x) of {count}, {settings.num_samples:,} importance samples each",
            f"{nll.mean():.2f} nats (standard error {standard_error:.2f})",
            f"<= {TO_REACH}",
            nll.mean().item() <= TO_REACH,
            "86.76 (Burda et al. 2016)",
        ),
        Row("the same VAE: negative ELBO", f"{-bound.mean():.2f} nats"),
        Row(
            "gap between the two",
            f"{gap.mean():.2f} nats; {num_below} images below 0, {num_beyond} by over {SIGMAS:.0f} standard errors",
            "none below 0 beyond sampling error",
            num_beyond <= 0.002 * len(images),  # 0.13% of a normal distribution lie below 3 sigmas
            "theory: >= 0",
        ),
    ]
    numbers = {
        "nll": nll.mean().item(),
        "nll_standard_error": standard_error,
        "negative_elbo": -bound.mean().item(),
        "gap": gap.mean().item(),
        "gap_quantiles": torch.quantile(gap, torch.tensor([0.0, 0.01, 0.5, 0.99, 1.0], dtype=gap.dtype)).tolist(),
        "num_gaps_below_0": num_below,
        "num_gaps_below_0_beyond_error": num_beyond,
    }
    text = (
        "Left: digits decoded from draws of the prior. Right: test digits (odd rows), and their reconstructions below."
    )
    return Findings(rows, numbers, {_draw(work, model, images): text})


@torch.inference_mode()
def _draw(work: Work, model: DenseVAE, images: torch.Tensor) -> str:
    prior = torch.randn(80, model.num_latents, generator=generator_of(0), dtype=torch.float32, device="cpu")
    shown = images[:40]
    again = model.mean_image(model.encode(shown).mode())
    pairs = torch.stack([shown.view(-1, 10, shown.shape[1]), again.view(-1, 10, shown.shape[1])], 1).flatten(0, 2)
    sheets = {
        "Decoded from draws of the prior": model.mean_image(prior),
        "Test digits, each above its reconstruction": pairs,
    }
    return draw_panels(work, "samples", {title: sheet(of.view(-1, SIDE, SIDE), 10) for title, of in sheets.items()})
