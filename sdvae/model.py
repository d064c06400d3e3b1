"""The reference KL-VAE: plain, differentiable, every parameter named as in diffusers' AutoencoderKL.

Architecture: CompVis latent-diffusion `ldm/modules/diffusionmodules/model.py` (the f8 autoencoder of
Stable Diffusion). Whatever runs faster elsewhere in this package is held to the numbers of this file.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdvae.config import Padding, VAEConfig
from sdvae.posterior import DiagonalGaussian

NORM_EPS = 1e-6
# What goes round, and the zeros, where only one direction is circular; F.pad and conv2d count the sides otherwise.
_PADS = {"circular-x": ((1, 1, 0, 0), (1, 0)), "circular-y": ((0, 0, 1, 1), (0, 1))}


class HalfCircularConv2d(nn.Conv2d):
    """A 3x3 convolution whose input goes round in one direction, and is padded with zeros in the other."""

    padding_mode: Padding  # type: ignore[assignment]  # torch knows fewer

    def __init__(self, in_channels: int, out_channels: int, padding: Padding) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.padding_mode = padding

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode not in _PADS:
            out: Tensor = super()._conv_forward(x, weight, bias)
            return out
        pad, zeros = _PADS[self.padding_mode]
        return F.conv2d(F.pad(x, pad, "circular"), weight, bias, padding=zeros)


def conv3x3(in_channels: int, out_channels: int, padding: Padding) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size; `padding` is what lies beyond the border."""
    if padding in _PADS:
        return HalfCircularConv2d(in_channels, out_channels, padding)
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, padding_mode=padding)  # type: ignore[arg-type]  # nor here


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int, padding: Padding) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels, NORM_EPS)
        self.conv1 = conv3x3(in_channels, out_channels, padding)
        self.norm2 = nn.GroupNorm(num_groups, out_channels, NORM_EPS)
        self.conv2 = conv3x3(out_channels, out_channels, padding)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:  # (N, in, H, W) -> (N, out, H, W)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        out: Tensor = shortcut + h
        return out


class Attention(nn.Module):
    """Single-head self-attention over all positions, with a residual."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(num_groups, channels, NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list, because diffusers' key is to_out.0

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> same
        height = x.shape[2]
        tokens = rearrange(self.group_norm(x), "n c h w -> n 1 (h w) c")
        mixed = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        out: Tensor = x + rearrange(self.to_out[0](mixed), "n 1 (h w) c -> n c h w", h=height)
        return out


class Downsample(nn.Module):
    """Halve height and width (rounding down) with a stride-2 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # SD pads right and bottom only: the stride-2 convolution is asymmetric. These are zeros whatever the padding
        # of the VAE, as in diffusers, where this layer has no padding of its own that a mode could change.
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int, padding: Padding) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels, padding)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Level(nn.Module):
    """One resolution: resnet blocks, each followed by attention where the level has it."""

    def __init__(self, widths: list[int], num_groups: int, has_attention: bool, padding: Padding) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.resnets = nn.ModuleList([ResnetBlock(before, after, num_groups, padding) for before, after in pairs])
        self.attentions = nn.ModuleList([Attention(widths[-1], num_groups) for _ in pairs] if has_attention else [])

    def forward(self, x: Tensor) -> Tensor:
        for index, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.attentions:
                x = self.attentions[index](x)
        return x


class DownLevel(Level):
    """A level of the encoder; all but the last end in a Downsample."""

    def __init__(
        self, widths: list[int], num_groups: int, has_attention: bool, padding: Padding, is_last: bool
    ) -> None:
        super().__init__(widths, num_groups, has_attention, padding)
        self.downsamplers = nn.ModuleList([] if is_last else [Downsample(widths[-1])])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for downsample in self.downsamplers:
            x = downsample(x)
        return x


class UpLevel(Level):
    """A level of the decoder; all but the last end in an Upsample."""

    def __init__(
        self, widths: list[int], num_groups: int, has_attention: bool, padding: Padding, is_last: bool
    ) -> None:
        super().__init__(widths, num_groups, has_attention, padding)
        self.upsamplers = nn.ModuleList([] if is_last else [Upsample(widths[-1], padding)])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class MidBlock(nn.Module):
    """Resnet, attention where the config has it, resnet, at the lowest resolution."""

    def __init__(self, channels: int, num_groups: int, has_attention: bool, padding: Padding) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, num_groups, padding) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(channels, num_groups)] if has_attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        out: Tensor = self.resnets[1](x)
        return out


class Encoder(nn.Module):
    """Pixels to moments, before `quant_conv`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = list(config.block_out_channels), config.norm_num_groups
        padding = config.padding
        self.gradient_checkpointing = False
        self.conv_in = conv3x3(config.in_channels, widths[0], padding)
        self.down_blocks = nn.ModuleList()
        before = widths[0]
        for level, width in enumerate(widths):
            is_last = level == len(widths) - 1
            level_widths = [before] + [width] * config.layers_per_block
            has_attention = level in config.attention_levels
            self.down_blocks.append(DownLevel(level_widths, groups, has_attention, padding, is_last))
            before = width
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention, padding)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = conv3x3(widths[-1], 2 * config.latent_channels, padding)

    def forward(self, pixels: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, 2C, H/8, W/8)
        x = self.conv_in(pixels)
        for block in [*self.down_blocks, self.mid_block]:
            x = _run(block, x, self.gradient_checkpointing)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


class Decoder(nn.Module):
    """Latents to pixels, after `post_quant_conv`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = list(config.decoder_widths), config.norm_num_groups
        padding = config.padding
        self.gradient_checkpointing = False
        self.conv_in = conv3x3(config.latent_channels, widths[-1], padding)
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention, padding)
        self.up_blocks = nn.ModuleList()
        before = widths[-1]
        for level, width in reversed(list(enumerate(widths))):
            level_widths = [before] + [width] * (config.decoder_layers + 1)
            has_attention = level in config.attention_levels
            self.up_blocks.append(UpLevel(level_widths, groups, has_attention, padding, is_last=level == 0))
            before = width
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], NORM_EPS)
        self.conv_out = conv3x3(widths[0], config.out_channels, padding)

    def forward(self, latents: Tensor) -> Tensor:  # (N, C, h, w) -> (N, 3, 8h, 8w)
        x = self.conv_in(latents)
        for block in [self.mid_block, *self.up_blocks]:
            x = _run(block, x, self.gradient_checkpointing)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


class AutoencoderKL(nn.Module):
    """The whole VAE; its state dict is that of diffusers' AutoencoderKL (FLUX.2's: AutoencoderKLFlux2) of its config.

    Like diffusers, sizes that are no multiple of the downscale are floored; padding belongs to
    `VAE.encode_images`.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels = config.latent_channels
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else None
        # FLUX.2 keeps the scale of its latents among its weights; `latents.py` applies it, the network never does.
        patches = channels * config.latents_patch**2
        self.bn = nn.BatchNorm2d(patches, config.batch_norm_eps, affine=False) if config.latents_patch > 1 else None

    def enable_gradient_checkpointing(self, is_enabled: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.encoder.gradient_checkpointing = is_enabled
        self.decoder.gradient_checkpointing = is_enabled

    def encode_moments(self, pixels: Tensor) -> Tensor:  # (N, 3, H, W) in [-1, 1] -> (N, 2C, H/8, W/8)
        """Mean and logvar along the channels, logvar not clamped yet."""
        moments: Tensor = self.encoder(pixels)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def encode(self, pixels: Tensor) -> DiagonalGaussian:  # (N, 3, H, W) in [-1, 1] -> raw (N, C, H/8, W/8)
        """The posterior over raw latents."""
        return DiagonalGaussian.from_moments(self.encode_moments(pixels))

    def decode(self, latents: Tensor) -> Tensor:  # raw (N, C, h, w) -> (N, 3, 8h, 8w), about [-1, 1]
        """Pixels of raw latents; not clamped, as in diffusers."""
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        out: Tensor = self.decoder(latents)
        return out

    def forward(self, pixels: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, DiagonalGaussian]:
        """The training path: reconstruction of one posterior sample, and the posterior."""
        posterior = self.encode(pixels)
        return self.decode(posterior.sample(generator)), posterior


def _run(block: nn.Module, x: Tensor, is_checkpointed: bool) -> Tensor:
    if is_checkpointed and torch.is_grad_enabled():
        recomputed: Tensor = checkpoint(block, x, use_reentrant=False)
        return recomputed
    out: Tensor = block(x)
    return out
