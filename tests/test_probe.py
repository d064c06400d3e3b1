import hashlib
import json
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file
from torch import Tensor

from scripts.make_probe import ENCODERS, make_probe
from sdvae.config import FAMILIES, VAEConfig
from sdvae.model import AutoencoderKL
from sdvae.pixels import to_pixels
from sdvae.tiny import TinyConfig, TinyEncoder
from sdvae.weights.load import build_model, load_weights
from sdvae.weights.probe import (
    NEAR_CORRELATION,
    PROBE_ASSET,
    PROOF_CORRELATION,
    match_references,
    probe_image,
    references,
)
from tests.conftest import SMALL, random_model


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return to_pixels(probe_image()[None])


def taesd_encoder(data_dir: Path, space: str, noise: float = 0.0) -> TinyEncoder:
    """The real one; `noise` is added to each tensor, relative to its own spread."""
    generator = torch.Generator().manual_seed(1)
    encoder = TinyEncoder(TinyConfig.from_family(space))
    tensors = load_file(data_dir / "weights" / "taesd_bf16" / f"{ENCODERS[space]}_encoder.safetensors")
    for key, value in tensors.items():
        tensors[key] = value.float() + noise * value.float().std() * torch.randn(value.shape, generator=generator)
    encoder.layers.load_state_dict(tensors)
    return encoder.requires_grad_(False)


def test_the_asset_is_what_its_script_makes(data_dir: Path) -> None:
    with as_file(files("sdvae") / "assets" / PROBE_ASSET) as path:
        stored = load_file(path)
        assert path.stat().st_size < 25_000
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
    made = load(make_probe(data_dir / "weights" / "taesd_bf16"))
    assert stored.keys() == made.keys() == references().keys()
    for space, latents in made.items():
        assert latents.shape == (FAMILIES[space].latent_channels, 16, 16)
        # fp16 keeps 11 bits of numbers up to 8; another instruction set rounds a few the other way.
        assert torch.allclose(latents.float(), stored[space].float(), atol=0.01)
    assert about["sha256"]["image"] == hashlib.sha256(probe_image().tobytes()).hexdigest()
    assert "MIT" in about["licence"] and len(about["sha256"]) == 5


@pytest.mark.parametrize("space", ENCODERS)
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_an_encoder_is_near_its_own_space_and_far_from_the_other(
    data_dir: Path, pixels: Tensor, space: str, noise: float
) -> None:
    best, other = match_references(taesd_encoder(data_dir, space, noise)(pixels)[0])
    assert best.space == space and best.correlation >= PROOF_CORRELATION + 0.03
    assert abs(best.agreement.slope - 1.0) <= 0.12
    assert abs(other.correlation) <= NEAR_CORRELATION - 0.3


@torch.no_grad()
def test_the_embedded_encoder_speaks_sd1(pixels: Tensor) -> None:
    best, other = match_references(build_model(load_weights()).encode(pixels).mean[0])
    assert best.space == "sd1" and best.correlation >= NEAR_CORRELATION + 0.1
    assert abs(best.agreement.slope / FAMILIES["sd1"].scaling_factor - 1.0) <= 0.15
    assert other.correlation <= NEAR_CORRELATION - 0.3


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_random_encoders_are_far_from_all(pixels: Tensor, seed: int) -> None:
    torch.manual_seed(seed)
    sixteen = replace(FAMILIES["small"], latent_channels=16)
    latents = [
        *(random_model(config, seed).encode(pixels).mean[0] for config in (SMALL, replace(SMALL, latent_channels=16))),
        *(AutoencoderKL(config).encode(pixels).mean[0] for config in (FAMILIES["small"], sixteen)),
        *(TinyEncoder(TinyConfig.from_family(space))(pixels)[0] for space in ("sd1", "sd3")),
    ]
    matches = [match for each in latents for match in match_references(each)]
    assert len(matches) == 12
    assert max(abs(match.correlation) for match in matches) <= NEAR_CORRELATION - 0.3


def test_shrunken_pixels_are_no_latents(pixels: Tensor) -> None:
    """All spaces keep the picture in their channels, so averages of pixels correlate with each a little."""
    means = torch.nn.functional.avg_pool2d(pixels, 8)[0]
    for match in match_references(torch.cat([means, means.mean(0, keepdim=True)])):
        assert match.correlation <= NEAR_CORRELATION - 0.3


def test_scale_shift_and_sign_are_told_apart() -> None:
    reference = references()["sdxl"]
    best = match_references(reference / 0.13025 + torch.arange(4.0).view(4, 1, 1))[0]
    assert (best.space, round(best.correlation, 4), round(best.agreement.slope, 5)) == ("sdxl", 1.0, 0.13025)
    assert match_references(-reference)[-1].correlation < -0.999


@pytest.mark.parametrize("value", [0.0, 1e30, float("nan"), float("inf")])
def test_latents_without_a_picture_match_nothing(value: float) -> None:
    matches = match_references(torch.full((4, 16, 16), value))
    assert [match.correlation for match in matches] == [0.0, 0.0]


def test_other_shapes_match_nothing() -> None:
    assert match_references(torch.zeros(32, 16, 16)) == match_references(torch.zeros(4, 32, 32)) == []


def test_the_image_looks_like_a_photo_to_statistics() -> None:
    """Dead leaves: neighbours are alike, channels too, and the spectrum falls about as 1/f."""
    image = probe_image().astype(float)
    assert 60 < image.std() < 90 and 90 < image.mean() < 165
    flat = image.reshape(-1, 3)
    assert min(torch.corrcoef(torch.tensor(flat.T))[0, 1:].tolist()) > 0.7
    gray = torch.tensor(image.mean(-1) - image.mean())
    assert (gray[:, 1:] * gray[:, :-1]).mean() / gray.square().mean() > 0.9
    assert VAEConfig().downscale * 16 == len(image)
