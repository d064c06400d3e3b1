"""SIGKILL at any moment, to all processes or to one, then the same command again: the bytes of an undisturbed run."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch import Tensor

from sdvae import atomic
from sdvae.encoding.encode import encode_dataset
from sdvae.encoding.manifest import EncodeSettings
from sdvae.encoding.tasks import Work
from sdvae.posterior import DiagonalGaussian
from sdvae.store.geometry import Preprocess
from sdvae.store.store import Store
from sdvae.store.verify import verify
from sdvae.vae import VAE
from tests.conftest import SMALL, random_model
from tests.faults.conftest import read_store

SETTINGS = EncodeSettings(Preprocess(size_px=32), shard_rows=4, batch_rows=2, num_threads=1)
NUM_PHOTOS = 18
NUM_SHARDS, BATCHES_IN_SHARD = 6, 2
NUM_KILLS = int(os.environ.get("SDVAE_KILLS", "60"))  # of the slow test; scripts/soak asks for more


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    """Forks from a process that imported torch and never ran an operation: starting costs no import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.test_kill"])
    return context


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighteen photos and a broken one."""
    folder = tmp_path_factory.mktemp("many")
    noise = np.random.default_rng(0)
    for number in range(NUM_PHOTOS):
        Image.fromarray(noise.integers(0, 256, (40, 48, 3), np.uint8)).save(folder / f"{number:02d}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


@dataclass(frozen=True)
class Victim:
    """Encodes in a process of its own, and leaves traces of how far it came that no SIGKILL takes."""

    context: ForkServerContext
    photos: Path
    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def pause(self) -> Path:
        """While this file exists, encoding stops in the middle of its third shard: one can look at the processes."""
        return self.folder / "pause"

    @property
    def num_batches(self) -> int:
        """Batches that went through the network, of all runs so far."""
        path = self.folder / "batches"
        return path.stat().st_size if path.exists() else 0

    @property
    def num_operations(self) -> int:
        """Operations of atomic.py in the last run that was not killed."""
        return int(json.loads((self.folder / "num_operations").read_text()))

    @property
    def num_committed(self) -> int:
        return len(list(self.out.glob("done/*.json")))

    def start(self, num_workers: int = 0, kill_at: int | None = None) -> BaseProcess:
        """`kill_at` is the operation of atomic.py that it does not live to see."""
        self.folder.mkdir(exist_ok=True)
        arguments = (self.photos, self.folder, num_workers, kill_at)
        process = self.context.Process(target=_encode, args=arguments, daemon=True)
        process.start()
        return process

    def finish(self, num_workers: int = 0) -> None:
        process = self.start(num_workers)
        process.join(120)
        assert process.exitcode == 0

    def check_left_behind(self, expected: dict[str, bytes]) -> None:
        """Whatever has its final name is complete."""
        for name, data in read_store(self.out).items():
            assert atomic.is_temporary(Path(name).name) or data == expected[name], name


def _encode(photos: Path, folder: Path, num_workers: int, kill_at: int | None) -> None:
    num_operations = 0

    def count(operation: str, path: Path) -> None:
        nonlocal num_operations
        num_operations += 1
        if num_operations == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    atomic.hook = count
    with (folder / "batches").open("ab", buffering=0) as batches:

        class Slow(VAE):
            """Encoding takes longer than writing, as it does in earnest: most kills meet a shard in flight."""

            def encode(self, pixels: Tensor, budget: str | int | None = None) -> DiagonalGaussian:
                time.sleep(0.02)
                while batches.tell() > 2 * BATCHES_IN_SHARD and (folder / "pause").exists():
                    time.sleep(0.01)
                batches.write(b"\n")
                return super().encode(pixels)

        vae = Slow(random_model(SMALL), torch.device("cpu"), torch.float32, name="small random VAE")
        batches.truncate(os.fstat(batches.fileno()).st_size)
        encode_dataset(photos, folder / "out", vae, SETTINGS, work=Work(num_workers=num_workers))
    (folder / "num_operations").write_text(json.dumps(num_operations))


@pytest.fixture(scope="module")
def undisturbed(context: ForkServerContext, many: Path, tmp_path_factory: pytest.TempPathFactory) -> Victim:
    victim = Victim(context, many, tmp_path_factory.mktemp("undisturbed"))
    victim.finish()
    assert verify(victim.out).damages == []
    store = Store.open(victim.out)
    assert (store.num_shards, sum(shard.num_rows for shard in store.shards())) == (NUM_SHARDS, NUM_PHOTOS)
    return victim


@pytest.fixture
def victim(context: ForkServerContext, many: Path, tmp_path: Path) -> Iterator[Victim]:
    yield Victim(context, many, tmp_path / "victim")


def _tree(process: BaseProcess) -> list[psutil.Process]:
    """The process and all it started."""
    assert process.pid is not None
    try:
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _wait_until(is_so: Callable[[], bool], process: BaseProcess) -> None:
    while not is_so() and process.exitcode is None:
        time.sleep(0.001)


def _time_encoding(victim: Victim, num_workers: int) -> float:
    """Seconds from the first batch of a run to its end."""
    process = victim.start(num_workers)
    _wait_until(lambda: victim.num_batches > 0, process)
    begun = time.monotonic()
    process.join(120)
    assert process.exitcode == 0
    return time.monotonic() - begun


def _kill_after(victim: Victim, num_workers: int, is_so: Callable[[], bool], delay_s: float) -> bool:
    """Kill all processes of a run so long after something is so; False where it was done before."""
    process = victim.start(num_workers)
    _wait_until(is_so, process)
    time.sleep(delay_s)
    processes = _tree(process)
    _kill(processes)
    process.join()
    assert psutil.wait_procs(processes, 120)[1] == [], "orphans"
    return process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("num_kills", "num_workers"),
    [(12, 0), pytest.param(NUM_KILLS, 2, marks=[pytest.mark.slow, pytest.mark.timeout(0)])],
)
def test_killed_at_a_random_moment_then_finished(
    victim: Victim, undisturbed: Victim, num_kills: int, num_workers: int
) -> None:
    """The tree of processes dies; what was committed is not done again, and few batches are."""
    encoding_s = _time_encoding(victim, num_workers)
    expected = read_store(undisturbed.out)
    moments = random.Random(0)
    stages: Counter[str] = Counter()
    repeated: Counter[int] = Counter()
    in_flight = 0
    while stages.total() < num_kills or in_flight < num_kills * 2 / 3:  # else the kills missed the work
        shutil.rmtree(victim.folder)
        is_early = stages.total() % 6 == 0  # one in six kills may come before the work
        is_so = victim.out.exists if is_early else lambda: victim.num_batches > 0
        if not _kill_after(victim, num_workers, is_so, moments.uniform(0.0, encoding_s)):
            continue
        num_committed = victim.num_committed
        if not (victim.out / "manifest.json").exists():
            stages["before the first shard"] += 1
        elif num_committed < NUM_SHARDS:
            stages[f"{num_committed} of {NUM_SHARDS} shards"] += 1
            in_flight += 1
        else:
            stages["after the last shard"] += 1
        victim.check_left_behind(expected)
        times = {path: path.stat().st_mtime_ns for path in victim.out.glob("done/*.json")}
        victim.finish(num_workers)
        assert read_store(victim.out) == expected
        assert times.items() <= {path: path.stat().st_mtime_ns for path in victim.out.glob("done/*.json")}.items()
        repeated[victim.num_batches - undisturbed.num_batches] += 1
    print(f"\n{stages.total()} kills, {in_flight} with a shard in flight")
    for stage, count in sorted(stages.items()):
        print(f"  {stage:24} {count:4} {'#' * count}")
    print(f"batches repeated after a kill: {dict(sorted(repeated.items()))}")
    assert max(repeated) <= 3, "more than the one in the network, and those that waited for the disk"


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_two_processes_killed_at_random_moments_then_finished(victim: Victim, undisturbed: Victim) -> None:
    """Both encode all shards of one store, keep and take up each other's batches, and die together."""
    expected, moments = read_store(undisturbed.out), random.Random(1)
    encoding_s = _time_encoding(victim, num_workers=0)
    num_left: Counter[int] = Counter()
    while num_left.total() < NUM_KILLS // 3:
        shutil.rmtree(victim.folder)
        processes = [victim.start(), victim.start()]
        _wait_until(lambda: victim.num_batches > 0, processes[0])
        time.sleep(moments.uniform(0.0, encoding_s))
        _kill([one for process in processes for one in _tree(process)])
        for process in processes:
            process.join()
        num_left[len(list(victim.out.glob("journal/*.batch")))] += 1
        victim.check_left_behind(expected)
        victim.finish()
        assert read_store(victim.out) == expected and not list(victim.out.glob("journal/*.batch"))
    print(f"\n{num_left.total()} kills of two processes; batches kept after them: {dict(sorted(num_left.items()))}")
    assert max(num_left) > 0


def test_killed_in_the_middle_of_a_shard_no_batch_is_encoded_twice(victim: Victim, undisturbed: Victim) -> None:
    process = _start_and_pause(victim, lambda: bool(list(victim.out.glob("journal/00002-00000.batch"))))
    assert victim.num_batches == 2 * BATCHES_IN_SHARD + 1
    _kill(_tree(process))
    process.join()
    victim.pause.unlink()
    victim.finish()
    assert victim.num_batches == undisturbed.num_batches
    assert read_store(victim.out) == read_store(undisturbed.out)


def test_killed_again_and_again_in_one_store(victim: Victim, undisturbed: Victim) -> None:
    """Each run gets some operations further than the last one's death."""
    expected = read_store(undisturbed.out)
    num_kills = 0
    while True:
        process = victim.start(kill_at=25 + num_kills)
        process.join(120)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        num_kills += 1
        victim.check_left_behind(expected)
    assert num_kills >= 5
    assert read_store(victim.out) == expected
    assert victim.num_batches - undisturbed.num_batches <= num_kills * 3


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_killed_at_every_operation_then_finished(victim: Victim, undisturbed: Victim) -> None:
    expected = read_store(undisturbed.out)
    kill_at = 0
    while True:
        kill_at += 1
        process = victim.start(kill_at=kill_at)
        process.join(120)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        victim.check_left_behind(expected)
        victim.finish()
        assert read_store(victim.out) == expected, kill_at
        shutil.rmtree(victim.folder)
    print(f"\nkilled at each of {kill_at - 1} operations, each resumed to the same bytes")
    assert kill_at - 1 == victim.num_operations > 80


# --- One process of several ---


def _start_and_pause(victim: Victim, is_there: Callable[[], bool] | None = None) -> BaseProcess:
    """With two workers, in the middle of the work: a shard is committed, and most are not."""
    victim.folder.mkdir()
    victim.pause.touch()
    process = victim.start(num_workers=2)
    _wait_until(is_there or (lambda: victim.num_committed > 0), process)
    assert process.exitcode is None
    return process


def test_no_orphan_outlives_the_encoder(victim: Victim, undisturbed: Victim) -> None:
    """Only the encoder is killed; the processes that decode for it find out."""
    process = _start_and_pause(victim)
    encoder, *workers = _tree(process)
    assert len(workers) == 1 + 2  # who forks, and who decode
    _kill([encoder])
    victim.pause.unlink()
    process.join()
    assert psutil.wait_procs(workers, 120)[1] == []
    victim.finish(num_workers=1)
    assert read_store(victim.out) == read_store(undisturbed.out)


def test_a_killed_worker_is_replaced_and_no_photo_is_blamed(victim: Victim, undisturbed: Victim) -> None:
    process = _start_and_pause(victim)
    _, _, *workers = _tree(process)
    assert len(workers) == 2
    _kill(workers[:1])
    victim.pause.unlink()
    process.join(120)
    assert process.exitcode == 0
    assert read_store(victim.out) == read_store(undisturbed.out)
