"""The memory a run takes is the memory its plan predicts, and a budget holds under a hard limit.

Each figure is that of a fresh process, above its weights, its input and warm libraries.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.memory import Peak, Task, measure_fresh
from sdvae.config import FAMILIES, Padding, VAEConfig
from sdvae.engine.plan import make_plan
from sdvae.engine.stages import Direction, build_network

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux' /proc"
)
MB = 10**6
# SD's shape, a quarter as wide: an arena of 37 MB at 384 px in fp32.
QUARTER = VAEConfig(block_out_channels=(32, 64, 128, 128), layers_per_block=1, norm_num_groups=8)
# glibc keeps up to some 20 MB of freed strips for itself; what is kept says nothing of what was needed. In the default
# allocator it is 1% at 2048 px, where the slow test measures.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}

CASES: list[tuple[Direction, Padding]] = [("encode", "zeros"), ("decode", "zeros"), ("decode", "circular")]


def predicted(peak: Peak | None) -> tuple[int, int]:
    assert peak is not None and peak.predicted_bytes is not None
    return peak.peak_bytes, peak.predicted_bytes


@pytest.mark.parametrize(("direction", "padding"), CASES)
def test_the_peak_is_the_predicted_one(direction: Direction, padding: Padding) -> None:
    config = replace(QUARTER, padding=padding)
    peak, expected = predicted(measure_fresh(Task(config, direction, 384, 384, "fp32"), GIVES_BACK))
    assert expected > 40 * MB, "large enough that libraries' own megabytes do not matter"
    assert abs(peak - expected) < 0.10 * expected + 1 * MB


@pytest.mark.parametrize(("direction", "padding"), CASES)
def test_the_peak_of_a_whole_image_is_the_predicted_one(direction: Direction, padding: Padding) -> None:
    side, config = 176 if direction == "encode" else 22, replace(QUARTER, padding=padding)
    assert make_plan(build_network(config, direction), side, side, 4, images_at_once=1).group == 1
    peak, expected = predicted(measure_fresh(Task(config, direction, 176, 176, "fp32"), GIVES_BACK))
    assert expected > 8 * MB
    assert 0.75 * expected - 1 * MB < peak < 1.10 * expected + 1 * MB, "never much more; glibc may keep some of it"


def test_a_budget_is_kept_under_a_hard_limit() -> None:
    """With the budget's bytes and no more than libraries' few beside them; diffusers fails in the same space."""
    network = build_network(QUARTER, "decode")
    smallest = min(make_plan(network, 48, 48, 4, num_strips=count).predict_bytes() for count in (1, 4, 16, 48))
    budget = int(1.02 * smallest)
    limit = budget + 24 * MB
    task = Task(QUARTER, "decode", 384, 384, "fp32", budget_bytes=budget, limit_bytes=limit)
    peak, expected = predicted(measure_fresh(task, GIVES_BACK))
    assert expected <= budget and peak < limit
    theirs = replace(task, who="diffusers", budget_bytes=None)
    assert measure_fresh(theirs, GIVES_BACK) is None, "the limit does bite"


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_predictions_are_256_elements_a_pixel_and_a_strip(direction: Direction) -> None:
    network = build_network(FAMILIES["sd1"], direction)
    for px in (512, 1024, 2048, 4096):
        side = px if direction == "encode" else px // 8
        plan = make_plan(network, side, side, 2)
        strip = plan.scratch_bytes
        assert plan.predict_bytes() <= 1.15 * (256 * px * px * 2 + strip)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_2048_px_of_sd1_in_bf16(direction: Direction) -> None:
    peak, expected = predicted(measure_fresh(Task(FAMILIES["sd1"], direction, 2048, 2048, "bf16")))
    assert abs(peak - expected) < 0.10 * expected
    assert peak < 2.6e9, "diffusers takes about 6.4 GB"
