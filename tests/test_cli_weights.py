"""The verbs that read and write weights files: what they say, what they write, and how they refuse."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from sdvae import VAE
from sdvae.cli.main import cli
from sdvae.config import FAMILIES
from tests.test_keymap import TINY, assert_equal, ldm_state_dict, narrow, to_diffusers

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    def run_cli(*arguments: object) -> Result:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="sdvae")

    return run_cli


@pytest.fixture
def folder(small_vae: VAE, tmp_path: Path) -> Path:
    small_vae.save(tmp_path / "vae")
    return tmp_path / "vae"


def test_inspect_tells_what_a_file_holds(run: Run, folder: Path, small_vae: VAE) -> None:
    done = run("inspect", folder)
    assert done.exit_code == 0
    for part in ("safetensors", "in diffusers layout, prefix none", "[8, 16, 16, 16]", small_vae.fingerprint):
        assert part in done.stdout
    found = json.loads(run("inspect", folder, "--json", "--tensors").stdout)
    assert found["num_tensors"] == len(found["tensors"]) == len(small_vae.model.state_dict())
    assert found["tensors"]["encoder.conv_in.weight"] == ["F32", [8, 3, 3, 3]]
    assert found["dtypes"] == {"F32": found["num_tensors"]}
    assert found["vae"]["fingerprint"] == small_vae.fingerprint
    assert found["vae"]["config"]["latent_channels"] == 4


def test_inspect_shows_a_file_without_a_vae_too(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "unet.safetensors"
    save_file({"conv_in.weight": torch.zeros(4, dtype=torch.float16)}, path, metadata={"modelspec.title": "A title"})
    done = run("inspect", path, "--tensors")
    assert done.exit_code == 0
    for part in ("1 (1 F16)", "modelspec.title: A title", "VAE          none", "F16      [4] conv_in.weight"):
        assert part in done.stdout
    assert "holds no KL-VAE" in done.stderr
    assert json.loads(run("inspect", path, "--json", "-q").stdout)["vae"] is None
    assert run("inspect", tmp_path / "absent.safetensors").exit_code == 1


def test_convert_extract_and_swap(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "sd1", narrow(FAMILIES["sd1"]))
    old, new = ldm_state_dict(FAMILIES["sd1"], 1), ldm_state_dict(FAMILIES["sd1"], 2)
    model, vae, out = (tmp_path / f"{name}.safetensors" for name in ("model", "vae", "out"))
    neighbour = {"cond_stage_model.x": torch.arange(5)}
    save_file(neighbour | {f"first_stage_model.{key}": value for key, value in old.items()}, model)
    save_file(new, vae)

    done = run("convert", vae, "-o", tmp_path / "folder", "--family", "sd1", "--json")
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["command"], said["layout"], said["family"], said["is_dry_run"]) == (
        "convert",
        "diffusers",
        "sd1",
        False,
    )
    assert_equal(load_file(said["output"]), to_diffusers(new))

    done = run("swap", model, "--vae", tmp_path / "folder", "-o", out)
    assert done.exit_code == 0, done.stderr
    assert "248 are the VAE's, in ldm layout, family sd1" in done.stdout
    assert "is not proved to have the latents of" in done.stderr  # random weights
    assert_equal(load_file(out), neighbour | {f"first_stage_model.{key}": value for key, value in new.items()})

    assert run("extract", out, "-o", tmp_path / "back.safetensors").exit_code == 0
    assert_equal(load_file(tmp_path / "back.safetensors"), new)


def test_what_is_there_stays_and_what_is_left_out_is_said(run: Run, tmp_path: Path) -> None:
    source, out = tmp_path / "trained.safetensors", tmp_path / "out.safetensors"
    save_file(ldm_state_dict(TINY) | {f"loss.{number}": torch.zeros(2) for number in range(3)}, source)
    arguments = ("convert", source, "-o", out, "--layout", "ldm")
    first = run(*arguments)
    assert first.exit_code == 0, first.stderr
    assert "sdvae: left out 3 tensors that are no part of the VAE: 3 loss.*\n" in first.stderr
    refused = run(*arguments)
    assert refused.exit_code == 1
    assert refused.stderr == f"sdvae: {out} is there already; give -o another name, or --force to write over it\n"
    assert json.loads(run(*arguments, "--force", "--json").stdout)["left_out"] == {"loss.*": 3}


def test_a_dry_run_writes_nothing_and_an_input_is_not_overwritten(run: Run, folder: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = run("convert", folder, "-o", tmp_path / "out.safetensors", "--dtype", "fp16", "--dry-run")
    assert done.exit_code == 0
    assert "would have" in done.stdout
    done = run("convert", folder, "-o", folder)
    assert done.exit_code == 1
    assert "is the input, too" in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("verb", ["inspect", "convert", "extract"])
def test_a_pickle_that_would_run_code_exits_with_4(verb: str, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"\x80\x02cposix\nsystem\nX\x01\x00\x00\x00x\x85R.")
    done = run(verb, path, *(() if verb == "inspect" else ("-o", tmp_path / "out.safetensors")))
    assert done.exit_code == 4
    assert "is refused: it asks for 'posix'.'system'" in done.stderr
    assert [item.name for item in tmp_path.iterdir()] == ["model.ckpt"]


def test_the_family_option_settles_what_a_file_leaves_open(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    save_file(ldm_state_dict(TINY), path)
    done = run("sample", "--vae", path, "-o", tmp_path / "out.png", "--family", "sd3")
    assert done.exit_code == 1
    assert "do not fit their family sd3: latent_channels 3 instead of 16" in done.stderr
    assert run("sample", "--vae", path, "-o", tmp_path / "out.png", "--family", "sd4").exit_code == 2
