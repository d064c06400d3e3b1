"""Arithmetic with latents: exact where the VAE is linear."""

import numpy as np
import pytest
import torch

from sdvae import VAE, attribute_vector
from sdvae.errors import ShapeError
from sdvae.explore.arithmetic import mean_latents
from tests.linear_vae import IdentityVAE

VAE_ = IdentityVAE()


def images(seed: int, number: int = 5) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(60, 120, (number, 6, 8, 3), np.uint8))


def test_a_mean_is_the_mean_of_the_pixels_where_latents_are_pixels() -> None:
    found = mean_latents(VAE_, iter(images(0)))
    expected = np.stack(images(0)).astype(np.float64).mean(0).transpose(2, 0, 1) / 127.5 - 1
    assert found.shape == (1, 3, 6, 8) and np.abs(found[0].numpy() - expected).max() < 1e-6


def test_an_attribute_vector_recovers_a_planted_direction() -> None:
    planted = np.zeros((6, 8, 3), np.uint8)
    planted[2:4, 1:5, 0] = 90
    with_it = [image + planted for image in images(1)]
    vector = attribute_vector(VAE_, with_it, images(1))
    expected = torch.from_numpy(planted.transpose(2, 0, 1)[None] / 127.5).float()
    assert torch.allclose(vector, expected, atol=1e-6)
    (other,) = images(2, 1)
    moved = VAE_.encode_images([other]).latents[0] + 0.5 * vector
    half = VAE_.decode(moved) - VAE_.decode(VAE_.encode_images([other]).latents[0])
    assert torch.allclose(half, 0.5 * expected, atol=1e-6)


def test_images_of_several_sizes_have_no_mean(small_vae: VAE) -> None:
    with pytest.raises(ShapeError, match="8x6 and 8x8 px have no mean; give images of one size"):
        mean_latents(VAE_, [*images(0, 1), np.zeros((8, 8, 3), np.uint8)])
    with pytest.raises(ShapeError, match="no images have no mean"):
        mean_latents(VAE_, [])
    with pytest.raises(ShapeError, match=r"latents \(1, 3, 6, 8\) and \(1, 3, 8, 8\) have no difference"):
        attribute_vector(VAE_, images(0, 1), [np.zeros((8, 8, 3), np.uint8)])


# --- Grids ---


def test_a_grid_of_straight_lines_is_bilinear() -> None:
    corners = [np.full((4, 4, 3), level, np.uint8) for level in (0, 100, 40, 200)]
    found = VAE_.interpolate_grid(corners, steps=3, mode="lerp")
    levels = [int(np.asarray(image)[0, 0, 0]) for image in found]
    assert levels == [0, 50, 100, 20, 85, 150, 40, 120, 200]


def test_the_edges_of_a_grid_are_walks_between_its_corners(small_vae: VAE) -> None:
    corners = [np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8) for seed in range(4)]
    grid = [np.asarray(image).astype(int) for image in small_vae.interpolate_grid(corners, steps=4)]
    rows = {0: corners[:2], 12: corners[2:]}
    for first, ends in rows.items():
        walk = [np.asarray(image).astype(int) for image in small_vae.interpolate(*ends, steps=4)]
        assert max(np.abs(a - b).max() for a, b in zip(grid[first : first + 4], walk, strict=True)) <= 1
    left = [np.asarray(image).astype(int) for image in small_vae.interpolate(corners[0], corners[2], steps=4)]
    assert max(np.abs(a - b).max() for a, b in zip(grid[::4], left, strict=True)) <= 1


def test_a_grid_needs_four_corners_of_one_size() -> None:
    with pytest.raises(ShapeError, match="a grid has four corners, these are 2 images"):
        VAE_.interpolate_grid(images(0, 2))
    with pytest.raises(ShapeError, match="cannot interpolate between 8x6 and 8x8 px"):
        VAE_.interpolate_grid([*images(0, 3), np.zeros((8, 8, 3), np.uint8)])
