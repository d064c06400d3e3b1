import logging
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from sdvae import VAE, atomic
from sdvae.config import VAEConfig
from sdvae.encoding.encode import EncodeSettings, encode_dataset
from sdvae.errors import LatentsError, OutputError, StoreError, UnsafeFileError
from sdvae.latents import unscale
from sdvae.pixels import to_images
from sdvae.reading.dataset import LatentDataset
from sdvae.reading.decode import DecodeSettings, decode_dataset
from sdvae.reading.export import export
from sdvae.store.geometry import Preprocess
from sdvae.store.store import Store
from tests.conftest import random_model

RAW = DecodeSettings(latents="raw")


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def store(small_vae: VAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole photos of three shapes, two of which are padded, and a file that is no photo."""
    root = tmp_path_factory.mktemp("encoded")
    for name, (height, width) in {
        "a.png": (37, 50),
        "a.jpg": (32, 40),
        "in/b.png": (32, 40),
        "c.webp": (16, 9),
    }.items():
        (root / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        photo(height, width, seed=height).save(root / "photos" / name)
    (root / "photos" / "broken.png").write_bytes(b"no photo")
    settings = EncodeSettings(Preprocess(size_px=None, crop="none"))
    assert encode_dataset(root / "photos", root / "store", small_vae, settings).num_written == 4
    return root / "store"


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_a_store_becomes_images_of_the_photos_sizes(store: Path, small_vae: VAE, tmp_path: Path) -> None:
    report = decode_dataset(store, tmp_path / "out", small_vae, DecodeSettings())
    assert report.num_written == 4
    sizes = {name: read(tmp_path / "out" / name).shape[:2] for name in files_in(tmp_path / "out")}
    assert sizes == {"a.png.png": (37, 50), "a.jpg.png": (32, 40), "in/b.png": (32, 40), "c.png": (16, 9)}


def test_padding_is_cropped_and_nothing_else(store: Path, small_vae: VAE, tmp_path: Path) -> None:
    decode_dataset(store, tmp_path / "out", small_vae, DecodeSettings())
    # The store holds fp16 means; the encoder's own differ by their rounding, the image by a level or two at most.
    (expected,) = small_vae.roundtrip([photo(37, 50, seed=37)])
    difference = np.abs(read(tmp_path / "out" / "a.png.png").astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= 2


@pytest.mark.parametrize("batch_size", [1, 2, 3, None])
def test_batches_do_not_change_the_images(store: Path, small_vae: VAE, tmp_path: Path, batch_size: int | None) -> None:
    decode_dataset(store, tmp_path / "one", small_vae, DecodeSettings(batch_size=1))
    decode_dataset(store, tmp_path / "many", small_vae, DecodeSettings(batch_size=batch_size))
    one, many = files_in(tmp_path / "one"), files_in(tmp_path / "many")
    assert one.keys() == many.keys()
    for name in one:
        difference = read(tmp_path / "one" / name).astype(int) - read(tmp_path / "many" / name).astype(int)
        assert np.abs(difference).max() <= 1  # a convolution may sum in another order for another batch


@pytest.mark.parametrize(
    ("format", "suffix", "kind"), [("png", "png", "PNG"), ("jpeg", "jpg", "JPEG"), ("webp", "webp", "WEBP")]
)
def test_formats(store: Path, small_vae: VAE, tmp_path: Path, format: str, suffix: str, kind: str) -> None:
    decode_dataset(store, tmp_path / "out", small_vae, DecodeSettings(format=format))  # type: ignore[arg-type]
    with Image.open(tmp_path / "out" / f"c.{suffix}") as image:
        assert image.format == kind


def test_latent_files_of_any_kind_shape_and_number(small_vae: VAE, tmp_path: Path) -> None:
    latents = torch.randn(3, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    source = tmp_path / "latents"
    (source / "sub").mkdir(parents=True)
    np.save(source / "batch.npy", latents.numpy())
    torch.save(latents[0], source / "one.pt")
    torch.save(latents[:1, :, :, :4].clone(), source / "sub" / "square.pt")
    save_file({"latents": small_vae.scale(latents[:1])}, source / "scaled.safetensors", metadata={"latents": "scaled"})
    assert decode_dataset(source, tmp_path / "out", small_vae, RAW).num_written == 6
    images = {name: read(tmp_path / "out" / name) for name in files_in(tmp_path / "out")}
    assert images.keys() == {
        "batch-00000.png", "batch-00001.png", "batch-00002.png", "one.png", "scaled.png", "sub/square.png",
    }  # fmt: skip
    assert images["sub/square.png"].shape == (32, 32, 3)
    expected = to_images(small_vae.decode(latents))
    for row in range(3):
        difference = images[f"batch-{row:05d}.png"].astype(int) - expected[row].astype(int)
        assert np.abs(difference).max() <= 1  # other batches, other order of sums
    for name in ("one.png", "scaled.png"):
        assert np.abs(images[name].astype(int) - expected[0].astype(int)).max() <= 1


def test_one_file_is_a_source(small_vae: VAE, tmp_path: Path) -> None:
    np.save(tmp_path / "z.npy", np.zeros((4, 2, 2), np.float32))
    decode_dataset(tmp_path / "z.npy", tmp_path / "out", small_vae, RAW)
    assert files_in(tmp_path / "out").keys() == {"z.png"}


def test_two_images_of_one_name_are_refused(small_vae: VAE, tmp_path: Path) -> None:
    source = tmp_path / "latents"
    source.mkdir()
    np.save(source / "z.npy", np.zeros((2, 4, 2, 2), np.float32))
    np.save(source / "z-00001.npy", np.zeros((1, 4, 2, 2), np.float32))
    with pytest.raises(LatentsError, match=r"both be called z-00001.npy"):
        decode_dataset(source, tmp_path / "out", small_vae, RAW)
    assert not (tmp_path / "out").exists()


def test_one_bad_file_among_many_is_found_before_anything_is_written(small_vae: VAE, tmp_path: Path) -> None:
    source = tmp_path / "latents"
    source.mkdir()
    np.save(source / "a.npy", np.zeros((1, 4, 2, 2), np.float32))
    np.save(source / "b.npy", np.full((1, 4, 2, 2), np.nan, np.float32))
    with pytest.raises(LatentsError, match=r"b.npy holds NaN"):
        decode_dataset(source / "b.npy", tmp_path / "out", small_vae, RAW)
    (tmp_path / "bad").mkdir()
    shutil.copy(source / "b.npy", tmp_path / "bad")
    with pytest.raises(LatentsError, match=r"holds no file that can be decoded; of 1, the first: .*b.npy holds NaN"):
        decode_dataset(tmp_path / "bad", tmp_path / "out", small_vae, RAW)
    torch.save(os.system, source / "c.pt")
    with pytest.raises(UnsafeFileError):
        decode_dataset(source, tmp_path / "out", small_vae, RAW)
    assert not (tmp_path / "out").exists()
    (source / "c.pt").write_bytes(b"no latents")
    report = decode_dataset(source, tmp_path / "out", small_vae, RAW)
    assert report.num_written == 1 and [told.split(" ")[1:3] for told in report.skipped] == [
        ["holds", "NaN"],
        ["is", "a"],
    ]
    assert files_in(tmp_path / "out").keys() == {"a.png"}


@pytest.mark.parametrize(("name", "format"), [("out.png", "PNG"), ("new/out.JPG", "JPEG"), ("out.webp", "WEBP")])
def test_one_image_may_go_to_a_picture_by_name(small_vae: VAE, tmp_path: Path, name: str, format: str) -> None:
    np.save(tmp_path / "a.npy", np.zeros((1, 4, 2, 3), np.float32))
    for _ in range(2):
        assert decode_dataset(tmp_path / "a.npy", tmp_path / name, small_vae, RAW).num_written == 1
    with Image.open(tmp_path / name) as image:
        assert (image.format, image.size) == (format, (24, 16))
    np.save(tmp_path / "b.npy", np.zeros((2, 4, 2, 3), np.float32))
    with pytest.raises(OutputError, match=r"names one picture, but .*b.npy holds 2 images; give a folder"):
        decode_dataset(tmp_path / "b.npy", tmp_path / "b.png", small_vae, RAW)
    assert not (tmp_path / "b.png").exists()


def test_our_own_exports_are_decoded(tmp_path: Path) -> None:
    vae = VAE.load(device="cpu", dtype="fp32")
    (tmp_path / "photos/cat").mkdir(parents=True)
    photo(64, 64).save(tmp_path / "photos/cat/a.png")
    encode_dataset(tmp_path / "photos", tmp_path / "store", vae, EncodeSettings(Preprocess(size_px=64)))
    for name in ("kohya", "repa", "fast-dit", "webdataset"):
        export(tmp_path / "store", name, tmp_path / name)
        report = decode_dataset(tmp_path / name, tmp_path / "out" / name, vae, DecodeSettings())
        assert (report.num_written, report.skipped) == (1, ()), name


def test_the_same_command_again_writes_the_same_files_anew(store: Path, small_vae: VAE, tmp_path: Path) -> None:
    decode_dataset(store, tmp_path / "out", small_vae, DecodeSettings())
    before = files_in(tmp_path / "out")
    (tmp_path / "out" / "c.png").write_bytes(b"cut short")
    leftover = tmp_path / "out" / f".{atomic._place()}.999999999.0123abcd.tmp"  # of a process that was killed
    leftover.touch()
    decode_dataset(store, tmp_path / "out", small_vae, DecodeSettings())
    assert files_in(tmp_path / "out") == before


@pytest.mark.parametrize("kind", ["file", "nested file", "link", "folder link"])
def test_an_output_that_holds_something_else_stays_as_it_is(
    store: Path, small_vae: VAE, tmp_path: Path, kind: str
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    (out / "in").mkdir(parents=True)
    elsewhere.mkdir()
    match kind:
        case "file":
            (out / "thesis.txt").write_text("years")
        case "nested file":
            (out / "in" / "thesis.txt").write_text("years")
        case "link":  # of a name that would be written
            (out / "c.png").symlink_to(elsewhere / "target")
        case "folder link":
            (out / "in").rmdir()
            (out / "in").symlink_to(elsewhere)
    before = sorted(out.rglob("*")), files_in(out)
    with pytest.raises(OutputError, match=r"which this command did not write; give an empty folder"):
        decode_dataset(store, out, small_vae, DecodeSettings())
    assert (sorted(out.rglob("*")), files_in(out)) == before
    assert not list(elsewhere.iterdir())


def test_another_latent_space_is_refused_and_another_decoder_named(
    store: Path, small_vae: VAE, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    of_sdxl = replace(small_vae.config, scaling_factor=0.13025)
    other = VAE(random_model(of_sdxl, seed=2), small_vae.device, small_vae.dtype, name="other VAE")
    with pytest.raises(
        StoreError, match=r"of the space vae-\w+ \(unknown, the probe correlates .* \(declared sdxl, but"
    ):
        decode_dataset(store, tmp_path / "out", other, DecodeSettings())
    assert not (tmp_path / "out").exists()

    other = VAE(random_model(small_vae.config, seed=1), small_vae.device, small_vae.dtype, name="other VAE")
    space = small_vae.latent_space
    assert space.startswith("vae-"), "its config has the scale of SD 1, and the probe denies it"
    with pytest.raises(StoreError, match=rf"that is not proved to be one space.* give --space {space}"):
        decode_dataset(store, tmp_path / "out", other)
    with caplog.at_level(logging.WARNING, "sdvae"):
        decode_dataset(store, tmp_path / "out", other, DecodeSettings(space=space))
    assert "encoded by another VAE" in caplog.text
    assert other.fingerprint[:12] in caplog.text
    assert len(files_in(tmp_path / "out")) == 4


def test_a_full_disk_leaves_whole_images_only(
    store: Path, small_vae: VAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode_dataset(store, tmp_path / "whole", small_vae, DecodeSettings(batch_size=1))
    writes: list[Path] = []

    def fill_up(operation: str, path: Path) -> None:
        if operation == "write":
            writes.append(path)
            if len(writes) > 2:
                raise OSError(28, os.strerror(28))

    monkeypatch.setattr(atomic, "hook", fill_up)
    with pytest.raises(OutputError, match=r"No space left on device; free some space"):
        decode_dataset(store, tmp_path / "out", small_vae, DecodeSettings(batch_size=1))
    whole, left = files_in(tmp_path / "whole"), files_in(tmp_path / "out")
    assert len(left) == 2
    assert left.items() <= whole.items()


def test_the_count_goes_up_to_all(store: Path, small_vae: VAE, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    decode_dataset(store, tmp_path / "out", small_vae, DecodeSettings(batch_size=1), lambda *now: seen.append(now))
    assert seen[0] == ("decode", 0, 4)
    assert seen[-1] == ("decode", 4, 4)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_families_of_other_channels_are_decoded(tmp_path: Path) -> None:
    config = VAEConfig(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=16, scaling_factor=0.5,
        shift_factor=0.25, mid_block_add_attention=False,
    )  # fmt: skip
    vae = VAE(random_model(config), torch.device("cpu"), torch.float32, name="two levels")
    np.save(tmp_path / "z.npy", np.zeros((1, 16, 3, 5), np.float32))
    decode_dataset(tmp_path / "z.npy", tmp_path / "out", vae, DecodeSettings(latents="scaled"))
    expected = to_images(vae.decode(torch.full((1, 16, 3, 5), 0.25)))[0]
    assert np.array_equal(read(tmp_path / "out" / "z.png"), expected)


def test_a_store_opened_by_a_relative_path_survives_a_change_of_the_folder(
    store: Path, small_vae: VAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    np.save(tmp_path / "a.npy", np.zeros((3, 4, 2, 2), np.float32))

    def leave(*_: object) -> None:
        monkeypatch.chdir(tmp_path / "elsewhere")

    monkeypatch.chdir(store.parent)
    dataset, opened = LatentDataset("store"), Store.open(Path("store"))
    leave()
    loader = DataLoader(dataset, num_workers=1, multiprocessing_context="spawn")
    assert len(list(loader)) == 4 and len(opened.quarantined()) == 1
    monkeypatch.chdir(store.parent)
    assert decode_dataset(Path("store"), Path("decoded"), small_vae, DecodeSettings(), leave).num_written == 4
    monkeypatch.chdir(store.parent)
    assert export(Path("store"), "webdataset", Path("exported"), progress=leave)["num_records"] == 4
    monkeypatch.chdir(tmp_path)
    assert decode_dataset(Path("a.npy"), Path("files"), small_vae, RAW, leave).num_written == 3
    monkeypatch.chdir(store.parent)
    encode_dataset("photos", "again", small_vae, EncodeSettings(Preprocess(size_px=32)), progress=leave)
    assert Store.open(store.parent / "again").is_finished
    assert not list((tmp_path / "elsewhere").iterdir())


def test_messages_name_paths_as_they_were_given(
    small_vae: VAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/a.npy", np.zeros((1, 4, 2, 2), np.float32))
    np.save(tmp_path / "in/bad.npy", np.zeros((1, 5, 2, 2), np.float32))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=r"^out holds thesis\.tex, which"):
        decode_dataset("in", "out", small_vae, RAW)
    (skipped,) = decode_dataset("in", "images", small_vae, RAW).skipped
    assert skipped.startswith("in/bad.npy has 5 channels")
    with pytest.raises(LatentsError, match=r"^in/bad\.npy has 5 channels"):
        decode_dataset("in/bad.npy", "one", small_vae, RAW)


# --- Raw or scaled ---


def save_photos(path: Path, family: str, seed: int, *, scaled: bool, metadata: dict[str, str] | None = None) -> None:
    """Latents with the spread that photos' have in a family: scaled, 0.7."""
    config = VAEConfig.from_family(family)
    drawn = 0.7 * torch.randn(2, config.latent_channels, 8, 8, generator=torch.Generator().manual_seed(seed))
    save_file({"latents": drawn if scaled else unscale(drawn, config)}, path, metadata)


@pytest.mark.parametrize(
    ("family", "is_scaled", "told", "says"),
    [
        ("sd1", False, "scaled", "these look raw, but --latents scaled was given"),
        ("sd1", True, "raw", "these look scaled, but --latents raw was given"),
        ("sdxl", False, "scaled", "these look raw, but --latents scaled was given"),
        ("flux1", False, "scaled", "these look raw, but --latents scaled was given"),
        ("flux1", True, "raw", "these look scaled, but --latents raw was given"),
        ("sd1", True, "scaled", None),
        ("sd1", False, "raw", None),
        ("flux1", True, "scaled", None),
        ("flux1", False, "raw", None),
        ("sd3", False, "scaled", None),  # too near to each other: no word rather than a wrong one
        ("sd3", True, "raw", None),
    ],
)
def test_a_wrong_word_for_the_scaling_is_doubted_once_and_decoded(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    family: str,
    is_scaled: bool,
    told: Literal["raw", "scaled"],
    says: str | None,
) -> None:
    (tmp_path / "in").mkdir()
    for seed in range(3):
        save_photos(tmp_path / f"in/{seed}.safetensors", family, seed, scaled=is_scaled)
    narrow = replace(VAEConfig.from_family(family), block_out_channels=(8, 8, 8, 8), norm_num_groups=4)
    vae = VAE(random_model(replace(narrow, layers_per_block=1)), torch.device("cpu"), torch.float32, family)
    with caplog.at_level(logging.WARNING, "sdvae"):
        report = decode_dataset(tmp_path / "in", tmp_path / "out", vae, DecodeSettings(latents=told, space=family))
    assert report.num_written == 6
    if says is None:
        assert report.remarks == () and caplog.messages == []
    else:
        (remark,) = report.remarks
        assert says in remark and re.match(r"std \d", remark)
        assert caplog.messages == [f"{tmp_path / 'in'}: {remark}"]


def test_a_wrong_declaration_is_doubted_and_one_flat_image_is_not(small_vae: VAE, tmp_path: Path) -> None:
    for seed in range(3):
        save_photos(tmp_path / f"{seed}.safetensors", "sd1", seed, scaled=False, metadata={"latents": "scaled"})
    report = decode_dataset(tmp_path, tmp_path / "doubted", small_vae)
    (remark,) = report.remarks
    assert (
        remark == "std 3.9: these look raw, but their files say scaled; raw latents of this VAE have about 4.1, "
        "scaled ones about 0.75"
    )
    for seed in range(3):
        save_photos(tmp_path / f"{seed}.safetensors", "sd1", seed, scaled=False, metadata={"latents": "raw"})
    save_file({"latents": torch.full((1, 4, 8, 8), 0.5)}, tmp_path / "flat.safetensors", {"latents": "raw"})
    shutil.rmtree(tmp_path / "doubted")
    assert decode_dataset(tmp_path, tmp_path / "trusted", small_vae).remarks == ()
