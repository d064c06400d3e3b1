"""The latent formats of other trainers: what each holds, and the files that records become in it.

None of them says itself what it holds; FORMATS does.
"""

import io
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from sdvae import sealed
from sdvae.amounts import size_text
from sdvae.errors import StoreError
from sdvae.latents import scale
from sdvae.posterior import DiagonalGaussian
from sdvae.reading.dataset import LatentDataset, record_stream
from sdvae.store.buckets import Size
from sdvae.store.shard import Shard
from sdvae.weights.write import OutputTensor, safetensors_bytes

Settings = dict[str, Any]
File = tuple[str, bytes | Iterator[bytes]]  # path below the folder of the export, content


@dataclass(frozen=True)
class Row:
    """One record on its way out."""

    number: int  # counted over the whole store
    name: str  # for a file, without an ending: the record's key, made safe
    shard: Shard
    record: dict[str, Any]  # its line of the index
    label: int | None  # index into the dataset's classes
    moments: dict[str, NDArray[Any]]  # mean, logvar, of mirrored photos mean_flip, logvar_flip: (C, h, w) raw
    seed: int

    @property
    def size_px(self) -> Size:
        """(height, width) of the pixels that were encoded."""
        assert self.shard.bucket_px is not None
        return self.shard.bucket_px

    def posterior(self, ending: str = "") -> DiagonalGaussian:  # of (C, h, w) float32
        """What the encoder said of the photo, or with "_flip" of the mirrored one."""
        mean, logvar = (torch.from_numpy(self.moments[name + ending].astype(np.float32)) for name in ("mean", "logvar"))
        return DiagonalGaussian(mean, logvar)

    def samples(self) -> dict[str, Tensor]:  # raw (C, h, w) float32
        """One draw from each posterior, under "" and, where it is stored, "_flip"; the same in every export."""
        noise = Generator(record_stream(self.seed, self.record["key"], epoch=0))
        drawn = {}
        for ending in ("", "_flip"):
            if f"mean{ending}" in self.moments:
                posterior = self.posterior(ending)
                values = noise.standard_normal(posterior.mean.shape, np.float32)
                drawn[ending] = posterior.mean + posterior.std * torch.from_numpy(values)
        return drawn


@dataclass(frozen=True)
class Format:
    """What a format holds, whose reader says so, and what a store must be for it to hold the truth."""

    reader: str
    value: Literal["sample", "mean", "mean and std", "mean and logvar"]
    scaling: str
    flips: str
    latent_spaces: tuple[str, ...] | None  # None: any
    settings: Callable[[LatentDataset], Settings]  # what to tell the trainer; StoreError for a store it would misread
    files: Callable[[LatentDataset, Iterator[Row]], Iterator[File]]


# --- kohya-ss/sd-scripts ---

_KOHYA_ENDINGS = {"sd1": "_sd.npz", "sdxl": "_sdxl.npz"}
_KOHYA_TABLES = {512: (256, 1024), 1024: (256, 2048)}  # resolution: shortest and longest side, in steps of 64


def _kohya_settings(dataset: LatentDataset) -> Settings:
    """The resolution and buckets under which sd-scripts puts every record into the bucket of its own size."""
    sizes = set(dataset.buckets)
    if len(sizes) == 1:
        height, width = sizes.pop()
        return {"resolution": [width, height], "enable_bucket": False}
    for resolution, (shortest, longest) in _KOHYA_TABLES.items():
        sides = range(shortest, longest + 1, 64)
        pairs = {(side, min(longest, resolution**2 // side // 64 * 64)) for side in sides} | {(resolution, resolution)}
        if sizes <= {size for a, b in pairs if b >= shortest for size in ((a, b), (b, a))}:
            limits = {"min_bucket_reso": shortest, "max_bucket_reso": longest, "bucket_reso_steps": 64}
            return {"resolution": [resolution, resolution], "enable_bucket": True} | limits
    raise StoreError(
        f"sd-scripts has no buckets for all sizes of this store ({_spelled(sizes)}) and would mix them; "
        "encode with --buckets, or with --size and a crop"
    )


def _kohya_files(dataset: LatentDataset, rows: Iterator[Row]) -> Iterator[File]:
    ending = _KOHYA_ENDINGS[dataset.store.manifest["vae"]["latent_space"]]
    metadata = {}
    for row in rows:
        (height, width), (photo_height, photo_width) = row.size_px, row.record["original_px"]
        arrays = {"latents" + "_flipped" * bool(flip): drawn.numpy() for flip, drawn in row.samples().items()}
        arrays["original_size"] = np.array([photo_width, photo_height])
        arrays["crop_ltrb"] = np.array(_kohya_crop((width, height), (photo_width, photo_height)))
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, **arrays)
        # sd-scripts picks the bucket that is nearest to the size in the name. It would write the photo's own there;
        # ours makes it pick the bucket that this record was resized for.
        yield f"{row.name}_{width:04d}x{height:04d}{ending}", file.getvalue()
        photo = row.name + (
            PurePosixPath(row.record["key"]).suffix or ".png"
        )  # whose name it looks for, without the ending
        metadata[photo] = {"caption": row.record["caption"] or "", "image_size": [width, height]}
    yield "metadata.json", json.dumps(metadata, ensure_ascii=False, indent=1).encode()


def _kohya_crop(bucket: Size, photo: Size) -> tuple[float, float, float, float]:  # both (width, height)
    """left, top, right, bottom as sd-scripts means them: where the whole photo would lie, fitted into the bucket."""
    aspect = photo[0] / photo[1]
    is_narrow = aspect < bucket[0] / bucket[1]
    width, height = (bucket[1] * aspect, bucket[1]) if is_narrow else (bucket[0], bucket[0] / aspect)
    left, top = (bucket[0] - width) // 2, (bucket[1] - height) // 2
    return left, top, left + width, top + height


# --- sihyun-yu/REPA ---


def _class_settings(dataset: LatentDataset) -> Settings:
    """Resolution and number of classes; StoreError unless every record is square, of one size, and has a label."""
    sizes = set(dataset.buckets)
    height, width = next(iter(sizes))
    if len(sizes) > 1 or height != width:
        raise StoreError(f"this format holds squares of one size, the store has {_spelled(sizes)}; encode with --size")
    records = map(dataset.record, range(len(dataset)))
    unlabelled = [record["key"] for record in records if record["label"] is None]
    if unlabelled:
        raise StoreError(
            f"this format needs a class for every record, and {len(unlabelled)} have none ({unlabelled[0]}); "
            "encode from class folders"
        )
    return {"resolution": height, "num_classes": len(dataset.classes)}


def _repa_settings(dataset: LatentDataset) -> Settings:
    settings = _class_settings(dataset)
    px = settings["resolution"]
    photos = f"put the {size_text(px, px)} photos into images/ by the names in vae-sd/: REPA pairs sorted names"
    return settings | {"images": photos}


def _repa_files(dataset: LatentDataset, rows: Iterator[Row]) -> Iterator[File]:
    labels = []
    for row in rows:
        posterior = row.posterior()
        yield f"vae-sd/{row.name}.npy", _npy(torch.cat([posterior.mean, posterior.std]))
        labels.append([f"{row.name}.npy", row.label])
    yield "vae-sd/dataset.json", json.dumps({"labels": labels}, ensure_ascii=False).encode()


# --- chuanyangjin/fast-DiT ---


def _fast_dit_files(dataset: LatentDataset, rows: Iterator[Row]) -> Iterator[File]:
    for row in rows:
        # Zero-padded: the reader sorts the names of both folders as text, and pairs them by place.
        name = f"{row.number:08d}.npy"
        scaled_latents = scale(row.samples()[""][None], dataset.latent_scaling)
        yield f"imagenet256_features/{name}", _npy(scaled_latents)
        yield f"imagenet256_labels/{name}", _npy(torch.tensor([row.label], dtype=torch.int64, device="cpu"))


# --- kohya-ss/musubi-tuner ---


@dataclass(frozen=True)
class _Musubi:
    """One of its architectures: what its caches are called, and how their latents are written."""

    ending: str  # of file names
    architecture: str  # in the metadata
    is_scaled: bool
    has_frames: bool  # whether the key of the latents counts them

    def settings(self, dataset: LatentDataset) -> Settings:
        """A resolution under which musubi-tuner puts every record into a bucket of its own size."""
        height, width = map(max, zip(*dataset.buckets, strict=True))
        if odd := next((size for size in dataset.buckets if size[0] % 16 or size[1] % 16), None):
            raise StoreError(
                f"musubi-tuner has buckets in steps of 16 pixels, and this store has {size_text(*odd)}; "
                "encode with --buckets, or with --size and a crop"
            )
        records = map(dataset.record, range(len(dataset)))
        folders = sorted({str(PurePosixPath(record["key"]).parent) for record in records})
        return {
            "resolution": [width, height],
            "enable_bucket": True,
            "bucket_no_upscale": True,
            "cache_directory": "OUT" if folders == ["."] else f"one [[datasets]] for each of {', '.join(folders[:5])}",
            "text_encoder_outputs": "cache them into the same folders with musubi-tuner's own script",
        }

    def files(self, dataset: LatentDataset, rows: Iterator[Row]) -> Iterator[File]:
        """One file a record, as its script caches it: the mean of the posterior, in fp32."""
        for row in rows:
            latents = row.posterior().mean
            if self.is_scaled:
                latents = scale(latents[None], dataset.latent_scaling)[0]
            size = f"{latents.shape[1]}x{latents.shape[2]}"
            key = f"latents_{'1x' if self.has_frames else ''}{size}_float32"
            height, width = row.size_px
            # musubi-tuner picks the bucket by the size in the name. It would write the photo's own there; ours makes
            # it pick the bucket that this record was resized for.
            metadata = {
                "architecture": self.architecture, "format_version": "1.0.1", "height": str(height), "width": str(width)
            }  # fmt: skip
            name = f"{row.name}_{width:04d}x{height:04d}_{self.ending}.safetensors"
            yield name, safetensors_bytes({key: OutputTensor.of(latents)}, metadata)

    def format(self, model: str, space: str) -> Format:
        """Its entry in FORMATS."""
        return Format(
            reader=f"kohya-ss/musubi-tuner, {model}",
            value="mean",
            scaling="scaled" if self.is_scaled else "raw; musubi-tuner scales while it trains",
            flips="left out",
            latent_spaces=(space,),
            settings=self.settings,
            files=self.files,
        )


# --- WebDataset ---


def _webdataset_files(dataset: LatentDataset, rows: Iterator[Row]) -> Iterator[File]:
    for number, of_shard in itertools.groupby(rows, key=lambda row: row.shard.number):
        yield f"{number:05d}.tar", _tar(of_shard)


def _tar(rows: Iterator[Row]) -> Iterator[bytes]:
    for row in rows:
        record = {name: row.record[name] for name in _WEBDATASET_RECORD}
        members = {f"{name}.npy": _npy(torch.from_numpy(np.array(values))) for name, values in row.moments.items()}
        members["json"] = sealed.canonical_json(record)
        if row.record["caption"] is not None:
            members["txt"] = row.record["caption"].encode()
        if row.label is not None:
            members["cls"] = str(row.label).encode()
        for ending, data in members.items():
            # A number as name: what is before the first dot groups the members, and keys have dots of their own.
            info = tarfile.TarInfo(f"{row.number:09d}.{ending}")
            info.size = len(data)
            yield info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


_WEBDATASET_RECORD = ("key", "caption", "label", "original_px", "resized_px", "crop_px", "bucket_px", "source_sha256")


def _spelled(sizes: set[Size]) -> str:
    return ", ".join(size_text(*size) for size in sorted(sizes)[:5]) + (", ..." if len(sizes) > 5 else "")


def _npy(values: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, values.numpy(), allow_pickle=False)
    return file.getvalue()


FORMATS = {
    "kohya": Format(
        reader="kohya-ss/sd-scripts, --cache_latents_to_disk",
        value="sample",
        scaling="raw; sd-scripts scales while it trains",
        flips="latents_flipped, drawn from the posterior of the mirrored photo",
        latent_spaces=tuple(_KOHYA_ENDINGS),
        settings=_kohya_settings,
        files=_kohya_files,
    ),
    "repa": Format(
        reader="sihyun-yu/REPA",
        value="mean and std",
        scaling="raw; REPA multiplies by 0.18215 while it trains",
        flips="left out",
        latent_spaces=("sd1",),
        settings=_repa_settings,
        files=_repa_files,
    ),
    "fast-dit": Format(
        reader="chuanyangjin/fast-DiT",
        value="sample",
        scaling="scaled by 0.18215",
        flips="left out",
        latent_spaces=("sd1",),
        settings=_class_settings,
        files=_fast_dit_files,
    ),
    "musubi-flux2-dev": _Musubi("f2d", "flux_2_dev", is_scaled=True, has_frames=False).format("FLUX.2 dev", "flux2"),
    "musubi-flux2-klein-4b": _Musubi("f2k4b", "flux_2_klein_4b", is_scaled=True, has_frames=False).format(
        "FLUX.2 klein 4B", "flux2"
    ),
    "musubi-flux2-klein-9b": _Musubi("f2k9b", "flux_2_klein_9b", is_scaled=True, has_frames=False).format(
        "FLUX.2 klein 9B", "flux2"
    ),
    "musubi-z-image": _Musubi("zi", "z_image", is_scaled=False, has_frames=True).format("Z-Image", "flux1"),
    "webdataset": Format(
        reader="webdataset",
        value="mean and logvar",
        scaling="raw; `latent_scaling` below scales them",
        flips="mean_flip.npy and logvar_flip.npy, from the mirrored photo",
        latent_spaces=None,
        settings=lambda dataset: {},
        files=_webdataset_files,
    ),
}
