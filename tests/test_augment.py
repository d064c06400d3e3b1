"""Augmentation: labels and captions stay, the same call gives the same bytes, a kill leaves no half file."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdvae import VAE, augment_dataset
from sdvae.errors import ConfigError, OutputError, SourceError
from sdvae.explore.augment import TABLE
from sdvae.sources.open import open_source
from sdvae.store.geometry import Preprocess
from tests.linear_vae import IdentityVAE

OWN_SIZE = Preprocess(None, "none")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for seed, name in enumerate(("cat/a.png", "cat/a.jpg", "dog/a.png", "dog/b.png")):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(80, 180, (16, 19, 3), np.uint8)).save(folder / name)
    (folder / "dog" / "b.txt").write_text("a dog, called b")
    (folder / "dog" / "b.cls").write_text("poodle")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folders_labels_and_captions_are_those_of_the_source(photos: Path, tmp_path: Path, small_vae: VAE) -> None:
    report = augment_dataset(photos, tmp_path / "out", small_vae, num_copies=2, preprocess=OWN_SIZE)
    assert (report.num_photos, report.num_written, report.left_out) == (4, 8, {})
    made = open_source(tmp_path / "out")
    entries = {entry.key: entry for entry in made.entries()}
    assert not made.remarks
    assert list(entries) == [
        "cat/a.jpg-0.png", "cat/a.jpg-1.png", "cat/a.png-0.png", "cat/a.png-1.png",
        "dog/a-0.png", "dog/a-1.png", "dog/b-0.png", "dog/b-1.png",
    ]  # fmt: skip
    assert [entry.label for entry in entries.values()] == ["cat"] * 4 + ["dog"] * 2 + ["poodle"] * 2
    assert [entry.caption for entry in entries.values()] == [None] * 6 + ["a dog, called b"] * 2
    lines = [json.loads(line) for line in (tmp_path / "out" / TABLE).read_bytes().splitlines()]
    assert [line["source_key"] for line in lines[:4]] == ["cat/a.jpg"] * 2 + ["cat/a.png"] * 2
    with Image.open(tmp_path / "out" / "dog" / "b-1.png") as image:
        assert image.size == (19, 16), "the padding is cut off again"


def test_the_same_call_gives_the_same_bytes_and_each_copy_is_another(
    photos: Path, tmp_path: Path, small_vae: VAE
) -> None:
    outs = {}
    for name, seed, batch_size in (("a", 1, 1), ("b", 1, 3), ("c", 2, 1)):
        augment_dataset(
            photos, tmp_path / name, small_vae, num_copies=2, seed=seed, batch_size=batch_size, preprocess=OWN_SIZE
        )
        outs[name] = contents(tmp_path / name)
    assert outs["a"] == outs["b"]
    pictures = [name for name in outs["a"] if name != TABLE]
    assert all(outs["a"][name] != outs["c"][name] for name in pictures)
    assert len({outs["a"][name] for name in pictures}) == 8


def test_strength_is_the_size_of_the_move(photos: Path, tmp_path: Path) -> None:
    """Where latents are pixels and the posterior is a point, a copy is the photo and noise of that std."""
    with Image.open(photos / "dog" / "a.png") as image:
        before = np.asarray(image).astype(float)
    for strength in (0.0, 0.1):
        out = tmp_path / str(strength)
        augment_dataset(photos, out, IdentityVAE(), strength=strength, preprocess=OWN_SIZE)
        with Image.open(out / "dog" / "a-0.png") as image:
            moves = (np.asarray(image) - before) / 127.5
        assert moves.std() == pytest.approx(strength, abs=0.01) and abs(moves.mean()) < 0.02


@pytest.mark.parametrize("what", ["a file in it", "a file of its name", "the source", "inside the source", "around it"])
def test_nothing_is_overwritten_or_mixed(photos: Path, tmp_path: Path, small_vae: VAE, what: str) -> None:
    source = tmp_path / "around" / "photos"
    source.mkdir(parents=True)
    (source / "a.png").write_bytes((photos / "dog" / "a.png").read_bytes())
    out = tmp_path / "out"
    if what == "a file in it":
        out.mkdir()
        (out / "x").write_text("mine")
    elif what == "a file of its name":
        out.write_text("mine")
    else:
        out = {"the source": source, "inside the source": source / "out", "around it": tmp_path / "around"}[what]
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=r"nothing was touched|is a file|lie in each other"):
        augment_dataset(source, out, small_vae, preprocess=OWN_SIZE)
    assert contents(tmp_path) == before


def test_photos_that_cannot_be_read_are_left_out(photos: Path, tmp_path: Path, small_vae: VAE) -> None:
    source = tmp_path / "photos"
    source.mkdir()
    (source / "x.png").write_bytes(b"no photo")
    with pytest.raises(SourceError, match=r"no photo of .* can be read: "):
        augment_dataset(source, tmp_path / "none", small_vae)
    (source / "a.png").write_bytes((photos / "dog" / "a.png").read_bytes())
    report = augment_dataset(source, tmp_path / "one", small_vae, preprocess=OWN_SIZE)
    assert report.num_written == 1 and list(report.left_out) == ["x.png"]
    assert sorted(contents(tmp_path / "one")) == ["a-0.png", TABLE]


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"num_copies": 0}, "0 copies are nothing to write"), ({"strength": -0.1}, "a strength of -0.1 is none"),
     ({"strength": float("nan")}, "a strength of nan is none")],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(
    photos: Path, tmp_path: Path, small_vae: VAE, settings: dict[str, float], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        augment_dataset(photos, tmp_path / "out", small_vae, **settings)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


_KILLED = """
import os, signal, sys
from sdvae import VAE, Preprocess, atomic, augment_dataset

num_left = 4

def hook(operation, path):
    global num_left
    num_left -= operation == "replace"
    if num_left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

atomic.hook = hook
source, out, vae = sys.argv[1:]
augment_dataset(source, out, VAE.load(vae, "cpu", "fp32"), num_copies=2, preprocess=Preprocess(None, "none"))
"""


def test_a_kill_leaves_whole_files_and_no_table(photos: Path, tmp_path: Path, small_vae: VAE) -> None:
    small_vae.save(tmp_path / "vae")
    out = tmp_path / "killed"
    command = [sys.executable, "-c", _KILLED, str(photos), str(out), str(tmp_path / "vae")]
    assert subprocess.run(command, timeout=300, check=False).returncode == -signal.SIGKILL
    augment_dataset(photos, tmp_path / "whole", small_vae, num_copies=2, preprocess=OWN_SIZE)
    left = {name: data for name, data in contents(out).items() if not name.endswith(".tmp")}
    expected = contents(tmp_path / "whole")
    assert len(left) == 3 and TABLE not in left
    assert all(data == expected[name] for name, data in left.items())
    with pytest.raises(OutputError, match="holds cat, dog; nothing was touched"):
        augment_dataset(photos, out, small_vae)
