"""VAEs of other shapes against diffusers' classes: FLUX.2 with both decoders, wider decoders, CogView4, Playground."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdvae.config import FAMILIES, VAEConfig
from sdvae.encoding.encode import encode_dataset
from sdvae.encoding.manifest import EncodeSettings
from sdvae.encoding.resize import apply
from sdvae.encoding.tasks import Work
from sdvae.errors import ConfigError, ShapeError, StoreError, WeightsError
from sdvae.images.write import encode_image
from sdvae.model import AutoencoderKL
from sdvae.reading.dataset import LatentDataset
from sdvae.reading.decode import decode_dataset
from sdvae.store.geometry import Preprocess, plan_geometry
from sdvae.store.store import Store
from sdvae.vae import VAE
from sdvae.weights.edit import convert
from sdvae.weights.identify import identify
from sdvae.weights.identity import fingerprint
from sdvae.weights.load import load_weights
from tests.conftest import random_model
from tests.parity.test_model import FP32_TOLERANCE, errors, relative_error, seeded_latents, seeded_pixels
from tests.test_keymap import SHAPES, assert_equal, ldm_state_dict, narrow, to_diffusers

NAMES = ("flux2", "flux2 small decoder", "asymmetric", "cogview4", "playground")
FLUX2 = ("flux2", "flux2 small decoder")
# Two levels, every kind of block, 4 channels of raw and 16 of scaled latents.
TINY_FLUX2 = VAEConfig(
    block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=1.0, latents_patch=2,
    batch_norm_eps=0.01, decoder_block_out_channels=(8, 8), sample_size=16,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def twin_of(model: AutoencoderKL) -> Any:
    """diffusers' module with the very same tensors; of what we have it may lack nothing."""
    mapping = model.config.to_diffusers()
    twin: Any = getattr(diffusers, mapping["_class_name"]).from_config(mapping)
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all("condition_encoder" in name for name in missing)
    return twin.eval()


def tiny_flux2(seed: int = 0) -> VAE:
    return VAE(random_model(TINY_FLUX2, seed), torch.device("cpu"), torch.float32, "tiny FLUX.2")


@pytest.mark.parametrize("name", NAMES)
def test_outputs_equal_diffusers(name: str) -> None:
    model = random_model(narrow(SHAPES[name]))
    twin = twin_of(model)
    for size in ((48, 64), (41, 57)):
        found = errors(model, twin, seeded_pixels(*size, batch=1))
        assert max(found.values()) <= FP32_TOLERANCE, found
    pixels = seeded_pixels(48, 64)
    vae = VAE(model, torch.device("cpu"), torch.float32, name)
    latents = seeded_latents(pixels, model.config)
    with torch.inference_mode():
        theirs = twin.encode(pixels).latent_dist.mean, twin.decode(latents).sample
    assert relative_error(vae.encode(pixels).mean, theirs[0]) <= FP32_TOLERANCE
    assert relative_error(vae.decode(latents), theirs[1]) <= FP32_TOLERANCE
    assert vae.engine.calls == 2 and "sdvae's engine" in vae.engine.describe()


def test_a_decoder_of_other_widths_runs_in_strips() -> None:
    model = random_model(narrow(SHAPES["flux2 small decoder"]))
    vae = VAE(model, torch.device("cpu"), torch.float32, "small decoder")
    latents = torch.randn(1, 32, 24, 8)
    with torch.inference_mode():
        expected = twin_of(model).decode(latents).sample
    plan = vae.engine.plan("decode", 24, 8, budget="1.6MiB")  # type: ignore[union-attr]
    assert max(map(plan.num_strips, plan.network.stages)) > 1
    assert relative_error(vae.decode(latents, "1.6MiB"), expected) <= FP32_TOLERANCE


def test_a_mask_that_nobody_gives_changes_nothing() -> None:
    """What AsymmetricAutoencoderKL has beside a KL-VAE is read only where there are an image and a mask."""
    model = random_model(narrow(SHAPES["asymmetric"]))
    twin, latents = twin_of(model), torch.randn(1, 4, 4, 4)
    with torch.inference_mode():
        plain = twin.decode(latents).sample
        for parameter in twin.decoder.condition_encoder.parameters():
            parameter.fill_(torch.nan)
        assert torch.equal(twin.decode(latents).sample, plain)


# --- FLUX.2's latents ---


def flux2_scaled(twin: Any, latents: Tensor) -> Tensor:
    """Flux2Pipeline._encode_vae_image, after vae.encode."""
    latents = Flux2Pipeline._patchify_latents(latents)
    mean = twin.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(twin.bn.running_var.view(1, -1, 1, 1) + twin.config.batch_norm_eps)
    return (latents - mean) / std


def flux2_raw(twin: Any, latents: Tensor) -> Tensor:
    """Flux2Pipeline.__call__, before vae.decode."""
    std = torch.sqrt(twin.bn.running_var.view(1, -1, 1, 1) + twin.config.batch_norm_eps)
    return Flux2Pipeline._unpatchify_latents(latents * std + twin.bn.running_mean.view(1, -1, 1, 1))


def test_scale_and_unscale_are_those_of_the_pipeline() -> None:
    vae = tiny_flux2()
    twin, raw = twin_of(vae.model), 5.0 * torch.randn(2, 4, 6, 8)  # type: ignore[arg-type]
    scaled = vae.scale(raw)
    assert scaled.shape == (2, 16, 3, 4)
    assert relative_error(scaled, flux2_scaled(twin, raw)) <= 1e-6
    assert relative_error(vae.unscale(scaled), flux2_raw(twin, scaled)) <= 1e-6
    assert relative_error(vae.unscale(scaled), raw) <= 1e-6
    # as BatchNorm itself would have it, which black-forest-labs' encode calls
    assert relative_error(scaled, twin.bn(Flux2Pipeline._patchify_latents(raw))) <= 1e-6


def test_pictures_drawn_from_the_prior_have_whole_patches() -> None:
    vae = tiny_flux2()
    assert vae.sample(1, 8, 12)[0].size == (12, 8)
    with pytest.raises(ShapeError, match="both sides must be multiples of 4"):
        vae.sample(1, 8, 10)


# --- FLUX.2's files ---


def test_folders_go_both_ways(tmp_path: Path) -> None:
    vae = tiny_flux2()
    vae.save(tmp_path / "ours")
    theirs = diffusers.AutoencoderKLFlux2.from_pretrained(tmp_path / "ours")
    assert_equal(dict(theirs.state_dict()), dict(vae.model.state_dict()))
    assert theirs.config.batch_norm_eps == 0.01 and theirs.config.patch_size == [2, 2]
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = VAE.load(tmp_path / folder, device="cpu", dtype="fp32")
        assert (again.fingerprint, again.config) == (vae.fingerprint, vae.config)
    halved = {key: value.bfloat16() for key, value in theirs.state_dict().items() if key != "bn.num_batches_tracked"}
    save_file(halved, tmp_path / "theirs" / "diffusion_pytorch_model.safetensors")
    again = VAE.load(tmp_path / "theirs", device="cpu", dtype="fp32")
    assert again.config.latent_scaling.is_close(vae.config.latent_scaling)
    assert again.model.state_dict()["bn.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize("name", FLUX2)
def test_the_layout_of_black_forest_labs_goes_there_and_back(name: str, tmp_path: Path) -> None:
    config = narrow(SHAPES[name])
    theirs = ldm_state_dict(config)
    assert {"encoder.quant_conv.weight", "decoder.post_quant_conv.bias", "bn.running_var"} < theirs.keys()
    save_file(theirs, tmp_path / "ae.safetensors")
    converted = convert(tmp_path / "ae.safetensors", tmp_path / "ours.safetensors", "diffusers")
    assert converted.layout == "diffusers"
    assert_equal(load_file(tmp_path / "ours.safetensors"), to_diffusers(theirs))
    convert(tmp_path / "ours.safetensors", tmp_path / "again.safetensors", "ldm")
    assert_equal(load_file(tmp_path / "again.safetensors"), theirs)
    convert(tmp_path / "ae.safetensors", tmp_path / "half.safetensors", dtype=torch.float16)
    halved = load_file(tmp_path / "half.safetensors")
    assert halved["bn.running_var"].dtype == torch.float16 and halved["bn.num_batches_tracked"].item() == 1000


@pytest.mark.parametrize("name", FLUX2)
def test_a_file_without_a_config_is_known_by_its_shapes(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A quarter of the channels, of which 32 groups can still be told."""
    config = SHAPES[name]
    wide = replace(config, block_out_channels=(32, 64, 128, 128), decoder_block_out_channels=None)
    if config.decoder_block_out_channels:
        wide = replace(wide, decoder_block_out_channels=(32, 64, 96, 96))
    tensors = ldm_state_dict(wide)
    save_file(tensors, tmp_path / "ae.safetensors")
    weights = load_weights(tmp_path / "ae.safetensors")
    assert caplog.records == []
    assert weights.config.latent_scaling.is_close(config.latent_scaling)
    rounded = replace(weights.config, latents_mean=config.latents_mean, latents_std=config.latents_std)
    assert rounded == wide
    assert VAE.load(tmp_path / "ae.safetensors", device="cpu", dtype="fp32").latent_space == "flux2"
    tensors["bn.running_var"] *= 2.0
    save_file(tensors, tmp_path / "ae.safetensors")
    assert VAE.load(tmp_path / "ae.safetensors", device="cpu", dtype="fp32").latent_space.startswith("vae-")
    del tensors["bn.running_var"]
    save_file(tensors, tmp_path / "ae.safetensors")
    with pytest.raises(WeightsError, match=r"1 missing: bn\.running_var"):
        load_weights(tmp_path / "ae.safetensors")


def test_the_counter_of_training_steps_is_no_part_of_the_fingerprint() -> None:
    tensors = dict(tiny_flux2().model.state_dict())
    later = tensors | {"bn.num_batches_tracked": torch.tensor(7)}
    assert fingerprint(later) == fingerprint(tensors) != fingerprint(tensors | {"bn.running_mean": torch.zeros(16)})


def test_a_mask_encoder_is_left_out_and_its_folder_cannot_be_written(tmp_path: Path) -> None:
    model = random_model(narrow(SHAPES["asymmetric"]))
    twin = twin_of(model)
    twin.save_pretrained(tmp_path / "theirs")
    vae = VAE.load(tmp_path / "theirs", device="cpu", dtype="fp32")
    assert (vae.config, vae.fingerprint) == (model.config, fingerprint(model.state_dict()))
    with pytest.raises(ConfigError, match="mask encoder, which sdvae leaves out; keep its original folder"):
        vae.save(tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


# --- FLUX.2's stores ---


def photos(folder: Path, height: int, width: int) -> Path:
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(3):
        levels = np.clip(128 + 40 * random.standard_normal((height, width, 3)).cumsum(1) / 4, 0, 255)
        (folder / f"{number}.png").write_bytes(encode_image(levels.astype(np.uint8), "png"))
    return folder


def test_a_store_gives_patches_to_train_on_and_pictures_back(tmp_path: Path) -> None:
    vae = tiny_flux2()
    source = photos(tmp_path / "photos", 18, 27)
    settings = EncodeSettings(Preprocess(size_px=None, crop="none"), store_dtype="fp32")
    encode_dataset(source, tmp_path / "store", vae, settings)
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest["latent_scaling"]["latents_patch"] == 2
    assert manifest["vae"]["config"]["_class_name"] == "AutoencoderKLFlux2"
    dataset = LatentDataset(tmp_path / "store", sample=False, expect_vae=vae)
    example = dataset[0]
    assert example["latents"].shape == (16, 5, 7), "padded to whole patches: 20 x 28 px"
    assert dataset[[0, 1]]["latents"].shape == (2, 16, 5, 7)
    (shard,) = dataset.store.shards()
    raw = torch.from_numpy(shard.moments()[0][:1].copy())
    assert relative_error(example["latents"][None], flux2_scaled(twin_of(vae.model), raw)) <= 1e-6  # type: ignore[arg-type]
    report = decode_dataset(tmp_path / "store", tmp_path / "out", vae)
    assert report.num_written == 3
    assert diffusers.utils.load_image(str(tmp_path / "out" / "0.png")).size == (27, 18)
    with pytest.raises(StoreError, match="holds latents of the space"):
        decode_dataset(tmp_path / "store", tmp_path / "other", tiny_flux2(seed=1))


def test_a_size_without_whole_patches_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", 8, 8)
    with pytest.raises(ConfigError, match="18 pixels is no multiple of 4"):
        encode_dataset(source, tmp_path / "store", tiny_flux2(), EncodeSettings(Preprocess(size_px=18)))


def test_photos_are_encoded_in_grey_for_one_channel(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", 8, 12)
    settings = EncodeSettings(Preprocess(size_px=None, crop="none"), store_dtype="fp32")
    config = replace(TINY_FLUX2, latents_patch=1, in_channels=1, out_channels=1)
    vae = VAE(random_model(config), torch.device("cpu"), torch.float32, "grey")
    encode_dataset(source, tmp_path / "store", vae, settings)
    stored = LatentDataset(tmp_path / "store", sample=False)[0]["latents"]
    (alone,) = vae.encode_images([diffusers.utils.load_image(str(source / "0.png"))]).latents
    assert (stored - vae.scale(alone)[0]).abs().max() < 1e-5
    config = replace(config, in_channels=5)
    vae = VAE(random_model(config), torch.device("cpu"), torch.float32, "five")
    with pytest.raises(ConfigError, match="five takes images of 5 channels; photos have 3, 1 as grey, or 4 with"):
        encode_dataset(source, tmp_path / "other", vae, settings)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_photos_keep_their_alpha_for_four_channels(tmp_path: Path, num_workers: int) -> None:
    source = photos(tmp_path / "photos", 8, 12)
    levels = np.random.default_rng(1).integers(0, 256, (8, 12, 4), np.uint8)
    Image.fromarray(levels).save(source / "clear.png")
    config = replace(TINY_FLUX2, latents_patch=1, in_channels=4, out_channels=4)
    vae = VAE(random_model(config), torch.device("cpu"), torch.float32, "with alpha")
    settings = EncodeSettings(Preprocess(size_px=None, crop="none"), store_dtype="fp32")
    encode_dataset(source, tmp_path / "store", vae, settings, work=Work(num_workers=num_workers))
    dataset = LatentDataset(tmp_path / "store", sample=False)
    for record in dataset:
        with Image.open(source / record["key"]) as image:
            (alone,) = vae.encode_images([image]).latents
        assert (record["latents"] - vae.scale(alone)[0]).abs().max() < 1e-5, record["key"]
    assert Store.open(tmp_path / "store").manifest["preprocess"]["background"] is None
    decode_dataset(tmp_path / "store", tmp_path / "out", vae)
    with Image.open(tmp_path / "out" / "clear.png") as decoded:
        assert decoded.mode == "RGBA"
    assert encode_dataset(source, tmp_path / "store", vae, settings).num_written == len(dataset), "it goes on"


def test_hidden_colours_do_not_bleed_into_a_smaller_photo() -> None:
    image = np.zeros((16, 16, 4), np.uint8)
    image[:, 8:] = 0, 255, 0, 0  # a green that nobody sees
    image[:, :8] = 255, 0, 0, 255
    settings = Preprocess(size_px=5, crop="none", background=None)
    small = apply(image, plan_geometry(16, 16, settings, 1))
    assert small.shape == (5, 5, 4) and small[small[..., 3] > 8, 1].max() <= 16


def test_identify_names_flux2_by_its_shapes_and_its_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "flux2", narrow(FAMILIES["flux2"]))
    tensors = ldm_state_dict(FAMILIES["flux2"])
    save_file(tensors, tmp_path / "ae.safetensors")
    found = identify(tmp_path / "ae.safetensors")
    assert (found.latent_space, found.certainty, found.contradictions) == ("flux2", "declared", ())
    assert [item.kind for item in found.evidence] == ["config", "shapes"]
    tensors["bn.running_mean"] += 1.0
    save_file(tensors, tmp_path / "ae.safetensors")
    found = identify(tmp_path / "ae.safetensors")
    assert found.latent_space == "unknown" and "statistics of its own" in found.evidence[0].reason
