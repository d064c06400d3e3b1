import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdvae.config import FAMILIES, VAEConfig
from sdvae.errors import ConfigError, WeightsError
from sdvae.tiny import named_as_diffusers
from sdvae.weights import evidence as evidence_module
from sdvae.weights.evidence import KNOWN_FILES, judge
from sdvae.weights.find import find_file
from sdvae.weights.identify import identify
from sdvae.weights.identity import fingerprint, sign_sketch
from sdvae.weights.keymap import ldm_names
from sdvae.weights.load import load_weights
from tests.conftest import SMALL, random_model

FILES = {"sd1": "taesd", "sdxl": "taesdxl", "sd3": "taesd3", "flux1": "taef1"}


@pytest.fixture(params=FILES)
def space(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def taesd(data_dir: Path, space: str, part: str) -> Path:
    return data_dir / "weights" / "taesd_bf16" / f"{FILES[space]}_{part}.safetensors"


def embedded(folder: Path, config: VAEConfig | None = None) -> Path:
    """The embedded VAE's file, alone or with this config beside it."""
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file(load_weights().tensors, path)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config.to_diffusers()))
    return path


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_taesd_is_known_by_what_it_does_not_by_name_or_dtype(
    data_dir: Path, tmp_path: Path, space: str, dtype: torch.dtype
) -> None:
    wrong_name = FILES["sdxl" if space != "sdxl" else "flux1"]
    path = tmp_path / f"{wrong_name}_encoder.safetensors"
    tensors = {key: value.to(dtype) for key, value in load_file(taesd(data_dir, space, "encoder")).items()}
    save_file(tensors, path)
    found = identify(path)
    assert (found.latent_space, found.certainty) == (space, "proved")
    assert found.network.startswith("TAESD encoder") and found.contradictions == ()
    probe, shapes = found.evidence
    assert (probe.kind, shapes.kind) == ("probe", "shapes") and "scaling factor 1, expected 1" in probe.reason


def test_both_layouts_and_both_containers_of_taesd_are_one(data_dir: Path, tmp_path: Path, space: str) -> None:
    encoder, decoder = (load_file(taesd(data_dir, space, part)) for part in ("encoder", "decoder"))
    whole = tmp_path / "model.safetensors"
    save_file(named_as_diffusers(encoder, decoder), whole)
    pickled = tmp_path / "model.pth"
    torch.save(encoder, pickled)
    assert {identify(whole).latent_space, identify(pickled).latent_space} == {space}
    assert identify(whole).network.startswith("TAESD encoder and decoder")
    assert identify(pickled).fingerprint == identify(taesd(data_dir, space, "encoder")).fingerprint


def test_a_decoder_alone_is_known_by_what_it_shows(data_dir: Path, tmp_path: Path, space: str) -> None:
    path = taesd(data_dir, space, "decoder")
    bare = identify(path)
    assert (bare.latent_space, bare.certainty, bare.contradictions) == (space, "proved", ())
    assert bare.evidence[0].reason.startswith("the image it shows from each space's latents: correlation 0.9")
    lying = tmp_path / "decoder.safetensors"
    other = "stable-diffusion-xl-v1-base" if space == "sd1" else "stable-diffusion-v1"
    save_file(load_file(path), lying, metadata={"modelspec.architecture": other})
    assert (identify(lying).latent_space, identify(lying).certainty) == (space, "proved")


def test_half_a_kl_vae_is_judged_by_itself(tmp_path: Path) -> None:
    tensors = load_weights().tensors
    random = random_model(FAMILIES["small"]).state_dict()
    path = tmp_path / "half.safetensors"
    for side in ("encoder", "decoder"):
        save_file({key: value for key, value in tensors.items() if key.startswith(side)}, path)
        found = identify(path)
        assert (found.latent_space, found.certainty) == ("sd1", "proved")
        assert found.network == f"{side} of a KL-VAE with the shapes of small"
        save_file({key: value for key, value in random.items() if key.startswith(side)}, path)
        assert identify(path).certainty == "unknown"


def test_metadata_that_lie_lose_against_the_probe(data_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    tensors = load_file(taesd(data_dir, "sd1", "encoder"))
    save_file(tensors, path, metadata={"modelspec.architecture": "stable-diffusion-xl-v1-base"})
    found = identify(path)
    assert (found.latent_space, found.certainty) == ("sd1", "proved")
    assert [item.kind for item in found.contradictions] == ["modelspec"]


def test_another_scale_is_another_space(data_dir: Path, tmp_path: Path) -> None:
    tensors = {key: value.float() for key, value in load_file(taesd(data_dir, "sd1", "encoder")).items()}
    tensors["14.weight"] *= 2.0
    tensors["14.bias"] *= 2.0
    path = tmp_path / "encoder.safetensors"
    save_file(tensors, path)
    found = identify(path)
    assert (found.latent_space, found.certainty) == ("unknown", "unknown")
    assert "scaling factor 0.5, expected 1" in found.evidence[0].reason


@pytest.mark.parametrize("name", ["taesana_encoder", "taef2_encoder", "taef2_decoder"])
def test_without_a_reference_for_the_probe_shapes_are_all_there_is(data_dir: Path, name: str) -> None:
    found = identify(data_dir / "weights" / "taesd_other" / f"{name}.pth")
    expected = ("flux2", "declared", ["shapes"]) if name.startswith("taef2") else ("unknown", "unknown", [])
    assert (found.latent_space, found.certainty, [item.kind for item in found.evidence]) == expected
    assert (found.fingerprint is None) == ("sana" in name)


def test_the_embedded_vae_is_of_sd1_whatever_the_layout_or_dtype(tmp_path: Path) -> None:
    weights = load_weights()
    path = embedded(tmp_path)
    found = identify(path)
    assert (found.latent_space, found.certainty) == ("sd1", "proved")
    assert found.fingerprint == fingerprint(weights.tensors)
    names = ldm_names(weights.tensors)
    checkpoint = tmp_path / "sdxl.safetensors"
    tensors = {f"first_stage_model.{names[key]}": value.bfloat16() for key, value in weights.tensors.items()}
    save_file(tensors | {"model.diffusion_model.out.2.bias": torch.zeros(4)}, checkpoint)
    assert identify(checkpoint).latent_space == "sd1"


def test_a_config_of_the_wrong_space_is_a_contradiction(tmp_path: Path) -> None:
    found = identify(embedded(tmp_path, replace(FAMILIES["small"], scaling_factor=0.13025)))
    assert found.latent_space == "sd1"
    assert [(item.kind, item.spaces) for item in found.contradictions] == [("config", ("sdxl",))]


@pytest.mark.parametrize("seed", range(3))
def test_a_random_vae_is_unknown_even_if_its_config_says_otherwise(tmp_path: Path, seed: int) -> None:
    config = VAEConfig.from_family("small")
    for model in (random_model(SMALL, seed), random_model(config, seed)):
        path = tmp_path / "diffusion_pytorch_model.safetensors"
        save_file(model.state_dict(), path)
        (tmp_path / "config.json").write_text(json.dumps(model.config.to_diffusers()))
        found = identify(path)
        assert [item.kind for item in found.evidence] == ["probe", "config", "shapes"]
        assert "sd1" in found.evidence[1].spaces, "the config does say sd1"
        assert (found.latent_space, found.certainty) == ("unknown", "unknown")


def test_a_network_that_overflows_is_unknown(tmp_path: Path) -> None:
    model = random_model(FAMILIES["small"])
    model.encoder.conv_out.weight.data.fill_(float("inf"))
    path = tmp_path / "vae.safetensors"
    save_file(model.state_dict(), path)
    assert identify(path).latent_space == "unknown"


def test_the_shapes_of_full_size_vaes_leave_three_spaces() -> None:
    (shapes,) = judge(FAMILIES["sdxl"], {}).evidence
    assert (shapes.kind, shapes.spaces, shapes.certainty) == ("shapes", ("sd1", "sdxl", "playground"), "unknown")


def test_quant_convolutions_belong_to_the_encoder(tmp_path: Path) -> None:
    """The embedded encoder behind a quant_conv that swaps two channels, before which they were swapped back."""
    weights = load_weights()
    order = torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])
    tensors = {key: value.float() for key, value in weights.tensors.items()}
    for key in ("encoder.conv_out.weight", "encoder.conv_out.bias"):
        tensors[key] = tensors[key][order]
    path = embedded(tmp_path, replace(weights.config, use_quant_conv=True))
    tensors |= {"quant_conv.weight": torch.eye(8)[order].view(8, 8, 1, 1), "quant_conv.bias": torch.zeros(8)}
    save_file(tensors, path)
    found = identify(path)
    assert found.latent_space == "sd1"
    tensors["quant_conv.weight"] = torch.eye(8)[[2, 3, 0, 1, 4, 5, 6, 7]].view(8, 8, 1, 1)
    save_file(tensors, path)
    assert identify(path).latent_space == "unknown"


def test_known_bytes_outweigh_all_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = embedded(tmp_path)
    assert identify(path).latent_space == "sd1"
    monkeypatch.setitem(KNOWN_FILES, hashlib.sha256(path.read_bytes()).hexdigest(), ("a famous file", "sdxl"))
    found = identify(path)
    assert (found.latent_space, found.certainty) == ("sdxl", "proved")
    assert found.evidence[0].reason == "the bytes of a famous file"
    assert [item.kind for item in found.contradictions] == ["probe", "shapes"]
    monkeypatch.setattr(evidence_module, "_MOST_KNOWN_BYTES", path.stat().st_size - 1)
    assert identify(path).latent_space == "sd1"


def test_known_files_are_those_of_the_list(data_dir: Path) -> None:
    published = (data_dir / "weights" / "KNOWN_SD_VAE_SHA256.md").read_text()
    assert len(KNOWN_FILES) == 9
    for digest, (_, space) in KNOWN_FILES.items():
        assert digest in published and space in FAMILIES


@pytest.mark.parametrize("fields", [{"in_channels": 1}, {"latent_channels": 8}, {"block_out_channels": (8, 16)}])
def test_networks_that_the_probe_does_not_fit_are_unknown(tmp_path: Path, fields: dict[str, object]) -> None:
    model = random_model(replace(SMALL, **fields))  # type: ignore[arg-type]
    save_file(model.state_dict(), tmp_path / "vae.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_diffusers()))
    found = identify(tmp_path / "vae.safetensors")
    assert "probe" not in {item.kind for item in found.evidence}
    assert (found.latent_space, found.certainty) == ("unknown", "unknown")


def test_files_without_a_vae_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "unet.safetensors"
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(4)}, path)
    with pytest.raises(WeightsError, match="holds no KL-VAE"):
        identify(path)
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(WeightsError, match="holds no KL-VAE"):
        identify(tmp_path / "empty.safetensors")
    with pytest.raises(WeightsError, match="does not exist"):
        identify(tmp_path / "absent.safetensors")
    broken = embedded(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="repair the file"):
        identify(broken)


def test_the_file_is_found_in_a_folder_and_left_as_it_was(tmp_path: Path) -> None:
    path = embedded(tmp_path, FAMILIES["small"])
    copy = shutil.copy(path, tmp_path / "copy")
    assert identify(find_file(tmp_path)).latent_space == "sd1"
    assert path.read_bytes() == Path(copy).read_bytes()


def test_the_same_weights_in_another_precision_have_the_same_sign_sketch(data_dir: Path, tmp_path: Path) -> None:
    encoder = taesd(data_dir, "sd1", "encoder")
    known, tensors = identify(encoder), named_as_diffusers(load_file(encoder), {})
    rounded = tmp_path / "encoder.safetensors"
    save_file({key: value.to(torch.float8_e4m3fn) for key, value in load_file(encoder).items()}, rounded)
    assert identify(rounded).fingerprint != known.fingerprint
    assert identify(rounded).sign_sketch == known.sign_sketch == sign_sketch(tensors)
    for dtype in (torch.float32, torch.float16):
        assert sign_sketch({key: value.to(dtype) for key, value in tensors.items()}) == known.sign_sketch
    tuned = {key: value + 1e-3 * torch.randn(value.shape) for key, value in tensors.items()}
    assert sign_sketch(tuned) != known.sign_sketch
    assert identify(taesd(data_dir, "sdxl", "encoder")).sign_sketch != known.sign_sketch
