"""One list of evidence: whichever command is asked about a VAE's latent space, the answer is the same."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import sdvae
from sdvae import VAE
from sdvae.cli.main import cli
from sdvae.config import FAMILIES
from sdvae.encoding.tasks import Work
from sdvae.errors import StoreError
from sdvae.images.read import read_image
from sdvae.pixels import to_pixels
from sdvae.reading.spaces import require_space
from sdvae.store.store import Store
from sdvae.tiny import AutoencoderTiny, TinyConfig, named_as_diffusers, named_as_taesd
from sdvae.weights import probe
from sdvae.weights.compare import compare
from sdvae.weights.evidence import Evidence, Verdict, judge, relate, told_by_config
from sdvae.weights.load import load_weights, save_folder
from tests.conftest import random_model
from tests.made_stores import make_store

TAESD = {"sd1": "taesd", "sdxl": "taesdxl", "sd3": "taesd3", "flux1": "taef1"}
PROVED_SD1 = {"certainty": "proved", "correlations": {"sd1": 1.0, "sdxl": 0.2}, "encoder": "0" * 64}
LAST = "14"  # the layer of a TAESD's encoder that gives the latents


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="sdvae")


def halves(data_dir: Path, space: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Encoder and decoder, under their author's names."""
    folder = data_dir / "weights" / "taesd_bf16"
    encoder, decoder = (load_file(folder / f"{TAESD[space]}_{half}.safetensors") for half in ("encoder", "decoder"))
    return encoder, decoder


def save_pair(folder: Path, encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> Path:
    folder.mkdir()
    save_file(encoder, folder / "x_encoder.safetensors")
    save_file(decoder, folder / "x_decoder.safetensors")
    return folder / "x_encoder.safetensors"


def mixed(encoder: dict[str, Tensor], matrix: Tensor) -> dict[str, Tensor]:
    """The encoder with its latents' channels multiplied by a matrix."""
    weight, bias = (encoder[f"{LAST}.{part}"].float() for part in ("weight", "bias"))
    mixed_weight = (matrix @ weight.flatten(1)).view_as(weight)
    return encoder | {f"{LAST}.weight": mixed_weight, f"{LAST}.bias": matrix @ bias}


def rotation(num_channels: int) -> Tensor:
    matrix: Tensor = torch.linalg.qr(
        torch.randn(num_channels, num_channels, generator=torch.Generator().manual_seed(0))
    )[0]
    return matrix


def fine_tuned(data_dir: Path, space: str, num_steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A TAESD trained on, to reconstruct crops of 64 px of photos, encoder and decoder both."""
    model = AutoencoderTiny(TinyConfig.from_family(space))
    model.load_state_dict({key: value.float() for key, value in named_as_diffusers(*halves(data_dir, space)).items()})
    photos = sorted((data_dir / "train" / "cid22_train").iterdir())[:2]
    pixels = to_pixels(np.stack([read_image(path)[:64, :64] for path in photos]))
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-4)
    for _ in range(num_steps):
        shown, _ = model(pixels)
        loss = (shown - pixels).abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    encoder, decoder = named_as_taesd({key: value.detach() for key, value in model.state_dict().items()})
    return encoder, decoder


EXPECTED = {
    "TAESD": ("sd1", "proved"),
    "TAESD XL": ("sdxl", "proved"),
    "TAESD 3": ("sd3", "proved"),
    "TAEF1": ("flux1", "proved"),
    "TAESD in fp16": ("sd1", "proved"),
    "TAESD 3 in bf16": ("sd3", "proved"),
    "TAESD XL in fp8": ("sdxl", "proved"),
    "TAESD, 20 steps of fine-tuning": ("sd1", "proved"),
    "TAEF1, one channel's sign flipped": ("unknown", "unknown"),
    "TAESD, channels rotated": ("unknown", "unknown"),
    "random weights with SD 1's config": ("unknown", "unknown"),
    "the embedded VAE": ("sd1", "proved"),
    "the embedded VAE in bf16, with its config": ("sd1", "proved"),
}


@pytest.fixture(scope="session")
def made(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The encoders of the table."""
    root = tmp_path_factory.mktemp("encoders")
    found = {}

    def pair(name: str, encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> None:
        found[name] = save_pair(root / str(len(found)), encoder, decoder)

    for name, space in zip(list(EXPECTED)[:4], TAESD, strict=True):
        pair(name, *halves(data_dir, space))
    rounded = {
        "TAESD in fp16": ("sd1", torch.float16),
        "TAESD 3 in bf16": ("sd3", torch.bfloat16),
        "TAESD XL in fp8": ("sdxl", torch.float8_e4m3fn),
    }
    for name, (space, dtype) in rounded.items():
        encoder, decoder = halves(data_dir, space)
        pair(name, {key: value.to(dtype) for key, value in encoder.items()}, decoder)
    pair("TAESD, 20 steps of fine-tuning", *fine_tuned(data_dir, "sd1", 20))
    encoder, decoder = halves(data_dir, "flux1")
    pair("TAEF1, one channel's sign flipped", mixed(encoder, torch.diag(torch.tensor([-1.0] + [1.0] * 15))), decoder)
    encoder, decoder = halves(data_dir, "sd1")
    pair("TAESD, channels rotated", mixed(encoder, rotation(4)), decoder)
    random = random_model(FAMILIES["small"])
    save_folder(root / "random", random.config, random.state_dict())
    found["random weights with SD 1's config"] = root / "random"
    embedded = load_weights()
    save_file(embedded.tensors, root / "embedded.safetensors")
    found["the embedded VAE"] = root / "embedded.safetensors"
    save_folder(root / "rounded", embedded.config, {key: value.bfloat16() for key, value in embedded.tensors.items()})
    found["the embedded VAE in bf16, with its config"] = root / "rounded"
    return found


@pytest.mark.parametrize("name", EXPECTED)
def test_every_command_says_the_same(name: str, made: dict[str, Path], tmp_path: Path) -> None:
    path, (space, certainty) = made[name], EXPECTED[name]
    verdict = VAE.load(path, device="cpu", dtype="fp32").verdict
    assert (verdict.space or "unknown", verdict.certainty) == (space, certainty), verdict
    for verb in ("identify", "inspect"):
        found = json.loads(run(verb, path, "--json").stdout)
        found = found["vae"] if verb == "inspect" else found
        assert (found["latent_space"], found["certainty"]) == (space, certainty), (verb, found)
        assert found["correlations"] == dict(verdict.correlations)
    side = compare(str(path), str(path)).a
    assert (side.latent_space if side.certainty != "unknown" else "unknown", side.certainty) == (space, certainty)

    make_store(tmp_path / "store", {(64, 64): 1}, evidence=PROVED_SD1)
    decoded = run("decode", tmp_path / "store", tmp_path / "out", "--vae", path, "--device", "cpu", "--dtype", "fp32")
    if (space, certainty) == ("sd1", "proved"):
        assert decoded.exit_code == 0, decoded.stderr
    else:
        assert decoded.exit_code == 1 and "holds latents of the space sd1 (proved sd1" in decoded.stderr
        assert verdict.saw in decoded.stderr


def test_random_weights_are_told_from_what_their_config_says(made: dict[str, Path]) -> None:
    path = made["random weights with SD 1's config"]
    done = run("identify", path)
    assert "its config disagrees (config.json beside it tells scaling_factor 0.18215)" in done.stderr
    assert "the probe denies it: not that space" in done.stderr
    verdict = VAE.load(path, device="cpu", dtype="fp32").verdict
    assert str(verdict).startswith("declared sd1, but the probe correlates ")
    assert verdict.name == f"vae-{verdict.encoder[:16]}" and verdict.claimed == "sd1"  # type: ignore[index]
    assert max(verdict.correlations.values()) < 0.3


def test_decode_refuses_a_store_of_random_weights_through_the_embedded_vae(
    made: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photo = tmp_path / "photos" / "a.png"
    photo.parent.mkdir()
    Image.effect_noise((80, 72), 60).convert("RGB").save(photo)
    random, store = made["random weights with SD 1's config"], tmp_path / "store"
    common = ("--device", "cpu", "--dtype", "fp32")
    assert run("encode", photo.parent, store, "--size", 64, "--vae", random, "--workers", 0, *common).exit_code == 0
    stored = json.loads((store / "manifest.json").read_bytes())["vae"]
    assert stored["evidence"]["certainty"] == "unknown" and stored["latent_space"].startswith("vae-")
    assert set(stored["evidence"]["correlations"]) == {"sd1", "sdxl"}
    refused = run("decode", store, tmp_path / "out", *common)
    assert refused.exit_code == 1 and not (tmp_path / "out").exists()
    seen = ", ".join(f"{value:.2f} with {space}" for space, value in stored["evidence"]["correlations"].items())
    assert f"the probe correlates {seen}" in refused.stderr and "give --space sd1" in refused.stderr
    assert "neither the space of" in run("decode", store, tmp_path / "out", "--space", "sdxl", *common).stderr
    assert run("decode", store, tmp_path / "out", "--space", "sd1", *common).exit_code == 0
    own = run("decode", store, tmp_path / "own", "--vae", random, *common)
    assert own.exit_code == 0 and "warning" not in own.stderr
    assert sdvae.verify(store).damages == []


def test_no_space_is_told_against_a_proof(made: dict[str, Path], tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", {(64, 64): 1}, evidence=PROVED_SD1)
    of_sdxl = VAE.load(made["TAESD XL"], device="cpu", dtype="fp32")
    for told in (None, "sd1", "sdxl"):
        with pytest.raises(StoreError, match="proved"):
            require_space(store, of_sdxl, told)


def test_an_older_store_tells_no_more_than_its_config_did(tmp_path: Path, made: dict[str, Path]) -> None:
    store = make_store(tmp_path / "store", {(64, 64): 1})
    assert "evidence" not in store.manifest["vae"]
    vae = VAE.load(made["TAESD"], device="cpu", dtype="fp32")
    with pytest.raises(StoreError, match=r"holds latents of the space sd1 \(declared sd1, .* give --space sd1"):
        require_space(store, vae)
    require_space(store, vae, "sd1")


def test_a_correlation_that_rounds_otherwise_is_no_other_vae(tmp_path: Path, made: dict[str, Path]) -> None:
    vae = VAE.load(made["the embedded VAE"], device="cpu", dtype="fp32")
    settings = sdvae.EncodeSettings(sdvae.Preprocess(size_px=64), num_threads=1)
    image = Image.effect_noise((64, 64), 60).convert("RGB")
    sdvae.encode_dataset([image], tmp_path / "store", vae, settings, work=Work(num_workers=0))
    before = (tmp_path / "store" / "manifest.json").read_bytes()
    assert json.loads(before)["vae"]["evidence"]["certainty"] == "proved"
    vae.verdict = replace(vae.verdict, name="vae-x", certainty="unknown", correlations={"sd1": 0.5})  # type: ignore[misc]
    sdvae.encode_dataset([image], tmp_path / "store", vae, settings, work=Work(num_workers=0))
    assert (tmp_path / "store" / "manifest.json").read_bytes() == before
    assert Verdict.from_json(Store.open(tmp_path / "store").manifest["vae"]).space == "sd1"


def test_another_decoder_for_an_encoder_that_no_one_knows_shares_its_space() -> None:
    model = random_model(FAMILIES["small"])
    tuned = {key: value + 0.1 if key.startswith("decoder.") else value for key, value in model.state_dict().items()}
    one, other = (judge(model.config, tensors) for tensors in (model.state_dict(), tuned))
    found = relate(one, other)
    assert one.name == other.name and (found.is_same, found.certainty) == (True, "proved")


def test_files_of_latents_are_decoded_with_a_warning_where_the_vae_is_not_what_it_says(
    made: dict[str, Path], tmp_path: Path
) -> None:
    save_file({"latents": torch.zeros(1, 4, 8, 8)}, tmp_path / "a.safetensors", metadata={"latents": "raw"})
    random = made["random weights with SD 1's config"]
    common = (tmp_path / "a.safetensors", tmp_path / "a.png", "--device", "cpu", "--dtype", "fp32")
    warned = run("decode", *common, "--vae", random)
    assert warned.exit_code == 0 and "scaling_factor 0.18215, but the probe correlates" in warned.stderr
    name = warned.stderr.partition("--space ")[2].split()[0]
    assert "warning" not in run("decode", *common, "--vae", random, "--space", name).stderr
    assert "warning" not in run("decode", *common, "--vae", made["the embedded VAE"]).stderr


def test_the_strongest_evidence_wins_and_the_rest_is_named() -> None:
    weights = load_weights()
    told = [
        Evidence("modelspec", ("sdxl",), "declared", "modelspec"),
        told_by_config(replace(FAMILIES["small"], scaling_factor=0.13025), "its config"),
        Evidence("neighbours", ("flux1",), "declared", "neighbours"),
    ]
    found = judge(weights.config, weights.tensors, told)
    assert [item.kind for item in found.evidence] == ["probe", "config", "neighbours", "modelspec", "shapes"]
    assert (found.space, found.certainty) == ("sd1", "proved")
    assert [item.kind for item in found.contradictions] == ["config", "neighbours", "modelspec"]
    untrained = {key: value for key, value in weights.tensors.items() if key.startswith("decoder.")}
    assert judge(None, untrained, told).space == "sdxl", "a config is stronger than neighbours"


def test_a_taesd_under_another_scale_has_other_raw_latents(made: dict[str, Path], tmp_path: Path) -> None:
    photos = [Image.effect_noise((64, 64), 60).convert("RGB")]
    vae, scaled = (VAE.load(made["TAESD"], device="cpu", dtype="fp32", family=name) for name in ("sd1", "sdxl"))
    assert vae.fingerprint == scaled.fingerprint
    assert (vae.verdict.space, vae.verdict.certainty) == ("sd1", "proved")
    assert scaled.verdict.certainty == "unknown" and scaled.verdict.claimed == "sdxl"
    assert relate(vae.verdict, scaled.verdict).is_same is not True
    settings = sdvae.EncodeSettings(sdvae.Preprocess(size_px=64), num_threads=1)
    sdvae.encode_dataset(photos, tmp_path / "store", vae, settings, work=Work(num_workers=0))
    with pytest.raises(StoreError, match="proved sd1"):
        require_space(Store.open(tmp_path / "store"), scaled)


def test_an_encoder_runs_once_in_a_process(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_SEEN", {})
    ran = []
    encode = probe._encode
    monkeypatch.setattr(probe, "_encode", lambda *arguments: ran.append(1) or encode(*arguments))  # type: ignore[func-returns-value]
    vae = VAE.load(made["the embedded VAE"], device="cpu", dtype="fp32")
    assert ran == [], "a load that needs no answer does not pay for one"
    assert vae.latent_space == vae.in_float32().latent_space == "sd1"
    VAE.load(made["the embedded VAE"], device="cpu", dtype="bf16").latent_space  # noqa: B018
    run("identify", made["the embedded VAE"])
    assert len(ran) == 1


@pytest.mark.slow
def test_two_hundred_steps_of_fine_tuning_keep_the_space(data_dir: Path, tmp_path: Path) -> None:
    path = save_pair(tmp_path / "tuned", *fine_tuned(data_dir, "sd1", 200))
    verdict = VAE.load(path, device="cpu", dtype="fp32").verdict
    assert verdict.space == "sd1", str(verdict)
