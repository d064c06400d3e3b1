"""Runs: what they write, how they stop, and that they go on as if nothing had been."""

import errno
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401 (forks then need not import it)
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from sdvae import atomic
from sdvae.cli.main import cli
from sdvae.errors import ConfigError, OutputError, TrainError
from sdvae.train import loop, losses, terms
from sdvae.train.config import (
    AdversaryConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    Rung,
    TeacherConfig,
    TrainConfig,
    to_toml,
)  # fmt: skip
from sdvae.train.loop import train
from sdvae.train.report import RunPaths, write_plots
from sdvae.vae import VAE
from sdvae.weights.load import save_folder
from tests.conftest import SMALL, random_model

NUM_KILLS = int(os.environ.get("SDVAE_KILLS", "30"))  # of the slow test


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for number in range(8):
        small = noise.integers(0, 256, (5, 6, 3), np.uint8)
        Image.fromarray(small).resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    save_folder(folder, SMALL, random_model(SMALL).state_dict())
    return folder


@pytest.fixture(scope="module")
def config(photos: Path, start: Path) -> TrainConfig:
    """Everything at once, as small as it gets: each kind of term, both rungs, the adversary from the third step on."""
    return TrainConfig(
        steps=8,
        model=ModelConfig(start=str(start)),
        data=DataConfig(
            str(photos), (Rung(16, 4), Rung(32, 2, first_step=6)), max_shrink=2.0, held_out=2, workers=0
        ),
        loss=LossConfig(
            squared=1.0, absolute=0.5, gradient=0.1, kl=1e-3, kl_warmup_steps=4, noise=0.1, mask=0.1, mask_px=8,
            equivariance=0.1, learn_scale=True,
        ),
        teacher=TeacherConfig(str(start), pull=0.1, decode=True, crossing=0.1, crossing_every=2),
        adversary=AdversaryConfig(weight=0.1, start_step=2, r1=0.1, r1_every=2, width=8, num_layers=1),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        output=OutputConfig(log_every=1, save_every=3, validate_every=4, pictures=2),
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    paths = RunPaths(tmp_path_factory.mktemp("runs") / "undisturbed")
    report = train(config, paths.root, "cpu")
    assert (report.step, report.num_photos) == (8, 6)
    return paths


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    """Forks from a process that imported torch and never ran an operation: starting costs no import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_train_loop"])
    return context


@pytest.fixture(autouse=True)
def _few_plots(undisturbed: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plot takes a second; those of the undisturbed run are looked at."""
    monkeypatch.setattr(loop, "write_plots", lambda paths, lines: None)


def lines(paths: RunPaths) -> list[dict[str, Any]]:
    return [json.loads(line) for line in paths.log.read_text().splitlines()]


def assert_same_run(one: RunPaths, other: RunPaths) -> None:
    """Bit for bit: weights, averages, moments of the optimiser, the log."""
    assert one.log.read_text() == other.log.read_text()
    for file in ("train/state.safetensors", "diffusion_pytorch_model.safetensors"):
        assert (one.root / file).read_bytes() == (other.root / file).read_bytes(), file


# What a run writes.


def test_a_run_is_a_folder_that_loads_everywhere(undisturbed: RunPaths, photos: Path) -> None:
    from diffusers import AutoencoderKL

    vae = VAE.load(undisturbed.root, device="cpu", dtype="fp32")
    theirs = AutoencoderKL.from_pretrained(undisturbed.root)
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    mean = vae.encode(pixels).mean
    torch.testing.assert_close(theirs.encode(pixels).latent_dist.mean, mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs.decode(mean).sample, vae.decode(mean), rtol=1e-4, atol=1e-4)


def test_the_log_has_every_term_and_the_card_every_fact(undisturbed: RunPaths, photos: Path) -> None:
    steps = [line for line in lines(undisturbed) if "norm" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    always = {"reconstruction", "kl", "equivariance", "theirs", "pull", "norm", "learning_rate", "epoch"}
    assert always <= steps[1].keys()
    assert "crossing" in steps[0]
    assert "crossing" not in steps[1]
    assert {"adversarial", "discriminator", "r1", "discriminator_norm"} <= steps[2].keys()
    assert "discriminator" not in steps[1]
    assert all(np.isfinite(value) for line in steps for value in line.values())
    assert [line["step"] for line in lines(undisturbed) if "psnr" in line] == [0, 4, 8]
    card = undisturbed.card.read_text()
    assert f"6 photos of `{photos.name}`, and 2 held out" in card
    assert "8 of 8 steps" in card
    assert "learn_scale = true" in card
    assert str(photos.parent) not in card, "no folder of this machine"
    for figure in ("figures/terms.png", "figures/step-0000008.png"):
        assert f"]({figure})" in card
        with Image.open(undisturbed.root / figure) as picture:
            picture.load()
    with Image.open(undisturbed.picture(8)) as picture:
        assert picture.size == (2 * 32 + 4, 2 * 32 + 4)


def test_training_reduces_the_loss(config: TrainConfig, tmp_path: Path) -> None:
    plain = TrainConfig(
        60, config.model, data=replace(config.data, ladder=(Rung(16, 4),)), loss=LossConfig(squared=4.0),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=5),
        output=replace(config.output, validate_every=60, save_every=60),
    )  # fmt: skip
    report = train(plain, tmp_path / "run", "cpu")
    first = lines(RunPaths(tmp_path / "run"))[0]["psnr"]
    assert report.psnr_db is not None
    assert report.psnr_db > first + 1.0


# Going on.


class Stopped(Exception):  # noqa: N818
    """A run that ends in the middle of something."""


@pytest.mark.parametrize("last", [1, 6])
def test_a_run_that_dies_goes_on_bit_for_bit(
    config: TrainConfig, undisturbed: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    forward = terms.forward

    def dying(networks: Any, config: Any, batch: Any, step: int) -> Any:
        if step == last:
            raise Stopped
        return forward(networks, config, batch, step)

    paths = RunPaths(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(loop.terms, "forward", dying)
        with pytest.raises(Stopped):
            train(config, paths.root, "cpu")
    report = train(config, paths.root, "cpu")
    assert report.step == 8
    assert_same_run(paths, undisturbed)
    assert train(config, paths.root, "cpu").steps_per_s == 0.0, "nothing is left to do"
    assert_same_run(paths, undisturbed)


def test_a_signal_saves_first(
    config: TrainConfig, undisturbed: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signum, heard = signal.SIGTERM, list[int]()
    forward = terms.forward

    def interrupted(networks: Any, config: Any, batch: Any, step: int) -> Any:
        if step == 4:
            signal.raise_signal(signum)
        return forward(networks, config, batch, step)

    paths = RunPaths(tmp_path / "run")
    before = signal.signal(signum, lambda number, frame: heard.append(number))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(loop.terms, "forward", interrupted)
            report = train(config, paths.root, "cpu")
    finally:
        signal.signal(signum, before)
    assert heard == [signum], "whoever would have had it gets it, after the state is saved"
    assert report.step == 5, "the step ends first, though save_every is 3"
    assert train(config, paths.root, "cpu").step == 8
    assert_same_run(paths, undisturbed)


def _train_and_die(config: TrainConfig, out: Path, nth: int) -> None:
    """In a process of its own: SIGKILL before the nth step or operation on a file, whatever it is."""
    count, forward = 0, terms.forward

    def tell(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    def told(*args: Any) -> Any:
        tell()
        return forward(*args)

    atomic.hook, loop.terms.forward, loop.write_plots = tell, told, tell  # type: ignore[assignment]
    train(config, out, "cpu")


def _kill_and_finish(
    context: ForkServerContext, config: TrainConfig, undisturbed: RunPaths, folder: Path, num_kills: int, most: int
) -> None:
    paths, random, num_killed = RunPaths(folder / "run"), np.random.default_rng(0), 0
    for _ in range(num_kills):
        process = context.Process(target=_train_and_die, args=(config, paths.root, int(random.integers(1, most))))
        process.start()
        process.join(300)
        assert process.exitcode in (0, -signal.SIGKILL)
        num_killed += process.exitcode == -signal.SIGKILL
    assert num_killed > num_kills // 2
    assert train(config, paths.root, "cpu").step == config.steps
    assert_same_run(paths, undisturbed)
    assert not list(paths.root.rglob(".*.tmp"))


def test_a_killed_process_goes_on_bit_for_bit(
    context: ForkServerContext, config: TrainConfig, undisturbed: RunPaths, tmp_path: Path
) -> None:
    _kill_and_finish(context, config, undisturbed, tmp_path, num_kills=3, most=60)


@pytest.mark.slow
def test_thirty_kills(context: ForkServerContext, config: TrainConfig, tmp_path: Path) -> None:
    long = replace(config, steps=60, output=replace(config.output, save_every=1))
    paths = RunPaths(tmp_path / "undisturbed")
    train(long, paths.root, "cpu")
    _kill_and_finish(context, long, paths, tmp_path, NUM_KILLS, most=90)


# What goes wrong.


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(
    config: TrainConfig, undisturbed: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, paths = terms.forward, RunPaths(tmp_path / "run")

    def poisoned(networks: Any, config: Any, batch: Any, step: int) -> Any:
        found = forward(networks, config, batch, step)
        if step == 4:
            found.terms["kl"] = found.terms["kl"] * float("nan")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(loop.terms, "forward", poisoned)
        with pytest.raises(TrainError) as caught:
            train(config, paths.root, "cpu")
    message = str(caught.value)
    assert "step 5 gave no finite loss (kl is nan" in message
    keys = {f"{number}.png" for number in range(8) if f"{number}.png" in message}
    assert 2 <= len(keys) <= 4
    assert "the state of step 3 is kept" in message
    assert "\n" not in message
    train(config, paths.root, "cpu")
    assert_same_run(paths, undisturbed)  # the poison reached nothing


def _fail_once(nth: int) -> Callable[[str, Path], None]:
    count = 0

    def hook(operation: str, path: Path) -> None:
        nonlocal count
        count += 1
        if count == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return hook


@pytest.mark.parametrize("nth", [3, 55, 90])
def test_a_full_disk_costs_steps_and_nothing_else(
    config: TrainConfig, undisturbed: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    paths = RunPaths(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "hook", _fail_once(nth))
        with pytest.raises(OutputError, match="No space left on device") as caught:
            train(config, paths.root, "cpu")
    assert "free some space and run the same command again" in str(caught.value)
    train(config, paths.root, "cpu")
    assert_same_run(paths, undisturbed)


def test_a_photo_that_vanishes_is_told_and_the_run_goes_on(
    config: TrainConfig, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for photo in photos.iterdir():
        (folder / photo.name).write_bytes(photo.read_bytes())
    moved = replace(config, data=replace(config.data, source=str(folder)))
    train(replace(moved, steps=1), tmp_path / "run", "cpu")
    trained_on = [
        line["key"] for line in map(json.loads, RunPaths(tmp_path / "run").photos.read_text().splitlines())
        if line["is_trained_on"]
    ]  # fmt: skip
    (folder / trained_on[0]).unlink()
    with caplog.at_level(logging.WARNING):
        assert train(moved, tmp_path / "run", "cpu").step == 8
    told = [record.getMessage() for record in caplog.records if trained_on[0] in record.getMessage()]
    assert told == [f"{trained_on[0]} is left out of its batches: vanished after the scan"]


def test_folders_and_configs_that_do_not_fit_are_refused(
    config: TrainConfig, undisturbed: RunPaths, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds files, but no training run"):
        train(config, tmp_path, "cpu")
    before = undisturbed.state.read_bytes()
    with pytest.raises(ConfigError, match=r"begun with another network: model\.freeze 'nothing' is now 'encoder'"):
        frozen = replace(config, model=replace(config.model, freeze="encoder"), teacher=TeacherConfig())
        train(frozen, undisturbed.root, "cpu")
    with pytest.raises(ConfigError, match=r"data\.source is missing"):
        train(replace(config, data=replace(config.data, source=None)), tmp_path / "run", "cpu")
    assert undisturbed.state.read_bytes() == before
    with pytest.raises(TrainError, match="cannot be read"):
        damaged = RunPaths(tmp_path / "damaged")
        damaged.working.mkdir(parents=True)
        for path in (undisturbed.photos, undisturbed.config):
            (damaged.working / path.name).write_bytes(path.read_bytes())
        damaged.state.write_bytes(before[:-100])
        train(config, damaged.root, "cpu")


def test_an_adversary_and_another_rate_may_join_a_run(
    config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = replace(config, adversary=replace(config.adversary, weight=0.0), steps=2)
    train(alone, tmp_path / "run", "cpu")
    later = replace(config, steps=4, optimizer=replace(config.optimizer, learning_rate=1e-4))
    with caplog.at_level(logging.WARNING):
        assert train(later, tmp_path / "run", "cpu").step == 4
    assert "optimizer.learning_rate 0.001 is now 0.0001; steps 2 is now 4" in caplog.text
    assert "discriminator" in lines(RunPaths(tmp_path / "run"))[-2]


def test_a_frozen_encoder_keeps_its_bits(config: TrainConfig, start: Path, tmp_path: Path) -> None:
    frozen = replace(config, model=replace(config.model, freeze="encoder"), teacher=TeacherConfig(), steps=3)
    train(frozen, tmp_path / "run", "cpu")
    before, after = (VAE.load(folder, device="cpu").model.state_dict() for folder in (start, tmp_path / "run"))
    for key, value in before.items():
        assert torch.equal(value, after[key]) == key.startswith("encoder."), key


def test_tensorboard_is_an_extra(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert purge_step == 0

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.append((name, value, step))

    watched = replace(config, steps=1, output=replace(config.output, tensorboard=True))
    module = type(sys)("torch.utils.tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with pytest.raises(TrainError, match=r"pip install 'sdvae\[train\]'"):
        train(watched, tmp_path / "run", "cpu")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    train(watched, tmp_path / "run", "cpu")
    assert {name for name, _, step in told if step == 1} >= {"reconstruction", "kl", "norm", "psnr", "ssim"}


def test_without_matplotlib_there_are_no_plots(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loop, "write_plots", write_plots)
    monkeypatch.setattr("sdvae.train.report.find_spec", lambda name: None)
    train(replace(config, steps=1), tmp_path / "run", "cpu")
    assert "plots need matplotlib" in caplog.text
    assert "terms.png" not in (tmp_path / "run" / "README.md").read_text()


# Ranks.


def _train_rank(config: TrainConfig, out: Path, rank: int, address: dict[str, str]) -> None:
    os.environ |= address | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    train(config, out, "cpu")


def test_two_ranks_train_as_one_with_the_same_batch(
    context: ForkServerContext, config: TrainConfig, tmp_path: Path
) -> None:
    """By gloo. Sums over a batch in another order differ in their last bits, and AdamW's first steps enlarge that."""
    short = replace(
        config, steps=4, data=replace(config.data, ladder=(Rung(16, 8),)),
        output=replace(config.output, validate_every=2),
    )  # fmt: skip
    alone, shared = RunPaths(tmp_path / "alone"), RunPaths(tmp_path / "shared")
    train(short, alone.root, "cpu")
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [context.Process(target=_train_rank, args=(short, shared.root, rank, address)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        assert process.exitcode == 0
    ones, twos = lines(alone), lines(shared)
    assert len(ones) == len(twos) > 4
    for one, two in zip(ones, twos, strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
    mine, theirs = (_weights(paths) for paths in (alone, shared))
    for key, value in mine.items():
        assert (value - theirs[key]).abs().max() <= 1e-4, key


def _weights(paths: RunPaths) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {
        key: value for key, value in load_file(paths.state).items() if not key.startswith(("optimizer", "adversary"))
    }


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_the_adaptive_weight_is_measured_at_the_last_layer(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[Tensor, Tensor]] = []
    weight = losses.adaptive_weight

    def recorded(reconstruction: Tensor, adversarial: Tensor) -> Tensor:
        found.append((reconstruction, adversarial))
        return weight(reconstruction, adversarial)

    monkeypatch.setattr(losses, "adaptive_weight", recorded)
    train(replace(config, steps=4), tmp_path / "run", "cpu")
    assert len(found) == 2, "from start_step on"
    assert all(one.shape == other.shape == (3, 8, 3, 3) for one, other in found)
    assert all(one.norm() > 0 and other.norm() > 0 for one, other in found)


# The command.


def test_the_command_trains_and_tells(config: TrainConfig, tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(to_toml(config))
    arguments = ["train", str(path), "--set", "steps=2", "-o", str(tmp_path / "run"), "--device", "cpu"]
    result = CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["command"], told["step"], told["num_photos"]) == ("train", 2, 6)
    again = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert "2 steps on 6 photos" in again.stdout
    assert "nothing left to do" in again.stdout
    wrong = CliRunner().invoke(cli, [*arguments, "--set", "stepz=2"])
    assert wrong.exit_code == 1
    assert "did you mean steps" in wrong.stderr


def test_ctrl_c_exits_with_130_and_a_sentence(config: TrainConfig, undisturbed: RunPaths, tmp_path: Path) -> None:
    long = replace(config, steps=100_000, output=replace(config.output, save_every=100_000, validate_every=100_000))
    paths = RunPaths(tmp_path / "run")
    (tmp_path / "long.toml").write_text(to_toml(long))
    command = ["-m", "sdvae", "train", str(tmp_path / "long.toml"), "-o", str(paths.root), "--device", "cpu"]
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and (not paths.log.exists() or paths.log.read_bytes().count(b"norm") < 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert told.splitlines()[-1] == "sdvae: stopped by SIGINT"
    assert "Traceback" not in told
    assert VAE.load(paths.root, device="cpu").config == SMALL
    assert "of 100,000 steps" in paths.card.read_text()
