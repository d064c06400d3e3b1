import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from sdvae.errors import ConfigError
from sdvae.reading.dataset import LatentDataset
from sdvae.reading.samplers import BucketBatchSampler
from tests.made_stores import make_store

WIDE, TALL = (16, 32), (32, 16)
BATCH = 8
Step = dict[str, Any]  # the global batch of one step: what all ranks got, in the order of the ranks

# Two workers are right for these tests on one core, too.
# torchdata 0.11 calls a function that torch 2.13 has retired.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    """56 records of two sizes, mirrored too: seven global batches."""
    root = tmp_path_factory.mktemp("made") / "store"
    return LatentDataset(make_store(root, {WIDE: 24, TALL: 32}, has_flips=True, shard_rows=10).paths.root)


def run(
    dataset: LatentDataset, world_size: int, states: list[Any] | None = None, stop_after: int | None = None
) -> tuple[list[Step], list[Any]]:
    """Train to the end of the second epoch, or `stop_after` steps; returns the steps and the loaders' states."""
    per_rank: list[list[Any]] = []
    ends = []
    for rank in range(world_size):
        sampler = BucketBatchSampler(dataset, BATCH, seed=3, rank=rank, world_size=world_size)
        loader = StatefulDataLoader(dataset, batch_sampler=sampler, num_workers=2 if world_size == 1 else 0)
        if states:
            loader.load_state_dict(states[min(rank, len(states) - 1)])
        steps: list[Any] = []
        first_epoch = len(states or []) and states[0]["epoch"]  # type: ignore[index]
        for epoch in range(first_epoch, 2):
            sampler.set_epoch(epoch)
            for batch in loader:
                steps.append(batch)
                if len(steps) == stop_after:
                    break
            if len(steps) == stop_after:
                break
        per_rank.append(steps)
        ends.append(loader.state_dict() | {"epoch": epoch})
    return [join(list(batches)) for batches in zip(*per_rank, strict=True)], ends


def join(batches: list[Step]) -> Step:
    """What the ranks got at one step as the global batch: rank r has records r, r + world_size, ..."""
    joined: Step = {}
    for name, first in batches[0].items():
        values = [batch[name] for batch in batches]
        if isinstance(first, torch.Tensor):
            joined[name] = torch.stack(values, dim=1).flatten(0, 1)
        else:
            joined[name] = [key for keys in zip(*values, strict=True) for key in keys]
    return joined


def assert_same(steps: list[Step], expected: list[Step]) -> None:
    assert len(steps) == len(expected) > 0
    for step, other in zip(steps, expected, strict=True):
        assert step["key"] == other["key"]
        for name in ("latents", "label", "is_flipped", "crop_top_left"):
            assert torch.equal(step[name], other[name]), name


def test_two_epochs_are_the_same_at_every_world_size_stopped_in_the_middle_or_not(dataset: LatentDataset) -> None:
    whole, _ = run(dataset, world_size=1)
    assert len(whole) == 14
    epochs = [[key for step in part for key in step["key"]] for part in (whole[:7], whole[7:])]
    for keys in epochs:
        assert Counter(keys) == Counter(dataset.record(i)["key"] for i in range(len(dataset)))
    assert epochs[0] != epochs[1]
    assert len({tuple(step["target_size"][0].tolist()) for step in whole[:7]}) == 2
    for world_size in (2, 4):
        assert_same(run(dataset, world_size)[0], whole)
    for world_size in (1, 2, 4):
        for stop_after in (3, 7, 9):  # in the first epoch, at its end, in the second
            before, states = run(dataset, world_size, stop_after=stop_after)
            assert_same(before, whole[:stop_after])
            after, _ = run(dataset, world_size, states)
            assert_same(after, whole[stop_after:])


def test_a_run_goes_on_with_another_number_of_ranks(dataset: LatentDataset) -> None:
    whole = list(BucketBatchSampler(dataset, BATCH, seed=3))
    first = BucketBatchSampler(dataset, BATCH, seed=3, rank=1, world_size=2)
    batches = iter(first)
    taken = [next(batches) for _ in range(3)]
    assert [batch[1::2] for batch in whole[:3]] == taken
    for rank in range(4):
        other = BucketBatchSampler(dataset, BATCH, seed=3, rank=rank, world_size=4)
        other.load_state_dict(first.state_dict())
        assert list(other) == [batch[rank::4] for batch in whole[3:]]


GOLDEN_ORDER = [[8, 6], [5, 7], [4, 1], [3, 2]]  # seen once and kept: NumPy 2.4


def test_the_order_has_not_changed_since_it_was_first_published(tmp_path: Path) -> None:
    """Whoever resumes a training run with another sdvae or numpy goes on with the same data."""
    store = make_store(tmp_path / "store", {WIDE: 5, TALL: 4})
    sampler = BucketBatchSampler(LatentDataset(store.paths.root), 2, seed=1)
    assert [[record for record, _ in batch] for batch in sampler] == GOLDEN_ORDER
    assert [[record for record, _ in batch] for batch in sampler] != GOLDEN_ORDER, "another epoch, another order"


def test_an_iteration_is_an_epoch_and_the_next_one_follows(dataset: LatentDataset) -> None:
    sampler = BucketBatchSampler(dataset, BATCH)
    epochs = [list(sampler) for _ in range(3)]
    assert [{epoch for batch in batches for _, epoch in batch} for batches in epochs] == [{0}, {1}, {2}]
    sampler.set_epoch(1)
    assert list(sampler) == epochs[1]
    batches = iter(sampler)
    left = [next(batches), next(batches)]
    assert left == epochs[2][:2]
    assert list(sampler) == epochs[2], "an iteration that was left begins anew"


def test_a_state_is_taken_at_any_moment(dataset: LatentDataset) -> None:
    whole = [batch for epoch in range(3) for batch in _epoch(dataset, epoch)]
    sampler = BucketBatchSampler(dataset, BATCH)
    states = [sampler.state_dict()]
    for _ in range(2):
        for _batch in sampler:
            states.append(sampler.state_dict())
    for drawn, state in enumerate(states):
        resumed = BucketBatchSampler(dataset, BATCH)
        resumed.load_state_dict(state)
        rest = list(resumed)
        assert rest == whole[drawn : drawn + len(rest)], state
        assert list(resumed) == whole[drawn + len(rest) :][:7], "and the epoch after it"


def _epoch(dataset: LatentDataset, epoch: int) -> list[list[tuple[int, int]]]:
    sampler = BucketBatchSampler(dataset, BATCH)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_state_saved_between_two_epochs_begins_the_second(dataset: LatentDataset, num_workers: int) -> None:
    sampler = BucketBatchSampler(dataset, BATCH)
    loader = StatefulDataLoader(dataset, batch_sampler=sampler, num_workers=num_workers)
    assert sum(1 for _ in loader) == 7
    state = loader.state_dict()
    resumed = StatefulDataLoader(dataset, batch_sampler=BucketBatchSampler(dataset, BATCH), num_workers=num_workers)
    resumed.load_state_dict(state)
    keys = [batch["key"] for batch in resumed]
    assert keys == [dataset[batch]["key"] for batch in _epoch(dataset, 1)]  # type: ignore[index]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_whole_batches_resume_as_well(dataset: LatentDataset, num_workers: int) -> None:
    def loader() -> StatefulDataLoader:  # type: ignore[type-arg]
        sampler = BucketBatchSampler(dataset, BATCH)
        return StatefulDataLoader(dataset, sampler=sampler, batch_size=None, num_workers=num_workers)

    whole = list(loader())
    first = loader()
    batches = iter(first)
    assert_same([next(batches) for _ in range(3)], whole[:3])
    second = loader()
    second.load_state_dict(first.state_dict())
    assert_same(list(second), whole[3:])


def test_a_plain_loader_keeps_its_workers_and_still_changes_epochs(dataset: LatentDataset) -> None:
    sampler = BucketBatchSampler(dataset, BATCH)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=2, persistent_workers=True)
    for epoch in range(2):
        for batch, drawn in zip(loader, _epoch(dataset, epoch), strict=True):
            assert torch.equal(batch["latents"], dataset[drawn]["latents"])  # type: ignore[index]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    root = tmp_path_factory.mktemp("uneven") / "store"
    return LatentDataset(make_store(root, {WIDE: 13, TALL: 3}).paths.root)


def test_dropped_records_are_others_in_each_epoch(uneven: LatentDataset, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        sampler = BucketBatchSampler(uneven, 4)
    assert "3 records lie in buckets that fill no batch and are never drawn" in caplog.text
    assert len(sampler) == 3
    seen: Counter[int] = Counter()
    for _ in range(40):
        drawn = [record for batch in sampler for record, _ in batch]
        assert len(drawn) == len(set(drawn)) == 12
        seen.update(drawn)
    assert len(seen) == 13 and min(seen.values()) >= 30


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_padding_repeats_a_few_and_leaves_out_none(uneven: LatentDataset, world_size: int) -> None:
    samplers = [
        BucketBatchSampler(uneven, 4, last="pad", rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    assert {len(sampler) for sampler in samplers} == {5}
    drawn = Counter(record for sampler in samplers for batch in sampler for record, _ in batch)
    assert set(drawn) == set(range(16))
    assert sum(drawn.values()) == 20 and max(drawn.values()) == 2


def test_without_shuffling_records_come_in_order(dataset: LatentDataset) -> None:
    sampler = BucketBatchSampler(dataset, BATCH, shuffle=False)
    assert [record for batch in sampler for record, _ in batch] == list(range(56))


def test_a_state_of_other_batches_is_refused(dataset: LatentDataset) -> None:
    state = BucketBatchSampler(dataset, BATCH, seed=1).state_dict()
    with pytest.raises(ConfigError, match="seed was 1, now 2"):
        BucketBatchSampler(dataset, BATCH, seed=2).load_state_dict(state)
    with pytest.raises(ConfigError, match="global_batch_size was 8, now 4"):
        BucketBatchSampler(dataset, 4, seed=1).load_state_dict(state)


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (8, {"rank": 2, "world_size": 2}, "rank is 2"),
        (9, {"world_size": 2}, "9 records cannot be shared by 2 ranks"),
        (0, {}, "0 records"),
        (8, {"last": "keep"}, "last is 'keep'"),
        (33, {}, "no bucket holds a global batch of 33"),
    ],
)
def test_impossible_batches_are_refused(
    dataset: LatentDataset, size: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        BucketBatchSampler(dataset, size, **options)
