"""Where everything lies while a network runs: strips of rows, an arena they share, and the bytes that will be needed.

Each level of the network has a region of the arena, cut into blocks of rows, one for each strip. In its block a strip
keeps x, and behind it h. A resnet that changes the width puts its shortcut and h over the x they are made of: its own
block is read to the end before it is written. The regions of neighbouring levels overlap where rows are always read
before they are written over; how far, integers decide.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, takewhile

from sdvae.engine.stages import Network, Stage
from sdvae.errors import BudgetError, ShapeError

STRIP_BYTES = 2**23  # of one strip's input: it should stay in the last-level cache from the norm to the convolution
ATTENTION_QUERIES = 1024  # at a time; fixed, so that no plan changes a sum
_INPUT = {"encode": "pixels", "decode": "latents"}
PIXEL_BYTES = 4  # images and latents enter and leave in fp32


@dataclass(frozen=True, slots=True)
class Level:
    """One resolution: its strips, and its region of the arena in elements."""

    height: int
    width: int
    bounds: tuple[int, ...]  # rows where strips begin, and the height
    channels: int  # of the region, for each pixel: of x and h together
    offset: int
    row_block: int  # rows that statistics are summed over at a time: those of one row of latents, whatever the plan
    call_rows: int  # rows that a convolution makes at a time, at most: those of a strip that memory did not cut short

    @property
    def strips(self) -> list[tuple[int, int]]:
        """First and last row (exclusive) of each strip."""
        return list(pairwise(self.bounds))

    def strips_with(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The strips that hold any of the rows start..end."""
        first = bisect_right(self.bounds, start) - 1
        yield from takewhile(lambda strip: strip[0] < end, pairwise(self.bounds[first:]))

    @property
    def end(self) -> int:
        """The first element behind the region."""
        return self.offset + self.height * self.width * self.channels

    def block_offset(self, row: int) -> int:
        """Where the block that begins with `row` lies in the arena."""
        return self.offset + row * self.width * self.channels

    def row_blocks(self, start: int, end: int) -> list[tuple[int, int]]:
        """The rows of a strip, in blocks that are the same under every plan."""
        return [(row, min(row + self.row_block, end)) for row in range(start, end, self.row_block)]

    def keys_offset(self, channels: int) -> int:
        """Where the arena has room for the keys of an attention: before the region, or behind it."""
        return 0 if self.offset >= self.height * self.width * channels else self.end


@dataclass(frozen=True)
class Plan:
    """How a network runs on one image after the other; all sizes are of one image."""

    network: Network
    levels: tuple[Level, ...]
    element_bytes: int
    window_offset: int  # of the window in the arena, behind all regions
    arena_elements: int
    scratch_bytes: int  # the most that one strip of a stage needs beside the arena

    @cached_property
    def image_bytes(self) -> int:
        """Input and output of one image."""
        network, levels = self.network, self.levels
        first, last = (levels[-1], levels[0]) if network.direction == "decode" else (levels[0], levels[-1])
        num_in = first.height * first.width * network.in_channels
        return PIXEL_BYTES * (num_in + last.height * last.width * network.out_channels)

    def predict_bytes(self, num_images: int = 1) -> int:
        """Peak memory of a run, beside the weights."""
        return self.arena_elements * self.element_bytes + self.scratch_bytes + num_images * self.image_bytes

    def num_strips(self, stage: Stage) -> int:
        """How many strips a stage runs in; the attention sees all rows at once."""
        return 1 if stage.kind == "attention" else len(self.levels[stage.level].strips)


def make_plan(
    network: Network,
    height: int,
    width: int,
    element_bytes: int,
    *,
    budget_bytes: int | None = None,
    num_images: int = 1,
    num_strips: int | None = None,
    is_deterministic: bool = False,
) -> Plan:
    """Plan a network for inputs of `height` x `width`.

    Strips are as high as the cache likes, lower where a budget asks for it, or `num_strips` of them at every level (at
    most one for each row of latents). Deterministic plans of a size give the same bits, whatever their strips: these
    are no lower than the cache likes, because libraries order their sums by the rows they are given.
    BudgetError names the smallest budget that can be met.
    """
    sizes = network.sizes(height, width)
    if not all(sizes[-1]):
        raise ShapeError(f"{width}x{height} is too small: it has less than one row or column of latents")
    num_rows = sizes[-1][0]
    strip_bytes = STRIP_BYTES
    liked = rows = _strip_rows(network, sizes, strip_bytes // element_bytes)
    if num_strips is not None:
        steps = liked if is_deterministic else [1] * len(sizes)
        return _plan(network, sizes, element_bytes, [_split(num_rows, num_strips, step) for step in steps], liked)
    while True:
        plan = _plan(network, sizes, element_bytes, [range(0, num_rows, step) for step in rows], liked)
        if budget_bytes is None or plan.predict_bytes(num_images) <= budget_bytes:
            return plan
        if max(rows) == 1 or is_deterministic:
            raise BudgetError(
                f"{network.direction}s of {num_images} x {width}x{height} {_INPUT[network.direction]} need "
                f"{plan.predict_bytes(num_images):,} bytes at least, and the budget is {budget_bytes:,}; raise it or "
                "give fewer or smaller images"
            )
        strip_bytes //= 2
        rows = _strip_rows(network, sizes, strip_bytes // element_bytes)


def max_images(plan: Plan, budget_bytes: int) -> int:
    """How many images of a plan's size can be asked for at once within a budget."""
    return max(0, (budget_bytes - plan.predict_bytes(0)) // plan.image_bytes)


def _split(num_rows: int, num_strips: int, step: int) -> list[int]:
    """Where strips begin, as even as multiples of `step` allow."""
    num_steps = -(-num_rows // step)
    num_strips = min(num_strips, num_steps)
    return [index * num_steps // num_strips * step for index in range(num_strips)]


def _strip_rows(network: Network, sizes: Sequence[tuple[int, int]], max_elements: int) -> list[int]:
    """How many rows of latents a strip of each level may cover."""
    num_rows = sizes[-1][0]
    rows = []
    for level, (height, width) in enumerate(sizes):
        # A downsampler's input has four times the pixels of what it writes.
        widest = max(
            stage.in_channels * (4 if stage.kind == "down" else 1) for stage in network.stages if stage.level == level
        )
        rows.append(min(num_rows, max(1, max_elements // (height // num_rows * width * widest))))
    return rows


def _plan(
    network: Network,
    sizes: Sequence[tuple[int, int]],
    element_bytes: int,
    starts: Sequence[Sequence[int]],
    call_rows: Sequence[int],
) -> Plan:
    deepest = len(sizes) - 1
    levels: list[Level] = []
    for index, ((height, width), rows) in enumerate(zip(sizes, starts, strict=True)):
        row_block = 1 << (deepest - index)
        bounds = (*(row * row_block for row in rows), height)
        channels = _region_channels(network, index)
        levels.append(Level(height, width, bounds, channels, 0, row_block, call_rows[index] * row_block))
    # From the end of the network backwards: a level's region begins as far behind the next one's as it must.
    for stage in reversed(network.stages):
        if stage.source_level != stage.level:
            source, target = levels[stage.source_level], levels[stage.level]
            levels[stage.source_level] = replace(source, offset=max(0, target.offset + _lead(stage, source, target)))
    ends = [level.end for level in levels]
    for stage in network.stages:
        if stage.kind == "attention":
            level = levels[stage.level]
            ends.append(level.keys_offset(stage.out_channels) + level.height * level.width * stage.out_channels)
    between = [(stage, levels[stage.source_level], levels[stage.level]) for stage in network.stages]
    return Plan(
        network,
        tuple(levels),
        element_bytes,
        window_offset=max(ends),
        arena_elements=max(ends) + max(math.prod(window_shape(*of_stage)) for of_stage in between),
        scratch_bytes=element_bytes * max(_made_elements(*of_stage) for of_stage in between),
    )


def _region_channels(network: Network, level: int) -> int:
    """The most that x and h need together, for each pixel of a level."""
    channels = 0
    for stage in network.stages:
        if stage.target == "h" and stage.level == level:
            channels = max(channels, 2 * stage.out_channels)
        if stage.target == "x" and stage.level == level:
            channels = max(channels, stage.out_channels)
    return channels


def input_rows(stage: Stage, start: int, end: int) -> tuple[int, int]:
    """The rows of its source that rows start..end of a stage are made of; they may lie beyond the border."""
    if stage.kind == "down":  # SD pads (0, 1, 0, 1): the stride-2 convolution is asymmetric
        return 2 * start, 2 * end + 1
    if stage.kind == "up":
        return start // 2 - 1, end // 2 + 1
    return start - 1, end + 1


def _lead(stage: Stage, source: Level, target: Level) -> int:
    """How far behind the target's region its source's must begin, so that no row is written over before it is read."""
    lead = -source.end
    for start, end in target.strips:
        unread = input_rows(stage, start, end)[1]
        if unread < source.height:
            block, _ = next(source.strips_with(unread, unread + 1))
            position = source.width * (block * source.channels + (unread - block) * stage.in_channels)
            written = target.width * (start * target.channels + (end - start) * stage.out_channels)
            lead = max(lead, written - position)
    return lead


def window_shape(stage: Stage, source: Level, target: Level) -> tuple[int, int, int]:
    """Rows, width and channels of the input of a stage's highest strip, with room for a column and a channel more."""
    rows = max(end - start for start, end in target.strips)
    first, last = input_rows(stage, 0, rows)
    return last - first, source.width + 1, stage.in_channels + 1


def _made_elements(stage: Stage, source: Level, target: Level) -> int:
    """The most that one strip needs beside the arena, for what cannot be made in its place."""
    rows = max(end - start for start, end in target.strips)
    if stage.kind == "attention":
        num_queries = min(source.height, max(1, ATTENTION_QUERIES // source.width)) * source.width
        return (3 * num_queries + 2 * source.height * source.width) * stage.out_channels  # torch packs keys and values
    if stage.kind == "up":  # even and odd rows are made one after the other, with a column to spare
        return rows * (source.width + 1) * stage.out_channels
    if stage.shortcut or stage.target == "output":
        return rows * target.width * stage.out_channels
    return 0
