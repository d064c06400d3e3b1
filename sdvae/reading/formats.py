"""The latent formats of other trainers: what each holds, and the files that records become in it.

None of them says itself what it holds; FORMATS does.
"""

import io
import itertools
import json
import math
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import torch
from torch import Tensor

from sdvae import sealed
from sdvae.amounts import size_text
from sdvae.errors import StoreError
from sdvae.latents import scale
from sdvae.reading.dataset import LatentDataset
from sdvae.reading.declaration import LatentFiles
from sdvae.reading.row import File, Format, Row, Settings
from sdvae.reading.sd_scripts import sd_scripts
from sdvae.reading.stats import measure
from sdvae.store.buckets import Size
from sdvae.weights.files import as_bytes
from sdvae.weights.write import OutputTensor, safetensors_bytes, safetensors_chunks

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


# --- hustvl/LightningDiT ---


def _lightning_dit_settings(dataset: LatentDataset) -> Settings:
    if not dataset.has_flips:
        raise StoreError(
            "LightningDiT trains on photos and their mirror images, and this store has no mirrored latents; "
            "encode with --flip"
        )
    settings = _class_settings(dataset)
    mean, _ = next(shard.moments() for shard in dataset.store.shards() if shard.num_rows)
    _, channels, height, _ = mean.shape
    return {
        "data.data_path": "OUT",
        "data.image_size": settings["resolution"],
        "data.num_classes": settings["num_classes"],
        "data.latent_norm": True,
        "data.latent_multiplier": 1.0,
        "vae.downsample_ratio": settings["resolution"] // height,
        "model.in_chans": channels,
        "decoding": "its inference.py decodes with VA-VAE; decode what it samples with the VAE of this store",
    }


def _lightning_dit_files(dataset: LatentDataset, rows: Iterator[Row]) -> Iterator[File]:
    """A file for each shard, and the statistics by which its reader brings latents to unit std."""
    for number, of_shard in itertools.groupby(rows, key=lambda row: row.shard.number):
        yield f"latents_rank00_shard{number:06d}.safetensors", _lightning_dit_shard(list(of_shard))
    stats = measure(dataset.store)
    moments = {
        name: torch.tensor(values, dtype=torch.float32, device="cpu").view(1, -1, 1, 1)
        for name, values in (("mean", stats.mean), ("std", stats.std))
    }
    file = io.BytesIO()
    torch.save(moments, file)  # which torch.load reads with weights_only: nothing but tensors
    yield "latents_stats.pt", file.getvalue()


def _lightning_dit_shard(rows: list[Row]) -> Iterator[memoryview]:
    def drawn(ending: str) -> OutputTensor:  # one record at a time: those of a shard would take gigabytes
        shape = (len(rows), *rows[0].moments["mean"].shape)
        num_bytes = 4 * math.prod(shape)
        return OutputTensor("F32", shape, num_bytes, lambda: (as_bytes(row.samples()[ending]) for row in rows))

    labels = torch.tensor([row.label for row in rows], dtype=torch.int64, device="cpu")
    tensors = {"latents": drawn(""), "latents_flip": drawn("_flip"), "labels": OutputTensor.of(labels)}
    return safetensors_chunks(tensors, {"latents": "raw", "total_size": str(len(rows)), "dtype": "torch.float32"})


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
            latent_files=LatentFiles("**/*.safetensors", "scaled" if self.is_scaled else "raw"),
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
    "kohya": sd_scripts("sd1", "sdxl", is_scaled=False),
    "kohya-flux": sd_scripts("flux1", is_scaled=True),
    "repa": Format(
        reader="sihyun-yu/REPA",
        value="mean and std",
        scaling="raw; REPA multiplies by 0.18215 while it trains",
        flips="left out",
        latent_spaces=("sd1",),
        settings=_repa_settings,
        files=_repa_files,
        latent_files=LatentFiles("vae-sd/**/*.npy", "raw", has_std=True),
    ),
    "fast-dit": Format(
        reader="chuanyangjin/fast-DiT",
        value="sample",
        scaling="scaled by 0.18215",
        flips="left out",
        latent_spaces=("sd1",),
        settings=_class_settings,
        files=_fast_dit_files,
        latent_files=LatentFiles("imagenet256_features/*.npy", "scaled"),
    ),
    "lightning-dit": Format(
        reader="hustvl/LightningDiT",
        value="sample",
        scaling="raw; LightningDiT scales by latents_stats.pt while it trains",
        flips="latents_flip, drawn from the posterior of the mirrored photo",
        latent_spaces=None,
        settings=_lightning_dit_settings,
        files=_lightning_dit_files,
        latent_files=LatentFiles("*.safetensors", "raw"),
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
        latent_files=LatentFiles("*.tar", "raw"),
    ),
}
