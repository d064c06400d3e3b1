from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sdvae.config import FAMILIES
from sdvae.errors import ConfigError
from sdvae.images.read import read_image
from sdvae.metrics import psnr
from sdvae.pixels import to_images, to_pixels
from sdvae.tiny import AutoencoderTiny, TinyConfig, named_as_diffusers, named_as_taesd
from sdvae.weights.load import config_json

FILES = {"sd1": "taesd", "sdxl": "taesdxl", "sd3": "taesd3", "flux1": "taef1"}
# PSNR in dB of the round trip through diffusers' AutoencoderTiny (0.42.1, fp32, 8-bit rounded).
CROPS = ("kodim03", "kodim07", "kodim20")  # their centre 256x256
CROP_PSNR = {
    "sd1": (27.182, 24.609, 24.832),
    "sdxl": (27.908, 24.498, 24.045),
    "sd3": (31.570, 29.651, 29.598),
    "flux1": (29.455, 28.094, 26.977),
}
MEAN_PSNR = {"sd1": 24.77, "sdxl": 24.90, "sd3": 29.02, "flux1": 27.76}  # 24 whole photos
PSNR_TOLERANCE = 0.05  # another instruction set rounds some pixels the other way; a wrong clamp or scale costs 1 dB


def read_pair(data_dir: Path, family: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    folder = data_dir / "weights" / "taesd_bf16"
    encoder, decoder = (load_file(folder / f"{FILES[family]}_{part}.safetensors") for part in ("encoder", "decoder"))
    return encoder, decoder


def load(tensors: dict[str, Tensor], config: TinyConfig) -> AutoencoderTiny:
    model = AutoencoderTiny(config)
    model.load_state_dict(tensors)  # strict, and into fp32
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=FILES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def taesd(data_dir: Path, family: str) -> AutoencoderTiny:
    return load(named_as_diffusers(*read_pair(data_dir, family)), TinyConfig.from_family(family))


def centre_crop(data_dir: Path, name: str, size: int = 256) -> Tensor:
    image = read_image(data_dir / "kodak" / f"{name}.png")
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return to_pixels(image[None, top : top + size, left : left + size])


def roundtrip_psnr(model: AutoencoderTiny, pixels: Tensor) -> float:
    return psnr(to_images(model.decode(model.encode(pixels).mode()))[0], to_images(pixels)[0])


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())


def test_crops_of_kodak_come_back_as_well_as_through_diffusers(
    taesd: AutoencoderTiny, family: str, data_dir: Path
) -> None:
    for name, expected in zip(CROPS, CROP_PSNR[family], strict=True):
        assert abs(roundtrip_psnr(taesd, centre_crop(data_dir, name)) - expected) <= PSNR_TOLERANCE


@pytest.mark.slow
def test_all_of_kodak_comes_back_as_published(taesd: AutoencoderTiny, family: str, data_dir: Path) -> None:
    photos = sorted((data_dir / "kodak").glob("*.png"))
    assert len(photos) == 24
    values = [roundtrip_psnr(taesd, to_pixels(read_image(photo)[None])) for photo in photos]
    assert abs(sum(values) / 24 - MEAN_PSNR[family]) <= PSNR_TOLERANCE


def test_numbers_are_those_of_diffusers(taesd: AutoencoderTiny, family: str) -> None:
    config = FAMILIES[family]
    theirs = diffusers.AutoencoderTiny.from_config(taesd.config.to_diffusers())
    theirs.load_state_dict(taesd.state_dict())
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 72, 104, generator=generator) * 2.0 - 1.0
    scaled = 2.0 * torch.randn(2, config.latent_channels, 9, 13, generator=generator)  # wide enough for the clamp
    with torch.no_grad():
        their_scaled = theirs.encode(pixels).latents
        their_pixels = theirs.decode(scaled).sample
    their_raw = their_scaled / config.scaling_factor + (config.shift_factor or 0.0)
    raw = scaled / config.scaling_factor + (config.shift_factor or 0.0)
    assert relative_error(taesd.encode(pixels).mean, their_raw) <= 1e-5
    assert relative_error(taesd.decode(raw), their_pixels) <= 1e-5
    assert taesd.encode(pixels).logvar.unique().tolist() == [-30.0]


def test_both_layouts_hold_one_model(taesd: AutoencoderTiny, family: str, data_dir: Path, tmp_path: Path) -> None:
    theirs = diffusers.AutoencoderTiny.from_config(taesd.config.to_diffusers())
    theirs.load_state_dict(taesd.state_dict())
    theirs.save_pretrained(tmp_path)
    again = load(load_file(tmp_path / "diffusion_pytorch_model.safetensors"), taesd.config)
    assert again.state_dict().keys() == taesd.state_dict().keys()
    for key, value in taesd.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


def test_the_taesd_of_flux2_loads_and_comes_back(data_dir: Path) -> None:
    """diffusers has no such network; that the branches matter shows when they are left out."""
    folder = data_dir / "weights" / "taesd_other"
    encoder, decoder = (torch.load(folder / f"taef2_{part}.pth", weights_only=True) for part in ("encoder", "decoder"))
    tensors = named_as_diffusers(encoder, decoder)
    config = TinyConfig(latent_channels=32, scaling_factor=1.0, has_mid_pool=True)
    pixels = centre_crop(data_dir, "kodim03")
    assert roundtrip_psnr(load(tensors, config), pixels) > 30.0
    branchless = {key: value for key, value in tensors.items() if ".pool." not in key}
    without = load(branchless, TinyConfig(latent_channels=32, scaling_factor=1.0))
    assert roundtrip_psnr(without, pixels) < 25.0
    with pytest.raises(ConfigError, match=r"FLUX\.2"):
        config_json(config)


def test_an_encoder_of_another_architecture_does_not_load(data_dir: Path) -> None:
    encoder = torch.load(data_dir / "weights" / "taesd_other" / "taesana_encoder.pth", weights_only=True)
    with pytest.raises(RuntimeError, match="Missing key"):
        load(named_as_diffusers(encoder, {}), TinyConfig(latent_channels=32))


def test_names_there_and_back(data_dir: Path) -> None:
    encoder, decoder = read_pair(data_dir, "sd1")
    again = named_as_taesd(named_as_diffusers(encoder, decoder))
    assert [half.keys() for half in again] == [encoder.keys(), decoder.keys()]
    assert again[1]["1.weight"] is decoder["1.weight"]


def test_a_config_that_asks_for_another_network_is_refused() -> None:
    config = TinyConfig.from_family("sd1")
    config.check_diffusers(config.to_diffusers())
    with pytest.raises(ConfigError, match="act_fn 'gelu', upsampling_scaling_factor 3"):
        config.check_diffusers(config.to_diffusers() | {"act_fn": "gelu", "upsampling_scaling_factor": 3})


def test_gradients_reach_pixels_and_weights_through_the_whole_path() -> None:
    model = AutoencoderTiny(TinyConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1))
    pixels = torch.rand(1, 3, 32, 24, requires_grad=True)
    reconstruction, posterior = model(pixels, torch.Generator().manual_seed(0))
    assert reconstruction.shape == pixels.shape and posterior.mean.shape == (1, 4, 4, 3)
    reconstruction.square().mean().backward()
    assert pixels.grad is not None and pixels.grad.abs().max() > 0
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_configs() -> None:
    sd3 = TinyConfig.from_family("sd3")
    assert (sd3.latent_channels, sd3.scaling_factor, sd3.shift_factor, sd3.downscale) == (16, 1.5305, 0.0609, 8)
    with pytest.raises(ConfigError, match="sdxl"):
        TinyConfig.from_family("sdx")
    with pytest.raises(ConfigError, match="one width"):
        TinyConfig(block_out_channels=(64, 64, 128, 128))
    with pytest.raises(ConfigError, match="name the family"):
        TinyConfig.from_diffusers(sd3.to_diffusers())
