"""Which latent space a VAE has: all evidence in one list, weighed once, for every command.

A space is **proved** by a known file or by the probe. It is **declared** by a flag, a file or what surrounds it, as
long as nothing stronger denies it. Else it is **unknown**: a scaling factor alone proves nothing.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sdvae.config import FAMILIES, VAEConfig
from sdvae.latents import unstandardise
from sdvae.tiny import TINY_FAMILIES, TinyConfig
from sdvae.weights.files import TensorFile, opened
from sdvae.weights.identity import KNOWN_BY_SHAPE, LATENT_SPACES, fingerprint, known_space
from sdvae.weights.probe import NEAR_CORRELATION, Seen, agreement, look

FAMILY_KEY = "sdvae.family"  # in the metadata of files that sdvae wrote
UNKNOWN = "unknown"
ENCODER = ("encoder.", "quant_conv.")

# Published sha256 of files -> what they are and their latent space. Gathered from public registries (nix, TypeScript,
# Markdown) and the hub's own metadata; hashes that only a fork's LFS pointer tells are left out.
KNOWN_FILES = {
    "735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75": (
        "stabilityai/sd-vae-ft-mse-original, vae-ft-mse-840000-ema-pruned.safetensors", "sd1",
    ),
    "c6a580b13a5bc05a5e16e4dbb80608ff2ec251a162311590c1f34c013d7f3dab": (
        "stabilityai/sd-vae-ft-mse-original, vae-ft-mse-840000-ema-pruned.ckpt", "sd1",
    ),
    "95f26a5ab04779d5467d1fcecaf93160ffa523afe399b835b3e1bb77ff2d937a": (
        "stabilityai/sd-vae-ft-ema-original, .safetensors", "sd1",
    ),
    "0b204ad0cae549e0a7e298d803d57e36363760dec71c63109c1da3e1147ec520": (
        "stabilityai/sd-vae-ft-ema-original, .ckpt", "sd1",
    ),
    "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815": ("stabilityai/sd-vae-ft-mse", "sd1"),
    "32db726da04f06c1b6b14c0043ce115cc87a501482945c5add89a40d838fcb46": ("stabilityai/sd-vae-ft-ema", "sd1"),
    "a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c": ("stable-diffusion-v1-5, vae", "sd1"),
    "4fbcf0ebe55a0984f5a5e00d8c4521d52359af7229bb4d81890039d2aa16dd7c": ("stable-diffusion-v1-5, vae in fp16", "sd1"),
    "63aeecb90ff7bc1c115395962d3e803571385b61938377bc7089b36e81e92e2e": (
        "stabilityai/sdxl-vae, sdxl_vae.safetensors", "sdxl",
    ),
}  # fmt: skip
_MOST_KNOWN_BYTES = 400_000_000  # larger files are checkpoints, of which no hash is listed: they are not hashed

# What lies beside the VAE in a checkpoint tells which diffusion model it was trained for; the first that is there.
_NEIGHBOURS = {
    "cond_stage_model.": "sd1",
    "conditioner.embedders.": "sdxl",
    "model.diffusion_model.joint_blocks.": "sd3",
    "model.diffusion_model.double_stream_modulation_img.": "flux2",
    "model.diffusion_model.double_blocks.": "flux1",
    "model.diffusion_model.label_emb.": "sdxl",  # SDXL without its text encoders
}
# The beginnings of "modelspec.architecture" (Stability-AI/ModelSpec) -> space.
_ARCHITECTURES = {
    "stable-diffusion-v1": "sd1", "stable-diffusion-v2": "sd1", "stable-diffusion-xl": "sdxl",
    "stable-diffusion-3": "sd3", "stable-diffusion-v3": "sd3", "flux-1": "flux1",
    "flux-2": "flux2",
}  # fmt: skip

# The strongest first.
Kind = Literal["hash", "probe", "flag", "sdvae", "config", "neighbours", "modelspec", "shapes"]
Certainty = Literal["proved", "declared", "unknown"]
_STRENGTH: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Evidence:
    """One observation: the spaces it speaks for, those it denies, and what was seen.

    `certainty` says what it makes of the only space it speaks for: proved, declared, or no more than possible.
    """

    kind: Kind
    spaces: tuple[str, ...]
    certainty: Certainty
    reason: str
    denies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Which latent space a VAE has, how that is known, and all that speaks for it or against it.

    `name` is a family's. A space that is unknown is named by its encoder, "vae-" and 16 hex digits: another decoder
    for the same encoder reads the same latents. `correlations` are the probe's, by space, to two digits.
    """

    name: str
    certainty: Certainty
    evidence: tuple[Evidence, ...] = ()
    correlations: Mapping[str, float] = field(default_factory=dict)
    encoder: str | None = None  # fingerprint of the encoder's weights
    latents: Tensor | None = field(default=None, compare=False, repr=False)  # of the probe image, (C, h, w)

    @property
    def space(self) -> str | None:
        """The name, where it is that of a family: the space is proved or declared."""
        return None if self.certainty == "unknown" else self.name

    @property
    def claimed(self) -> str | None:
        """The space that is proved, or else the one that is declared, even where the probe denies it."""
        return self.space or claimed_space(self.evidence)

    @property
    def contradictions(self) -> tuple[Evidence, ...]:
        """The evidence that the verdict is against: a wrong config, for example."""
        if self.space is None:
            told = (item for item in self.evidence if item.certainty == "declared" and item.kind != "shapes")
            return tuple(item for item in told if item.spaces)
        against = (item for item in self.evidence if self.space not in item.spaces)
        return tuple(item for item in against if item.spaces or self.space in item.denies)

    @property
    def saw(self) -> str:
        """What the probe saw, for the middle of a sentence."""
        told = ", ".join(f"{value:.2f} with {space}" for space, value in self.correlations.items())
        return f"the probe correlates {told}" if told else "the probe has no latents to compare with"

    def __str__(self) -> str:
        if self.space is None:
            claimed = claimed_space(self.evidence)
            return f"{f'declared {claimed}, but ' if claimed else 'unknown, '}{self.saw}"
        return f"{self.certainty} {self.space}, {self.saw}"

    def to_json(self) -> dict[str, Any]:
        """What a store records beside the name of the space."""
        return {"certainty": self.certainty, "correlations": dict(self.correlations), "encoder": self.encoder}

    @classmethod
    def from_json(cls, vae: Mapping[str, Any]) -> "Verdict":
        """Of the block `vae` of a store's manifest; stores begun before the probe was asked have declared spaces."""
        name = vae["latent_space"]
        told = vae.get("evidence") or {"certainty": "declared" if name in LATENT_SPACES else "unknown"}
        return cls(name, told["certainty"], (), told.get("correlations", {}), told.get("encoder"))


@dataclass(frozen=True)
class Relation:
    """Whether latents of one VAE decode with another; `name` is the space of both."""

    is_same: bool | None  # None: it cannot be told
    certainty: Certainty
    name: str | None
    reason: str


def judge(
    config: VAEConfig | None, tensors: Mapping[str, Tensor], told: Sequence[Evidence] = (), *, can_run: bool = True
) -> Verdict:
    """Weigh what is `told` of a VAE beside what its encoder does; a file without one is judged by its decoder.

    `tensors` have diffusers' names; halves will do. `config` tells their architecture, unless `can_run` is False or
    it is None. An encoder is run once in a process.
    """
    encoder = {key: value for key, value in tensors.items() if key.startswith(ENCODER)}
    evidence = list(told)
    digest = _encoder_fingerprint(config, encoder) if encoder else None
    if config is not None:
        is_scaled = any(item.kind in ("flag", "config") for item in told)  # and the scale may be of no space
        evidence.append(_shapes(config, is_scaled))
    latents, correlations = None, {}
    if config is not None and can_run and config.in_channels == config.out_channels == 3 and tensors:
        seen = look(config, encoder or tensors, digest or fingerprint(tensors))
        latents = seen.output
        if latents is not None and isinstance(config, TinyConfig):
            latents = unstandardise(latents[None], config)[0]
        correlations = {match.space: _two_digits(match.correlation) for match in seen.matches}
        if seen.matches:
            evidence.append(_probed(config, seen))
    evidence.sort(key=lambda item: _STRENGTH.index(item.kind))
    known, certainty = _weigh(evidence)
    name = known or (f"vae-{digest[:16]}" if digest else UNKNOWN)
    return Verdict(name, certainty, tuple(evidence), correlations, digest, latents)


def relate(a: Verdict, b: Verdict) -> Relation:
    """Whether two VAEs share a space: by their encoders, by what is proved of each, by their latents of one image."""
    name = a.space if a.space == b.space or b.space is None else b.space if a.space is None else None
    if (a.encoder and a.encoder == b.encoder) or (a.space is b.space is None and a.name == b.name != UNKNOWN):
        return Relation(True, "proved", name, "the encoders are equal")
    if a.certainty == b.certainty == "proved":
        reason = f"both are proved {a.space}" if a.space == b.space else f"one is proved {a.space}, one {b.space}"
        return Relation(a.space == b.space, "proved", name, reason)
    if a.latents is not None and b.latents is not None and a.latents.shape == b.latents.shape:
        found = agreement(a.latents, b.latents)
        reason = f"latents of one image correlate by {found.correlation:.2f}"
        if found.is_proof():
            return Relation(True, "proved", name, reason)
        if not found.is_near():
            return Relation(False, "proved", None, reason)
    else:
        reason = "the encoders cannot both be run"
    for proved, other in ((a, b), (b, a)):
        seen = other.correlations.get(proved.name)
        if proved.certainty == "proved" and seen is not None and seen < NEAR_CORRELATION:
            return Relation(False, "proved", None, f"one is proved {proved.space}, of the other {other.saw}")
    if a.space is not None and b.space is not None:
        return Relation(a.space == b.space, "declared", name, reason)
    return Relation(None, "unknown", None, reason)


# --- What is told ---


def known_bytes(path: Path) -> list[Evidence]:
    """The hash of a file, where it is a published one."""
    if not path.is_file() or path.stat().st_size > _MOST_KNOWN_BYTES:
        return []
    with opened(path) as stream:
        known = KNOWN_FILES.get(hashlib.file_digest(stream, "sha256").hexdigest())
    return [] if known is None else [Evidence("hash", (known[1],), "proved", f"the bytes of {known[0]}")]


def told_by_flag(family: str) -> Evidence:
    """That a user named the family."""
    return Evidence("flag", _spaces(FAMILIES[family]), "declared", f"the family {family} was named")


def told_by_config(config: VAEConfig, where: str) -> Evidence:
    """The space whose scale a config has; FLUX.2's is that of a BatchNorm."""
    spaces = _spaces(config)
    reason = f"{where} tells scaling_factor {config.scaling_factor:g}"
    if config.latents_patch == 1:
        return Evidence("config", spaces, "declared", reason)
    reason = f"its BatchNorm has {f'the statistics of {spaces[0]}' if spaces else 'statistics of its own'}"
    return Evidence("config", spaces, "declared", reason, () if spaces else ("flux2",))


def told_by_file(file: TensorFile) -> list[Evidence]:
    """What a file's metadata, and the tensors beside its VAE, say."""
    told = []
    if (family := file.metadata.get(FAMILY_KEY)) in FAMILIES:
        told.append(Evidence("sdvae", _spaces(FAMILIES[family]), "declared", f"its metadata tell the family {family}"))
    for neighbour, space in _NEIGHBOURS.items():
        if any(key.startswith(neighbour) for key in file.entries):
            told.append(Evidence("neighbours", (space,), "declared", f"{neighbour}* beside it, as {space} has"))
            break
    architecture = file.metadata.get("modelspec.architecture", "")
    for start, space in _ARCHITECTURES.items():
        if architecture.lower().startswith(start):
            told.append(Evidence("modelspec", (space,), "declared", f"modelspec.architecture is {architecture:.100}"))
            break
    return told


def claimed_space(evidence: Sequence[Evidence]) -> str | None:
    """The space that the strongest declaration names, of those that the shapes allow."""
    denied = {space for item in evidence if item.kind == "shapes" for space in item.denies}
    ordered = sorted(evidence, key=lambda item: _STRENGTH.index(item.kind))
    declared = (item.spaces[0] for item in ordered if item.certainty == "declared" and item.spaces)
    return next((space for space in declared if space not in denied), None)


def _spaces(config: VAEConfig) -> tuple[str, ...]:
    space = known_space(config)
    return (space,) if space else ()


def _shapes(config: VAEConfig, is_scaled: bool) -> Evidence:
    """The spaces whose latents have this shape; of an architecture that families have, only theirs."""
    akin, is_known = _akin(config)
    is_told = len(akin) == 1 and is_known and not is_scaled
    told = " and ".join(akin) or "no space that has a name"
    reason = f"{config.latent_channels} channels at 1/{config.downscale}, as {told}"
    others = tuple(name for name in LATENT_SPACES if name not in akin)
    return Evidence("shapes", tuple(akin), "declared" if is_told else "unknown", reason, others)


def _akin(config: VAEConfig) -> tuple[list[str], bool]:
    """The spaces whose latents have this shape, and whether the network is one that families have."""
    if config.in_channels != 3 or config.out_channels != 3:
        return [], False
    if isinstance(config, TinyConfig):
        ours = config.latent_channels, config.has_mid_pool
        tiny = {name: TinyConfig.from_family(name) for name in TINY_FAMILIES}
        return [name for name, known in tiny.items() if (known.latent_channels, known.has_mid_pool) == ours], True
    akin = [name for name in LATENT_SPACES if _latents(FAMILIES[name]) == _latents(config)]
    same = [known_space(family) for family in FAMILIES.values() if _architecture(family) == _architecture(config)]
    if same:
        return [name for name in akin if name in same], True
    return [name for name in akin if name not in KNOWN_BY_SHAPE], False


def _latents(config: VAEConfig) -> tuple[int, int, int]:
    return config.latent_channels, config.downscale, config.latents_patch


def _architecture(config: VAEConfig) -> tuple[Any, ...]:
    fields = (
        "in_channels", "latent_channels", "block_out_channels", "layers_per_block", "attention_levels",
        "mid_block_add_attention", "use_quant_conv",
    )  # fmt: skip
    return tuple(getattr(config, name) for name in fields)


def _weigh(evidence: Sequence[Evidence]) -> tuple[str | None, Certainty]:
    """What is proved, else the strongest declaration that nothing denies."""
    for item in evidence:
        if item.certainty == "proved":
            return item.spaces[0], "proved"
    denied = {space for item in evidence for space in item.denies}
    for item in evidence:
        if item.certainty == "declared" and item.spaces and item.spaces[0] not in denied:
            return item.spaces[0], "declared"
    return None, "unknown"


def _probed(config: VAEConfig, seen: Seen) -> Evidence:
    factors = {match.space: _factor(config, match.space) for match in seen.matches}
    proved, denied = seen.proved(factors), seen.denied(factors)
    told = ", ".join(f"{match.correlation:.2f} with {match.space}" for match in seen.matches)
    best, factor = seen.matches[0].agreement, factors[seen.matches[0].space]
    if seen.output is None:
        reason = f"the image it shows from each space's latents: correlation {told}"
    elif best.correlation < NEAR_CORRELATION:
        reason = f"correlation {told}"
    else:
        scale = f"scaling factor {best.slope:.4g}, expected {factor:g}"
        reason = f"correlation {told}; {scale}; worst channel {best.worst_channel:.2f}"
    possible = proved or [match.space for match in seen.matches if match.space not in denied]
    return Evidence("probe", tuple(possible), "proved" if proved else "unknown", reason, tuple(denied))


def _factor(config: VAEConfig, space: str) -> float:
    """The spread of a space's scaled latents per spread of what the encoder gives; a TAESD gives scaled ones."""
    factor = FAMILIES[space].scaling_factor
    if isinstance(config, TinyConfig):
        return factor / config.scaling_factor if _is_scaled(config) else 1.0
    return factor


def _is_scaled(config: VAEConfig) -> bool:
    """Whether it is settled what a TAESD's raw latents are."""
    return config.scaling_factor != 1.0


def _encoder_fingerprint(config: VAEConfig | None, encoder: Mapping[str, Tensor]) -> str:
    """That of the weights; the scale that is given to a TAESD makes other raw latents, so it counts."""
    if isinstance(config, TinyConfig) and _is_scaled(config):
        scale = (config.scaling_factor, config.shift_factor or 0.0)
        return fingerprint({**encoder, "scale": torch.tensor(scale, dtype=torch.float32, device="cpu")})
    return fingerprint(encoder)


def _two_digits(correlation: float) -> float:
    return round(correlation, 2) + 0.0  # no -0.0
