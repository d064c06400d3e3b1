"""Which photos a run trains on, and which crops make a step."""

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdvae.encoding.resize import apply, choose_resizer
from sdvae.errors import ConfigError, TrainError
from sdvae.pixels import to_pixels
from sdvae.progress import silent
from sdvae.sources.open import open_source
from sdvae.store.records import Record
from sdvae.train.config import DataConfig, Rung
from sdvae.train.data import Loader, Photos, Sampler, find_photos, random_geometry, random_numbers, write_photos

CPU = torch.device("cpu")
DATA = DataConfig(ladder=(Rung(16, 4),), max_shrink=2.0, held_out=2, workers=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for number in range(9):
        Image.fromarray(noise.integers(0, 256, (40, 24 + number, 3), np.uint8)).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def photos(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Photos:
    with caplog.at_level(logging.WARNING):
        found = find_photos(open_source(folder), DATA, 0, tmp_path / "scan.jsonl", silent)
    assert "broken.png is left out" in caplog.text
    return found


def records(*sizes: tuple[int, int]) -> list[Record]:
    return [Record(f"{number:03}", original_px=size) for number, size in enumerate(sizes)]


def test_held_out_photos_stay_when_the_source_grows(photos: Photos, folder: Path, tmp_path: Path) -> None:
    assert (len(photos.train), len(photos.held_out)) == (7, 2)
    assert not {record.key for record in photos.train} & {record.key for record in photos.held_out}
    write_photos(tmp_path / "photos.jsonl", photos)
    assert Photos.from_file(tmp_path / "photos.jsonl").to_lines() == photos.to_lines()
    few = tmp_path / "few"
    few.mkdir()
    for record in photos.held_out + photos.train[:2]:
        (few / record.key).write_bytes((folder / record.key).read_bytes())
    again = find_photos(open_source(few), DATA, 0, tmp_path / "other.jsonl", silent)
    assert again.held_out == photos.held_out
    with pytest.raises(TrainError, match="has 4 readable photos, and 4 are held out"):
        find_photos(open_source(few), replace(DATA, held_out=4), 0, tmp_path / "other.jsonl", silent)


def test_a_damaged_list_of_photos_is_told(photos: Photos, tmp_path: Path) -> None:
    path = tmp_path / "photos.jsonl"
    write_photos(path, photos)
    path.write_bytes(path.read_bytes().replace(b"true", b"false", 1))
    with pytest.raises(TrainError, match="is damaged"):
        Photos.from_file(path)


def test_every_photo_comes_once_an_epoch_in_an_order_of_its_own() -> None:
    sampler = Sampler(records(*[(20, 20)] * 12), DATA, 0, 8)
    epochs = [[crop.record.key for step in range(3 * e, 3 * e + 3) for crop in sampler.batch(step)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [f"{number:03}" for number in range(12)]
    assert epochs[0] != epochs[1]
    assert sampler.batch(2) == Sampler(records(*[(20, 20)] * 12), DATA, 0, 8).batch(2), "a function of the step"
    assert sampler.batch(2) != Sampler(records(*[(20, 20)] * 12), DATA, 1, 8).batch(2), "and of the seed"
    draws = Counter(crop.draw for step in range(30) for crop in sampler.batch(step))
    assert set(draws.values()) == {1}, "each image of each epoch has noise of its own"
    assert sampler.epoch(6) == 2.0


def test_the_ladder_changes_sizes_and_leaves_small_photos_out(caplog: pytest.LogCaptureFixture) -> None:
    data = replace(DATA, ladder=(Rung(16, 4), Rung(32, 2, first_step=5)))
    sampler = Sampler(records((16, 16), (32, 40), (64, 64)), data, 0, 8)
    assert "1 of 3 photos are smaller than crops of 32 px" in caplog.text
    assert [(len(sampler.batch(step)), sampler.batch(step)[0].record.bucket_px) for step in (4, 5)] == [
        (4, (16, 16)), (2, (32, 32)),
    ]  # fmt: skip
    assert {crop.record.key for step in range(5, 9) for crop in sampler.batch(step)} == {"001", "002"}
    with pytest.raises(TrainError, match="no photo has 32 px"):
        Sampler(records((16, 16)), data, 0, 8)
    with pytest.raises(ConfigError, match="no multiple of 32"):
        Sampler(records((64, 64)), data, 0, 32)


def test_crops_lie_inside_the_photo_and_shrink_no_more_than_asked() -> None:
    sides = []
    for number in range(400):
        geometry = random_geometry((100, 60), 20, 2.0, random_numbers(number))
        (height, width), (top, left, *size) = geometry.resized_px, geometry.crop_px
        assert size == [20, 20]
        assert 0 <= top <= height - 20
        assert 0 <= left <= width - 20
        assert abs(height / width - 100 / 60) < 0.05
        sides.append(100 / height)
    assert 0.4 < np.mean(np.isclose(sides, 1.0)) < 0.6
    assert 1.9 < max(sides) <= 2.01
    whole = random_geometry((100, 60), 20, None, random_numbers(0))
    assert whole.resized_px == (33, 20)
    assert random_geometry((20, 20), 20, 3.0, random_numbers(0)).crop_px == (0, 0, 20, 20)


def loaded(
    folder: Path, sampler: Sampler, data: DataConfig, steps: range, rank: int = 0, world: int = 1
) -> list[torch.Tensor]:
    with Loader(open_source(folder), sampler, data, steps, CPU, rank, world) as loader:
        return [batch.pixels for batch in loader]


def test_pixels_are_those_that_encode_would_cut(folder: Path, photos: Photos) -> None:
    sampler = Sampler(photos.train, DATA, 0, 8)
    pixels = torch.cat(loaded(folder, sampler, DATA, range(6)))
    crops = [crop for step in range(6) for crop in sampler.batch(step)]
    assert 3 < sum(crop.is_flipped for crop in crops) < 21
    for crop, ours in zip(crops, pixels, strict=True):
        photo = np.array(Image.open(folder / crop.record.key).convert("RGB"))
        assert crop.record.geometry is not None
        image = apply(photo, crop.record.geometry, resizer=choose_resizer("lanczos"))
        image = image[:, ::-1] if crop.is_flipped else image
        assert torch.equal(ours, to_pixels(np.ascontiguousarray(image)[None])[0])


def test_processes_decode_the_same_pixels(folder: Path, photos: Photos) -> None:
    sampler = Sampler(photos.train, DATA, 0, 8)
    here, there = (loaded(folder, sampler, replace(DATA, workers=number), range(4)) for number in (0, 1))
    assert all(map(torch.equal, here, there))
    assert len(there) == 4


def test_ranks_and_micro_batches_split_one_batch(folder: Path, photos: Photos) -> None:
    sampler = Sampler(photos.train, DATA, 0, 8)
    whole = loaded(folder, sampler, DATA, range(2, 4))
    for world, parts in ((2, 1), (1, 2), (2, 2)):
        split = replace(DATA, micro_batches=parts)
        shares = [loaded(folder, sampler, split, range(2, 4), rank, world) for rank in range(world)]
        for step in range(2):
            rows = torch.empty_like(whole[step])
            for rank in range(world):
                for part in range(parts):
                    rows[part * world + rank :: parts * world] = shares[rank][step * parts + part]
            assert torch.equal(rows, whole[step])
    with pytest.raises(ConfigError, match="cannot be split into 1 micro-batches on 3 ranks"):
        loaded(folder, sampler, DATA, range(1), 0, 3)


def test_a_vanished_photo_is_replaced_and_told_once(
    folder: Path, photos: Photos, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    some = tmp_path / "some"
    some.mkdir()
    gone, *left = photos.train
    for record in left:
        (some / record.key).write_bytes((folder / record.key).read_bytes())
    sampler = Sampler(photos.train, DATA, 0, 8)
    source = open_source(folder)
    with_all = loaded(folder, sampler, DATA, range(6))
    without = loaded(some, sampler, DATA, range(6))
    told = [record.getMessage() for record in caplog.records if gone.key in record.getMessage()]
    assert told == [f"{gone.key} is left out of its batches: vanished after the scan"]
    for step, (before, after) in enumerate(zip(with_all, without, strict=True)):
        for row, crop in enumerate(sampler.batch(step)):
            is_same = torch.equal(before[row], after[row])
            assert is_same == (crop.record.key != gone.key)
    assert source.read(gone.key)
    for record in left:
        (some / record.key).unlink()
    with pytest.raises(TrainError, match="no photo of a batch can be read"):
        loaded(some, sampler, DATA, range(1))
