"""The loss of one micro-batch: the terms that the config gives a weight, by name.

Each term is one number: nats per image divided by the number of values of an image. So neither the clip nor the
learning rate means another thing on larger crops. docs/theory.md, sections 5, 6 and 9.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdvae.model import AutoencoderKL
from sdvae.posterior import DiagonalGaussian
from sdvae.train import losses
from sdvae.train.config import TrainConfig
from sdvae.train.data import Batch, random_numbers
from sdvae.train.discriminator import PatchDiscriminator
from sdvae.weights.load import AnyModel

Terms = dict[str, Tensor]
Perceptual = Callable[[Tensor, Tensor], Tensor]  # decoded and original pixels (N, 3, H, W) -> a distance (N,)


@dataclass
class Networks:
    """Everything with weights."""

    model: AutoencoderKL
    log_scale: nn.Parameter  # latent-diffusion's logvar
    teacher: AnyModel | None = None
    discriminator: PatchDiscriminator | None = None
    perceptual: Perceptual | None = None


@dataclass(frozen=True)
class Forward:
    """The terms of a micro-batch, and what the adversary needs of it."""

    terms: Terms
    reconstruction: Tensor  # the part of the loss that the adversary's weight is measured against
    decoded: Tensor
    pixels: Tensor  # the originals of `decoded`


def forward(networks: Networks, config: TrainConfig, batch: Batch, step: int) -> Forward:
    """All terms but the adversary's. With a teacher that decodes, the second half of the batch decodes its latents."""
    model, loss, teaching, pixels = networks.model, config.loss, config.teacher, batch.pixels
    is_encoder_frozen = config.model.freeze == "encoder"
    with precision(config, pixels.device):
        with torch.set_grad_enabled(not is_encoder_frozen and torch.is_grad_enabled()):
            moments = model.encode_moments(_shown(pixels, batch.draws, config))
        posterior = DiagonalGaussian.from_moments(moments.float())
        latents = posterior.mean
        if config.model.sample:
            latents = posterior.mean + posterior.std * image_noise(batch.draws, "latents", latents)
        half = len(pixels) // 2 if teaching.decode else len(pixels)
        decoded = model.decode(latents[:half]).float()
        terms = _reconstruction(networks, config, decoded, pixels[:half])
        reconstruction = torch.stack(list(terms.values())).sum()
        terms |= _divergence(posterior, config, step, pixels[0].numel())
        if networks.teacher is not None:
            terms |= _alignment(networks, config, batch, posterior, half, step)
        if loss.equivariance:
            terms["equivariance"] = loss.equivariance * _equivariance(networks, config, batch, latents, step)
    return Forward(terms, reconstruction, decoded, pixels[:half])


def pixel_error(config: TrainConfig, decoded: Tensor, pixels: Tensor) -> Tensor:  # (N,) in nats
    """The squares and absolute differences, as the config weighs them."""
    loss, error = config.loss, decoded.new_zeros(len(decoded))
    if loss.squared:
        error = error + loss.squared * losses.squared_error(decoded, pixels)
    if loss.absolute:
        error = error + loss.absolute * losses.absolute_error(decoded, pixels)
    return error


def _reconstruction(networks: Networks, config: TrainConfig, decoded: Tensor, pixels: Tensor) -> Terms:
    loss, num_values = config.loss, pixels[0].numel()
    errors = {"reconstruction": pixel_error(config, decoded, pixels)}
    if networks.perceptual is not None and loss.perceptual:
        errors["perceptual"] = loss.perceptual * num_values * networks.perceptual(decoded, pixels)
    if loss.gradient:
        errors["gradient"] = loss.gradient * num_values * losses.gradient_error(decoded, pixels)
    if not loss.learn_scale:
        return {name: error.mean() / num_values for name, error in errors.items()}
    error = torch.stack(list(errors.values())).sum(0)
    return {"reconstruction": losses.learned_scale_nll(error, networks.log_scale, num_values).mean() / num_values}


def _divergence(posterior: DiagonalGaussian, config: TrainConfig, step: int, num_values: int) -> Terms:
    loss = config.loss
    if not loss.kl:
        return {}
    capacity = None if loss.capacity is None else loss.capacity * losses.ramp(step, loss.capacity_steps)
    weight = loss.kl * losses.ramp(step, loss.kl_warmup_steps)
    return {"kl": weight * losses.kl_term(posterior, loss.free_bits, capacity).mean() / num_values}


def _alignment(
    networks: Networks, config: TrainConfig, batch: Batch, posterior: DiagonalGaussian, half: int, step: int
) -> Terms:
    """How the embedded VAE came to share a latent space: our mean near the teacher's, decoders that read both."""
    model, teacher, teaching, pixels = networks.model, networks.teacher, config.teacher, batch.pixels
    assert teacher is not None
    num_values, terms = pixels[0].numel(), Terms()
    with torch.no_grad():
        theirs = teacher.encode(pixels).mean.float()
    if teaching.decode:
        error = pixel_error(config, model.decode(theirs[half:]).float(), pixels[half:])
        terms["theirs"] = error.mean() / num_values
    if teaching.pull:
        scaling_factor = model.config.scaling_factor
        terms["pull"] = teaching.pull * losses.latent_pull(posterior.mean, theirs, scaling_factor).mean()
    if teaching.crossing and step % teaching.crossing_every == 0:
        rest = slice(half if teaching.decode else 0, None)
        error = pixel_error(config, teacher.decode(posterior.mean[rest]).float(), pixels[rest])
        terms["crossing"] = teaching.crossing * error.mean() / num_values
    return terms


def _equivariance(networks: Networks, config: TrainConfig, batch: Batch, latents: Tensor, step: int) -> Tensor:
    """The error of images scaled and turned, decoded from latents scaled and turned (EQ-VAE, arXiv 2502.09509)."""
    random = random_numbers(config.seed, "equivariance", step)
    height, width = latents.shape[2:]
    share = float(random.uniform(0.25, 1.0))
    size = max(1, round(share * height)), max(1, round(share * width))
    turns, downscale = int(random.integers(4)), networks.model.config.downscale
    pixels = losses.transformed(batch.pixels, (size[0] * downscale, size[1] * downscale), turns)
    decoded = networks.model.decode(losses.transformed(latents, size, turns)).float()
    return pixel_error(config, decoded, pixels).mean() / pixels[0].numel()


def _shown(pixels: Tensor, draws: list[int], config: TrainConfig) -> Tensor:
    """What the encoder sees of the pixels."""
    loss, shown = config.loss, pixels
    if loss.noise:
        shown = losses.add_noise(shown, loss.noise, image_noise(draws, "noise", pixels))
    if loss.mask:
        height, width = (-(-side // loss.mask_px) for side in pixels.shape[2:])
        uniform = [random_numbers(draw, "mask").random((1, height, width), dtype="float32") for draw in draws]
        shown = losses.mask_patches(shown, loss.mask, torch.stack(list(map(torch.from_numpy, uniform))).to(pixels))
    return shown


def image_noise(draws: list[int], what: str, like: Tensor) -> Tensor:
    """Standard normal noise like `like`, of each image by its own seed: the same on any rank and device."""
    noise = []
    for draw in draws:
        generator = torch.Generator().manual_seed(int(random_numbers(draw, what).integers(2**63)))
        noise.append(torch.randn(like.shape[1:], generator=generator, dtype=torch.float32, device="cpu"))
    return torch.stack(noise).to(like)


# --- The adversary ---


def generator_term(networks: Networks, config: TrainConfig, decoded: Tensor) -> Tensor:
    """What the autoencoder minimises to be taken for real; not weighted yet."""
    discriminator = networks.discriminator
    assert discriminator is not None
    with precision(config, decoded.device):
        fake = discriminator(decoded).float()
    hinge = config.adversary.kind == "hinge"
    return losses.hinge_generator(fake) if hinge else losses.nonsaturating_generator(fake)


def discriminator_terms(networks: Networks, config: TrainConfig, decoded: Tensor, pixels: Tensor, step: int) -> Terms:
    """What the discriminator minimises; no gradient reaches `decoded`."""
    discriminator, adversary = networks.discriminator, config.adversary
    assert discriminator is not None
    with precision(config, pixels.device):
        real, fake = discriminator(pixels).float(), discriminator(decoded.detach()).float()
    hinge = adversary.kind == "hinge"
    loss = losses.hinge_discriminator if hinge else losses.nonsaturating_discriminator
    terms = {"discriminator": loss(real, fake)}
    if adversary.r1 and step % adversary.r1_every == 0:
        seen = pixels.detach().requires_grad_()
        terms["r1"] = adversary.r1 * adversary.r1_every * losses.r1_penalty(discriminator(seen), seen)
    return terms


@contextmanager
def precision(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Mixed precision, where the config asks for it."""
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        yield
