"""Two VAEs side by side: which tensors differ and by how much, whether they share a latent space and a config."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sdvae.tiny import TinyConfig
from sdvae.weights.evidence import ENCODER, Certainty, Relation, relate
from sdvae.weights.find import find_file
from sdvae.weights.keymap import fit_layout
from sdvae.weights.load import SCALE_FIELDS, VAEFile, open_vae

_ROUNDED = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F64": "fp64", "F8_E4M3": "fp8_e4m3", "F8_E5M2": "fp8_e5m2"}
_NOT_OF_THE_VAE = {"sample_size", "force_upcast", "unused"}  # advice to a pipeline; no number depends on it

Verdict = Literal["equal", "rounded", "different"]


@dataclass(frozen=True)
class Side:
    """One of the two, as it is stored."""

    file: str
    network: Literal["KL-VAE", "TAESD"]
    layout: str
    dtypes: dict[str, int]  # dtype -> tensors
    family: str | None  # where something tells it
    latent_space: str
    certainty: Certainty


@dataclass(frozen=True)
class Difference:
    """How far a tensor of B is from A's; numbers are None where one of them is not finite."""

    name: str  # diffusers'
    num_values: int
    num_differing: int
    max_abs: float | None
    relative_l2: float | None  # |A - B| / |A|


@dataclass(frozen=True)
class Comparison:
    """What is equal and what is not."""

    verdict: Verdict
    a: Side
    b: Side
    num_shared: int  # tensors of one name and shape in both
    only_in_a: tuple[str, ...]  # by name, or of another shape in the other
    only_in_b: tuple[str, ...]
    differences: tuple[Difference, ...]  # of shared tensors, the largest relative L2 first
    relative_l2: float | None  # of all shared tensors
    rounding: str | None  # the dtype that the one with fewer digits was rounded to, where nothing else differs
    config: dict[str, tuple[Any, Any]]  # fields that both tell, and differently
    untold: tuple[str, ...]  # fields that one of the files does not tell
    space: Relation


def compare(a: str, b: str) -> Comparison:
    """Compare two VAEs, each a folder, a file of a VAE, a checkpoint or a hub id, in any layout and dtype.

    Values are compared in fp32, tensor by tensor. Raises WeightsError for what holds no VAE.
    """
    first, second = (open_vae(find_file(spec), is_copied=True) for spec in (a, b))
    shared = sorted(name for name, shape in first.shapes.items() if second.shapes.get(name) == shape)
    differences, roundings, square_sums = [], set(_ROUNDED), [0.0, 0.0]
    for name in shared:
        ours, theirs = _read(first, name), _read(second, name)
        found, of_gap, of_a = _difference(name, ours, theirs)
        square_sums = [square_sums[0] + of_gap, square_sums[1] + of_a]
        if found is not None:
            differences.append(found)
            roundings &= _roundings(ours, theirs)
    differences.sort(key=lambda each: -math.inf if each.relative_l2 is None else -each.relative_l2)
    only_in_a, only_in_b = (tuple(sorted(vae.shapes.keys() - set(shared))) for vae in (first, second))
    is_one_network = not only_in_a and not only_in_b
    config = _config_differences(first, second)
    rounding = next((name for name in _ROUNDED if name in roundings), None)
    rounding = rounding if differences and is_one_network else None
    same_encoder = is_one_network and (rounding or not any(each.name.startswith(ENCODER) for each in differences))
    is_equal = is_one_network and not config and (not differences or rounding is not None)
    return Comparison(
        verdict="different" if not is_equal else "rounded" if rounding else "equal",
        a=_side(a, first),
        b=_side(b, second),
        num_shared=len(shared),
        only_in_a=only_in_a,
        only_in_b=only_in_b,
        differences=tuple(differences),
        relative_l2=_ratio(*square_sums),
        rounding=rounding,
        config=config,
        untold=tuple(sorted({*first.unsure, *second.unsure})),
        space=_relation(first, second, bool(same_encoder)),
    )


def _read(vae: VAEFile, name: str) -> Tensor:
    key = next(key for key, its_name in vae.keys.names.items() if its_name == name)
    return fit_layout(name, vae.file.entries[key].read(), "diffusers").float()


def _difference(name: str, a: Tensor, b: Tensor) -> tuple[Difference | None, float, float]:
    """What differs, and the sums of squares of the gap and of A."""
    of_a = float(a.double().square().sum())
    differs = (a != b) & ~(a.isnan() & b.isnan())
    num_differing = int(differs.sum())
    if not num_differing:
        return None, 0.0, of_a
    gap = (a.double() - b.double())[differs]
    of_gap, max_abs = float(gap.square().sum()), float(gap.abs().max())
    largest = max_abs if math.isfinite(max_abs) else None
    return Difference(name, a.numel(), num_differing, largest, _ratio(of_gap, of_a)), of_gap, of_a


def _ratio(of_gap: float, of_a: float) -> float | None:
    """Relative L2 from sums of squares."""
    ratio = math.sqrt(of_gap / of_a) if of_a > 0 else 0.0 if of_gap == 0 else math.inf
    return ratio if math.isfinite(ratio) else None


def _roundings(a: Tensor, b: Tensor) -> set[str]:
    """The dtypes that turn the values of one into those of the other."""
    return {
        name
        for name, dtype in _ROUNDED.items()
        if torch.equal(a.to(dtype).float(), b) or torch.equal(b.to(dtype).float(), a)
    }


def _config_differences(a: VAEFile, b: VAEFile) -> dict[str, tuple[Any, Any]]:
    if isinstance(a.config, TinyConfig) != isinstance(b.config, TinyConfig):
        fields: Iterable[str] = ("latent_channels", *SCALE_FIELDS)  # what two kinds of network have in common
    else:
        fields = asdict(a.config).keys()
    known = [name for name in fields if name not in {*a.unsure, *b.unsure, *_NOT_OF_THE_VAE}]
    ours, theirs = asdict(a.config), asdict(b.config)
    return {name: (ours[name], theirs[name]) for name in known if ours[name] != theirs[name]}


def _side(spec: str, vae: VAEFile) -> Side:
    dtypes = Counter(vae.file.entries[key].dtype for key in vae.keys.names)
    network: Literal["KL-VAE", "TAESD"] = "TAESD" if isinstance(vae.config, TinyConfig) else "KL-VAE"
    named = {_NAMES.get(name, name): number for name, number in dtypes.most_common()}
    return Side(spec, network, vae.keys.layout, named, vae.family, vae.verdict.name, vae.verdict.certainty)


def _relation(a: VAEFile, b: VAEFile, same_encoder: bool) -> Relation:
    """By the encoders where they are equal or rounded, by the shapes of latents, else by all evidence."""
    if same_encoder:
        return Relation(True, "proved", a.verdict.space or b.verdict.space, "the encoders are equal")
    if a.config.latent_channels != b.config.latent_channels or a.config.downscale != b.config.downscale:
        shapes = " and ".join(f"{vae.config.latent_channels} channels at 1/{vae.config.downscale}" for vae in (a, b))
        return Relation(False, "proved", None, f"the latents have {shapes}")
    return relate(a.verdict, b.verdict)
