"""Plans are integers: what they promise is checked without running anything."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdvae.config import FAMILIES
from sdvae.engine.memory import parse_bytes
from sdvae.engine.plan import STRIP_BYTES, Plan, make_plan
from sdvae.engine.stages import Direction, build_network
from sdvae.errors import BudgetError, ShapeError

SIDES = {"encode": 8, "decode": 1}  # of a latent, in units of the input


def plan_sd1(direction: Direction, latents_px: int, budget_bytes: int | None = None) -> Plan:
    side = latents_px * SIDES[direction]
    return make_plan(build_network(FAMILIES["sd1"], direction), side, side, 2, budget_bytes=budget_bytes)


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("size_px", [512, 1024, 2048, 4096, 16384])
def test_the_widest_block_comes_down_to_256_elements_a_pixel(direction: Direction, size_px: int) -> None:
    plan = plan_sd1(direction, size_px // 8)
    lean = 2 * 256 * size_px**2
    one_row_of_latents = 3 * 2 * 8 * size_px * 256  # a strip at its lowest, in and out
    assert 2 * plan.arena_elements >= lean, "two tensors of 128 channels must fit"
    assert plan.predict_bytes() <= 1.15 * lean + max(2 * STRIP_BYTES, one_row_of_latents)


def test_a_large_decode_fits_where_the_whole_would_not() -> None:
    assert plan_sd1("decode", 512, budget_bytes=9 << 30).predict_bytes() <= 9 << 30


@given(
    direction=st.sampled_from(["encode", "decode"]),
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    num_images=st.integers(1, 9),
    share=st.floats(0.1, 1.0),
)
def test_a_budget_is_kept_or_the_smallest_is_named(
    direction: Direction, height: int, width: int, num_images: int, share: float
) -> None:
    network = build_network(FAMILIES["sd1"], direction)
    size = height * SIDES[direction], width * SIDES[direction]
    liked = make_plan(network, *size, 2, num_images=num_images).predict_bytes(num_images)
    budget = int(share * liked)
    try:
        plan = make_plan(network, *size, 2, num_images=num_images, budget_bytes=budget)
    except BudgetError as error:
        smallest = error.least_bytes
        assert smallest is not None and smallest > budget
        if smallest >= 10**5:
            assert parse_bytes(str(error).partition("; give ")[2].partition(",")[0]) >= smallest
        plan = make_plan(network, *size, 2, num_images=num_images, budget_bytes=smallest)
        assert plan.predict_bytes(num_images) == smallest
    else:
        assert plan.predict_bytes(num_images) <= budget


@pytest.mark.parametrize(("direction", "height", "width"), [("encode", 7, 64), ("encode", 64, 7), ("decode", 0, 4)])
def test_less_than_one_latent_is_refused(direction: Direction, height: int, width: int) -> None:
    with pytest.raises(ShapeError, match="too small"):
        make_plan(build_network(FAMILIES["sd1"], direction), height, width, 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_a_line_of_stages_that_ends_in_its_latents(name: str) -> None:
    config = FAMILIES[name]
    encode, decode = build_network(config, "encode"), build_network(config, "decode")
    side = 4 * config.downscale
    assert encode.sizes(side + 1, side)[-1] == (4, 4) and decode.sizes(4, 4)[0] == (side, side)
    assert encode.out_channels == 2 * decode.in_channels == 2 * config.latent_channels
    assert [stage.target for stage in decode.stages if stage.target == "output"] == ["output"]


def test_operations_are_those_of_the_literature() -> None:
    """512x512, in 10^9: the encoder has 1116.7, the decoder with folded upsamplers 2128; folds save 4.3 of each."""
    config = FAMILIES["sd1"]
    assert build_network(config, "decode").flops(64, 64) / 1e9 == pytest.approx(2128 - 4.3, rel=1e-3)
    assert build_network(config, "encode").flops(512, 512) / 1e9 == pytest.approx(1116.7 - 4.3, rel=1e-3)


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_a_gpu_takes_its_hosts_memory_only_where_its_own_cannot_do(direction: Direction) -> None:
    network, side = build_network(FAMILIES["sd1"], direction), 512 * SIDES[direction]  # 4096 px
    arguments: dict[str, Any] = {"is_gpu": True, "host_bytes": 64 << 30}
    near = make_plan(network, side, side, 2, budget_bytes=9 << 30, **arguments)
    assert not near.is_on_host and near.predict_bytes() <= 9 << 30
    far = make_plan(network, side, side, 2, budget_bytes=4 << 30, **arguments)
    assert far.is_on_host and far.predict_bytes() <= 4 << 30 and far.arena_bytes > 4 << 30
    assert far.levels == make_plan(network, side, side, 2, is_gpu=True).levels, "the strips that the cache likes"
    with pytest.raises(BudgetError):
        make_plan(network, side, side, 2, budget_bytes=4 << 30, is_gpu=True, host_bytes=far.arena_bytes - 1)


def test_8192_px_fit_a_gpu_of_16_gib() -> None:
    for direction in ("encode", "decode"):
        network, side = build_network(FAMILIES["sd1"], direction), 1024 * SIDES[direction]
        plan = make_plan(network, side, side, 2, budget_bytes=16 << 30, is_gpu=True, host_bytes=64 << 30)
        assert plan.is_on_host and plan.predict_bytes() <= 16 << 30


def test_strips_of_a_gpu_make_three_waves_of_tiles() -> None:
    """Tiles of 128x128 outputs on 132 multiprocessors, wherever a level has as many at all."""
    for direction in ("encode", "decode"):
        network, side = build_network(FAMILIES["sd1"], direction), 64 * SIDES[direction]  # 512 px
        plan = make_plan(network, side, side, 2, is_gpu=True)
        for stage in network.stages:
            level = plan.levels[stage.level]
            rows = min(level.bounds[1], level.height)
            tiles, all_tiles = (n * level.width * max(128, stage.out_channels) / 128**2 for n in (rows, level.height))
            assert tiles >= min(3 * 132, all_tiles) or stage.kind == "down"
