"""What is damaged comes back byte for byte, from what is left of the store or from the photos."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from sdvae import atomic, sealed
from sdvae.cli.main import cli
from sdvae.encoding.repair import Photos, remedy, repair
from sdvae.errors import StoreError
from sdvae.journal import Journal
from sdvae.sources.open import open_source
from sdvae.store.verify import verify
from sdvae.vae import VAE
from tests.conftest import SMALL, random_model
from tests.faults.conftest import flip, read_store, store_files

Spoil = Callable[[Path], None]


def flip_one(path: Path) -> None:
    flip(path, 8 * path.stat().st_size // 3 + 1)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


SPOILS = [flip_one, cut, zero, Path.unlink]


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize(("kind", "num_files"), [("root", 12), ("grown_root", 16)])
def test_each_file_but_the_numbers_follows_from_the_others(
    kind: str, num_files: int, spoil: Spoil, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(kind)
    before = read_store(root)
    files = [path for path in store_files(root) if path.parent.name != "shards" and path.stat().st_size]
    assert len(files) == num_files
    for path in files:
        spoil(path)
        assert verify(root).damages
        found = repair(root)
        assert (found.restored, found.verdict.damages) == ([path], [])
        assert read_store(root) == before, path


def test_every_bit_of_a_commit_comes_back(root: Path) -> None:
    """Whether a shard was degraded is in the journal, too."""
    path = root / "done" / "00001.json"
    journal = root / "journal" / "timings.jsonl"
    value = sealed.read_json(path)
    for degraded in (None, 1):
        data = sealed.seal(value | {"degraded": degraded})
        with Journal(journal) as notes:
            notes.append({"shard": 1, "degraded": degraded})
        for bit in range(0, 8 * len(data), 131):
            path.write_bytes(data)
            flip(path, bit)
            assert repair(root).verdict.damages == []
            assert path.read_bytes() == data, (degraded, bit)
    journal.unlink()
    flip(path, 0)
    assert [damage.path for damage in repair(root).verdict.damages] == [path], "nothing is guessed"


def test_several_files_at_once(root: Path) -> None:
    before = read_store(root)
    for name in ("manifest.json", "roster/00000.jsonl", "done/00000.json", "done/00003.json"):
        flip_one(root / name)
    found = repair(root)
    assert {path.name for path in found.restored} == {"manifest.json", "00000.jsonl", "00000.json", "00003.json"}
    assert read_store(root) == before


def test_lost_numbers_are_not_made_up(root: Path) -> None:
    shard = root / "shards" / "00001-32x32.safetensors"
    flip(shard, 8 * 4096)
    (root / "done" / "00001.json").unlink()
    before = read_store(root)
    found = repair(root)
    assert (found.restored, [damage.path.name for damage in found.verdict.damages]) == ([], ["00001.json"])
    assert read_store(root) == before
    assert "name the photos and the VAE" in remedy(found.verdict.damages[0])


def test_an_index_that_contradicts_the_numbers_is_not_committed(root: Path) -> None:
    """Without a commit, nothing proves which of two is right."""
    flip(root / "index" / "00000.jsonl", 8 * 30)
    (root / "done" / "00000.json").unlink()
    assert [damage.path.name for damage in repair(root).verdict.damages] == ["00000.json"]


def test_a_manifest_comes_back_only_as_the_one_that_the_commits_name(root: Path) -> None:
    copy, manifest = root / "journal" / "manifest.json", root / "manifest.json"
    before = copy.read_bytes()
    other = sealed.seal(sealed.read_json(manifest) | {"latent_error": 0.25})
    copy.write_bytes(other)
    manifest.unlink()
    found = repair(root)
    assert [damage.path for damage in found.verdict.damages] == [manifest] and not manifest.exists()
    assert "journal/" in remedy(found.verdict.damages[0])
    copy.write_bytes(before)
    assert repair(root).restored == [manifest] and manifest.read_bytes() == before


def test_a_roster_needs_every_index(root: Path) -> None:
    roster = root / "roster" / "00000.jsonl"
    flip_one(roster)
    flip_one(root / "index" / "00002.jsonl")
    found = repair(root)
    assert [damage.path.name for damage in found.verdict.damages] == ["00000.jsonl", "00002.jsonl"]
    assert "indexes of all its shards" in remedy(found.verdict.damages[0])


def test_what_is_not_encoded_yet_is_left_to_who_encodes(root: Path) -> None:
    for name in ("done/00002.json", "quarantine.jsonl"):
        (root / name).unlink()
    before = read_store(root)
    found = repair(root)
    assert found.restored == [] and found.verdict.is_unfinished
    assert read_store(root) == before


class _Death(BaseException):
    """What no code of ours catches."""


@pytest.mark.parametrize(
    "names",
    [
        ["manifest.json", "roster/00000.jsonl", "done/00000.json", "quarantine.jsonl"],
        ["index/00001.jsonl", "index/00002.jsonl", "done/00003.json"],
    ],
)
def test_a_repair_may_die_at_every_operation(root: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    before = read_store(root)

    def repair_until(last: int) -> bool:
        num_operations = 0

        def die(operation: str, path: Path) -> None:
            nonlocal num_operations
            num_operations += 1
            if num_operations > last:
                raise _Death

        with monkeypatch.context() as patch:
            patch.setattr(atomic, "hook", die)
            try:
                repair(root)
            except _Death:
                return False
            return True

    for last in range(1000):
        for name in names:
            flip_one(root / name)
        is_done = repair_until(last)
        assert repair(root).verdict.damages == []
        assert read_store(root) == before, last
        if is_done:
            break
    assert last > 15


# --- With the photos ---


@pytest.fixture
def again(photos: Path, small_vae: VAE) -> Photos:
    def load_vae(dtype: str) -> VAE:
        assert dtype == "fp32"
        return small_vae

    return Photos(open_source(photos), load_vae)


@pytest.mark.parametrize("spoil", SPOILS)
def test_lost_numbers_are_encoded_again(root: Path, again: Photos, spoil: Spoil) -> None:
    before = read_store(root)
    for number in range(3):
        spoil(root / "shards" / f"{number:05d}-32x32.safetensors")
    spoil(root / "index" / "00000.jsonl")
    spoil(root / "done" / "00001.json")
    assert repair(root).verdict.damages
    found = repair(root, again)
    assert found.verdict.damages == []
    assert read_store(root) == before


@pytest.mark.parametrize("num_flips", [28, pytest.param(1000, marks=pytest.mark.slow)])
def test_any_flipped_bit_is_flipped_back(root: Path, again: Photos, num_flips: int) -> None:
    random = np.random.default_rng(num_flips)
    before = read_store(root)
    files = store_files(root)
    for number in range(num_flips):
        path = files[number % len(files)]
        flip(path, int(random.integers(8 * path.stat().st_size)))
        found = repair(root, again)
        assert (found.restored, found.verdict.damages) == ([path], [])
    assert read_store(root) == before


def test_another_vae_is_refused_with_the_differences(root: Path, again: Photos) -> None:
    other = VAE(random_model(SMALL, seed=1), torch.device("cpu"), torch.float32, name="another VAE")
    flip(root / "shards" / "00000-32x32.safetensors", 8 * 4096)
    flip(root / "done" / "00001.json", 100)
    flip(root / "shards" / "00001-32x32.safetensors", 8 * 4096)
    before = read_store(root)
    with pytest.raises(StoreError, match=r'vae\.fingerprint was "\w+", now "\w+"'):
        repair(root, replace(again, load_vae=lambda dtype: other))
    assert read_store(root) == before


def test_other_photos_are_refused_by_name(root: Path, again: Photos, photos: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(photos, tmp_path / "photos"))
    (changed / "1.png").write_bytes((changed / "2.png").read_bytes())
    (changed / "2.png").unlink()
    (changed / "6.png").unlink()  # in another shard
    flip(root / "shards" / "00000-32x32.safetensors", 8 * 4096)
    before = read_store(root)
    with pytest.raises(StoreError, match=r"2 photos in .* are not those .*: 1\.png, 2\.png; put those back"):
        repair(root, replace(again, source=open_source(changed)))
    assert read_store(root) == before


# --- The command ---


@pytest.fixture(scope="module")
def vae_folder(small_vae: VAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    small_vae.save(folder)
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="sdvae")


def test_the_command_repairs(root: Path, photos: Path, vae_folder: Path) -> None:
    before = read_store(root)
    flip(root / "shards" / "00000-32x32.safetensors", 8 * 4096)
    flip(root / "manifest.json", 100)
    advice = run("verify", root).stdout.splitlines()[-1]
    assert advice == f"next: sdvae verify {root} --repair, with --source SRC --vae VAE where latents are lost"
    result = run("verify", root, "--repair")
    assert result.exit_code == 5 and f"restored {root}/manifest.json" in result.stderr
    assert result.stdout.splitlines() == [
        f"{root} is damaged:",
        "  shards/00000-32x32.safetensors  damaged  1 record lost",
        "lost: 0.png",
        "shards/00000-32x32.safetensors: its numbers are in no other file; name the photos and the VAE: "
        "--repair --source SRC --vae VAE",
    ]
    result = run("verify", root, "--repair", "--source", photos, "--vae", vae_folder, "--json")
    assert result.exit_code == 0, result.stderr
    values = json.loads(result.stdout)
    assert (values["is_whole"], values["restored"]) == (True, ["shards/00000-32x32.safetensors"])
    assert read_store(root) == before


def test_a_source_is_for_repairs(root: Path, photos: Path) -> None:
    result = run("verify", root, "--source", photos)
    assert result.exit_code == 2 and "--source needs --repair" in result.stderr
