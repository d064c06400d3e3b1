"""What an image moves between a GPU and an arena in its host's memory. No torch."""

from sdvae.engine.plan import Plan
from sdvae.engine.stages import Stage


def traffic_bytes(plan: Plan) -> int:
    """What one image moves to and from the host; 0 where the arena is on the device."""
    if not plan.is_on_host:
        return 0
    return plan.element_bytes * sum(_moved_elements(plan, stage) for stage in plan.network.stages)


def _moved_elements(plan: Plan, stage: Stage) -> int:
    """What a stage reads of the arena, and writes to it."""
    source, target = plan.levels[stage.source_level], plan.levels[stage.level]
    read = 0 if stage.source == "input" else source.height * source.width * stage.in_channels
    written = 0 if stage.target == "output" else target.height * target.width * stage.out_channels
    if stage.kind == "attention":  # it adds, and then counts
        return read + (3 if stage.has_statistics else 2) * written
    if stage.adds:
        return read + 2 * written
    return 2 * (read + written) if stage.shortcut else read + written
