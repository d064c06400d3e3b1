"""The reference model against diffusers' AutoencoderKL on the same seeded random weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sdvae import model as model_module
from sdvae.config import FAMILIES, VAEConfig
from sdvae.model import AutoencoderKL
from tests.conftest import random_model

# fp32 rounding alone gives 2e-6 at full width (attention reads its tokens in another memory order; without
# attention the two are bit-equal), a wrong eps 2e-4, a shifted stride-2 window 1.
FP32_TOLERANCE = 1e-5
# fp64 rounding gives 3e-15; a wrong eps in one of the 57 norms of TINY gives 1e-6 or more.
FP64_TOLERANCE = 1e-12

# Every block kind in 117,000 parameters: shortcuts, attention inside levels and in the middle, quant convolutions.
TINY = VAEConfig(block_out_channels=(8, 16, 16, 16), norm_num_groups=4, attention_levels=(3,))


def architecture(config: VAEConfig) -> VAEConfig:
    """The config without the numbers that the network never sees, so that equal networks are run once."""
    same = {"sample_size": 1, "scaling_factor": 1.0, "shift_factor": None, "force_upcast": False}
    return replace(config, **same, latents_mean=None, latents_std=None)


NARROWED = ("cogview4", "flux2")  # compared with an eighth of their channels, in test_shapes.py
ARCHITECTURES: dict[str, VAEConfig] = {}
for _name, _config in FAMILIES.items():
    if _name not in NARROWED and architecture(_config) not in ARCHITECTURES.values():
        ARCHITECTURES[_name] = architecture(_config)


def quiet_model(config: VAEConfig) -> AutoencoderKL:
    """Random weights under which every stage has a std of 0.1 to 1: beside larger variances eps would be lost.

    Branches of the residual stream and all biases are turned down; queries and keys are turned up, so that attention
    is far from a plain average.
    """
    model = random_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_branch = any(part in name for part in ("conv_in", "conv1", "conv2", "to_out"))
            if "norm" in name:
                continue
            if name.endswith("bias") or is_branch:
                parameter.mul_(0.2)
            elif "to_q" in name or "to_k" in name:
                parameter.mul_(1.5)
    return model


def diffusers_twin(model: AutoencoderKL) -> Any:
    """diffusers' module around the very same tensors; a name, shape or count that differs raises."""
    mapping = model.config.to_diffusers()
    with torch.device("meta"):
        twin = getattr(diffusers, mapping["_class_name"]).from_config(mapping)
    twin.load_state_dict(model.state_dict(), strict=True, assign=True)
    return twin.eval()


def seeded_pixels(height: int, width: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise with a gradient across it, so that no two rows or columns are alike."""
    noise = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=dtype)
    slope = torch.linspace(-0.5, 0.5, height, dtype=dtype)[:, None] + torch.linspace(-0.5, 0.5, width, dtype=dtype)
    return (noise - 0.5 + slope).clamp(-1.0, 1.0)


def seeded_latents(pixels: Tensor, config: VAEConfig) -> Tensor:
    batch, _, height, width = pixels.shape
    shape = (batch, config.latent_channels, height // config.downscale, width // config.downscale)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=pixels.dtype)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2; another shape is infinitely far away."""
    if ours.shape != theirs.shape:
        return math.inf
    return float((ours - theirs).norm() / theirs.norm())


@torch.inference_mode()
def errors(model: AutoencoderKL, twin: Any, pixels: Tensor) -> dict[str, float]:
    """How far the two are apart, in encode and in decode: the comparison that the mutants must fail."""
    posterior, theirs = model.encode(pixels), twin.encode(pixels).latent_dist
    latents = seeded_latents(pixels, model.config)
    assert posterior.logvar.abs().max() < 20.0, "the clamp would hide differences of logvar"
    return {
        "mean": relative_error(posterior.mean, theirs.mean),
        "logvar": relative_error(posterior.logvar, theirs.logvar),
        "decode": relative_error(model.decode(latents), twin.decode(latents).sample),
    }


def stage_stds(model: AutoencoderKL, pixels: Tensor) -> dict[str, float]:
    """Standard deviation of what each block puts out, encoder and decoder."""
    blocks = (model_module.ResnetBlock, model_module.Attention, model_module.Downsample, model_module.Upsample)
    stages = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, blocks) or name.endswith(("conv_in", "conv_out"))
    }
    stds: dict[str, float] = {}
    hooks = [
        stage.register_forward_hook(lambda _, __, out, name=name: stds.__setitem__(name, float(out.std())))
        for name, stage in stages.items()
    ]
    with torch.inference_mode():
        model.encode(pixels)
        model.decode(seeded_latents(pixels, model.config))
    for hook in hooks:
        hook.remove()
    assert stds.keys() == stages.keys(), "a block did not run"
    return stds


@pytest.fixture(scope="module")
def full_size(request: pytest.FixtureRequest) -> tuple[AutoencoderKL, Any]:
    model = quiet_model(ARCHITECTURES[request.param])
    return model, diffusers_twin(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_diffusers(family: str) -> None:
    mapping = FAMILIES[family].to_diffusers()
    with torch.device("meta"):
        ours = AutoencoderKL(FAMILIES[family])
        theirs = getattr(diffusers, mapping["_class_name"]).from_config(mapping)
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == {
        name: tensor.shape for name, tensor in theirs.state_dict().items()
    }


def test_only_families_of_one_network_share_a_comparison() -> None:
    assert list(ARCHITECTURES) == ["sd1", "sd3", "kl-f4", "kl-f16", "x4-upscaler", "small"]
    assert architecture(FAMILIES["playground"]) == ARCHITECTURES["sd1"]
    assert architecture(FAMILIES["sdxl"]) == ARCHITECTURES["sd1"]
    assert architecture(FAMILIES["flux1"]) == ARCHITECTURES["sd3"]
    assert len(FAMILIES) == 11, "a new family: compare it, or say here whose network it is"


@pytest.mark.parametrize(("size", "batch"), [((40, 56), 2), ((45, 61), 1)], ids=["40x56", "45x61"])
@pytest.mark.parametrize("full_size", ARCHITECTURES, indirect=True)
def test_outputs_equal_diffusers(full_size: tuple[AutoencoderKL, Any], size: tuple[int, int], batch: int) -> None:
    model, twin = full_size
    found = errors(model, twin, seeded_pixels(*size, batch))
    assert max(found.values()) <= FP32_TOLERANCE, found


@pytest.mark.slow
@pytest.mark.parametrize("full_size", ARCHITECTURES, indirect=True)
def test_outputs_equal_diffusers_at_256_px(full_size: tuple[AutoencoderKL, Any]) -> None:
    found = errors(*full_size, seeded_pixels(256, 256, batch=1))
    assert max(found.values()) <= FP32_TOLERANCE, found


@pytest.mark.parametrize("full_size", ARCHITECTURES, indirect=True)
def test_the_seeded_weights_keep_every_stage_in_range(
    full_size: tuple[AutoencoderKL, Any],
) -> None:
    stds = stage_stds(full_size[0], seeded_pixels(64, 64, batch=1))
    assert min(stds.values()) >= 0.1, min(stds.items(), key=lambda item: item[1])
    assert max(stds.values()) <= 10.0, max(stds.items(), key=lambda item: item[1])


@pytest.mark.slow
@pytest.mark.parametrize("size", [(512, 512), (320, 448)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("full_size", ["sd1"], indirect=True)
def test_outputs_equal_diffusers_at_full_size(full_size: tuple[AutoencoderKL, Any], size: tuple[int, int]) -> None:
    model, twin = full_size
    pixels = seeded_pixels(*size, batch=1)
    found = errors(model, twin, pixels)
    assert max(found.values()) <= FP32_TOLERANCE, found
    stds = stage_stds(model, pixels).values()
    assert min(stds) >= 0.1
    assert max(stds) <= 10.0


@pytest.fixture(scope="module")
def tiny() -> tuple[AutoencoderKL, Any]:
    model = quiet_model(TINY).double()
    return model, diffusers_twin(model)


@given(height=st.integers(8, 70), width=st.integers(8, 70))
@settings(max_examples=25)
def test_outputs_equal_diffusers_at_any_size(tiny: tuple[AutoencoderKL, Any], height: int, width: int) -> None:
    found = errors(*tiny, seeded_pixels(height, width, batch=1, dtype=torch.float64))
    assert max(found.values()) <= FP64_TOLERANCE, found


# Mutants: wrong models that the comparison above must reject.


@contextmanager
def wrong_eps(*norms: nn.GroupNorm) -> Iterator[None]:
    """torch's default eps in place of Stable Diffusion's."""
    for norm in norms:
        assert norm.eps == 1e-6
        norm.eps = 1e-5
    try:
        yield
    finally:
        for norm in norms:
            norm.eps = 1e-6


def group_norms(model: nn.Module) -> list[nn.GroupNorm]:
    return [module for module in model.modules() if isinstance(module, nn.GroupNorm)]


@pytest.mark.parametrize("full_size", ["sd1"], indirect=True)
def test_a_wrong_eps_is_noticed(full_size: tuple[AutoencoderKL, Any]) -> None:
    model, twin = full_size
    pixels = seeded_pixels(64, 64, batch=1)
    assert max(errors(model, twin, pixels).values()) <= FP32_TOLERANCE
    with wrong_eps(*group_norms(model)):
        found = errors(model, twin, pixels)
    assert min(found.values()) > 5 * FP32_TOLERANCE, found


def test_a_wrong_eps_in_any_single_norm_is_noticed(tiny: tuple[AutoencoderKL, Any]) -> None:
    model, twin = tiny
    pixels = seeded_pixels(32, 40, batch=1, dtype=torch.float64)
    for norm in group_norms(model):
        with wrong_eps(norm):
            assert max(errors(model, twin, pixels).values()) > 1000 * FP64_TOLERANCE, norm


@pytest.mark.parametrize("full_size", ["sd1"], indirect=True)
def test_symmetric_padding_of_the_stride_2_convolution_is_noticed(
    full_size: tuple[AutoencoderKL, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def symmetric(self: model_module.Downsample, x: Tensor) -> Tensor:
        return F.conv2d(x, self.conv.weight, self.conv.bias, stride=2, padding=1)

    model, twin = full_size
    monkeypatch.setattr(model_module.Downsample, "forward", symmetric)
    found = errors(model, twin, seeded_pixels(64, 64, batch=1))
    assert min(found["mean"], found["logvar"]) > FP32_TOLERANCE, found
    assert found["decode"] <= FP32_TOLERANCE, "the decoder has no stride-2 convolution"


# Gradients of a training loss.


def gradients(model: AutoencoderKL | diffusers.AutoencoderKL, pixels: Tensor, config: VAEConfig) -> dict[str, Tensor]:
    """Of a squared error plus a small KL, with a fixed noise."""
    model.zero_grad(set_to_none=True)
    encoded = model.encode(pixels)
    posterior = getattr(encoded, "latent_dist", encoded)  # diffusers wraps its outputs
    decoded = model.decode(posterior.mean + posterior.std * seeded_latents(pixels, config))
    decoded = getattr(decoded, "sample", decoded)
    loss = F.mse_loss(decoded, pixels) + 1e-3 * posterior.kl().mean()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def gradient_errors(model: AutoencoderKL, twin: Any, pixels: Tensor) -> dict[str, float]:
    """Relative L2 of each parameter's gradient."""
    ours, theirs = (gradients(module, pixels, model.config) for module in (model, twin))
    total = float(torch.stack([gradient.norm() for gradient in theirs.values()]).norm())
    found: dict[str, float] = {}
    for name, gradient in theirs.items():
        if name.endswith("to_k.bias"):
            # Softmax does not see what is added to every key: this gradient is 0 up to rounding, so it is
            # measured against the whole gradient. The others are 2e-4 of the whole or more.
            found[name] = float((ours[name] - gradient).norm()) / total
        else:
            found[name] = relative_error(ours[name], gradient)
    return found


@pytest.mark.parametrize(
    ("config", "size", "batch"),
    [
        pytest.param(FAMILIES["sd1"], 128, 1, id="sd1", marks=pytest.mark.slow),
        pytest.param(FAMILIES["small"], 64, 2, id="small"),
        pytest.param(TINY, 128, 2, id="tiny"),
    ],
)
def test_gradients_equal_diffusers(config: VAEConfig, size: int, batch: int) -> None:
    model = quiet_model(config)
    found = gradient_errors(model, diffusers_twin(model), seeded_pixels(size, size, batch))
    assert len(found) == len(list(model.parameters()))
    # Rounding reaches 2e-5 in sums over all pixels (biases at full resolution).
    assert max(found.values()) <= 1e-4, max(found.items(), key=lambda item: item[1])


def test_a_wrong_eps_is_noticed_in_the_gradients() -> None:
    model = quiet_model(TINY)
    twin = diffusers_twin(model)
    with wrong_eps(*group_norms(model)):
        found = gradient_errors(model, twin, seeded_pixels(128, 128))
    assert max(found.values()) > 1e-4


def test_gradient_checkpointing_recomputes_and_changes_no_bit() -> None:
    model = quiet_model(TINY)
    calls: list[nn.Module] = []
    blocks = [*model.encoder.down_blocks, model.encoder.mid_block, model.decoder.mid_block, *model.decoder.up_blocks]
    for block in blocks:
        block.resnets[0].register_forward_hook(lambda module, _, __: calls.append(module))
    pixels = seeded_pixels(64, 64)

    kept = gradients(model, pixels, TINY)
    assert len(calls) == len(blocks)
    calls.clear()
    model.enable_gradient_checkpointing()
    recomputed = gradients(model, pixels, TINY)
    assert len(calls) == 2 * len(blocks), "every block runs again in the backward pass"
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)
    calls.clear()
    with torch.inference_mode():
        model(pixels)
    assert len(calls) == len(blocks), "without gradients there is nothing to recompute"
