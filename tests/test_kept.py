"""An interrupted run keeps the batches it has finished: only the rest is encoded, and the bytes are as ever."""

import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from sdvae import atomic
from sdvae.cli import main
from sdvae.encoding.encode import count_kept, encode_dataset
from sdvae.encoding.kept import KeptBatches
from sdvae.encoding.manifest import EncodeSettings
from sdvae.encoding.tasks import Work
from sdvae.errors import OutputError
from sdvae.posterior import DiagonalGaussian
from sdvae.sources.open import open_source
from sdvae.store.geometry import Preprocess
from sdvae.store.roster import Roster
from sdvae.store.store import Store
from sdvae.vae import VAE
from tests.faults.conftest import flip, read_store

SETTINGS = EncodeSettings(Preprocess(size_px=32), shard_rows=9, batch_rows=2, num_threads=1)
NUM_BATCHES = 5 + 2  # nine photos in the first shard, four in the second
HERE = Work(num_workers=0)


class StoppedError(Exception):
    """Comes in the middle of a run."""


class Counting:
    """A VAE that counts the batches it encodes; before batch `stop_at` (from 0) it does what `stop` does."""

    vae: VAE

    def __init__(self, stop_at: int | None = None, stop: Callable[[], Any] | None = None) -> None:
        self.num_encoded, self.stop_at, self.stop = 0, stop_at, stop

    def __getattr__(self, name: str) -> Any:
        return getattr(self.vae, name)

    def encode(self, pixels: Tensor, budget: int | None = None) -> DiagonalGaussian:
        if self.num_encoded == self.stop_at:
            if self.stop is None:
                raise StoppedError
            self.stop()
        self.num_encoded += 1
        return self.vae.encode(pixels, budget)


@pytest.fixture(scope="module", autouse=True)
def vae(small_vae: VAE) -> None:
    Counting.vae = small_vae


def run(photos: Any, out: Path, vae: Counting, settings: EncodeSettings = SETTINGS, **others: Any) -> None:
    encode_dataset(photos, out, vae, settings, **({"work": HERE} | others))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve photos, and one that breaks while it is encoded."""
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(noise.integers(0, 256, (40, 48, 3), np.uint8)).save(folder / f"{number:02d}.png")
    (folder / "03-short.png").write_bytes((folder / "03.png").read_bytes()[:1000])
    return folder


@pytest.fixture(scope="module")
def undisturbed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out, vae = tmp_path_factory.mktemp("undisturbed") / "out", Counting()
    run(photos, out, vae)
    assert vae.num_encoded == NUM_BATCHES and not list(out.rglob("*.batch"))
    return read_store(out)


def interrupt(photos: Path, out: Path, num_batches: int) -> None:
    """Leave a run of which so many batches are done."""
    with pytest.raises(StoppedError):
        run(photos, out, Counting(num_batches))


def finish(photos: Path, out: Path, work: Work = HERE) -> int:
    """The number of batches that were left to encode."""
    vae = Counting()
    run(photos, out, vae, work=work)
    assert not list(out.rglob("*.batch"))
    return vae.num_encoded


def kept(out: Path) -> list[str]:
    return [path.name for path in sorted(out.rglob("*.batch"))]


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_interrupted_after_any_batch_only_the_rest_is_encoded(
    photos: Path, tmp_path: Path, undisturbed: dict[str, bytes], num_workers: int
) -> None:
    for num_done in range(NUM_BATCHES):
        out = tmp_path / str(num_done)
        interrupt(photos, out, num_done)
        assert read_store(out).items() <= undisturbed.items()
        assert len(kept(out)) == (num_done if num_done < 5 else num_done - 5), "a committed shard keeps nothing"
        assert count_kept(out) == (min(2 * num_done, 9) + 2 * max(0, num_done - 5), 13)
        assert finish(photos, out, Work(num_workers)) == NUM_BATCHES - num_done
        assert read_store(out) == undisturbed


def test_interrupted_at_every_batch_no_batch_is_encoded_twice(
    photos: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    for _ in range(NUM_BATCHES - 1):
        with pytest.raises(StoppedError):
            run(photos, tmp_path / "out", Counting(1))
    assert finish(photos, tmp_path / "out") == 1
    assert read_store(tmp_path / "out") == undisturbed


def test_a_flipped_bit_or_a_cut_costs_that_batch_alone(
    photos: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    interrupt(photos, out, 4)
    store = Store.open(out)
    task = Roster(file.path for file in store.rosters).task(0)
    batches = KeptBatches(store)

    def read() -> set[int]:
        return batches.read(task, task.batches(2), None).keys()  # type: ignore[return-value]

    assert read() == {0, 1, 2, 3}
    path = store.paths.batch(0, 1)
    whole = path.read_bytes()
    for bit in np.random.default_rng(0).integers(0, 8 * len(whole), 100):
        flip(path, int(bit))
        assert read() == {0, 2, 3}, f"bit {bit}"
        path.write_bytes(whole)
    for torn in (b"", whole[:40], whole[:-1], bytes(len(whole)), whole + b"x", whole[:-512] + bytes(512)):
        path.write_bytes(torn)
        assert read() == {0, 2, 3}
    assert finish(photos, out) == NUM_BATCHES - 3
    assert read_store(out) == undisturbed


def test_batches_of_another_run_are_never_taken_up(photos: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    other, out = tmp_path / "other", tmp_path / "out"
    with pytest.raises(StoppedError):
        run(photos, other, Counting(4), replace(SETTINGS, store_dtype="fp32"))
    interrupt(photos, out, 3)
    for name in kept(other):
        shutil.copy(other / "journal" / name, out / "journal")
    assert finish(photos, out) == NUM_BATCHES, "those of this run were replaced, too"
    assert read_store(out) == undisturbed


def test_a_batch_counts_only_for_its_own_records_and_rows_at_once(photos: Path, tmp_path: Path) -> None:
    interrupt(photos, tmp_path / "out", 2)
    store = Store.open(tmp_path / "out")
    task = Roster(file.path for file in store.rosters).task(0)
    batches = KeptBatches(store)
    assert batches.read(task, task.batches(2), None).keys() == {0, 1}
    assert not batches.read(task, task.batches(2), 1), "a shard is degraded as a whole, or not at all"
    assert not batches.read(task, task.batches(4), None)
    shifted = replace(task, records=task.records[1:])
    assert not batches.read(shifted, shifted.batches(2), None)


def test_restart_forgets_them(photos: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    interrupt(photos, tmp_path / "out", 3)
    vae = Counting()
    run(photos, tmp_path / "out", vae, restart=True)
    assert vae.num_encoded == NUM_BATCHES and read_store(tmp_path / "out") == undisturbed


def test_a_photo_that_could_not_be_read_has_another_chance(
    photos: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupt(photos, out, 0)
    source = open_source(photos)
    read = source.read

    def fail(key: str) -> bytes:
        if key == "02.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(key)

    monkeypatch.setattr(source, "read", fail)
    with pytest.raises(StoppedError):
        run(source, out, Counting(3))
    assert kept(out) == ["00000-00000.batch", "00000-00002.batch"]
    assert finish(photos, out) == NUM_BATCHES - 2
    assert read_store(out) == undisturbed


def test_two_processes_on_one_shard(photos: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """The second takes up what the first has done, commits the shard and forgets its batches; the first goes on."""
    out = tmp_path / "out"
    second = Counting()
    first = Counting(3, lambda: run(photos, out, second) and None)
    run(photos, out, first)
    assert first.num_encoded == NUM_BATCHES and second.num_encoded < NUM_BATCHES
    assert read_store(out) == undisturbed and not kept(out)


def test_a_disk_that_is_full_loses_nothing(
    photos: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fifth batch is the last of its shard: it cannot be kept, so the shard must not be committed without it."""
    out = tmp_path / "out"

    def fail(operation: str, path: Path) -> None:
        if operation == "write" and path.name == "00000-00004.batch":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic, "hook", fail)
    with pytest.raises(OutputError, match=r"00000-00004.batch .*: No space left on device; free some space and run"):
        run(photos, out, Counting())
    monkeypatch.setattr(atomic, "hook", lambda operation, path: None)
    assert len(kept(out)) == 4 and not list(out.glob("done/*"))
    assert finish(photos, out) == NUM_BATCHES - 4
    assert read_store(out) == undisturbed


@pytest.mark.parametrize("restart", [[], ["--restart", "--yes"]])
def test_the_closing_line_says_what_is_kept(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    restart: list[str],
) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    encode, batches, out = VAE.encode, list[int](), tmp_path / "out"

    def stopped(self: VAE, pixels: Tensor, budget: str | int | None = None) -> DiagonalGaussian:
        if (out / "manifest.json").exists():  # before, the VAE is looked at
            batches.append(len(pixels))
        if len(batches) == 4:
            signal.raise_signal(signal.SIGTERM)
        return encode(self, pixels, budget)

    monkeypatch.setattr(VAE, "encode", stopped)
    arguments = [photos, out, "--size", "32", "--batch-size", "2", "--workers", "0", "--device", "cpu", *restart]
    monkeypatch.setattr(sys, "argv", ["sdvae", "encode", *map(str, arguments)])
    try:
        with pytest.raises(SystemExit) as ended:
            main.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert ended.value.code == 143
    line = capsys.readouterr().err.splitlines()[-1]
    without = " without --restart" if restart else ""
    num_kept = sum(batches[:-1])
    assert (
        line
        == f"sdvae: stopped by SIGTERM; {num_kept} of 13 photos are encoded and kept; the same command{without} goes on"
    )
