import logging
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sdvae import vae as vaes
from sdvae.engine import plan as planning
from sdvae.errors import BudgetError, DeviceError, LatentsError, SdvaeError, ShapeError
from sdvae.vae import VAE
from sdvae.weights import identity
from tests.conftest import SMALL, random_model

CPU = torch.device("cpu")


def noise_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def any_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `encode` take pixels far outside of [-1, 1]: the easiest way to overflow fp16."""
    monkeypatch.setattr(vaes, "_MOST_PIXEL", float("inf"))


def test_encode_and_decode_agree_with_the_reference_module(small_vae: VAE) -> None:
    model = random_model(SMALL)
    pixels = torch.rand(2, 3, 40, 64) * 2 - 1
    with torch.no_grad():
        reference = model.encode(pixels)
        decoded = model.decode(reference.mode())
    posterior = small_vae.encode(pixels)
    for ours, theirs in [(posterior.mean, reference.mean), (posterior.logvar, reference.logvar)]:
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()  # NHWC sums in another order
    calls = small_vae.engine.calls
    assert (small_vae.decode(reference.mode()) - decoded).norm() <= 1e-5 * decoded.norm()
    assert small_vae.engine.calls == calls + 1


def test_encode_refuses_other_sizes_and_names_encode_images(small_vae: VAE) -> None:
    for shape in [(1, 3, 60, 64), (1, 3, 64, 7), (1, 3, 0, 64)]:
        with pytest.raises(ShapeError, match="encode_images"):
            small_vae.encode(torch.zeros(shape))


def test_encode_refuses_what_is_not_float_rgb(small_vae: VAE) -> None:
    for wrong in [torch.zeros(1, 4, 64, 64), torch.zeros(3, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)]:
        with pytest.raises(ShapeError, match="float pixels"):
            small_vae.encode(wrong)


def test_decode_refuses_other_channels_and_values_that_are_not_finite(small_vae: VAE) -> None:
    with pytest.raises(LatentsError, match=r"\(1, 5, 8, 8\)"):
        small_vae.decode(torch.zeros(1, 5, 8, 8))
    with pytest.raises(LatentsError, match="NaN"):
        small_vae.decode(torch.full((1, 4, 8, 8), float("nan")))


@pytest.mark.parametrize("size", [(64, 64), (61, 90), (3, 2), (1, 40)])
def test_images_of_any_size_come_back_in_their_size(small_vae: VAE, size: tuple[int, int]) -> None:
    image = noise_image(*size)
    encoded = small_vae.encode_images([image, Image.fromarray(image)])
    assert encoded.sizes == [size, size]
    assert encoded.latents[0].shape == (1, 4, -(-size[0] // 8), -(-size[1] // 8))
    assert torch.equal(*encoded.latents)
    assert [back.size for back in small_vae.decode_images(encoded)] == [(size[1], size[0])] * 2


def test_images_that_are_not_uint8_rgb_are_refused(small_vae: VAE) -> None:
    with pytest.raises(ShapeError, match="uint8"):
        small_vae.encode_images([np.zeros((8, 8, 3), dtype=np.float32)])  # type: ignore[list-item]


def test_sampling_is_a_function_of_the_seed(small_vae: VAE) -> None:
    first, again, other = (np.stack(small_vae.sample(2, 16, 24, seed)) for seed in (1, 1, 2))
    assert first.shape == (2, 16, 24, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    with pytest.raises(ShapeError, match="multiples of 8"):
        small_vae.sample(1, 20, 24)


@pytest.mark.parametrize("mode", ["lerp", "slerp"])
def test_interpolation_begins_and_ends_with_the_round_trips(small_vae: VAE, mode: str) -> None:
    start, end = noise_image(16, 24, 1), noise_image(16, 24, 2)
    frames = small_vae.interpolate(start, end, steps=4, mode=mode)  # type: ignore[arg-type]
    ends = small_vae.roundtrip([start, end])
    assert len(frames) == 4
    for frame, expected in [(frames[0], ends[0]), (frames[-1], ends[1])]:
        assert (
            np.abs(np.asarray(frame, int) - np.asarray(expected, int)).max() <= 1
        )  # one fp32 rounding at a level's edge
    with pytest.raises(ShapeError, match="resize"):
        small_vae.interpolate(start, noise_image(24, 24))


def test_bf16_is_close_to_fp32_and_says_how_close() -> None:
    vae = VAE(random_model(SMALL), CPU, torch.bfloat16, "bf16")
    exact = vae.in_float32()
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    error = (vae.encode(pixels).mean - exact.encode(pixels).mean).norm() / exact.encode(pixels).mean.norm()
    assert vae.encode(pixels).mean.dtype == torch.float32
    assert 0.0 < error < 0.03  # about ten roundings of 2^-9
    assert 0.0 < vae.latent_error() < 0.03
    assert exact.latent_error() == 0.0
    assert vae.fingerprint == exact.fingerprint
    assert exact.in_float32() is exact


def test_an_overflow_is_computed_again_in_fp32_and_reported(caplog: pytest.LogCaptureFixture, any_pixels: None) -> None:
    model = random_model(SMALL)
    model.encoder.conv_in.weight.data.mul_(2e3)
    vae = VAE(model, CPU, torch.float16, "huge")
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    pixels[1] *= 100  # far beyond what range scaling was calibrated for
    with caplog.at_level(logging.WARNING):
        mean = vae.encode(pixels).mean
    exact = vae.in_float32().encode(pixels).mean
    assert mean.isfinite().all()
    assert (mean[1] - exact[1]).norm() <= 1e-5 * exact[1].norm()
    assert [record.message for record in caplog.records] == [
        "image 1 of the batch overflowed in float16 and runs again in fp32"
    ]


def test_a_deterministic_overflow_has_the_same_bits_whatever_the_batch_and_budget(
    monkeypatch: pytest.MonkeyPatch, any_pixels: None
) -> None:
    monkeypatch.setattr(planning, "STRIP_BYTES", 2**16)  # several strips of several rows at every size here
    vae = VAE(random_model(SMALL), CPU, torch.float16, "huge")
    pixels = torch.rand(3, 3, 128, 128) * 2 - 1
    pixels[1] *= 1e5
    with vae.deterministic():
        exact = vae.engine.in_float32()
        needed = {num: exact.plan("encode", 128, 128, num, budget=sys.maxsize).predict_bytes(num) for num in (1, 3)}
        whole = vae.encode(pixels).mean
        assert vae.encode(pixels[1:2]).mean.equal(whole[1:2])
        assert vae.encode(pixels[1:2], budget=needed[1]).mean.equal(whole[1:2])
        assert vae.encode(pixels, budget=needed[3]).mean.equal(whole)
        with pytest.raises(BudgetError):  # lower strips would keep it, and change bits
            vae.encode(pixels[1:2], budget=needed[1] - 1)
    assert vae.encode(pixels[1:2], budget=needed[1] - 1).mean.isfinite().all()
    assert not exact.is_deterministic


def test_the_twin_in_fp32_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = VAE(random_model(SMALL), CPU, torch.bfloat16, "one")
    monkeypatch.setattr(identity, "fingerprint", lambda tensors: pytest.fail("the weights are hashed again"))
    assert vae.in_float32().engine is vae.in_float32().engine is vae.engine.in_float32()


def test_vae_leaves_the_given_model_alone_and_wants_no_gradients() -> None:
    model = random_model(SMALL)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    vae = VAE(model, CPU, torch.bfloat16, "copy")
    assert not vae.encode(torch.zeros(1, 3, 16, 16, requires_grad=True)).mean.requires_grad
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_unknown_devices_and_dtypes_are_refused() -> None:
    for arguments in [{"device": "tpu"}, {"dtype": "int4"}, {"device": "cpu", "dtype": "fp16"}, {"device": "cuda:99"}]:
        with pytest.raises(DeviceError):
            VAE.load(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vae: vae.encode(np.zeros((1, 3, 8, 8), np.float32)), r"a tensor of pixels, not a numpy\.ndarray"),
        (lambda vae: vae.encode(torch.full((1, 3, 8, 8), 255.0)), r"in \[-1, 1\], these are from 255 to 255"),
        (lambda vae: vae.encode(torch.full((1, 3, 8, 8), float("nan"))), r"these are from nan to nan"),
        (lambda vae: vae.encode_images(Image.new("RGB", (8, 8))), r"write encode_images\(\[image\]\)"),
        (lambda vae: vae.encode_images(["photo.jpg"]), r"a Pillow image or a uint8 array \(H, W, 3\), not a str"),
        (lambda vae: vae.decode(vae.encode(torch.zeros(1, 3, 8, 8))), r"give it posterior\.mode\(\) or \.sample\(\)"),
    ],
)
def test_a_wrong_argument_is_told_the_right_call(call: Callable[[VAE], object], message: str, small_vae: VAE) -> None:
    with pytest.raises(SdvaeError, match=message):
        call(small_vae)


def test_what_is_printed_of_them_is_short(small_vae: VAE) -> None:
    assert repr(small_vae).endswith("float32 on cpu)")
    encoded = small_vae.encode_images([Image.new("RGB", (24, 16))])
    assert repr(encoded) == "Encoded(1 image: 24x16)"
    shown = small_vae._repr_html_()
    assert small_vae.fingerprint in shown and "4 channels at 1/8" in shown
    assert "channel 3" in small_vae.encode(torch.zeros(1, 3, 8, 8))._repr_html_()
    small_vae.name, name = "<b>", small_vae.name
    assert "VAE &lt;b&gt;" in small_vae._repr_html_()
    small_vae.name = name
    assert repr(small_vae.encode(torch.zeros(1, 3, 8, 8))).startswith("DiagonalGaussian((1, 4, 1, 1)")


def vae_of_channels(channels: int) -> VAE:
    config = replace(SMALL, in_channels=channels, out_channels=channels)
    return VAE(random_model(config), CPU, torch.float32, f"{channels} channels")


def test_a_vae_of_one_channel_sees_photos_in_grey() -> None:
    vae, photo = vae_of_channels(1), noise_image(20, 12)
    encoded = vae.encode_images([photo])
    assert torch.equal(vae.encode_images([Image.fromarray(photo)]).latents[0], encoded.latents[0])
    grey = np.asarray(Image.fromarray(photo).convert("L").convert("RGB"))
    of_grey = vae.encode_images([grey]).latents[0]
    assert (of_grey - encoded.latents[0]).norm() <= 0.01 * of_grey.norm()  # rounded to 256 levels
    (image,) = vae.decode_images(encoded)
    levels = np.asarray(image)
    assert levels.shape == (20, 12, 3) and np.array_equal(levels[..., 0], levels[..., 2]) and levels.std() > 1


def test_a_vae_of_four_channels_sees_alpha_and_gives_it_back() -> None:
    vae, levels = vae_of_channels(4), np.dstack([noise_image(16, 8), noise_image(16, 8, 1)[..., :1]])
    encoded = vae.encode_images([Image.fromarray(levels), levels])
    pixels = torch.from_numpy(levels).permute(2, 0, 1)[None].float() / 127.5 - 1.0
    for latents in encoded.latents:
        assert (latents - vae.encode(pixels).mode()).abs().max() < 1e-4
    assert vae.decode_images(encoded)[0].mode == "RGBA"
    opaque = levels.copy()
    opaque[..., 3] = 255
    assert torch.equal(vae.encode_images([levels[..., :3]]).latents[0], vae.encode_images([opaque]).latents[0])
    with pytest.raises(ShapeError, match="takes images of 2 channels, of which photos make none"):
        vae_of_channels(2).encode_images([levels[..., :3]])
