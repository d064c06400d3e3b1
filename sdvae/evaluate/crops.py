"""A photo as a recipe wants it: resized and cropped."""

import numpy as np
from numpy.typing import NDArray

from sdvae.encoding.resize import apply
from sdvae.evaluate.recipes import Recipe
from sdvae.store.geometry import Geometry, Preprocess, plan_geometry

Image = NDArray[np.uint8]  # (H, W, 3)


def cut(photo: Image, recipe: Recipe) -> Image:
    """The image that is judged; ImageError for a photo that is too long and thin to be resized."""
    size = recipe.size_px
    if size is None:
        return photo
    if recipe.crop == "adm":
        return _adm(photo, size)
    geometry = plan_geometry(photo.shape[0], photo.shape[1], Preprocess(size, recipe.crop), downscale=1)
    if recipe.resample != "bilinear":
        return apply(photo, geometry, recipe.resample)
    return _crop(_bilinear(photo, geometry.resized_px, recipe.is_antialiased), geometry)


def _adm(photo: Image, size: int) -> Image:
    """guided-diffusion's `center_crop_arr`: halved by a box filter while twice as large as needed, then bicubic."""
    from PIL import Image as Pillow

    image = Pillow.fromarray(photo)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Pillow.Resampling.BOX)
    factor = size / min(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Pillow.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


def _bilinear(photo: Image, size: tuple[int, int], is_antialiased: bool) -> Image:
    import torch
    import torch.nn.functional as F

    planes = torch.from_numpy(photo).permute(2, 0, 1)[None].float()
    resized = F.interpolate(planes, size, mode="bilinear", antialias=is_antialiased)
    return resized.round_().clamp_(0, 255).to(torch.uint8)[0].permute(1, 2, 0).contiguous().numpy()


def _crop(image: Image, geometry: Geometry) -> Image:
    top, left, height, width = geometry.crop_px
    return np.ascontiguousarray(image[top : top + height, left : left + width])
