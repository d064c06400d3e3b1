"""Two VAEs side by side: `sdvae compare`."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from torch import Tensor

from sdvae import VAE
from sdvae.cli.main import cli
from sdvae.config import FAMILIES
from sdvae.weights.compare import Comparison, compare
from sdvae.weights.load import save_folder
from tests.test_edit import checkpoint
from tests.test_keymap import ldm_state_dict, narrow, to_diffusers

NARROW = narrow(FAMILIES["sd1"])
LDM = ldm_state_dict(NARROW)


@pytest.fixture(autouse=True)
def _narrow_families(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sd1", "sdxl", "sd3"):
        monkeypatch.setitem(FAMILIES, name, narrow(FAMILIES[name]))


def save(path: Path, tensors: dict[str, Tensor], family: str | None = "sd1") -> str:
    save_file(tensors, path, {"sdvae.family": family} if family else None)
    return str(path)


def between(tmp_path: Path, a: dict[str, Tensor], b: dict[str, Tensor]) -> Comparison:
    return compare(save(tmp_path / "a.safetensors", a), save(tmp_path / "b.safetensors", b))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["compare", *map(str, arguments)], prog_name="sdvae")


@pytest.mark.parametrize("how", ["folder", "ldm", "checkpoint", "ckpt"])
def test_the_same_weights_are_equal_in_any_layout_and_kind_of_file(how: str, tmp_path: Path) -> None:
    save_folder(tmp_path / "folder", FAMILIES["sd1"], to_diffusers(LDM))
    if how == "ldm":
        other: Path | str = save(tmp_path / "other.safetensors", LDM)
    else:
        name = {"folder": "", "checkpoint": "model.safetensors", "ckpt": "zip.ckpt"}[how]
        other = checkpoint(tmp_path / name, LDM) if name else tmp_path / "folder"
    found = compare(str(tmp_path / "folder"), str(other))
    assert (found.verdict, found.num_shared, found.differences, found.config) == ("equal", 248, (), {})
    assert (found.space.is_same, found.space.certainty, found.space.name) == (True, "proved", None)
    done = run(tmp_path / "folder", other)
    assert done.exit_code == 0 and done.stdout.startswith("equal: 248 tensors with the same values\n")
    assert done.stderr == ""


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("is_widened", [False, True])
def test_rounding_is_told_from_other_differences(
    name: str, dtype: torch.dtype, is_widened: bool, tmp_path: Path
) -> None:
    rounded = {key: value.to(dtype) for key, value in LDM.items()}
    stored = {key: value.float() for key, value in rounded.items()} if is_widened else rounded
    found = between(tmp_path, LDM, stored)
    assert (found.verdict, found.rounding, found.space.is_same) == ("rounded", name, True)
    assert found.relative_l2 is not None and 0 < found.relative_l2 < 2**-8
    done = run(tmp_path / "b.safetensors", tmp_path / "a.safetensors")
    assert done.exit_code == 5 and done.stdout.startswith(f"equal but for rounding to {name}: ")
    nudged = dict(stored)
    nudged["decoder.conv_in.bias"] = nudged["decoder.conv_in.bias"] + 0.25
    found = between(tmp_path, LDM, nudged)
    assert (found.verdict, found.rounding) == ("different", None)


def test_another_decoder_keeps_the_space(tmp_path: Path) -> None:
    """As ft-mse beside the VAE it was made of."""
    tuned = {key: value + 0.125 if key == "decoder.conv_out.weight" else value for key, value in LDM.items()}
    found = between(tmp_path, LDM, tuned)
    (difference,) = found.differences
    assert (difference.name, difference.num_differing) == ("decoder.conv_out.weight", difference.num_values)
    assert difference.max_abs == pytest.approx(0.125, rel=1e-5)
    exact = 0.125 * difference.num_values**0.5 / float(LDM["decoder.conv_out.weight"].double().norm())
    assert difference.relative_l2 == pytest.approx(exact, rel=1e-4)
    assert (found.space.is_same, found.space.reason) == (True, "the encoders are equal")
    done = run(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert done.exit_code == 5
    assert done.stdout.startswith("different: 1 of 248 tensors differ, all of the decoder, relative L2 ")
    assert "; the same latent space\n" in done.stdout


def test_the_latents_of_one_image_tell_the_space(small_vae: VAE, tmp_path: Path) -> None:
    tensors = {key: value.clone() for key, value in small_vae.model.state_dict().items()}
    config = small_vae.config
    save_folder(tmp_path / "a", config, tensors)
    near = {key: value * 1.001 if key.startswith("encoder.conv_out") else value for key, value in tensors.items()}
    save_folder(tmp_path / "near", config, near)
    far = {
        key: -value if key.startswith(("encoder.conv_out", "quant_conv")) else value for key, value in tensors.items()
    }
    save_folder(tmp_path / "far", config, far)
    near_space, far_space = (compare(str(tmp_path / "a"), str(tmp_path / name)).space for name in ("near", "far"))
    assert (near_space.is_same, near_space.certainty) == (True, "proved")
    assert far_space.is_same is False and "correlate by -" in far_space.reason


def test_configs_are_compared_where_both_tell_them(tmp_path: Path) -> None:
    save_folder(tmp_path / "a", FAMILIES["sd1"], to_diffusers(LDM))
    save_folder(tmp_path / "b", FAMILIES["sdxl"], to_diffusers(LDM))
    found = compare(str(tmp_path / "a"), str(tmp_path / "b"))
    assert found.verdict == "different" and found.config == {"scaling_factor": (0.18215, 0.13025)}
    assert run(tmp_path / "a", tmp_path / "b").stdout.startswith(
        "different: equal tensors, but another config (scaling_factor)\n"
    )
    untold = compare(str(tmp_path / "b"), save(tmp_path / "c.safetensors", LDM, None))
    assert untold.verdict == "equal" and "scaling_factor" in untold.untold


def test_networks_of_other_shapes_are_compared_as_far_as_they_go(tmp_path: Path) -> None:
    a = save(tmp_path / "a.safetensors", LDM)
    b = save(tmp_path / "b.safetensors", ldm_state_dict(FAMILIES["sd3"]), "sd3")
    found = compare(a, b)
    assert "decoder.conv_in.weight" in found.only_in_a and "quant_conv.weight" in found.only_in_a
    assert found.space.is_same is False and found.config["latent_channels"] == (4, 16)
    done = run(a, b, "--json")
    assert done.exit_code == 5 and json.loads(done.stdout)["space"]["is_same"] is False


def test_numbers_that_are_not_finite_are_compared_too(tmp_path: Path) -> None:
    broken = {key: value.clone() for key, value in LDM.items()}
    broken["decoder.conv_out.bias"][0] = float("nan")
    assert between(tmp_path, broken, broken).verdict == "equal"
    found = between(tmp_path, LDM, broken)
    (difference,) = found.differences
    assert (difference.num_differing, difference.max_abs, difference.relative_l2) == (1, None, None)
    assert (
        json.loads(run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json").stdout)["relative_l2"] is None
    )
    assert "not finite" in run(tmp_path / "a.safetensors", tmp_path / "b.safetensors").stdout


def test_what_is_no_vae_is_one_sentence(tmp_path: Path) -> None:
    a = save(tmp_path / "a.safetensors", LDM)
    lora = save(tmp_path / "lora.safetensors", {"lora_unet_x.lora_up.weight": torch.zeros(2)})
    done = run(a, lora)
    assert done.exit_code == 1 and done.stdout == "" and "it is a LoRA" in done.stderr


def test_a_taesd_has_the_space_of_the_vae_it_was_made_for(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the families in full size
    folder = data_dir / "weights" / "taesd_bf16"
    small = Path(__file__).parents[1] / "sdvae" / "assets" / "small.safetensors"
    own, other = (compare(str(small), str(folder / f"{name}_encoder.safetensors")) for name in ("taesd", "taesdxl"))
    assert (own.verdict, own.space.is_same, own.space.name) == ("different", True, "sd1")
    assert own.a.network == "KL-VAE" and own.b.network == "TAESD"
    assert other.space.is_same is False
