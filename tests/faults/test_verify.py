"""Every byte of a store counts: flips, truncations and missing files are found, and named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from sdvae.cli.main import cli
from sdvae.errors import StoreError
from sdvae.store.shard import DATA_START
from sdvae.store.store import Store
from sdvae.store.verify import verify
from tests.faults.conftest import flip, store_files


def test_a_whole_store_has_no_damage_and_every_file_was_hashed(root: Path) -> None:
    files = store_files(root)
    found = verify(root)
    assert (found.damages, found.lost) == ([], [])
    assert (
        found.num_files == len(files) == 3 + 3 + 4 + 4 + 1
    )  # manifest, roster and its commit, shards, indexes, commits, quarantine
    assert found.num_records == 9
    own = ("manifest.json", "quarantine.jsonl")
    assert found.num_bytes == sum(
        path.stat().st_size
        for path in files
        if path.name not in own and path.parent.name != "done" and path != root / "roster" / "00000.json"
    )


@pytest.mark.parametrize("num_flips", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_found_in_its_file(root: Path, num_flips: int) -> None:
    """As many flips in each file, large or small: the JSONs are where a flip could hide."""
    random = np.random.default_rng(num_flips)
    files = store_files(root)
    for path in files:
        num_bits = 8 * path.stat().st_size
        for bit in random.choice(num_bits, -(-num_flips // len(files)), replace=num_bits < num_flips):
            flip(path, int(bit))
            assert [(damage.path, damage.state) for damage in verify(root).damages] == [(path, "damaged")], bit
            flip(path, int(bit))
    assert verify(root).damages == []


def test_every_truncation_and_every_missing_file_is_found(root: Path) -> None:
    for path in store_files(root):
        data = path.read_bytes()
        for length in {1, len(data) // 2, len(data) - 1, *range(0, len(data), 512)}:
            path.write_bytes(data[:length])
            assert [(damage.path, damage.state) for damage in verify(root).damages] == [(path, "damaged")], length
        path.write_bytes(data + b"\0")
        assert [damage.path for damage in verify(root).damages] == [path]
        path.unlink()
        assert [(damage.path, damage.state) for damage in verify(root).damages] == [(path, "missing")]
        path.write_bytes(data)
    assert verify(root).damages == []


def test_a_grown_store_has_more_to_lose(grown_root: Path) -> None:
    assert verify(grown_root).damages == []
    files = store_files(grown_root)
    assert verify(grown_root).num_files == len(files)
    for path in files:
        data = path.read_bytes()
        for byte in range(0, len(data), 97):
            flip(path, 8 * byte)
            assert [(damage.path, damage.state) for damage in verify(grown_root).damages] == [(path, "damaged")], byte
            flip(path, 8 * byte)
        path.unlink()
        assert [(damage.path, damage.state) for damage in verify(grown_root).damages] == [(path, "missing")]
        path.write_bytes(data)


def test_the_records_that_are_lost_are_named(root: Path) -> None:
    store = Store.open(root)
    shard = store.shard(1)
    assert shard.tensors_file is not None
    keys = [line["key"] for line in store.shard(1).records() if line["row"] is not None]
    row_bytes = (shard.tensors_file.num_bytes - DATA_START) // (2 * len(keys))
    assert len(keys) == 2, "a shard with a record in quarantine"
    for tensor in range(2):
        for row, key in enumerate(keys):
            byte = DATA_START + (tensor * len(keys) + row) * row_bytes
            for place in (byte, byte + row_bytes - 1):
                flip(shard.tensors_file.path, 8 * place)
                assert verify(root).lost == [key]
                flip(shard.tensors_file.path, 8 * place)
    flip(shard.tensors_file.path, 8 * DATA_START - 1)  # the padding of the header
    (damage,) = verify(root).damages
    assert (damage.shard, damage.lost) == (1, ()), "every number in it is whole"
    data = shard.tensors_file.path.read_bytes()
    shard.tensors_file.path.write_bytes(data[:-1])  # in the last row of mean
    assert verify(root).lost == keys[-1:]
    shard.tensors_file.path.unlink()
    assert verify(root).lost == keys


@pytest.mark.parametrize("name", ["index/00000.jsonl", "done/00000.json"])
def test_without_index_or_commit_the_roster_names_what_cannot_be_read(root: Path, name: str) -> None:
    flip(root / name, 100)
    assert verify(root).lost == ["0.png", "1.png", "2.png"]
    flip(root / "shards" / "00000-32x32.safetensors", 100)
    assert verify(root).lost == ["0.png", "1.png", "2.png"]
    flip(root / "roster" / "00000.jsonl", 100)
    assert verify(root).lost == [], "nothing knows the names any more"
    assert len(verify(root).damages) == (3 if "index" in name else 2)


def test_damage_in_many_files_is_found_in_each(root: Path) -> None:
    files = [path for path in store_files(root) if path.name != "quarantine.jsonl" and path.suffix != ".json"]
    for path in files:
        flip(path, 77)
    assert sorted(damage.path for damage in verify(root).damages) == files


def test_a_store_that_is_not_finished_is_told_from_a_damaged_one(root: Path) -> None:
    (root / "done" / "00002.json").unlink()
    assert [(damage.state, damage.lost) for damage in verify(root).damages] == [("missing", ("5.png", "6.png"))]
    (root / "quarantine.jsonl").unlink()
    assert [(damage.state, damage.lost) for damage in verify(root).damages] == [("not encoded yet", ())]
    flip(root / "index" / "00000.jsonl", 0)
    assert [damage.state for damage in verify(root).damages] == ["damaged", "not encoded yet"]


def test_other_files_and_journals_are_no_part_of_the_store(root: Path) -> None:
    (root / "notes.txt").write_text("mine")
    (root / "done" / "readme").write_text("mine")
    (root / "shards" / "00009-8x8.safetensors").write_bytes(b"never committed")
    shutil.rmtree(root / "journal")
    assert verify(root).damages == []


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a latent store"):
        verify(tmp_path / "missing")
    (tmp_path / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(StoreError, match="not a latent store"):
        verify(tmp_path)


def test_progress_counts_records(root: Path) -> None:
    seen: list[tuple[int, int]] = []
    verify(root, lambda phase, num_done, num_all: seen.append((num_done, num_all)))
    assert seen == [(3, 9), (6, 9), (8, 9), (9, 9)]


# --- The command ---


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="sdvae")


def test_a_whole_store_is_one_line(root: Path) -> None:
    result = run("verify", root)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{root} is whole: 9 records in 15 files, 0.0")


def test_damage_is_a_table_with_the_names_of_what_is_lost(root: Path) -> None:
    flip(root / "shards" / "00000-32x32.safetensors", 8 * 4096)
    (root / "index" / "00001.jsonl").unlink()
    result = run("verify", root)
    assert result.exit_code == 5
    assert result.stdout.splitlines()[:4] == [
        f"{root} is damaged:",
        "  shards/00000-32x32.safetensors  damaged  1 record lost",
        "  index/00001.jsonl               missing  3 records lost",
        "lost: 0.png, 3.png, 4-short.png, 4.png",
    ]


def test_a_machine_gets_every_name(root: Path) -> None:
    (root / "index" / "00001.jsonl").unlink()
    values = json.loads(run("verify", root, "--json", "-q").stdout)
    assert (values["command"], values["is_whole"], values["num_files"]) == ("verify", False, 15)
    lost = ["3.png", "4-short.png", "4.png"]
    assert values["damages"] == [{"path": "index/00001.jsonl", "state": "missing", "shard": 1, "lost": lost}]


def test_a_store_that_is_not_finished_is_no_mismatch(root: Path) -> None:
    (root / "done" / "00002.json").unlink()
    (root / "quarantine.jsonl").unlink()
    result = run("verify", root)
    assert result.exit_code == 1
    assert "1 shard not encoded yet" in result.stdout and "run its encode command again" in result.stdout


def test_no_store_is_an_error(tmp_path: Path) -> None:
    result = run("verify", tmp_path)
    assert result.exit_code == 1 and "not a latent store" in result.stderr
