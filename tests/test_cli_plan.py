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
from sdvae.engine.plan import MAX_GROUP, make_plan
from sdvae.engine.stages import build_network
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
        "arguments = 'plan --family sd1 --size 4096 --dtype fp16 --budget 12GiB'.split();"
        "cli(arguments, standalone_mode=False);"
        "sys.exit(f'{heavy}' if (heavy := {'torch', 'numpy', 'safetensors', 'diffusers'} & set(sys.modules)) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "encode: 4096x4096x3 to 512x512x8" in done.stdout
    assert "decode: 512x512x4 to 4096x4096x3" in done.stdout
    assert re.search(r"within the budget: [1-9]\d* image", done.stdout)


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
    budget = free.predict_bytes() - 3_000_000
    result = run("plan", "--family", "small", "--budget", budget, "--json")
    assert result.exit_code == 0, result.output
    _, decode = json.loads(result.stdout)["plans"]
    assert decode["predicted_bytes"] <= budget < free.predict_bytes()
    assert max(stage["num_strips"] for stage in decode["stages"]) > max(map(free.num_strips, network.stages))
    assert decode["max_images"] >= 1


def test_a_budget_that_cannot_be_met_is_one_sentence_with_the_smallest() -> None:
    refused = run("plan", "--family", "small", "--budget", "10MiB")
    assert refused.exit_code == 1
    assert refused.stdout == "" and refused.stderr.count("\n") == 1
    smallest = [int(refused.stderr.split(" need ")[1].split(" bytes")[0].replace(",", ""))]
    decoder = run("plan", "--family", "small", "--budget", smallest[0])
    assert "decodes of 1 x 64x64 latents" in decoder.stderr, "the encoder fits now; the decoder asks for more"
    smallest.append(int(decoder.stderr.split(" need ")[1].split(" bytes")[0].replace(",", "")))
    met = run("plan", "--family", "small", "--budget", smallest[1], "--json")
    assert met.exit_code == 0
    assert [plan["predicted_bytes"] <= smallest[1] for plan in json.loads(met.stdout)["plans"]] == [True, True]
    assert run("plan", "--family", "small", "--budget", smallest[1] - 1).exit_code == 1


def test_the_shapes_of_a_file_are_planned(vae_folder: Path, small_vae: VAE) -> None:
    result = run("plan", "--vae", vae_folder, "--size", "64", "--dtype", "fp32", "--json")
    assert result.exit_code == 0, result.output
    _, decode = json.loads(result.stdout)["plans"]
    expected = make_plan(build_network(small_vae.config, "decode"), 8, 8, 4, max_group=MAX_GROUP)
    assert decode["predicted_bytes"] == expected.predict_bytes() and decode["group"] == expected.group == 1


@pytest.mark.parametrize(
    ("arguments", "exit_code", "says"),
    [
        (["--size", "1024x"], 2, "'1024x' is not a size; write 512, or 1024x768"),
        (["--size", "0"], 2, "'0' is not a size"),
        (["--size", "1x2x3"], 2, "is not a size"),
        (["--size", "100"], 1, "100x100 px: both sides must be multiples of 8"),
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
    result = decode(vae_folder, latents, tmp_path / "out", "--budget", "10kB")
    assert result.exit_code == 1
    assert "bytes at least, and the budget is 10,000" in result.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("verb", ["roundtrip", "sample", "interpolate"])
def test_pictures_keep_a_budget(verb: str, vae_folder: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    assert run("sample", "-n", 1, "--size", 64, "-o", photo, "--vae", vae_folder, "--dtype", "fp32").exit_code == 0
    inputs = {"roundtrip": [photo], "sample": ["-n", 1], "interpolate": [photo, photo]}[verb]
    arguments = [verb, *inputs, "--size", 64, "--vae", vae_folder, "--dtype", "fp32"]
    refused = run(*arguments, "-o", tmp_path / "refused.png", "--budget", 1000)
    assert refused.exit_code == 1
    assert "the budget is 1,000" in refused.stderr and not (tmp_path / "refused.png").exists()
    kept = run(*arguments, "-o", tmp_path / "kept.png", "--budget", "1GiB")
    free = run(*arguments, "-o", tmp_path / "free.png")
    assert (kept.exit_code, free.exit_code) == (0, 0), kept.stderr
    assert (tmp_path / "kept.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_gpu_may_borrow_its_hosts_memory() -> None:
    arguments = ("plan", "--family", "sd1", "--size", "8192", "--dtype", "fp16", "--budget", "16GiB")
    assert run(*arguments).exit_code == 1, "a CPU has nothing to borrow"
    result = run(*arguments, "--device", "cuda")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("and in the host's memory: arena 34.4 GB") == 2
    values = json.loads(run(*arguments, "--device", "cuda", "--json").stdout)
    assert values["device"] == "cuda"
    assert all(plan["is_arena_on_host"] and plan["predicted_bytes"] <= 16 << 30 for plan in values["plans"])
