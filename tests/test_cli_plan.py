"""`sdvae plan`, and `--budget` where something is run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from sdvae import VAE
from sdvae.cli.main import cli
from sdvae.config import FAMILIES
from sdvae.engine.plan import IMAGES_AT_ONCE, make_plan
from sdvae.engine.stages import build_network
from sdvae.engine.verdict import find_need
from sdvae.images.read import read_image


def run(*arguments: object) -> Result:
    environment = {"SDVAE_DEVICE": "cpu"}
    return CliRunner(env=environment).invoke(cli, [str(argument) for argument in arguments], prog_name="sdvae")


@pytest.fixture(scope="module")
def vae_folder(small_vae: VAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    small_vae.save(folder)
    return folder


def test_a_named_family_is_planned_without_torch_or_weights() -> None:
    script = (
        "import sys; from sdvae.cli.main import cli;"
        "arguments = 'plan --family sd1 --size 4096 --dtype fp16 --budget 12GiB -v'.split();"
        "cli(arguments, standalone_mode=False);"
        "sys.exit(f'{heavy}' if (heavy := {'torch', 'numpy', 'safetensors', 'diffusers'} & set(sys.modules)) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("yes: ")
    assert "encode: 4096x4096x3 to 512x512x8" in done.stdout
    assert "decode: 512x512x4 to 4096x4096x3" in done.stdout


def test_json_holds_the_numbers_of_the_planner() -> None:
    result = run("plan", "--family", "sdxl", "--size", "512", "--size", "1024x768", "--dtype", "fp32", "--json")
    assert result.exit_code == 0, result.output
    plans = json.loads(result.stdout)["plans"]
    assert [(plan["height"], plan["width"], plan["direction"]) for plan in plans] == [
        (512, 512, "encode"), (512, 512, "decode"), (768, 1024, "encode"), (768, 1024, "decode"),
    ]  # fmt: skip
    expected = make_plan(build_network(FAMILIES["sdxl"], "decode"), 96, 128, 4)
    assert plans[3]["predicted_bytes"] == expected.predict_bytes()
    assert plans[3]["max_images"] is None
    assert [stage["num_strips"] for stage in plans[3]["stages"]] == [*map(expected.num_strips, expected.network.stages)]


def test_a_budget_makes_lower_strips_and_tells_how_many_images_fit() -> None:
    network = build_network(FAMILIES["small"], "decode")
    free = make_plan(network, 64, 64, 2)
    weights = find_need(FAMILIES["small"], "decode", (512, 512), "bf16").weights_bytes
    budget = free.predict_bytes() + weights - 3_000_000
    result = run("plan", "--family", "small", "--budget", budget, "--json")
    assert result.exit_code == 0, result.output
    _, decode = json.loads(result.stdout)["plans"]
    assert decode["predicted_bytes"] + weights == decode["needed_bytes"] <= budget
    assert max(stage["num_strips"] for stage in decode["stages"]) > max(map(free.num_strips, network.stages))
    assert decode["max_images"] >= 1


def test_the_verdict_is_one_line_and_the_tables_are_for_v() -> None:
    asked = ("plan", "--family", "sd1", "--size", "1024x512")
    yes, no, open_ = run(*asked, "--budget", "8GiB"), run(*asked, "--budget", "500MiB"), run(*asked)
    for result in (yes, no, open_):
        assert result.stdout.count("\n") == 1 and result.stderr == ""
    assert (yes.exit_code, no.exit_code, open_.exit_code) == (0, 1, 0)
    assert re.fullmatch(
        r"yes: decoding 1024x512 px in bf16 needs [\d.]+ MiB of the 8 GiB, weights included; encoding [\d.]+ MiB\n",
        yes.stdout,
    )
    assert re.fullmatch(
        r"no: decoding 1024x512 px in bf16 needs at least ([\d.]+) MiB, weights included, and the budget is 500 MiB; "
        r"give --budget \1MiB\n",
        no.stdout,
    )
    assert open_.stdout.startswith("decoding 1024x512 px in bf16 needs ")
    tables = run(*asked, "--budget", "8GiB", "-v").stdout
    assert tables.startswith(yes.stdout) and tables.count("memory beside the weights") == 2


def test_the_smallest_budget_that_is_named_is_met() -> None:
    refused = run("plan", "--family", "small", "--budget", "10MiB")
    smallest = refused.stdout.partition("give --budget ")[2].strip()
    assert run("plan", "--family", "small", "--budget", smallest).exit_code == 0
    values = json.loads(run("plan", "--family", "small", "--budget", "10MiB", "--json").stdout)
    assert values["fits"] is False and [plan["fits"] for plan in values["plans"]] == [False, False]
    least = max(plan["least_bytes"] for plan in values["plans"])
    assert run("plan", "--family", "small", "--budget", least).exit_code == 0
    assert run("plan", "--family", "small", "--budget", least - 1).exit_code == 1


def test_a_dtype_that_would_fit_is_named() -> None:
    asked = ("plan", "--family", "sd1", "--size", "2048", "--dtype", "fp32", "--budget")
    assert run(*asked, "4GiB").stdout.strip().endswith(" or --dtype bf16")
    assert run(*asked, "4GiB", "--device", "cuda").stdout.startswith("yes: "), "layers in the host's memory"
    assert "--dtype" not in run(*asked, "1GiB").stdout


def test_a_verdict_counts_the_weights_that_a_program_holds(small_vae: VAE) -> None:
    for direction in ("encode", "decode"):
        program = small_vae.engine.program(direction)  # type: ignore[union-attr]
        on_gpu = find_need(small_vae.config, direction, (64, 64), "fp32", is_gpu=True)
        assert on_gpu.weights_bytes == pytest.approx(program.num_bytes, rel=0.05), "but for biases, many in a small net"
        parameters = sum(each.numel() for each in small_vae.model.parameters())
        on_cpu = find_need(small_vae.config, direction, (64, 64), "fp32").weights_bytes
        assert on_cpu - on_gpu.weights_bytes == pytest.approx(4 * parameters, rel=0.05)


def test_the_shapes_of_a_file_are_planned(vae_folder: Path, small_vae: VAE) -> None:
    result = run("plan", "--vae", vae_folder, "--size", "64", "--dtype", "fp32", "--json")
    assert result.exit_code == 0, result.output
    _, decode = json.loads(result.stdout)["plans"]
    expected = make_plan(build_network(small_vae.config, "decode"), 8, 8, 4, images_at_once=IMAGES_AT_ONCE)
    assert decode["predicted_bytes"] == expected.predict_bytes() and decode["group"] == expected.group == 1


@pytest.mark.parametrize(
    ("arguments", "exit_code", "says"),
    [
        (["--size", "1024x"], 2, "'1024x' is not a size; write 512, or 1024x768"),
        (["--size", "0"], 2, "'0' is not a size"),
        (["--size", "1x2x3"], 2, "is not a size"),
        (["--size", "100"], 1, "100x100 px: both sides must be multiples of 8"),
        (["--budget", "8"], 2, "'--budget': 8 bytes: did you mean 8GiB?\n"),
        (["--budget", "6 apples"], 2, "'6 apples' is no amount of memory; write 6GiB"),
        (["--dtype", "int8"], 2, "'int8' is not one of"),
    ],
)
def test_mistakes_are_named(arguments: list[str], exit_code: int, says: str) -> None:
    result = run("plan", *arguments)
    assert result.exit_code == exit_code
    assert says in result.stderr


# --- where something is run ---


@pytest.fixture(scope="module")
def latents(small_vae: VAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("latents") / "a.safetensors"
    values = torch.randn(1, 4, 80, 8, generator=torch.Generator().manual_seed(0))
    save_file({"latents": values}, path)
    return path


def decode(vae_folder: Path, latents: Path, out: Path, *arguments: object) -> Result:
    shared = ("--vae", vae_folder, "--family", "small", "--dtype", "fp32", "--latents", "raw")
    return run("decode", latents, out, *shared[:2], *shared[4:], *arguments)


def test_a_budget_changes_pixels_by_no_more_than_rounding(
    vae_folder: Path, small_vae: VAE, latents: Path, tmp_path: Path
) -> None:
    network = build_network(small_vae.config, "decode")
    whole, lowest = (make_plan(network, 80, 8, 4, num_strips=count).predict_bytes() for count in (1, 80))
    budget = lowest + (whole - lowest) // 4
    assert small_vae.engine.plan("decode", 80, 8, budget=budget).num_strips(network.stages[-1]) > 1
    for name, arguments in {"free": [], "kept": ["--budget", budget]}.items():
        result = decode(vae_folder, latents, tmp_path / name, *arguments)
        assert result.exit_code == 0, result.stderr
    pictures = [read_image(path).astype(int) for name in ("free", "kept") for path in (tmp_path / name).iterdir()]
    difference = abs(pictures[0] - pictures[1])
    assert difference.max() <= 1 and difference.mean() < 1e-3, "whole images and strips round alike but for last bits"


def test_a_budget_that_is_too_small_writes_nothing(vae_folder: Path, latents: Path, tmp_path: Path) -> None:
    result = decode(vae_folder, latents, tmp_path / "out", "--budget", "100KiB")
    assert result.exit_code == 1
    assert "decoding 64x640 px needs at least " in result.stderr and "the budget is 100 KiB; give " in result.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("verb", ["roundtrip", "sample", "interpolate"])
def test_pictures_keep_a_budget(verb: str, vae_folder: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    assert run("sample", "-n", 1, "--size", 64, "-o", photo, "--vae", vae_folder, "--dtype", "fp32").exit_code == 0
    inputs = {"roundtrip": [photo], "sample": ["-n", 1], "interpolate": [photo, photo]}[verb]
    arguments = [verb, *inputs, "--size", 64, "--vae", vae_folder, "--dtype", "fp32"]
    refused = run(*arguments, "-o", tmp_path / "refused.png", "--budget", "100KiB")
    assert refused.exit_code == 1
    assert "the budget is 100 KiB" in refused.stderr and not (tmp_path / "refused.png").exists()
    kept = run(*arguments, "-o", tmp_path / "kept.png", "--budget", "1GiB")
    free = run(*arguments, "-o", tmp_path / "free.png")
    assert (kept.exit_code, free.exit_code) == (0, 0), kept.stderr
    assert (tmp_path / "kept.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_gpu_may_borrow_its_hosts_memory() -> None:
    arguments = ("plan", "--family", "sd1", "--size", "8192", "--dtype", "fp16", "--budget", "16GiB")
    assert run(*arguments).exit_code == 1, "a CPU has nothing to borrow"
    result = run(*arguments, "--device", "cuda")
    assert result.exit_code == 0, result.output
    said = "; 32 GiB of layers lie in the host's memory, and an image moves 627 GiB to and from it\n"
    assert result.stdout.endswith(said) and result.stdout.count("\n") == 1
    values = json.loads(run(*arguments, "--device", "cuda", "--json").stdout)
    assert values["device"] == "cuda"
    assert all(plan["is_arena_on_host"] and plan["predicted_bytes"] <= 16 << 30 for plan in values["plans"])
