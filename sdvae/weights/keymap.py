"""One table of tensor names, LDM <-> diffusers, and which keys of a file are its VAE's."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from torch import Tensor

from sdvae.amounts import count
from sdvae.errors import WeightsError
from sdvae.weights.networks import find_network

Layout = Literal["ldm", "diffusers", "taesd"]  # the last is of a TAESD's own two files

# Where a checkpoint keeps its VAE: Stable Diffusion's own files, those that ComfyUI saves, a file of its own.
PREFIXES = ("first_stage_model.", "vae.", "")
_ANCHOR = "encoder.conv_in.weight"  # by which a VAE is found under any other prefix
# What torch.compile, DataParallel and their like put into the names of the modules they wrap
_WRAPPERS = {"_orig_mod", "module", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Beside the VAE when CompVis' trainer saved it: LPIPS and discriminator, and averages under flattened names.
_TRAINING_STATE = ("loss.", "model_ema.")
# Of AsymmetricAutoencoderKL; without a mask nothing reads it.
_MASK_ENCODER = "decoder.condition_encoder."
# FLUX.2's statistics, under one name everywhere; black-forest-labs keeps its quant convolutions inside the two halves.
STATISTICS = ("bn.running_mean", "bn.running_var")
_INNER = {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}
_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# Other names of these parts, in either layout: diffusers' before 0.17, and what half a conversion leaves behind
_SPELLINGS = {
    "group_norm": ("norm",), "to_q": ("q", "query"), "to_k": ("k", "key"), "to_v": ("v", "value"),
    "to_out.0": ("proj_out", "proj_attn", "to_out"), "conv_shortcut": ("nin_shortcut",),
}  # fmt: skip
_MATRICES = re.compile(r"\.attentions\.\d+\.(to_q|to_k|to_v|to_out\.0)\.weight")
_LEVEL = re.compile(r"(?:encoder\.down|decoder\.up)(?:_blocks)?\.(\d)\.")
_MOST_LEVELS = _MOST_BLOCKS = 8  # twice what any published KL-VAE has; bounds the table for hostile names
_MOST_KEYS_LISTED = 6


@dataclass(frozen=True)
class VAEKeys:
    """The VAE's keys among those of a file: each as the file spells it -> as diffusers' AutoencoderKL does."""

    prefix: str
    layout: Layout
    names: dict[str, str]


def find_vae(keys: Collection[str]) -> VAEKeys:
    """The VAE in a file with these keys; WeightsError where there is none, or where keys of it are left over."""
    plain = {key: unwrapped(key) for key in keys}
    prefix = _find_prefix(set(plain.values()))
    if prefix is None:
        told = f"{count(len(keys), 'tensor')} ({some(sorted(keys), 3)})"
        raise WeightsError(f"no KL-VAE among its {told}; {_what_else(keys)}")
    inside = {key: name.removeprefix(prefix) for key, name in plain.items() if name.startswith(prefix)}
    inside = {key: name for key, name in inside.items() if not name.startswith((*_TRAINING_STATE, _MASK_ENCODER))}
    is_ldm = any(re.match(r"(encoder|decoder)\.mid\.", name) for name in inside.values())
    layout: Layout = "ldm" if is_ldm else "diffusers"
    known = _known_modules(layout, num_levels=_count_levels(inside.values()))
    names, leftovers = {}, []
    for key in sorted(inside):
        module, _, kind = inside[key].rpartition(".")
        if module in known and kind in ("weight", "bias"):
            names[key] = f"{known[module]}.{kind}"
        elif inside[key] in (*STATISTICS, "bn.num_batches_tracked"):
            names[key] = inside[key]
        else:
            leftovers.append(key)
    if leftovers:
        raise WeightsError(
            f"{count(len(leftovers), 'key')} that a KL-VAE does not have: {some(leftovers)}; {_what_else(keys)}"
        )
    if len(set(names.values())) < len(names):
        raise WeightsError("layers under old and new names at once; are these two files merged into one?")
    return VAEKeys(prefix, layout, names)


def unwrapped(key: str) -> str:
    """The key without the names of wrappers: `_orig_mod.encoder.conv_in.weight` is the encoder's."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def ldm_names(keys: Iterable[str]) -> dict[str, str]:
    """LDM's name for each of diffusers' keys. Takes all keys of a VAE: LDM numbers the decoder's levels in reverse."""
    keys = list(keys)
    table = _table(_count_levels(keys)) | {"bn": "bn"}
    if STATISTICS[0] in keys:
        table |= _INNER
    return {key: f"{table[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}" for key in keys}


def fit_shape(name: str, shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """The shape that a layout gives the tensor of diffusers' `name`: LDM keeps attention as 1x1 convolutions."""
    if _MATRICES.search(name):
        if layout == "ldm" and len(shape) == 2:
            return (*shape, 1, 1)
        if layout == "diffusers" and shape[2:] == (1, 1):
            return shape[:2]
    return shape


def fit_layout(name: str, tensor: Tensor, layout: Layout) -> Tensor:
    """The tensor of diffusers' `name` in the shape its layout has."""
    return tensor.reshape(fit_shape(name, tuple(tensor.shape), layout))


def some(keys: list[str], most: int = _MOST_KEYS_LISTED) -> str:
    """The first of the keys, for an error message."""
    rest = len(keys) - most
    return ", ".join(keys[:most]) + (f" and {rest} more" if rest > 0 else "")


def _what_else(keys: Collection[str]) -> str:
    network = find_network(keys)
    if network is None:
        return "is it another model?"
    return f"it is {network}, give a VAE or a checkpoint with one in it"


def _find_prefix(keys: Collection[str]) -> str | None:
    """Where the VAE is: one of PREFIXES, else the only place with an encoder; WeightsError where there are several."""
    for prefix in PREFIXES:
        if any(f"{prefix}{side}.conv_in.weight" in keys for side in ("encoder", "decoder")):
            return prefix
    found = sorted(key.removesuffix(_ANCHOR) for key in keys if key.endswith(f".{_ANCHOR}"))
    if len(found) > 1:
        raise WeightsError(f"several VAEs, under {some(found)}; save the one that is meant alone")
    return found[0] if found else None


def _count_levels(keys: Iterable[str]) -> int:
    levels = [int(match[1]) for match in map(_LEVEL.match, keys) if match]
    return min(max(levels, default=0) + 1, _MOST_LEVELS)


def _known_modules(layout: Layout, num_levels: int) -> dict[str, str]:
    """Modules as a file may call them -> as diffusers does."""
    known = {}
    for name, ldm in _table(num_levels).items():
        known[ldm if layout == "ldm" else name] = name
    known |= {inner: name for name, inner in _INNER.items()}
    for name, ldm in _table(num_levels).items():
        part = next((part for part in _SPELLINGS if name.endswith(f".{part}")), None)
        if part is not None:
            own = {**_ATTENTION, **_RESNET}[part] if layout == "ldm" else part
            block = (ldm if layout == "ldm" else name).removesuffix(own)
            for spelling in (part, *_SPELLINGS[part]):
                known.setdefault(block + spelling, name)
    return known


@cache
def _table(num_levels: int) -> dict[str, str]:
    """Every module that a KL-VAE with so many levels can have: diffusers' name -> LDM's."""
    modules = {name: name for name in ("quant_conv", "post_quant_conv")}
    for side, level, sampler in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        modules |= {f"{side}.{name}": f"{side}.{name}" for name in ("conv_in", "conv_out")}
        modules[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        resnets = {f"{side}.mid_block.resnets.{i}": f"{side}.mid.block_{i + 1}" for i in range(2)}
        attentions = {f"{side}.mid_block.attentions.0": f"{side}.mid.attn_1"}
        for index in range(num_levels):
            # LDM numbers the decoder's levels by resolution, diffusers in the order they run
            ldm_index = index if side == "encoder" else num_levels - 1 - index
            name, ldm = f"{side}.{level}_blocks.{index}", f"{side}.{level}.{ldm_index}"
            modules[f"{name}.{sampler}rs.0.conv"] = f"{ldm}.{sampler}.conv"
            resnets |= {f"{name}.resnets.{i}": f"{ldm}.block.{i}" for i in range(_MOST_BLOCKS)}
            attentions |= {f"{name}.attentions.{i}": f"{ldm}.attn.{i}" for i in range(_MOST_BLOCKS)}
        for blocks, parts in ((resnets, _RESNET), (attentions, _ATTENTION)):
            for name, ldm in blocks.items():
                modules |= {f"{name}.{part}": f"{ldm}.{ldm_part}" for part, ldm_part in parts.items()}
    return modules
