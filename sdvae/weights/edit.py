"""Whole files in, whole files out: a VAE in another layout, out of a checkpoint, or into one.

Tensors pass one by one, so memory does not follow the size of the files. Inputs are never modified; outputs are
safetensors whose metadata name their sources.
"""

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from sdvae import __version__, atomic
from sdvae.errors import OutputError, WeightsError
from sdvae.tiny import TinyConfig, named_as_taesd
from sdvae.weights.beside import CONFIG_NAME
from sdvae.weights.evidence import FAMILY_KEY, relate
from sdvae.weights.files import DTYPES, Entry, TensorFile, as_bytes, dtype_name, opened
from sdvae.weights.find import WEIGHTS_NAMES
from sdvae.weights.keymap import Layout, fit_shape, ldm_names, some
from sdvae.weights.load import PADDING_KEY, VAEFile, config_json, open_vae, padding_metadata
from sdvae.weights.shapes import SHAPE_FIELDS
from sdvae.weights.taesd import SUFFIXES
from sdvae.weights.write import OutputTensor, write_safetensors

logger = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
# As their author calls them.
_TAESD_NAMES = {"sd1": "taesd", "sdxl": "taesdxl", "sd3": "taesd3", "flux1": "taef1", "flux2": "taef2"}


@dataclass(frozen=True)
class Written:
    """What was written, or would be: `num_vae` of the `num_tensors` belong to the VAE.

    `left_out` counts what else the source holds, by the beginning of the names.
    """

    output: Path
    num_tensors: int
    num_vae: int
    num_bytes: int
    layout: Layout
    family: str | None
    left_out: dict[str, int] = field(default_factory=dict)


def convert(
    source: Path,
    output: Path,
    layout: Layout | None = None,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    *,
    is_dry_run: bool = False,
    force: bool = False,
) -> Written:
    """Write the VAE of `source` alone: as a folder that diffusers reads, or where `output` ends .safetensors, one file.

    Layout and dtype stay where they are not given; a folder has diffusers' layout. A TAESD's own layout is two files
    in a folder, of which `output` of the result is the encoder. An output that is there already is refused, unless
    `force` is given; so it is in `extract` and `swap`.
    """
    vae = open_vae(source, family, is_copied=output.suffix == _SUFFIX)  # only a folder's config tells scale and groups
    if isinstance(vae.config, TinyConfig):
        return _write_tiny(vae, output, layout or "diffusers", dtype, is_dry_run, force)
    if layout == "taesd":
        raise WeightsError(f"{source} is a KL-VAE; it cannot be converted to a TAESD, which is another network")
    return _write_vae("convert", vae, output, layout, dtype, is_dry_run, force)


def extract(
    checkpoint: Path, output: Path, family: str | None = None, *, is_dry_run: bool = False, force: bool = False
) -> Written:
    """Write the VAE in a checkpoint, as `convert` does; WeightsError where the file holds nothing else."""
    vae = open_vae(checkpoint, family, is_copied=output.suffix == _SUFFIX)
    if len(vae.keys.names) == len(vae.file.entries):
        raise WeightsError(f"{checkpoint} is a VAE already, so there is nothing to extract; use sdvae convert")
    return _write_vae("extract", vae, output, None, None, is_dry_run, force)


def swap(
    checkpoint: Path,
    vae: Path,
    output: Path,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    *,
    is_dry_run: bool = False,
    force: bool = False,
) -> Written:
    """Write `checkpoint` with the VAE of another file in place of its own; all its other tensors stay as they are.

    Each tensor keeps the name, shape and dtype it has in the checkpoint, unless `dtype` is given. `family` is that of
    the new VAE. Raises WeightsError for a VAE of another structure, or of another latent space.
    """
    old, new = open_vae(checkpoint, is_copied=True), open_vae(vae, family, is_copied=True)
    _check_swap(old, new)
    if output.suffix != _SUFFIX:
        raise WeightsError(f"{output} must be named .safetensors: sdvae writes no other kind of file")
    _check_output(output, [], force, old.file, new.file)
    keys = {name: key for key, name in new.keys.names.items()}
    family = new.family or old.family
    planned: dict[str, OutputTensor] = {}
    for key, entry in old.file.entries.items():
        if key not in old.keys.names:
            planned[key] = OutputTensor(entry.dtype, entry.shape, entry.num_bytes, entry.chunks)
        else:
            stored = DTYPES[entry.dtype] if dtype is None else dtype
            planned[key] = _plan(new.file.entries[keys[old.keys.names[key]]], entry.shape, stored)
    told = {"sdvae.vae_sha256": sha256(new.file)} if not is_dry_run else {}
    metadata = _with_padding(old.file.metadata, new) | told
    return _write("swap", output, planned, metadata, old, len(keys), old.keys.layout, family, is_dry_run)


def sha256(file: TensorFile) -> str:
    """The sha256 (hex) of a file's bytes; of each shard, joined by commas, where there are several."""
    digests = []
    for path in sorted({entry.path for entry in file.entries.values()}):
        with opened(path) as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return ",".join(digests)


def _write_vae(
    verb: str,
    vae: VAEFile,
    output: Path,
    layout: Layout | None,
    dtype: torch.dtype | None,
    is_dry_run: bool,
    force: bool,
) -> Written:
    is_folder = output.suffix != _SUFFIX
    _check_output(output, [WEIGHTS_NAMES[0], CONFIG_NAME] if is_folder else [], force, vae.file)
    if is_folder and (output.suffix in (".ckpt", ".pt", ".pth", ".bin") or output.is_file()):
        raise WeightsError(f"{output} must be a folder or a file named .safetensors: sdvae writes nothing else")
    if is_folder and layout == "ldm":
        raise WeightsError(f"{output} would be a diffusers folder; name a .safetensors file for LDM's layout")
    layout = "diffusers" if is_folder else layout or vae.keys.layout
    names = {name: name for name in vae.keys.names.values()} if layout == "diffusers" else ldm_names(vae.shapes)
    planned = {}
    for key, name in vae.keys.names.items():
        entry = vae.file.entries[key]
        shape = fit_shape(name, fit_shape(name, entry.shape, "diffusers"), layout)
        planned[names[name]] = _plan(entry, shape, DTYPES[entry.dtype] if dtype is None else dtype)
    metadata = _with_padding(vae.file.metadata if not vae.keys.prefix else {}, vae)
    target = output / WEIGHTS_NAMES[0] if is_folder else output
    content = config_json(vae.config) if is_folder else b""
    if is_folder and not is_dry_run:
        atomic.make_folder(output)
        atomic.write_bytes(output / CONFIG_NAME, content)
    written = _write(verb, target, planned, metadata, vae, len(planned), layout, vae.family, is_dry_run)
    return replace(written, left_out=vae.left_out)


def _with_padding(metadata: dict[str, str], vae: VAEFile) -> dict[str, str]:
    """The metadata of a file with this VAE in it."""
    others = {key: value for key, value in metadata.items() if key != PADDING_KEY}
    return others | padding_metadata(vae.config)


def _write_tiny(
    vae: VAEFile, output: Path, layout: Layout, dtype: torch.dtype | None, is_dry_run: bool, force: bool
) -> Written:
    if layout == "ldm":
        raise WeightsError(f"{vae.file.path} is a TAESD, another network than the KL-VAEs that have LDM's layout")
    if layout == "diffusers":
        return _write_vae("convert", vae, output, layout, dtype, is_dry_run, force)
    stem = _TAESD_NAMES.get(vae.family or "", "taesd")
    names = [f"{stem}_{half}{_SUFFIX}" for half in ("encoder", "decoder")]
    _check_output(output, names, force, vae.file)
    if output.suffix in SUFFIXES or output.is_file():
        raise WeightsError(f"{output} must be a folder: TAESD's own layout is two files, the encoder and the decoder")
    if not is_dry_run:
        atomic.make_folder(output)
    written = []
    for name, entries in zip(names, named_as_taesd(vae.file.entries), strict=True):
        planned = {}
        for key, entry in entries.items():
            planned[key] = _plan(entry, entry.shape, DTYPES[entry.dtype] if dtype is None else dtype)
        told = vae.file.metadata
        written.append(
            _write("convert", output / name, planned, told, vae, len(planned), layout, vae.family, is_dry_run)
        )
    num_tensors, num_bytes = sum(half.num_tensors for half in written), sum(half.num_bytes for half in written)
    return replace(written[0], num_tensors=num_tensors, num_vae=num_tensors, num_bytes=num_bytes)


def _check_swap(old: VAEFile, new: VAEFile) -> None:
    kinds = [isinstance(vae.config, TinyConfig) for vae in (old, new)]
    if kinds[0] != kinds[1]:
        other, own = ("a TAESD", "a KL-VAE") if kinds[1] else ("a KL-VAE", "a TAESD")
        raise WeightsError(
            f"{new.file.path} is {other}, and the VAE of {old.file.path} is {own}, another network; give {own}"
        )
    differing = sorted(
        name for name in old.shapes.keys() | new.shapes.keys() if old.shapes.get(name) != new.shapes.get(name)
    )
    if differing:
        before, after = asdict(old.config), asdict(new.config)
        told = [
            f"{name} {after[name]} instead of {before[name]}" for name in SHAPE_FIELDS if after[name] != before[name]
        ]
        raise WeightsError(
            f"the VAE of {new.file.path} has another structure than that of {old.file.path}: "
            f"{', '.join(told) or some(differing, 3)}; a checkpoint takes only a VAE of its own kind"
        )
    ours, theirs = old.verdict, new.verdict
    if ours.claimed and theirs.claimed and ours.claimed != theirs.claimed:
        raise WeightsError(
            f"{old.file.path} has {ours.claimed} latents and {new.file.path} has {theirs.claimed} latents: images "
            f"would be wrong; use a VAE of {ours.claimed} ({ours}; {theirs})"
        )
    found = relate(ours, theirs)
    if found.is_same and found.certainty != "unknown":
        return
    if theirs.claimed is None and ours.claimed:
        logger.warning(
            "%s does not tell whether it has the %s latents of %s; if it has, give --family %s (%s)",
            new.file.path, ours.claimed, old.file.path, ours.claimed, found.reason,
        )  # fmt: skip
    else:
        logger.warning(
            "%s is not proved to have the latents of %s: %s; images may be wrong",
            new.file.path, old.file.path, found.reason,
        )  # fmt: skip


def _check_output(output: Path, names: Sequence[str], force: bool, *inputs: TensorFile) -> None:
    """Refuse an output that is an input, by whatever name, that has no folder to be in, or that is there already.

    `names` are the files it is to have, where it is a folder.
    """
    places = [output / name for name in names] or [output]
    for path in {entry.path for file in inputs for entry in file.entries.values()}:
        if any(place.exists() and place.samefile(path) for place in [output, *places]):
            raise WeightsError(f"{output} is the input, too, and inputs are never overwritten; give -o another name")
    if not output.parent.is_dir():
        raise WeightsError(f"there is no folder {output.parent} for {output.name}; make it first")
    if output.suffix == _SUFFIX and output.is_dir():
        raise WeightsError(f"{output} is a folder; give the file another name")
    if not force and (found := next((place for place in places if place.exists()), None)):
        raise OutputError(f"{found} is there already; give -o another name, or --force to write over it")


def _plan(entry: Entry, shape: tuple[int, ...], dtype: torch.dtype) -> OutputTensor:
    def cast() -> Iterator[memoryview]:
        tensor = entry.read()
        narrower = tensor.to(dtype)
        if _num_finite(narrower) < _num_finite(tensor):
            raise WeightsError(f"{entry.path} holds numbers too large for {dtype}; keep a wider --dtype")
        yield as_bytes(narrower)

    stored = DTYPES[entry.dtype]
    dtype = dtype if stored.is_floating_point else stored  # a counter stays one
    num_bytes = math.prod(shape) * dtype.itemsize
    return OutputTensor(dtype_name(dtype), shape, num_bytes, entry.chunks if stored == dtype else cast)


def _num_finite(tensor: Tensor) -> int:
    return int(tensor.float().isfinite().sum())


def _write(
    verb: str,
    target: Path,
    planned: dict[str, OutputTensor],
    metadata: dict[str, str],
    source: VAEFile,
    num_vae: int,
    layout: Layout,
    family: str | None,
    is_dry_run: bool,
) -> Written:
    if not is_dry_run:
        metadata = {"format": "pt"} | metadata | {"sdvae.version": __version__, "sdvae.verb": verb}
        metadata["sdvae.source_sha256"] = sha256(source.file)
        if family:
            metadata[FAMILY_KEY] = family
        write_safetensors(target, planned, metadata)
    num_bytes = sum(tensor.num_bytes for tensor in planned.values())
    return Written(target, len(planned), num_vae, num_bytes, layout, family)
