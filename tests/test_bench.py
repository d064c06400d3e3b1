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

from sdvae.bench import kernels, rivals, throughput
from sdvae.bench.kernels import Convolution, convolutions, measure_roofline, time_kernels
from sdvae.bench.machine import machine_card
from sdvae.bench.peak import measure_peak
from sdvae.bench.rivals import Contender, diffusers_compiled, diffusers_tiled
from sdvae.bench.throughput import Settings, measure, seeded_model
from sdvae.bench.timing import in_turns, seconds_of
from sdvae.bench.twins import time_twins
from sdvae.cli.main import cli
from sdvae.config import VAEConfig
from sdvae.engine.stages import Direction, network
from sdvae.errors import BenchError
from sdvae.vae import VAE
from tests.conftest import SMALL

CPU = torch.device("cpu")
WITH_ATTENTION = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
MIB = 2**20


@pytest.fixture(autouse=True)
def _small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_MATMUL_SIDE", {"cpu": 256})


def small_race(direction: Direction = "decode", **settings: object) -> throughput.Measurement:
    model = seeded_model(SMALL)
    vae = VAE(model, CPU, torch.float32, "small")
    return measure(vae, model, replace(Settings(direction, 64, 48, rounds=2), **settings))  # type: ignore[arg-type]


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


# --- ours against rivals ---


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_all_rivals_compute_the_same(direction: Direction) -> None:
    measurement = small_race(direction, rivals=("loaded", "best", "tiled"))
    assert [row.name for row in measurement.rows] == [
        "sdvae", "diffusers as loaded", "diffusers at its best", "diffusers tiled",
    ]  # fmt: skip
    *timed, tiled = measurement.rows
    for row in (*timed, *measurement.survey):
        assert row.refused is None and len(row.seconds) == 2 and min(row.seconds) > 0
        assert row.relative_error is not None and row.relative_error < throughput.TOLERANCES[row.dtype] / 2
    assert timed[0].relative_error != 0.0, "two networks, not one compared with itself"
    assert tiled.refused == "64 px are one tile of 512" and tiled.seconds == ()
    configurations = {(row.dtype, row.memory_format) for row in measurement.survey}
    assert configurations == {(d, m) for d in ("fp32", "bf16") for m in ("contiguous", "channels_last")}
    fastest = min(measurement.survey, key=lambda row: row.median_s or 0)
    assert (timed[2].dtype, timed[2].memory_format) == (fastest.dtype, fastest.memory_format)
    height, width = (64, 48) if direction == "encode" else (8, 6)
    assert measurement.flops == network(SMALL, direction).flops(height, width)


def test_what_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def wrong(*arguments: object) -> Contender:
        def run(batch: Tensor) -> Tensor:
            calls.append(batch)
            return torch.zeros(1, 3, 64, 48)

        return Contender("sdvae", "fp32", "channels_last", run)

    monkeypatch.setattr(throughput, "ours", wrong)
    row = small_race().rows[0]
    assert row.refused == "differs from fp32 by 1, more than 0.001"
    assert row.seconds == () and row.median_s is None and len(calls) == 1


@pytest.mark.parametrize(("value", "refused"), [(float("nan"), True), (1.0, False)])
def test_nan_is_a_difference(monkeypatch: pytest.MonkeyPatch, value: float, refused: bool) -> None:
    """And the control: the same contender without NaN is timed."""
    original = throughput.ours

    def spoiled(vae: VAE, direction: Direction) -> Contender:
        contender = original(vae, direction)
        return replace(contender, run=lambda batch: contender.run(batch) * value)

    monkeypatch.setattr(throughput, "ours", spoiled)
    assert (small_race().rows[0].refused is not None) is refused


def test_tiles_are_cut_and_allowed_to_differ() -> None:
    model = seeded_model(replace(SMALL, sample_size=64))
    vae = VAE(model, CPU, torch.float32, "small")
    ours, tiled = measure(vae, model, Settings("decode", 128, 96, rounds=1, rivals=("tiled",))).rows
    assert tiled.refused is None and len(tiled.seconds) == 1
    assert ours.relative_error is not None and tiled.relative_error is not None
    assert ours.relative_error < 1e-4 < 1e-3 < tiled.relative_error < throughput.APPROXIMATE
    assert diffusers_tiled(model, "decode", CPU, "fp32", "contiguous", 64).obstacle == "64 px are one tile of 64"


def test_the_batch_is_counted() -> None:
    one, three = small_race(), small_race(batch_size=3)
    assert three.flops == 3 * one.flops and three.predicted_bytes > one.predicted_bytes
    assert three.batch_size == 3


def test_weights_and_inputs_are_seeded() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = seeded_model(SMALL).state_dict(), seeded_model(SMALL).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(before, torch.get_rng_state()), "the caller's generator is left alone"
    settings = Settings("encode", 16, 24, batch_size=2)
    pixels = throughput.seeded_batch(SMALL, settings)
    assert pixels.shape == (2, 3, 16, 24) and -1 <= float(pixels.min()) < -0.9 < 0.9 < float(pixels.max()) <= 1
    assert throughput.seeded_batch(SMALL, replace(settings, direction="decode")).shape == (2, 4, 2, 3)


@pytest.mark.slow
def test_without_a_compiler_the_reason_is_told() -> None:
    """In a process of its own: torch looks for the compiler once."""
    script = (
        "import torch; from sdvae.bench.rivals import diffusers_compiled; from tests.conftest import SMALL;"
        "from sdvae.bench.throughput import seeded_model;"
        "one = diffusers_compiled(seeded_model(SMALL), 'decode', torch.device('cpu'), 'fp32', 'contiguous');"
        "print(one.obstacle)"
    )
    environment = os.environ | {"CXX": "/nowhere/g++", "PATH": "/nowhere", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "ompiler" in done.stdout and done.stdout.count("\n") == 1


def test_compiled_is_decode_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def note(function: Callable[..., object], **options: object) -> Callable[..., object]:
        compiled.append(function.__name__)
        return function

    monkeypatch.setattr(torch, "compile", note)
    model = seeded_model(SMALL)
    contenders = [diffusers_compiled(model, way, CPU, "fp32", "contiguous") for way in ("encode", "decode")]
    assert compiled == ["encode", "decode"]
    latents = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(contenders[1].run(latents), model.decode(latents), rtol=1e-4, atol=1e-4)


def test_rivals_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(BenchError, match=r"rivals need diffusers.*--rivals none"):
        rivals.diffusers(seeded_model(SMALL), "decode", CPU, "fp32", "contiguous")
    assert small_race().rows[0].refused is None, "ours needs none"


# --- kernels ---


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_convolutions_of_a_network_are_those_it_runs(direction: Direction) -> None:
    line = network(WITH_ATTENTION, direction)
    shapes = convolutions(line, 16, 24)
    assert len(shapes) == len(set(shapes)) < len(line.stages)
    strided = [shape for shape in shapes if shape.stride == 2]
    folded = [shape for shape in shapes if shape.kernel_px == 2]
    if direction == "encode":
        assert strided == [Convolution(8, 8, 3, 2, 8, 12)] and folded == []
    else:
        assert folded == [Convolution(16, 64, 2, 1, 16, 24)] and strided == []
    pointwise = [shape for shape in shapes if shape.kernel_px == 1]
    assert len(pointwise) == 1, "one shortcut"
    # All stages, not only the distinct ones: their operations are the network's.
    total = sum(stage.flops(*line.sizes(16, 24)[stage.level]) for stage in line.stages)
    assert total == line.flops(16, 24)
    for shape in folded:
        stage = next(stage for stage in line.stages if stage.kind == "up")
        assert shape.flops(1) == stage.flops(32, 48)


def test_every_kernel_of_a_network_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    line = network(WITH_ATTENTION, "encode")
    outputs: list[torch.Size] = []
    convolve = F.conv2d

    def note(*arguments: Tensor, **options: int) -> Tensor:
        out = convolve(*arguments, **options)  # type: ignore[arg-type]
        outputs.append(out.shape)
        return out

    monkeypatch.setattr(F, "conv2d", note)
    timings = time_kernels(line, 16, 24, 2, CPU, "fp32", rounds=1)
    shapes = convolutions(line, 16, 24)
    assert [size[1:] for size in outputs[::2]] == [(s.out_channels, s.height, s.width) for s in shapes]
    operations = [timing.operation for timing in timings]
    assert operations.count("conv2d") == len(shapes)
    assert operations.count("scaled_dot_product_attention") == 1
    assert operations.count("group_norm") == 3, "8 channels at the first level, 8 and 16 at the second"
    assert all(timing.seconds > 0 and timing.gb_per_s > 0 for timing in timings)
    assert [timing.tflops is None for timing in timings] == [name == "group_norm" for name in operations]


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_every_function_of_the_engine_is_timed_on_a_strip(direction: Direction) -> None:
    timings = time_twins(
        network(WITH_ATTENTION, direction), *((16, 24) if direction == "encode" else (2, 3)), CPU, "fp32", 1
    )
    operations = {timing.operation for timing in timings}
    expected = {"write and count, torch", "normalise, SiLU, torch", "attend, torch"}
    assert operations == expected | ({"write upsampled, torch"} if direction == "decode" else set())
    assert all(timing.seconds > 0 and timing.gb_per_s > 0 for timing in timings)


def test_a_convolution_is_below_the_roofline() -> None:
    assert 1e-6 < measure_roofline(CPU, "fp32", rounds=2) < 1000, "TFLOP/s, of any machine"


# --- the verb ---


@pytest.fixture
def run(small_vae: VAE, tmp_path: Path) -> Callable[..., Result]:
    small_vae.save(tmp_path / "vae")
    environment = {"SDVAE_VAE": str(tmp_path / "vae"), "SDVAE_DEVICE": "cpu", "SDVAE_DTYPE": "fp32"}

    def run_cli(*arguments: object) -> Result:
        return CliRunner(env=environment).invoke(cli, ["bench", *map(str, arguments)], prog_name="sdvae")

    return run_cli


def test_bench_writes_what_it_prints(run: Callable[..., Result], tmp_path: Path) -> None:
    output, picture = tmp_path / "result.json", tmp_path / "plot.png"
    sizes = ["--size", "64", "--size", "96x64"]
    result = run(*sizes, "--rounds", 2, "--rivals", "loaded", "--output", output, "--plot", picture, "--json")
    assert result.exit_code == 0, result.output
    written = json.loads(output.read_text())
    assert json.loads(result.stdout) == {"command": "bench"} | written
    assert written["schema"] == 1 and written["kernels"] is None
    assert written["planning_16384_s"] > 0
    assert [(one["direction"], one["height"], one["width"]) for one in written["measurements"]] == [
        ("encode", 64, 64), ("decode", 64, 64), ("encode", 64, 96), ("decode", 64, 96),
    ]  # fmt: skip
    for one in written["measurements"]:
        ours, theirs = one["rows"]
        assert ours["times_as_long"] == 1.0
        assert theirs["times_as_long"] == pytest.approx(theirs["median_s"] / ours["median_s"])
        assert ours["tflops"] == pytest.approx(one["gflop"] / 1e3 / ours["median_s"])
        assert ours["roofline_fraction"] == pytest.approx(ours["tflops"] / written["roofline_tflops"]["fp32"])
        assert ours["images_per_s"] == pytest.approx(1 / ours["median_s"])
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width > 1000


def test_bench_prints_a_table(run: Callable[..., Result]) -> None:
    result = run("--size", 64, "--direction", "decode", "--rounds", 1, "--rivals", "best", "--rivals", "tiled")
    assert result.exit_code == 0, result.output
    for says in ("decode 64x64, 1 image(s)", "sdvae (fp32, channels_last)", "bf16, contiguous", "64 px are one tile",
                 "roofline:", "plans for 16384x16384 px", "sdvae's plan predicts"):  # fmt: skip
        assert says in result.stdout
    assert "encode 64x64" not in result.stdout and "as loaded" not in result.stdout


def test_bench_fails_where_ours_differs(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "TOLERANCES", dict.fromkeys(throughput.TOLERANCES, 0.0))
    result = run("--size", 64, "--rivals", "none", "--rounds", 1)
    assert result.exit_code == 1
    assert "sdvae differs from fp32 by" in result.stderr and "nothing of it was timed" in result.stderr


def test_a_plot_without_matplotlib_says_what_to_install(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    result = run("--size", 64, "--rivals", "none", "--rounds", 1, "--plot", tmp_path / "plot.png")
    assert result.exit_code == 1
    assert "plots need matplotlib: pip install 'sdvae[bench]'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code", "says"),
    [
        (["--size", "100"], 1, "100x100 px: both sides must be multiples of 8"),
        (["--rounds", "0"], 2, "0 is not in the range"),
        (["--rivals", "comfy"], 2, "'comfy' is not one of"),
    ],
)
def test_mistakes_are_named(run: Callable[..., Result], arguments: list[str], exit_code: int, says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == exit_code
    assert says in result.stderr


def test_weights_are_random_where_none_are_named() -> None:
    arguments = ["bench", "--family", "small", "--size", "64", "--rivals", "none", "--rounds", "1", "--dtype", "fp32"]
    result = CliRunner(env={"SDVAE_DEVICE": "cpu"}).invoke(cli, arguments, prog_name="sdvae")
    assert result.exit_code == 0, result.output
    assert "small with random weights, seed 0 on cpu" in result.stdout
