"""A store written in the format of another trainer, as far as that format can tell the truth about it."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sdvae import atomic
from sdvae.errors import ConfigError, OutputError, StoreError
from sdvae.progress import Progress, silent
from sdvae.reading.dataset import LatentDataset
from sdvae.reading.declaration import write_declaration
from sdvae.reading.formats import FORMATS
from sdvae.reading.names import plan_names
from sdvae.reading.row import File, Row
from sdvae.sources.kinds import is_junk
from sdvae.store.records import written

_NUM_WRITERS = 16


def export(
    path: str | Path,
    name: str,
    out: str | Path,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write every record of the finished store `path` to `out`, a new or empty folder, in the format FORMATS[name].

    Returns the declaration of what is in `out`, which is written last: an export without it was interrupted.
    Raises StoreError for a store that is unfinished, or that the format or its reader would misrepresent.
    """
    if name not in FORMATS:
        raise ConfigError(f"unknown format {name!r}; choose {', '.join(FORMATS)}")
    form, out = FORMATS[name], Path(out)
    dataset = LatentDataset(path, seed=seed)
    manifest = dataset.store.manifest
    space = manifest["vae"]["latent_space"]
    if form.latent_spaces and space not in form.latent_spaces:
        spaces = " or ".join(form.latent_spaces)
        fitting = ", ".join(other for other, each in FORMATS.items() if space in (each.latent_spaces or (space,)))
        raise StoreError(
            f"{path} holds latents of the space {space}; {form.reader} trains on those of {spaces}. "
            f"Formats for {space}: {fitting}"
        )
    declaration = {
        "format": name,
        "reader": form.reader,
        "value": form.value,
        "scaling": form.scaling,
        "flips": form.flips if dataset.has_flips else "none; the store has none",
        "pixel_range": manifest["pixel_range"],
        "seed": seed if form.value == "sample" else None,
        "num_records": len(dataset),
        "classes": dataset.classes,
        "settings": form.settings(dataset),
        "training": form.training(dataset) if form.training else None,
        "latent_scaling": manifest["latent_scaling"],
        "vae": manifest["vae"],
    }
    _claim(out, dataset.store.paths.root)
    out = out.absolute()
    _write(out, form.files(dataset, _rows(dataset, progress)))
    if form.config:
        _write(out, iter([form.config(declaration["settings"], out)]))
    write_declaration(out, declaration, form.latent_files)
    return declaration


def _claim(out: Path, store: Path) -> None:
    if out.resolve().is_relative_to(store.resolve()):
        raise OutputError(f"{out} lies in the store {store}; give a folder outside of it")
    if out.exists() and (not out.is_dir() or not all(is_junk(path.name) for path in out.iterdir())):
        raise OutputError(f"{out} exists, and is not an empty folder; give a new one")
    atomic.make_folder(out)


def _write(out: Path, files: Iterator[File]) -> None:
    def write(name: str, content: bytes) -> None:
        atomic.make_folder((out / name).parent)
        atomic.write_bytes(out / name, content)

    # A small file takes as long as its sync, and syncs that wait beside each other are done in one.
    with ThreadPoolExecutor(_NUM_WRITERS) as pool:
        pending: deque[Future[None]] = deque()
        for name, content in files:
            if isinstance(content, bytes):
                pending.append(pool.submit(write, name, content))
            else:  # made while it is written, and large
                atomic.write_stream(out / name, content)
            if len(pending) > 2 * _NUM_WRITERS:
                pending.popleft().result()
        for future in pending:
            future.result()


def _rows(dataset: LatentDataset, progress: Progress) -> Iterator[Row]:
    store, classes = dataset.store, {label: number for number, label in enumerate(dataset.classes)}
    names = plan_names([dataset.record(number)["key"] for number in range(len(dataset))], ".")
    number = 0
    progress("export", number, len(dataset))
    for shard in store.shards():
        tensors = shard.tensors()
        for record in written(shard.records()):
            moments = {name: values[record["row"]] for name, values in tensors.items()}
            label = None if record["label"] is None else classes[record["label"]]
            yield Row(number, names[number].removesuffix("."), shard, record, label, moments, dataset.seed)
            number += 1
            progress("export", number, len(dataset))
