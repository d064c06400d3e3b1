"""The bridge from images to pixels, held to diffusers' VaeImageProcessor bit for bit."""

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

import sdvae.pixels
from sdvae.errors import ImageError, ShapeError
from sdvae.pixels import fit_channels, pad_to_multiple, to_images, to_pixels


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("size", [(8, 8), (16, 48), (512, 8)])
def test_to_pixels_equals_diffusers(size: tuple[int, int]) -> None:
    images = np.stack([noise(*size, seed) for seed in range(2)])
    images[0].reshape(-1)[:192] = np.arange(192)
    images[1].reshape(-1)[:192] = np.arange(64, 256)  # every level is there
    expected = VaeImageProcessor(vae_scale_factor=8).preprocess([Image.fromarray(image) for image in images])
    pixels = to_pixels(images)
    assert torch.equal(pixels, expected)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()


def test_to_pixels_takes_read_only_arrays() -> None:
    images = noise(8, 8)[None]
    images.setflags(write=False)
    assert to_pixels(images).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("band_pixels", [2**20, 50])  # at 50, several bands of rows and a shorter last one
def test_to_images_equals_diffusers(dtype: torch.dtype, band_pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdvae.pixels, "_BAND_PIXELS", band_pixels)
    pixels = torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert pixels.abs().max() > 1  # the clamp matters
    expected = VaeImageProcessor().postprocess(pixels, output_type="pil")
    images = to_images(pixels)
    assert images.dtype == np.uint8
    assert np.array_equal(images, np.stack([np.asarray(image) for image in expected]))


def test_images_survive_the_bridge() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    assert np.array_equal(to_images(to_pixels(levels)), levels)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_to_images_refuses_what_is_not_finite(value: float) -> None:
    pixels = torch.zeros(2, 3, 8, 8)
    pixels[1, 2, 7, 7] = value
    with pytest.raises(ImageError, match="image 1 of the batch holds NaN or infinite pixels"):
        to_images(pixels)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ShapeError, match=r"\(8, 8, 3\)"):
        to_pixels(noise(8, 8))
    with pytest.raises(ShapeError, match="float32"):
        to_pixels(noise(8, 8)[None].astype(np.float32))
    with pytest.raises(ShapeError, match=r"\(1, 2, 8, 8\)"):
        to_images(torch.zeros(1, 2, 8, 8))
    with pytest.raises(ShapeError, match="takes images of 6 channels, of which photos make none"):
        fit_channels(torch.zeros(1, 3, 8, 8), 6)
    with pytest.raises(ShapeError, match="uint8"):
        to_images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_grey_is_that_of_pillow_and_comes_back_in_three_channels() -> None:
    levels = noise(9, 7)
    grey = fit_channels(to_pixels(levels[None]), 1)
    assert grey.shape == (1, 1, 9, 7)
    images = to_images(grey)
    assert images.shape == (1, 9, 7, 3)
    theirs = np.asarray(Image.fromarray(levels).convert("L")).astype(int)
    assert np.abs(images[0].astype(int) - theirs[..., None]).max() <= 1  # Pillow rounds once more


def test_alpha_survives() -> None:
    levels = np.dstack([noise(9, 7), noise(9, 7)[..., :1]])
    assert np.array_equal(to_images(to_pixels(levels[None]))[0], levels)


def test_padding_reflects_and_repeats_the_edge_where_it_cannot() -> None:
    image = noise(5, 13)
    assert np.array_equal(pad_to_multiple(image, 8), np.pad(image, ((0, 3), (0, 3), (0, 0)), mode="reflect"))
    thin = noise(2, 8)  # 6 rows are missing, one can be reflected
    assert np.array_equal(pad_to_multiple(thin, 8), np.pad(thin, ((0, 6), (0, 0), (0, 0)), mode="edge"))
    assert pad_to_multiple(noise(1, 1), 8).shape == (8, 8, 3)
    whole = noise(16, 8)
    assert pad_to_multiple(whole, 8) is whole
