"""Arithmetic with what latents mean: the mean of photos with an attribute, minus that of photos without it."""

from collections.abc import Iterable

import torch
from torch import Tensor

from sdvae.amounts import size_text
from sdvae.engine.run import Budget
from sdvae.errors import ShapeError
from sdvae.vae import VAE, AnyImage


def mean_latents(vae: VAE, images: Iterable[AnyImage], budget: Budget = None) -> Tensor:  # (1, C, h, w) raw
    """The mean of the latents of images, taken one after the other; ShapeError for several sizes, or none."""
    total: Tensor | None = None
    size_px, number = (0, 0), 0
    for image in images:
        encoded = vae.encode_images([image], budget)
        latents = encoded.latents[0].to("cpu", torch.float64)
        if total is not None and encoded.sizes[0] != size_px:
            raise ShapeError(
                f"latents of {size_text(*size_px)} and {size_text(*encoded.sizes[0])} px have no mean; "
                "give images of one size"
            )
        total = latents if total is None else total + latents
        size_px, number = encoded.sizes[0], number + 1
    if total is None:
        raise ShapeError("no images have no mean; give at least one")
    return (total / number).float().to(vae.device)


def attribute_vector(
    vae: VAE, with_it: Iterable[AnyImage], without_it: Iterable[AnyImage], budget: Budget = None
) -> Tensor:  # (1, C, h, w) raw
    """What an attribute adds to latents: the mean of images with it, minus the mean of images without it.

    Add it, times a strength, to the latents of another image of that size (Larsen et al. 2016, arXiv 1512.09300).
    ShapeError for images of several sizes, or none.
    """
    present, absent = mean_latents(vae, with_it, budget), mean_latents(vae, without_it, budget)
    if present.shape != absent.shape:
        raise ShapeError(
            f"latents {tuple(present.shape)} and {tuple(absent.shape)} have no difference; give images of one size"
        )
    return present - absent
