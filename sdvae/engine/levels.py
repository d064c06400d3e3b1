"""The levels of a network, and what a stage reads and needs of memory on its way from one to another. No torch."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, takewhile

from sdvae.engine.stages import Stage

_SPLIT_TOKENS = 2**14


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

    def keys_offset(self, channels: int) -> int:
        """Where the arena has room for the keys of an attention: before the region, or behind it."""
        return 0 if self.offset >= self.height * self.width * channels else self.end


def input_rows(stage: Stage, start: int, end: int) -> tuple[int, int]:
    """The rows of its source that rows start..end of a stage are made of; they may lie beyond the border."""
    if stage.kind == "down":  # SD pads (0, 1, 0, 1): the stride-2 convolution is asymmetric
        return 2 * start, 2 * end + 1
    if stage.kind == "up":
        return start // 2 - 1, end // 2 + 1
    return start - 1, end + 1


def window_shape(stage: Stage, source: Level, target: Level) -> tuple[int, int, int]:
    """Rows, width and channels of the input of a stage's highest strip, with room for a column and a channel more.

    What stands beyond a border has room, too: two rows, two columns.
    """
    rows = max(end - start for start, end in target.strips)
    first, last = input_rows(stage, 0, rows)
    num_rows, num_columns = (0 if zeros_px else 2 for zeros_px in stage.zeros_px)
    return last - first + num_rows, source.width + max(num_columns, 1), stage.in_channels + 1


def made_elements(stage: Stage, source: Level, target: Level, num_queries: int, is_gpu: bool, is_on_host: bool) -> int:
    """The most that one strip needs beside the arena, for what cannot be made in its place."""
    rows = max(end - start for start, end in target.strips)
    if stage.kind == "attention":
        num_tokens = source.height * source.width
        num_queries = min(num_tokens, max(1, num_queries // source.width) * source.width)
        # Torch's kernel for CPUs packs keys and values; Triton's splits the keys of few queries, and merges in fp32.
        beside = _SPLIT_TOKENS if is_gpu else 2 * num_tokens
        return (3 * num_queries + beside) * stage.out_channels
    if stage.kind == "up":  # even and odd rows, with a column to spare
        return 2 * rows * (source.width + 1) * stage.out_channels
    made = stage.out_channels if is_gpu or stage.shortcut or stage.target == "output" else 0  # oneDNN writes in place
    read = stage.in_channels if is_on_host and stage.shortcut else 0
    return rows * target.width * (made + read)


def whole_elements(stage: Stage, source: Level, target: Level) -> int:
    """The most that a stage of whole images needs at once, for each image."""
    unpadded = _unpadded_elements(stage, source, target)
    if stage.padding == "zeros":
        return unpadded
    return unpadded + (source.height + 2) * (source.width + 2) * (stage.in_channels + 1)  # a padded copy


def _unpadded_elements(stage: Stage, source: Level, target: Level) -> int:
    """The same, but for what the libraries do not pad."""
    read = source.height * source.width * stage.in_channels
    num_px = target.height * target.width
    written = num_px * stage.out_channels
    if stage.kind == "attention":  # x, its norm; queries, means and packed keys and values
        return 2 * read + 4 * written
    if stage.kind == "down":  # a row and a column more
        return read + (source.height + 1) * (source.width + 1) * stage.in_channels + written
    if stage.kind == "up":  # even and odd rows, each with a row and a column to spare
        return read + 4 * (source.height + 1) * (source.width + 1) * stage.out_channels + written
    if stage.source == "input":
        return read + num_px + written  # with a channel of ones
    if stage.source == "h":  # normalised in place, added in place
        return read + written
    return 2 * read + written * (2 if stage.shortcut or stage.target == "output" else 1)  # x, its norm, what is made
