"""Every plan gives what the reference gives, and the same bits as every other plan; and a wrong one would be seen."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdvae.config import VAEConfig
from sdvae.engine import execute as executing
from sdvae.engine import ops
from sdvae.engine import plan as planning
from sdvae.engine.convolutions import PackedConvolution
from sdvae.engine.execute import execute
from sdvae.engine.plan import Plan, make_plan
from sdvae.engine.program import Program, compile_program
from sdvae.engine.stages import Direction
from tests.conftest import SMALL, random_model
from tests.parity.test_model import diffusers_twin, quiet_model

CPU = torch.device("cpu")
CONFIGS = {
    "plain": SMALL,
    "all parts": replace(SMALL, mid_block_add_attention=True, use_quant_conv=True, use_post_quant_conv=True),
    # widths that are no powers of two, that grow by other factors than two, and attention inside of a level
    "odd widths": replace(SMALL, block_out_channels=(8, 24, 16), layers_per_block=2, attention_levels=(2,)),
}
MODELS = {name: quiet_model(config) for name, config in CONFIGS.items()}


def compiled(name: str, direction: Direction, dtype: torch.dtype = torch.float32) -> Program:
    return compile_program(CONFIGS[name], direction, MODELS[name].state_dict(), dtype, CPU)


def reference(name: str, direction: Direction, images: Tensor) -> Tensor:
    with torch.no_grad():
        model = MODELS[name]
        return model.encode_moments(images) if direction == "encode" else model.decode(images)


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.float() - exact).norm() / exact.norm())


@pytest.fixture(autouse=True)
def _a_small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of one row of latents: the models here are small, too."""
    monkeypatch.setattr(planning, "STRIP_BYTES", 0)


def inputs(name: str, direction: Direction, height: int, width: int, batch: int = 1) -> Tensor:
    """Latents of this size, or the pixels of such latents."""
    config = CONFIGS[name]
    if direction == "decode":
        return torch.randn(batch, config.latent_channels, height, width)
    return torch.randn(batch, config.in_channels, height * config.downscale, width * config.downscale)


def run(
    program: Program, images: Tensor, num_strips: int | None = None, *, is_deterministic: bool = True
) -> tuple[Tensor, Plan]:
    element_bytes = program.dtype.itemsize
    height, width = images.shape[2:]
    plan = make_plan(
        program.network, height, width, element_bytes, num_strips=num_strips, is_deterministic=is_deterministic
    )
    with torch.no_grad():
        return execute(program, plan, images), plan


@settings(max_examples=15)
@given(
    name=st.sampled_from(list(CONFIGS)),
    direction=st.sampled_from(["encode", "decode"]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    excess=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    batch=st.sampled_from([1, 3]),
)
def test_every_plan_gives_the_reference_and_the_same_bits(
    name: str, direction: Direction, height: int, width: int, excess: tuple[int, int], batch: int
) -> None:
    images = inputs(name, direction, height, width, batch)
    if direction == "encode":  # sizes that no halving divides: 520x648 has none, 75x101 many
        images = torch.nn.functional.pad(images, (0, excess[1], 0, excess[0]), mode="replicate")
    program = compiled(name, direction)
    whole, plan = run(program, images, 1)
    assert all(plan.num_strips(stage) == 1 for stage in program.network.stages)
    assert error(whole, reference(name, direction, images)) <= 2e-5
    for num_strips in {2, 7, height}:
        parts, plan = run(program, images, num_strips)
        assert {len(level.strips) for level in plan.levels} == {min(num_strips, height)}
        assert parts.equal(whole)
        fast, _ = run(program, images, num_strips, is_deterministic=False)
        assert error(fast, whole) <= 1e-5
    assert run(program, images[-1:], 2)[0].equal(whole[-1:]), "the batch changes no bit"


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_each_stage_runs_in_as_many_strips_as_were_asked_for(direction: Direction) -> None:
    program = compiled("all parts", direction)
    counts: dict[str, int] = {}

    class Counting:
        def __init__(self, name: str, convolution: PackedConvolution) -> None:
            self._name, self._convolution = name, convolution

        def __getattr__(self, name: str) -> Any:
            if name == "write":
                counts[self._name] = counts.get(self._name, 0) + 1
            return getattr(self._convolution, name)

    counting: Any = [
        replace(packed, convolution=packed.convolution and Counting(packed.stage.name, packed.convolution))
        for packed in program.stages
    ]
    _, plan = run(replace(program, stages=tuple(counting)), inputs("all parts", direction, 6, 4), 3)
    for stage in program.network.stages:
        if stage.kind != "attention":
            assert counts[stage.name] == plan.num_strips(stage) == 3


@pytest.mark.parametrize(
    "shape",  # latents of odd sizes, one row, a column; and those of 520x648 and 2048x64
    [(17, 21), (1, 64), (64, 2), *(pytest.param(size, marks=pytest.mark.slow) for size in ((65, 81), (256, 8)))],
)
def test_odd_sizes_decode_alike_in_many_strips(shape: tuple[int, int]) -> None:
    latents = inputs("all parts", "decode", *shape)
    program = compiled("all parts", "decode")
    whole, _ = run(program, latents, 1)
    assert error(whole, reference("all parts", "decode", latents)) <= 2e-5
    assert run(program, latents, 7)[0].equal(whole) and run(program, latents)[0].equal(whole)


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_strips_of_several_rows_are_cut_where_they_change_no_bit(
    direction: Direction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "STRIP_BYTES", 2**16)
    program, images = compiled("odd widths", direction), inputs("odd widths", direction, 40, 12)
    liked, plan = run(program, images)
    assert {len(level.strips) for level in plan.levels} != {40} and max(len(level.strips) for level in plan.levels) >= 4
    for num_strips in (1, 2, 3):
        assert run(program, images, num_strips)[0].equal(liked)
    fast, plan = run(program, images, 40, is_deterministic=False)
    assert plan.num_strips(program.network.stages[0]) == 40
    assert error(fast, liked) <= 1e-5


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plans_give_the_same_bits_whatever_the_threads_and_dtype(threads: int, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        program, latents = compiled("odd widths", "decode", dtype), inputs("odd widths", "decode", 33, 65)
        whole = run(program, latents, 1)[0]
        assert all(run(program, latents, num_strips)[0].equal(whole) for num_strips in (2, 5, 33))
    finally:
        torch.set_num_threads(before)


# --- Mutants: a comparison that could not fail would prove nothing ---


def _statistics_per_strip(patch: pytest.MonkeyPatch) -> None:
    add = ops.Statistics.add

    def forgetful(self: ops.Statistics, rows: Tensor) -> None:
        self.__init__(self._row_block)  # type: ignore[misc]
        add(self, rows)

    patch.setattr(ops.Statistics, "add", forgetful)


def _halo_one_short(patch: pytest.MonkeyPatch) -> None:
    read = executing._Window.read

    def short(self: Any, start: int, end: int) -> Tensor:
        rows = read(self, start, end).clone()
        rows[:, :, 0] = 0
        return rows

    patch.setattr(executing._Window, "read", short)


def _source_overwritten_too_early(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(planning, "_lead", lambda stage, source, target: -source.end)


MUTANTS = [_statistics_per_strip, _halo_one_short, _source_overwritten_too_early]


@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__name__)
def test_a_mutant_is_seen(mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    latents, program = inputs("plain", "decode", 8, 8), compiled("plain", "decode")
    exact = reference("plain", "decode", latents)
    assert error(run(program, latents, 4)[0], exact) <= 2e-5
    mutate(monkeypatch)
    assert error(run(program, latents, 4)[0], exact) > 1e-3


# --- Reduced precision ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_reduced_precision_is_no_worse_than_diffusers(direction: Direction, dtype: torch.dtype) -> None:
    config = VAEConfig(block_out_channels=(32, 32, 64, 64), norm_num_groups=8, layers_per_block=1)
    model = quiet_model(config)
    twin = diffusers_twin(random_model(config))
    twin.load_state_dict(model.state_dict())
    images = torch.randn(2, 4, 12, 10) if direction == "decode" else torch.randn(2, 3, 96, 80)
    with torch.no_grad():
        exact = model.decode(images) if direction == "decode" else model.encode_moments(images)
        twin = twin.to(dtype)
        reduced = images.to(dtype)
        theirs = twin.decode(reduced).sample if direction == "decode" else twin.quant_conv(twin.encoder(reduced))
    program = compile_program(config, direction, model.state_dict(), dtype, CPU)
    ours, plan = run(program, images, 5, is_deterministic=False)
    assert plan.num_strips(program.network.stages[0]) == 5
    assert error(ours, exact) <= 1.2 * error(theirs, exact)


def test_a_cpu_without_bf16_rounds_sums_of_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN refuses bf16 weights before AVX512."""
    monkeypatch.setattr(ops, "_has_bf16", lambda: False)
    latents, program = inputs("all parts", "decode", 5, 3), compiled("all parts", "decode", torch.bfloat16)
    assert {packed.convolution.kernel for packed in program.stages if packed.convolution} == {"torch"}
    whole = run(program, latents, 1)[0]
    assert 1e-4 < error(whole, reference("all parts", "decode", latents)) < 0.05
    assert run(program, latents, 5)[0].equal(whole)
