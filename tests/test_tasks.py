"""Encoding shards where memory is short, with an audit, and what is told of the time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sdvae.amounts import memory_text
from sdvae.encoding import writing
from sdvae.encoding.encode import EncodeReport, encode_dataset
from sdvae.encoding.manifest import EncodeSettings, require_same_vae
from sdvae.encoding.tasks import Work, encode_tasks
from sdvae.encoding.times import Times
from sdvae.errors import BudgetError, DeviceError, StoreError
from sdvae.metrics import psnr
from sdvae.pixels import to_device, to_images, to_pixels
from sdvae.posterior import DiagonalGaussian
from sdvae.sources.open import open_source
from sdvae.store.geometry import Preprocess
from sdvae.store.store import Store
from sdvae.store.verify import verify
from sdvae.vae import VAE
from tests.conftest import SMALL, random_model

SETTINGS = EncodeSettings(Preprocess(size_px=32), shard_rows=8, batch_rows=8, num_threads=1)
NUM_PHOTOS = 19
HERE = Work(num_workers=0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for number in range(NUM_PHOTOS):
        coarse = Image.fromarray(noise.integers(0, 256, (5, 6, 3), np.uint8))
        coarse.resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")
    return folder


def files(root: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(root.rglob("*")) if path.is_file() and path.parent.name != "journal"]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


class Narrow:
    """A VAE on a device where only so many photos fit at once, as torch says it."""

    def __init__(self, vae: VAE, num_fitting: int, error: Exception | None = None) -> None:
        self.vae, self.num_fitting = vae, num_fitting
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        self.sizes: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.vae, name)

    def encode(self, pixels: Tensor, budget: int | None = None) -> DiagonalGaussian:
        self.sizes.append(len(pixels))
        if len(pixels) > self.num_fitting:
            raise self.error
        return self.vae.encode(pixels, budget)


def run(photos: Path, out: Path, vae: Any, work: Work = HERE, settings: EncodeSettings = SETTINGS) -> EncodeReport:
    return encode_dataset(photos, out, vae, settings, work=work)


# --- Memory ---


@pytest.mark.parametrize(
    "error",
    [
        None,
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
        ),
    ],
)
def test_short_memory_stops_and_names_what_fits(
    photos: Path, tmp_path: Path, small_vae: VAE, error: Exception | None
) -> None:
    with pytest.raises(DeviceError) as caught:
        run(photos, tmp_path / "out", Narrow(small_vae, 3, error))
    message = str(caught.value)
    assert message.startswith("out of memory on cpu: 8 photos of 32x32 px at once are too many, 2 fit (793 KiB")
    assert "--batch-size 2 --restart" in message and "--on-oom degrade" in message
    assert Store.open(tmp_path / "out").shards() == []
    small_batches = replace(SETTINGS, batch_rows=2)  # what the message says works
    encode_dataset(photos, tmp_path / "out", Narrow(small_vae, 3), small_batches, restart=True, work=HERE)  # type: ignore[arg-type]


def test_one_photo_that_is_too_much_is_said_so(photos: Path, tmp_path: Path, small_vae: VAE) -> None:
    with pytest.raises(DeviceError, match=r"and one is, too \(781 KiB beside the weights\); use a smaller --size"):
        run(photos, tmp_path / "out", Narrow(small_vae, 0), Work(0, on_oom="degrade"))


def test_degraded_shards_are_marked_and_hold_the_same_latents(photos: Path, tmp_path: Path, small_vae: VAE) -> None:
    vae = Narrow(small_vae, 3)
    report = run(photos, tmp_path / "out", vae, Work(0, on_oom="degrade"))
    store = Store.open(tmp_path / "out")
    assert [shard.degraded for shard in store.shards()] == [2, 2, 2] and report.num_degraded == 3
    assert vae.sizes[:3] == [8, 4, 2] and set(vae.sizes[3:]) <= {1, 2}  # the ladder is climbed down once
    assert report.num_written == NUM_PHOTOS and verify(store.paths.root).damages == []
    run(photos, tmp_path / "whole", small_vae)
    whole = Store.open(tmp_path / "whole")
    for number in range(3):
        for mine, theirs in zip(store.shard(number).moments(), whole.shard(number).moments(), strict=True):
            # Sums may be taken in another order; fp16 has 11 bits.
            np.testing.assert_allclose(mine.astype(np.float32), theirs.astype(np.float32), rtol=2e-3, atol=2e-3)
    before = files(tmp_path / "out")
    run(photos, tmp_path / "out", vae, Work(0, on_oom="degrade"))
    assert files(tmp_path / "out") == before


def test_a_budget_decides_how_many_photos_go_at_once(photos: Path, tmp_path: Path, small_vae: VAE) -> None:
    with small_vae.deterministic():
        plan = small_vae.engine.plan("encode", 32, 32)  # type: ignore[union-attr]
    of_five = plan.predict_bytes(5)
    with pytest.raises(
        DeviceError, match=r"8 photos of 32x32 px at once are too many, 4 fit \([\d.]+ [KM]iB beside the weights\)"
    ):
        run(photos, tmp_path / "out", small_vae, Work(0, budget_bytes=of_five))
    run(photos, tmp_path / "out", small_vae, Work(0, "degrade", budget_bytes=of_five))
    assert [shard.degraded for shard in Store.open(tmp_path / "out").shards()] == [4, 4, 4]
    with pytest.raises(
        BudgetError, match=rf"encoding 32x32 px needs at least {memory_text(plan.predict_bytes(1))} beside the weights"
    ):
        run(photos, tmp_path / "none", small_vae, Work(0, "degrade", budget_bytes=plan.predict_bytes(1) - 1))


def test_memory_that_runs_short_in_the_middle_begins_the_shard_again(
    photos: Path, tmp_path: Path, small_vae: VAE
) -> None:
    class Shrinking(Narrow):
        def encode(self, pixels: Tensor, budget: int | None = None) -> DiagonalGaussian:
            self.num_fitting = 2 if len(self.sizes) < 4 else 1
            return super().encode(pixels, budget)

    settings = replace(SETTINGS, batch_rows=2)
    run(photos, tmp_path / "out", Shrinking(small_vae, 2), Work(0, on_oom="degrade"), settings)
    store = Store.open(tmp_path / "out")
    degraded = [shard.degraded for shard in store.shards()]
    assert degraded[-1] == 1 and set(degraded) <= {None, 1}
    run(photos, tmp_path / "one", small_vae, settings=replace(settings, batch_rows=1))
    ones = Store.open(tmp_path / "one")
    for number in (number for number, rows in enumerate(degraded) if rows == 1):
        assert all(
            map(np.array_equal, store.shard(number).moments(), ones.shard(number).moments())
        )  # all of it one by one


def test_other_errors_are_not_taken_for_short_memory(photos: Path, tmp_path: Path, small_vae: VAE) -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(photos, tmp_path / "out", Narrow(small_vae, 3, RuntimeError("mat1 and mat2 cannot be multiplied")))


# --- Mirrored photos, audit, times ---


def test_mirrored_latents_are_those_of_the_mirrored_photo(photos: Path, tmp_path: Path, small_vae: VAE) -> None:
    run(photos, tmp_path / "out", small_vae, settings=replace(SETTINGS, preprocess=Preprocess(32, flip=True)))
    mirrored = tmp_path / "mirrored"
    mirrored.mkdir()
    for path in photos.iterdir():
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mirrored / path.name)
    run(mirrored, tmp_path / "expected", small_vae)
    store, expected = Store.open(tmp_path / "out"), Store.open(tmp_path / "expected")
    for number in range(3):
        assert all(map(np.array_equal, store.shard(number).moments(flipped=True), expected.shard(number).moments()))
        assert not np.array_equal(store.shard(number).moments()[0], expected.shard(number).moments()[0])


def test_an_audit_decodes_what_was_stored(photos: Path, tmp_path: Path, small_vae: VAE) -> None:
    assert run(photos, tmp_path / "none", small_vae).times.psnr_db == {}
    found = run(photos, tmp_path / "out", small_vae, Work(0, audit=0.4)).times.psnr_db
    assert 0 < len(found) < NUM_PHOTOS
    assert found.keys() == run(photos, tmp_path / "again", small_vae, Work(0, audit=0.4)).times.psnr_db.keys()
    everything = run(photos, tmp_path / "all", small_vae, Work(0, audit=1.0)).times.psnr_db
    assert len(everything) == NUM_PHOTOS and found.items() <= everything.items()
    store = Store.open(tmp_path / "out")
    mean, _ = store.shard(0).moments()
    for line in store.shard(0).records()[:2]:
        latents = torch.from_numpy(mean[line["row"] : line["row"] + 1].astype(np.float32))
        after = to_images(small_vae.decode(latents))[0]
        before = np.asarray(Image.open(photos / line["key"]).resize((38, 32), Image.Resampling.LANCZOS))[:, 3:35]
        assert everything[line["key"]] == pytest.approx(psnr(after, np.ascontiguousarray(before)), abs=1e-6)


def test_times_add_up_and_name_the_slowest() -> None:
    times = Times(num_workers=4, read=4.0, decode=28.0, encode=6.0, write=1.0, waiting=3.5, all=10.0)
    assert times.shares() == {
        "read": 0.1, "decode": 0.7, "copy": 0.0, "encode": 0.6, "write": 0.1, "waiting": 0.35,
    }  # fmt: skip
    assert times.slowest() == "decode"
    assert replace(times, decode=16.0).slowest() == "encode"
    assert replace(times, read=30.0, decode=5.0).slowest() == "read"
    few = Times(num_workers=1, decode=0.2, encode=0.7, write=0.1, waiting=3.1, all=4.0)
    assert few.slowest() == "start", "an encoder that waits for 80% of the time holds up nothing"
    times += Times(num_images=3, num_workers=1, encode=4.0, all=1.0, psnr_db={"a": 30.0})
    assert (times.num_images, times.num_workers, times.encode, times.all) == (3, 4, 10.0, 11.0)
    assert times.psnr_db == {"a": 30.0}


def test_pixels_made_on_the_device_are_those_of_to_pixels() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 130, 200, 3), np.uint8)
    pixels = to_device(images, torch.device("cpu"))
    assert torch.equal(pixels, to_pixels(images)) and pixels.is_contiguous(memory_format=torch.channels_last)
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 1, 256, 3)
    assert torch.equal(to_device(levels, torch.device("cpu")), to_pixels(levels))


# --- One shard by itself ---


def test_a_shard_encoded_again_by_itself_has_the_same_bytes(photos: Path, tmp_path: Path, small_vae: VAE) -> None:
    out = tmp_path / "out"
    run(photos, out, small_vae)
    before = files(out)
    for lost in ("shards/00001-32x32.safetensors", "index/00001.jsonl"):
        (out / lost).unlink()
    store = Store.open(out)
    require_same_vae(store, small_vae)
    encode_tasks(store, [1], open_source(photos), small_vae, HERE)
    assert files(out) == before


def test_another_vae_may_not_mend_a_store(photos: Path, tmp_path: Path, small_vae: VAE) -> None:
    run(photos, tmp_path / "out", small_vae)
    other = VAE(random_model(SMALL, seed=1), torch.device("cpu"), torch.float32, name="another")
    with pytest.raises(StoreError, match=r"vae.fingerprint was"):
        require_same_vae(Store.open(tmp_path / "out"), other)


def test_the_network_does_not_wait_for_the_disk(
    photos: Path, tmp_path: Path, small_vae: VAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first commit ends only after the second shard went through the network."""
    import threading

    both_encoded = threading.Event()
    commit = writing.commit_shard

    def slow(*arguments: Any) -> None:
        assert both_encoded.wait(120)
        commit(*arguments)

    monkeypatch.setattr(writing, "commit_shard", slow)
    vae = Narrow(small_vae, 8)
    encode = vae.encode

    def note(pixels: Tensor, budget: int | None) -> DiagonalGaussian:
        if len(vae.sizes) == 1:
            both_encoded.set()
        return encode(pixels, budget)

    monkeypatch.setattr(vae, "encode", note)
    run(photos, tmp_path / "out", vae)
    assert len(Store.open(tmp_path / "out").shards()) == 3
