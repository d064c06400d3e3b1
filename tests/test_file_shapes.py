"""The files that people have: what lies beside weights, which of several is meant, and what is no weights at all."""

import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from diffusers import AutoencoderKL as DiffusersVAE
from diffusers.loaders.single_file_utils import create_vae_diffusers_config_from_ldm
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from sdvae.cli.main import cli
from sdvae.config import FAMILIES, VAEConfig
from sdvae.errors import ConfigError, UnsafeFileError, WeightsError
from sdvae.vae import VAE
from sdvae.weights.edit import convert
from sdvae.weights.find import choose, find_file
from sdvae.weights.identity import fingerprint
from sdvae.weights.load import load_weights
from tests.test_keymap import assert_equal, ldm_state_dict, to_diffusers

# No family: 5 channels at a quarter of the size, attention at the lowest level.
ODD = VAEConfig(
    block_out_channels=(32, 32, 64), layers_per_block=1, latent_channels=5, attention_levels=(2,), sample_size=64,
    scaling_factor=0.7,
)  # fmt: skip
DDCONFIG = {
    "double_z": True, "z_channels": 5, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1, 2],
    "num_res_blocks": 1, "attn_resolutions": [16], "dropout": 0.0,
}  # fmt: skip
STEM = "diffusion_pytorch_model"


def ldm_config(scale: float | None = 0.7, embed_dim: int | None = 5, **changes: Any) -> dict[str, Any]:
    """The config of a diffusion run, as LDM writes it; that of a VAE alone where it has no scale."""
    inside = {"embed_dim": embed_dim, "monitor": "val/rec_loss", "ddconfig": DDCONFIG | changes}
    vae = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": inside}
    if scale is None:
        return {"model": {"base_learning_rate": 4.5e-6} | vae}
    return {"model": {"params": {"scale_factor": scale, "unet_config": {"x": [1]}, "first_stage_config": vae}}}


def ldm_file(path: Path, prefix: str = "", config: VAEConfig = ODD) -> str:
    """A file in LDM's layout; its fingerprint."""
    state = {prefix + key: value for key, value in ldm_state_dict(config).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path) if path.suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    return fingerprint(to_diffusers(ldm_state_dict(config)))


# --- configs beside weights ---


@pytest.mark.parametrize(
    ("file", "prefix", "beside", "content"),
    [
        ("kl.ckpt", "", "kl.yaml", ldm_config()),
        ("kl.safetensors", "", "kl.yml", {"scale_factor": 0.7, "ddconfig": DDCONFIG}),
        ("model.ckpt", "first_stage_model.", "config.yaml", ldm_config(embed_dim=None)),
        ("kl.safetensors", "", "config.json", ODD.to_diffusers()),
        ("kl.pt", "vae.", "config.json", ldm_config()),
    ],
)
def test_a_file_in_ldms_layout_has_the_config_beside_it(
    file: str, prefix: str, beside: str, content: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = ldm_file(tmp_path / file, prefix)
    (tmp_path / beside).write_text(json.dumps(content) if beside.endswith("json") else yaml.safe_dump(content))
    found = load_weights(tmp_path / file)
    assert (fingerprint(found.tensors), found.config) == (expected, ODD)
    assert caplog.text == ""
    convert(tmp_path / file, tmp_path / "out")
    theirs = DiffusersVAE.from_pretrained(tmp_path / "out")
    assert (fingerprint(theirs.state_dict()), theirs.config.scaling_factor) == (expected, 0.7)


def test_ldms_config_is_read_as_diffusers_reads_it(tmp_path: Path) -> None:
    """Its converter knows no attention beside that of the middle."""
    config, written = replace(ODD, attention_levels=()), ldm_config(attn_resolutions=[])
    ldm_file(tmp_path / "kl.safetensors", config=config)
    (tmp_path / "kl.yaml").write_text(yaml.safe_dump(written))
    theirs = VAEConfig.from_diffusers(create_vae_diffusers_config_from_ldm(written, {}))
    assert replace(theirs, sample_size=64) == load_weights(tmp_path / "kl.safetensors").config == config


def test_the_config_of_a_vae_alone_does_not_tell_the_scale(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ldm_file(tmp_path / "kl.ckpt")
    (tmp_path / "kl.yaml").write_text(yaml.safe_dump(ldm_config(scale=None)))
    assert load_weights(tmp_path / "kl.ckpt").config == replace(ODD, scaling_factor=1.0)
    assert "kl.ckpt does not tell the scale of its latents (scale_factor); sdvae takes LDM's default" in caplog.text
    known = replace(FAMILIES["sd1"], block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    ldm_file(tmp_path / "sd.ckpt", config=known)
    structure = ldm_config(None, 4, z_channels=4, ch_mult=[1, 1, 1, 1], attn_resolutions=[])
    (tmp_path / "sd.yaml").write_text(yaml.safe_dump(structure))
    assert load_weights(tmp_path / "sd.ckpt").config == known  # the family of these shapes tells it


def test_a_config_of_another_vae_in_the_folder_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = replace(FAMILIES["sd1"], block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    ldm_file(tmp_path / "sd.safetensors", config=known)
    (tmp_path / "config.json").write_text(json.dumps(ODD.to_diffusers()))
    (tmp_path / "config.yaml").write_text("model: {target: a.UNet}")
    assert load_weights(tmp_path / "sd.safetensors", None).config == known
    assert "config.json describes another VAE than the one in sd.safetensors beside it, and is not used" in caplog.text
    (tmp_path / "sd.yaml").write_text(yaml.safe_dump(ldm_config()))  # its own name leaves no excuse
    with pytest.raises(WeightsError, match=r"do not fit their sd\.yaml: latent_channels 4 instead of 5"):
        load_weights(tmp_path / "sd.safetensors")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (yaml.safe_dump(ldm_config(double_z=False)), "does not implement: double_z=False"),
        (yaml.safe_dump(ldm_config(tanh_out=True)), "does not implement: tanh_out=True"),
        (yaml.safe_dump(ldm_config(embed_dim=3)), "embed_dim 3 and z_channels 5 differ"),
        (yaml.safe_dump(ldm_config(ch="wide")), "ch of its ddconfig is 'wide', not a whole number"),
        (yaml.safe_dump(ldm_config(ch_mult=[1, None])), "ch_mult or attn_resolutions of its ddconfig is no list"),
        (yaml.safe_dump(ldm_config(scale="${scale}")), "scaling_factor is '${scale}'"),  # type: ignore[arg-type]
        (yaml.safe_dump({"n_embed": 8192, "ddconfig": DDCONFIG}), "a VQ-VAE (n_embed)"),
        (yaml.safe_dump([{"a": {"ddconfig": DDCONFIG}}]), ""),  # a list is no config: as if it were not there
        (yaml.safe_dump({"a": {"ddconfig": DDCONFIG}, "b": {"ddconfig": DDCONFIG | {"ch": 64}}}), "several ddconfig"),
        ("a0: &a0 [1]\n" + "".join(f"a{i + 1}: &a{i + 1} [{f'*a{i}, ' * 9}]\n" for i in range(9)), "inside of aliases"),
        ("a: &a {ddconfig: *a}", "inside of aliases"),
        ("[" * 60_000, "nested too deeply"),
        ("a: !!python/object/apply:os.system ['touch x']", "cannot be read as YAML: could not determine a constructor"),
        ("# " + "x" * 70_000, "more than 65,536 bytes"),
        ("\x00\x01", "cannot be read as YAML"),
    ],
)
def test_a_config_that_cannot_be_meant_is_one_sentence(text: str, told: str, tmp_path: Path) -> None:
    ldm_file(tmp_path / "kl.safetensors")
    (tmp_path / "kl.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_weights(tmp_path / "kl.safetensors")
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert "kl.yaml" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kl.safetensors", "kl.yaml"]


# --- fields of a config.json that change nothing ---

OTHERS = {
    "_diffusers_version": "0.4.2", "_name_or_path": "org/name", "new": None, "newer": False, "use_tiling": True,
    "tile_sample_min_size": 512, "torch_dtype": "float16", "latent_magnitude": 3,
}  # fmt: skip


def test_what_another_program_wrote_into_a_config_is_told_once_and_kept(
    small_vae: VAE, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small_vae.save(tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | OTHERS))
    loaded = VAE.load(tmp_path / "in", device="cpu", dtype="fp32")
    assert loaded.config == small_vae.config
    unused = "latent_magnitude, new, newer, tile_sample_min_size, torch_dtype, use_tiling"
    assert [record.getMessage() for record in caplog.records] == [
        f"the config has fields that sdvae does not know, unused: {unused}"
    ]
    loaded.save(tmp_path / "saved")
    convert(find_file(tmp_path / "in"), tmp_path / "converted")
    for folder in ("saved", "converted"):
        assert json.loads((tmp_path / folder / "config.json").read_text()) == json.loads(path.read_text())
    DiffusersVAE.from_pretrained(tmp_path / "saved")


def test_a_taesds_config_is_kept_too(data_dir: Path, tmp_path: Path) -> None:
    convert(data_dir / "weights" / "taesd_bf16" / "taesd_encoder.safetensors", tmp_path / "a", family="sd1")
    path = tmp_path / "a" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"latent_magnitude": 3, "latent_shift": 0.5}))
    convert(find_file(tmp_path / "a"), tmp_path / "b", family="sd1")
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == json.loads(path.read_text())


def test_a_field_that_may_matter_is_refused(tmp_path: Path, small_vae: VAE) -> None:
    small_vae.save(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | {"quantization_config": {"bits": 4}}))
    with pytest.raises(ConfigError, match="AutoencoderKL does not know: quantization_config="):
        load_weights(tmp_path)
    path.write_text(json.dumps(written | {"scaling_factor": None}))
    with pytest.raises(ConfigError, match=r"scaling_factor is null, so nothing tells the scale of the latents"):
        load_weights(tmp_path)


# --- which of several files ---


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ([f"{STEM}.fp16.safetensors", f"{STEM}.safetensors", f"{STEM}.bin"], f"{STEM}.safetensors"),
        ([f"{STEM}.fp16.safetensors", f"{STEM}.safetensors.index.json"], f"{STEM}.safetensors.index.json"),
        ([f"{STEM}.bin", f"{STEM}.fp16.safetensors"], f"{STEM}.bin"),
        ([f"{STEM}.bf16.safetensors", f"{STEM}.fp16.safetensors"], f"{STEM}.fp16.safetensors"),
        ([f"{STEM}.fp16.safetensors", f"{STEM}.fp32.safetensors"], f"{STEM}.fp32.safetensors"),
        ([f"{STEM}.non_ema.safetensors", f"{STEM}.fp16.safetensors"], f"{STEM}.fp16.safetensors"),
        ([f"{STEM}.ema.bin", f"{STEM}.ema.safetensors"], f"{STEM}.ema.safetensors"),
        ([f"{STEM}.fp16.bin", "other.safetensors"], f"{STEM}.fp16.bin"),
        ([f"{STEM}-00001-of-00002.fp16.safetensors", f"{STEM}-00002-of-00002.fp16.safetensors",
          f"{STEM}.safetensors.index.fp16.json"], f"{STEM}.safetensors.index.fp16.json"),
        (["vae.fp16.safetensors", "vae.safetensors", "vae.ckpt"], "vae.safetensors"),
        (["kl-f8.pth", "README.md"], "kl-f8.pth"),
        (["README.md", "config.json"], None),
    ],
)  # fmt: skip
def test_one_rule_chooses_among_variants(names: list[str], chosen: str | None) -> None:
    for listed in (names, names[::-1]):
        assert choose(listed) == chosen


@pytest.mark.parametrize(
    "names",
    [
        (f"{STEM}.ema.safetensors", f"{STEM}.non_ema.safetensors"),
        ("sdxl.safetensors", "sdxl.vae.safetensors"),
    ],
)
def test_files_of_different_weights_are_named(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(WeightsError, match=rf"{tmp_path} holds several files of weights \({', '.join(names)}\); name"):
        find_file(tmp_path)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"model_index.json": "{}"}, "is a pipeline without a VAE beside it; give the folder or hub id of its VAE"),
        ({"modular_model_index.json": json.dumps({"vae": [None, None, {
            "pretrained_model_name_or_path": "org/sdxl", "subfolder": "vae"}]})}, "its index says org/sdxl/vae, give"),
        ({"modular_model_index.json": json.dumps({"vae": [None, None, {"repo": 5}]})}, "give the folder or hub id"),
        ({f"{STEM}-00001-of-00002.safetensors": ""}, "holds shards .* without their index, a .index.json"),
        ({"README.md": "", "vae.txt": ""}, "holds no diffusion_pytorch_model.safetensors"),
    ],
)  # fmt: skip
def test_a_folder_without_weights_says_what_it_holds(files: dict[str, str], told: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(WeightsError, match=told):
        find_file(tmp_path)


@pytest.mark.parametrize("names", [["optimizer.txt"], ["a.safetensors", "b.safetensors"], ["model_index.json"]])
def test_a_folder_with_the_vae_inside(names: list[str], small_vae: VAE, tmp_path: Path) -> None:
    small_vae.save(tmp_path / "vae")
    for name in names:
        (tmp_path / name).write_text("{}")
    assert find_file(tmp_path) == tmp_path / "vae" / f"{STEM}.safetensors"


def test_a_taesd_that_comfyui_saved(data_dir: Path, tmp_path: Path) -> None:
    halves = {
        half: data_dir / "weights" / "taesd_bf16" / f"taesd_{half}.safetensors" for half in ("encoder", "decoder")
    }
    whole = {f"taesd_{half}.{key}": value for half, path in halves.items() for key, value in load_file(path).items()}
    save_file(whole | {"vae_scale": torch.ones(()), "vae_shift": torch.zeros(())}, tmp_path / "taesd.safetensors")
    found, expected = load_weights(tmp_path / "taesd.safetensors", "sd1"), load_weights(halves["encoder"], "sd1")
    assert found.config == expected.config
    assert_equal(found.tensors, expected.tensors)


# --- dicts in files of torch.save ---


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state},
        lambda state: {"epoch": 3, "model": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}}},
        lambda state: {"module": {"vae": state}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"weights": {f"model.first_stage_model._orig_mod.{key}": state[key] for key in state}},
    ],
    ids=["model", "with its optimizer", "twice", "DataParallel", "nested prefixes"],
)
def test_trainers_keep_the_weights_in_a_dict(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    config = FAMILIES["sd1"]
    state = ldm_state_dict(replace(config, block_out_channels=(32, 32, 32, 32), layers_per_block=1))
    torch.save(wrap(state), tmp_path / "model.pt")
    assert_equal(load_weights(tmp_path / "model.pt").tensors, to_diffusers(state))


def test_two_sets_of_weights_in_a_file_are_told(tmp_path: Path) -> None:
    state = ldm_state_dict(ODD)
    torch.save({"model": state, "ema": {key: value + 1 for key, value in state.items()}}, tmp_path / "model.pt")
    with pytest.raises(WeightsError, match=r"several VAEs, under ema\., model\.; save the one that is meant alone"):
        load_weights(tmp_path / "model.pt")


def test_a_dict_named_a_million_times_is_read_once(tmp_path: Path) -> None:
    inner = {f"k{i}": None for i in range(2000)}
    shared = {f"k{i}": inner for i in range(2000)}
    torch.save({f"k{i}": shared for i in range(2000)}, tmp_path / "model.pt")
    with pytest.raises(WeightsError, match="holds no tensors by name"):
        load_weights(tmp_path / "model.pt")


@pytest.mark.parametrize("wrap", [lambda module: module, lambda module: {"vae": module, "epoch": 1}])
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickled_module_is_called_one(wrap: Callable[[Any], Any], is_zip: bool, tmp_path: Path) -> None:
    torch.save(wrap(nn.Sequential(nn.Conv2d(1, 1, 1))), tmp_path / "m.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UnsafeFileError) as caught:
        load_weights(tmp_path / "m.pt")
    assert "is refused: it is a whole module that torch.save(model) pickled" in str(caught.value)
    assert "Sequential" in str(caught.value) and "save its state_dict() instead" in str(caught.value)


# --- files that are something else ---


def picture(format: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format)
    return file.getvalue()


def packed(name: str) -> bytes:
    file = io.BytesIO()
    if name == "tar":
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("model.safetensors"))
    else:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(name, b"")
    return file.getvalue()


SOMETHING_ELSE = {
    "GGUF": (b"GGUF" + struct.pack("<IQQ", 3, 2, 1) + bytes(64), "a GGUF file"),
    "ONNX by torch": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\xff", "an ONNX model, a program"),
    "ONNX without producer": (b"\x08\x07\x3a\x90\x01", "an ONNX model, a program"),
    "TensorRT": (b"ftrt" + bytes(64), "a TensorRT engine, a program for one size and machine"),
    "Flax": (
        b"\x82\xa7decoder\x81\xa7conv_in\x80\xa7encoder\x80",
        "a msgpack file, as Flax saves weights",
    ),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "an HDF5 file, as Keras writes them"),
    "TFLite": (b"\x1c\0\0\0TFL3" + bytes(64), "a TensorFlow Lite model"),
    "OpenVINO": (b'<?xml version="1.0"?>\n<net name="vae" version="11">', "an OpenVINO model"),
    "web page": (b"<!doctype html>\n<html>", "a web page, not weights"),
    "NumPy": (b"\x93NUMPY\x01\0v\0{'descr': '<f4'", "one array of NumPy"),
    "npz": (packed("arr_0.npy"), "arrays of NumPy (.npz)"),
    "Keras": (packed("model.weights.h5"), "an exported program"),
    "torch.export": (packed("vae/archive_format"), "an exported program"),
    "zip": (packed("model.safetensors"), "a zip archive, but not one of torch.save; unpack it first"),
    "tar": (packed("tar"), "a tar archive; unpack it first"),
    "gzip": (b"\x1f\x8b\x08" + bytes(64), "compressed with gzip; unpack it first"),
    "zstandard": (b"\x28\xb5\x2f\xfd" + bytes(64), "compressed with zstandard"),
    "7-Zip": (b"7z\xbc\xaf\x27\x1c" + bytes(64), "a 7-Zip archive"),
    "PNG": (picture("png"), "a PNG picture"),
    "WebP": (picture("webp"), "a WebP picture"),
}


@pytest.mark.parametrize("kind", SOMETHING_ELSE)
@pytest.mark.parametrize("name", ["vae.bin", "vae.pt", "model.ckpt"])
def test_a_file_of_another_format_is_called_what_it_is(kind: str, name: str, tmp_path: Path) -> None:
    content, told = SOMETHING_ELSE[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        load_weights(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name} is {told}") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["flax_model.msgpack", "vae.gguf", "vae.onnx", "vae.engine"])
def test_the_only_file_of_a_folder_is_called_what_it_is(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(SOMETHING_ELSE["GGUF"][0])
    with pytest.raises(WeightsError, match=rf"{name} is a GGUF file"):
        load_weights(tmp_path)


def test_a_header_whose_length_looks_like_a_picture_is_a_header(tmp_path: Path) -> None:
    """Eight bytes of length may spell the beginning of anything."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(0x4D42)
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert path.read_bytes().startswith(b"BM") and load_file(path)["a"] == 0
    done = CliRunner().invoke(cli, ["inspect", str(path)])
    assert done.exit_code == 0 and "1 (1 F32)" in done.stdout


def test_inspect_tells_what_is_no_part_of_the_vae_and_escapes_what_a_file_says(tmp_path: Path) -> None:
    path = tmp_path / "kl.safetensors"
    others = {"loss.logvar": torch.zeros(1), "loss.disc.0.weight": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    save_file(ldm_state_dict(ODD) | others, path, {"note": "\x1b[2Jred\n" + "x" * 1000})
    (tmp_path / "kl.yaml").write_text(yaml.safe_dump(ldm_config()))
    done = CliRunner().invoke(cli, ["inspect", str(path)])
    assert "left out     of other parts: 2 loss.*, 1 model_ema.*\n" in done.stdout
    assert r"metadata     note: \x1b[2Jred\nxxx" in done.stdout and "... (1,008 characters)" in done.stdout
    assert np.all([len(line) < 200 for line in done.stdout.splitlines()])
