"""The engine on a GPU: what Triton's interpreter cannot show."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdvae.bench.throughput import relative_error, seeded_model
from sdvae.config import FAMILIES, VAEConfig
from sdvae.engine import graphs, ops
from sdvae.engine.execute import execute
from sdvae.engine.kernels import Norm
from sdvae.engine.plan import Plan, make_plan
from sdvae.engine.program import choose_kernels, compile_program
from sdvae.engine.stages import Direction
from sdvae.pixels import from_levels, to_images, to_pixels
from sdvae.staging import download, upload
from sdvae.vae import VAE
from tests.parity.test_model import diffusers_twin, quiet_model
from tests.test_engine import loud_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

GPU = torch.device("cuda")
# SD's network, half as wide: widths that its kernels have, at a quarter of the time.
CONFIG = VAEConfig(block_out_channels=(64, 128, 256, 256))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(direction: Direction, height: int, width: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if direction == "decode":
        return torch.randn(batch, 4, height, width, generator=generator)
    return torch.rand(batch, 3, 8 * height, 8 * width, generator=generator) * 2 - 1


def run(direction: Direction, dtype: torch.dtype, images: Tensor, **arguments: Any) -> Tensor:
    program = compile_program(CONFIG, direction, quiet_model(CONFIG).state_dict(), dtype, GPU)
    plan = make_plan(program.network, *images.shape[2:], dtype.itemsize, is_gpu=True, **arguments)
    with torch.no_grad():
        return execute(program, plan, images).cpu()


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_engine_is_no_worse_than_diffusers(direction: Direction, dtype: torch.dtype) -> None:
    """fp32 within 2e-5 of the reference; half precision within 1.2 times the error that diffusers makes with it."""
    model, images = quiet_model(CONFIG), inputs(direction, 24, 18, batch=2)
    twin = diffusers_twin(model).to(GPU, dtype)
    with torch.no_grad():
        exact = model.decode(images) if direction == "decode" else model.encode_moments(images)
        reduced = images.to(GPU, dtype)
        theirs = twin.decode(reduced).sample if direction == "decode" else twin.quant_conv(twin.encoder(reduced))
    vae = VAE(quiet_model(CONFIG), GPU, dtype, "")
    posterior = None if direction == "decode" else vae.encode(images.to(GPU))
    ours = vae.decode(images.to(GPU)) if posterior is None else torch.cat([posterior.mean, posterior.logvar], 1)
    allowed = 2e-5 if dtype == torch.float32 else 1.2 * relative_error(theirs, exact)
    assert relative_error(ours, exact) <= allowed


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plans_agree(direction: Direction, dtype: torch.dtype) -> None:
    images = inputs(direction, 40, 33)
    whole = run(direction, dtype, images, num_strips=1, is_deterministic=True)
    for num_strips in (2, 7, 40):
        assert run(direction, dtype, images, num_strips=num_strips, is_deterministic=True).equal(whole)
    if dtype == torch.float32:
        assert relative_error(run(direction, dtype, images, num_strips=40), whole) <= 1e-5


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_an_arena_on_the_host_changes_no_bit(direction: Direction) -> None:
    images = inputs(direction, 64, 64)
    near = run(direction, torch.float16, images, is_deterministic=True)
    far = run(direction, torch.float16, images, is_deterministic=True, budget_bytes=150 * 10**6, host_bytes=2**34)
    assert far.equal(near)


def test_torch_and_triton_agree() -> None:
    triton_ops = choose_kernels(GPU)
    assert triton_ops is not ops, "Triton is not installed"
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        made, old = (torch.randn(1, 256, 24, 96, device=GPU).to(dtype) for _ in range(2))
        made, old = (one.contiguous(memory_format=torch.channels_last) for one in (made, old))
        bias = torch.randn(256, device=GPU)
        norm = Norm(torch.randn(256, device=GPU), bias, 1e-6, 32)
        results = []
        for kernels in (ops, triton_ops):
            target, statistics = old.clone(), kernels.Statistics(8)
            kernels.write(made, bias, target, adds=True, statistics=statistics)
            mean, variance = statistics.merge(32)
            out = torch.empty_like(target)
            kernels.normalise(target, out, norm, mean, variance, has_silu=True)
            up = torch.zeros(1, 128, 48, 190, device=GPU, dtype=dtype).contiguous(memory_format=torch.channels_last)
            kernels.write_upsampled(made, old, bias[:128], up, statistics=None)
            tokens = torch.linspace(-1, 1, 300 * 512, device=GPU).view(300, 512).sin().to(dtype)
            results.append((target, mean, variance, out, up, kernels.attend(tokens[:70] / 512**0.5, tokens)))
        for theirs, ours in zip(*results, strict=True):
            assert relative_error(ours, theirs.float().cpu()) <= tolerance


def test_repeated_runs_are_replayed_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    replays: list[object] = []
    replay = graphs.ImageGraph.replay

    def counting(self: Any, image: Tensor, out: Tensor) -> None:
        replays.append(self)
        replay(self, image, out)

    monkeypatch.setattr(graphs.ImageGraph, "replay", counting)
    vae = VAE(quiet_model(CONFIG), GPU, torch.float16, "")
    latents = inputs("decode", 32, 32, batch=3).to(GPU)
    with vae.deterministic():
        first = vae.decode(latents)
        assert replays == []
        assert all(vae.decode(latents).equal(first) for _ in range(3))
        assert len(replays) == 9 and len(set(replays)) == 1
        assert vae.decode(latents[1:2]).equal(first[1:2]), "nor does the batch change a bit"


def test_changed_weights_are_seen_by_a_replay() -> None:
    vae = VAE(quiet_model(CONFIG), GPU, torch.float16, "")
    latents = inputs("decode", 16, 16).to(GPU)
    before = [vae.decode(latents) for _ in range(3)][-1]
    with torch.no_grad():
        next(vae.model.decoder.parameters()).data += 0.1
    after = vae.decode(latents)
    assert not after.equal(before)
    assert relative_error(after, VAE(vae.model, GPU, torch.float32, "").decode(latents).cpu()) < 0.05


@pytest.mark.parametrize("gain", [6e4, 3e6])
def test_scaled_fp16_holds_what_overflows(gain: float) -> None:
    """SDXL's kind of weights: activations beyond 65504, and beyond 2.7 million."""
    model, latents = loud_model(gain), inputs("decode", 24, 24)
    with torch.no_grad():
        exact = model.decode(latents)
    errors = {dtype: relative_error(VAE(model, GPU, dtype, "").decode(latents.to(GPU)), exact) for dtype in DTYPES}
    assert errors[torch.float16] <= 1.2 * errors[torch.bfloat16]


@pytest.mark.parametrize("size", [512, 1024])
def test_the_peak_is_the_predicted_one(size: int) -> None:
    """Of reserved memory, in SD's own size: within 10%."""
    from sdvae.bench.peak import measure_peak

    vae = VAE(seeded_model(FAMILIES["sd1"]), GPU, torch.float16, "")
    vae.decode(torch.zeros(1, 4, 8, 8))  # weights are packed now
    latents = torch.randn(1, 4, size // 8, size // 8, device=GPU)
    engine: Any = vae.engine
    plan: Plan = engine.plan("decode", size // 8, size // 8, budget="8GiB")
    _, peak = measure_peak(lambda: vae.decode(latents, "8GiB"), GPU)
    assert peak == pytest.approx(plan.predict_bytes() - latents.nbytes, rel=0.10)


def test_images_are_staged_without_a_difference() -> None:
    batches = [np.random.default_rng(number).integers(0, 256, (3, 40, 56, 3), np.uint8) for number in range(5)]
    pixels = list(upload(batches, GPU))
    assert all(torch.equal(one.cpu(), to_pixels(batch)) for one, batch in zip(pixels, batches, strict=True))
    assert torch.equal(from_levels(torch.from_numpy(batches[0]).to(GPU)).cpu(), to_pixels(batches[0]))
    for images, batch, one in zip(download(pixels), batches, pixels, strict=True):
        assert np.array_equal(images, batch) and np.array_equal(to_images(one), batch)
