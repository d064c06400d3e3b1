"""Streams of a store: what is attached to its records, or made of pictures beside the photos, and read with latents."""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

import sdvae
from sdvae.encoding.repair import remedy, repair
from sdvae.errors import ConfigError, ShapeError, StoreError
from sdvae.reading.dataset import LatentDataset
from sdvae.reading.samplers import BucketBatchSampler
from sdvae.store.store import Store
from sdvae.store.verify import verify
from tests.faults.conftest import flip, read_store
from tests.made_stores import make_store

SIZES = {(32, 48): 7, (48, 32): 4}
BROKEN = ("dog/001.png",)
NUM_RECORDS = 10
pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten records of two sizes in three shards, mirrored ones too, and one in quarantine."""
    return make_store(tmp_path / "store", SIZES, broken=BROKEN, has_flips=True).paths.root


def records_of(root: Path) -> list[dict[str, Any]]:
    return [line for shard in Store.open(root).shards() for line in shard.records() if line["row"] is not None]


def texts_of(root: Path, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Embeddings of one to five tokens, by key."""
    generator = torch.Generator().manual_seed(0)
    keys = [line["key"] for line in records_of(root)]
    return {key: torch.randn(1 + place % 5, 3, generator=generator).to(dtype) for place, key in enumerate(keys)}


# --- Attaching ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.uint8, torch.bool])
def test_what_was_attached_comes_with_each_record(root: Path, dtype: torch.dtype) -> None:
    texts = {key: (3 * text).to(dtype) for key, text in texts_of(root, torch.float32).items()}
    shuffled = list(texts.items())
    random.Random(0).shuffle(shuffled)
    report = sdvae.attach(root, "text", shuffled, made_from="nothing")
    assert (report.name, report.num_records, report.missing) == ("text", NUM_RECORDS, {})
    dataset = LatentDataset(root)
    for place in range(len(dataset)):
        example = dataset[place]
        assert example["text"].dtype == dtype and torch.equal(example["text"], texts[example["key"]])
        assert example["text_length"] == len(texts[example["key"]])


def test_no_byte_of_the_store_changes_and_other_readers_see_nothing(root: Path) -> None:
    before = read_store(root)
    sdvae.attach(root, "text", texts_of(root).items())
    after = read_store(root)
    assert before.items() <= after.items() and all(
        name.startswith("streams/text/") for name in after.keys() - before.keys()
    )
    assert sorted(after.keys() - before.keys()) == [
        "streams/text/00000.json", "streams/text/00000.safetensors", "streams/text/00001.json",
        "streams/text/00001.safetensors", "streams/text/00002.json", "streams/text/00002.safetensors",
        "streams/text/stream.json",
    ]  # fmt: skip
    assert LatentDataset(root, streams=[])[0].keys() == LatentDataset(root)[0].keys() - {"text", "text_length"}


def test_order_and_repetition_change_no_byte(root: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(root, tmp_path / "other"))
    sdvae.attach(root, "text", texts_of(root).items())
    sdvae.attach(other, "text", reversed(texts_of(root).items()))
    assert read_store(root) == read_store(other)
    sdvae.attach(root, "text", texts_of(root).items())
    assert read_store(root) == read_store(other)


def test_the_files_are_read_by_safetensors_itself(root: Path) -> None:
    from safetensors.numpy import load_file

    texts = texts_of(root)
    sdvae.attach(root, "text", texts.items())
    for shard in Store.open(root).shards():
        tensors = load_file(root / f"streams/text/{shard.number:05d}.safetensors")
        lines = [line for line in shard.records() if line["row"] is not None]
        assert len(tensors["starts"]) == len(lines) + 1
        for line, start, end in zip(lines, tensors["starts"], tensors["starts"][1:], strict=False):
            assert np.array_equal(tensors["values"][start:end], texts[line["key"]].numpy())


def test_a_batch_is_padded_and_a_missing_row_is_zeros_of_length_0(root: Path) -> None:
    texts = texts_of(root)
    keys = [line["key"] for line in records_of(root)]
    del texts[keys[1]]
    report = sdvae.attach(root, "text", texts.items())
    assert report.missing == {"not attached": 1}
    batch = LatentDataset(root)[[0, 1, 2, 3]]
    assert batch["text_length"].tolist() == [1, 0, 3, 4] and batch["text"].shape == (4, 4, 3)
    for place, key in enumerate(keys[:4]):
        text = texts.get(key, torch.zeros(0, 3, dtype=torch.float16))
        assert torch.equal(batch["text"][place, : len(text)], text)
        assert not batch["text"][place, len(text) :].any()
    assert LatentDataset(root)[1]["text"].shape == (0, 3)


def test_axes_but_the_first_may_differ_from_size_to_size_alone(root: Path) -> None:
    sizes = {line["key"]: [side // 8 for side in line["bucket_px"]] for line in records_of(root)}
    depths = {key: np.random.default_rng(0).random((1, *size), np.float32) for key, size in sizes.items()}
    sdvae.attach(root, "depth", depths.items(), mirror=True)
    dataset = LatentDataset(root)
    seen = set()
    for epoch in range(4):
        for place in range(len(dataset)):
            example = dataset[place, epoch]
            expected = depths[example["key"]]
            assert np.array_equal(example["depth"], expected[..., ::-1] if example["is_flipped"] else expected)
            seen.add(bool(example["is_flipped"]))
    assert seen == {False, True}
    key = next(iter(depths))
    with pytest.raises(ShapeError, match=r"may differ in the first axis alone"):
        sdvae.attach(root, "other", (depths | {list(depths)[1]: np.zeros((1, 5, 5), np.float32)}).items())
    second = list(depths)[1]
    with pytest.raises(ShapeError, match=rf"the array of {key} is F64, those of .*mixed are F32"):
        sdvae.attach(root, "mixed", [(second, depths[second]), (key, depths[key].astype(np.float64))])


def test_what_cannot_be_attached_is_said(root: Path) -> None:
    key = records_of(root)[0]["key"]
    one = np.zeros((1, 2), np.float32)
    with pytest.raises(StoreError, match=r"has no record 'nobody'"):
        sdvae.attach(root, "text", [("nobody", one)])
    with pytest.raises(StoreError, match="two arrays came for the record"):
        sdvae.attach(root, "text", [(key, one), (key, one)])
    with pytest.raises(StoreError, match="no record came"):
        sdvae.attach(root, "text", [(BROKEN[0], one)])
    for array in (np.float32(1), np.zeros((0, 3), np.float32), np.array(["a"])):
        with pytest.raises(ShapeError, match=rf"the array of {key}"):
            sdvae.attach(root, "text", [(key, array)])
    for name in ("latents", "Text", "../text", "text_length", ""):
        with pytest.raises(ConfigError, match="cannot name a stream"):
            sdvae.attach(root, name, [(key, one)])
    sdvae.attach(root, "text", [(key, one)])
    with pytest.raises(StoreError, match=r"begun as another stream: dtype was \"F32\", now \"F16\""):
        sdvae.attach(root, "text", [(key, one.astype(np.float16))])
    with pytest.raises(StoreError, match="commits other rows than these"):
        sdvae.attach(root, "text", [(key, one + 1)])
    assert verify(root).damages == []


# --- Reading ---


def values_of(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in batch.items()}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_go_on_in_the_middle_with_their_streams(root: Path, num_workers: int) -> None:
    sdvae.attach(root, "text", texts_of(root).items())

    def make() -> StatefulDataLoader[dict[str, Any]]:
        dataset = LatentDataset(root, seed=3)
        sampler = BucketBatchSampler(dataset, 2, seed=3)
        return StatefulDataLoader(dataset, sampler=sampler, batch_size=None, num_workers=num_workers)

    every = [values_of(batch) for batch in make()]
    assert len(every) == 5
    first, second = make(), make()
    drawn = iter(first)
    assert [values_of(next(drawn)) for _ in range(2)] == every[:2]
    second.load_state_dict(first.state_dict())
    assert [values_of(batch) for batch in second] == every[2:]
    texts = texts_of(root)
    for batch in every:
        for key, row, length in zip(batch["key"], batch["text"], batch["text_length"], strict=True):
            assert row[:length] == texts[key].tolist()


def test_a_stream_that_lacks_shards_is_refused(root: Path) -> None:
    sdvae.attach(root, "text", texts_of(root).items())
    (root / "streams/text/00001.json").unlink()
    with pytest.raises(StoreError, match=r"lacks the rows of 1 of 3 shards; make the stream again, or leave it out"):
        LatentDataset(root)
    assert len(LatentDataset(root, streams=[])) == NUM_RECORDS
    assert verify(root).is_unfinished
    sdvae.attach(root, "text", texts_of(root).items())
    assert verify(root).damages == [] and len(LatentDataset(root)) == NUM_RECORDS


# --- Damage ---


def test_verify_finds_every_flipped_bit_and_attaching_again_mends_it(root: Path) -> None:
    sdvae.attach(root, "text", texts_of(root).items())
    whole = read_store(root)
    paths = sorted((root / "streams").rglob("*.*"))
    assert verify(root).damages == []
    moments = random.Random(0)
    for number in range(60):
        path = moments.choice(paths)
        data = path.read_bytes()
        flip(path, moments.randrange(8 * len(data)))
        verdict = verify(root)
        assert [(damage.path, damage.state) for damage in verdict.damages] == [(path, "damaged")], number
        if path.name != "stream.json" and number % 10 == 0:
            sdvae.attach(root, "text", texts_of(root).items())
            assert read_store(root) == whole
        path.write_bytes(data)
    flip(paths[1], 5000)
    found = repair(root)
    (damage,) = found.verdict.damages
    assert found.restored == [] and "remove its folder, and make the stream again" in remedy(damage)
    sdvae.attach(root, "text", texts_of(root).items())
    assert read_store(root) == whole
    for path in paths:
        data = path.read_bytes()
        path.unlink()
        verdict = verify(root)
        assert [damage.path for damage in verdict.damages] == [path]
        assert verdict.damages[0].state == (
            "not encoded yet" if path.name[:5].isdigit() and path.suffix == ".json" else "missing"
        )
        path.write_bytes(data)
