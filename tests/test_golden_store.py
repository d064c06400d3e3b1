"""Stores of before still open and grow; the reader that docs/store.md prints gives latents on the scale it promises."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import sdvae
from sdvae.config import FAMILIES
from sdvae.encoding import prepare
from sdvae.encoding.compact import compact
from sdvae.encoding.manifest import identify_run, recorded_settings
from sdvae.encoding.tasks import Work
from sdvae.errors import StoreError
from sdvae.store.store import Store
from sdvae.vae import VAE

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "store-1"
FACTORS = {"small": FAMILIES["sd1"].scaling_factor, "taesd": FAMILIES["sdxl"].scaling_factor}
Reader = Callable[[Path], Iterator[tuple[dict[str, Any], NDArray[np.float32], NDArray[np.float32]]]]


@pytest.fixture(params=["small", "taesd"])
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def vae(name: str, request: pytest.FixtureRequest) -> VAE:
    if name == "small":
        return VAE.load(device="cpu", dtype="fp32")
    folder: Path = request.getfixturevalue("data_dir")
    return VAE.load(folder / "weights" / "taesd_bf16" / "taesdxl_encoder.safetensors", device="cpu", dtype="fp32")


@pytest.fixture
def printed() -> Reader:
    """The reader as it stands in docs/store.md."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "store.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.partition("\nfor record, mean, std")[0], names)
    reader: Reader = names["read_store"]
    return reader


@pytest.fixture
def make_home(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes this machine the one that a store was begun on."""

    def make_home(root: Path) -> None:
        recorded = Store.open(root).manifest

        def on_the_machine_of_then(*arguments: Any) -> dict[str, Any]:
            return identify_run(*arguments) | {key: recorded[key] for key in ("compute", "decoder")}

        monkeypatch.setattr(prepare, "identify_run", on_the_machine_of_then)

    return make_home


def test_an_old_store_opens_verifies_and_is_read_with_its_scale(name: str, printed: Reader) -> None:
    root = GOLDEN / name
    assert b"latent_scaling" not in (root / "manifest.json").read_bytes()
    assert not sdvae.verify(root).damages
    dataset = sdvae.LatentDataset(root, sample=False)
    assert dataset.latent_scaling.scaling_factor == FACTORS[name]
    (shard,) = dataset.store.shards()
    mean, _ = shard.moments()
    assert [dataset[number]["caption"] for number in range(2)] == ["photo 0", "photo 1"]
    for number in range(2):
        np.testing.assert_allclose(
            dataset[number]["latents"], mean[number].astype(np.float32) * FACTORS[name], rtol=1e-6
        )
    if name == "small":  # of a TAESD's old store the reader's comment says what to take
        for (_, read, _), number in zip(printed(root), range(2), strict=True):
            np.testing.assert_allclose(read, dataset[number]["latents"], rtol=1e-5, atol=1e-7)


def test_an_old_store_grows(name: str, vae: VAE, make_home: Callable[[Path], None], tmp_path: Path) -> None:
    root, photos = tmp_path / name, tmp_path / "photos"
    shutil.copytree(GOLDEN / name, root)
    shutil.copytree(GOLDEN / "photos", photos)
    make_home(root)
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (70, 80, 3), np.uint8)).save(photos / "2.png")
    store = Store.open(root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != "quarantine.jsonl"}
    report = sdvae.encode_dataset(photos, root, vae, recorded_settings(store), work=Work(num_workers=0))
    assert (report.num_seen, report.num_written, report.quarantined) == (3, 3, {})
    assert {path: path.read_bytes() for path in before} == before
    assert not sdvae.verify(root).damages
    dataset = sdvae.LatentDataset(root, sample=False)
    assert [dataset[number]["key"] for number in range(3)] == ["0.jpg", "1.jpg", "2.png"]
    assert 0.3 < float(dataset[2]["latents"].std()) < 3  # the new shard is on the same scale
    np.testing.assert_allclose(
        dataset[2]["latents"], vae.scale(vae.encode_images([cropped(photos / "2.png")]).latents[0])[0], atol=0.05
    )


def test_an_old_store_changes_once_it_is_compacted(
    name: str, vae: VAE, make_home: Callable[[Path], None], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(GOLDEN / name, tmp_path / "old"))
    make_home(root)
    photos = Path(shutil.copytree(GOLDEN / "photos", tmp_path / "photos"))
    (photos / "0.txt").write_text("another text")
    settings, work = recorded_settings(Store.open(root)), Work(num_workers=0)
    with pytest.raises(StoreError, match=r"of version 1, which can only grow, .*label \(0\.jpg\).*; sdvae compact"):
        sdvae.encode_dataset(photos, root, vae, settings, work=work)
    assert compact(root, tmp_path / "new") == 2
    make_home(tmp_path / "new")
    before = Store.open(root).shards()[0].records()
    assert Store.open(tmp_path / "new").shards()[0].records() == before
    report = sdvae.encode_dataset(photos, tmp_path / "new", vae, settings, work=work)
    assert report.changes["texts"] == 1 and not sdvae.verify(tmp_path / "new").damages
    assert sdvae.LatentDataset(tmp_path / "new")[0]["caption"] == "another text"


def test_the_store_of_version_2_opens_verifies_and_is_read_as_printed(printed: Reader) -> None:
    root = GOLDEN.parent / "store-2" / "small"
    assert not sdvae.verify(root).damages
    newest, first = (sdvae.LatentDataset(root, sample=False, generation=number) for number in (None, 0))
    told = [[(one[number]["key"], one[number]["caption"]) for number in range(len(one))] for one in (newest, first)]
    assert told == [
        [("0.jpg", "another text"), ("2.jpg", "photo 1"), ("3.jpg", "")],
        [("0.jpg", "photo 0"), ("1.jpg", "photo 1")],
    ]
    for (record, mean, _), number in zip(printed(root), range(3), strict=True):
        assert (record["key"], record["caption"] or "") == told[0][number]
        np.testing.assert_allclose(mean, newest[number]["latents"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["small"])
def test_the_store_of_version_2_goes_on_as_it_is(vae: VAE, make_home: Callable[[Path], None], tmp_path: Path) -> None:
    root = Path(shutil.copytree(GOLDEN.parent / "store-2" / "small", tmp_path / "small"))
    make_home(root)
    photos = Path(shutil.copytree(GOLDEN.parent / "store-2" / "photos", tmp_path / "photos"))
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    settings, work = recorded_settings(Store.open(root)), Work(num_workers=0)
    assert not any(sdvae.encode_dataset(photos, root, vae, settings, work=work).changes.values())
    assert {path: path.read_bytes() for path in before} == before and len(Store.open(root).rosters) == 2
    (photos / "0.jpg").unlink()
    assert sdvae.encode_dataset(photos, root, vae, settings, work=work).changes["vanished"] == 1
    assert {path: path.read_bytes() for path in before} == before and not sdvae.verify(root).damages


def cropped(path: Path) -> Image.Image:
    image = Image.open(path)
    return image.resize((73, 64), Image.Resampling.LANCZOS).crop((4, 0, 68, 64))


@pytest.mark.parametrize("weights", [None, "taesd_encoder.safetensors"])
def test_the_printed_reader_gives_the_scale_of_diffusion_models(
    weights: str | None, printed: Reader, data_dir: Path, tmp_path: Path
) -> None:
    """Whoever forgets the factor finds 4.4; a tenth either way is the photos' share (Kodak's give 0.62 and 0.71)."""
    spec = None if weights is None else data_dir / "weights" / "taesd_bf16" / weights
    vae = VAE.load(spec, device="cpu", dtype="fp32")
    photos = sorted((data_dir / "train" / "cid22_train").iterdir())[::8]
    settings = sdvae.EncodeSettings(sdvae.Preprocess(size_px=128), num_threads=1)
    sdvae.encode_dataset(map(Image.open, photos), tmp_path / "store", vae, settings, work=Work(num_workers=0))
    noise = np.random.default_rng(0)
    read = list(printed(tmp_path / "store"))
    samples = np.stack([mean + std * noise.standard_normal(mean.shape, np.float32) for _, mean, std in read])
    assert len(read) == len(photos) >= 24
    assert abs(float(samples.std()) - 0.8) <= 0.1
