"""The encoder and the decoder as straight lines of stages: what runs on which pixels, in integers.

    stage = [GroupNorm + SiLU from pooled statistics] -> one convolution -> [+ residual]
            while the statistics for the next GroupNorm are summed up

Level l of a network has 2^-l of the pixels' height and width. At each level two tensors live: the residual stream
"x" and, within a resnet, "h".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Literal

from sdvae.config import Padding, VAEConfig

Direction = Literal["encode", "decode"]
Kind = Literal["conv", "down", "up", "attention"]
Place = Literal["input", "x", "h", "output"]
Axis = Literal["y", "x"]
Border = tuple[int, int]  # the rows (or columns) that stand before the first and behind the last

KERNEL_PX = {"conv": 3, "down": 3, "up": 2, "attention": 1}  # "up" is folded: 2x2 convolutions before the upsampling


@dataclass(frozen=True, slots=True)
class Stage:
    """One convolution (or one attention) with all that is done to its input and output on the way."""

    name: str  # of the layer in AutoencoderKL's state dict
    kind: Kind
    level: int  # that it writes to
    in_channels: int
    out_channels: int
    source: Place = "x"
    target: Place = "x"
    norm: str | None = None  # the GroupNorm (with SiLU, but for attention) of its source
    adds: bool = False  # to what the target holds, which is the residual connection
    shortcut: str | None = None  # the 1x1 convolution that x goes through meanwhile
    has_statistics: bool = False  # whether a GroupNorm reads what it writes
    padding: Padding = "zeros"  # of its source

    @property
    def source_level(self) -> int:
        """The level it reads from."""
        return self.level + {"up": 1, "down": -1}.get(self.kind, 0)

    def border(self, axis: Axis, size: int) -> Border | None:
        """What stands beyond the borders of a source of `size` rows ("y") or columns ("x"); None: zeros."""
        if self.padding in ("circular", f"circular-{axis}"):
            return size - 1, 0
        if self.padding == "reflect":
            # Of doubled rows the second, which stands above the first, is its twin: both are the first small row.
            return (0, size - 1) if self.kind == "up" else (1, size - 2)
        return None

    @property
    def zeros_px(self) -> tuple[int, int]:
        """Rows of zeros above and below a whole source, and columns of zeros beside it."""
        return int(self.border("y", 0) is None), int(self.border("x", 0) is None)

    @property
    def num_parameters(self) -> int:
        """Of its convolutions in the model; biases, which are few, are not counted."""
        if self.kind == "attention":
            return 4 * self.out_channels**2
        return self.in_channels * self.out_channels * (10 if self.shortcut else 9)

    @property
    def num_packed(self) -> int:
        """What the rewrites make of them: two projections of an attention, four 2x2 kernels of an upsampling."""
        folded = {"attention": self.num_parameters // 2, "up": 16 * self.in_channels * self.out_channels}
        return folded.get(self.kind, self.num_parameters)

    def flops(self, height: int, width: int) -> int:  # size of the target
        """Multiplications and additions, of convolutions and matrix products only."""
        num_px = height * width
        if self.kind == "attention":  # two folded projections, scores, weighted sum
            return num_px * (4 * self.out_channels**2 + 4 * num_px * self.out_channels)
        per_px = 2 * KERNEL_PX[self.kind] ** 2 * self.in_channels * self.out_channels
        return num_px * (per_px + (2 * self.in_channels * self.out_channels if self.shortcut else 0))


@dataclass(frozen=True, slots=True)
class Network:
    """One direction of a VAE: its stages in order. `num_levels` counts the pixels' level and the latents'."""

    direction: Direction
    stages: tuple[Stage, ...]
    num_levels: int
    in_channels: int
    out_channels: int

    def sizes(self, height: int, width: int) -> tuple[tuple[int, int], ...]:  # of the input
        """Height and width of each level, pixels first."""
        halvings = range(self.num_levels)
        if self.direction == "encode":  # rounding down at each: halving an odd side loses a row
            return tuple((height >> level, width >> level) for level in halvings)
        return tuple((height << level, width << level) for level in reversed(halvings))

    @property
    def padding(self) -> Padding:
        """What lies beyond the borders, for all stages but downsamplers."""
        return self.stages[0].padding

    @property
    def num_parameters(self) -> int:
        """Weights in the model."""
        return sum(stage.num_parameters for stage in self.stages)

    @property
    def num_packed(self) -> int:
        """Weights that a program holds."""
        return sum(stage.num_packed for stage in self.stages)

    def flops(self, height: int, width: int) -> int:  # of the input
        """Operations of one image."""
        sizes = self.sizes(height, width)
        return sum(stage.flops(*sizes[stage.level]) for stage in self.stages)


@cache
def build_network(config: VAEConfig, direction: Direction) -> Network:
    """The stages of a config, in the order of `model.Encoder` and `model.Decoder`."""
    num_levels = len(config.block_out_channels)
    if direction == "encode":
        stages, channels = _encoder(config), (config.in_channels, 2 * config.latent_channels)
    else:
        stages, channels = _decoder(config), (config.latent_channels, config.out_channels)
    padded = [_padded(stage, config.padding) for stage in stages]
    return Network(direction, tuple(_with_statistics(padded)), num_levels, *channels)


def _encoder(config: VAEConfig) -> Iterator[Stage]:
    widths, deepest = config.block_out_channels, len(config.block_out_channels) - 1
    yield Stage("encoder.conv_in", "conv", 0, config.in_channels, widths[0], source="input")
    before = widths[0]
    for level, width in enumerate(widths):
        name = f"encoder.down_blocks.{level}"
        yield from _resnets(name, level, [before] + [width] * config.layers_per_block, level in config.attention_levels)
        if level < deepest:
            yield Stage(f"{name}.downsamplers.0.conv", "down", level + 1, width, width)
        before = width
    yield from _mid_block("encoder.mid_block", deepest, before, config.mid_block_add_attention)
    out_channels = 2 * config.latent_channels
    yield _conv_out("encoder", deepest, before, out_channels)


def _decoder(config: VAEConfig) -> Iterator[Stage]:
    widths, deepest = config.decoder_widths, len(config.decoder_widths) - 1
    before = widths[-1]
    yield Stage("decoder.conv_in", "conv", deepest, config.latent_channels, before, source="input")
    yield from _mid_block("decoder.mid_block", deepest, before, config.mid_block_add_attention)
    for block, (level, width) in enumerate(reversed(list(enumerate(widths)))):
        name = f"decoder.up_blocks.{block}"
        block_widths = [before] + [width] * (config.decoder_layers + 1)
        # The model reads attention_levels by the width's level, the keys count blocks from the latents.
        yield from _resnets(name, level, block_widths, level in config.attention_levels)
        if level > 0:
            yield Stage(f"{name}.upsamplers.0.conv", "up", level - 1, width, width)
        before = width
    yield _conv_out("decoder", 0, before, config.out_channels)


def _resnets(block: str, level: int, widths: Sequence[int], has_attention: bool) -> Iterator[Stage]:
    for index, (before, after) in enumerate(pairwise(widths)):
        yield from _resnet(f"{block}.resnets.{index}", level, before, after)
        if has_attention:
            yield _attention(f"{block}.attentions.{index}", level, after)


def _resnet(name: str, level: int, before: int, after: int) -> Iterator[Stage]:
    shortcut = f"{name}.conv_shortcut" if before != after else None
    yield Stage(f"{name}.conv1", "conv", level, before, after, target="h", norm=f"{name}.norm1", shortcut=shortcut)
    yield Stage(f"{name}.conv2", "conv", level, after, after, source="h", norm=f"{name}.norm2", adds=True)


def _mid_block(name: str, level: int, width: int, has_attention: bool) -> Iterator[Stage]:
    yield from _resnet(f"{name}.resnets.0", level, width, width)
    if has_attention:
        yield _attention(f"{name}.attentions.0", level, width)
    yield from _resnet(f"{name}.resnets.1", level, width, width)


def _attention(name: str, level: int, width: int) -> Stage:
    return Stage(name, "attention", level, width, width, norm=f"{name}.group_norm", adds=True)


def _conv_out(half: str, level: int, width: int, out_channels: int) -> Stage:
    return Stage(f"{half}.conv_out", "conv", level, width, out_channels, target="output", norm=f"{half}.conv_norm_out")


def _padded(stage: Stage, padding: Padding) -> Stage:
    """The stage of a VAE with this padding; a downsampler has its zeros (0, 1, 0, 1) in each, as in diffusers."""
    return replace(stage, padding=padding) if stage.kind in ("conv", "up") else stage


def _with_statistics(stages: list[Stage]) -> Iterator[Stage]:
    for index, stage in enumerate(stages):
        reader = next((later for later in stages[index + 1 :] if later.source == stage.target), None)
        yield replace(stage, has_statistics=reader is not None and reader.norm is not None)
