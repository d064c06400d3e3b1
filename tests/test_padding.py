"""Convolutions that reflect, or go round: strips, groups and the drop-in against diffusers with `padding_mode` set."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn

import sdvae
from sdvae.config import PADDINGS, Padding, VAEConfig
from sdvae.engine import execute as executing
from sdvae.engine import plan as planning
from sdvae.engine.execute import execute
from sdvae.engine.plan import make_plan
from sdvae.engine.program import Program, compile_program
from sdvae.engine.stages import Axis, Border, Direction, Stage
from sdvae.errors import ConfigError, ShapeError, StoreError
from sdvae.tiny import AutoencoderTiny, TinyConfig
from sdvae.vae import VAE
from sdvae.weights.edit import convert
from sdvae.weights.identity import fingerprint
from sdvae.weights.load import build_model, load_weights, save_folder
from tests.conftest import SMALL
from tests.parity.test_model import diffusers_twin, quiet_model

CPU = torch.device("cpu")
CONFIGS = {
    "all parts": replace(SMALL, mid_block_add_attention=True, use_quant_conv=True, use_post_quant_conv=True),
    "odd widths": replace(SMALL, block_out_channels=(8, 24, 16), layers_per_block=2, attention_levels=(2,)),
}
PADDED: list[Padding] = [padding for padding in PADDINGS if padding != "zeros"]
TORCHS_OWN: list[Padding] = ["reflect", "circular"]
# fp32 rounding; a border that is one row off is a hundred times as far.
TOLERANCE = 1e-5
SIZES = [(2, 2), (3, 5), (9, 4), (5, 9)]  # of latents


@cache
def model_of(padding: Padding, name: str = "all parts") -> sdvae.AutoencoderKL:
    return quiet_model(replace(CONFIGS[name], padding=padding))


@cache
def compiled(padding: Padding, name: str, direction: Direction, dtype: torch.dtype = torch.float32) -> Program:
    model = model_of(padding, name)
    return compile_program(model.config, direction, model.state_dict(), dtype, CPU)


def pad_as_users_do(vae: nn.Module, padding: str) -> None:
    """On every convolution; in one direction only, which torch does not have, by padding the input."""
    sides, others = ((1, 1, 0, 0), (0, 0, 1, 1)) if padding.endswith("x") else ((0, 0, 1, 1), (1, 1, 0, 0))

    def convolve(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(F.pad(F.pad(x, sides, "circular"), others), weight, bias)

    for layer in vae.modules():
        if isinstance(layer, nn.Conv2d):
            if "-" not in padding:
                layer.padding_mode = padding  # type: ignore[assignment]
            elif layer.padding == (1, 1):
                layer._conv_forward = MethodType(convolve, layer)  # type: ignore[assignment]


@cache
def twin_of(padding: Padding, name: str = "all parts") -> Any:
    twin = diffusers_twin(quiet_model(CONFIGS[name]))
    pad_as_users_do(twin, padding)
    return twin


def theirs(padding: Padding, name: str, direction: Direction, images: Tensor) -> Tensor:
    twin = twin_of(padding, name)
    with torch.no_grad():
        return twin.decode(images).sample if direction == "decode" else twin.encode(images).latent_dist.parameters


def inputs(name: str, direction: Direction, height: int, width: int, batch: int = 1) -> Tensor:
    """Latents of this size, or pixels of such latents and a few more, which halving loses."""
    config = CONFIGS[name]
    if direction == "decode":
        return torch.randn(batch, config.latent_channels, height, width)
    side = config.downscale
    return torch.randn(batch, config.in_channels, height * side + 3, width * side + 1)


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.float() - exact).norm() / exact.norm())


def run(program: Program, images: Tensor, num_strips: int | None, *, is_deterministic: bool = True) -> Tensor:
    size = images.shape[2:]
    plan = make_plan(
        program.network, *size, program.dtype.itemsize, num_strips=num_strips, is_deterministic=is_deterministic
    )
    with torch.no_grad():
        return execute(program, plan, images)


@pytest.fixture
def _a_small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of one row of latents: the models here are small, too."""
    monkeypatch.setattr(planning, "STRIP_BYTES", 0)


# --- The networks ---


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("padding", PADDED)
def test_the_reference_is_diffusers(padding: Padding, name: str) -> None:
    model = model_of(padding, name)
    latents, pixels = inputs(name, "decode", 3, 4), inputs(name, "encode", 3, 4)
    with torch.no_grad():
        assert error(model.decode(latents), theirs(padding, name, "decode", latents)) <= TOLERANCE
        assert error(model.encode_moments(pixels), theirs(padding, name, "encode", pixels)) <= TOLERANCE
        assert error(model.decode(latents), model_of("zeros", name).decode(latents)) > 1e-2, "it must show"


@pytest.mark.usefixtures("_a_small_cache")
@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("padding", PADDED)
def test_every_plan_gives_diffusers_and_the_same_bits(padding: Padding, name: str, direction: Direction) -> None:
    program = compiled(padding, name, direction)
    for height, width in SIZES:
        images = inputs(name, direction, height, width)
        whole = run(program, images, 1)
        assert error(whole, theirs(padding, name, direction, images)) <= TOLERANCE
        for num_strips in {2, 4, height}:
            assert run(program, images, num_strips).equal(whole)
        assert error(run(program, images, height, is_deterministic=False), whole) <= TOLERANCE


@pytest.mark.usefixtures("_a_small_cache")
def test_one_row_and_one_column_go_round() -> None:
    for height, width in [(1, 5), (4, 1)]:  # of a single latent, all pixels are alike, and rounding is all there is
        latents = inputs("all parts", "decode", height, width)
        ours = run(compiled("circular", "all parts", "decode"), latents, height)
        assert error(ours, theirs("circular", "all parts", "decode", latents)) <= TOLERANCE


def test_one_row_cannot_be_reflected() -> None:
    vae = VAE(model_of("reflect"), CPU, torch.float32, "reflecting")
    for shape in [(1, 4, 1, 5), (1, 4, 5, 1)]:
        with pytest.raises(ShapeError, match="too small to be padded by reflection"):
            vae.decode(torch.randn(shape))
        with pytest.raises(RuntimeError, match="Padding size should be less"):  # diffusers cannot do it, either
            twin_of("reflect").decode(torch.randn(shape))


def _doubled_rows_reflect_as_others(patch: pytest.MonkeyPatch) -> None:
    border = Stage.border

    def wrong(self: Stage, axis: Axis, size: int) -> Border | None:
        return border(replace(self, kind="conv"), axis, size)

    patch.setattr(Stage, "border", wrong)


def _last_row_read_too_late(patch: pytest.MonkeyPatch) -> None:
    fill = executing._Window._fill

    def late(self: Any, rows: Tensor, side: int) -> None:
        if side == 1 and rows.shape[2]:  # of both paddings that are tried, it is row 0 or the last but one
            self._read_inside(0, 1, self._beyond[1])
        fill(self, rows, side)

    patch.setattr(executing._Window, "_fill", late)


def _zeros_for_ones(patch: pytest.MonkeyPatch) -> None:
    def read(self: Any, start: int, end: int, out: Tensor) -> None:
        out[0, : len(self._image)].copy_(self._image[:, start:end])
        out[0, len(self._image) :].fill_(float(end - start > 1))  # rows beyond the border are read one by one

    patch.setattr(executing._ImageRun, "_read_image", read)


MUTANTS: list[tuple[Callable[[pytest.MonkeyPatch], None], Padding]] = [
    (_doubled_rows_reflect_as_others, "reflect"), (_last_row_read_too_late, "circular"), (_zeros_for_ones, "circular"),
]  # fmt: skip


@pytest.mark.parametrize(("mutate", "padding"), MUTANTS, ids=[mutate.__name__ for mutate, _ in MUTANTS])
def test_a_mutant_is_seen(
    mutate: Callable[[pytest.MonkeyPatch], None], padding: Padding, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, latents = compiled(padding, "all parts", "decode"), inputs("all parts", "decode", 6, 4)
    exact = theirs(padding, "all parts", "decode", latents)
    assert error(run(program, latents, 3, is_deterministic=False), exact) <= TOLERANCE
    mutate(monkeypatch)
    assert error(run(program, latents, 3, is_deterministic=False), exact) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", TORCHS_OWN)
def test_reduced_precision_is_no_worse_than_diffusers(padding: Padding, dtype: torch.dtype) -> None:
    config = VAEConfig(block_out_channels=(32, 32, 64, 64), norm_num_groups=8, layers_per_block=1, padding=padding)
    model = quiet_model(config)
    twin = diffusers_twin(quiet_model(replace(config, padding="zeros"))).to(dtype)
    pad_as_users_do(twin, padding)
    latents = torch.randn(1, 4, 8, 6)
    with torch.no_grad():
        exact, reduced = model.decode(latents), twin.decode(latents.to(dtype)).sample
    program = compile_program(config, "decode", model.state_dict(), dtype, CPU)
    assert error(run(program, latents, 4, is_deterministic=False), exact) <= 1.2 * error(reduced, exact)


# --- A VAE: small images run in groups ---


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("padding", PADDED)
def test_groups_give_diffusers_and_no_batch_or_budget_changes_a_bit(padding: Padding, direction: Direction) -> None:
    vae, name = VAE(model_of(padding), CPU, torch.float32, padding), "all parts"
    images = inputs(name, direction, 5, 3, batch=5)[:, :, :40, :24].clamp(-2, 2)
    call = torch.no_grad()(vae.engine.decode if direction == "decode" else vae.engine.encode_moments)
    plan = vae.engine.plan(direction, *images.shape[2:], num_images=5)  # type: ignore[union-attr]
    assert plan.group > 1
    assert error(call(images), theirs(padding, name, direction, images)) <= TOLERANCE
    for images_at_once in (4, 0):
        with vae.deterministic(images_at_once):
            plan = vae.engine.plan(direction, *images.shape[2:])  # type: ignore[union-attr]
            together = call(images, plan.predict_bytes(5))
            assert torch.cat([call(part) for part in torch.split(images, 2)]).equal(together)
            assert error(together, theirs(padding, name, direction, images)) <= TOLERANCE
    assert f"padding {padding}" in vae.engine.describe()


@pytest.mark.parametrize(
    ("padding", "shifts"), [("circular", (2, 3)), ("circular", (0, 1)), ("circular-x", (0, 3)), ("circular-y", (2, 0))]
)
def test_rolled_latents_decode_to_a_rolled_picture(padding: Padding, shifts: tuple[int, int]) -> None:
    vae, latents = VAE(model_of(padding), CPU, torch.float32, padding), torch.randn(1, 4, 5, 6)
    shifts_px = [8 * shift for shift in shifts]
    picture, rolled = vae.decode(latents), vae.decode(latents.roll(shifts, (2, 3)))
    assert error(rolled, picture.roll(shifts_px, (2, 3))) <= TOLERANCE
    unpadded = VAE(model_of("zeros"), CPU, torch.float32, "zeros")
    rolled = unpadded.decode(latents.roll(shifts, (2, 3)))
    assert error(rolled, unpadded.decode(latents).roll(shifts_px, (2, 3))) > 1e-2, "it must show"


# --- Layers that their owner changes ---


@pytest.fixture
def _no_blocks_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"diffusers' {type(self).__name__} ran")

    monkeypatch.setattr(Encoder, "forward", refuse)
    monkeypatch.setattr(Decoder, "forward", refuse)


def installed() -> Any:
    vae = diffusers_twin(quiet_model(CONFIGS["all parts"])).requires_grad_(False)
    sdvae.install(SimpleNamespace(vae=vae))
    return vae


def test_the_drop_in_pads_as_its_layers_do(request: pytest.FixtureRequest) -> None:
    latents, pixels = inputs("all parts", "decode", 4, 3), inputs("all parts", "encode", 4, 3)
    paddings: list[Padding] = ["circular", "zeros", "reflect", "circular"]  # between calls
    exact = {
        padding: [theirs(padding, "all parts", "decode", latents), theirs(padding, "all parts", "encode", pixels)]
        for padding in paddings
    }
    request.getfixturevalue("_no_blocks_of_diffusers")
    vae = installed()
    for padding in paddings:
        pad_as_users_do(vae, padding)
        found = [vae.decode(latents).sample, vae.encode(pixels).latent_dist.parameters]
        assert vae.engine.describe().startswith("sdvae's engine")
        assert all(error(*pair) <= TOLERANCE for pair in zip(found, exact[padding], strict=True))


def test_a_vae_pads_as_its_layers_do() -> None:
    vae, latents = VAE(quiet_model(CONFIGS["all parts"]), CPU, torch.bfloat16, "live"), torch.randn(1, 4, 4, 3)
    for padding in ("reflect", "zeros"):
        pad_as_users_do(vae.model, padding)
        assert vae.engine.describe().startswith("sdvae's engine")
        for one, tolerance in ((vae, 0.1), (vae.in_float32(), TOLERANCE)):
            assert error(one.decode(latents), theirs(padding, "all parts", "decode", latents)) <= tolerance


def test_what_is_not_known_steps_aside() -> None:
    latents = inputs("all parts", "decode", 4, 3)
    for padding, told in [("replicate", "replicate"), ("circular-x", "_conv_forward of its own")]:
        vae = installed()
        pad_as_users_do(vae, padding)
        ours = vae.decode(latents).sample
        assert vae.engine.describe().startswith("sdvae's reference network") and told in vae.engine.describe()
        sdvae.uninstall(SimpleNamespace(vae=vae))
        assert error(ours, vae.decode(latents).sample) <= TOLERANCE
    vae = installed()
    vae.decoder.conv_in.padding_mode = "circular"
    ours = vae.decode(latents).sample
    assert "because the padding_mode of its convolutions is circular and zeros" in vae.engine.describe()
    sdvae.uninstall(SimpleNamespace(vae=vae))
    assert error(ours, vae.decode(latents).sample) <= TOLERANCE


# --- Files, and what a VAE is known by ---


def test_a_config_carries_the_padding_where_it_is_not_zeros(tmp_path: Path) -> None:
    for padding in PADDINGS:
        config = replace(SMALL, padding=padding)
        told = config.to_diffusers()
        assert told.get("padding", "zeros") == padding and ("padding" in told) == (padding != "zeros")
        assert VAEConfig.from_diffusers(json.loads(json.dumps(told))) == config
    with pytest.raises(ConfigError, match="padding is 'replicate'; choose one of zeros, reflect, circular, circular-x"):
        VAEConfig.from_diffusers(SMALL.to_diffusers() | {"padding": "replicate"})
    with pytest.raises(ConfigError, match="a TAESD is padded with zeros"):
        TinyConfig(padding="circular")


def test_a_folder_keeps_its_padding_and_diffusers_loads_it(tmp_path: Path) -> None:
    vae = VAE(model_of("reflect"), CPU, torch.float32, "reflecting")
    vae.save(tmp_path / "folder")
    again = VAE.load(tmp_path / "folder", "cpu", "fp32")
    assert again.config == vae.config and again.fingerprint == vae.fingerprint
    loaded = diffusers.AutoencoderKL.from_pretrained(tmp_path / "folder")
    pad_as_users_do(loaded, "reflect")
    latents = torch.randn(1, 4, 3, 3)
    with torch.no_grad():
        assert error(vae.decode(latents), loaded.decode(latents).sample) <= TOLERANCE


def test_a_single_file_keeps_its_padding_under_any_names(tmp_path: Path) -> None:
    config = replace(sdvae.VAEConfig.from_family("small"), padding="circular-x")
    model = build_model(load_weights(padding="circular-x"))
    assert model.config == config
    save_folder(tmp_path / "folder", config, model.state_dict())
    for layout in ("ldm", "diffusers"):
        convert(tmp_path / "folder" / "diffusion_pytorch_model.safetensors", tmp_path / f"{layout}.safetensors", layout)
        alone = load_weights(tmp_path / f"{layout}.safetensors", family="small")
        assert alone.config == config
        assert load_weights(tmp_path / f"{layout}.safetensors", "small", "zeros").config.padding == "zeros"
    convert(tmp_path / "ldm.safetensors", tmp_path / "back", family="small")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["padding"] == "circular-x"


def test_a_fingerprint_tells_the_padding_and_the_latent_space_does_not() -> None:
    vaes = [VAE(model_of(padding), CPU, torch.float32, padding) for padding in PADDINGS]
    unnamed = [
        VAE(quiet_model(replace(CONFIGS["all parts"], scaling_factor=0.5, padding=padding)), CPU, torch.float32, "own")
        for padding in PADDINGS
    ]
    assert len({vae.fingerprint for vae in vaes}) == len(PADDINGS)
    assert len({vae.latent_space for vae in vaes}) == len({vae.latent_space for vae in unnamed}) == 1
    assert vaes[0].fingerprint == fingerprint(model_of("zeros").state_dict()), "as before there were others"


def test_a_tiny_vae_is_padded_with_zeros(tmp_path: Path) -> None:
    save_folder(tmp_path, TinyConfig(), AutoencoderTiny(TinyConfig()).state_dict())
    with pytest.raises(ConfigError, match="a TAESD is padded with zeros"):
        load_weights(tmp_path, "sd1", "circular")


def test_a_store_of_another_padding_is_not_continued(tmp_path: Path) -> None:
    photos = [torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy() for _ in range(2)]
    settings = sdvae.EncodeSettings(sdvae.Preprocess(size_px=32))
    sdvae.encode_dataset(photos, tmp_path / "store", VAE(model_of("circular"), CPU, torch.float32, "it"), settings)
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest["vae"]["config"]["padding"] == "circular"
    other = VAE(model_of("zeros"), CPU, torch.float32, "it")
    with pytest.raises(StoreError, match="padding"):
        sdvae.encode_dataset(photos, tmp_path / "store", other, settings)
