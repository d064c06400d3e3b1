"""The kernels in Triton: what a stage does to a strip beside its convolution. Their contract is `kernels.Kernels`.

A strip has its channels side by side; its pixels and rows need not be contiguous.
Sums are made in fp32 and rounded once at the end. Statistics are of one row of pixels at a time, whichever strip it
came in, and nothing is added up by atomics: no plan changes a bit. No function waits for the device or copies from the
host, so a CUDA graph can hold them all. Offsets of rows and tokens have 64 bits; within a row 32 are enough.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdvae.engine.kernels import Norm, RunningStatistics
from sdvae.errors import ShapeError

NAME, ATTENTION = "Triton", "Triton's flash attention"
_jit: Callable[[Callable[..., Any]], Any] = triton.jit
_FUSED = {"enable_fp_fusion": True}  # a product and a sum, rounded once: said, for Triton 3.10 has another default
_ROW_TILE, _ROW_CHANNELS = 2048, 32  # of a program that goes along a row: narrow, for a strip has few rows
_NORM_TILE, _NORM_CHANNELS = 4096, 128
_MERGE_ELEMENTS = 2048
_QUERIES = 64  # of a program: their sums over 512 channels take half of the registers that 8 warps have
_ATTENTION_PROGRAMS = 128  # that should run at once: an H200 has 132 multiprocessors, and each holds one
_SPLIT_KEYS = 512  # for a program at least, or the merge costs what the split gains
_LOG2_E = tl.constexpr(1.4426950408889634)


class Statistics:
    """Mean and variance of each group of channels, over all rows of pixels that were added.

    Each row gives a mean and squared distances from it for each channel (Welford 1962); these are merged in fp64, from
    the first row to the last (Chan, Golub, LeVeque 1979). All rows have one width.
    """

    def __init__(self, row_block: int) -> None:
        """`row_block` is for the torch twin; here sums are always of one row of pixels."""
        self._width = 0
        self._parts: list[Tensor] = []  # (2, rows, C): means and squared distances

    def add(self, rows: Tensor) -> None:  # (1, C, rows, W)
        """Add a strip. It is rewritten in place: this is too rare for a kernel of its own."""
        write(rows, None, rows, adds=False, statistics=self)

    def merge(self, num_groups: int) -> tuple[Tensor, Tensor]:  # both (C,) fp32, equal within a group
        """Mean and variance of the group that each channel belongs to."""
        parts = torch.cat(self._parts, 1)
        _, num_rows, num_channels = parts.shape
        mean, variance = torch.empty((2, num_channels), dtype=torch.float32, device=parts.device)
        group = num_channels // num_groups
        block_c = triton.next_power_of_2(group)
        _merge_rows[(num_groups,)](
            *parts, mean, variance, self._width, num_rows, num_channels, group,
            block_rows=_MERGE_ELEMENTS // block_c, block_c=block_c, **_FUSED,
        )  # fmt: skip
        return mean, variance

    def part_of(self, rows: Tensor, device: torch.device) -> Tensor:  # -> (2, rows, C)
        """Room for what a kernel finds in a strip."""
        _, num_channels, num_rows, self._width = rows.shape
        part = torch.empty((2, num_rows, num_channels), dtype=torch.float32, device=device)
        self._parts.append(part)
        return part


def write(
    made: Tensor, bias: Tensor | None, target: Tensor, *, adds: bool, statistics: RunningStatistics | None
) -> None:
    """Write the result of a convolution, plus its bias, into `target`, or add it; round once."""
    _write(made, made, bias, target, statistics, adds=adds, num_phases=1)


def write_upsampled(
    even: Tensor, odd: Tensor, bias: Tensor | None, target: Tensor, *, statistics: RunningStatistics | None
) -> None:
    """The same for the even and odd rows of a folded upsampling, both (1, 2C, rows, W + 1) -> (1, C, 2 rows, 2W).

    The first C channels are even columns, the others odd columns, which begin one column later.
    """
    _write(even, odd, bias, target, statistics, adds=False, num_phases=2)


def _device(rows: Tensor) -> torch.device:
    """Where kernels run that read `rows`: those in pinned memory are the host's, but a GPU reaches them."""
    return torch.device("cuda") if rows.is_pinned() else rows.device


def _write(
    even: Tensor,
    odd: Tensor,
    bias: Tensor | None,
    target: Tensor,
    statistics: RunningStatistics | None,
    *,
    adds: bool,
    num_phases: int,
) -> None:
    if _strides(even) != _strides(odd):
        raise ShapeError(f"even rows lie {_strides(even)} elements apart, odd ones {_strides(odd)}; make them alike")
    _, num_channels, num_rows, width = target.shape
    width //= num_phases
    block_c = min(_ROW_CHANNELS, triton.next_power_of_2(num_channels))
    block_w = min(_ROW_TILE // block_c, triton.next_power_of_2(width))  # whatever the strip: sums depend on it
    means, squares = None, None
    if statistics is not None:
        assert isinstance(statistics, Statistics)  # not of another module
        means, squares = statistics.part_of(target, _device(even))
    _write_rows[(num_rows, triton.cdiv(num_channels, block_c))](
        even, odd, bias, target, means, squares, *_strides(even), *_strides(target), width, num_channels,
        adds=adds, num_phases=num_phases, block_w=block_w, block_c=block_c, num_warps=8, **_FUSED,
    )  # fmt: skip


def normalise(rows: Tensor, out: Tensor, norm: Norm, mean: Tensor, variance: Tensor, *, has_silu: bool) -> None:
    """GroupNorm from known statistics, then SiLU, into `out`: rounded once."""
    _, num_channels, num_rows, width = rows.shape
    block_c = min(_NORM_CHANNELS, triton.next_power_of_2(num_channels))
    block_w = min(_NORM_TILE // block_c, triton.next_power_of_2(width))
    num_tiles = triton.cdiv(width, block_w)
    _normalise_tile[(num_rows * num_tiles, triton.cdiv(num_channels, block_c))](
        rows, out, norm.weight, norm.bias, mean, variance, *_strides(rows), *_strides(out), num_tiles, width,
        num_channels, norm.eps, has_silu=has_silu, block_w=block_w, block_c=block_c, **_FUSED,
    )  # fmt: skip


def attend(queries: Tensor, keys: Tensor) -> Tensor:  # (n, C), (m, C) -> (n, C)
    """Each query's mean of the keys, weighted by softmax(query . key); no score leaves its multiprocessor.

    Where queries are too few to fill the device, the keys are split among several programs, and their means merged.
    """
    queries, keys = queries.contiguous(), keys.contiguous()
    num_queries, num_channels = queries.shape
    tile = _attention_tile(queries)
    num_blocks = triton.cdiv(num_queries, tile["block_n"])
    num_splits = max(1, min(_ATTENTION_PROGRAMS // num_blocks, len(keys) // _SPLIT_KEYS))
    split_keys = tile["block_m"] * triton.cdiv(triton.cdiv(len(keys), num_splits), tile["block_m"])
    num_splits = triton.cdiv(len(keys), split_keys)
    dtype = queries.dtype if num_splits == 1 else torch.float32
    parts = torch.empty((num_splits, num_queries, num_channels), dtype=dtype, device=queries.device)
    weights = torch.empty((num_splits, num_queries), dtype=torch.float32, device=queries.device)
    _attend_block[(num_blocks, num_splits)](
        queries, keys, parts, weights, num_queries, len(keys), split_keys, num_channels, **tile, **_FUSED
    )
    if num_splits == 1:
        return parts[0]
    out = torch.empty_like(queries)
    _merge_splits[(num_queries,)](
        parts, weights, out, num_queries, num_splits, num_channels, triton.next_power_of_2(num_channels), **_FUSED
    )
    return out


def _attention_tile(queries: Tensor) -> dict[str, int]:
    """Queries and keys of a program: as many keys as its shared memory holds twice, one tile on its way."""
    block_c = max(16, triton.next_power_of_2(queries.shape[1]))
    if queries.dtype == torch.float32:  # which tensor cores do not multiply
        return {"block_n": 16, "block_m": 16, "block_c": block_c, "num_warps": 8, "num_stages": 1}
    capability, shared_bytes = _device_limits(queries.device)
    num_tokens = shared_bytes // (block_c * queries.element_size())
    num_kept = _QUERIES * (2 if capability >= (10, 0) else 1)  # Triton stages as much again on Blackwell
    block_m = next((num_keys for num_keys in (64, 32) if num_kept + 2 * num_keys <= num_tokens), 16)
    return {"block_n": _QUERIES, "block_m": block_m, "block_c": block_c, "num_warps": 8, "num_stages": 2}


def _device_limits(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and the shared memory of a program; the interpreter has an H200's."""
    if device.type != "cuda":
        return (9, 0), 232448
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return torch.cuda.get_device_capability(device), properties["max_shared_mem"]


def _strides(strip: Tensor) -> tuple[int, int]:
    """How many elements lie from row to row and from pixel to pixel."""
    if strip.stride(1) != 1 and strip.shape[1] > 1:
        raise ShapeError(f"a strip has channels {strip.stride(1)} elements apart; make it channels_last")
    return strip.stride(2), strip.stride(3)


@_jit
def _write_rows(
    even: tl.tensor, odd: tl.tensor, bias: tl.tensor, target: tl.tensor, means: tl.tensor, squares: tl.tensor,
    made_row: tl.tensor, made_pixel: tl.tensor, target_row: tl.tensor, target_pixel: tl.tensor, width: tl.tensor,
    num_channels: tl.tensor,
    adds: tl.constexpr, num_phases: tl.constexpr, block_w: tl.constexpr, block_c: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * block_c + tl.arange(0, block_c)
    is_channel = channels < num_channels
    if bias is not None:
        offset = tl.load(bias + channels, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    positions = tl.arange(0, block_w)
    made = even
    if row % num_phases == 1:
        made = odd
    source = made + row // num_phases * made_row + channels[None, :]
    place = target + row * target_row + channels[None, :]
    num_seen = 0.0
    mean = tl.zeros((block_w, block_c), tl.float32)  # of what was seen at each position of the tile
    square = tl.zeros((block_w, block_c), tl.float32)
    for start in range(0, width, block_w):
        columns = start + positions
        is_inside = (columns < width)[:, None] & is_channel[None, :]
        for phase in tl.static_range(num_phases):
            at = source + (phase * num_channels + (columns + phase) * made_pixel)[:, None]
            total = tl.load(at, mask=is_inside, other=0.0).to(tl.float32)
            if bias is not None:
                total += offset
            at = place + ((columns * num_phases + phase) * target_pixel)[:, None]
            if adds:
                total += tl.load(at, mask=is_inside, other=0.0).to(tl.float32)
            written = total.to(target.dtype.element_ty)
            tl.store(at, written, mask=is_inside)
            if means is not None:
                num_seen += 1.0
                distance = tl.where(is_inside, written.to(tl.float32) - mean, 0.0)
                mean += distance * (1.0 / num_seen)
                square += distance * (written.to(tl.float32) - mean)
    if means is not None:
        counts = (num_phases * ((width - positions + block_w - 1) // block_w)).to(tl.float32)[:, None]
        row_mean = tl.sum(counts * mean, 0) / (width * num_phases)
        distance = mean - row_mean[None, :]
        at_part = row * num_channels + channels
        tl.store(means + at_part, row_mean, mask=is_channel)
        tl.store(squares + at_part, tl.sum(square + counts * distance * distance, 0), mask=is_channel)


@_jit
def _merge_rows(
    means: tl.tensor, squares: tl.tensor, mean: tl.tensor, variance: tl.tensor, width: tl.tensor, num_rows: tl.tensor,
    num_channels: tl.tensor, group: tl.tensor,
    block_rows: tl.constexpr, block_c: tl.constexpr,
) -> None:  # fmt: skip
    positions = tl.arange(0, block_c)
    channels = tl.program_id(0) * group + positions
    is_group = positions < group
    total = tl.zeros((block_rows, block_c), tl.float64)
    for start in range(0, num_rows, block_rows):
        rows = start + tl.arange(0, block_rows)
        is_inside = (rows < num_rows)[:, None] & is_group[None, :]
        at = rows.to(tl.int64)[:, None] * num_channels + channels[None, :]
        total += tl.load(means + at, mask=is_inside, other=0.0).to(tl.float64)
    centre = tl.sum(total) / num_rows / group
    total = tl.zeros((block_rows, block_c), tl.float64)
    for start in range(0, num_rows, block_rows):
        rows = start + tl.arange(0, block_rows)
        is_inside = (rows < num_rows)[:, None] & is_group[None, :]
        at = rows.to(tl.int64)[:, None] * num_channels + channels[None, :]
        distance = tl.load(means + at, mask=is_inside, other=0.0).to(tl.float64) - centre
        square = tl.load(squares + at, mask=is_inside, other=0.0).to(tl.float64)
        total += tl.where(is_inside, square + width * distance * distance, 0.0)
    spread = tl.sum(total) / num_rows / group / width
    every = tl.zeros((block_c,), tl.float32)
    tl.store(mean + channels, every + centre.to(tl.float32), mask=is_group)
    tl.store(variance + channels, every + spread.to(tl.float32), mask=is_group)


@_jit
def _normalise_tile(
    rows: tl.tensor, out: tl.tensor, weight: tl.tensor, bias: tl.tensor, mean: tl.tensor, variance: tl.tensor,
    rows_row: tl.tensor, rows_pixel: tl.tensor, out_row: tl.tensor, out_pixel: tl.tensor, num_tiles: tl.tensor,
    width: tl.tensor, num_channels: tl.tensor, eps: tl.tensor,
    has_silu: tl.constexpr, block_w: tl.constexpr, block_c: tl.constexpr,
) -> None:  # fmt: skip
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    columns = tl.program_id(0) % num_tiles * block_w + tl.arange(0, block_w)
    channels = tl.program_id(1) * block_c + tl.arange(0, block_c)
    is_channel = channels < num_channels
    is_inside = (columns < width)[:, None] & is_channel[None, :]
    values = tl.load(rows + row * rows_row + (columns * rows_pixel)[:, None] + channels[None, :], mask=is_inside)
    scale = tl.load(weight + channels, mask=is_channel) * tl.rsqrt(tl.load(variance + channels, mask=is_channel) + eps)
    centre = tl.load(mean + channels, mask=is_channel)
    offset = tl.load(bias + channels, mask=is_channel)
    # First the difference: a mean far from zero would cancel against the offset.
    normed = (values.to(tl.float32) - centre[None, :]) * scale[None, :] + offset[None, :]
    if has_silu:
        normed = normed / (1.0 + tl.exp(-normed))
    at = out + row * out_row + (columns * out_pixel)[:, None] + channels[None, :]
    tl.store(at, normed.to(out.dtype.element_ty), mask=is_inside)


@_jit
def _attend_block(
    queries: tl.tensor, keys: tl.tensor, parts: tl.tensor, weights: tl.tensor, num_queries: tl.tensor,
    num_keys: tl.tensor, split_keys: tl.tensor,
    num_channels: tl.constexpr, block_n: tl.constexpr, block_m: tl.constexpr, block_c: tl.constexpr,
) -> None:  # fmt: skip
    rows = tl.program_id(0) * block_n + tl.arange(0, block_n)
    channels = tl.arange(0, block_c)
    is_row = (rows < num_queries)[:, None] & (channels < num_channels)[None, :]
    at_row = rows.to(tl.int64)[:, None] * num_channels + channels[None, :]
    query = tl.load(queries + at_row, mask=is_row, other=0.0)
    first = tl.program_id(1) * split_keys
    num_own = tl.minimum(split_keys, num_keys - first)
    positions = tl.arange(0, block_m)
    at_key = positions[:, None] * num_channels + channels[None, :]
    highest = tl.full((block_n,), float("-inf"), tl.float32)
    total = tl.zeros((block_n,), tl.float32)
    mixed = tl.zeros((block_n, block_c), tl.float32)
    for start in range(0, num_own, block_m):
        is_key = start + positions < num_own
        at = (first + start).to(tl.int64) * num_channels + at_key
        key = tl.load(keys + at, mask=is_key[:, None] & (channels < num_channels)[None, :], other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * _LOG2_E
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        raised = tl.maximum(highest, tl.max(scores, 1))
        shares = tl.exp2(scores - raised[:, None])
        faded = tl.exp2(highest - raised)
        total = total * faded + tl.sum(shares, 1)
        mixed = tl.dot(shares.to(key.dtype), key, mixed * faded[:, None], input_precision="ieee")
        highest = raised
    split = tl.program_id(1).to(tl.int64) * num_queries
    tl.store(parts + split * num_channels + at_row, (mixed / total[:, None]).to(parts.dtype.element_ty), mask=is_row)
    tl.store(weights + split + rows, highest + tl.log2(total), mask=rows < num_queries)


@_jit
def _merge_splits(
    parts: tl.tensor, weights: tl.tensor, out: tl.tensor, num_queries: tl.tensor, num_splits: tl.tensor,
    num_channels: tl.tensor,
    block_c: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, block_c)
    is_channel = channels < num_channels
    highest = float("-inf")
    total = 0.0
    mixed = tl.zeros((block_c,), tl.float32)
    for split in range(num_splits):
        at = split * num_queries + row
        weight = tl.load(weights + at)
        raised = tl.maximum(highest, weight)
        share = tl.exp2(weight - raised)
        faded = tl.exp2(highest - raised)
        total = total * faded + share
        mixed = mixed * faded + share * tl.load(parts + at * num_channels + channels, mask=is_channel, other=0.0)
        highest = raised
    tl.store(out + row * num_channels + channels, (mixed / total).to(out.dtype.element_ty), mask=is_channel)
