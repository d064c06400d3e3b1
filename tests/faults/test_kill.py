"""SIGKILL at any moment, then the same command again: the bytes of an undisturbed run."""

import json
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdvae import atomic
from sdvae.data.encode import EncodeSettings, encode_source
from sdvae.data.preprocess import Preprocess
from sdvae.data.store import Store
from sdvae.data.verify import verify
from sdvae.vae import VAE
from tests.conftest import SMALL, random_model

SETTINGS = EncodeSettings(Preprocess(size_px=32), shard_rows=4, batch_rows=2, num_threads=1)
NUM_PHOTOS = 30


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    """Forks from a process that imported torch and never ran an operation: starting costs no import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.test_kill"])
    return context


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for number in range(NUM_PHOTOS):
        Image.fromarray(noise.integers(0, 256, (40, 48, 3), np.uint8)).save(folder / f"{number:02d}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def expected(context: ForkServerContext, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    _finish(context, photos, out)
    store = Store.open(out)
    assert verify(store.layout.root).damages == [] and len(store.shards()) == 9
    assert sum(shard.num_rows for shard in store.shards()) == NUM_PHOTOS
    return _files(out)


def _encode(photos: Path, out: Path, kill_at: int | None) -> None:
    """What the victim does; `kill_at` is the operation of atomic.py that it does not live to see."""
    num_operations = 0

    def count(operation: str, path: Path) -> None:
        nonlocal num_operations
        num_operations += 1
        if num_operations == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    atomic.hook = count
    vae = VAE(random_model(SMALL), torch.device("cpu"), torch.float32, name="small random VAE")
    encode_source(photos, out, vae, SETTINGS)
    (out.parent / "num_operations").write_text(json.dumps(num_operations))


def _start(context: ForkServerContext, photos: Path, out: Path, kill_at: int | None = None) -> BaseProcess:
    process = context.Process(target=_encode, args=(photos, out, kill_at), daemon=True)
    process.start()
    return process


def _finish(context: ForkServerContext, photos: Path, out: Path) -> None:
    process = _start(context, photos, out)
    process.join(120)
    assert process.exitcode == 0


def _files(root: Path) -> dict[str, bytes]:
    """All of the store, and whatever else lies there, but the journals."""
    paths = [path for path in root.rglob("*") if path.is_file() and path.parent.name != "journal"]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(paths)}


def _check_left_behind(out: Path, expected: dict[str, bytes]) -> None:
    """Whatever has its final name is complete."""
    for name, data in _files(out).items():
        assert atomic.is_temporary(Path(name).name) or data == expected[name], name


def test_killed_at_a_random_moment_then_finished(
    context: ForkServerContext, photos: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    moments = random.Random(0)
    num_kills = num_in_flight = 0
    while num_kills < 12:
        out = tmp_path / str(num_kills) / "out"
        out.parent.mkdir(exist_ok=True)
        process = _start(context, photos, out)
        # The run begins with its folder; kills before that prove nothing.
        while not out.exists() and process.exitcode is None:
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.3))
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was faster than the kill: not one of the twelve
            for path in sorted(out.parent.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            continue
        assert process.exitcode == -signal.SIGKILL
        num_kills += 1
        num_in_flight += (out / "manifest.json").exists() and len(list(out.glob("done/*.json"))) < 9
        _check_left_behind(out, expected)
        _finish(context, photos, out)
        assert _files(out) == expected
    assert num_in_flight >= 3, "the kills missed the work"


def test_killed_again_and_again_in_one_store(
    context: ForkServerContext, photos: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """Each run gets eleven operations further than the last one's death, or starts where its shard began."""
    out = tmp_path / "out"
    num_kills = 0
    while True:
        process = _start(context, photos, out, kill_at=25 + num_kills)
        process.join(120)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        num_kills += 1
        _check_left_behind(out, expected)
    assert num_kills >= 5
    assert _files(out) == expected


@pytest.mark.slow
def test_killed_at_every_operation_then_finished(
    context: ForkServerContext, photos: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    kill_at = 0
    while True:
        kill_at += 1
        out = tmp_path / str(kill_at) / "out"
        out.parent.mkdir()
        process = _start(context, photos, out, kill_at)
        process.join(120)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        _check_left_behind(out, expected)
        _finish(context, photos, out)
        assert _files(out) == expected, kill_at
    assert kill_at == json.loads((out.parent / "num_operations").read_text()) + 1 > 100
