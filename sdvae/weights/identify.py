"""Which latent space the VAE in a file has, from its hash, metadata, config, shapes and the probe."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvae.config import FAMILIES, VAEConfig, read_config
from sdvae.engine.precision import inference
from sdvae.errors import WeightsError
from sdvae.model import AutoencoderKL, Encoder
from sdvae.pixels import to_pixels
from sdvae.tiny import TINY_FAMILIES, AutoencoderTiny, TinyConfig
from sdvae.weights import taesd
from sdvae.weights.files import TensorFile, open_weights, opened
from sdvae.weights.identity import ARCHITECTURES, LATENT_SPACES, fingerprint, known_space, sign_sketch
from sdvae.weights.keymap import STATISTICS, find_vae, fit_layout
from sdvae.weights.probe import match_references, probe_image, references

UNKNOWN = "unknown"

# Correlations with the references, measured: the same encoder in fp16 or bf16 1.00, with 10% noise on its weights
# 0.95 and more, the embedded VAE 0.80; another space at most 0.23, averages of pixels 0.27, random weights 0.14.
CERTAIN_CORRELATION = 0.9
LIKELY_CORRELATION = 0.6
_SLOPE_TOLERANCE = 0.15  # the slope shrinks with the correlation: the embedded VAE's is 8% low

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

Certainty = Literal["certain", "likely", "unknown"]


@dataclass(frozen=True)
class Evidence:
    """One observation, the latent spaces that are possible after it (none: no known space), and the reason.

    `certainty` belongs to the space where one is left.
    """

    kind: Literal["hash", "metadata", "config", "shapes", "probe"]
    spaces: tuple[str, ...]
    certainty: Certainty
    reason: str


@dataclass(frozen=True)
class Identity:
    """What is known of a weights file. `latent_space` is a family's name, or "unknown"."""

    latent_space: str
    certainty: Certainty
    network: str
    fingerprint: str | None  # None for a network that sdvae does not know
    sign_sketch: str | None
    evidence: tuple[Evidence, ...]

    @property
    def contradictions(self) -> tuple[Evidence, ...]:
        """The evidence for other spaces only: a wrong config, for example."""
        if self.latent_space == UNKNOWN:
            return ()
        return tuple(item for item in self.evidence if self.latent_space not in item.spaces)


def identify(path: Path) -> Identity:
    """Which latent space the VAE in a weights file has, how certain that is, and why.

    Takes a KL-VAE in either layout, alone or in a checkpoint, and a TAESD or its encoder. The file's name is
    ignored. Raises WeightsError for a file that holds no such thing.
    """
    file = open_weights(path)
    found = _read_tiny(file) if taesd.is_taesd(file.entries) else _read_kl(file)
    evidence = [*_hash_evidence(path), *_metadata_evidence(file), *found.evidence]
    if found.encode is not None:
        evidence.append(_probe_evidence(found.encode, found.factors))
    space, certainty = _weigh(evidence)
    digest, sketch = (fingerprint(found.tensors), sign_sketch(found.tensors)) if found.tensors else (None, None)
    return Identity(space, certainty, found.network, digest, sketch, tuple(evidence))


def _weigh(evidence: list[Evidence]) -> tuple[str, Certainty]:
    """A known hash decides, else the probe. Where neither can, all else must agree, and is no more than likely."""
    for kind in ("hash", "probe"):
        for item in evidence:
            if item.kind == kind:
                return (item.spaces[0] if item.spaces else UNKNOWN), item.certainty
    possible = [space for space in LATENT_SPACES if all(space in item.spaces for item in evidence)]
    return (possible[0], "likely") if len(possible) == 1 and evidence else (UNKNOWN, "unknown")


# --- Evidence from the file, its metadata and its config ---


def _hash_evidence(path: Path) -> list[Evidence]:
    if path.stat().st_size > _MOST_KNOWN_BYTES:
        return []
    with opened(path) as stream:
        known = KNOWN_FILES.get(hashlib.file_digest(stream, "sha256").hexdigest())
    return [] if known is None else [Evidence("hash", (known[1],), "certain", f"the bytes of {known[0]}")]


def _metadata_evidence(file: TensorFile) -> list[Evidence]:
    architecture = file.metadata.get("modelspec.architecture", "")
    spaces = tuple(space for start, space in ARCHITECTURES.items() if architecture.lower().startswith(start))
    return [Evidence("metadata", spaces, "likely", f"modelspec.architecture is {architecture}")] if spaces else []


# --- Evidence from the network ---


@dataclass(frozen=True)
class _Found:
    """A VAE read from a file: what it is, and its encoder (pixels -> latents) where the probe has references for it.

    `factors` are the slopes that its latents should have, by space.
    """

    network: str
    tensors: dict[str, Tensor]
    evidence: list[Evidence]
    encode: Callable[[Tensor], Tensor] | None = None
    factors: Mapping[str, float] = field(default_factory=dict)


def _read_tiny(file: TensorFile) -> _Found:
    """A TAESD under diffusers' names, or one of its author's two files."""
    entries = taesd.by_name(file.entries)
    config = taesd.fit_config(entries)
    if config is None:
        return _Found("a sequence of layers that is no TAESD", {}, [_shapes_evidence(())])
    tensors = {name: entry.read() for name, entry in entries.items()}
    halves = sorted(taesd.sides(entries), reverse=True)
    network = f"TAESD {' and '.join(halves)}, {config.latent_channels} latent channels"
    told = config.latent_channels, config.has_mid_pool
    akin = ((name, TinyConfig.from_family(name)) for name in TINY_FAMILIES)
    spaces = tuple(name for name, known in akin if (known.latent_channels, known.has_mid_pool) == told)
    found = _Found(network, tensors, [_shapes_evidence(spaces)])
    if "encoder" not in halves or not set(spaces) & references().keys():
        return found
    with torch.device("meta"):
        encoder = AutoencoderTiny(config).encoder.eval()
    encoder.load_state_dict(_below("encoder.", tensors), assign=True)
    return replace(found, encode=encoder, factors=dict.fromkeys(spaces, 1.0))  # it writes scaled latents


def _read_kl(file: TensorFile) -> _Found:
    try:
        keys = find_vae(file.entries)
    except WeightsError as error:
        raise WeightsError(f"{file.path} holds {error}") from None
    entries = file.entries
    tensors = {name: fit_layout(name, entries[key].read(), "diffusers") for key, name in keys.names.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    fitting = [name for name, family in FAMILIES.items() if _encoder_shapes(family) == _of_encoder(shapes)]
    spaces = {known_space(FAMILIES[name]) for name in fitting}
    evidence = [_shapes_evidence(tuple(space for space in LATENT_SPACES if space in spaces))]
    config = FAMILIES[fitting[0]] if fitting else None
    if config is not None and tensors.keys() >= set(STATISTICS):
        config = config.with_batch_norm(*(tensors[name].double().tolist() for name in STATISTICS))
        space = known_space(config)
        reason = f"its BatchNorm has {'the statistics of ' + space if space else 'statistics of its own'}"
        evidence.append(Evidence("config", (space,) if space else (), "likely", reason))
    beside = file.path.parent / "config.json"
    if keys.layout == "diffusers" and not keys.prefix and beside.is_file():
        told = read_config(beside)
        if told.latents_patch == 1 and _encoder_shapes(told) == _of_encoder(shapes):
            config, space = told, known_space(told)
            reason = f"{beside.name} beside it tells scaling_factor {told.scaling_factor}"
            evidence.append(Evidence("config", (space,) if space else (), "likely", reason))
    network = f"KL-VAE with the shapes of {', '.join(fitting) or 'no family'}"
    found = _Found(network, tensors, evidence)
    if config is None or (config.in_channels, config.downscale) != (3, 8) or config.latent_channels not in (4, 16):
        return found  # the probe has no reference of that shape
    factors = {name: FAMILIES[name].scaling_factor for name in references()}
    return replace(found, encode=_kl_encoder(config, tensors), factors=factors)


def _kl_encoder(config: VAEConfig, tensors: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    with torch.device("meta"):
        encoder = Encoder(config).eval()
    encoder.load_state_dict(_below("encoder.", tensors), assign=True)

    def encode(pixels: Tensor) -> Tensor:
        moments: Tensor = encoder(pixels)
        if config.use_quant_conv:
            moments = F.conv2d(moments, tensors["quant_conv.weight"].float(), tensors["quant_conv.bias"].float())
        return moments.chunk(2, dim=1)[0]

    return encode


def _shapes_evidence(spaces: tuple[str, ...]) -> Evidence:
    return Evidence("shapes", spaces, "likely", f"fit {', '.join(spaces) or 'no family of a known latent space'}")


def _encoder_shapes(config: VAEConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return _of_encoder(_shapes(AutoencoderKL(config)))


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def _of_encoder(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in shapes.items() if key.startswith(("encoder.", "quant_conv."))}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value.float() for key, value in tensors.items() if key.startswith(prefix)}


def _probe_evidence(encode: Callable[[Tensor], Tensor], factors: Mapping[str, float]) -> Evidence:
    with inference():
        matches = match_references(encode(to_pixels(probe_image()[None]))[0])
    best = matches[0]
    told = ", ".join(f"{match.correlation:.2f} with {match.space}" for match in matches)
    if best.correlation < LIKELY_CORRELATION:
        return Evidence("probe", (), "unknown", f"correlation {told}")
    factor = factors[best.space]
    is_scaled_so = abs(best.slope / factor - 1.0) <= _SLOPE_TOLERANCE
    is_certain = best.correlation >= CERTAIN_CORRELATION and is_scaled_so
    reason = f"correlation {told}; scaling factor {best.slope:.4g}, expected {factor:g}"
    return Evidence("probe", (best.space,), "certain" if is_certain else "likely", reason)
