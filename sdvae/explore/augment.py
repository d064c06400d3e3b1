"""More training data: each photo encoded, moved a little in latent space, and decoded; labels and captions are kept."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdvae import atomic
from sdvae.encoding.prepare import list_entries
from sdvae.engine.run import Budget
from sdvae.errors import ConfigError, OutputError, SourceError
from sdvae.explore.photos import Item, cut_photos, decode, encode, in_batches
from sdvae.images.write import encode_image
from sdvae.pixels import to_images
from sdvae.posterior import DiagonalGaussian
from sdvae.progress import Progress, silent
from sdvae.reading.names import plan_names
from sdvae.sealed import canonical_json
from sdvae.sources.entries import Entry, Source, some_of
from sdvae.sources.kinds import is_junk
from sdvae.sources.open import open_source
from sdvae.store.geometry import Preprocess
from sdvae.train.data import seed_of
from sdvae.vae import VAE

TABLE = "metadata.jsonl"  # as Hugging Face's imagefolder and our own sources read it


@dataclass(frozen=True)
class AugmentReport:
    """What was done."""

    num_photos: int
    num_written: int
    left_out: dict[str, str]  # key -> why it could not be read


def augment_dataset(
    source: str | Path | Source | Iterable[Any],
    out: str | Path,
    vae: VAE,
    *,
    num_copies: int = 1,
    strength: float = 0.1,
    preprocess: Preprocess | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    budget: Budget = None,
    progress: Progress = silent,
) -> AugmentReport:
    """Write `num_copies` new PNG files of each photo into `out`, in folders as those of `source`, and a metadata.jsonl.

    Each is decoded from a sample of the photo's posterior plus Gaussian noise of `strength` times the scale of the
    latents: scaled latents have a std of about 1. Noise depends on seed, key and number of the copy, so that the same
    call writes the same bytes. The table has caption, label, and the source's key of each file; it is written last.
    OutputError unless `out` is new or empty, ConfigError for settings that mean nothing.
    """
    if num_copies < 1:
        raise ConfigError(f"{num_copies} copies are nothing to write; give at least 1")
    if not 0.0 <= strength < float("inf"):
        raise ConfigError(f"a strength of {strength} is none; 0 takes samples of the posterior, 0.1 moves a little")
    photos, out = open_source(source), Path(out)
    _require_new(out, photos.root)
    entries = list_entries(photos)
    names = _plan(entries, num_copies)
    atomic.make_folder(out)
    left_out: dict[str, str] = {}
    written: list[Entry] = []
    num_all = len(entries) * num_copies
    progress("augment", 0, num_all)
    with vae.deterministic():
        cut = cut_photos(photos, entries, preprocess or Preprocess(), left_out)
        for batch in in_batches(cut, batch_size):
            posterior = encode(vae, batch, budget)
            for copy in range(num_copies):
                latents = torch.cat([_moved(vae, posterior, item, row, copy, strength, seed)
                                     for row, item in enumerate(batch)])  # fmt: skip
                images = to_images(decode(vae, latents, batch, budget))
                for item, image in zip(batch, images, strict=True):
                    path = out / names[item.entry.key][copy]
                    atomic.make_folder(path.parent)
                    atomic.write_bytes(path, encode_image(image, "png"))
            written += [item.entry for item in batch]
            progress("augment", (len(written) + len(left_out)) * num_copies, num_all)
    if not written:
        raise SourceError(f"no photo of {photos.name} can be read: {next(iter(left_out.values()))}")
    atomic.write_stream(out / TABLE, _lines(written, names))
    return AugmentReport(len(written), len(written) * num_copies, left_out)


def _moved(
    vae: VAE, posterior: DiagonalGaussian, item: Item, row: int, copy: int, strength: float, seed: int
) -> Tensor:  # (1, C, h, w) raw
    generator = torch.Generator().manual_seed(seed_of(seed, copy, item.entry.key))
    one = DiagonalGaussian(posterior.mean[row : row + 1], posterior.logvar[row : row + 1])
    scaled = vae.scale(one.sample(generator))
    noise = torch.randn(scaled.shape, generator=generator, dtype=torch.float32, device="cpu")
    return vae.unscale(scaled + strength * noise.to(scaled))


def _plan(entries: Sequence[Entry], num_copies: int) -> dict[str, list[str]]:
    """The names of each photo's copies: its own, with a number of as many digits as the last has."""
    keys, digits = [entry.key for entry in entries], len(str(num_copies - 1))
    by_copy = [plan_names(keys, f"-{copy:0{digits}d}.png") for copy in range(num_copies)]
    return {key: list(names) for key, *names in zip(keys, *by_copy, strict=True)}


def _lines(entries: Iterable[Entry], names: dict[str, list[str]]) -> Iterator[bytes]:
    for entry in entries:
        for name in names[entry.key]:
            line = {"file_name": name, "caption": entry.caption, "label": entry.label, "source_key": entry.key}
            yield canonical_json(line)


def _require_new(out: Path, source: Path | None) -> None:
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; give a folder for the images")
    found = sorted(path.name for path in out.iterdir() if not is_junk(path.name)) if out.exists() else []
    if found:
        raise OutputError(f"{out} holds {some_of(found)}; nothing was touched, give a new folder or an empty one")
    place = out.resolve()
    if source is not None and (place.is_relative_to(source) or source.is_relative_to(place)):
        raise OutputError(f"{out} and the source {source} lie in each other; give a folder outside of it")
