"""A small store to damage, and ways to damage it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdvae.encoding.encode import encode_dataset
from sdvae.encoding.manifest import EncodeSettings
from sdvae.encoding.runners import uploading
from sdvae.encoding.tasks import Work, encode_tasks
from sdvae.store.geometry import Preprocess
from sdvae.store.remote import Mirror
from sdvae.vae import VAE

SETTINGS = EncodeSettings(Preprocess(size_px=32), shard_rows=3, batch_rows=2, num_threads=1)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven photos, one that breaks in the scan and one that breaks while it is encoded."""
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for number in range(7):
        Image.fromarray(noise.integers(0, 256, (40, 48, 3), np.uint8)).save(folder / f"{number}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "4-short.png").write_bytes((folder / "4.png").read_bytes()[:1000])
    return folder


@pytest.fixture(scope="session")
def pristine(photos: Path, small_vae: VAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pristine") / "out"
    encode(photos, out, small_vae)
    return out


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "out"))


@pytest.fixture(scope="session")
def first_photos(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the source held before it grew to `photos`."""
    folder = tmp_path_factory.mktemp("first")
    for name in ("0.png", "1.png", "2.png", "3.png", "broken.jpg"):
        shutil.copy(photos / name, folder)
    return folder


@pytest.fixture(scope="session")
def grown(first_photos: Path, photos: Path, small_vae: VAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two generations."""
    out = tmp_path_factory.mktemp("grown") / "out"
    encode(first_photos, out, small_vae)
    encode(photos, out, small_vae)
    return out


@pytest.fixture
def grown_root(grown: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(grown, tmp_path / "grown"))


def store_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and path.parent.name != "journal")


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def read_store(root: Path) -> dict[str, bytes]:
    """Every byte of a store, and whatever else lies there, but the journals."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in store_files(root)}


def encode(photos: Path, out: Path, vae: VAE) -> None:
    """The job of these tests: four shards."""
    encode_dataset(photos, out, vae, SETTINGS, work=Work(num_workers=0))


def encode_remotely(photos: Path, mirror: Mirror, vae: VAE) -> None:
    """The same job, into a store that is elsewhere."""
    mirror.pull()
    encode_dataset(
        photos, mirror.local, vae, SETTINGS, work=Work(num_workers=0), runner=uploading(encode_tasks, mirror)
    )
    mirror.finish()


@pytest.fixture(scope="session")
def expected(pristine: Path) -> dict[str, bytes]:
    """The bytes of a run that nobody disturbed."""
    return read_store(pristine)
