"""The measurements of `sdvae bench`: what is compared, what is refused, and that the numbers mean what they say."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from PIL import Image
from torch import Tensor

from benchmarks import kernels
from benchmarks import throughput as full
from sdvae.bench import contenders, throughput
from sdvae.bench.contenders import TOLERANCES, Contender, every_diffusers
from sdvae.bench.machine import machine_card
from sdvae.bench.peak import measure_peak
from sdvae.bench.report import report
from sdvae.bench.throughput import Settings, measure, measure_roofline, seeded_batch, seeded_model
from sdvae.bench.timing import in_turns, seconds_of
from sdvae.cli.main import cli
from sdvae.config import VAEConfig
from sdvae.engine import precision
from sdvae.engine.stages import Direction, build_network
from sdvae.errors import BenchError
from sdvae.vae import VAE
from tests.conftest import SMALL

CPU = torch.device("cpu")
WITH_ATTENTION = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
MIB = 2**20


@pytest.fixture(autouse=True)
def _small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "_CPU_MATMUL_SIDE", 256)


def small_race(
    direction: Direction = "decode", rivals: Callable[..., list[Contender]] | None = None, batch_size: int = 1
) -> throughput.Measurement:
    model = seeded_model(SMALL)
    vae = VAE(model, CPU, torch.float32, "small")
    settings = Settings(direction, 64, 48, batch_size, rounds=2)
    return measure(vae, model, settings, rivals(model, direction, CPU) if rivals else [])


# --- time, memory, machine ---


def test_contenders_run_in_turns() -> None:
    calls: list[str] = []
    seconds = in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, CPU)
    assert calls == list("ababab")
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_seconds_are_seconds() -> None:
    begun = time.perf_counter()
    measured = seconds_of(lambda: time.sleep(0.05), CPU)
    assert 0.05 <= measured <= time.perf_counter() - begun


def test_the_peak_is_what_was_held_at_once() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("resident memory is read from Linux' /proc")

    def hold_and_drop() -> int:
        held = torch.ones(64 * MIB, dtype=torch.uint8)
        del held
        return len(torch.ones(16 * MIB, dtype=torch.uint8))

    total, peak = measure_peak(hold_and_drop, CPU)
    assert total == 16 * MIB
    assert peak is not None and 60 * MIB < peak < 90 * MIB, "64 MiB, not 80: they were never held together"


def test_the_card_names_what_numbers_depend_on() -> None:
    card = machine_card()
    assert card["torch"] == torch.__version__
    assert card["threads"] == torch.get_num_threads()
    assert 1 <= card["usable_cores"] <= card["cores"]
    assert {"cpu", "cpu_capability", "gpu", "diffusers", "triton", "sdvae", "python"} <= card.keys()
    json.dumps(card)


# --- sdvae beside rivals ---


@pytest.fixture(autouse=True)
def bf16_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Race diffusers in bf16, too, on whatever CPU this is."""
    monkeypatch.setattr(precision, "_cpu_capabilities", lambda: {"avx512_bf16": True})


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_all_rivals_compute_the_same(direction: Direction) -> None:
    measurement = small_race(direction, every_diffusers)
    ours, *theirs = measurement.rows
    assert ours.name == "sdvae" and {row.name for row in theirs} == {"diffusers"}
    for row in measurement.rows:
        assert row.refused is None and len(row.seconds) == 2 and min(row.seconds) > 0
        assert row.relative_error < TOLERANCES[row.dtype] / 2
    assert ours.relative_error != 0.0, "two networks, not one compared with itself"
    configurations = {(row.dtype, row.memory_format) for row in theirs}
    assert configurations == {(d, m) for d in ("fp32", "bf16") for m in ("contiguous", "channels_last")}
    height, width = (64, 48) if direction == "encode" else (8, 6)
    assert measurement.flops == build_network(SMALL, direction).flops(height, width)


@pytest.mark.parametrize(("factor", "is_refused"), [(0.0, True), (float("nan"), True), (1.0, False)])
def test_what_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch, factor: float, is_refused: bool) -> None:
    calls = []
    original = throughput.sdvae

    def spoiled(vae: VAE, direction: Direction) -> Contender:
        contender = original(vae, direction)

        def run(batch: Tensor) -> Tensor:
            calls.append(batch)
            return contender.run(batch) * factor

        return replace(contender, run=run)

    monkeypatch.setattr(throughput, "sdvae", spoiled)
    row = small_race().rows[0]
    assert (row.refused is not None) is is_refused
    if is_refused:
        assert row.seconds == () and row.median_s is None and len(calls) == 1
        assert row.refused == f"differs from fp32 by {abs(factor - 1):.2g}, more than 0.001"


def test_the_batch_is_counted() -> None:
    one, three = small_race(), small_race(batch_size=3)
    assert three.flops == 3 * one.flops and three.predicted_bytes > one.predicted_bytes
    assert three.settings.batch_size == 3


def test_weights_and_inputs_are_seeded() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = seeded_model(SMALL).state_dict(), seeded_model(SMALL).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(before, torch.get_rng_state()), "the caller's generator is left alone"
    settings = Settings("encode", 16, 24, batch_size=2)
    pixels = seeded_batch(SMALL, settings)
    assert pixels.shape == (2, 3, 16, 24) and -1 <= float(pixels.min()) < -0.9 < 0.9 < float(pixels.max()) <= 1
    assert seeded_batch(SMALL, replace(settings, direction="decode")).shape == (2, 4, 2, 3)


def test_rivals_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(BenchError, match=r"diffusers cannot be imported.*--alone"):
        contenders.diffusers(seeded_model(SMALL), "decode", CPU, "fp32", "contiguous")
    assert small_race().rows[0].refused is None, "ours needs none"


def test_a_matrix_product_has_a_speed() -> None:
    assert 1e-6 < measure_roofline(CPU, "fp32", rounds=2) < 1000


# --- benchmarks/throughput.py: more rivals ---


def test_tiles_are_cut_and_allowed_to_differ() -> None:
    model = seeded_model(replace(SMALL, sample_size=64))
    vae = VAE(model, CPU, torch.float32, "small")
    settings = Settings("decode", 128, 96, rounds=1)
    ours, tiled = measure(vae, model, settings, [full.diffusers_tiled(model, "decode", CPU, "fp32")]).rows
    assert tiled.refused is None and len(tiled.seconds) == 1
    assert ours.relative_error < 1e-4 < 1e-3 < tiled.relative_error < full._APPROXIMATE


def test_compiled_is_decode_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    compiled: list[str] = []

    def note(function: Callable[..., object], **options: object) -> Callable[..., object]:
        compiled.append(function.__name__)
        return function

    monkeypatch.setattr(torch, "compile", note)
    model = seeded_model(SMALL)
    for way in ("encode", "decode"):
        *_, contender = full.rivals(model, Settings(way, 64, 64), CPU, "fp32")
        assert contender.name == "diffusers compiled"
    assert compiled == ["encode", "decode"]
    assert "64 px: they are one tile of 512" in capsys.readouterr().out
    latents = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(contender.run(latents), model.decode(latents), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_without_a_compiler_the_reason_is_told() -> None:
    """In a process of its own: torch looks for the compiler once."""
    command = [sys.executable, full.__file__, "--family", "small", "--size", "64", "--rounds", "1", "--dtype", "fp32"]
    environment = os.environ | {"CXX": "/nowhere/g++", "PATH": "/nowhere", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("diffusers compiled cannot run here") == 2 and "ompiler" in done.stdout


def test_speed_and_memory_are_drawn(tmp_path: Path) -> None:
    model = seeded_model(SMALL)
    vae = VAE(model, CPU, torch.float32, "small")
    full.plot(report(vae, [small_race("encode"), small_race("decode")])["measurements"], tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG" and image.width > 1000


# --- benchmarks/kernels.py ---


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_convolutions_of_a_network_are_those_it_runs(direction: Direction) -> None:
    network = build_network(WITH_ATTENTION, direction)
    shapes = kernels.convolutions(network, 16, 24)
    assert len(shapes) == len(set(shapes)) < len(network.stages)
    strided = [shape for shape in shapes if shape.stride == 2]
    folded = [shape for shape in shapes if shape.kernel_px == 2]
    if direction == "encode":
        assert strided == [kernels.Shape(8, 8, 3, 2, 8, 12)] and folded == []
    else:
        assert folded == [kernels.Shape(16, 64, 2, 1, 16, 24)] and strided == []
        stage = next(stage for stage in network.stages if stage.kind == "up")
        assert folded[0].flops == stage.flops(32, 48)
    assert len([shape for shape in shapes if shape.kernel_px == 1]) == 1, "one shortcut"
    # All stages, not only the distinct ones: their operations are the network's.
    total = sum(stage.flops(*network.sizes(16, 24)[stage.level]) for stage in network.stages)
    assert total == network.flops(16, 24)


def test_every_convolution_is_timed_at_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_network(WITH_ATTENTION, "encode")
    outputs: list[torch.Size] = []
    convolve = F.conv2d

    def note(*arguments: Tensor, **options: int) -> Tensor:
        out = convolve(*arguments, **options)  # type: ignore[arg-type]
        outputs.append(out.shape)
        return out

    monkeypatch.setattr(F, "conv2d", note)
    timings = list(kernels.time_convolutions(network, 16, 24, 2, CPU, torch.float32, rounds=1))
    shapes = kernels.convolutions(network, 16, 24)
    assert [size[1:] for size in outputs[::3]] == [(s.out_channels, s.height, s.width) for s in shapes]
    assert [timing.shape for timing in timings] == [*map(str, shapes)]
    assert all(timing.seconds > 0 and timing.gb_per_s > 0 and timing.tflops for timing in timings)


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_every_kernel_of_the_engine_is_timed_on_a_strip(direction: Direction) -> None:
    size = (16, 24) if direction == "encode" else (2, 3)
    timings = list(kernels.time_twins(build_network(WITH_ATTENTION, direction), *size, CPU, torch.float32, 1))
    operations = {timing.operation for timing in timings}
    expected = {"write and count, torch", "normalise, SiLU, torch", "attend, torch"}
    assert operations == expected | ({"write upsampled, torch"} if direction == "decode" else set())
    assert all(timing.seconds > 0 and timing.gb_per_s > 0 for timing in timings)


# --- the command ---


@pytest.fixture
def run(small_vae: VAE, tmp_path: Path) -> Callable[..., Result]:
    small_vae.save(tmp_path / "vae")
    environment = {"SDVAE_VAE": str(tmp_path / "vae"), "SDVAE_DEVICE": "cpu", "SDVAE_DTYPE": "fp32"}

    def run_cli(*arguments: object) -> Result:
        return CliRunner(env=environment).invoke(cli, ["bench", *map(str, arguments)], prog_name="sdvae")

    return run_cli


def test_bench_writes_what_it_prints(run: Callable[..., Result], tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    result = run("--size", "32", "--size", "48x32", "--rounds", 1, "--output", output, "--json")
    assert result.exit_code == 0, result.output
    written = json.loads(output.read_text())
    assert json.loads(result.stdout) == {"command": "bench"} | written
    assert written["schema"] == 2
    assert sorted((one["direction"], one["height"], one["width"]) for one in written["measurements"]) == [
        ("decode", 32, 32), ("decode", 32, 48), ("encode", 32, 32), ("encode", 32, 48),
    ]  # fmt: skip
    for one in written["measurements"]:
        ours, *theirs = one["rows"]
        assert ours["times_as_long"] == 1.0 and len(theirs) == 4
        assert theirs[0]["times_as_long"] == pytest.approx(theirs[0]["median_s"] / ours["median_s"])
        assert ours["tflops"] == pytest.approx(one["gflop"] / 1e3 / ours["median_s"])
        assert ours["roofline_fraction"] == pytest.approx(ours["tflops"] / written["roofline_tflops"]["fp32"])
        assert ours["images_per_s"] == pytest.approx(1 / ours["median_s"])


def test_bench_prints_a_table(run: Callable[..., Result]) -> None:
    result = run("--size", 64, "--direction", "decode", "--rounds", 1)
    assert result.exit_code == 0, result.output
    for says in ("decode 64x64 px, 1 image, ", "sdvae (fp32, channels_last)", "diffusers (bf16, contiguous)",
                 "roofline:", "sdvae's plan predicts"):  # fmt: skip
        assert says in result.stdout
    assert "encode 64x64 px" not in result.stdout


def test_bench_fails_where_ours_differs(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "TOLERANCES", dict.fromkeys(TOLERANCES, 0.0))
    result = run("--size", 64, "--alone", "--rounds", 1)
    assert result.exit_code == 1
    assert "sdvae differs from fp32 by" in result.stderr and "nothing of it was timed" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code", "says"),
    [
        (["--size", "100"], 1, "100x100 px: both sides must be multiples of 8"),
        (["--rounds", "0"], 2, "0 is not in the range"),
    ],
)
def test_mistakes_are_named(run: Callable[..., Result], arguments: list[str], exit_code: int, says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == exit_code
    assert says in result.stderr


def test_weights_are_random_where_none_are_named() -> None:
    arguments = ["bench", "--family", "small", "--size", "64", "--alone", "--rounds", "1", "--dtype", "fp32"]
    result = CliRunner(env={"SDVAE_DEVICE": "cpu"}).invoke(cli, arguments, prog_name="sdvae")
    assert result.exit_code == 0, result.output
    assert "small with random weights, seed 0 on cpu" in result.stdout
