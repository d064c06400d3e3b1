"""AutoencoderTiny: TAESD, a small network that speaks the latents of a large VAE.

Architecture and weights: madebyollin/taesd, `taesd.py` (MIT). Parameters are named as in diffusers' AutoencoderTiny.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sdvae.config import VAEConfig
from sdvae.errors import ConfigError
from sdvae.latents import standardise, unstandardise
from sdvae.posterior import LOGVAR_MIN, DiagonalGaussian

T = TypeVar("T")

TINY_FAMILIES = ("sd1", "sdxl", "sd3", "flux1", "flux2")  # those that have a TAESD
CLAMP = 3.0  # scaled latents are squeezed into (-3, 3) before they are decoded


@dataclass(frozen=True)
class TinyConfig(VAEConfig):
    """One TAESD; the defaults are the one for SD 1.

    Its scaling is that of the VAE whose latents it speaks: the network itself reads and writes scaled latents, FLUX.2's
    in no patches. `has_mid_pool` is FLUX.2's: a normalised 1x1 branch in the blocks of the lowest resolution.
    """

    block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    layers_per_block: int = 3
    norm_num_groups: int = 4
    mid_block_add_attention: bool = False
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    force_upcast: bool = False
    has_mid_pool: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.block_out_channels)) > 1:
            raise ConfigError(f"block_out_channels {self.block_out_channels} differ; a TAESD has one width throughout")
        if self.padding != "zeros":
            raise ConfigError(f"padding is {self.padding}; a TAESD is padded with zeros, so leave the padding out")

    @classmethod
    def from_family(cls, name: str) -> "TinyConfig":
        """The TAESD for the latents of a named family; ConfigError for an unknown name."""
        family = VAEConfig.from_family(name)
        return cls(
            latent_channels=family.latent_channels,
            sample_size=family.sample_size,
            scaling_factor=family.scaling_factor,
            shift_factor=family.shift_factor,
            latents_mean=family.latents_mean,
            latents_std=family.latents_std,
            latents_patch=family.latents_patch,
            has_mid_pool=name == "flux2",
        )

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "TinyConfig":
        """Always a ConfigError: a TAESD's config.json is the same for SD 1 and SDXL, so the family must be named."""
        raise ConfigError("the config of an AutoencoderTiny does not tell whose latents it speaks; name the family")

    def check_diffusers(self, config: Mapping[str, Any]) -> None:
        """ConfigError if an AutoencoderTiny's config asks for a layer that sdvae does not have."""
        ours = {"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2}
        odd = [f"{key} {config[key]!r}" for key, value in ours.items() if config.get(key, value) != value]
        if odd:
            raise ConfigError(f"the config asks for {', '.join(odd)}; sdvae runs the published TAESDs only")

    def to_diffusers(self) -> dict[str, Any]:
        """The mapping that diffusers' `AutoencoderTiny.from_config` reads (it knows no pooled blocks)."""
        num_blocks = [self.layers_per_block] * (len(self.block_out_channels) - 1)
        return {
            "_class_name": "AutoencoderTiny",
            "act_fn": "relu",
            "decoder_block_out_channels": list(self.block_out_channels),
            "encoder_block_out_channels": list(self.block_out_channels),
            "in_channels": self.in_channels,
            "latent_channels": self.latent_channels,
            "num_decoder_blocks": [*num_blocks, 1],
            "num_encoder_blocks": [1, *num_blocks],
            "out_channels": self.out_channels,
            "scaling_factor": 1.0,  # its latents are scaled ones already
            "shift_factor": 0.0,
        }


class TinyBlock(nn.Module):
    """relu(x + three convolutions of x); `num_pool_groups` puts a branch before it that sees the whole image."""

    def __init__(self, width: int, num_pool_groups: int | None = None) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.pool = None if num_pool_groups is None else _pool(width, num_pool_groups)

    def forward(self, x: Tensor) -> Tensor:  # (N, width, H, W) -> same
        """Its output is never negative."""
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(x + self.conv(x))


class TinyEncoder(nn.Module):
    """Pixels to scaled latents."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        width, num_levels = config.block_out_channels[0], len(config.block_out_channels)
        layers: list[nn.Module] = [nn.Conv2d(config.in_channels, width, 3, padding=1), TinyBlock(width)]
        for level in range(1, num_levels):
            layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False))
            layers += _blocks(config, is_lowest=level == num_levels - 1)
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, config.latent_channels, 3, padding=1))

    def forward(self, pixels: Tensor) -> Tensor:  # (N, 3, H, W) in [-1, 1] -> scaled (N, C, H/8, W/8)
        """The network itself was trained on pixels in [0, 1]."""
        out: Tensor = self.layers((pixels + 1.0) / 2.0)
        return out


class TinyDecoder(nn.Module):
    """Scaled latents to pixels."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        width, num_levels = config.block_out_channels[0], len(config.block_out_channels)
        layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, width, 3, padding=1), nn.ReLU()]
        for level in range(num_levels - 1, 0, -1):
            layers += _blocks(config, is_lowest=level == num_levels - 1)
            layers += [nn.Upsample(scale_factor=2.0), nn.Conv2d(width, width, 3, padding=1, bias=False)]
        self.layers = nn.Sequential(*layers, TinyBlock(width), nn.Conv2d(width, config.out_channels, 3, padding=1))

    def forward(self, scaled_latents: Tensor) -> Tensor:  # scaled (N, C, h, w) -> (N, 3, 8h, 8w), about [-1, 1]
        """The network itself gives pixels in [0, 1]."""
        out: Tensor = self.layers(torch.tanh(scaled_latents / CLAMP) * CLAMP)
        return out * 2.0 - 1.0


class AutoencoderTiny(nn.Module):
    """A TAESD with the interface of `AutoencoderKL`: raw latents out of encode and into decode.

    The posterior is a point: its logvar is -30 throughout.
    """

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = TinyEncoder(config)
        self.decoder = TinyDecoder(config)

    def encode(self, pixels: Tensor) -> DiagonalGaussian:  # (N, 3, H, W) in [-1, 1] -> raw (N, C, H/8, W/8)
        """The posterior over raw latents, with (almost) no variance."""
        return DiagonalGaussian.from_moments(self.encode_moments(pixels))

    def encode_moments(self, pixels: Tensor) -> Tensor:  # (N, 3, H, W) in [-1, 1] -> (N, 2C, H/8, W/8)
        """Mean and logvar, one after the other, as the encoder of a KL-VAE gives them."""
        mean = unstandardise(self.encoder(pixels), self.config)
        return torch.cat([mean, torch.full_like(mean, LOGVAR_MIN)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:  # raw (N, C, h, w) -> (N, 3, 8h, 8w), about [-1, 1]
        """Pixels of raw latents; not clamped."""
        out: Tensor = self.decoder(standardise(latents, self.config))
        return out

    def forward(self, pixels: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, DiagonalGaussian]:
        """Reconstruction of one posterior sample, and the posterior."""
        posterior = self.encode(pixels)
        return self.decode(posterior.sample(generator)), posterior


def named_as_diffusers(encoder: Mapping[str, T], decoder: Mapping[str, T]) -> dict[str, T]:
    """TAESD's own two files (bare `nn.Sequential` keys: `0.weight`) under the names of one AutoencoderTiny.

    Either mapping may be empty. TAESD's decoder begins with a clamp that has a place in its sequence; here it has none.
    """
    named = {f"encoder.layers.{key}": value for key, value in encoder.items()}
    for key, value in decoder.items():
        layer, _, rest = key.partition(".")
        named[f"decoder.layers.{int(layer) - 1}.{rest}"] = value
    return named


def named_as_taesd(tensors: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """The encoder and the decoder of an AutoencoderTiny under the names of TAESD's own two files."""
    encoder, decoder = {}, {}
    for key, value in tensors.items():
        side, _, layer, rest = key.split(".", 3)
        if side == "encoder":
            encoder[f"{layer}.{rest}"] = value
        else:
            decoder[f"{int(layer) + 1}.{rest}"] = value
    return encoder, decoder


def _blocks(config: TinyConfig, is_lowest: bool) -> list[nn.Module]:
    num_pool_groups = config.norm_num_groups if config.has_mid_pool and is_lowest else None
    return [TinyBlock(config.block_out_channels[0], num_pool_groups) for _ in range(config.layers_per_block)]


def _pool(width: int, num_groups: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, 4 * width, 1, bias=False),
        nn.GroupNorm(num_groups, 4 * width),
        nn.ReLU(),
        nn.Conv2d(4 * width, width, 1, bias=False),
    )
