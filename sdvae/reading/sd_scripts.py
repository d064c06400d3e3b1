"""The latent caches of kohya-ss/sd-scripts (`--cache_latents_to_disk`), and the config that makes it read them."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from sdvae.amounts import size_text
from sdvae.errors import StoreError
from sdvae.latents import scale
from sdvae.reading.dataset import LatentDataset
from sdvae.reading.declaration import LatentFiles
from sdvae.reading.row import File, Format, Row, Settings
from sdvae.store.buckets import Size

_PIXELS_PER_TOKEN = 16  # of FLUX, which packs latents by 2x2


@dataclass(frozen=True)
class _Family:
    """What its training scripts for one latent space ask for."""

    ending: str  # of the names of cache files
    script: str
    bucket_step: int  # in px; the script refuses buckets in smaller ones


_FAMILIES = {
    "sd1": _Family("_sd.npz", "train_network.py", 64),
    "sdxl": _Family("_sdxl.npz", "sdxl_train_network.py", 32),
    "flux1": _Family("_flux.npz", "flux_train_network.py", 32),
}


def sd_scripts(*spaces: str, is_scaled: bool) -> Format:
    """The format of its caches for these latent spaces; FLUX's alone are scaled."""
    return Format(
        reader="kohya-ss/sd-scripts, --cache_latents_to_disk",
        value="sample",
        scaling="scaled, (latents - 0.1159) * 0.3611" if is_scaled else "raw; sd-scripts scales while it trains",
        flips="latents_flipped, drawn from the posterior of the mirrored photo",
        latent_spaces=spaces,
        settings=_settings,
        files=partial(_files, is_scaled=is_scaled),
        latent_files=LatentFiles("**/*.npz", "scaled" if is_scaled else "raw"),
        config=_dataset_toml,
        training=_training,
    )


def _family(dataset: LatentDataset) -> _Family:
    return _FAMILIES[dataset.store.manifest["vae"]["latent_space"]]


def _settings(dataset: LatentDataset) -> Settings:
    """The resolution and buckets under which sd-scripts puts every record into the bucket of its own size."""
    sizes = sorted(set(dataset.buckets), key=lambda size: (size[0] * size[1], min(size)))
    family = _family(dataset)
    is_flux = family is _FAMILIES["flux1"]
    step = family.bucket_step if len(sizes) > 1 else _PIXELS_PER_TOKEN if is_flux else 1
    odd = [size_text(*size) for size in sizes if size[0] % step or size[1] % step]
    if odd:
        raise StoreError(
            f"sd-scripts has buckets in steps of {step} pixels for these latents, and this store has "
            f"{', '.join(odd[:5])}{', ...' if len(odd) > 5 else ''}; encode with --buckets, or with --size and a crop"
        )
    flips = {"flip_aug": True} if dataset.has_flips else {}
    height, width = sizes[-1]  # the largest area: sd-scripts leaves every photo its size that has no more pixels
    if len(sizes) == 1:
        return {"resolution": [width, height], "enable_bucket": False} | flips
    sides = [side for size in sizes for side in size]
    limits = {"min_bucket_reso": min(sides), "max_bucket_reso": max(sides), "bucket_reso_steps": step}
    return {"resolution": [width, height], "enable_bucket": True, "bucket_no_upscale": True} | limits | flips


def _files(dataset: LatentDataset, rows: Iterator[Row], is_scaled: bool) -> Iterator[File]:
    ending, metadata = _family(dataset).ending, {}
    for row in rows:
        (height, width), (photo_height, photo_width) = row.size_px, row.record["original_px"]
        arrays = {}
        for flip, drawn in row.samples().items():
            latents = scale(drawn[None], dataset.latent_scaling)[0] if is_scaled else drawn
            arrays["latents" + "_flipped" * bool(flip)] = latents.numpy()
        arrays["original_size"] = np.array([photo_width, photo_height])
        arrays["crop_ltrb"] = np.array(_crop((width, height), (photo_width, photo_height)))
        if is_scaled:  # FLUX's caches hold an image in several resolutions, and call each by its latents' size
            arrays = {f"{name}_{height // 8}x{width // 8}": values for name, values in arrays.items()}
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, **arrays)
        # sd-scripts picks the bucket by the size in the name. It would write the photo's own there; ours makes it
        # pick the bucket that this record was resized for.
        yield f"{row.name}_{width:04d}x{height:04d}{ending}", file.getvalue()
        # The photo whose cache it looks for, by its name without the ending.
        photo = row.name + (PurePosixPath(row.record["key"]).suffix or ".png")
        metadata[photo] = {"caption": row.record["caption"] or "", "image_size": [width, height]}
    yield "metadata.json", json.dumps(metadata, ensure_ascii=False, indent=1).encode()


def _crop(bucket: Size, photo: Size) -> tuple[float, float, float, float]:  # both (width, height)
    """left, top, right, bottom as sd-scripts means them: where the whole photo would lie, fitted into the bucket."""
    aspect = photo[0] / photo[1]
    is_narrow = aspect < bucket[0] / bucket[1]
    width, height = (bucket[1] * aspect, bucket[1]) if is_narrow else (bucket[0], bucket[0] / aspect)
    left, top = (bucket[0] - width) // 2, (bucket[1] - height) // 2
    return left, top, left + width, top + height


def _dataset_toml(settings: Settings, out: Path) -> File:
    """`--dataset_config` of an export that lies in `out`."""
    of_subset = {"image_dir": str(out), "metadata_file": str(out / "metadata.json")}
    of_subset |= {name: value for name, value in settings.items() if name == "flip_aug"}
    of_dataset = {name: value for name, value in settings.items() if name not in of_subset}
    lines = [
        "# sd-scripts looks for paths in the folder it is started in, so these two are absolute: change them when this",
        "# folder moves. The photos are not needed: every size and caption is in metadata.json.",
        "[[datasets]]",
        *(f"{name} = {json.dumps(value)}" for name, value in of_dataset.items()),
        "",
        "[[datasets.subsets]]",
        *(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in of_subset.items()),
    ]
    return "dataset.toml", ("\n".join(lines) + "\n").encode()


def _training(dataset: LatentDataset) -> str:
    script = _family(dataset).script
    return f"accelerate launch {script} --dataset_config OUT/dataset.toml --cache_latents_to_disk, and your own options"
