"""Masks and controls from pictures beside the photos: paired by name, cut as their photos are, read with latents."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from sdvae.cli.main import cli
from sdvae.encoding.encode import encode_dataset
from sdvae.encoding.manifest import EncodeSettings
from sdvae.encoding.pictures import encode_pictures, pair
from sdvae.encoding.tasks import Work
from sdvae.errors import StoreError
from sdvae.latents import scale
from sdvae.reading.dataset import LatentDataset
from sdvae.store.geometry import Preprocess
from sdvae.store.records import Record
from sdvae.store.store import Store
from sdvae.store.verify import verify
from sdvae.vae import VAE
from tests.conftest import SMALL, random_model
from tests.faults.conftest import read_store

SETTINGS = EncodeSettings(
    Preprocess(size_px=32, crop="random", seed=5, flip=True), shard_rows=4, batch_rows=2, num_threads=1
)
HERE = Work(num_workers=0)
SIZES = [(40, 48), (48, 40), (33, 50)]
NUM_PHOTOS = 9


def write_pictures(folder: Path, seed: int, scale: int = 1, mode: str = "RGB", suffix: str = ".png") -> Path:
    noise = np.random.default_rng(seed)
    for number in range(NUM_PHOTOS):
        path = folder / ("cats" if number % 2 else "") / f"{number:02d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = SIZES[number % 3]
        pixels = noise.integers(0, 256, (scale * height, scale * width, len(mode)), np.uint8)
        Image.fromarray(pixels.squeeze()).save(path)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine photos, and one that breaks while it is encoded."""
    folder = write_pictures(tmp_path_factory.mktemp("photos"), seed=0)
    (folder / "03-short.png").write_bytes((folder / "00.png").read_bytes()[:1000])
    return folder


@pytest.fixture
def out(photos: Path, tmp_path: Path, small_vae: VAE) -> Path:
    encode_dataset(photos, tmp_path / "out", small_vae, SETTINGS, work=HERE)
    return tmp_path / "out"


def lines_of(root: Path) -> dict[str, dict[str, Any]]:
    lines = [line for shard in Store.open(root).shards() for line in shard.records() if line["row"] is not None]
    return {line["key"]: line for line in lines}


def test_masks_are_the_mean_of_each_latents_pixels(out: Path, tmp_path: Path, small_vae: VAE) -> None:
    """Of masks of twice the size in another format, one of them missing, one broken and one of another shape."""
    masks = write_pictures(tmp_path / "masks", seed=1, scale=2, mode="L", suffix=".webp")
    for name in ("00", "02"):  # WebP loses; a few are kept exactly
        Image.open(masks / f"{name}.webp").save(masks / f"{name}.tiff")
        (masks / f"{name}.webp").unlink()
    (masks / "04.webp").unlink()
    (masks / "cats/05.webp").write_bytes((masks / "cats/05.webp").read_bytes()[:300])
    Image.new("L", (40, 40)).save(masks / "06.webp")
    report = encode_pictures(out, "mask", masks, small_vae, HERE)
    assert report.num_records == NUM_PHOTOS - 3 and sum(report.missing.values()) == 3
    assert report.missing["no picture of this name"] == report.missing["another aspect ratio than its photo"] == 1
    dataset, lines, seen = LatentDataset(out), lines_of(out), set()
    for place in range(2 * NUM_PHOTOS):
        example = dataset[place % NUM_PHOTOS, place]
        key = example["key"]
        assert example["mask"].shape == (1, 4, 4) and example["mask"].dtype == torch.float32
        if key in ("04.png", "cats/05.png", "06.png"):
            assert example["mask_length"] == 0 and bool((example["mask"] == 1).all())
            continue
        height, width = lines[key]["resized_px"]
        top, left, _, _ = lines[key]["crop_px"]
        (path,) = masks.glob(f"{key.removesuffix('.png')}.*")
        resized = Image.open(path).convert("L").resize((width, height), Image.Resampling.LANCZOS)
        pixels = np.asarray(resized.crop((left, top, left + 32, top + 32)), np.float64) / 255
        expected = pixels.reshape(4, 8, 4, 8).mean((1, 3))
        if example["is_flipped"]:
            expected = expected[:, ::-1]
        # fp16 has 11 bits; a grey WebP is read as colours, which differ by a level here and there.
        np.testing.assert_allclose(
            example["mask"][0].numpy(), expected, atol=1 / 1024 if path.suffix == ".tiff" else 3 / 255
        )
        assert example["mask_length"] == 1
        seen.add(bool(example["is_flipped"]))
    assert seen == {False, True}
    assert verify(out).damages == []


def test_controls_are_encoded_as_photos_of_their_own_would_be(
    out: Path, photos: Path, tmp_path: Path, small_vae: VAE
) -> None:
    pictures = write_pictures(tmp_path / "pictures", seed=2)
    before = read_store(out)
    encode_pictures(out, "control", pictures, small_vae, HERE)
    assert before.items() <= read_store(out).items()
    encode_dataset(pictures, tmp_path / "alone", small_vae, SETTINGS, work=HERE)
    alone = LatentDataset(tmp_path / "alone", sample=False)
    expected: dict[tuple[str, bool], torch.Tensor] = {}
    for shard in Store.open(tmp_path / "alone").shards():
        for is_flipped in (False, True):
            mean, _ = shard.moments(is_flipped)
            for line in shard.records():
                latents = torch.from_numpy(mean[line["row"]].astype(np.float32))[None]
                expected[line["key"], is_flipped] = scale(latents, alone.latent_scaling)[0]
    dataset, seen = LatentDataset(out), set()
    for epoch in range(2):
        batch = dataset[[(place, epoch) for place in range(NUM_PHOTOS)]]
        assert batch["control_length"].tolist() == [4] * NUM_PHOTOS
        for key, is_flipped, control in zip(batch["key"], batch["is_flipped"].tolist(), batch["control"], strict=True):
            assert torch.equal(control, expected[key, is_flipped])
            seen.add(is_flipped)
    assert seen == {False, True}


def test_what_is_missing_changes_no_bit_of_the_others_and_workers_change_none(
    out: Path, tmp_path: Path, small_vae: VAE
) -> None:
    pictures = write_pictures(tmp_path / "pictures", seed=2)
    encode_pictures(out, "control", pictures, small_vae, Work(num_workers=2))
    whole = LatentDataset(out, seed=1)
    (pictures / "02.png").unlink()
    encode_pictures(out, "control_2", pictures, small_vae, HERE)
    both = LatentDataset(out, seed=1)
    for place in range(NUM_PHOTOS):
        example = both[place]
        assert torch.equal(whole[place]["control"], example["control"])
        if example["key"] == "02.png":
            assert example["control_2_length"] == 0 and not example["control_2"].any()
        else:
            assert torch.equal(example["control_2"], example["control"])


def test_interrupted_pictures_go_on_with_the_next_shard(
    out: Path, tmp_path: Path, small_vae: VAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = write_pictures(tmp_path / "pictures", seed=2)
    encode_pictures(out, "control", pictures, small_vae, HERE)
    whole = read_store(out)
    for path in [*(out / "streams/control").glob("00001.*"), *(out / "streams/control").glob("00002.*")]:
        path.unlink()
    assert verify(out).is_unfinished
    num_encoded = 0
    encode = VAE.encode

    def counted(self: VAE, *arguments: Any) -> Any:
        nonlocal num_encoded
        num_encoded += 1
        return encode(self, *arguments)

    monkeypatch.setattr(VAE, "encode", counted)
    encode_pictures(out, "control", pictures, small_vae, HERE)
    assert read_store(out) == whole and num_encoded == 2 * 3, "three batches of five photos, each mirrored, too"
    encode_pictures(out, "control", pictures, small_vae, HERE)
    assert num_encoded == 2 * 3


def test_another_vae_makes_no_controls(out: Path, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", seed=2)
    other = VAE(random_model(SMALL, seed=1), torch.device("cpu"), torch.float32, name="another")
    with pytest.raises(StoreError, match=r"vae.fingerprint was"):
        encode_pictures(out, "control", pictures, other, HERE)
    assert not (out / "streams").exists()


def test_pictures_are_paired_by_key_and_in_doubt_not_at_all() -> None:
    def records(*keys: str) -> list[Record]:
        return [Record(key, original_px=(4, 4)) for key in keys]

    found = pair(
        records("a.jpg", "b.jpg", "b.png", "c.jpg", "d/a.jpg", "e.jpg", "f.jpg"),
        [*records("a.png", "b.png", "c.png", "c.webp", "e.jpg", "e.png"), Record("f.png", reason="truncated")],
    )
    keys = {key: one.key if isinstance(one, Record) else one for key, one in found.items()}
    assert keys == {
        "a.jpg": "a.png",
        "b.jpg": "b.png",
        "b.png": "b.png",
        "c.jpg": "several pictures or photos of this name",
        "d/a.jpg": "no picture of this name",
        "e.jpg": "e.jpg",
        "f.jpg": "truncated",
    }


def test_encode_takes_pictures_with_the_photos(photos: Path, tmp_path: Path) -> None:
    masks = write_pictures(tmp_path / "masks", seed=1, mode="L")
    arguments = [
        photos,
        tmp_path / "out",
        "--size",
        "32",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--with",
        f"mask={masks}",
    ]
    arguments += ["--with", f"edges={masks}"]
    done = CliRunner().invoke(cli, ["encode", *map(str, arguments)])
    assert done.exit_code == 3, done.output  # one photo is in quarantine
    assert "mask: of 9 photos" in done.output and "edges: of 9 photos" in done.output
    example = LatentDataset(tmp_path / "out")[0]
    assert example["mask"].shape == (1, 4, 4) and example["edges"].shape == example["latents"].shape
    for wrong in ("mask", "mask=", "latents=x"):
        assert CliRunner().invoke(cli, ["encode", str(photos), str(tmp_path / "no"), "--with", wrong]).exit_code in (
            1,
            2,
        )
    assert not (tmp_path / "no").exists()
