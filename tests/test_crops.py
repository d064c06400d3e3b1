from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sdvae.errors import ConfigError
from sdvae.evaluate.crops import cut
from sdvae.evaluate.recipes import RECIPES, Recipe, find_recipe, rivals, sized

PHOTO = np.random.default_rng(0).integers(0, 256, (150, 203, 3), dtype=np.uint8)


def guided_diffusion_crop(photo: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """ADM's steps in arrays: halve by boxes, shrink by bicubic, cut out the middle with integer division."""
    image = Image.fromarray(photo)
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    array = np.array(image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC))
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize("size", [32, 64, 100, 150, 180])
def test_adms_crop_is_guided_diffusions(size: int) -> None:
    recipe = Recipe("x", "x", size, "adm", "bicubic")
    np.testing.assert_array_equal(cut(PHOTO, recipe), guided_diffusion_crop(PHOTO, size))


def test_a_whole_photo_is_left_as_it_is() -> None:
    assert cut(PHOTO, RECIPES["native"]) is PHOTO


def test_a_centre_crop_is_that_of_encode() -> None:
    from sdvae.encoding.resize import apply
    from sdvae.store.geometry import Preprocess, plan_geometry

    geometry = plan_geometry(150, 203, Preprocess(64, "center"), downscale=8)
    np.testing.assert_array_equal(cut(PHOTO, Recipe("x", "x", 64, "center")), apply(PHOTO, geometry))


def test_antialias_matters_and_bilinear_is_torchs() -> None:
    recipe = Recipe("x", "x", 64, "center", "bilinear")
    smooth, rough = cut(PHOTO, recipe), cut(PHOTO, replace(recipe, is_antialiased=False))
    assert smooth.shape == rough.shape == (64, 64, 3)
    assert rough.std() > 1.3 * smooth.std()  # noise survives where nothing is averaged


def test_a_rival_differs_from_its_recipe_in_one_convention() -> None:
    for recipe in RECIPES.values():
        assert all(rival != recipe for rival in rivals(recipe).values())
        assert ("bilinear, no antialias" in rivals(recipe)) == (recipe.size_px is not None)


def test_a_size_makes_crops_of_whole_photos() -> None:
    assert sized(RECIPES["native"], 256).crop == "center"
    assert sized(RECIPES["imagenet-256"], 512).crop == "adm"
    assert sized(RECIPES["native"], None) is RECIPES["native"]


def test_an_unknown_recipe_is_told_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="sd-vae-card"):
        find_recipe("coco")


def test_the_caption_tells_what_a_stranger_needs() -> None:
    caption = RECIPES["imagenet-256"].caption()
    for word in ("imagenet-256", "256x256 px", "ADM", "50,000", "mode", "8 bits", "11 px Gaussian", "-1..1"):
        assert word in caption
    assert "seed 7" in replace(RECIPES["native"], latents="sample", seed=7).caption()
