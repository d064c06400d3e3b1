"""What the shapes of a VAE's tensors tell of its config, and whether tensors fit one."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sdvae.config import FAMILIES, VAEConfig
from sdvae.errors import WeightsError
from sdvae.model import AutoencoderKL
from sdvae.weights.keymap import some

SHAPE_FIELDS = (
    "in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block", "attention_levels",
    "mid_block_add_attention", "use_quant_conv", "use_post_quant_conv", "decoder_block_out_channels",
    "decoder_layers_per_block", "latents_patch",
)  # fmt: skip
COUNTER = "bn.num_batches_tracked"  # of FLUX.2's training: files may lack it


def shape_fields(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of a config that shapes tell."""

    def count(pattern: str) -> int:
        return next(index for index in range(len(shapes) + 1) if pattern.format(index) not in shapes)

    def widths_of(pattern: str) -> tuple[int, ...]:
        return tuple(shapes[pattern.format(level)][0] for level in range(count(pattern)))

    layers = count("encoder.down_blocks.0.resnets.{}.conv1.weight")
    decoder_layers = count("decoder.up_blocks.0.resnets.{}.conv1.weight") - 1
    try:
        widths = widths_of("encoder.down_blocks.{}.resnets.0.conv1.weight")
        decoder_widths = widths_of("decoder.up_blocks.{}.resnets.0.conv1.weight")[::-1]
        latent_channels = shapes["decoder.conv_in.weight"][1]
        num_statistics = shapes.get("bn.running_mean", (latent_channels,))[0]
        return {
            "in_channels": shapes["encoder.conv_in.weight"][1],
            "out_channels": shapes["decoder.conv_out.weight"][0],
            "latent_channels": latent_channels,
            "block_out_channels": widths,
            "layers_per_block": layers,
            "attention_levels": tuple(
                level
                for level in range(len(widths))
                if f"encoder.down_blocks.{level}.attentions.0.to_q.weight" in shapes
            ),
            "mid_block_add_attention": "decoder.mid_block.attentions.0.to_q.weight" in shapes,
            "use_quant_conv": "quant_conv.weight" in shapes,
            "use_post_quant_conv": "post_quant_conv.weight" in shapes,
            "decoder_block_out_channels": decoder_widths if decoder_widths != widths else None,
            "decoder_layers_per_block": decoder_layers if decoder_layers != layers else None,
            "latents_patch": math.isqrt(num_statistics // latent_channels) or 1,
        }
    except (KeyError, IndexError) as error:
        raise WeightsError(
            f"{path} holds half a VAE: {error} is missing or has no shape; find the whole file"
        ) from None


def fields_of(config: VAEConfig) -> dict[str, Any]:
    """The fields of a config that shapes tell, as `shape_fields` finds them."""
    return {field: getattr(config, field) for field in SHAPE_FIELDS}


def family_of(config: VAEConfig) -> str | None:
    """The family that has these shapes and this scale."""
    same = (
        name
        for name, family in FAMILIES.items()
        if fields_of(family) == fields_of(config) and family.latent_scaling.is_close(config.latent_scaling)
    )
    return next(same, None)


def check_shapes(path: Path, config: VAEConfig, source: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise WeightsError where tensors of these shapes are not all of those of `config`, which `source` tells."""
    found = shape_fields(path, shapes)
    differences = [
        f"{name} {found[name]} instead of {value}" for name, value in fields_of(config).items() if found[name] != value
    ]
    if differences:
        raise WeightsError(f"the weights of {path} do not fit their {source}: {', '.join(differences)}")
    with torch.device("meta"):
        expected = {key: tuple(tensor.shape) for key, tensor in AutoencoderKL(config).state_dict().items()}
    wrong_shapes = [
        f"{key} {shapes[key]} instead of {expected[key]}"
        for key in sorted(expected.keys() & shapes.keys())
        if shapes[key] != expected[key]
    ]
    problems = {
        "missing": sorted(expected.keys() - shapes.keys() - {COUNTER}),
        "unexpected": sorted(shapes.keys() - expected.keys()),
        "of another shape": wrong_shapes,
    }
    told = [f"{len(keys)} {problem}: {some(keys)}" for problem, keys in problems.items() if keys]
    if told:
        raise WeightsError(f"the weights of {path} do not fit their {source}; keys {'; '.join(told)}")
