"""diffusers' tiles, cut and blended by diffusers' own code around our networks: approximate, for comparison with it.

Each tile is normalised by its own statistics, so colours drift from tile to tile, and the overlaps are computed twice.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from sdvae.config import VAEConfig

Run = Callable[[Tensor], Tensor]


def blended_encode(encode_moments: Run, config: VAEConfig, pixels: Tensor) -> Tensor:
    """Moments as diffusers' `enable_tiling` gives them: of tiles, where the pixels are more than one tile."""
    from diffusers import AutoencoderKL

    if max(pixels.shape[2:]) <= config.sample_size:
        return encode_moments(pixels)
    moments: Tensor = AutoencoderKL._tiled_encode(_tiles(config, encoder=encode_moments), pixels)
    return moments


def blended_decode(decode: Run, config: VAEConfig, latents: Tensor) -> Tensor:
    """Pixels as diffusers' `enable_tiling` gives them."""
    from diffusers import AutoencoderKL

    if max(latents.shape[2:]) * config.downscale <= config.sample_size:
        return decode(latents)
    pixels: Tensor = AutoencoderKL.tiled_decode(_tiles(config, decoder=decode), latents, return_dict=False)[0]
    return pixels


def _tiles(config: VAEConfig, **networks: Run) -> Any:
    """What diffusers' methods read of their AutoencoderKL; our networks hold the quant convolutions already."""
    from diffusers import AutoencoderKL

    return SimpleNamespace(
        tile_sample_min_size=config.sample_size,
        tile_latent_min_size=config.sample_size // config.downscale,
        tile_overlap_factor=0.25,
        config=SimpleNamespace(use_quant_conv=False, use_post_quant_conv=False),
        blend_v=lambda *tile: AutoencoderKL.blend_v(None, *tile),
        blend_h=lambda *tile: AutoencoderKL.blend_h(None, *tile),
        **networks,
    )
