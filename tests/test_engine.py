"""The engine over a live module: nothing packed is stale, gradients are never lost, budgets are kept or refused."""

import copy
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from sdvae.config import VAEConfig
from sdvae.encoding.tasks import Work
from sdvae.engine import run as running
from sdvae.engine.calibrate import calibrate, calibration_images
from sdvae.engine.execute import Peaks, execute
from sdvae.engine.memory import free_bytes, parse_bytes
from sdvae.engine.plan import make_plan
from sdvae.engine.program import compile_program
from sdvae.engine.run import Engine
from sdvae.engine.stages import Direction
from sdvae.errors import BudgetError, DeviceError
from sdvae.model import AutoencoderKL
from sdvae.reading.decode import DecodeSettings
from sdvae.vae import VAE
from tests.conftest import SMALL, random_model

CPU = torch.device("cpu")


@pytest.fixture
def model() -> AutoencoderKL:
    return random_model(SMALL).requires_grad_(False)


@pytest.fixture
def engine(model: AutoencoderKL) -> Engine:
    return Engine(model, SMALL)


def latents() -> Tensor:
    return torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(1))


def is_close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.dtype == theirs.dtype and float((ours - theirs).norm() / theirs.norm()) < 2e-5


# --- Staleness ---


def _load_state_dict(model: AutoencoderKL) -> None:
    model.load_state_dict(random_model(SMALL, seed=7).state_dict())


def _edit_in_place(model: AutoencoderKL) -> None:
    model.decoder.conv_in.weight.add_(0.1)


def _merge_as_lora_does(model: AutoencoderKL) -> None:
    model.decoder.conv_in.weight.data += 0.1 * torch.randn(16, 4, 3, 3)


def _change_a_bias(model: AutoencoderKL) -> None:
    model.decoder.up_blocks[3].resnets[0].conv1.bias.data[0] += 1.0


def _replace_a_layer(model: AutoencoderKL) -> None:
    model.decoder.conv_out = nn.Conv2d(8, 3, 3, padding=1).requires_grad_(False)


CHANGES = [_load_state_dict, _edit_in_place, _merge_as_lora_does, _change_a_bias, _replace_a_layer]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_weights_shows_at_once(
    change: Callable[[AutoencoderKL], None], model: AutoencoderKL, engine: Engine
) -> None:
    before = engine.decode(latents())
    program = engine.program("decode")
    assert engine.program("decode") is program, "packed once while nothing changes"
    change(model)
    after = engine.decode(latents())
    assert engine.program("decode") is not program
    assert is_close(after, model.decode(latents())) and not is_close(after, before)


def test_another_dtype_is_packed_anew(model: AutoencoderKL, engine: Engine) -> None:
    exact = engine.decode(latents())
    model.to(torch.bfloat16)
    reduced = engine.decode(latents().bfloat16())
    assert engine.program("decode").dtype == reduced.dtype == torch.bfloat16
    assert 1e-4 < float((reduced - exact).norm() / exact.norm()) < 0.1


def test_a_copy_packs_for_itself(model: AutoencoderKL, engine: Engine) -> None:
    expected = engine.decode(latents())
    copied = copy.deepcopy(engine)
    _merge_as_lora_does(model)
    assert copied.decode(latents()).equal(expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_compared_where_they_lie(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    weights = random_model(SMALL).to(dtype).to(memory_format=memory_format).state_dict()
    for name, values in weights.items():
        bits = running._bits(values)
        assert bits.data_ptr() == values.data_ptr() and bits.nbytes == values.nbytes, f"{name} was copied"


def test_weights_that_nobody_else_holds_are_not_looked_at(
    model: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = VAE(model, CPU, torch.bfloat16, "private", is_private=True)
    exact = vae.in_float32()
    before = exact.decode(latents()), vae.decode(latents())
    with monkeypatch.context() as patch:
        patch.setattr(running, "_bit_sums", lambda weights: pytest.fail("the weights were summed"))
        patch.setattr(Engine, "_obstacle_within", lambda self: pytest.fail("the layers were looked at"))
        assert exact.decode(latents()).equal(before[0]) and vae.decode(latents()).equal(before[1])
    assert vae.model is model
    for change in (_merge_as_lora_does, _replace_a_layer):
        change(model)
        after = exact.decode(latents())
        assert is_close(after, model.decode(latents())) and not is_close(after, before[0])
        assert float((vae.decode(latents()) - after).norm() / after.norm()) < 0.1


def test_a_vae_that_was_loaded_is_private_until_its_model_is_asked_for() -> None:
    vae = VAE.load(device="cpu", dtype="fp32")
    assert isinstance(vae.engine, Engine) and not vae.engine._is_watched
    twin = Engine(vae.model, vae.config, CPU, torch.float32)
    assert vae.engine._is_watched and twin._is_watched


# --- Who runs ---


def test_a_budget_is_refused_for_the_true_reason(engine: Engine) -> None:
    with pytest.raises(BudgetError, match=r"because the shape \(1, 5, 6, 5\) is none that it can decode"):
        engine.decode(torch.zeros(1, 5, 6, 5), budget="1GiB")
    with pytest.raises(BudgetError, match=r"because the input is torch.bfloat16 on cpu, and the weights are .*float32"):
        engine.decode(latents().bfloat16(), budget="1GiB")


def test_gradients_are_those_of_the_reference(model: AutoencoderKL, engine: Engine) -> None:
    assert engine.obstacle() is None
    wanted = latents().requires_grad_()
    assert engine.obstacle(wanted) == "gradients are wanted"
    (ours,) = torch.autograd.grad(engine.decode(wanted).square().sum(), wanted)
    (theirs,) = torch.autograd.grad(model.decode(wanted).square().sum(), wanted)
    assert ours.equal(theirs)
    with torch.no_grad():
        assert engine.obstacle(wanted) is None


def test_what_is_more_than_weights_runs_as_it_is(model: AutoencoderKL, engine: Engine) -> None:
    class Louder(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    louder = Louder(8, 3, 3, padding=1).requires_grad_(False)
    model.decoder.conv_out = louder
    assert engine.obstacle() == "decoder.conv_out is a Louder"
    assert is_close(engine.decode(latents()), model.decode(latents()))
    with pytest.raises(BudgetError, match=r"reference network runs, because decoder\.conv_out is a Louder"):
        engine.decode(latents(), budget="1GiB")
    assert engine.describe() == "sdvae's reference network, float32 on cpu, because decoder.conv_out is a Louder"


def test_hooks_on_a_layer_run(model: AutoencoderKL, engine: Engine) -> None:
    handle = model.decoder.conv_in.register_forward_hook(lambda module, args, out: 0 * out)
    silenced = engine.decode(latents())
    assert is_close(silenced, model.decode(latents()))
    handle.remove()
    assert not is_close(engine.decode(latents()), silenced)


# --- Budgets ---


@pytest.mark.parametrize(
    ("amount", "num_bytes"),
    [("6GiB", 6 << 30), ("800MiB", 800 << 20), ("1.5 GB", 1_500_000_000), (2**20, 2**20), ("2.15GB", 2_150_000_000)],
)
def test_an_amount_of_memory_is_read(amount: str | int, num_bytes: int) -> None:
    assert parse_bytes(amount) == num_bytes


@pytest.mark.parametrize("amount", ["", "GiB", "-1GiB", "1 TiBs", "lots", "1e9", -5])
def test_what_is_no_amount_is_refused(amount: str | int) -> None:
    with pytest.raises(BudgetError, match="6GiB"):
        parse_bytes(amount)


@pytest.mark.parametrize(
    ("amount", "says"),
    [
        (8, "8 bytes: did you mean 8GiB?"),
        ("12", "12 bytes: did you mean 12GiB?"),
        (24564, "24564 bytes: did you mean 24564MiB?"),  # as nvidia-smi says it
        (0, "0 is too little memory; write 6GiB, or 800MiB"),
    ],
)
def test_a_forgotten_unit_is_asked_for(amount: str | int, says: str, small_vae: VAE) -> None:
    with pytest.raises(BudgetError) as caught:
        small_vae.decode(torch.zeros(1, 4, 8, 8), budget=amount)
    assert str(caught.value) == says


@pytest.mark.parametrize("settings", [DecodeSettings, partial(Work, 0)])
def test_settings_ask_for_a_forgotten_unit_before_any_work(settings: Callable[..., object]) -> None:
    with pytest.raises(BudgetError, match=r"^8 bytes: did you mean 8GiB\?$"):
        settings(budget_bytes=8)


def test_there_is_free_memory() -> None:
    free = free_bytes(CPU)
    assert free is None or free > 1 << 20


def test_the_smallest_budget_that_is_named_is_kept_and_changes_no_bit(small_vae: VAE) -> None:
    many = torch.randn(2, 4, 40, 32)
    whole = small_vae.decode(many)
    with pytest.raises(BudgetError) as caught:
        small_vae.decode(many, budget="1MiB")
    smallest = caught.value.least_bytes
    assert smallest is not None
    assert float((small_vae.decode(many, budget=smallest) - whole).norm() / whole.norm()) < 1e-5
    assert small_vae.encode(torch.zeros(1, 3, 320, 256), budget="64MiB").mean.shape == (1, 4, 40, 32)
    with pytest.raises(BudgetError):
        small_vae.decode(many, budget=smallest - 1)


def test_deterministic_results_do_not_follow_the_memory_that_is_free(
    small_vae: VAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = torch.randn(2, 4, 64, 64)
    with small_vae.deterministic():
        whole = small_vae.decode(many)
        assert small_vae.decode(many[1:]).equal(whole[1:])
        with pytest.raises(BudgetError) as caught:
            small_vae.decode(many, budget="1MiB")
        smallest = caught.value.least_bytes
        assert smallest is not None
        assert small_vae.decode(many, budget=smallest).equal(whole)
    with monkeypatch.context() as patch:  # outside, less memory means lower strips
        patch.setattr("sdvae.engine.run.free_bytes", lambda device: smallest - 1)
        assert small_vae.engine.plan("decode", 64, 64, 2).predict_bytes(2) < smallest
    assert not small_vae.engine.is_deterministic


# --- Range scaling ---


def loud_model(gain: float) -> AutoencoderKL:
    """Weights under which the stream of every level grows to about `gain`, as SDXL's does."""
    model = random_model(VAEConfig(**(vars(SMALL) | {"mid_block_add_attention": True})))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "conv2" in name or "to_out" in name:
                parameter.mul_(gain)
    return model


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("gain", [6e4, 3e6])
def test_scaled_fp16_holds_what_overflows_unscaled(gain: float, direction: Direction) -> None:
    model = loud_model(gain)
    weights = model.state_dict()
    images = calibration_images(model.config, direction)[:1] * 1.3
    peaks: Peaks = {}

    def run(dtype: torch.dtype, exponents: dict[str, int]) -> Tensor:
        program = compile_program(model.config, direction, weights, dtype, CPU, exponents)
        plan = make_plan(program.network, images.shape[2], images.shape[3], 4)
        return execute(program, plan, images, peaks=peaks)

    exact = run(torch.float32, {})
    assert max(peaks.values()) > gain, "activations beyond fp16's range"
    exponents = dict(calibrate(model.config, direction, weights, CPU))
    assert run(torch.float32, exponents).equal(exact), "powers of two change no bit"
    assert not run(torch.float16, {}).isfinite().all()
    scaled = run(torch.float16, exponents)
    assert scaled.isfinite().all()

    def error(values: Tensor) -> float:
        return float((values - exact).norm() / exact.norm())

    assert error(scaled) <= 1.2 * error(run(torch.bfloat16, {}))


def test_a_quiet_network_is_not_scaled(model: AutoencoderKL) -> None:
    assert calibrate(SMALL, "decode", model.state_dict(), CPU) == {}


def test_weights_that_scaling_would_round_away_are_refused() -> None:
    model = loud_model(1.0)
    with torch.no_grad():  # a stream that only its beginning makes loud: what adds to it is quiet, and would vanish
        model.decoder.conv_in.weight.mul_(1e7)
    with pytest.raises(DeviceError, match="bf16 or fp32"):
        calibrate(model.config, "decode", model.state_dict(), CPU)


def test_fp16_is_scaled_by_itself() -> None:
    model = loud_model(6e4)
    vae = VAE(model, CPU, torch.float16, "loud")
    scaled = vae.decode(torch.randn(1, 4, 8, 8))
    assert scaled.isfinite().all() and vae.engine._float32 is None, "not run again in fp32"
    assert isinstance(vae.engine, Engine) and vae.engine.program("decode").exponents


def test_neither_diffusers_nor_triton_nor_a_compiler_is_needed() -> None:
    program = """
import sys
sys.modules["diffusers"] = sys.modules["triton"] = None
import torch
from sdvae import VAE
vae = VAE.load(device="cpu", dtype="fp32")
print(*vae.decode(vae.encode(torch.zeros(1, 3, 16, 24)).mean).shape)
"""
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["1", "3", "16", "24"]
