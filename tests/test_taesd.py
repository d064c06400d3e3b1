"""TAESD's files: what loads, as what, what is refused; and the way there and back between their layouts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdvae.cli.main import cli
from sdvae.config import FAMILIES
from sdvae.errors import ConfigError, WeightsError
from sdvae.images.read import read_image
from sdvae.metrics import psnr
from sdvae.pixels import to_pixels
from sdvae.tiny import AutoencoderTiny, TinyConfig, named_as_diffusers, named_as_taesd
from sdvae.vae import VAE
from sdvae.weights.edit import convert, extract, swap
from sdvae.weights.find import find_file
from sdvae.weights.identify import identify
from sdvae.weights.identity import fingerprint
from sdvae.weights.load import load_weights, open_vae
from tests.test_keymap import assert_equal, ldm_state_dict, narrow
from tests.test_tiny import CROP_PSNR, CROPS, FILES, PSNR_TOLERANCE

HALVES = ("encoder", "decoder")


def pair(data_dir: Path, family: str) -> tuple[Path, Path]:
    folder = data_dir / "weights" / "taesd_bf16"
    encoder, decoder = (folder / f"{FILES[family]}_{half}.safetensors" for half in HALVES)
    return encoder, decoder


def random_halves(folder: Path, latent_channels: int = 4, seed: int = 0) -> tuple[Path, Path]:
    torch.manual_seed(seed)
    state = AutoencoderTiny(TinyConfig(latent_channels=latent_channels)).state_dict()
    encoder, decoder = folder / "a_encoder.safetensors", folder / "a_decoder.safetensors"
    for path, tensors in zip((encoder, decoder), named_as_taesd(state), strict=True):
        save_file(tensors, path)
    return encoder, decoder


def load(spec: Path, **arguments: str) -> VAE:
    return VAE.load(spec, device="cpu", dtype="fp32", **arguments)


def centre(data_dir: Path, name: str, size: int = 256) -> NDArray[np.uint8]:
    image = read_image(data_dir / "kodak" / f"{name}.png")
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


# --- Loading ---


@pytest.mark.parametrize("family", FILES)
def test_a_pair_loads_as_what_it_speaks_and_gives_the_published_psnr(
    family: str, data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder, decoder = pair(data_dir, family)
    vae = load(decoder)
    assert (vae.latent_space, vae.config.scaling_factor) == (family, FAMILIES[family].scaling_factor)
    assert vae.fingerprint == load(encoder).fingerprint
    assert caplog.records == []
    image = centre(data_dir, CROPS[0])
    assert abs(psnr(np.asarray(vae.roundtrip([image])[0]), image) - CROP_PSNR[family][0]) <= PSNR_TOLERANCE
    assert vae.engine.calls == 2 and "TAESD" in vae.engine.describe()


@pytest.mark.parametrize("family", ["sd1", "flux1"])
def test_a_folder_of_diffusers_is_the_same_vae_and_saves_one(family: str, data_dir: Path, tmp_path: Path) -> None:
    vae = load(pair(data_dir, family)[0])
    theirs = diffusers.AutoencoderTiny.from_config(vae.config.to_diffusers())
    theirs.load_state_dict(vae.model.state_dict())
    theirs.save_pretrained(tmp_path / "theirs")
    assert load(tmp_path / "theirs").fingerprint == vae.fingerprint
    vae.save(tmp_path / "ours")
    again = load(tmp_path / "ours")
    assert (again.fingerprint, again.latent_space, again.config) == (vae.fingerprint, family, vae.config)
    assert_equal(diffusers.AutoencoderTiny.from_pretrained(tmp_path / "ours").state_dict(), theirs.state_dict())


def test_half_precision_computes_and_what_is_not_finite_is_refused(data_dir: Path) -> None:
    vae = VAE.load(pair(data_dir, "sd1")[0], device="cpu", dtype="bf16")
    assert 0.0 < vae.latent_error() < 0.03  # a dozen roundings of 2^-9
    assert vae.in_float32().latent_error() == 0.0
    assert vae.in_float32().fingerprint == vae.fingerprint


def test_the_taesd_of_flux2_speaks_the_latents_of_flux2(data_dir: Path, tmp_path: Path) -> None:
    path = data_dir / "weights" / "taesd_other" / "taef2_decoder.pth"
    vae = load(path)
    assert (vae.config.latent_channels, vae.config.latent_scaling) == (32, FAMILIES["flux2"].latent_scaling)
    for verdict in (vae.verdict, open_vae(path).verdict, identify(path)):
        assert verdict.certainty == "declared" and [item.kind for item in verdict.evidence] == ["shapes"]
    assert vae.latent_space == identify(path).latent_space == "flux2"
    assert load(path, family="flux2").config == vae.config
    with pytest.raises(WeightsError, match="32 latent channels, not those of sdxl; it may be of flux2"):
        load(path, family="sdxl")
    image = centre(data_dir, CROPS[0])
    assert psnr(np.asarray(vae.roundtrip([image])[0]), image) > 30.0
    # The network itself writes scaled latents, in no patches: a std of about 1. FLUX.2's raw ones have 1.77.
    pixels = to_pixels(image[None])
    written = vae.model.encoder(pixels)
    raw = vae.encode(pixels).mode()
    assert 0.7 < written.std() < 1.1 and 1.6 < raw.std() / written.std() < 1.9
    patched = vae.scale(raw)
    assert patched.shape == (1, 128, raw.shape[2] // 2, raw.shape[3] // 2)
    assert (patched[0, 4 * 5 + 2 + 1] - written[0, 5, 1::2, 1::2]).abs().max() < 1e-4
    with pytest.raises(ConfigError, match=r"FLUX\.2 cannot be saved"):
        vae.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_taesd_that_nothing_names_warns_and_names_the_flag(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder, _ = random_halves(tmp_path)
    assert load(encoder).config.scaling_factor == FAMILIES["sd1"].scaling_factor
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "may be sd1 or sdxl" in caplog.text and "--family sdxl" in caplog.text
    caplog.clear()
    vae = load(encoder, family="sdxl")
    assert (vae.verdict.claimed, vae.verdict.certainty, vae.config.scaling_factor) == ("sdxl", "unknown", 0.13025)
    vae.save(tmp_path / "out")  # its metadata tell what no config.json of a TAESD can
    assert load(tmp_path / "out").config == vae.config
    assert caplog.records == []


def test_a_taesd_of_no_family_is_a_sentence(tmp_path: Path) -> None:
    encoder, _ = random_halves(tmp_path, 32)
    with pytest.raises(WeightsError, match="a TAESD of 32 latent channels, of no family sdvae knows"):
        load(encoder)


def test_what_fits_no_taesd_is_a_sentence(data_dir: Path, tmp_path: Path) -> None:
    encoder, decoder = random_halves(tmp_path)
    with pytest.raises(WeightsError, match="4 latent channels, not those of sd3; it may be of sd1 or sdxl"):
        load(encoder, family="sd3")
    with pytest.raises(WeightsError, match="not those of x4-upscaler"):
        load(encoder, family="x4-upscaler")
    (tmp_path / "other").mkdir()
    random_halves(tmp_path / "other", 16)
    shutil.copy(tmp_path / "other" / decoder.name, decoder)
    with pytest.raises(WeightsError, match=r"a_decoder\.safetensors and .*halves of two"):
        load(encoder)
    shutil.copy(encoder, decoder)
    with pytest.raises(WeightsError, match="halves of two"):
        load(encoder)
    decoder.unlink()
    with pytest.raises(WeightsError, match=r"half a TAESD, its encoder; put the other half beside it, as a_decoder"):
        load(encoder)
    nameless = tmp_path / "model.safetensors"
    shutil.copy(encoder, nameless)
    with pytest.raises(WeightsError, match="put the other half beside it, as its name with encoder for decoder"):
        load(nameless)
    sana = data_dir / "weights" / "taesd_other" / "taesana_encoder.pth"
    with pytest.raises(WeightsError, match="put the other half"):
        load(sana)


@pytest.mark.parametrize("key", ["9" * 5000 + ".weight", "0", "\u0663.weight", "0.weight.weight", "1.conv.0"])
def test_hostile_names_are_a_sentence(key: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(4)}, tmp_path / "a_encoder.safetensors")
    save_file({key: torch.zeros(4)}, tmp_path / "a_decoder.safetensors")
    with pytest.raises(WeightsError, match=r"is it another model\?$"):
        load(tmp_path / "a_encoder.safetensors")


def test_a_config_that_asks_for_another_network_is_refused(tmp_path: Path) -> None:
    encoder, _ = random_halves(tmp_path)
    load(encoder).save(tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"act_fn": "gelu"}))
    with pytest.raises(ConfigError, match="act_fn 'gelu'"):
        load(tmp_path / "out")


def test_a_folder_with_one_pair_is_that_pair(tmp_path: Path) -> None:
    encoder, decoder = random_halves(tmp_path)
    (tmp_path / "text_encoder.txt").write_text("")
    (tmp_path / "text_encoder.safetensors").write_text("")  # which has no decoder beside it
    assert find_file(tmp_path) == encoder
    for half in (encoder, decoder):
        shutil.copy(half, half.with_name(f"b{half.name}"))
    with pytest.raises(WeightsError, match=r"several TAESDs; name the file of one: .*a_encoder.*, .*ba_encoder"):
        find_file(tmp_path)


# --- convert ---


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_there_and_back_is_bit_equal(family: str, data_dir: Path, tmp_path: Path) -> None:
    encoder, decoder = pair(data_dir, family)
    folder = convert(encoder, tmp_path / "folder")
    assert (folder.layout, folder.family, folder.num_tensors) == ("diffusers", family, len(load_file(folder.output)))
    assert_equal(load_file(folder.output), named_as_diffusers(load_file(encoder), load_file(decoder)))
    diffusers.AutoencoderTiny.from_pretrained(tmp_path / "folder")

    single = convert(folder.output, tmp_path / "one.safetensors")
    assert_equal(load_file(single.output), load_file(folder.output))

    back = convert(single.output, tmp_path / "pair", layout="taesd")
    assert (back.num_tensors, back.num_bytes) == (folder.num_tensors, folder.num_bytes)
    written = sorted((tmp_path / "pair").iterdir())
    assert [path.name for path in written] == [decoder.name, encoder.name]
    assert_equal(load_file(written[0]), load_file(decoder))
    assert_equal(load_file(written[1]), load_file(encoder))
    with safe_open(written[1], framework="pt") as file:
        assert file.metadata()["sdvae.family"] == family and file.metadata()["sdvae.verb"] == "convert"
    assert load(tmp_path / "pair").fingerprint == load(encoder).fingerprint


def test_dtype_and_dry_run(data_dir: Path, tmp_path: Path) -> None:
    encoder, decoder = pair(data_dir, "sd1")
    told = convert(encoder, tmp_path / "pair", "taesd", torch.float32, is_dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert convert(encoder, tmp_path / "pair", "taesd", torch.float32) == told
    assert_equal(load_file(tmp_path / "pair" / decoder.name), {k: v.float() for k, v in load_file(decoder).items()})
    pth = data_dir / "weights" / "taesd_other" / "taef2_encoder.pth"
    pickled = torch.load(pth, weights_only=True)
    convert(pth, tmp_path / "taef2", "taesd")
    assert_equal(load_file(tmp_path / "taef2" / "taef2_encoder.safetensors"), pickled)
    assert load(tmp_path / "taef2").fingerprint == load(pth).fingerprint


def test_what_no_conversion_leads_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "sd1", narrow(FAMILIES["sd1"]))
    encoder, _ = random_halves(tmp_path)
    kl = tmp_path / "kl.safetensors"
    save_file(ldm_state_dict(FAMILIES["sd1"]), kl)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for source, output, layout, told in (
        (kl, tmp_path / "out", "taesd", "is a KL-VAE; it cannot be converted to a TAESD"),
        (encoder, tmp_path / "out.safetensors", "ldm", "is a TAESD, another network"),
        (encoder, tmp_path / "out.safetensors", "taesd", "must be a folder"),
        (encoder, tmp_path / "none" / "out", "taesd", "there is no folder"),
    ):
        with pytest.raises(WeightsError, match=told):
            convert(source, output, layout, family="sd1")  # type: ignore[arg-type]
    named = tmp_path / "taesd_encoder.safetensors"
    for half in ("encoder", "decoder"):
        (tmp_path / f"a_{half}.safetensors").rename(tmp_path / f"taesd_{half}.safetensors")
    with pytest.raises(WeightsError, match="is the input, too"):
        convert(named, tmp_path, "taesd", family="sd1")
    with pytest.raises(WeightsError, match="is a VAE already"):
        extract(named, tmp_path / "out", family="sd1")
    with pytest.raises(WeightsError, match=r"taesd_encoder.* is a TAESD, and the VAE of .* is a KL-VAE"):
        swap(kl, named, tmp_path / "out.safetensors", family="sd1")
    assert sorted(path.read_bytes() for path in tmp_path.iterdir()) == sorted(before.values())


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    encoder, decoder = random_halves(tmp_path)
    vae = open_vae(encoder, "sd1")
    assert {entry.path for entry in vae.file.entries.values()} == {encoder, decoder}
    assert fingerprint(vae.read()) == fingerprint(load_weights(encoder, "sd1").tensors)


# --- The verbs ---


@pytest.fixture
def run() -> Callable[..., Result]:
    def run_cli(*arguments: object) -> Result:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="sdvae")

    return run_cli


def test_every_verb_takes_a_taesd(
    run: Callable[..., Result], data_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder, decoder = pair(data_dir, "sdxl")
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(centre(data_dir, CROPS[0], 128)).save(photos / "a.png")
    vae = ("--vae", decoder, "--device", "cpu", "--dtype", "fp32")
    two_of_64_px = ("--steps", 2, "--size", 64)
    for arguments in (
        ("encode", photos, tmp_path / "store", "--size", 64, *vae),
        ("decode", tmp_path / "store", tmp_path / "images", *vae),
        ("roundtrip", photos / "a.png", "-o", tmp_path / "round.png", *vae),
        ("interpolate", photos / "a.png", photos / "a.png", "-o", tmp_path / "strip.png", *two_of_64_px, *vae),
        ("sample", "-n", 1, "--size", 64, "-o", tmp_path / "sheet.png", *vae),
        ("convert", encoder, "-o", tmp_path / "pair", "--layout", "taesd"),
    ):
        done = run(*arguments)
        assert done.exit_code == 0, (arguments, done.output, done.exception)
    assert json.loads((tmp_path / "store" / "manifest.json").read_text())["vae"]["latent_space"] == "sdxl"
    assert [path.suffix for path in (tmp_path / "images").iterdir()] == [".png"]
    assert caplog.records == []

    shown = json.loads(run("inspect", encoder, "--json").stdout)["vae"]
    assert (shown["layout"], shown["family"], shown["config"]["scaling_factor"]) == ("taesd", "sdxl", 0.13025)
    assert shown["fingerprint"] == load(encoder).fingerprint
    assert "taesd layout" in run("inspect", decoder).stdout
    assert json.loads(run("identify", encoder, "--json").stdout)["latent_space"] == "sdxl"
