import errno
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sdvae import atomic
from sdvae.config import VAEConfig
from sdvae.encoding import encode, manifest
from sdvae.encoding.encode import EncodeReport
from sdvae.encoding.manifest import EncodeSettings, fixed_threads
from sdvae.encoding.resize import apply
from sdvae.encoding.tasks import Work
from sdvae.errors import ConfigError, OutputError, SourceError, StoreError, VerifyError
from sdvae.images.read import read_image
from sdvae.pixels import to_pixels
from sdvae.posterior import DiagonalGaussian
from sdvae.sources.open import FolderSource
from sdvae.store.geometry import Preprocess, plan_geometry
from sdvae.store.records import Record
from sdvae.store.roster import Task
from sdvae.store.store import Store
from sdvae.store.verify import verify
from sdvae.vae import VAE
from tests.conftest import SMALL, random_model

SETTINGS = EncodeSettings(Preprocess(size_px=32), shard_rows=4, batch_rows=2, num_threads=1)
WHOLE = EncodeSettings(Preprocess(size_px=None, crop="none"), shard_rows=4, batch_rows=2, num_threads=1)
FEW = replace(SETTINGS, shard_rows=2)
NUM_PHOTOS, NUM_BROKEN = 11, 3

# Decoding on a thread; test_pipeline.py does it in processes, whose start would take the most of these tests' time.
encode_dataset = partial(encode.encode_dataset, work=Work(num_workers=0))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eleven photos of three sizes in two folders, two broken files and a link that leads out."""
    folder = tmp_path / "photos"
    (folder / "cats").mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(NUM_PHOTOS):
        height, width = [(40, 48), (48, 40), (33, 50)][number % 3]
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
        image.save(folder / ("cats" if number % 2 else "") / f"{number:02d}.png")
    (folder / "00-broken.jpg").write_bytes(b"no image")
    whole = (folder / "00.png").read_bytes()
    (folder / "01-short.png").write_bytes(whole[: len(whole) // 2])  # its header is fine
    (folder / "02-out.png").symlink_to("/etc/hostname")
    return folder


def _files(root: Path) -> dict[str, bytes]:
    """Every byte that must not depend on chance."""
    paths = [path for path in sorted(root.rglob("*")) if path.is_file() and path.parent.name != "journal"]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def _rows(store: Store) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    found = {}
    for shard in store.shards():
        mean, logvar = shard.moments()
        for line in shard.records():
            if line["row"] is not None:
                found[line["key"]] = (mean[line["row"]], logvar[line["row"]])
    return found


def test_every_photo_is_written_or_quarantined_with_a_reason(photos: Path, tmp_path: Path, small_vae: VAE) -> None:
    report = encode_dataset(photos, tmp_path / "out", small_vae, SETTINGS)
    store = Store.open(tmp_path / "out")
    assert report.num_seen == NUM_PHOTOS + NUM_BROKEN
    assert report.num_written == NUM_PHOTOS
    assert sum(report.quarantined.values()) == NUM_BROKEN
    lines = [line for shard in store.shards() for line in shard.records()]
    assert len({line["key"] for line in lines}) == len(lines) == report.num_seen
    failed = {line["key"]: (line["status"], line["step"]) for line in lines if line["row"] is None}
    assert failed == {
        "00-broken.jpg": ("quarantined", "decode"),
        "01-short.png": ("quarantined", "decode"),
        "02-out.png": ("quarantined", "scan"),
    }
    assert all(line["reason"] and str(tmp_path) not in line["reason"] for line in lines if line["row"] is None)
    assert {line["label"] for line in lines} == {None, "cats"}
    assert verify(store.paths.root).damages == []


def test_the_latents_are_those_of_the_vae_in_float16(photos: Path, tmp_path: Path, small_vae: VAE) -> None:
    for settings in (SETTINGS, WHOLE):
        out = tmp_path / str(settings.preprocess.crop)
        encode_dataset(photos, out, small_vae, settings)
        rows = _rows(Store.open(out))
        assert len(rows) == NUM_PHOTOS
        for key, (mean, logvar) in rows.items():
            image = read_image(photos / key)
            geometry = plan_geometry(*image.shape[:2], settings.preprocess, small_vae.config.downscale)
            with fixed_threads(1):
                posterior = small_vae.encode(to_pixels(apply(image, geometry)[None]))
            for stored, exact in ((mean, posterior.mean), (logvar, posterior.logvar)):
                # A batch of one may sum in another order than a batch of two; fp16 has 11 bits.
                np.testing.assert_allclose(stored.astype(np.float32), exact[0].numpy(), rtol=6e-4, atol=1e-4)


def test_whole_photos_make_one_series_of_shards_for_each_shape(photos: Path, tmp_path: Path, small_vae: VAE) -> None:
    encode_dataset(photos, tmp_path / "out", small_vae, WHOLE)
    store = Store.open(tmp_path / "out")
    shapes = [(shard.bucket_px, shard.num_rows) for shard in store.shards()]
    assert shapes == [((40, 48), 3), ((40, 48), 1), ((40, 56), 3), ((48, 40), 4), (None, 0)]
    line = next(line for line in store.shard(2).records() if line["key"] == "02.png")
    assert (line["original_px"], line["resized_px"], line["crop_px"]) == ([33, 50], [33, 50], [0, 0, 40, 56])


def test_two_runs_give_the_same_bytes_and_a_third_changes_nothing(
    photos: Path, tmp_path: Path, small_vae: VAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encode_dataset(photos, tmp_path / "a", small_vae, SETTINGS)
    encode_dataset(photos, tmp_path / "b", small_vae, SETTINGS)
    assert _files(tmp_path / "a") == _files(tmp_path / "b")
    for name, data in _files(tmp_path / "a").items():
        assert str(tmp_path).encode() not in data, name
    before = _files(tmp_path / "a")

    def refuse(self: VAE, pixels: Tensor) -> DiagonalGaussian:
        raise AssertionError("everything is encoded already")

    monkeypatch.setattr(VAE, "encode", refuse)
    again = encode_dataset(photos, tmp_path / "a", small_vae, SETTINGS)
    assert _files(tmp_path / "a") == before
    assert (again.num_seen, again.num_written, again.quarantined) == (
        first.num_seen, first.num_written, first.quarantined,
    )  # fmt: skip
    assert again.images_per_s == 0.0


def test_a_failed_record_changes_no_other_record(photos: Path, tmp_path: Path, small_vae: VAE) -> None:
    """It keeps its place in the batch: a shard with a hole is computed as one without."""
    encode_dataset(photos, tmp_path / "a", small_vae, SETTINGS)
    whole = photos / "cats" / "03.png"
    data = bytearray(whole.read_bytes())
    data[len(data) // 2] ^= 0xFF  # the header still tells its size
    whole.write_bytes(data)
    report = encode_dataset(photos, tmp_path / "b", small_vae, SETTINGS)
    assert report.num_written == NUM_PHOTOS - 1
    before, after = _rows(Store.open(tmp_path / "a")), _rows(Store.open(tmp_path / "b"))
    assert before.keys() - after.keys() == {"cats/03.png"}
    for key, moments in after.items():
        assert all(np.array_equal(one, other) for one, other in zip(before[key], moments, strict=True))


def test_batches_and_shards_of_large_photos_are_smaller(small_vae: VAE) -> None:
    records = tuple(Record(str(number)) for number in range(20))
    lengths = {
        size: [len(batch) for batch in Task(0, (size, size), records).batches(8)] for size in (64, 512, 1024, 4096)
    }
    assert lengths == {64: [8, 8, 4], 512: [8, 8, 4], 1024: [2] * 10, 4096: [1] * 20}
    assert manifest.max_rows(small_vae, EncodeSettings(), (512, 512)) == 1024
    assert manifest.max_rows(small_vae, EncodeSettings(), (4096, 4096)) == 2**27 // (4 * 512 * 512 * 2)
    assert manifest.max_rows(small_vae, EncodeSettings(), (2**16, 2**16)) == 1


# --- Numbers that are no numbers ---


class Faulty:
    """A VAE that gives what it is told to for photos whose first pixel is black."""

    def __init__(self, vae: VAE, value: float) -> None:
        self.vae, self.value = vae, value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.vae, name)

    def encode(self, pixels: Tensor, budget: int | None = None) -> DiagonalGaussian:
        posterior = self.vae.encode(pixels, budget)
        posterior.mean[pixels[:, :, 0, 0].eq(-1).all(1), 0, 0, 0] = self.value
        return posterior


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 70_000.0])
def test_latents_that_are_not_finite_are_quarantined(
    photos: Path, tmp_path: Path, small_vae: VAE, value: float
) -> None:
    Image.new("RGB", (32, 32)).save(photos / "black.png")
    report = encode_dataset(photos, tmp_path / "out", Faulty(small_vae, value), SETTINGS)  # type: ignore[arg-type]
    store = Store.open(tmp_path / "out")
    assert report.num_written == NUM_PHOTOS
    (line,) = [line for line in store.quarantined() if line["key"] == "black.png"]
    assert line["step"] == "encode" and "float16" in line["reason"]
    for shard in store.shards():
        assert all(np.isfinite(values).all() for values in shard.moments())
    assert verify(store.paths.root).damages == []


def test_what_does_not_fit_float16_fits_float32(photos: Path, tmp_path: Path, small_vae: VAE) -> None:
    Image.new("RGB", (32, 32)).save(photos / "black.png")
    settings = EncodeSettings(Preprocess(size_px=32), store_dtype="fp32", num_threads=1)
    encode_dataset(photos, tmp_path / "out", Faulty(small_vae, 70_000.0), settings)  # type: ignore[arg-type]
    mean, _ = _rows(Store.open(tmp_path / "out"))["black.png"]
    assert mean.dtype == np.float32 and mean[0, 0, 0] == 70_000.0


# --- A source that moves ---


class MovingSource(FolderSource):
    """Changes files between the scan and the encoding."""

    def read(self, key: str) -> bytes:
        path = self.root / key
        if (self.root / ".scanned").exists():
            if key == "00.png":
                path.write_bytes(path.read_bytes() + b"more")
            if key == "02.png":
                path.unlink()
        return super().read(key)


def test_a_photo_that_changes_after_the_scan_is_quarantined_and_then_encoded(
    photos: Path, tmp_path: Path, small_vae: VAE
) -> None:
    def move(phase: str, num_done: int, num_all: int) -> None:
        if phase == "encode":
            (photos / ".scanned").touch()

    report = encode_dataset(MovingSource(photos), tmp_path / "out", small_vae, SETTINGS, progress=move)
    assert report.num_written == NUM_PHOTOS - 2
    found = {line["key"]: (line["step"], line["reason"]) for line in Store.open(tmp_path / "out").quarantined()}
    assert found["00.png"] == ("read", "changed after the scan")
    assert found["02.png"] == ("read", "vanished after the scan")
    again = encode_dataset(photos, tmp_path / "out", small_vae, SETTINGS)
    assert (again.num_written, again.num_seen) == (NUM_PHOTOS - 1, NUM_PHOTOS + NUM_BROKEN - 1)
    assert again.changes == {"added": 0, "changed": 1, "vanished": 1, "renamed": 0, "texts": 0}


def test_a_grown_source_makes_a_generation_of_shards(photos: Path, tmp_path: Path, small_vae: VAE) -> None:
    out = tmp_path / "out"
    encode_dataset(photos, out, small_vae, SETTINGS)
    before, num_shards = _files(out), Store.open(out).num_shards
    for name in ("00-new.png", "zz-new.png"):
        (photos / name).write_bytes((photos / "cats" / "03.png").read_bytes())
    (photos / "zz-broken.png").write_bytes(b"no image")
    report = encode_dataset(photos, out, small_vae, SETTINGS)
    assert (report.num_seen, report.num_written) == (NUM_PHOTOS + NUM_BROKEN + 3, NUM_PHOTOS + 2)
    assert sum(report.quarantined.values()) == NUM_BROKEN + 1

    store = Store.open(out)
    assert store.num_shards == num_shards + 2 and len(store.rosters) == 2
    after = _files(out)
    assert {name: after[name] for name in before if name != "quarantine.jsonl"} == {
        name: data for name, data in before.items() if name != "quarantine.jsonl"
    }
    assert [line["key"] for line in store.shard(num_shards).records()] == ["00-new.png", "zz-new.png"]
    rows = _rows(store)
    assert np.allclose(rows["00-new.png"][0], rows["cats/03.png"][0], rtol=2e-3, atol=2e-3)
    assert verify(out).damages == []

    encode_dataset(photos, out, small_vae, SETTINGS)
    assert _files(out) == after


def test_a_store_may_grow_before_it_is_finished(photos: Path, tmp_path: Path, small_vae: VAE) -> None:
    class StoppedError(Exception):
        pass

    def stop(phase: str, num_done: int, num_all: int) -> None:
        if phase == "encode" and num_done > 5:
            raise StoppedError

    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        encode_dataset(photos, out, small_vae, SETTINGS, progress=stop)
    Image.new("RGB", (40, 40)).save(photos / "new.png")
    encode_dataset(photos, out, small_vae, SETTINGS)
    (photos / "new.png").rename(tmp_path / "new.png")
    encode_dataset(photos, tmp_path / "expected", small_vae, SETTINGS)
    (tmp_path / "new.png").rename(photos / "new.png")
    encode_dataset(photos, tmp_path / "expected", small_vae, SETTINGS)
    assert _files(out) == _files(tmp_path / "expected")


def test_a_listing_that_did_not_change_is_not_scanned_again(photos: Path, begun: Path, small_vae: VAE) -> None:
    phases: set[str] = set()
    encode_dataset(photos, begun, small_vae, SETTINGS, progress=lambda phase, done, all_: phases.add(phase))
    assert phases == {"encode"}
    (begun / "journal" / "listing.json").unlink()
    encode_dataset(photos, begun, small_vae, SETTINGS, progress=lambda phase, done, all_: phases.add(phase))
    assert phases == {"encode", "scan"}


def test_a_damaged_roster_is_said_so(photos: Path, begun: Path, small_vae: VAE) -> None:
    roster = begun / "roster" / "00000.jsonl"
    roster.write_bytes(roster.read_bytes().replace(b"cats", b"dogs"))
    with pytest.raises(VerifyError, match=r"00000.jsonl is damaged or missing; sdvae verify --repair"):
        encode_dataset(photos, begun, small_vae, SETTINGS)


# --- Refusals ---


@pytest.fixture
def begun(photos: Path, tmp_path: Path, small_vae: VAE) -> Path:
    encode_dataset(photos, tmp_path / "out", small_vae, SETTINGS)
    return tmp_path / "out"


def test_a_survey_tells_what_would_be_done_and_writes_nothing(
    photos: Path, tmp_path: Path, small_vae: VAE, caplog: pytest.LogCaptureFixture
) -> None:
    settings = replace(SETTINGS, preprocess=Preprocess(size_px=32, max_upscale=0.9))  # refuses sides of 33 px
    found = encode.survey(photos, tmp_path / "out", small_vae, settings)
    assert not (tmp_path / "out").exists()
    small = "too small: it would have to be enlarged by more than 0.9"
    assert found.sizes == {(32, 32): 9} and found.quarantined[small] == 3 and len(found.quarantined) == 3
    told: list[tuple[str, int, int]] = []
    report = encode_dataset(photos, tmp_path / "out", small_vae, settings, progress=lambda *now: told.append(now))
    assert f"3 photos will not be encoded: {small}; --max-upscale N allows it" in caplog.messages
    assert told[-1] == ("encode", 9, 9), "what is not encoded is not counted"
    assert (report.num_seen, report.num_written) == (found.num_seen, 8)  # one header promised too much
    tensors = sum(file.stat().st_size - 4096 for file in (tmp_path / "out" / "shards").iterdir())
    assert found.num_bytes == tensors // 8 * 9
    again = encode.survey(photos, tmp_path / "out", small_vae, settings)
    assert (again.sizes, again.quarantined) == ({}, {}), "all of it is there"
    with pytest.raises(StoreError, match="was begun with other settings"):
        encode.survey(photos, tmp_path / "out", small_vae, SETTINGS)


def test_a_limit_takes_the_first_photos_and_a_later_run_the_others(
    photos: Path, tmp_path: Path, small_vae: VAE
) -> None:
    assert encode_dataset(photos, tmp_path / "out", small_vae, SETTINGS, limit=5).num_seen == 5
    report = encode_dataset(photos, tmp_path / "out", small_vae, SETTINGS)
    assert (report.num_seen, report.num_written) == (NUM_PHOTOS + NUM_BROKEN, NUM_PHOTOS)
    assert len(Store.open(tmp_path / "out").rosters) == 2


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        (EncodeSettings(Preprocess(size_px=40), shard_rows=4, num_threads=1), "preprocess.size_px was 32, now 40"),
        (EncodeSettings(Preprocess(32, "none"), shard_rows=4), 'preprocess.crop was "center", now "none"'),
        (EncodeSettings(Preprocess(32, background=(0, 0, 0)), shard_rows=4), "preprocess.background was [255"),
        (EncodeSettings(Preprocess(32), shard_rows=5), "shard_rows was 4, now 5"),
        (EncodeSettings(Preprocess(32), "fp32", shard_rows=4), 'store_dtype was "fp16", now "fp32"'),
        (EncodeSettings(Preprocess(32), shard_rows=4, batch_rows=3), "compute.batch_rows was 2, now 3"),
        (EncodeSettings(Preprocess(32), shard_rows=4, num_threads=2), "compute.num_threads was 1, now 2"),
    ],
)
def test_other_settings_are_refused_and_listed(
    photos: Path, begun: Path, small_vae: VAE, settings: EncodeSettings, difference: str
) -> None:
    before = _files(begun)
    with pytest.raises(StoreError) as caught:
        encode_dataset(photos, begun, small_vae, settings)
    assert difference in str(caught.value) and "--restart" in str(caught.value)
    assert _files(begun) == before


def test_all_differences_are_listed_at_once(photos: Path, begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = VAE(random_model(SMALL, seed=1), torch.device("cpu"), torch.float32, name="another")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "NEON")
    settings = EncodeSettings(Preprocess(size_px=40), shard_rows=8)
    with pytest.raises(StoreError) as caught:
        encode_dataset(photos, begun, other, settings)
    for name in ("vae.fingerprint", "compute.cpu_capability", "preprocess.size_px", "shard_rows"):
        assert f"{name} was" in str(caught.value)
    assert "num_threads" not in str(caught.value)


def test_what_was_chosen_once_is_not_chosen_again(
    photos: Path, begun: Path, small_vae: VAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher may export other threads when it resumes; the recorded ones count."""
    before = _files(begun)
    (begun / "done" / "00001.json").unlink()
    used: list[tuple[int, int]] = []
    run = VAE.encode

    def note(self: VAE, pixels: Tensor, budget: int | None) -> DiagonalGaussian:
        used.append((torch.get_num_threads(), len(pixels)))
        return run(self, pixels, budget)

    monkeypatch.setattr(VAE, "encode", note)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        encode_dataset(photos, begun, small_vae, EncodeSettings(Preprocess(size_px=32), shard_rows=4))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert set(used) == {(1, 2)}
    assert _files(begun) == before


def test_what_to_continue_with_is_told(begun: Path, tmp_path: Path) -> None:
    store = Store.find(begun)
    assert store is not None and store.manifest["compute"]["dtype"] == "fp32"
    assert Store.find(tmp_path / "new") is None
    (begun / "manifest.json").write_text("{}")
    with pytest.raises(StoreError, match="not the manifest of a latent store"):
        Store.find(begun)


def test_a_lost_shard_is_encoded_again(photos: Path, begun: Path, small_vae: VAE) -> None:
    before = _files(begun)
    (begun / "index" / "00000.jsonl").unlink()
    shard = next((begun / "shards").glob("00001-*"))
    shard.write_bytes(shard.read_bytes()[:5000])
    encode_dataset(photos, begun, small_vae, SETTINGS)
    assert _files(begun) == before


def test_a_damaged_manifest_or_commit_is_said_so(photos: Path, begun: Path, small_vae: VAE) -> None:
    done = begun / "done" / "00000.json"
    data = done.read_bytes()
    done.write_bytes(data.replace(b"shard", b"Shard"))
    with pytest.raises(VerifyError, match=r"00000.json is damaged"):
        encode_dataset(photos, begun, small_vae, SETTINGS)
    done.write_bytes(data)
    manifest = begun / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-10])
    with pytest.raises(VerifyError, match=r"manifest.json is damaged"):
        encode_dataset(photos, begun, small_vae, SETTINGS)


def test_restart_throws_the_store_away_and_nothing_else(photos: Path, begun: Path, small_vae: VAE) -> None:
    other = EncodeSettings(Preprocess(size_px=40), shard_rows=8, num_threads=1)
    report = encode_dataset(photos, begun, small_vae, other, restart=True)
    assert report.num_written == NUM_PHOTOS
    store = Store.open(begun)
    assert store.manifest["preprocess"]["size_px"] == 40 and verify(store.paths.root).damages == []
    assert len(_files(begun)) == 3 + 3 * len(store.shards())  # no file of the old store is left

    (begun / "notes.txt").write_text("mine")
    before = _files(begun)
    with pytest.raises(StoreError, match=r"files that no store has \(notes.txt\); nothing was touched"):
        encode_dataset(photos, begun, small_vae, SETTINGS, restart=True)
    assert _files(begun) == before
    encode_dataset(photos, begun, small_vae, other)  # to go on beside them is fine


@pytest.mark.parametrize("restart", [False, True])
def test_an_output_that_holds_something_else_is_left_untouched(
    photos: Path, tmp_path: Path, small_vae: VAE, restart: bool
) -> None:
    out = tmp_path / "out"
    for name in ("manifest.json", "thesis.tex", "shards/00000-8x8.safetensors", "a/b"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    before = _files(out)
    with pytest.raises(StoreError, match="not the manifest of a latent store"):
        encode_dataset(photos, out, small_vae, SETTINGS, restart=restart)
    (out / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"\(a/b, thesis.tex\); nothing was touched"):
        encode_dataset(photos, out, small_vae, SETTINGS, restart=restart)
    assert _files(out) == {name: data for name, data in before.items() if name != "manifest.json"}


def test_commits_without_their_manifest_are_not_continued(photos: Path, begun: Path, small_vae: VAE) -> None:
    before = _files(begun)
    (begun / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"its manifest.json is gone; .* or start again with --restart"):
        encode_dataset(photos, begun, small_vae, SETTINGS)
    encode_dataset(photos, begun, small_vae, SETTINGS, restart=True)
    assert _files(begun) == before


def test_source_and_output_must_lie_apart(photos: Path, tmp_path: Path, small_vae: VAE) -> None:
    (tmp_path / "link").symlink_to(photos)
    for out in (photos, photos / "latents", tmp_path / "link" / "latents", photos / "cats" / ".." / "x"):
        with pytest.raises(StoreError, match="lies in the source"):
            encode_dataset(photos, out, small_vae, SETTINGS)
    with pytest.raises(StoreError, match=r"the source .* lies in"):
        encode_dataset(photos, tmp_path, small_vae, SETTINGS)
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "link"}
    assert not (photos / "latents").exists()


def test_nothing_is_made_for_input_that_cannot_be_encoded(photos: Path, tmp_path: Path, small_vae: VAE) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty" / ".hidden").mkdir(parents=True)
    with pytest.raises(SourceError, match="holds no photos"):
        encode_dataset(tmp_path / "empty", out, small_vae, SETTINGS)
    with pytest.raises(ConfigError, match="no multiple of 8"):
        encode_dataset(photos, out, small_vae, EncodeSettings(Preprocess(size_px=33)))
    with pytest.raises(ConfigError, match="shard_rows is 0"):
        encode_dataset(photos, out, small_vae, EncodeSettings(shard_rows=0))
    with pytest.raises(ConfigError, match="store_dtype"):
        encode_dataset(photos, out, small_vae, EncodeSettings(store_dtype="int8"))  # type: ignore[arg-type]
    assert not out.exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="is not a folder"):
        encode_dataset(photos, tmp_path / "file", small_vae, SETTINGS)
    with pytest.raises(OutputError, match="Not a directory"):
        encode_dataset(photos, tmp_path / "file" / "out", small_vae, SETTINGS)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_read_only_output_is_refused_before_a_photo_is_read(
    photos: Path, begun: Path, small_vae: VAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    (begun / "done" / "00000.json").unlink()

    def read_only(operation: str, path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def refuse(self: FolderSource, key: str) -> bytes:
        raise AssertionError("read a photo")

    monkeypatch.setattr(atomic, "hook", read_only)
    monkeypatch.setattr(FolderSource, "read", refuse)
    with pytest.raises(OutputError, match="Read-only file system"):
        encode_dataset(photos, begun, small_vae, SETTINGS)
    with pytest.raises(OutputError, match="Read-only file system"):
        encode_dataset(photos, begun.parent / "new", small_vae, SETTINGS)
    assert not (begun.parent / "new").exists()


# --- Faults ---


class Failing:
    """Counts the operations of atomic.py, and lets one of them fail."""

    def __init__(self, nth: int, code: int) -> None:
        self.nth, self.code, self.num_operations = nth, code, 0

    def __call__(self, operation: str, path: Path) -> None:
        self.num_operations += 1
        if self.num_operations == self.nth:
            raise OSError(self.code, os.strerror(self.code))


@pytest.fixture
def few_photos(photos: Path) -> Path:
    """Two photos and three that are none: two shards, and one of failures only."""
    for path in [*photos.glob("cats/*"), *photos.glob("0[4-8]*"), photos / "10.png"]:
        path.unlink()
    return photos


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of runs need no real disk: a sync that fails is told by the hook."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def _run_failing(
    photos: Path, out: Path, vae: VAE, monkeypatch: pytest.MonkeyPatch, failing: Failing
) -> EncodeReport | OutputError:
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "hook", failing)
        try:
            return encode_dataset(photos, out, vae, FEW)
        except OutputError as error:
            return error


@pytest.mark.usefixtures("no_sync")
def test_every_operation_may_fail_once(
    few_photos: Path, tmp_path: Path, small_vae: VAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full or failing disk costs an error that names the file; what was committed stays, a second run finishes."""
    counting = Failing(0, 0)
    _run_failing(few_photos, tmp_path / "whole", small_vae, monkeypatch, counting)
    expected = _files(tmp_path / "whole")
    assert counting.num_operations > 60
    for nth in range(1, counting.num_operations + 1):
        code = (errno.ENOSPC, errno.EIO, errno.EFBIG)[nth % 3]
        out = tmp_path / f"out-{nth}"
        error = _run_failing(few_photos, out, small_vae, monkeypatch, Failing(nth, code))
        assert isinstance(error, OutputError), nth
        assert str(out) in str(error) and os.strerror(code) in str(error)
        left = _files(out)
        assert all(expected[name] == data for name, data in left.items()), nth  # complete, and no temporary
        encode_dataset(few_photos, out, small_vae, FEW)
        assert _files(out) == expected, nth


class Stop(SystemExit):
    """What a signal handler raises."""


@pytest.mark.usefixtures("no_sync")
def test_a_signal_leaves_no_temporary_and_the_next_run_finishes(
    few_photos: Path, tmp_path: Path, small_vae: VAE
) -> None:
    encode_dataset(few_photos, tmp_path / "whole", small_vae, FEW)
    expected = _files(tmp_path / "whole")
    num_calls, num_records = 0, len(list(few_photos.iterdir())) - 1  # one of them is a folder
    steps: list[tuple[str, int]] = []

    def raise_at(phase: str, num_done: int, num_all: int) -> None:
        steps.append((phase, num_done))
        if len(steps) == num_calls:
            raise Stop

    for num_calls in range(1, 100):
        steps.clear()
        out = tmp_path / f"out-{num_calls}"
        try:
            encode_dataset(few_photos, out, small_vae, FEW, progress=raise_at)
        except Stop:
            assert all(expected[name] == data for name, data in _files(out).items())
            encode_dataset(few_photos, out, small_vae, FEW)
            assert _files(out) == expected
        else:
            break
    assert [step for step in steps if step[0] == "scan"] == [("scan", n + 1) for n in range(num_records)]
    assert steps[-1] == ("encode", num_records - 2) and num_calls == len(steps) + 1


def test_temporaries_of_the_dead_are_swept(photos: Path, begun: Path, small_vae: VAE) -> None:
    before = _files(begun)
    left = begun / "shards" / f".{atomic._place()}.{os.getpid()}.0123abcd.tmp"
    left.write_bytes(b"half a shard")
    encode_dataset(photos, begun, small_vae, SETTINGS)
    assert _files(begun) == before


def test_the_manifest_says_what_the_bytes_depend_on(begun: Path, small_vae: VAE) -> None:
    manifest = json.loads((begun / "manifest.json").read_bytes())
    assert manifest["vae"]["fingerprint"] == small_vae.fingerprint
    assert VAEConfig.from_diffusers(manifest["vae"]["config"]) == small_vae.config
    machine = {"device", "cpu_capability", "torch", "dtype", "batch_rows", "num_threads", "images_at_once"}
    assert manifest["compute"].keys() == machine
    assert manifest["compute"]["images_at_once"] == min(8, manifest["compute"]["batch_rows"])
    assert (manifest["compute"]["dtype"], manifest["latent_error"]) == ("fp32", 0.0)
    assert Preprocess.from_json(manifest["preprocess"]) == SETTINGS.preprocess
    assert manifest["version"] == 2 and manifest["vae"]["evidence"]["certainty"]
    assert manifest["latent_scaling"].keys() == {"scaling_factor", "shift_factor", "latents_mean", "latents_std"}
    assert Store.open(begun).num_records == NUM_PHOTOS + NUM_BROKEN


def test_a_store_begun_before_groups_goes_on_with_its_own_bytes(
    photos: Path, tmp_path: Path, small_vae: VAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    identify = manifest._identify_compute

    def as_before(*arguments: Any) -> dict[str, Any]:
        return {name: value for name, value in identify(*arguments).items() if name != "images_at_once"}

    def stop(phase: str, num_done: int, num_all: int) -> None:
        if phase == "encode" and num_done > 5:
            raise InterruptedError

    exact = replace(SETTINGS, store_dtype="fp32")
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(manifest, "_identify_compute", as_before)
        encode_dataset(photos, tmp_path / "old", small_vae, exact, progress=stop)
    encode_dataset(photos, tmp_path / "old", small_vae, exact)
    encode_dataset(photos, tmp_path / "new", small_vae, exact)
    for name, images_at_once in {"old": 0, "new": exact.batch_rows}.items():
        store = Store.open(tmp_path / name)
        assert store.manifest["compute"].get("images_at_once", 0) == images_at_once
        for key, (mean, _) in _rows(store).items():
            image = read_image(photos / key)
            crop = apply(image, plan_geometry(*image.shape[:2], exact.preprocess, 8))
            with fixed_threads(1), small_vae.deterministic(images_at_once):
                assert np.array_equal(mean, small_vae.encode(to_pixels(crop[None])).mean[0].numpy()), (name, key)
    assert _files(tmp_path / "old").keys() == _files(tmp_path / "new").keys()
