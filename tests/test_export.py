"""Each export is read back by its format's own reader: transcribed, with project and commit, or the library itself."""

import json
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from click.testing import CliRunner
from einops import rearrange
from numpy.random import Generator
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sdvae import atomic
from sdvae.cli.main import cli
from sdvae.config import FAMILIES
from sdvae.errors import OutputError, StoreError
from sdvae.reading.dataset import record_stream
from sdvae.reading.declaration import DECLARATION, declared_files
from sdvae.reading.export import export
from sdvae.reading.formats import FORMATS
from sdvae.reading.latent_files import list_latent_files, read_latents
from sdvae.store.store import Store
from tests.made_stores import make_store

SQUARE = {(64, 64): 9}
BUCKETS = {(512, 512): 2, (384, 640): 3, (640, 384): 2}
BROKEN = ("dog/001.png",)
SEED = 5


def store_for(name: str, root: Path, num_records: Any = None, **made: Any) -> Store:
    """A store of the first space that the format holds."""
    space = (FORMATS[name].latent_spaces or ("sd1",))[0]
    made = {"has_flips": name == "lightning-dit"} | made
    return make_store(root, num_records or SQUARE, latent_space=space, config=FAMILIES[space], **made)


def truth(store: Store) -> dict[str, dict[str, Any]]:
    """By key: the line of the index, and the posteriors as fp32 tensors."""
    found = {}
    for shard in store.shards():
        tensors = shard.tensors()
        for line in shard.records():
            if line["row"] is not None:
                values = {name: torch.from_numpy(x[line["row"]].astype(np.float32)) for name, x in tensors.items()}
                found[line["key"]] = line | values
    return found


def sample_of(record: dict[str, Any], is_flipped: bool = False) -> Tensor:
    """The draw that an export documents: the plain one first, then the mirrored one, of the record's stream."""
    noise = Generator(record_stream(SEED, record["key"], 0))
    for ending in ("", "_flip"):
        values = torch.from_numpy(noise.standard_normal(record["mean"].shape, np.float32))
        drawn = record[f"mean{ending}"] + torch.exp(0.5 * record[f"logvar{ending}"]) * values
        if (ending == "_flip") == is_flipped:
            return drawn
    raise AssertionError


# --- kohya: https://github.com/kohya-ss/sd-scripts, commit 48d368fa557731ad0488c07304dfeba8c07910eb ---

KOHYA = {"sd1": ("kohya", "_sd.npz"), "sdxl": ("kohya", "_sdxl.npz"), "flux1": ("kohya-flux", "_flux.npz")}


def kohya_npz_path(absolute_path: str, image_size: tuple[int, int], suffix: str) -> str:
    """library/strategy_sd.py and strategy_flux.py, get_latents_npz_path."""
    return str(Path(absolute_path).with_suffix("")) + f"_{image_size[0]:04d}x{image_size[1]:04d}" + suffix


def kohya_suffix(bucket_reso: tuple[int, int], multi_resolution: bool) -> str:
    return f"_{bucket_reso[1] // 8}x{bucket_reso[0] // 8}" if multi_resolution else ""


def kohya_is_expected(npz_path: str, flip_aug: bool, suffix: str) -> bool:
    """library/strategy_base.py, LatentsCachingStrategy._default_is_disk_cached_latents_expected."""
    with np.load(npz_path) as npz:
        return "latents" + suffix in npz and (not flip_aug or "latents_flipped" + suffix in npz)


def kohya_load(npz_path: str, suffix: str) -> tuple[Any, list[int], list[float], Any]:
    """library/strategy_base.py, LatentsCachingStrategy._default_load_latents_from_disk, without alpha masks."""
    npz = np.load(npz_path)
    if "latents" + suffix not in npz:
        raise ValueError(f"latents{suffix} not found in {npz_path}")
    of = [npz.get(name + suffix) for name in ("latents", "original_size", "crop_ltrb", "latents_flipped")]
    return of[0], of[1].tolist(), of[2].tolist(), of[3]


def kohya_size_from_path(npz_path: str) -> tuple[int, int]:
    """library/strategy_base.py, get_image_size_from_disk_cache_path: what a folder without metadata goes by."""
    w, h = npz_path.removesuffix(".npz").split("_")[-2].split("x")
    return int(w), int(h)


def kohya_check_limits(resolution: tuple[int, int], min_bucket_reso: int, max_bucket_reso: int, steps: int) -> None:
    """library/train_util.py, BaseDataset.adjust_min_max_bucket_reso_by_steps; BucketManager.__init__."""
    assert min_bucket_reso % steps == 0 and max_bucket_reso % steps == 0, "else adjusted"
    assert min(resolution) >= min_bucket_reso and max(resolution) <= max_bucket_reso >= min_bucket_reso


def kohya_select_bucket(config: dict[str, Any], image_width: int, image_height: int) -> tuple[int, int]:
    """library/train_util.py, BucketManager.select_bucket, as make_buckets calls it."""
    if not config["enable_bucket"]:
        return tuple(config["resolution"])  # type: ignore[return-value]  # the one predefined bucket
    assert config["bucket_no_upscale"]
    width, height = config["resolution"]
    assert image_width * image_height <= width * height, "else it is resized"
    steps = config["bucket_reso_steps"]
    return image_width - image_width % steps, image_height - image_height % steps


def kohya_crop_ltrb(bucket_reso: tuple[int, int], image_size: tuple[int, int]) -> tuple[float, float, float, float]:
    """library/train_util.py, BucketManager.get_crop_ltrb."""
    bucket_ar = bucket_reso[0] / bucket_reso[1]
    image_ar = image_size[0] / image_size[1]
    if bucket_ar > image_ar:
        resized_width, resized_height = bucket_reso[1] * image_ar, float(bucket_reso[1])
    else:
        resized_width, resized_height = float(bucket_reso[0]), bucket_reso[0] / image_ar
    crop_left = (bucket_reso[0] - resized_width) // 2
    crop_top = (bucket_reso[1] - resized_height) // 2
    return crop_left, crop_top, crop_left + resized_width, crop_top + resized_height


@pytest.mark.parametrize(
    ("buckets", "space", "has_flips"),
    [
        (SQUARE, "sd1", True), (BUCKETS, "sd1", False), (BUCKETS, "sdxl", True), (SQUARE, "flux1", False),
        ({(512, 512): 1, (544, 480): 2}, "flux1", True),
    ],
)  # fmt: skip
def test_sd_scripts_reads_what_it_would_have_cached(
    tmp_path: Path, buckets: dict[tuple[int, int], int], space: str, has_flips: bool
) -> None:
    name, ending = KOHYA[space]
    config = FAMILIES[space]
    made = {"has_flips": has_flips, "broken": BROKEN, "latent_space": space, "config": config}
    store = make_store(tmp_path / "store", buckets, **made)  # type: ignore[arg-type]
    out = tmp_path / "out"
    settings = export(store.paths.root, name, out, SEED)["settings"]

    # library/config_util.py, load_user_config: what --dataset_config says is all that the trainer knows
    (of_dataset,) = tomllib.loads((out / "dataset.toml").read_text(encoding="utf-8"))["datasets"]
    (subset,) = of_dataset.pop("subsets")
    assert of_dataset | {"flip_aug": True} == settings | {"flip_aug": True}
    assert subset.get("flip_aug", False) == has_flips
    if of_dataset["enable_bucket"]:
        limits = (of_dataset[key] for key in ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"))
        kohya_check_limits(tuple(of_dataset["resolution"]), *limits)
        assert of_dataset["bucket_reso_steps"] % (64 if space == "sd1" else 32) == 0, "verify_bucket_reso_steps"

    metadata = json.loads(Path(subset["metadata_file"]).read_text(encoding="utf-8"))
    records = truth(store)
    assert sorted(metadata) == sorted(records)
    for key, entry in metadata.items():
        record = records[key]
        height, width = record["bucket_px"]
        npz_path = kohya_npz_path(str(Path(subset["image_dir"]) / key), tuple(entry["image_size"]), ending)
        assert kohya_size_from_path(npz_path) == tuple(entry["image_size"])
        bucket = kohya_select_bucket(of_dataset, *entry["image_size"])
        assert bucket == (width, height), "the bucket whose shape these latents have"
        suffix = kohya_suffix(bucket, multi_resolution=space == "flux1")
        assert kohya_is_expected(npz_path, has_flips, suffix), "else it is encoded again"
        latents, original_size, crop_ltrb, flipped = kohya_load(npz_path, suffix)
        assert latents.dtype == np.float32 and latents.shape == (config.latent_channels, height // 8, width // 8)
        assert entry["caption"] == record["caption"]
        assert original_size == record["original_px"][::-1]
        assert tuple(crop_ltrb) == kohya_crop_ltrb(bucket, tuple(original_size))
        for found, is_flipped in [(latents, False), (flipped, True)] if has_flips else [(latents, False)]:
            z = sample_of(record, is_flipped).numpy()
            # library/flux_models.py, AutoEncoder.encode, which alone scales
            expected = 0.3611 * (z - 0.1159) if space == "flux1" else z
            assert np.abs(found - expected).max() < 1e-5
        assert has_flips or flipped is None


@pytest.mark.parametrize(
    ("space", "sizes", "message"),
    [
        ("sd1", {(512, 512): 1, (480, 512): 1}, "in steps of 64 pixels for these latents, and this store has 512x480"),
        ("sdxl", {(512, 512): 1, (504, 512): 1}, "in steps of 32 pixels for these latents, and this store has 512x504"),
        ("flux1", {(504, 512): 1}, "in steps of 16 pixels for these latents, and this store has 512x504"),
    ],
)
def test_sizes_that_sd_scripts_would_mix_are_refused(
    tmp_path: Path, space: str, sizes: dict[tuple[int, int], int], message: str
) -> None:
    store = make_store(tmp_path / "store", sizes, latent_space=space, config=FAMILIES[space])
    with pytest.raises(StoreError, match=message):
        export(store.paths.root, KOHYA[space][0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- REPA: https://github.com/sihyun-yu/REPA, commit 67f714503e3892f993844aab088ffc5791c92613 ---


class RepaDataset:
    """dataset.py, CustomDataset."""

    def __init__(self, data_dir: Path) -> None:
        supported_ext = Image.registered_extensions().keys() | {".npy"}
        self.images_dir, self.features_dir = data_dir / "images", data_dir / "vae-sd"

        def names(folder: Path) -> list[str]:
            found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
            return sorted(name for name in found if Path(name).suffix.lower() in supported_ext)

        self.image_fnames, self.feature_fnames = names(self.images_dir), names(self.features_dir)
        labels = dict(json.loads((self.features_dir / "dataset.json").read_bytes())["labels"])
        self.labels = np.array([labels[name] for name in self.feature_fnames])
        self.labels = self.labels.astype({1: np.int64, 2: np.float32}[self.labels.ndim])

    def __len__(self) -> int:
        assert len(self.image_fnames) == len(self.feature_fnames)
        return len(self.feature_fnames)

    def __getitem__(self, idx: int) -> tuple[Tensor, Tensor, Tensor]:
        with Image.open(self.images_dir / self.image_fnames[idx]) as file:
            image = np.array(file)
        image = image.reshape(*image.shape[:2], -1).transpose(2, 0, 1)
        features = np.load(self.features_dir / self.feature_fnames[idx])
        return torch.from_numpy(image), torch.from_numpy(features), torch.tensor(self.labels[idx])


def repa_sample_posterior(moments: Tensor, latents_scale: float, noise: Tensor) -> Tensor:
    """train.py, sample_posterior, with the noise given."""
    mean, std = torch.chunk(moments, 2, dim=1)
    return (mean + std * noise) * latents_scale


def test_repa_reads_moments_beside_their_photos(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", SQUARE, broken=BROKEN, has_flips=True)
    out = tmp_path / "out"
    declared = export(store.paths.root, "repa", out)
    assert declared["settings"]["resolution"] == 64 and declared["flips"] == "left out"
    records = truth(store)
    for number, key in enumerate(records):  # the photos, each of a grey level of its own
        path = out / "images" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (10 * number,) * 3).save(path)
    dataset = RepaDataset(out)
    assert len(dataset) == len(records) == 8
    seen = set()
    for image, features, label in (dataset[i] for i in range(len(dataset))):
        key = list(records)[int(image[0, 0, 0]) // 10]
        seen.add(key)
        record = records[key]
        assert declared["classes"][int(label)] == record["label"] == key.partition("/")[0]
        assert features.dtype == torch.float32 and features.shape == (8, 8, 8)
        noise = torch.randn(1, 4, 8, 8)
        scaled = repa_sample_posterior(features[None], 0.18215, noise)
        expected = (record["mean"] + torch.exp(0.5 * record["logvar"]) * noise) * 0.18215
        assert (scaled - expected).abs().max() < 1e-6
    assert seen == set(records)


# --- fast-DiT: https://github.com/chuanyangjin/fast-DiT, commit 0ddbd642f47057d5ec6145529237e1043a335942 ---


class FastDiTDataset:
    """train.py, CustomDataset, in the folders that main() gives it."""

    def __init__(self, feature_path: Path) -> None:
        self.features_dir = feature_path / "imagenet256_features"
        self.labels_dir = feature_path / "imagenet256_labels"
        self.features_files = sorted(path.name for path in self.features_dir.iterdir())
        self.labels_files = sorted(path.name for path in self.labels_dir.iterdir())

    def __len__(self) -> int:
        assert len(self.features_files) == len(self.labels_files)
        return len(self.features_files)

    def __getitem__(self, idx: int) -> tuple[Tensor, Tensor]:
        features = np.load(self.features_dir / self.features_files[idx])
        labels = np.load(self.labels_dir / self.labels_files[idx])
        return torch.from_numpy(features), torch.from_numpy(labels)


def test_fast_dit_reads_scaled_samples_and_their_labels(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", {(64, 64): 13}, broken=BROKEN, has_flips=True)
    declared = export(store.paths.root, "fast-dit", tmp_path / "out", SEED)
    dataset = FastDiTDataset(tmp_path / "out")
    records = list(truth(store).values())
    assert len(dataset) == len(records) == 12
    loaded = [dataset[i] for i in range(len(dataset))]
    x = torch.stack([features for features, _ in loaded]).squeeze(dim=1)  # as its training loop does
    y = torch.stack([labels for _, labels in loaded]).squeeze(dim=1)
    assert x.shape == (12, 4, 8, 8) and x.dtype == torch.float32 and y.dtype == torch.int64
    for latents, label, record in zip(x, y, records, strict=True):
        assert declared["classes"][int(label)] == record["label"]
        assert (latents - sample_of(record) * 0.18215).abs().max() < 1e-6


# --- LightningDiT: https://github.com/hustvl/LightningDiT, commit 2725fed42a14898744433809949834e26957bcdd ---


class LightningDiTDataset:
    """datasets/img_latent_dataset.py, ImgLatentDataset, with latent_norm; which of the two latents is given."""

    def __init__(self, data_dir: Path, latent_multiplier: float) -> None:
        self.latent_multiplier = latent_multiplier
        self.places = []
        for safe_file in sorted(data_dir.glob("*.safetensors")):
            with safe_open(safe_file, framework="pt", device="cpu") as f:
                self.places += [(safe_file, i) for i in range(f.get_slice("labels").get_shape()[0])]
        stats = torch.load(data_dir / "latents_stats.pt")
        self.mean, self.std = stats["mean"], stats["std"]

    def __len__(self) -> int:
        return len(self.places)

    def item(self, idx: int, tensor_key: str) -> tuple[Tensor, Tensor]:
        safe_file, i = self.places[idx]
        with safe_open(safe_file, framework="pt", device="cpu") as f:
            feature, label = f.get_slice(tensor_key)[i : i + 1], f.get_slice("labels")[i : i + 1]
        feature = (feature - self.mean) / self.std * self.latent_multiplier
        return feature.squeeze(0), label.squeeze(0)


@pytest.mark.parametrize("space", ["sd1", "flux1"])
def test_lightning_dit_reads_samples_of_photos_and_their_mirror_images(tmp_path: Path, space: str) -> None:
    made = {"latent_space": space, "config": FAMILIES[space], "has_flips": True, "broken": BROKEN}
    store = make_store(tmp_path / "store", {(64, 64): 9}, **made)  # type: ignore[arg-type]
    declared = export(store.paths.root, "lightning-dit", tmp_path / "out", SEED)
    settings = declared["settings"]
    channels = FAMILIES[space].latent_channels
    assert (
        settings["data.image_size"] // settings["vae.downsample_ratio"] == 8 and settings["model.in_chans"] == channels
    )
    dataset = LightningDiTDataset(tmp_path / "out", settings["data.latent_multiplier"])
    records = list(truth(store).values())
    assert len(dataset) == len(records) == 8
    seen = []
    for number, record in enumerate(records):
        for tensor_key, is_flipped in (("latents", False), ("latents_flip", True)):
            feature, label = dataset.item(number, tensor_key)
            assert feature.shape == (channels, 8, 8) and feature.dtype == torch.float32 and label.dtype == torch.int64
            assert declared["classes"][int(label)] == record["label"]
            # inference.py: what is sampled, back in the space of the VAE
            raw = feature * dataset.std[0] + dataset.mean[0]
            assert (raw - sample_of(record, is_flipped)).abs().max() < 1e-4
            seen.append(feature)
    values = torch.stack(seen)
    assert values.mean((0, 2, 3)).abs().max() < 0.1 and (values.std((0, 2, 3)) - 1).abs().max() < 0.1


def test_lightning_dit_needs_mirrored_latents(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", SQUARE)
    with pytest.raises(StoreError, match="no mirrored latents; encode with --flip"):
        export(store.paths.root, "lightning-dit", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- musubi-tuner: https://github.com/kohya-ss/musubi-tuner, commit 30c658c4f4b0bf05038b3346eff9670259b10fc7 ---

MUSUBI = {  # dataset/architectures.py
    "musubi-flux2-dev": ("f2d", "flux_2_dev"),
    "musubi-flux2-klein-4b": ("f2k4b", "flux_2_klein_4b"),
    "musubi-flux2-klein-9b": ("f2k9b", "flux_2_klein_9b"),
    "musubi-z-image": ("zi", "z_image"),
}


def musubi_bucket(settings: dict[str, Any], image_size: tuple[int, int]) -> tuple[int, int]:
    """dataset/bucket.py, BucketSelector.get_bucket_resolution, with bucket_no_upscale and in steps of 16."""
    width, height = settings["resolution"]
    assert settings["enable_bucket"] and settings["bucket_no_upscale"]
    assert image_size[0] * image_size[1] <= width * height, "else the nearest of its table"
    return image_size[0] // 16 * 16, image_size[1] // 16 * 16


def musubi_items(cache_directory: Path, architecture: str) -> list[tuple[str, tuple[int, int], Path]]:
    """dataset/image_video_dataset.py, ImageDataset.prepare_for_training: item key, size and file of each cache."""
    items = []
    for cache_file in sorted(cache_directory.glob(f"*_{architecture}.safetensors")):
        tokens = cache_file.name.split("_")
        image_width, image_height = map(int, tokens[-2].split("x"))
        items.append(("_".join(tokens[:-2]), (image_width, image_height), cache_file))
    return items


def musubi_batch(cache_files: list[Path]) -> dict[str, Tensor]:
    """dataset/bucket.py, BucketBatchManager.__getitem__, without text encoder outputs."""
    batch: dict[str, list[Tensor]] = {}
    for cache_file in cache_files:
        for key, value in load_file(cache_file).items():
            assert key.endswith("_float32")  # utils/model_utils.py, remove_dtype_suffix
            content_key = key.removesuffix("_float32")
            if content_key.startswith("latents_"):
                content_key = content_key.rsplit("_", 1)[0]  # remove FxHxW
            batch.setdefault(content_key, []).append(value)
    return {key: torch.stack(values) for key, values in batch.items()}


@pytest.mark.parametrize("name", MUSUBI)
def test_musubi_tuner_reads_what_it_would_have_cached(tmp_path: Path, name: str) -> None:
    store = store_for(name, tmp_path / "store", BUCKETS, has_flips=True, broken=BROKEN)
    out = tmp_path / "out"
    declared = export(store.paths.root, name, out, SEED)
    architecture, full_name = MUSUBI[name]
    records, found = truth(store), {}
    for folder in ("cat", "dog", "owl"):
        of_buckets: dict[tuple[int, int], list[tuple[str, Path]]] = {}
        for item_key, image_size, cache_file in musubi_items(out / folder, architecture):
            bucket = musubi_bucket(declared["settings"], image_size)
            of_buckets.setdefault(bucket, []).append((f"{folder}/{item_key}.png", cache_file))
            with safe_open(cache_file, "pt") as file:
                width, height = (file.metadata()[side] for side in ("width", "height"))
                assert (file.metadata()["architecture"], int(width), int(height)) == (full_name, *image_size)
        for bucket, members in of_buckets.items():
            batch = musubi_batch([file for _, file in members])
            assert list(batch) == ["latents"]
            for (key, _), latents in zip(members, batch["latents"], strict=True):
                found[key] = bucket, latents
    assert sorted(found) == sorted(records)
    config = FAMILIES[store.manifest["vae"]["latent_space"]]
    for key, ((width, height), latents) in found.items():
        assert [height, width] == records[key]["bucket_px"]
        mean = records[key]["mean"]
        if name == "musubi-z-image":
            assert torch.equal(latents, mean), "zimage_cache_latents.py stores what the encoder gives"
            continue
        # flux_2/flux2_models.py, AutoEncoder.encode
        z = rearrange(mean, "... c (i pi) (j pj)  -> ... (c pi pj) i j", pi=2, pj=2)
        running_mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (config.latents_mean, config.latents_std))
        assert latents.shape == (128, height // 16, width // 16)
        assert (latents - (z - running_mean) / std).abs().max() < 1e-5


def test_musubi_tuner_has_no_buckets_between_its_steps(tmp_path: Path) -> None:
    store = store_for("musubi-z-image", tmp_path / "store", {(64, 64): 1, (72, 64): 1})
    with pytest.raises(StoreError, match="steps of 16 pixels, and this store has 64x72"):
        export(store.paths.root, "musubi-z-image", tmp_path / "out")


# --- WebDataset: the library itself ---


# webdataset 1.0 leaves its tars to the garbage collector.
leaves_files_open = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@leaves_files_open
def test_webdataset_reads_everything_a_store_holds(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", {(64, 64): 9, (32, 64): 3}, broken=BROKEN, has_flips=True)
    out = tmp_path / "out"
    declared = export(store.paths.root, "webdataset", out)
    urls = [str(path) for path in sorted(out.glob("*.tar"))]
    assert len(urls) == len(store.shards()) == 4
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    records = truth(store)
    assert [sample["json"]["key"] for sample in samples] == list(records)
    for sample in samples:
        record = records[sample["json"]["key"]]
        for name in ("mean", "logvar", "mean_flip", "logvar_flip"):
            assert sample[f"{name}.npy"].dtype == np.float16
            assert np.array_equal(sample[f"{name}.npy"], record[name].numpy().astype(np.float16))
        assert sample["txt"] == record["caption"]
        assert declared["classes"][sample["cls"]] == record["label"]
        for name in ("original_px", "resized_px", "crop_px", "bucket_px", "source_sha256"):
            assert sample["json"][name] == record[name]


@leaves_files_open
def test_webdataset_members_without_caption_or_class(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", SQUARE, is_labelled=False)
    export(store.paths.root, "webdataset", tmp_path / "out")
    tar = str(tmp_path / "out" / "00000.tar")
    for sample in webdataset.WebDataset([tar], shardshuffle=False).decode():
        assert sorted(sample.keys() - {"__key__", "__url__", "__local_path__"}) == ["json", "logvar.npy", "mean.npy"]


# --- All ---


def test_no_export_tells_less_than_what_it_is(tmp_path: Path) -> None:
    for name, form in FORMATS.items():
        store, out = store_for(name, tmp_path / f"{name}-store"), tmp_path / name
        declared = export(store.paths.root, name, out, SEED)
        told = json.loads((out / DECLARATION).read_text(encoding="utf-8"))
        assert told.pop("latent_files") == asdict(form.latent_files)
        assert told == json.loads(json.dumps(declared))
        assert declared["value"] == form.value and declared["scaling"] == form.scaling
        assert declared["pixel_range"] == [-1, 1]
        assert declared["flips"] == (form.flips if name == "lightning-dit" else "none; the store has none")
        assert declared["seed"] == (SEED if form.value == "sample" else None)
        assert declared["vae"]["fingerprint"] == "0" * 64


def test_the_same_export_has_the_same_bytes(tmp_path: Path) -> None:
    for name in FORMATS:
        store = store_for(name, tmp_path / f"{name}-store", has_flips=True)
        outs = [tmp_path / f"{name}{turn}" for turn in range(2)]
        for out in outs:
            export(store.paths.root, name, out, SEED)
        first, second = (
            {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()} for out in outs
        )
        config = first.pop(Path("dataset.toml"), b"")
        assert config.replace(str(outs[0]).encode(), str(outs[1]).encode()) == second.pop(Path("dataset.toml"), b"")
        assert first == second and len(first) > 2


@pytest.mark.parametrize("name", FORMATS)
def test_an_export_decodes_back_without_a_word_from_the_user(tmp_path: Path, name: str) -> None:
    store, out = store_for(name, tmp_path / "store", broken=BROKEN), tmp_path / "out"
    export(store.paths.root, name, out, SEED)
    config = FAMILIES[store.manifest["vae"]["latent_space"]]
    found = [read_latents(path, config, declared=declared_files(out)) for path in list_latent_files(out)]
    raw = torch.cat([each.raw for each in found])
    assert not any(each.is_told for each in found)
    is_sample = FORMATS[name].value == "sample"
    records = truth(store)
    is_by_key = len(found) == len(records) and name != "fast-dit"  # one file each, under its key
    ordered = [records[key] for key in (sorted(records) if is_by_key else records)]
    expected = torch.stack([sample_of(each) if is_sample else each["mean"] for each in ordered])
    assert raw.shape == expected.shape and (raw - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["repa", "fast-dit"])
@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"num_records": {(64, 64): 2, (32, 64): 1}}, "squares of one size, the store has 64x32, 64x64"),
        ({"num_records": {(32, 64): 2}}, "squares of one size, the store has 64x32"),
        ({"num_records": SQUARE, "is_labelled": False}, "a class for every record, and 9 have none"),
        (
            {"num_records": SQUARE, "latent_space": "sdxl", "config": FAMILIES["sdxl"]},
            "latents of the space sdxl; .* trains on those of sd1",
        ),
    ],
)
def test_what_a_class_conditional_format_cannot_hold_is_refused(
    tmp_path: Path, name: str, made: dict[str, Any], message: str
) -> None:
    store = make_store(tmp_path / "store", **made)
    with pytest.raises(StoreError, match=message):
        export(store.paths.root, name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_space_that_sd_scripts_caches_otherwise_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", SQUARE, latent_space="sd3", config=FAMILIES["sd3"])
    with pytest.raises(StoreError, match=r"sd1 or sdxl. Formats for sd3: lightning-dit, webdataset$"):
        export(store.paths.root, "kohya", tmp_path / "out")


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", SQUARE)
    (tmp_path / "out").mkdir()
    export(store.paths.root, "webdataset", tmp_path / "out")
    with pytest.raises(OutputError, match="not an empty folder"):
        export(store.paths.root, "webdataset", tmp_path / "out")
    with pytest.raises(OutputError, match="lies in the store"):
        export(store.paths.root, "webdataset", store.paths.root / "out")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="not an empty folder"):
        export(store.paths.root, "webdataset", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_interrupted_export_declares_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "store", SQUARE)
    out = tmp_path / "out"

    def full(operation: str, path: Path) -> None:
        if path.name.startswith("00000005"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "hook", full)
    with pytest.raises(OutputError, match="No space left"):
        export(store.paths.root, "fast-dit", out)
    assert not (out / DECLARATION).exists()
    assert not list(out.rglob("*.tmp"))


def test_keys_never_leave_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import made_stores

    monkeypatch.setattr(made_stores, "LABELS", ("../../x", "/etc/y", "z"))
    stores = {name: store_for(name, tmp_path / f"{name}-store") for name in FORMATS}
    before = set(tmp_path.rglob("*"))
    for name, store in stores.items():
        export(store.paths.root, name, tmp_path / "exports" / name)
    new = {path for path in set(tmp_path.rglob("*")) - before if path.is_file()}
    assert len(new) > 4 * 9 and all(path.is_relative_to(tmp_path / "exports") for path in new)
    assert not Path("/etc/y").exists()


def test_the_verb_says_what_it_wrote(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", SQUARE, has_flips=True)
    root = str(store.paths.root)
    done = CliRunner().invoke(cli, ["export", root, "--to", "kohya", "-o", str(tmp_path / "a")], catch_exceptions=False)
    assert done.exit_code == 0
    assert "9 records written to" in done.stdout and "sample, raw" in done.stdout and "latents_flipped" in done.stdout
    assert "for training, resolution: [64, 64]" in done.stderr
    assert f"train_network.py --dataset_config {tmp_path}/a/dataset.toml --cache_latents_to_disk" in done.stderr
    arguments = ["export", root, "--to", "repa", "-o", str(tmp_path / "b"), "--json", "-q"]
    result = json.loads(CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout)
    assert (result["value"], result["num_records"], result["output"]) == ("mean and std", 9, str(tmp_path / "b"))
    again = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert again.exit_code == 1 and "not an empty folder" in again.stderr


def test_the_verb_offers_the_formats_there_are() -> None:
    (option,) = (param for param in cli.commands["export"].params if param.name == "name")
    assert list(option.type.choices) == list(FORMATS)  # type: ignore[attr-defined]
