import contextlib
import hashlib
import io
import json
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

from sdvae import sealed
from sdvae.config import FAMILIES, VAEConfig
from sdvae.errors import StoreError, VerifyError
from sdvae.reading.dataset import LatentDataset
from sdvae.store.paths import StorePaths
from sdvae.store.shard import TensorPlaces, commit_shard, row_sha256
from sdvae.store.store import FORMAT, VERSION, Store, commit_roster, differences
from tests.made_stores import make_generation, make_store

SCALING = {"scaling_factor": 0.5}
KEYS = ["cats/a.jpg", "cats/b.jpg", "c.jpg", "é\u2028.jpg"]


def _moments(num_rows: int, seed: int = 0, dtype: Any = np.float16) -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal((num_rows, 4, 2, 3)).astype(dtype) for name in ("mean", "logvar")}


def _lines(keys: list[str], failing: str, moments: dict[str, NDArray[Any]]) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    row = 0
    for key in keys:
        line: dict[str, Any] = {"key": key, "step": None, "reason": None, "row": row, "latents_sha256": None}
        if key in failing:
            line |= {"step": "decode", "reason": "truncated", "row": None}
        else:
            line["latents_sha256"] = row_sha256(moments, row)
            row += 1
        lines.append(line)
    return lines


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Three shards: two rows and a failure, one row, and a shard of nothing but failures."""
    paths = StorePaths(tmp_path / "out")
    paths.make_folders()
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "store_dtype": "fp16",
        "latent_scaling": SCALING,
    }
    manifest["preprocess"] = {"flip": False}
    sealed.write_json(paths.manifest, manifest)
    make_generation(Store.open(paths.root), num_records=6, num_shards=3)
    first, second = _moments(2), _moments(1, seed=1)
    commit_shard(paths, 0, (16, 24), _lines(KEYS[:3], KEYS[1], first), first)
    commit_shard(paths, 1, (16, 24), _lines(KEYS[3:], "", second), second)
    commit_shard(paths, 2, None, _lines(["x", "a device"], "x a device", {}), {})
    store = Store.open(paths.root)
    store.finalise()
    return store


def test_what_was_committed_is_read_back(store: Store) -> None:
    shards = store.shards()
    assert [(shard.number, shard.num_rows, shard.num_quarantined) for shard in shards] == [
        (0, 2, 1),
        (1, 1, 0),
        (2, 0, 2),
    ]
    assert [shard.places.shape for shard in shards] == [(2, 4, 2, 3), (1, 4, 2, 3), (0, 0, 0, 0)]
    assert [line["key"] for shard in shards for line in shard.records()] == [*KEYS, "x", "a device"]
    for number, expected in ((0, _moments(2)), (1, _moments(1, seed=1))):
        mean, logvar = store.shard(number).moments()
        assert np.array_equal(mean, expected["mean"]) and np.array_equal(logvar, expected["logvar"])
        with pytest.raises(ValueError, match="read-only"):
            mean[0] = 0
    assert [len(values) for values in store.shard(2).moments()] == [0, 0]


def test_the_quarantine_is_sorted_and_complete(store: Store) -> None:
    lines = [json.loads(line) for line in store.paths.quarantine.read_bytes().splitlines()]
    assert [(line["key"], line["step"], line["reason"]) for line in lines] == [
        ("a device", "decode", "truncated"), ("cats/b.jpg", "decode", "truncated"), ("x", "decode", "truncated"),
    ]  # fmt: skip


def test_the_safetensors_library_reads_a_shard(store: Store) -> None:
    path = store.paths.tensors(0, (16, 24))
    expected = _moments(2)
    found = load_file(path)
    assert found.keys() == {"mean", "logvar"}
    assert all(np.array_equal(found[name], expected[name]) for name in found)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "latents": "raw"}
        assert torch.equal(file.get_tensor("mean"), torch.from_numpy(expected["mean"]))


def test_the_bytes_of_a_shard_are_those_of_the_specification(store: Store) -> None:
    data = store.paths.tensors(0, (16, 24)).read_bytes()
    expected = _moments(2)
    header = (
        '{"__metadata__":{"format":"pt","latents":"raw"},'
        '"logvar":{"data_offsets":[0,96],"dtype":"F16","shape":[2,4,2,3]},'
        '"mean":{"data_offsets":[96,192],"dtype":"F16","shape":[2,4,2,3]}}'
    )
    assert data[:4096] == struct.pack("<Q", 4088) + header.encode().ljust(4088)
    row_bytes = 4 * 2 * 3 * 2
    for tensor, name in enumerate(["logvar", "mean"]):
        for row in range(2):
            start = 4096 + (tensor * 2 + row) * row_bytes
            assert data[start : start + row_bytes] == expected[name][row].astype("<f2").tobytes()
    assert len(data) == 4096 + 4 * row_bytes


def test_a_row_digest_is_that_of_its_bytes(store: Store) -> None:
    moments = _moments(2)
    expected = hashlib.sha256(moments["logvar"][1].tobytes() + moments["mean"][1].tobytes()).hexdigest()
    assert store.shard(0).records()[2]["latents_sha256"] == row_sha256(moments, 1) == expected


def test_the_header_has_room_for_the_largest_shard() -> None:
    names = ("logvar", "logvar_flip", "mean", "mean_flip")
    assert len(TensorPlaces(names, np.dtype("<f4"), (1024, 128, 4096, 4096)).header()) == 4096


def test_the_reader_of_the_specification_works(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = _python_of_the_specification()
    monkeypatch.chdir(store.paths.root.parent)
    store.paths.root.rename(store.paths.root.parent / "OUT")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, reader := {})
    scaled = [
        np.float32(0.5) * mean.astype(np.float32) for mean in (*_moments(2)["mean"], *_moments(1, seed=1)["mean"])
    ]
    written = [KEYS[0], KEYS[2], KEYS[3]]
    expected = [f"{key} {mean.shape} {float(mean.std())}" for key, mean in zip(written, scaled, strict=True)]
    assert printed.getvalue().split("\n")[:-1] == expected
    path = Path("OUT/shards/00001-16x24.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(AssertionError, match=f"{KEYS[3]} is damaged"):
        list(reader["read_store"]("OUT"))


WHITENED = replace(FAMILIES["sd3"], latents_mean=(0.25,) * 16, latents_std=(2.0,) * 16)


@pytest.mark.parametrize(
    ("store_dtype", "has_flips", "config"),
    [("fp16", True, WHITENED), ("fp32", False, WHITENED), ("fp32", False, FAMILIES["flux2"])],
)
def test_the_reader_of_the_specification_scales_as_the_dataset(
    tmp_path: Path, store_dtype: str, has_flips: bool, config: VAEConfig
) -> None:
    sizes = {(64, 64): 5, (64, 96): 3}
    make_store(
        tmp_path / "a", sizes, has_flips=has_flips, store_dtype=store_dtype, config=config, broken=("cat/000.png",)
    )
    (code,) = _python_of_the_specification()
    exec(code.partition("\nfor record, mean, std")[0], reader := {})
    found = list(reader["read_store"](tmp_path / "a"))
    dataset = LatentDataset(tmp_path / "a", sample=False)
    expected = [dataset[number] for number in range(len(dataset))]
    assert [record["key"] for record, _, _ in found] == [example["key"] for example in expected]
    assert len(expected) == 7
    for (_, mean, std), example in zip(found, expected, strict=True):
        assert mean.shape == std.shape == example["latents"].shape
        if not example["is_flipped"]:
            np.testing.assert_allclose(mean, example["latents"], rtol=1e-5, atol=1e-6)


def _python_of_the_specification() -> list[str]:
    text = (Path(__file__).parents[1] / "docs" / "store.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def _all_files(store: Store) -> list[Path]:
    files = [path for path in sorted(store.paths.root.rglob("*")) if path.is_file()]
    assert len(files) == 3 + 2 + 3 + 3 + 1  # manifest, roster and its commit, shards, indexes, commits, quarantine
    return files


def test_tensors_of_other_names_are_passed_over(store: Store) -> None:
    moments = _moments(2)
    more = moments | {"a_mask": np.zeros_like(moments["mean"])}  # lies before the others
    store.paths.done(0).unlink()
    commit_shard(store.paths, 0, (16, 24), _lines(KEYS[:3], KEYS[1], moments), more)
    tensors = store.shard(0).tensors()
    assert tensors.keys() == moments.keys() and all(np.array_equal(tensors[name], moments[name]) for name in moments)


def test_damage_is_never_read_as_data(store: Store) -> None:
    path = store.paths.tensors(0, (16, 24))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(VerifyError, match="not the 4,288 bytes committed"):
        store.shard(0).moments()
    path.write_bytes(b"\0" * 4288)
    with pytest.raises(VerifyError, match="does not begin with the header"):
        store.shard(0).moments()
    path.write_bytes(TensorPlaces(("logvar", "mean"), np.dtype("<f2"), (2, 4, 3, 2)).header() + bytes(192))
    with pytest.raises(VerifyError, match="does not describe logvar"):
        store.shard(0).moments()
    index = store.paths.index(0)
    index.write_bytes(index.read_bytes().replace(b"cats/a", b"cats/A"))
    with pytest.raises(VerifyError, match="not those committed"):
        store.shard(0).records()


def test_only_commits_count(store: Store) -> None:
    store.paths.done(1).unlink()
    assert [shard.number for shard in store.shards()] == [0, 2]
    with pytest.raises(StoreError, match="No such file"):
        store.shard(1)


def test_a_commit_of_another_store_or_number_is_refused(store: Store) -> None:
    store.paths.done(1).write_bytes(store.paths.done(0).read_bytes())
    with pytest.raises(VerifyError, match="another store or number"):
        store.shards()
    manifest = store.manifest | {"latent_error": 0.5}
    sealed.write_json(store.paths.manifest, manifest)
    with pytest.raises(VerifyError, match="another store or number"):
        Store.open(store.paths.root).shard(0)


def test_a_shard_may_be_committed_twice_but_not_with_other_bytes(store: Store) -> None:
    before = {path: path.read_bytes() for path in _all_files(store)}
    moments = _moments(2)
    commit_shard(store.paths, 0, (16, 24), _lines(KEYS[:3], KEYS[1], moments), moments)
    assert {path: path.read_bytes() for path in _all_files(store)} == before
    other = _moments(2, seed=2)
    with pytest.raises(StoreError, match="gave other bytes"):
        commit_shard(store.paths, 0, (16, 24), _lines(KEYS[:3], KEYS[1], other), other)
    assert {path: path.read_bytes() for path in _all_files(store)} == before


def test_what_is_no_store_is_refused(tmp_path: Path, store: Store) -> None:
    with pytest.raises(StoreError, match="is not a latent store"):
        Store.open(tmp_path / "missing")
    (tmp_path / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(StoreError, match="is not the manifest of a latent store"):
        Store.open(tmp_path)
    sealed.write_json(tmp_path / "manifest.json", store.manifest | {"version": 3})
    with pytest.raises(StoreError, match="a store of version 3; this sdvae reads 1 and 2"):
        Store.open(tmp_path)


def test_clearing_removes_the_store_and_leaves_the_rest(store: Store) -> None:
    root = store.paths.root
    (root / "notes.txt").write_text("mine")
    (root / "shards" / "mine.safetensors").write_text("mine")
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "00000.json").write_text("mine")
    (root / "index" / "00009.jsonl").symlink_to(root / "notes.txt")
    (root / "shards" / ".00000-8x8.safetensors.12.0123abcd.tmp").write_text("left over")
    kept = ["elsewhere/00000.json", "index/00009.jsonl", "notes.txt", "shards/mine.safetensors"]
    own, other = store.paths.contents()
    assert [path.relative_to(root).as_posix() for path in other] == kept
    assert len(own) == 13
    store.paths.clear()
    assert sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()) == kept


# --- Mirrored photos ---


@pytest.fixture
def flipped(tmp_path: Path) -> Store:
    """One shard of two rows, with mirrored photos."""
    paths = StorePaths(tmp_path / "flipped")
    paths.make_folders()
    manifest = {"format": FORMAT, "version": VERSION, "store_dtype": "fp16"}
    sealed.write_json(paths.manifest, manifest | {"preprocess": {"flip": True}, "latent_scaling": SCALING})
    make_generation(Store.open(paths.root), num_records=2, num_shards=1)
    moments = _flipped_moments()
    commit_shard(paths, 0, (16, 24), _lines(KEYS[:2], "", moments), moments, degraded=1)
    store = Store.open(paths.root)
    store.finalise()
    return store


def _flipped_moments() -> dict[str, NDArray[Any]]:
    return _moments(2) | {f"{name}_flip": values for name, values in _moments(2, seed=3).items()}


def test_mirrored_photos_lie_beside_the_others(flipped: Store) -> None:
    expected = _flipped_moments()
    for is_flipped, ending in ((False, ""), (True, "_flip")):
        mean, logvar = flipped.shard(0).moments(flipped=is_flipped)
        assert np.array_equal(mean, expected[f"mean{ending}"]) and np.array_equal(logvar, expected[f"logvar{ending}"])
    data = b"".join(expected[name][1].tobytes() for name in ("logvar", "logvar_flip", "mean", "mean_flip"))
    assert flipped.shard(0).records()[1]["latents_sha256"] == hashlib.sha256(data).hexdigest()
    assert load_file(flipped.paths.tensors(0, (16, 24))).keys() == expected.keys()
    assert flipped.shard(0).degraded == 1


def test_a_store_without_mirrored_photos_says_so(store: Store) -> None:
    with pytest.raises(StoreError, match="holds no mirrored photos; encode with --flip"):
        store.shard(0).moments(flipped=True)
    assert store.shard(0).degraded is None


# --- Generations ---


def _grow(store: Store, generation: int, previous: str, first_shard: int) -> None:
    header = {
        "generation": generation, "previous": previous, "first_shard": first_shard, "num_shards": 2, "num_records": 5,
    }  # fmt: skip
    commit_roster(store, [sealed.canonical_json(header), b"five records\n"])


def test_a_generation_adds_its_roster_and_its_shards(store: Store) -> None:
    (first,) = store.rosters
    assert store.num_shards == 3
    _grow(store, 1, first.sha256, 3)
    assert store.num_shards == 5 and not store.paths.quarantine.exists()
    second = store.rosters[1]
    assert second.path == store.paths.roster(1) and second.is_whole()
    _grow(store, 2, second.sha256, 5)
    assert store.num_shards == 7 and all(roster.is_whole() for roster in store.rosters)
    assert store.rosters == Store.open(store.paths.root).rosters
    assert store.paths.contents()[1] == []


def test_a_roster_without_its_commit_is_no_generation(store: Store) -> None:
    _grow(store, 1, store.rosters[0].sha256, 3)
    store.paths.generation(1).unlink()
    assert len(store.rosters) == 1 and store.num_shards == 3


def test_a_generation_of_another_store_is_refused(store: Store) -> None:
    _grow(store, 1, "0" * 64, 3)
    with pytest.raises(VerifyError, match=r"00001.json is a generation of another store"):
        store.rosters  # noqa: B018


def test_differences_are_listed_with_their_place() -> None:
    stored = {"a": 1, "b": {"c": [1], "d": "x"}, "gone": None}
    assert differences(stored, {"a": 1, "b": {"c": [2], "d": "x"}, "new": True}) == [
        "b.c was [1], now [2]", "new was null, now true",
    ]  # fmt: skip
