"""Runs a program under a plan, one image after the other, strip by strip."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sdvae.engine import ops
from sdvae.engine.plan import ATTENTION_QUERIES, Level, Plan, input_rows, window_shape
from sdvae.engine.program import PackedStage, Program

Peaks = dict[str, float]  # the largest absolute value that each stage and shortcut left behind


def execute(program: Program, plan: Plan, images: Tensor, peaks: Peaks | None = None) -> Tensor:
    """All images (N, C, H, W) through the network -> (N, C', H', W') fp32; `peaks` are noted where a dict is given.

    The arena is allocated once, and given back at the end.
    """
    last = plan.levels[program.stages[-1].stage.level]
    shape = (len(images), program.network.out_channels, last.height, last.width)
    out = torch.empty(shape, device=program.device)
    arena = torch.empty(plan.arena_elements, dtype=program.dtype, device=program.device)
    for image, target in zip(images, out, strict=True):
        _Run(plan, arena, image, target, peaks).run(program)
    return out


class _Run:
    """One image on its way: where its rows are, and the statistics of x and h."""

    def __init__(self, plan: Plan, arena: Tensor, image: Tensor, out: Tensor, peaks: Peaks | None) -> None:
        self._plan, self._arena, self._image, self._out, self._peaks = plan, arena, image, out, peaks
        self._statistics: dict[str, ops.Statistics] = {}

    def run(self, program: Program) -> None:
        for packed in program.stages:
            statistics = ops.Statistics()
            if packed.stage.kind == "attention":
                self._attend(packed, statistics)
            else:
                self._convolve(packed, statistics)
            self._statistics[packed.stage.target] = statistics

    def _convolve(self, packed: PackedStage, statistics: ops.Statistics) -> None:
        stage = packed.stage
        level = self._plan.levels[stage.level]
        window = self._window(packed)
        for start, end in level.strips:
            rows = window.read(*input_rows(stage, start, end))
            if stage.target == "output":
                self._out[:, start:end].copy_(packed.convolutions[0](rows, level.call_rows)[0])
                continue
            target = self._strip(level, start, end, stage.target, stage.out_channels)
            if stage.kind == "up":
                _upsample(packed, rows, target, level.call_rows)
            else:
                if packed.shortcut is not None:  # x is read to the end before x and h take its place
                    projected = packed.shortcut(self._strip(level, start, end, "x", stage.in_channels), level.call_rows)
                    self._note(stage.shortcut, projected)
                    self._strip(level, start, end, "x", stage.out_channels).copy_(projected)
                if not stage.adds:
                    target.zero_()
                packed.convolutions[0].add_to(target, rows, level.call_rows)
            self._note(stage.name, target)
            if stage.has_statistics:
                for first, last in level.row_blocks(start, end):
                    statistics.add(target[:, :, first - start : last - start])

    def _attend(self, packed: PackedStage, statistics: ops.Statistics) -> None:
        """Add output(attention(queries(h), h, h)) to x, with h = norm(x): a fixed number of queries at a time."""
        stage = packed.stage
        level, channels = self._plan.levels[stage.level], stage.out_channels
        num_tokens = level.height * level.width
        offset = level.keys_offset(channels)
        keys = self._arena[offset : offset + num_tokens * channels]
        self._source(packed)(0, level.height, ops.strip_of(keys, level.height, level.width))
        tokens = keys.view(num_tokens, channels)
        (query_weight, query_bias), (out_weight, out_bias) = packed.projections
        num_rows = max(1, ATTENTION_QUERIES // level.width)
        for start in range(0, level.height, num_rows):
            end = min(start + num_rows, level.height)
            queries = ops.linear(tokens[start * level.width : end * level.width], query_weight, query_bias)
            mixed = ops.linear(ops.attend(queries, tokens), out_weight, out_bias)
            added = ops.strip_of(mixed.flatten(), end - start, level.width)
            for first, last, x in self._segments(level, "x", channels, start, end):
                x.add_(added[:, :, first - start : last - start])
                self._note(stage.name, x)
        if stage.has_statistics:
            for start, end in level.strips:
                x = self._strip(level, start, end, "x", channels)
                for first, last in level.row_blocks(start, end):
                    statistics.add(x[:, :, first - start : last - start])

    def _note(self, name: str | None, values: Tensor) -> None:
        if self._peaks is not None and name is not None:
            self._peaks[name] = max(self._peaks.get(name, 0.0), float(values.abs().amax()))

    def _window(self, packed: PackedStage) -> "_Window":
        stage = packed.stage
        source, target = self._plan.levels[stage.source_level], self._plan.levels[stage.level]
        num_rows, _, _ = window_shape(stage, source, target)
        width = source.width + (stage.kind == "down")
        num_elements = num_rows * width * (stage.in_channels + packed.has_ones)
        memory = self._arena[self._plan.window_offset : self._plan.window_offset + num_elements]
        rows = ops.strip_of(memory, num_rows, width)
        rows[..., source.width :].zero_()
        return _Window(rows, source.height, source.width, self._source(packed))

    def _source(self, packed: PackedStage) -> Callable[[int, int, Tensor], None]:
        """What puts rows start..end of a stage's input into a strip: the image's, or those of x or h, normalised."""
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
                    part.copy_(rows)
                else:
                    ops.normalise(rows, part, norm, mean, variance, has_silu=stage.kind != "attention")

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
        return ops.strip_of(self._arena[offset : offset + num_elements], end - start, level.width)


class _Window:
    """The rows that a strip is made of; what two strips share is read once, so that its source may be gone."""

    def __init__(self, rows: Tensor, height: int, width: int, read: Callable[[int, int, Tensor], None]) -> None:
        self._rows, self._height, self._width, self._read = rows, height, width, read
        self._start = self._end = -1  # no strip begins above the row that pads the border

    def read(self, start: int, end: int) -> Tensor:
        """Rows start..end, zeros beyond the border."""
        shift, num_kept = start - self._start, max(0, self._end - start)
        if num_kept:
            kept = self._rows[:, :, shift : shift + num_kept]
            self._rows[:, :, :num_kept].copy_(kept if shift >= num_kept else kept.clone())
        self._start, self._end = start, end
        first, last = max(start + num_kept, 0), min(end, self._height)
        self._rows[:, :, num_kept : first - start].zero_()
        if first < last:
            self._read(first, last, self._rows[:, :, first - start : last - start, : self._width])
        self._rows[:, :, max(last, first) - start : end - start].zero_()
        return self._rows[:, :, : end - start]


def _upsample(packed: PackedStage, rows: Tensor, target: Tensor, call_rows: int) -> None:
    """Even and odd rows and columns of the target, each from its own 2x2 neighbourhoods of the small image."""
    num_rows, width = target.shape[2] // 2, target.shape[3] // 2
    for parity, convolution in enumerate(packed.convolutions):
        made = convolution(rows[:, :, parity : parity + num_rows + 1], call_rows // 2)
        even, odd = torch.split(made, packed.stage.out_channels, 1)
        target[:, :, parity::2, 0::2].copy_(even[..., :width])
        target[:, :, parity::2, 1::2].copy_(odd[..., 1:])
