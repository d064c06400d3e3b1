"""Groups of whole images: any batch, order and budget gives the bits of deterministic mode, and strips agree."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdvae.amounts import memory_text
from sdvae.config import VAEConfig
from sdvae.engine import groups as grouping
from sdvae.engine import ops
from sdvae.engine import plan as planning
from sdvae.engine.execute import execute
from sdvae.engine.groups import execute_groups
from sdvae.engine.parallel import run_apart, torch_threads
from sdvae.engine.plan import IMAGES_AT_ONCE, make_plan
from sdvae.engine.program import Program, compile_program
from sdvae.engine.stages import Direction, build_network
from sdvae.engine.tiny_run import TinyEngine
from sdvae.errors import BudgetError
from sdvae.tiny import AutoencoderTiny, TinyConfig
from sdvae.vae import VAE
from tests.conftest import SMALL
from tests.parity.test_model import quiet_model

CPU = torch.device("cpu")
CONFIGS = {
    "plain": SMALL,
    "all parts": replace(SMALL, mid_block_add_attention=True, use_quant_conv=True, use_post_quant_conv=True),
    "odd widths": replace(SMALL, block_out_channels=(8, 24, 16), layers_per_block=2, attention_levels=(2,)),
}
MODELS = {name: quiet_model(config) for name, config in CONFIGS.items()}
VAES = {name: VAE(model, CPU, torch.float32, name) for name, model in MODELS.items()}


def inputs(config: VAEConfig, direction: Direction, height: int, width: int, num_images: int) -> Tensor:
    """Images of different brightness and contrast: statistics that are shared show."""
    generator = torch.Generator().manual_seed(height + 31 * width)
    if direction == "decode":
        images = torch.randn(num_images, config.latent_channels, height, width, generator=generator)
    else:
        side = config.downscale
        images = torch.rand(num_images, config.in_channels, height * side, width * side, generator=generator) * 2 - 1
    return images * torch.linspace(0.3, 1.0, num_images)[:, None, None, None]


def run(vae: VAE, direction: Direction, images: Tensor, budget: str | None = None) -> Tensor:
    return vae.decode(images, budget) if direction == "decode" else vae.encode(images, budget).mean


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.float() - exact).norm() / exact.norm())


def compiled(name: str, direction: Direction, dtype: torch.dtype = torch.float32) -> Program:
    return compile_program(CONFIGS[name], direction, MODELS[name].state_dict(), dtype, CPU)


@settings(max_examples=15)
@given(
    name=st.sampled_from(list(CONFIGS)),
    direction=st.sampled_from(["encode", "decode"]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    images_at_once=st.integers(1, 5),
    order=st.permutations(range(7)),
    batch_rows=st.integers(1, 7),
    is_tight=st.booleans(),
)
def test_any_batch_order_and_budget_gives_the_same_bits(
    name: str, direction: Direction, height: int, width: int, images_at_once: int, order: list[int], batch_rows: int,
    is_tight: bool,
) -> None:  # fmt: skip
    vae, images = VAES[name], inputs(CONFIGS[name], direction, height, width, 7)
    with vae.deterministic(images_at_once):
        plan = vae.engine.plan(direction, *images.shape[2:])  # type: ignore[union-attr]
        assert plan.group == images_at_once and plan.is_filled  # the tests run on one thread
        expected = torch.cat([run(vae, direction, image[None]) for image in images])
        parts = torch.split(images[order], batch_rows)
        budgets = [f"{plan.predict_bytes(len(part))}B" if is_tight else None for part in parts]
        found = [run(vae, direction, part, budget) for part, budget in zip(parts, budgets, strict=True)]
        assert torch.cat(found).equal(expected[order])
    together = run(vae, direction, images)
    assert error(together, expected) <= 1e-5
    with vae.deterministic(0):
        assert vae.engine.plan(direction, *images.shape[2:]).group == 0  # type: ignore[union-attr]
        assert error(run(vae, direction, images), expected) <= 1e-5
    with torch.no_grad():
        model = MODELS[name]
        exact = model.encode(images).mean if direction == "encode" else model.decode(images)
    assert error(together, exact) <= 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_an_image_has_the_same_bits_at_each_place_of_a_group(direction: Direction, dtype: torch.dtype) -> None:
    program = compiled("all parts", direction, dtype)
    image = inputs(CONFIGS["all parts"], direction, 9, 7, 2)[1:]
    others = inputs(CONFIGS["all parts"], direction, 9, 7, 5)
    plan = make_plan(program.network, *image.shape[2:], dtype.itemsize, is_deterministic=True, images_at_once=5)
    assert plan.group == 5
    with torch.no_grad():
        alone = execute_groups(program, plan, image)
        for place in range(5):
            batch = others.clone()
            batch[place] = image[0]
            assert execute_groups(program, plan, batch)[place].equal(alone[0])


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_threads_change_no_bit_of_deterministic_groups(direction: Direction) -> None:
    program = compiled("all parts", direction)
    images = inputs(CONFIGS["all parts"], direction, 9, 7, 7)
    size = *images.shape[2:], 4
    one = make_plan(program.network, *size, is_deterministic=True, images_at_once=2)
    two = make_plan(program.network, *size, is_deterministic=True, images_at_once=6, num_threads=3)
    assert (one.group, one.num_workers(7)) == (2, 1) and (two.group, two.num_workers(7)) == (2, 3)
    with torch.no_grad():
        expected = execute_groups(program, one, images)
        for num_threads in (1, 3):
            with torch_threads(num_threads):
                assert execute_groups(program, two, images).equal(expected)
                assert torch.get_num_threads() == num_threads


def test_threads_agree_with_one_and_share_the_images() -> None:
    vae, images = VAES["all parts"], inputs(CONFIGS["all parts"], "decode", 5, 4, 7)
    expected = run(vae, "decode", images)
    for num_threads, group in ((2, 4), (3, 2), (16, 1)):
        with torch_threads(num_threads):
            assert vae.engine.plan("decode", 5, 4, 7).group == group  # type: ignore[union-attr]
            assert error(run(vae, "decode", images), expected) <= 1e-5
            assert error(run(vae, "decode", images[:1]), expected[:1]) <= 1e-5  # all threads for one image


def test_blocks_of_statistics_change_no_more_than_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    images = inputs(SMALL, "decode", 9, 6, 2)
    whole = run(VAES["plain"], "decode", images)
    monkeypatch.setattr(planning, "_BLOCK_PX", 100)  # of the 72x48 pixels at the end: blocks of two rows
    vae = VAE(MODELS["plain"], CPU, torch.float32, "in blocks")
    plan = vae.engine.plan("decode", 9, 6, 2)  # type: ignore[union-attr]
    assert plan.levels[0].row_block == 2 and plan.levels[3].row_block == 9
    assert 0 < error(run(vae, "decode", images), whole) <= 1e-5


# --- Mutants: a comparison that could not fail would prove nothing ---


def _statistics_over_the_group(patch: pytest.MonkeyPatch) -> None:
    statistics = grouping._statistics

    def shared(images: Tensor, row_block: int, num_groups: int) -> Tensor:
        return statistics(images, row_block, num_groups).mean(1, keepdim=True).expand(-1, len(images), -1)

    patch.setattr(grouping, "_statistics", shared)


def _filling_counted(patch: pytest.MonkeyPatch) -> None:
    statistics = grouping._statistics

    def counted(images: Tensor, row_block: int, num_groups: int) -> Tensor:
        found = statistics(images, row_block, num_groups)
        return (found + found[:, -1:]) / 2  # as if the last place of the group were part of each image

    patch.setattr(grouping, "_statistics", counted)


def _statistics_of_the_neighbour(patch: pytest.MonkeyPatch) -> None:
    statistics = grouping._statistics
    patch.setattr(grouping, "_statistics", lambda *arguments: statistics(*arguments).roll(1, 1))


@pytest.mark.parametrize("mutate", [_statistics_over_the_group, _filling_counted, _statistics_of_the_neighbour])
def test_a_mutant_is_seen(mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    vae, images = VAES["plain"], inputs(SMALL, "decode", 5, 4, 3)
    with torch.no_grad():
        exact = MODELS["plain"].decode(images)
    with vae.deterministic(4):  # the fourth place is filled up
        assert error(run(vae, "decode", images), exact) <= 2e-5
        mutate(monkeypatch)
        assert error(run(vae, "decode", images), exact) > 1e-3


# --- Plans ---


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_only_small_images_run_whole(direction: Direction) -> None:
    small, sd1 = (build_network(VAEConfig.from_family(name), direction) for name in ("small", "sd1"))
    side = 1 if direction == "encode" else 8

    def group(network: planning.Network, px: int, element_bytes: int = 4, **arguments: bool) -> int:
        plan = make_plan(network, px // side, px // side, element_bytes, num_images=8, images_at_once=8, **arguments)
        return plan.group

    assert [group(small, px) for px in (32, 64, 128, 256, 512)] == [8, *((4, 1, 1, 0) if side == 1 else (2, 1, 1, 0))]
    assert [group(sd1, px, 2) for px in (32, 64, 128, 512)] == [1, 1, 1, 0]
    assert group(small, 64, is_gpu=True) == 0
    assert make_plan(small, 64 // side, 64 // side, 4).group == 0, "only who asks for groups gets them"


def test_a_budget_makes_groups_smaller_or_strips_of_them_but_never_deterministic_ones() -> None:
    network = build_network(SMALL, "decode")
    sizes = {"height": 12, "width": 12, "element_bytes": 4, "num_images": 8, "images_at_once": 8}
    free = make_plan(network, **sizes)
    assert free.group == 8 and not free.is_filled
    fewer = make_plan(network, **sizes, budget_bytes=free.predict_bytes(8) - 1)
    assert fewer.group == 4
    strips = make_plan(
        network,
        **sizes,
        budget_bytes=make_plan(network, **sizes | {"images_at_once": 0}, num_strips=12).predict_bytes(8),
    )
    assert strips.group == 0
    with pytest.raises(BudgetError, match=f"needs at least {memory_text(free.predict_bytes(8))} beside"):
        make_plan(network, **sizes, is_deterministic=True, budget_bytes=free.predict_bytes(8) - 1)


def test_strips_of_old_stores_are_what_execute_makes() -> None:
    program, images = compiled("plain", "encode"), inputs(SMALL, "encode", 4, 4, 3)
    plan = make_plan(program.network, 32, 32, 4, is_deterministic=True)
    with VAES["plain"].deterministic(0), torch.no_grad():
        assert run(VAES["plain"], "encode", images).equal(execute(program, plan, images)[:, :4])


def test_each_piece_of_work_is_done_with_its_threads_and_an_error_is_raised() -> None:
    seen = dict[int, tuple[int, bool]]()

    def work(index: int) -> None:
        seen[index] = torch.get_num_threads(), torch.is_grad_enabled()
        if index == 8:
            raise ZeroDivisionError

    with torch_threads(4):
        run_apart([partial(work, index) for index in range(7)], num_workers=3, num_threads=2)
        assert seen == dict.fromkeys(range(7), (2, False))
        with pytest.raises(ZeroDivisionError):
            run_apart([partial(work, index) for index in (7, 8)], num_workers=2, num_threads=1)
        assert torch.get_num_threads() == 4 and torch.is_grad_enabled()


# --- TAESD ---


@settings(max_examples=15)
@given(
    height=st.integers(1, 6), width=st.integers(1, 6), direction=st.sampled_from(["encode", "decode"]),
    order=st.permutations(range(5)), batch_rows=st.integers(1, 5), has_mid_pool=st.booleans(),
)  # fmt: skip
def test_a_taesd_gives_the_same_bits_in_any_batch_and_those_of_its_module(
    height: int, width: int, direction: Direction, order: list[int], batch_rows: int, has_mid_pool: bool
) -> None:
    torch.manual_seed(0)
    config = TinyConfig(block_out_channels=(16,) * 4, layers_per_block=1, has_mid_pool=has_mid_pool)
    model = AutoencoderTiny(config).eval().requires_grad_(False)
    vae, images = VAE(model, CPU, torch.float32, "tiny"), inputs(config, direction, height, width, 5)
    with vae.deterministic(3):
        expected = torch.cat([run(vae, direction, image[None]) for image in images])
        parts = torch.split(images[order], batch_rows)
        assert torch.cat([run(vae, direction, part) for part in parts]).equal(expected[order])
    exact = model.encode(images).mean if direction == "encode" else model.decode(images)
    assert error(run(vae, direction, images), exact) <= 1e-5


def test_a_taesd_keeps_a_budget_or_refuses_it() -> None:
    model = AutoencoderTiny(TinyConfig()).eval().requires_grad_(False)
    vae, latents = VAE(model, CPU, torch.float32, "tiny"), torch.randn(4, 4, 6, 5)
    assert isinstance(vae.engine, TinyEngine)
    smallest = vae.engine.predict_bytes("decode", 6, 5, num_images=4)
    assert error(vae.decode(latents, budget=smallest), vae.decode(latents)) <= 1e-6
    with pytest.raises(BudgetError, match=f"needs at least {memory_text(smallest)} beside"):
        vae.decode(latents, budget=smallest - 1)
    assert IMAGES_AT_ONCE > 1 and vae.engine.images_at_once == IMAGES_AT_ONCE and ops.NAME == "torch"
