"""The theory run, tiny: parts to their end, resumption, estimates against integrals, the document against results."""

import gzip
import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from theory import autoencoder, beta, denoising, gradients, iwae, likelihood
from theory.bernoulli import Shape, elbo, evidence, make_vae
from theory.dense import DenseVAE
from theory.document import DOCS, parts_of, table
from theory.fit import Schedule, fit, generator_of
from theory.work import Findings, Row, Work
from torch import Tensor

from sdvae.train.losses import bernoulli_nll, log_evidence, log_importance_weights

NUM = {"train": 128, "t10k": 40}
VAE = likelihood.Settings(Shape(3, 16), Schedule(1, 64), num_samples=7, num_elbo_samples=5)
BETA = beta.Settings(betas=(1.0, 4.0), shape=Shape(3, 16), schedule=Schedule(1, 64), num_samples=2, grid=3)
PARTS = {
    "likelihood": lambda work: likelihood.run(work, VAE),
    "iwae": lambda work: iwae.run(work, iwae.Settings(VAE, Schedule(1, 64), 3, 6)),
    "gradients": lambda work: gradients.run(work, gradients.Settings(VAE, 4, 50)),
    "beta": lambda work: beta.run(work, BETA),
    "autoencoder": lambda work: autoencoder.run(work, autoencoder.Settings(BETA, 30, 1, Schedule(1, 64))),
    "denoising": lambda work: denoising.run(work, denoising.Settings(VAE, Shape(3, 16), Schedule(1, 64))),
}


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNIST's four files, with ten noisy patterns for digits."""
    folder = tmp_path_factory.mktemp("mnist")
    random = np.random.default_rng(0)
    patterns = random.random((10, 28, 28)) > 0.8
    for split, num in NUM.items():
        labels = np.arange(num, dtype=np.uint8) % 10
        images = (patterns[labels] * random.integers(100, 255, (num, 28, 28))).astype(np.uint8)
        header = struct.pack(">4i", 2051, num, 28, 28)
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        header = struct.pack(">2i", 2049, num)
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))
    return folder


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("theory")


@pytest.mark.parametrize("name", PARTS)
def test_a_part_runs_to_its_end(name: str, output: Path, mnist: Path) -> None:
    work = Work(output / name, mnist)
    state = torch.get_rng_state()
    work.finish(PARTS[name](work))
    assert torch.equal(torch.get_rng_state(), state)
    found = work.findings()
    assert found is not None
    assert found.rows
    assert found.numbers
    for picture in found.pictures:
        with Image.open(work.folder / picture) as image:
            assert 700 <= image.width <= 1100
            assert len(image.convert("L").getcolors(256) or []) > 10


# Training that is interrupted.


def test_training_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    data = torch.rand((50, 6), generator=generator_of(7))
    calls = 0

    def trained(work: Work, fails_at: int | None) -> DenseVAE:
        model = make_vae(data, Shape(2, 5))

        def loss(batch: Sequence[Tensor], generator: torch.Generator) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise KeyboardInterrupt
            return bernoulli_nll(model.decode(model.encode(batch[0]).sample(generator)), batch[0]).mean()

        fit(work, "vae", model, (data,), loss, Schedule(4, 20))
        return model

    whole = trained(Work(tmp_path / "whole", tmp_path), None)
    assert calls == 12  # three batches, four epochs
    for fails_at in (5, 9):  # within the second epoch, then within the fourth
        calls = 0 if fails_at == 5 else 3
        with pytest.raises(KeyboardInterrupt):
            trained(Work(tmp_path / "parts", tmp_path), fails_at)
    resumed = trained(Work(tmp_path / "parts", tmp_path), None)
    for name, weight in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name


# Estimates against integrals: with one latent, log p(x) is an integral over a line.

GRID = torch.linspace(-12.0, 12.0, 4001)
IMAGES = (torch.rand((8, 6), generator=generator_of(1)) < 0.5).float()


@pytest.fixture
def small() -> DenseVAE:
    """A VAE of one latent whose decoder has something to say."""
    model = make_vae(IMAGES, Shape(1, 5))
    with torch.no_grad():
        model.decoder[4].weight.mul_(4.0)
    return model


def integrals(model: DenseVAE) -> tuple[Tensor, Tensor]:  # (N,) log p(x), (N,) ELBO
    with torch.no_grad():
        logits = model.decode(GRID.unsqueeze(1)).double()
        posterior = model.encode(IMAGES)
    grid = GRID.double()
    log_prior = -0.5 * (math.log(2.0 * math.pi) + grid.square())
    exact, bounds = [], []
    for row, image in enumerate(IMAGES.double()):
        log_joint = -bernoulli_nll(logits, image.expand_as(logits)) + log_prior
        exact.append(torch.trapezoid(log_joint.exp(), grid).log())
        variance = posterior.var[row].double()
        log_q = -0.5 * (math.log(2.0 * math.pi) + variance.log() + (grid - posterior.mean[row]).square() / variance)
        bounds.append(torch.trapezoid(log_q.exp() * (log_joint - log_q), grid))
    return torch.stack(exact), torch.stack(bounds)


def test_importance_samples_and_the_bound_are_the_integrals(tmp_path: Path, small: DenseVAE) -> None:
    log_p, bound = integrals(small)
    assert (log_p - bound).min() > 0.005  # an encoder that was not trained leaves a gap to see
    estimate = evidence(Work(tmp_path, tmp_path), "log-p", small, IMAGES, 2000)
    torch.testing.assert_close(estimate, log_p, rtol=0.0, atol=0.06)  # 5 standard errors of weights that vary by half
    found, error = elbo(small, IMAGES, 300)
    assert ((found - bound).abs() <= 5.0 * error).all()


def test_blocks_of_images_that_are_kept_are_not_scored_again(tmp_path: Path, small: DenseVAE) -> None:
    work = Work(tmp_path, tmp_path)
    first = evidence(work, "log-p", small, IMAGES, 10)
    with torch.no_grad():
        small.decoder[4].bias.add_(1.0)
    assert torch.equal(evidence(work, "log-p", small, IMAGES, 10), first)
    assert not torch.equal(evidence(work, "other", small, IMAGES, 10), first)


def test_one_drawn_sample_carries_the_gradient_of_the_bound(small: DenseVAE) -> None:
    """Both are averaged over 4,000 copies of an image, in 40 groups, which give the standard errors."""
    pixels = IMAGES[:1].expand(100, -1)
    generator = generator_of(2)

    def whole() -> Tensor:
        posterior = small.encode(pixels)
        weights = log_importance_weights(
            lambda latents: -bernoulli_nll(small.decode(latents), pixels), posterior, 5, generator
        )
        return -log_evidence(weights)

    def gradients_of(loss: object) -> Tensor:  # (40, number of weights)
        groups = [torch.autograd.grad(loss().mean(), list(small.parameters())) for _ in range(40)]
        return torch.stack([torch.cat([of.flatten() for of in group]) for group in groups])

    exact, drawn = gradients_of(whole), gradients_of(lambda: iwae.iwae_loss(small, pixels, 5, generator))
    error = (exact.var(0) / 40 + drawn.var(0) / 40).sqrt()
    z = ((exact.mean(0) - drawn.mean(0)) / error)[error > 0.0]
    assert z.abs().max() < 5.0
    elbo_gradient = gradients_of(lambda: iwae.iwae_loss(small, pixels, 1, generator))
    z = ((exact.mean(0) - elbo_gradient.mean(0)) / (exact.var(0) / 40 + elbo_gradient.var(0) / 40).sqrt())[error > 0.0]
    assert z.abs().max() > 8.0, "five samples should differ from one here, or the test above shows nothing"


def test_three_gradients_have_one_mean(small: DenseVAE) -> None:
    estimates = gradients.sampled_gradients(small, IMAGES, 500)
    for name in ("score", "baseline"):
        assert gradients.disagreement(estimates[name], estimates["reparameterised"]) < 2.0
    assert (
        estimates["score"].var(0).sum() > estimates["baseline"].var(0).sum() > estimates["reparameterised"].var(0).sum()
    )


# What is measured.


def test_latents_that_say_nothing_are_not_active() -> None:
    model = make_vae(IMAGES, Shape(3, 5))
    with torch.no_grad():
        model.encoder[4].weight[1].zero_()  # the mean of the second latent
        model.encoder[4].weight[0].mul_(10.0)
        model.encoder[4].weight[2].mul_(10.0)
    assert beta.measure(model, IMAGES, 2).num_active == 2


def test_psnr_of_noise_of_one_half_is_six_decibels() -> None:
    images = torch.zeros((200, 784))
    noise = 0.5 * torch.randn(images.shape, generator=generator_of(0))
    assert abs(denoising.psnr(noise, images) - 20.0 * math.log10(2.0)) < 0.05


# The document.


def test_the_table_of_the_document_is_that_of_the_results() -> None:
    """`scripts/theory --write` writes both."""
    results = json.loads((DOCS.parent / "benchmarks" / "results" / "theory.json").read_text(encoding="utf-8"))
    parts = {
        name: Findings([Row(**row) for row in part["rows"]], part["numbers"], part["pictures"])
        for name, part in results["parts"].items()
    }
    before, between, after = parts_of((DOCS / "theory.md").read_text(encoding="utf-8"))
    assert parts
    assert between == table(parts, before + after)


def test_a_missed_line_says_so_and_a_picture_is_shown_once() -> None:
    row = Row("the error", "3 nats", "<= 2", False)
    text = table({"part": Findings([row], {}, {"a.png": "An a.", "b.png": "A b."})}, "![An a.](theory/part-a.png)")
    assert "| the error | 3 nats | <= 2 (missed) |  |" in text
    assert "part-b.png" in text
    assert "part-a.png" not in text
