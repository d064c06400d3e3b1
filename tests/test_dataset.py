import copy
import multiprocessing
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.random import Generator, Philox
from torch.utils.data import DataLoader

from sdvae.config import FAMILIES
from sdvae.errors import ConfigError, DeviceError, ShapeError, StoreError, VerifyError
from sdvae.latents import scale
from sdvae.reading.dataset import LatentDataset, record_stream
from sdvae.store.store import Store
from sdvae.tiny import TinyConfig
from sdvae.vae import VAE
from tests import made_stores
from tests.made_stores import LABELS, make_store

SIZE = (32, 48)
BROKEN = ("dog/001.png",)
# Two workers are right for these tests on one core, too.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Eleven records of one size in three shards, one of them quarantined."""
    return make_store(tmp_path / "store", {SIZE: 11}, broken=BROKEN)


def moments_of(store: Store, key: str, flipped: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and logvar of a key, (C, h, w) float32, by the store's own reader."""
    for shard in store.shards():
        for line in shard.records():
            if line["key"] == key:
                mean, logvar = shard.moments(flipped)
                return tuple(torch.from_numpy(values[line["row"]].astype(np.float32)) for values in (mean, logvar))
    raise KeyError(key)


def values_of(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def test_the_mean_is_scaled_and_paired_with_its_record(store: Store) -> None:
    dataset = LatentDataset(store.paths.root, sample=False)
    assert '<td style="text-align: left">means</td>' in dataset._repr_html_()
    assert len(dataset) == 10
    for number, example in enumerate(dataset[i] for i in range(len(dataset))):
        mean, _ = moments_of(store, example["key"])
        assert torch.equal(example["latents"], mean * torch.tensor(0.18215))
        label, _, name = example["key"].partition("/")
        assert example["caption"] == f"a {label}, {name[:3]}"
        assert dataset.classes[example["label"]] == label
        assert dataset.record(number)["key"] == example["key"]
        assert example["original_size"].tolist() == [64, 108]
        assert example["crop_top_left"].tolist() == [0, 2]
        assert example["target_size"].tolist() == [32, 48]
        assert not example["is_flipped"]
    assert [dataset[i]["key"] for i in range(2)] == ["cat/000.png", "owl/002.png"], "the row after the broken record"
    assert dataset.classes == sorted(LABELS)


def test_a_sample_is_the_documented_one(store: Store) -> None:
    dataset = LatentDataset(store.paths.root, seed=7)
    example = dataset[3, 5]
    mean, logvar = moments_of(store, example["key"])
    noise = Generator(record_stream(7, example["key"], 5)).standard_normal((4, 4, 6), np.float32)
    expected = scale((mean + torch.exp(0.5 * logvar) * torch.from_numpy(noise))[None], FAMILIES["sd1"])[0]
    assert torch.equal(example["latents"], expected)


# Seen once and kept: NumPy 2.4.
GOLDEN_BITS = 876041282610917174
GOLDEN_NOISE = [0.9149249, -1.5395879, -0.7758231, 0.0777400]


def test_the_noise_of_a_record_has_not_changed_since_it_was_first_published() -> None:
    """Whoever resumes a training run with another sdvae or numpy goes on with the same data."""
    stream = record_stream(seed=1, key="cats/é.jpg", epoch=2)
    assert stream.random_raw() == GOLDEN_BITS
    noise = Generator(stream).standard_normal(4, np.float32)
    assert noise.tolist() == pytest.approx(GOLDEN_NOISE, abs=1e-6)
    first, second = (record_stream(1, "a", epoch).random_raw(10_000) for epoch in (0, 1))
    assert not set(first.tolist()) & set(second.tolist()), "epochs share no numbers"


def test_samples_follow_the_posterior(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", {(16, 16): 1}, store_dtype="fp32")
    dataset = LatentDataset(store.paths.root)
    mean, logvar = moments_of(store, "cat/000.png")
    drawn = torch.cat([dataset[[(0, epoch) for epoch in range(0, 2000)]]["latents"]]) / 0.18215
    z = (drawn - mean) / torch.exp(0.5 * logvar)
    # 16 latents of 2,000 draws each: means within 5 standard errors, variances too.
    assert z.mean(0).abs().max() < 5 / 2000**0.5
    assert (z.var(0) - 1).abs().max() < 5 * (2 / 2000) ** 0.5


def test_neither_batch_nor_preload_nor_process_changes_a_sample(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", {SIZE: 21}, has_flips=True)
    dataset = LatentDataset(store.paths.root)
    alone = [dataset[i, 3] for i in range(21)]
    assert len({bool(example["is_flipped"]) for example in alone}) == 2
    order = [(i * 8 % 21, 3) for i in range(21)]
    in_ram = LatentDataset(store.paths.root, preload="ram")
    copies = [dataset, in_ram, pickle.loads(pickle.dumps(dataset)), pickle.loads(pickle.dumps(in_ram))]
    batches = [copy[order] for copy in copies]
    for workers in (0, 2):
        loader = DataLoader(dataset, sampler=[order], batch_size=None, num_workers=workers)
        batches += list(loader)
    for batch in batches:
        for place, (record, _) in enumerate(order):
            assert torch.equal(batch["latents"][place], alone[record]["latents"])
            assert batch["key"][place] == alone[record]["key"]
            assert batch["is_flipped"][place] == alone[record]["is_flipped"]


def test_a_spawned_worker_reads_the_same(store: Store) -> None:
    dataset = LatentDataset(store.paths.root)
    expected = dataset[list(range(10))]
    context = multiprocessing.get_context("spawn")
    (batch,) = DataLoader(
        dataset, sampler=[list(range(10))], batch_size=None, num_workers=1, multiprocessing_context=context
    )
    assert values_of(batch) == values_of(expected)


def test_epochs_and_seeds_draw_anew_and_the_mean_stays(store: Store) -> None:
    path = store.paths.root
    dataset = LatentDataset(path)
    drawn = [dataset[0, 0], dataset[0, 1], LatentDataset(path, seed=1)[0, 0], dataset[1, 0]]
    noises = [example["latents"] - LatentDataset(path, sample=False)[0]["latents"] for example in drawn[:3]]
    assert all(not torch.equal(a, b) for a in noises for b in noises if a is not b)
    mode = LatentDataset(path, sample=False)
    assert torch.equal(mode[0, 0]["latents"], mode[0, 1]["latents"])
    dataset.set_epoch(1)
    assert torch.equal(dataset[0]["latents"], drawn[1]["latents"])


@pytest.mark.parametrize("sample", [True, False])
def test_mirrored_latents_are_drawn_as_often_where_they_are_stored(tmp_path: Path, sample: bool) -> None:
    store = make_store(tmp_path / "store", {SIZE: 2}, has_flips=True)
    dataset = LatentDataset(store.paths.root, sample=sample)
    batch = dataset[[(0, epoch) for epoch in range(400)]]
    num_flipped = int(batch["is_flipped"].sum())
    assert abs(num_flipped - 200) < 50, "five standard deviations of 400 coins"
    for is_flipped in (True, False):
        mean, logvar = moments_of(store, "cat/000.png", is_flipped)
        mine = batch["latents"][batch["is_flipped"] == is_flipped] / 0.18215
        if sample:  # the mean of about 200 draws
            error = (mine.mean(0) - mean) / torch.exp(0.5 * logvar)
            assert error.abs().max() < 6 / len(mine) ** 0.5
        else:
            assert (mine - mean).abs().max() < 1e-5
        # The resized photo is 6 wider than the crop, which begins at its column 2, and at 4 from the right.
        corners = batch["crop_top_left"][batch["is_flipped"] == is_flipped]
        assert corners.unique(dim=0).tolist() == [[0, 4 if is_flipped else 2]]


def test_a_padded_crop_begins_at_the_border_mirrored_or_not(tmp_path: Path) -> None:
    from sdvae.reading.dataset import _conditions

    line = {"key": "a", "caption": None, "original_px": [30, 30], "bucket_px": [32, 32]}
    line |= {"resized_px": [30, 30], "crop_px": [0, 0, 32, 32]}
    assert _conditions([line, line], [False, True])["crop_top_left"].tolist() == [[0, 0], [0, 0]]


def test_a_plain_loader_shuffles_batches_and_collates(store: Store) -> None:
    dataset = LatentDataset(store.paths.root)
    loader = DataLoader(dataset, batch_size=5, shuffle=True, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        epochs.append(list(loader))
    for epoch, batches in enumerate(epochs):
        assert [batch["latents"].shape for batch in batches] == [(5, 4, 4, 6)] * 2
        assert len({key for batch in batches for key in batch["key"]}) == 10
        for batch in batches:
            for place, key in enumerate(batch["key"]):
                number = next(i for i in range(10) if dataset.record(i)["key"] == key)
                expected = dataset[number, epoch]
                assert torch.equal(batch["latents"][place], expected["latents"]), "set_epoch reached the workers"
                assert batch["label"][place] == expected["label"]
                assert batch["target_size"][place].tolist() == [32, 48]


def test_no_caption_is_an_empty_one_and_no_label_minus_one(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", {SIZE: 2}, is_labelled=False)
    dataset = LatentDataset(store.paths.root)
    assert (dataset[0]["caption"], dataset[0]["label"].item(), dataset.classes) == ("", -1, [])


def test_numbers_as_labels_are_sorted_as_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made_stores, "LABELS", ("10", "9", "7"))
    whole = made_stores._lines
    monkeypatch.setattr(
        made_stores,
        "_lines",
        lambda *arguments: [line | {"label": int(line["label"])} for line in whole(*arguments)],
    )
    dataset = LatentDataset(make_store(tmp_path / "store", {SIZE: 3}).paths.root)
    assert dataset.classes == [7, 9, 10]
    assert dataset[[0, 1, 2]]["label"].tolist() == [2, 1, 0]


def test_whitened_latents_are_whitened_per_channel(tmp_path: Path) -> None:
    config = replace(FAMILIES["sd1"], latents_mean=(1.0, 2.0, 3.0, 4.0), latents_std=(1.0, 2.0, 4.0, 8.0))
    store = make_store(tmp_path / "store", {SIZE: 1}, config=config)
    latents = LatentDataset(store.paths.root, sample=False)[0]["latents"]
    mean, _ = moments_of(store, "cat/000.png")
    for channel in range(4):
        expected = (mean[channel] - (channel + 1)) * 0.18215 / 2**channel
        assert (latents[channel] - expected).abs().max() < 1e-6


def test_a_store_of_a_taesd_is_scaled_as_its_family(tmp_path: Path) -> None:
    tiny = TinyConfig.from_family("sdxl")
    old = make_store(tmp_path / "store", {SIZE: 1}, latent_space="sdxl", config=tiny, has_scaling=False)
    assert b"latent_scaling" not in old.paths.manifest.read_bytes(), "what sdvae wrote before there was this member"
    assert old.manifest["vae"]["config"]["scaling_factor"] == 1.0
    assert old.latent_scaling == tiny.latent_scaling and tiny.scaling_factor == 0.13025
    assert LatentDataset(old.paths.root).latent_scaling == tiny.latent_scaling


def test_numbers_index_as_they_do_in_a_list(store: Store) -> None:
    dataset = LatentDataset(store.paths.root)
    assert dataset[-1]["key"] == dataset[9]["key"] == dataset[np.int64(9)]["key"]
    with pytest.raises(IndexError):
        dataset[10]
    assert sum(1 for _ in dataset) == 10  # type: ignore[attr-defined]


def test_a_batch_of_two_sizes_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", {(32, 32): 1, (32, 64): 1})
    dataset = LatentDataset(store.paths.root)
    with pytest.raises(ShapeError, match=r"32x32, 64x32; draw with BucketBatchSampler"):
        dataset[[0, 1]]
    assert {size: numbers.tolist() for size, numbers in dataset.buckets.items()} == {(32, 32): [0], (32, 64): [1]}


def test_another_vae_is_refused_in_a_short_sentence(store: Store, small_vae: VAE) -> None:
    path = store.paths.root
    LatentDataset(path, expect_vae="0" * 64)
    with pytest.raises(StoreError, match=f"another VAE .*: fingerprint {'0' * 12}, not {'1' * 12}\n"):
        LatentDataset(path, expect_vae="1" * 64)
    with pytest.raises(
        StoreError, match=r"fingerprint 0.*; \d+ field\(s\) of the config \(block_out_channels, "
    ) as error:
        LatentDataset(path, expect_vae=small_vae)
    assert len(str(error.value).removeprefix(str(path))) <= 200
    notes = "\n".join(error.value.__notes__)
    assert small_vae.fingerprint in notes and "config.layers_per_block was 2, now 1" in notes


def test_a_vae_of_the_same_weights_and_another_scale_is_refused(store: Store, small_vae: VAE) -> None:
    same = copy.copy(small_vae)
    same.fingerprint = "0" * 64
    same.config = replace(FAMILIES["sd1"], scaling_factor=0.5)
    with pytest.raises(StoreError, match=r"expected: 1 field\(s\) of the config \(scaling_factor\)\n"):
        LatentDataset(store.paths.root, expect_vae=same)


def test_an_unfinished_store_is_refused(store: Store) -> None:
    store.paths.done(1).unlink()
    with pytest.raises(StoreError, match="is not finished: 2 of its 3 shards are there"):
        LatentDataset(store.paths.root)


def test_a_store_of_nothing_but_quarantine_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", {SIZE: 1}, broken=("cat/000.png",))
    with pytest.raises(StoreError, match="holds no latents"):
        LatentDataset(store.paths.root)


def test_damage_is_never_read_as_data(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", {SIZE: 11}, is_labelled=False)
    path = store.paths.index(1)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"caption":null', b'"caption":"ab"', 1))
    dataset = LatentDataset(store.paths.root)
    assert dataset[0]["key"] == "cat/000.png"
    with pytest.raises(VerifyError, match=r"00001\.jsonl is damaged"):
        dataset[5]
    path.write_bytes(whole)
    assert dataset[5]["key"] == "owl/005.png"
    tensors = store.paths.tensors(2, SIZE)
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(VerifyError, match="committed"):
        dataset[9]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"seed": -1}, "seed is -1"), ({"seed": 2**64}, "64 bits"), ({"preload": "disk"}, "preload is 'disk'")],
)
def test_impossible_options_are_refused(store: Store, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LatentDataset(store.paths.root, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_preloading_to_a_gpu_that_is_not_there_is_refused(store: Store) -> None:
    with pytest.raises(DeviceError, match="preload='cuda' needs a CUDA device"):
        LatentDataset(store.paths.root, preload="cuda")


def test_many_shards_hold_no_file_open_and_travel_light(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", {(16, 16): 40}, shard_rows=1)
    dataset = LatentDataset(store.paths.root)
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    assert len(dataset[list(range(40))]["key"]) == 40
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) <= before + 1, "the shared epoch may take one"
    assert len(dataset._open) == 40
    assert len(pickle.dumps(dataset)) < 20_000


def test_preloaded_numbers_come_from_memory(store: Store) -> None:
    dataset = LatentDataset(store.paths.root, preload="ram")
    expected = values_of(dataset[list(range(10))])
    for shard in store.shards():
        assert shard.tensors_file is not None
        with shard.tensors_file.path.open("r+b") as file:
            file.write(bytes(shard.tensors_file.num_bytes))
    assert values_of(dataset[list(range(10))]) == expected
    assert Counter(expected["label"]) == {0: 4, 1: 3, 2: 3}


def test_the_mean_alone_is_preloaded_where_nothing_is_sampled(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", {SIZE: 3}, has_flips=True)
    dataset = LatentDataset(store.paths.root, sample=False, preload="ram")
    assert sorted(dataset._opened(0).tensors) == ["mean", "mean_flip"]
    mapped = LatentDataset(store.paths.root, sample=False)
    assert values_of(dataset[[0, 1, 2]]) == values_of(mapped[[0, 1, 2]])


def test_philox_is_numpys_own() -> None:
    """The first block of Philox4x64-10 with key and counter 0, as Random123's known-answer test has it."""
    assert [hex(int(bits)) for bits in Philox(key=0, counter=2**256 - 1).random_raw(4)] == PHILOX_ZERO


# kat_vectors: philox4x64 10, counter 0, key 0. numpy counts up before it computes a block: from 2**256 - 1 to 0.
PHILOX_ZERO = ["0x16554d9eca36314c", "0xdb20fe9d672d0fdc", "0xd7e772cee186176b", "0x7e68b68aec7ba23b"]
