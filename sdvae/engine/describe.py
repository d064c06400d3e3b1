"""What a plan does, in words and numbers: every stage with its strips, and where the memory goes. No torch."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sdvae.amounts import count, memory_text, size_text
from sdvae.engine.plan import Plan
from sdvae.engine.stages import Stage
from sdvae.engine.traffic import traffic_bytes

if TYPE_CHECKING:
    from sdvae.engine.program import PackedStage, Program


def describe_plan(plan: Plan, program: "Program | None" = None, num_images: int = 1) -> str:
    """A table of a plan's stages and a line on its memory; with a program, the kernel that runs each stage, too."""
    return "\n".join(_lines(plan, program, num_images))


def plan_values(plan: Plan, num_images: int = 1) -> dict[str, object]:
    """The same as plain values: sizes are (height, width), `predicted_bytes` is the peak beside the weights."""
    height, width = _input_size(plan)
    return {
        "direction": plan.network.direction,
        "gflop": plan.network.flops(height, width) / 1e9,
        "arena_bytes": plan.arena_bytes,
        "is_arena_on_host": plan.is_on_host,
        "traffic_bytes": traffic_bytes(plan),
        "group": plan.group,
        "strip_bytes": plan.strip_bytes,
        "images_bytes": num_images * plan.image_bytes,
        "predicted_bytes": plan.predict_bytes(num_images),
        "stages": [
            {
                "name": stage.name,
                "kind": stage.kind,
                "in_channels": stage.in_channels,
                "out_channels": stage.out_channels,
                "size": list(_size(plan, stage)),
                "num_strips": plan.num_strips(stage),
                "gflop": _gflop(plan, stage),
            }
            for stage in plan.network.stages
        ],
    }


def _lines(plan: Plan, program: "Program | None", num_images: int) -> Iterator[str]:
    network = plan.network
    height, width = _input_size(plan)
    yield (
        f"{network.direction}: {size_text(height, width)}x{network.in_channels} to "
        f"{_by(plan, network.stages[-1])}x{network.out_channels}, {plan.element_bytes} bytes an element"
        f"{'' if network.padding == 'zeros' else f', padding {network.padding}'}"
    )
    name_width = max(len(stage.name) for stage in network.stages)
    kernels = [""] * len(network.stages) if program is None else [_kernel(packed, program) for packed in program.stages]
    yield _row(
        "stage", name_width, "kind", "channels", "width x height", "strips", "GFLOP", "kernel" if program else ""
    )
    for stage, kernel in zip(network.stages, kernels, strict=True):
        channels = f"{stage.in_channels} > {stage.out_channels}"
        strips, gflop = str(plan.num_strips(stage)), f"{_gflop(plan, stage):.2f}"
        yield _row(stage.name, name_width, stage.kind, channels, _by(plan, stage), strips, gflop, kernel)
    yield f"{network.flops(height, width) / 1e9:.1f} GFLOP an image"
    place = "" if plan.is_on_host else f"arena {memory_text(plan.arena_bytes)} + "
    place = f"{count(plan.group, 'whole image')} together" if plan.group else f"{place}strips"
    yield (
        f"memory beside the weights: {place} {memory_text(plan.strip_bytes)} + "
        f"{count(num_images, 'image')} in and out {memory_text(num_images * plan.image_bytes)} = "
        f"{memory_text(plan.predict_bytes(num_images))}"
    )
    if plan.is_on_host:
        yield (
            f"and in the host's memory: arena {memory_text(plan.arena_bytes)}; an image moves "
            f"{memory_text(traffic_bytes(plan))} to and from it"
        )
    if program is not None:
        yield f"weights: {memory_text(program.num_bytes)}, packed"


def _row(name: str, name_width: int, kind: str, channels: str, size: str, strips: str, gflop: str, kernel: str) -> str:
    return f"{name:<{name_width}}  {kind:<9}{channels:>11}{size:>15}{strips:>8}{gflop:>13}  {kernel}".rstrip()


def _kernel(packed: "PackedStage", program: "Program") -> str:
    """What runs a stage."""
    return (
        program.kernels.ATTENTION
        if packed.convolution is None
        else f"{packed.convolution.kernel}, {program.kernels.NAME}"
    )


def _input_size(plan: Plan) -> tuple[int, int]:
    level = plan.levels[-1 if plan.network.direction == "decode" else 0]
    return level.height, level.width


def _size(plan: Plan, stage: Stage) -> tuple[int, int]:
    level = plan.levels[stage.level]
    return level.height, level.width


def _by(plan: Plan, stage: Stage) -> str:
    return size_text(*_size(plan, stage))


def _gflop(plan: Plan, stage: Stage) -> float:
    return stage.flops(*_size(plan, stage)) / 1e9
