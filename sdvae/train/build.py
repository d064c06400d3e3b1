"""The networks of a run, made from its config."""

from typing import TypeVar

import torch
from torch import nn

from sdvae.config import VAEConfig
from sdvae.errors import TrainError
from sdvae.model import AutoencoderKL
from sdvae.perceptual.lpips import LPIPS
from sdvae.tiny import AutoencoderTiny
from sdvae.train.config import TrainConfig
from sdvae.train.data import memory_format
from sdvae.train.discriminator import PatchDiscriminator
from sdvae.train.optimise import make_optimizer
from sdvae.train.state import State
from sdvae.train.terms import Networks
from sdvae.weights.load import AnyModel, build_model, load_weights

_Module = TypeVar("_Module", bound=nn.Module)

EMBEDDED = "embedded"  # how a config names the VAE that comes with the package


def build_state(config: TrainConfig, device: torch.device) -> State:
    """Everything with weights, before the first step; the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = _model(config)
        discriminator = None
        if config.adversary.weight:
            discriminator = PatchDiscriminator(
                model.config.out_channels, config.adversary.width, config.adversary.num_layers
            )
    average = AutoencoderKL(model.config)
    average.load_state_dict(model.state_dict())
    sides: dict[str, tuple[nn.Module | None, ...]] = {
        "nothing": (),
        "encoder": (model.encoder, model.quant_conv),
        "decoder": (model.decoder, model.post_quant_conv),
    }
    for module in sides[config.model.freeze]:
        if module is not None:
            module.requires_grad_(False)
    model.enable_gradient_checkpointing(config.model.gradient_checkpointing)
    networks = Networks(
        _placed(model, device).train(),
        nn.Parameter(torch.zeros((), dtype=torch.float32, device=device)),
        _teacher(config, model.config, device),
        None if discriminator is None else _placed(discriminator, device),
        LPIPS.load("vgg")[0].to(device) if config.loss.perceptual else None,
    )
    trained = [*networks.model.parameters(), *([networks.log_scale] if config.loss.learn_scale else [])]
    return State(
        step=0,
        networks=networks,
        average=_placed(average, device).requires_grad_(False).eval(),
        optimizer=make_optimizer(trained, config.optimizer, config.optimizer.learning_rate),
        discriminator_optimizer=None
        if networks.discriminator is None
        else make_optimizer(networks.discriminator.parameters(), config.optimizer, config.adversary.learning_rate),
    )


def _model(config: TrainConfig) -> AutoencoderKL:
    if config.model.start is None:
        assert config.model.family is not None
        return AutoencoderKL(VAEConfig.from_family(config.model.family))
    model = _load(config.model.start, config.model.family)
    if isinstance(model, AutoencoderTiny):
        raise TrainError(f"{config.model.start} is a TAESD, which has no posterior; train a KL-VAE")
    return model


def _teacher(config: TrainConfig, network: VAEConfig, device: torch.device) -> AnyModel | None:
    if config.teacher.start is None:
        return None
    teacher = _load(config.teacher.start, config.teacher.family)
    theirs = teacher.config
    if (theirs.latent_channels, theirs.downscale) != (network.latent_channels, network.downscale):
        raise TrainError(
            f"the teacher has {theirs.latent_channels} latent channels at 1/{theirs.downscale}, the model "
            f"{network.latent_channels} at 1/{network.downscale}; they cannot share a latent space"
        )
    return _placed(teacher.requires_grad_(False).eval(), device)


def _load(spec: str, family: str | None) -> AnyModel:
    return build_model(load_weights(None if spec == EMBEDDED else spec, family))


def _placed(module: _Module, device: torch.device) -> _Module:
    placed: _Module = module.to(device).to(memory_format=memory_format(device))  # type: ignore[call-overload]
    return placed
