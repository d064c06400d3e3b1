"""The terms of a loss: those of the embedded VAE's recipe, and who is taught by which."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvae.errors import TrainError
from sdvae.model import AutoencoderKL
from sdvae.perceptual.files import MissingNetwork
from sdvae.perceptual.lpips import LPIPS
from sdvae.posterior import DiagonalGaussian
from sdvae.tiny import AutoencoderTiny, TinyConfig
from sdvae.train import losses, terms
from sdvae.train.build import build_state
from sdvae.train.config import AdversaryConfig, LossConfig, ModelConfig, TrainConfig, load_config
from sdvae.train.data import Batch
from sdvae.train.optimise import rate_share
from sdvae.train.terms import Networks
from tests.conftest import SMALL, random_model

CONFIG = TrainConfig(10, ModelConfig("small"), loss=LossConfig(squared=4.0))
CPU = torch.device("cpu")


def networks(**others: Any) -> Networks:
    return Networks(random_model(SMALL).train(), nn.Parameter(torch.zeros(())), **others)


def number(value: Tensor) -> float:
    return float(value.detach())


def batch(num_images: int = 4, size_px: int = 32) -> Batch:
    pixels = torch.rand(num_images, 3, size_px, size_px) * 2 - 1
    return Batch(pixels, list(range(100, 100 + num_images)))


def recipe(
    model: AutoencoderKL, taesd: AutoencoderTiny, pixels: Tensor, noise: Tensor, step: int, scale: float
) -> dict[str, Tensor]:
    """What scripts/train_default.py computed when it made the embedded VAE; only the noise is given."""

    def pixel_loss(reconstruction: Tensor, pixels: Tensor) -> Tensor:
        difference = reconstruction.float() - pixels
        return 4.0 * difference.square().mean() + 0.25 * difference.abs().mean()

    half = len(pixels) // 2
    with torch.no_grad():
        theirs = taesd.encode(pixels).mean
    posterior = model.encode(pixels)
    mean = posterior.mean.float()
    ours = posterior.mean + posterior.std * noise
    parts = {
        "reconstruction": pixel_loss(model.decode(ours[:half]), pixels[:half]),
        "theirs": pixel_loss(model.decode(theirs[half:]), pixels[half:]),
        "pull": 0.5 * F.mse_loss(mean * scale, theirs * scale),
        "kl": 1e-5 * posterior.kl().mean() / mean[0].numel(),
    }
    if step % 2 == 0:
        parts["crossing"] = 1.0 * pixel_loss(taesd.decode(mean[half:]), pixels[half:])
    return parts


@pytest.mark.parametrize("step", [0, 1])
def test_the_config_small_is_the_recipe_of_the_embedded_vae(step: int) -> None:
    config = replace(load_config("small", ["teacher.start=TAESD"]), precision="fp32")
    teacher = AutoencoderTiny(TinyConfig.from_family("sd1")).requires_grad_(False)
    nets, images = networks(teacher=teacher), batch(size_px=64)
    found = terms.forward(nets, config, images, step).terms
    noise = terms.image_noise(images.draws, "latents", torch.empty(4, 4, 8, 8))
    expected = recipe(nets.model, teacher, images.pixels, noise, step, scale=0.18215)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert number(found[name]) == pytest.approx(number(value), rel=1e-6, abs=1e-9), name
        assert number(value) > 1e-7
    ours = torch.autograd.grad(sum(found.values()), nets.model.parameters())
    theirs = torch.autograd.grad(sum(expected.values()), nets.model.parameters())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6 * float(other.abs().max()) + 1e-9)


def test_the_learning_rate_of_the_recipe() -> None:
    config = load_config("small", ["teacher.start=TAESD"])
    shares = [rate_share(step, 4600, config.optimizer) for step in (0, 99, 100, 2350, 4599)]
    rates = [config.optimizer.learning_rate * share for share in shares]
    assert rates[:3] == [2e-3 / 100, 2e-3, 2e-3]
    assert rates[3] == pytest.approx(1e-3)
    assert 0.0 < rates[4] < 1e-9
    assert rate_share(4600, 4600, replace(config.optimizer, final_share=0.1)) == pytest.approx(0.1)


def test_a_kl_of_weight_one_and_a_gaussian_is_the_elbo() -> None:
    variance = 0.05
    config = replace(CONFIG, loss=LossConfig(squared=1 / (2 * variance), kl=1.0))
    nets, images = networks(), batch()
    found = terms.forward(nets, config, images, 0)
    posterior = nets.model.encode(images.pixels)
    nll = losses.gaussian_nll(found.decoded, images.pixels, torch.tensor(variance).log())
    constant = 0.5 * torch.tensor(2 * torch.pi * variance).log()
    negative_elbo = (nll + posterior.kl()).mean() / images.pixels[0].numel()
    torch.testing.assert_close(found.terms["reconstruction"] + found.terms["kl"] + constant, negative_elbo)


def test_noise_belongs_to_the_image_and_not_to_its_place() -> None:
    like = torch.empty(3, 4, 8, 8)
    noise = terms.image_noise([5, 6, 7], "latents", like)
    assert torch.equal(terms.image_noise([7, 5], "latents", like[:2]), noise[[2, 0]])
    assert not torch.equal(terms.image_noise([5], "noise", like[:1]), noise[:1])
    assert abs(float(noise.std()) - 1.0) < 0.1


def test_a_plain_autoencoder_decodes_its_mean() -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, sample=False))
    nets, images = networks(), batch()
    found = terms.forward(nets, config, images, 0)
    assert found.terms.keys() == {"reconstruction"}
    torch.testing.assert_close(found.decoded, nets.model.decode(nets.model.encode(images.pixels).mean))
    assert not torch.allclose(found.decoded, terms.forward(nets, CONFIG, images, 0).decoded)


def test_a_denoising_autoencoder_sees_less_than_it_must_give_back(monkeypatch: pytest.MonkeyPatch) -> None:
    nets, images = networks(), batch()
    seen: list[Tensor] = []
    encode = nets.model.encode_moments

    def recorded(pixels: Tensor) -> Tensor:
        seen.append(pixels)
        return encode(pixels)

    monkeypatch.setattr(nets.model, "encode_moments", recorded)
    noisy = terms.forward(nets, replace(CONFIG, loss=LossConfig(squared=1.0, noise=0.5)), images, 0)
    terms.forward(nets, replace(CONFIG, loss=LossConfig(squared=1.0, mask=0.5, mask_px=8)), images, 0)
    assert noisy.pixels is not seen[0]
    assert torch.equal(noisy.pixels, images.pixels)
    assert abs(float((seen[0] - images.pixels).std()) - 0.5) < 0.05
    hidden = (seen[1] == 0.0).all(dim=1)
    assert 0.3 < float(hidden.float().mean()) < 0.7
    assert torch.equal(hidden, hidden[:, ::8, ::8].repeat_interleave(8, 1).repeat_interleave(8, 2))


def test_every_term_appears_under_its_name() -> None:
    loss = LossConfig(
        squared=1.0, absolute=1.0, perceptual=0.1, gradient=0.5, kl=0.1, free_bits=0.01, equivariance=0.5,
        capacity=3.0, capacity_steps=10, kl_warmup_steps=10,
    )  # fmt: skip
    nets = networks(perceptual=lambda decoded, pixels: (decoded - pixels).abs().flatten(1).amax(1))
    found = terms.forward(nets, replace(CONFIG, loss=loss), batch(), 0).terms
    assert list(found) == ["reconstruction", "perceptual", "gradient", "kl", "equivariance"]
    assert all(value.isfinite() and value.requires_grad for value in found.values())
    learned = terms.forward(nets, replace(CONFIG, loss=replace(loss, learn_scale=True)), batch(), 0).terms
    assert list(learned) == ["reconstruction", "kl", "equivariance"]
    torch.autograd.backward(learned["reconstruction"])
    assert nets.log_scale.grad is not None
    assert nets.log_scale.grad.abs() > 0


def test_a_warm_up_and_a_capacity_grow_with_the_steps() -> None:
    images, nets = batch(), networks()
    warm = replace(CONFIG, loss=LossConfig(squared=1.0, kl=1.0, kl_warmup_steps=10))
    kl = [number(terms.forward(nets, warm, images, step).terms["kl"]) for step in (0, 4, 9, 20)]
    assert kl == pytest.approx([0.1 * kl[3], 0.5 * kl[3], kl[3], kl[3]])
    full = kl[3] * images.pixels[0].numel()
    held = replace(CONFIG, loss=LossConfig(squared=1.0, kl=1.0, capacity=1e6, capacity_steps=4))
    at_capacity = [number(terms.forward(nets, held, images, step).terms["kl"]) * 3072 for step in (0, 3, 9)]
    assert at_capacity == pytest.approx([2.5e5 - full, 1e6 - full, 1e6 - full], rel=1e-5)


def test_lpips_has_a_gradient_everywhere() -> None:
    """Where no feature fires, the length of the features is 0, and the slope of a root there is infinite."""
    network = LPIPS("vgg")
    for head in network.heads:
        head.data.fill_(1.0)
    for layer in network.features:
        if isinstance(layer, nn.Conv2d):
            nn.init.zeros_(layer.weight)
            nn.init.constant_(layer.bias, -1.0)
    decoded, pixels = (2 * torch.rand(2, 1, 3, 32, 32) - 1).unbind()
    decoded.requires_grad_()
    torch.autograd.backward(network(decoded, pixels).sum())
    assert decoded.grad is not None
    assert decoded.grad.isfinite().all()


# The adversary.

ADVERSARY = AdversaryConfig(weight=0.5, width=8, num_layers=2, r1=1.0, r1_every=1)


def test_a_discriminator_step_changes_the_discriminator_only() -> None:
    config = replace(CONFIG, adversary=ADVERSARY)
    state = build_state(config, CPU)
    state.networks.model = random_model(SMALL).train()
    assert state.discriminator_optimizer is not None
    assert state.networks.discriminator is not None
    before = {key: value.clone() for key, value in state.networks.model.state_dict().items()}
    discriminator = {key: value.clone() for key, value in state.networks.discriminator.state_dict().items()}
    forward = terms.forward(state.networks, config, batch(), 0)
    found = terms.discriminator_terms(state.networks, config, forward.decoded, forward.pixels, 0)
    assert list(found) == ["discriminator", "r1"]
    torch.autograd.backward(torch.stack(list(found.values())).sum())
    state.discriminator_optimizer.step()
    assert all(parameter.grad is None for parameter in state.networks.model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in state.networks.model.state_dict().items())
    now = state.networks.discriminator.state_dict()
    weights = {key: value for key, value in discriminator.items() if key.endswith("weight")}
    assert len(weights) == 6
    assert all(not torch.equal(now[key], value) for key, value in weights.items())


@pytest.mark.parametrize("kind", ["hinge", "nonsaturating"])
def test_the_adversary_learns_to_tell_decoded_from_real(kind: Any) -> None:
    config = replace(CONFIG, adversary=replace(ADVERSARY, kind=kind, r1=0.0))
    state = build_state(config, CPU)
    assert state.discriminator_optimizer is not None
    images = batch(4, 64).pixels
    blurred = F.interpolate(F.avg_pool2d(images, 4), scale_factor=4.0)
    state.discriminator_optimizer.param_groups[0]["lr"] = 1e-3
    found = []
    for step in range(30):
        values = terms.discriminator_terms(state.networks, config, blurred, images, step)
        state.discriminator_optimizer.zero_grad()
        torch.autograd.backward(values["discriminator"])
        state.discriminator_optimizer.step()
        found.append(float(values["discriminator"].detach()))
    assert found[-1] < 0.5 * found[0]
    fooled = terms.generator_term(state.networks, config, images)
    assert number(fooled) < number(terms.generator_term(state.networks, config, blurred))


# What is built.


def test_a_frozen_side_has_no_gradient() -> None:
    for side, other in (("encoder", "decoder"), ("decoder", "encoder")):
        config = replace(CONFIG, model=replace(CONFIG.model, freeze=side))
        state = build_state(config, CPU)
        found = terms.forward(state.networks, config, batch(2), 0).terms
        torch.autograd.backward(found["reconstruction"])
        assert all(parameter.grad is None for parameter in getattr(state.networks.model, side).parameters())
        assert all(parameter.grad is not None for parameter in getattr(state.networks.model, other).parameters())


def test_gradient_checkpointing_changes_no_gradient() -> None:
    images = batch()
    gradients = []
    for is_enabled in (False, True):
        nets = networks()
        nets.model.enable_gradient_checkpointing(is_enabled)
        torch.autograd.backward(terms.forward(nets, CONFIG, images, 0).terms["reconstruction"])
        gradients.append([parameter.grad for parameter in nets.model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_networks_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDVAE_NETWORKS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MissingNetwork, match="vgg16-397923af"):
        build_state(replace(CONFIG, loss=LossConfig(perceptual=1.0)), CPU)
    small = load_config("small", ["teacher.start=embedded", "model.family=sd3", "teacher.family=small"])
    with pytest.raises(TrainError, match="cannot share a latent space"):
        build_state(small, CPU)


def test_the_posterior_is_in_float32_under_mixed_precision() -> None:
    config = replace(CONFIG, precision="bf16", loss=LossConfig(squared=1.0, kl=1.0))
    nets, images = networks(), batch()
    found = terms.forward(nets, config, images, 0)
    assert found.decoded.dtype == torch.float32
    exact = terms.forward(nets, replace(config, precision="fp32"), images, 0)
    assert 0 < number((found.decoded - exact.decoded).abs().max()) < 0.3
    assert isinstance(nets.model.encode(images.pixels), DiagonalGaussian)
