"""Where everything lies while a network runs: strips of rows, an arena they share, and the bytes that will be needed.

Each level of the network has a region of the arena, cut into blocks of rows, one for each strip. In its block a strip
keeps x, and behind it h. A resnet that changes the width puts its shortcut and h over the x they are made of: its own
block is read to the end before it is written. The regions of neighbouring levels overlap where rows are always read
before they are written over; how far, integers decide.

Small images need no strips: they run whole, in groups of one size beside each other, in memory of their own for each
stage.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count

from sdvae.amounts import memory_text, size_text
from sdvae.engine.levels import Level, input_rows, made_elements, whole_elements, window_shape
from sdvae.engine.stages import Direction, Network, Stage
from sdvae.errors import BudgetError, ShapeError

# Of one strip's input: it should stay in the last-level cache from the norm to the convolution. On a GPU it is also to
# make some 500 tiles of 128x128 outputs, four waves on 132 multiprocessors.
STRIP_BYTES = 2**23
GPU_STRIP_BYTES = 2**25
ATTENTION_QUERIES = 1024  # at a time; fixed, so that no plan changes a sum
GPU_ATTENTION_QUERIES = 2**14
_WHOLE_BYTES = 2**24  # that a stage reads of an image, up to which strips are no faster than whole images
IMAGES_AT_ONCE = 8  # images that run at once, on all threads
GROUP_FLOPS = 2**32  # of a group, beyond which more images made none faster; one alone pays for a deterministic group
_BLOCK_PX = 2**12  # that the statistics of a whole image are summed over at a time
PIXEL_BYTES = 4  # images and latents enter and leave in fp32


@dataclass(frozen=True)
class Plan:
    """How a network runs on one image after the other, or on groups of whole images; all sizes are of one image."""

    network: Network
    levels: tuple[Level, ...]
    element_bytes: int
    arena_elements: int
    window_elements: int
    keys_elements: int  # of an attention, where they are not in the arena
    scratch_bytes: int  # the most that one strip of a stage needs beside those
    num_queries: int  # of an attention at a time
    is_on_host: bool  # whether the arena lies in pinned memory of the host, which a GPU reads and writes as it goes
    group: int = 0  # whole images in each call of a library; 0: none, they run in strips
    is_filled: bool = False  # whether the last group is filled up to that size
    most_workers: int = 1  # groups that run at a time, each on threads of its own

    @cached_property
    def image_bytes(self) -> int:
        """Input and output of one image."""
        network, levels = self.network, self.levels
        first, last = (levels[-1], levels[0]) if network.direction == "decode" else (levels[0], levels[-1])
        num_in = first.height * first.width * network.in_channels
        return PIXEL_BYTES * (num_in + last.height * last.width * network.out_channels)

    @property
    def size_px(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.levels[0].height, self.levels[0].width

    @property
    def arena_bytes(self) -> int:
        """Memory of the arena, wherever it lies."""
        return self.arena_elements * self.element_bytes

    @property
    def strip_bytes(self) -> int:
        """What the strips of a stage need beside the arena."""
        return (self.window_elements + self.keys_elements) * self.element_bytes + self.scratch_bytes

    def predict_bytes(self, num_images: int = 1) -> int:
        """Peak memory of a run on its device, beside the weights."""
        arena = 0 if self.is_on_host else self.arena_bytes
        return arena + self.num_workers(num_images) * self.strip_bytes + num_images * self.image_bytes

    def num_workers(self, num_images: int) -> int:
        """How many groups of so many images run at a time."""
        return max(1, min(self.most_workers, -(-num_images // self.group))) if self.group else 1

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
    is_gpu: bool = False,
    host_bytes: int = 0,
    images_at_once: int = 0,
    num_threads: int = 1,
) -> Plan:
    """Plan a network for inputs of `height` x `width`.

    Up to `images_at_once` images run at once and whole, on a CPU, if a stage reads little of each: in groups, on
    `num_threads` threads. Groups of deterministic plans have one size for a size of images; others share `num_images`
    out among the threads, and get smaller where the budget asks for it.

    Strips are as high as the cache allows, lower where a budget asks for it, or `num_strips` of them at every level (at
    most one for each row of latents). If the lowest strips are still too large, the arena lies in `host_bytes` of the
    host's memory, if a GPU can reach that. Deterministic plans of a size give the same bits: their strips are never
    lower than the cache allows, because libraries order their sums by the rows they are given.
    BudgetError names the smallest budget that can be met.
    """
    sizes = network.sizes(height, width)
    if not all(sizes[-1]):
        raise ShapeError(f"{size_text(height, width)} is too small: it has less than one row or column of latents")
    if network.padding == "reflect" and min(sizes[-1]) == 1:
        raise ShapeError(
            f"{size_text(height, width)} is too small to be padded by reflection: that takes two rows and columns of "
            "latents"
        )
    draft = _Draft(network, sizes, element_bytes, is_gpu)
    if images_at_once and num_strips is None and draft.is_small():
        flops = network.flops(height, width)
        for group, num_workers in group_sizes(flops, num_images, images_at_once, num_threads, is_deterministic):
            together = draft.plan_group(group, is_deterministic, num_workers)
            if budget_bytes is None or together.predict_bytes(num_images) <= budget_bytes:
                return together
        if is_deterministic:
            assert budget_bytes is not None
            raise _refusal(together, num_images, budget_bytes)
    liked = draft.strip_rows(0)
    if num_strips is not None:
        steps = liked if is_deterministic else [1] * len(sizes)
        return draft.plan([_split(sizes[-1][0], num_strips, step) for step in steps])
    plan = None
    for is_on_host in (False, True) if host_bytes else (False,):
        for rows in [liked] if is_deterministic else draft.lower_and_lower():
            lower = draft.plan([range(0, sizes[-1][0], step) for step in rows], is_on_host)
            if is_on_host and lower.arena_bytes > host_bytes:
                continue
            plan = lower
            if budget_bytes is None or plan.predict_bytes(num_images) <= budget_bytes:
                return plan
    assert plan is not None and budget_bytes is not None
    raise _refusal(plan, num_images, budget_bytes)


def budget_refusal(
    direction: Direction, num_images: int, size_px: tuple[int, int], least_bytes: int, budget_bytes: int
) -> BudgetError:
    """The error for images of (height, width) pixels that need more than the budget."""
    images = size_text(*size_px) if num_images == 1 else f"{num_images} images of {size_text(*size_px)}"
    needed = memory_text(least_bytes, like=budget_bytes)
    return BudgetError(
        f"{direction[:-1]}ing {images} px needs at least {needed} beside the weights, and the budget is "
        f"{memory_text(budget_bytes, is_limit=True)}; give {needed.replace(' ', '')}, or "
        f"{'smaller images' if num_images == 1 else 'fewer or smaller images'}",
        least_bytes,
    )


def _refusal(plan: Plan, num_images: int, budget_bytes: int) -> BudgetError:
    least_bytes = plan.predict_bytes(num_images)
    return budget_refusal(plan.network.direction, num_images, plan.size_px, least_bytes, budget_bytes)


def group_sizes(
    flops: int, num_images: int, images_at_once: int, num_threads: int, is_deterministic: bool
) -> Iterator[tuple[int, int]]:
    """How many images run in a call, and how many calls at a time, from the fastest to those that need least memory.

    An image has so many operations. Deterministic groups have one size, whatever the number of images and the memory: a
    power of two, which divides most batches.
    """
    group = max(1, min(images_at_once // num_threads, 1 << max(0, (GROUP_FLOPS // flops).bit_length() - 1)))
    if not is_deterministic:
        group = min(group, max(1, -(-num_images // num_threads)))
    for num_workers in _halvings(num_threads):
        for size in [group] if is_deterministic else _halvings(group):
            yield size, num_workers


def _halvings(most: int) -> Iterator[int]:
    while most:
        yield most
        most //= 2


def max_images(plan: Plan, budget_bytes: int) -> int:
    """How many images of a plan's size can be asked for at once within a budget."""
    return max(0, (budget_bytes - plan.predict_bytes(0)) // plan.image_bytes)


def _equal_blocks(num_rows: int, most: int) -> int:
    """The rows of a block, at most so many (but one), where all blocks are equal."""
    return next(rows for rows in range(max(1, min(num_rows, most)), 0, -1) if num_rows % rows == 0)


def _split(num_rows: int, num_strips: int, step: int) -> list[int]:
    """Where strips begin, as even as multiples of `step` allow."""
    num_steps = -(-num_rows // step)
    num_strips = min(num_strips, num_steps)
    return [index * num_steps // num_strips * step for index in range(num_strips)]


@dataclass(frozen=True, slots=True)
class _Draft:
    """What all plans of a size have in common."""

    network: Network
    sizes: tuple[tuple[int, int], ...]
    element_bytes: int
    is_gpu: bool

    def is_small(self) -> bool:
        """Whether whole images may run: on a CPU, where strips of them would gain nothing."""
        sides = zip(self.sizes, self._widest(), strict=True)
        most = max(height * width * widest for (height, width), widest in sides)
        return not self.is_gpu and most * self.element_bytes <= _WHOLE_BYTES

    def plan_group(self, group: int, is_filled: bool, num_workers: int) -> Plan:
        """The plan for whole images, `group` in a call and `num_workers` groups at a time."""
        levels = tuple(
            Level(height, width, (0, height), 0, 0, _equal_blocks(height, _BLOCK_PX // width), height)
            for height, width in self.sizes
        )
        most = max(
            whole_elements(stage, levels[stage.source_level], levels[stage.level]) for stage in self.network.stages
        )
        scratch_bytes = group * most * self.element_bytes
        return Plan(
            self.network,
            levels,
            self.element_bytes,
            arena_elements=0,
            window_elements=0,
            keys_elements=0,
            scratch_bytes=scratch_bytes,
            num_queries=0,
            is_on_host=False,
            group=group,
            is_filled=is_filled,
            most_workers=num_workers,
        )

    def _widest(self) -> list[int]:
        """The most channels that a strip reads at each level."""
        widest = [0] * len(self.sizes)
        for stage in self.network.stages:
            # A downsampler's input has four times the pixels of what it writes.
            num_read = stage.in_channels * (4 if stage.kind == "down" else 1)
            widest[stage.level] = max(widest[stage.level], num_read)
        return widest

    def strip_rows(self, halvings: int) -> list[int]:
        """How many rows of latents a strip of each level covers, after `halvings` of the size that the cache allows."""
        strip_bytes = (GPU_STRIP_BYTES if self.is_gpu else STRIP_BYTES) >> halvings
        num_rows = self.sizes[-1][0]
        rows = []
        for (height, width), widest in zip(self.sizes, self._widest(), strict=True):
            row_bytes = height // num_rows * width * widest * self.element_bytes
            rows.append(min(num_rows, max(1, strip_bytes // row_bytes)))
        return rows

    def lower_and_lower(self) -> Iterator[list[int]]:
        """`strip_rows`, down to a row of latents each."""
        for halvings in count():
            rows = self.strip_rows(halvings)
            yield rows
            if max(rows) == 1:
                return

    def plan(self, starts: Sequence[Sequence[int]], is_on_host: bool = False) -> Plan:
        """The plan whose strips begin at these rows of latents."""
        network = self.network
        levels = self._levels(starts)
        ends, keys_elements = [level.end for level in levels], 0
        for stage in network.stages:
            if stage.kind == "attention":
                level = levels[stage.level]
                num_elements = level.height * level.width * stage.out_channels
                keys_elements = max(keys_elements, num_elements)
                ends.append(level.keys_offset(stage.out_channels) + num_elements)
        num_queries = GPU_ATTENTION_QUERIES if self.is_gpu else ATTENTION_QUERIES
        between = [(stage, levels[stage.source_level], levels[stage.level]) for stage in network.stages]
        return Plan(
            network,
            levels,
            self.element_bytes,
            arena_elements=max(ends),
            window_elements=max(math.prod(window_shape(*of_stage)) for of_stage in between),
            keys_elements=keys_elements if is_on_host else 0,
            scratch_bytes=self.element_bytes
            * max(made_elements(*of_stage, num_queries, self.is_gpu, is_on_host) for of_stage in between),
            num_queries=num_queries,
            is_on_host=is_on_host,
        )

    def _levels(self, starts: Sequence[Sequence[int]]) -> tuple[Level, ...]:
        deepest = len(self.sizes) - 1
        levels: list[Level] = []
        for index, ((height, width), rows, liked) in enumerate(
            zip(self.sizes, starts, self.strip_rows(0), strict=True)
        ):
            row_block = 1 << (deepest - index)
            bounds = (*(row * row_block for row in rows), height)
            channels = _region_channels(self.network, index)
            levels.append(Level(height, width, bounds, channels, 0, row_block, liked * row_block))
        # From the end of the network backwards: a level's region begins as far behind the next one's as it must.
        for stage in reversed(self.network.stages):
            if stage.source_level != stage.level:
                source, target = levels[stage.source_level], levels[stage.level]
                offset = max(0, target.offset + _lead(stage, source, target))
                levels[stage.source_level] = replace(source, offset=offset)
        return tuple(levels)


def _region_channels(network: Network, level: int) -> int:
    """The most that x and h need together, for each pixel of a level."""
    channels = 0
    for stage in network.stages:
        if stage.target == "h" and stage.level == level:
            channels = max(channels, 2 * stage.out_channels)
        if stage.target == "x" and stage.level == level:
            channels = max(channels, stage.out_channels)
    return channels


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
