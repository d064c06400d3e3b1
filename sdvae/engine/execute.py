"""Runs a program under a plan, one image after the other, strip by strip."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sdvae.engine import ops
from sdvae.engine.arena import Memory, PinnedMemory, allocate
from sdvae.engine.kernels import Kernels, RunningStatistics
from sdvae.engine.levels import Level, input_rows, window_shape
from sdvae.engine.plan import Plan
from sdvae.engine.program import PackedStage, Program
from sdvae.engine.stages import Border

Peaks = dict[str, float]  # the largest absolute value that each stage and shortcut left behind


def execute(
    program: Program, plan: Plan, images: Tensor, peaks: Peaks | None = None, pinned: PinnedMemory | None = None
) -> Tensor:
    """All images (N, C, H, W) through the network -> (N, C', H', W') fp32; a dict of `peaks` is filled.

    Memory is allocated once and freed at the end, but for what belongs to `pinned`.
    """
    out = empty_output(program, plan, len(images))
    pinned = pinned or PinnedMemory()
    memory = allocate(plan, program.dtype, program.device, pinned)
    for image, target in zip(images, out, strict=True):
        execute_image(program, plan, memory, image.to(program.device), target, peaks)
    return out


def empty_output(program: Program, plan: Plan, num_images: int) -> Tensor:
    """Memory for the output of images: (N, C', H', W') fp32."""
    last = plan.levels[program.stages[-1].stage.level]
    shape = num_images, program.network.out_channels, last.height, last.width
    return torch.empty(shape, dtype=torch.float32, device=program.device)


def execute_image(
    program: Program, plan: Plan, memory: Memory, image: Tensor, out: Tensor, peaks: Peaks | None = None
) -> None:
    """One image (C, H, W) through the network into `out`; on a GPU, the host is never waited for."""
    _ImageRun(program.kernels, plan, memory, image, out, peaks).run(program)


class _ImageRun:
    """The run of one image: where its rows lie, and the statistics of x and h."""

    def __init__(
        self, kernels: Kernels, plan: Plan, memory: Memory, image: Tensor, out: Tensor, peaks: Peaks | None
    ) -> None:
        self._kernels, self._plan, self._memory = kernels, plan, memory
        self._image, self._out, self._peaks = image, out, peaks
        self._statistics: dict[str, RunningStatistics] = {}

    def run(self, program: Program) -> None:
        for packed in program.stages:
            level = self._plan.levels[packed.stage.level]
            statistics = self._kernels.Statistics(level.row_block)
            counted = statistics if packed.stage.has_statistics else None
            if packed.stage.kind == "attention":
                self._attend(packed, counted)
            else:
                self._convolve(packed, counted)
            self._statistics[packed.stage.target] = statistics

    def _convolve(self, packed: PackedStage, statistics: RunningStatistics | None) -> None:
        stage, convolution = packed.stage, packed.convolution
        assert convolution is not None  # as in all stages but attention
        level = self._plan.levels[stage.level]
        window = self._window(packed)
        for start, end in level.strips:
            rows = window.read(*input_rows(stage, start, end))
            if packed.shortcut is not None:  # x is read to the end before x and h take its place
                projected = self._strip(level, start, end, "x", stage.out_channels)
                packed.shortcut.write(self._read_x(packed, start, end), projected, level.call_rows, None)
                self._note(stage.shortcut, projected)
            if stage.target == "output":
                target = self._out[None, :, start:end]
            else:
                target = self._strip(level, start, end, stage.target, stage.out_channels)
            convolution.write(rows, target, level.call_rows, statistics)
            self._note(stage.name, target)

    def _read_x(self, packed: PackedStage, start: int, end: int) -> Tensor:
        """A strip of x in memory that libraries can read."""
        level, channels = self._plan.levels[packed.stage.level], packed.stage.in_channels
        x = self._strip(level, start, end, "x", channels)
        if not self._plan.is_on_host:
            return x
        near = torch.empty((end - start) * level.width * channels, dtype=x.dtype, device=self._memory.window.device)
        copy = ops.strip_of(near, end - start, level.width)
        self._kernels.write(x, None, copy, adds=False, statistics=None)
        return copy

    def _attend(self, packed: PackedStage, statistics: RunningStatistics | None) -> None:
        """Add output(attention(queries(h), h, h)) to x, with h = norm(x): a fixed number of queries at a time."""
        stage = packed.stage
        level, channels = self._plan.levels[stage.level], stage.out_channels
        num_tokens = level.height * level.width
        keys = self._memory.keys(level.keys_offset(channels), num_tokens * channels)
        self._source(packed)(0, level.height, ops.strip_of(keys, level.height, level.width))
        tokens = keys.view(num_tokens, channels)
        (query_weight, query_bias), (out_weight, out_bias) = packed.projections
        num_rows = max(1, self._plan.num_queries // level.width)
        for start in range(0, level.height, num_rows):
            end = min(start + num_rows, level.height)
            queries = ops.linear(tokens[start * level.width : end * level.width], query_weight, query_bias)
            mixed = ops.linear(self._kernels.attend(queries, tokens), out_weight, out_bias)
            added = ops.strip_of(mixed.flatten(), end - start, level.width)
            for first, last, x in self._segments(level, "x", channels, start, end):
                part = added[:, :, first - start : last - start]
                self._kernels.write(part, None, x, adds=True, statistics=None)
                self._note(stage.name, x)
        if statistics is not None:
            for start, end in level.strips:
                statistics.add(self._strip(level, start, end, "x", channels))

    def _note(self, name: str | None, values: Tensor) -> None:
        if self._peaks is not None and name is not None:
            self._peaks[name] = max(self._peaks.get(name, 0.0), float(values.abs().amax()))

    def _window(self, packed: PackedStage) -> "_Window":
        stage = packed.stage
        source, target = self._plan.levels[stage.source_level], self._plan.levels[stage.level]
        num_rows, _, _ = window_shape(stage, source, target)
        border = stage.border("y", source.height), stage.border("x", source.width)
        width = source.width + (2 if border[1] else stage.kind == "down")
        num_elements = num_rows * width * (stage.in_channels + packed.has_ones)
        rows = ops.strip_of(self._memory.window[:num_elements], num_rows, width)
        rows[..., source.width :].zero_()
        return _Window(rows, source.height, source.width, *border, self._source(packed))

    def _source(self, packed: PackedStage) -> Callable[[int, int, Tensor], None]:
        """A function that writes rows start..end of a stage's input (the image, or normalised x or h) into a strip."""
        stage = packed.stage
        if stage.source == "input":
            return self._read_image
        level = self._plan.levels[stage.source_level]
        norm = packed.norm
        mean, variance = self._statistics[stage.source].merge(norm.num_groups) if norm else (None, None)

        def read(start: int, end: int, out: Tensor) -> None:
            for first, last, rows in self._segments(level, stage.source, stage.in_channels, start, end):
                part = out[:, :, first - start : last - start]
                if norm is None or mean is None or variance is None:
                    self._kernels.write(rows, None, part, adds=False, statistics=None)
                else:
                    self._kernels.normalise(rows, part, norm, mean, variance, has_silu=stage.kind != "attention")

        return read

    def _read_image(self, start: int, end: int, out: Tensor) -> None:
        num_channels = len(self._image)
        out[0, :num_channels].copy_(self._image[:, start:end])
        out[0, num_channels:].fill_(1)  # the channel of ones, where the program has one

    def _segments(
        self, level: Level, place: str, channels: int, start: int, end: int
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Rows start..end of x or h, block by block."""
        for first, last in level.strips_with(start, end):
            low, high = max(first, start), min(last, end)
            yield low, high, self._strip(level, first, last, place, channels)[:, :, low - first : high - first]

    def _strip(self, level: Level, start: int, end: int, place: str, channels: int) -> Tensor:
        """The block of a strip of x or of h; h lies behind an x of its own width."""
        num_elements = (end - start) * level.width * channels
        offset = level.block_offset(start) + (num_elements if place == "h" else 0)
        return ops.strip_of(self._memory.arena[offset : offset + num_elements], end - start, level.width)


class _Window:
    """The input rows of a strip. Rows that two strips share are read once: their source may be overwritten by then.

    So may the rows that stand beyond the borders: they are read before the first strip, and kept behind the others.
    """

    def __init__(
        self,
        rows: Tensor,
        height: int,
        width: int,
        row_border: Border | None,
        column_border: Border | None,
        read: Callable[[int, int, Tensor], None],
    ) -> None:
        self._rows, self._height, self._width, self._read = rows, height, width, read
        self._column_border = column_border
        self._start = self._end = -1  # no strip begins above the row that pads the border
        self._beyond: list[Tensor] = []
        if row_border is not None:
            self._rows, beyond = rows[:, :, :-2], rows[:, :, -2:]
            self._beyond = list(torch.split(beyond, 1, 2))
            for row, place in zip(row_border, self._beyond, strict=True):
                self._read_inside(row, row + 1, place)

    def read(self, start: int, end: int) -> Tensor:
        """Rows start..end; beyond the border, what stands there."""
        shift, num_kept = start - self._start, max(0, self._end - start)
        if num_kept:
            kept = self._rows[:, :, shift : shift + num_kept]
            self._rows[:, :, :num_kept].copy_(kept if shift >= num_kept else kept.clone())
        self._start, self._end = start, end
        first, last = max(start + num_kept, 0), min(end, self._height)
        self._fill(self._rows[:, :, num_kept : first - start], 0)
        if first < last:
            self._read_inside(first, last, self._rows[:, :, first - start : last - start])
        self._fill(self._rows[:, :, max(last, first) - start : end - start], 1)
        return self._rows[:, :, : end - start]

    def _fill(self, rows: Tensor, side: int) -> None:
        """Write what stands above (0) or below (1) the image."""
        if self._beyond:
            rows.copy_(self._beyond[side])
        else:
            rows.zero_()

    def _read_inside(self, first: int, last: int, out: Tensor) -> None:
        """Rows of the image, with the columns that stand beside them."""
        if self._column_border is None:
            self._read(first, last, out[..., : self._width])
        else:
            self._read(first, last, out[..., 1:-1])
            ops.fill_border(out, 3, self._column_border)
