"""Whether images of a size fit a memory, weights included, and what would make them fit. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sdvae.amounts import memory_text, size_text
from sdvae.config import VAEConfig
from sdvae.engine.plan import IMAGES_AT_ONCE, Plan, make_plan
from sdvae.engine.stages import Direction, build_network
from sdvae.engine.traffic import traffic_bytes
from sdvae.errors import BudgetError

Dtype = Literal["fp32", "bf16", "fp16"]

ELEMENT_BYTES: dict[Dtype, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
_HOST_BYTES = 2**40  # a plan for any machine supposes that its host has enough
_LOADED_BYTES = 4  # of a weight as loaded, which stays on the CPU


@dataclass(frozen=True)
class Need:
    """What one direction needs: its plan, the least one where the memory is too small; all bytes with weights."""

    plan: Plan
    weights_bytes: int
    least_bytes: int
    fits: bool

    @property
    def num_bytes(self) -> int:
        """Memory of the plan and the weights."""
        return self.plan.predict_bytes() + self.weights_bytes


def find_need(
    config: VAEConfig,
    direction: Direction,
    size_px: tuple[int, int],
    dtype: Dtype,
    *,
    is_gpu: bool = False,
    memory_bytes: int | None = None,
) -> Need:
    """What it takes to encode or decode one image of (height, width) on a device with so much memory; None: enough.

    On a CPU the weights are there twice: as loaded, and packed for one direction.
    """
    network = build_network(config, direction)
    weights_bytes = network.num_packed * ELEMENT_BYTES[dtype]
    if not is_gpu:
        both: tuple[Direction, ...] = ("encode", "decode")
        weights_bytes += sum(build_network(config, way).num_parameters for way in both) * _LOADED_BYTES
    scale = config.downscale if direction == "decode" else 1
    height, width = size_px[0] // scale, size_px[1] // scale

    def plan_within(budget_bytes: int | None) -> Plan:
        host_bytes = _HOST_BYTES if is_gpu else 0
        return make_plan(
            network, height, width, ELEMENT_BYTES[dtype],
            budget_bytes=budget_bytes, is_gpu=is_gpu, host_bytes=host_bytes, images_at_once=IMAGES_AT_ONCE,
        )  # fmt: skip

    try:
        plan_within(0)
    except BudgetError as error:
        least_bytes = error.least_bytes
    assert least_bytes is not None
    budget_bytes = None if memory_bytes is None else memory_bytes - weights_bytes
    fits = budget_bytes is None or least_bytes <= budget_bytes
    plan = plan_within(budget_bytes if fits else least_bytes)
    return Need(plan, weights_bytes, least_bytes + weights_bytes, fits)


def verdict(needs: Sequence[Need], dtype: Dtype, memory_bytes: int | None, others: Sequence[Dtype] = ()) -> str:
    """One sentence on all directions of a size; `others` are dtypes in which they would fit."""
    first, *rest = sorted(needs, key=lambda need: (need.fits, -need.least_bytes, -need.num_bytes))
    what = f"{_doing(first)} {size_text(*first.plan.size_px)} px in {dtype} needs"
    if memory_bytes is None:
        told = "".join(f"; {_doing(need)} {memory_text(need.num_bytes)}" for need in rest)
        least = memory_text(max(need.least_bytes for need in needs)).replace(" ", "")
        return f"{what} {memory_text(first.num_bytes)}, weights included{told}; --budget may be as small as {least}"
    memory = memory_text(memory_bytes, is_limit=True)
    if first.fits:
        told = "".join(f"; {_doing(need)} {memory_text(need.num_bytes)}" for need in rest)
        needed = memory_text(first.num_bytes, like=memory_bytes)
        return f"yes: {what} {needed} of the {memory}, weights included{told}{_traffic(needs)}"
    least = memory_text(first.least_bytes, like=memory_bytes)
    told = "".join(f"; {_doing(need)} fits" for need in rest if need.fits)
    advice = "".join(f" or --dtype {other}" for other in others)
    return (
        f"no: {what} at least {least}, weights included, and the budget is {memory}{told}; "
        f"give --budget {least.replace(' ', '')}{advice}"
    )


def _doing(need: Need) -> str:
    return f"{need.plan.network.direction[:-1]}ing"


def _traffic(needs: Sequence[Need]) -> str:
    """What crosses the bus where layers lie in the host's memory."""
    far = [need.plan for need in needs if need.plan.is_on_host]
    if not far:
        return ""
    arena, traffic = (max(amounts) for amounts in zip(*((p.arena_bytes, traffic_bytes(p)) for p in far), strict=True))
    return (
        f"; {memory_text(arena)} of layers lie in the host's memory, and an image moves {memory_text(traffic)} "
        "to and from it"
    )
