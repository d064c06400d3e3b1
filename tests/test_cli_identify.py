import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from sdvae.cli.main import cli
from sdvae.config import FAMILIES
from sdvae.weights.load import load_weights, save_folder
from tests.conftest import SMALL, random_model


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["identify", *map(str, arguments)], prog_name="sdvae")


def test_a_person_reads_the_space_the_scaling_and_why(data_dir: Path) -> None:
    path = data_dir / "weights" / "taesd_bf16" / "taesd3_encoder.safetensors"
    done = run(path)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == f"{path}: sd3, proved"
    assert "scaling      scaled_latents = (latents - 0.0609) * 1.5305" in lines
    assert any(line.startswith("probe        correlation 1.00 with sd3, ") for line in lines)
    assert done.stderr == ""


def test_a_machine_reads_one_object(data_dir: Path) -> None:
    done = run(data_dir / "weights" / "taesd_bf16" / "taesdxl_encoder.safetensors", "--json")
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert (found["command"], found["latent_space"], found["certainty"]) == ("identify", "sdxl", "proved")
    assert (found["scaling_factor"], found["shift_factor"]) == (0.13025, None)
    assert [item["kind"] for item in found["evidence"]] == ["probe", "shapes"]
    assert len(found["fingerprint"]) == 64


def test_a_folder_with_a_wrong_config_is_told_so(tmp_path: Path) -> None:
    save_folder(tmp_path, replace(FAMILIES["small"], scaling_factor=0.13025), load_weights().tensors)
    done = run(tmp_path)
    assert done.exit_code == 0
    assert done.stdout.splitlines()[0].endswith("diffusion_pytorch_model.safetensors: sd1, proved")
    assert "its config disagrees (config.json beside it tells scaling_factor 0.13025); use sd1" in done.stderr
    assert run(tmp_path, "-q").stderr == ""


def test_a_random_vae_is_unknown(tmp_path: Path) -> None:
    model = random_model(SMALL)
    save_folder(tmp_path, model.config, model.state_dict())
    done = run(tmp_path)
    assert done.exit_code == 0
    assert done.stdout.splitlines()[0].endswith(": unknown")
    assert "scaling " not in done.stdout.replace("scaling_factor", "")
    assert "the probe denies it: not that space" in done.stderr
    assert json.loads(run(tmp_path, "--json").stdout)["scaling_factor"] is None


@pytest.mark.parametrize(("name", "told"), [("absent.safetensors", "not a folder, file or hub id"), (".", "holds no")])
def test_what_is_not_there_is_a_sentence(tmp_path: Path, name: str, told: str) -> None:
    done = run(tmp_path / name)
    assert done.exit_code == 1 and done.stdout == ""
    assert told in done.stderr and done.stderr.count("\n") == 1


def test_another_models_file_is_a_sentence(tmp_path: Path) -> None:
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(4)}, tmp_path / "unet.safetensors")
    done = run(tmp_path / "unet.safetensors")
    assert done.exit_code == 1 and "holds no KL-VAE" in done.stderr
