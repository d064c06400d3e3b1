"""The kernels in torch: what a stage does to a strip beside its convolution. Their contract is `kernels.Kernels`."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sdvae.engine.kernels import Norm, RunningStatistics

NAME, ATTENTION = "torch", "torch's scaled_dot_product_attention"
_CORE_CACHE_BYTES = 2**19
_VECTOR_ELEMENTS = 64  # that torch's CPU loops take at a time: two AVX512 registers of bf16


class Statistics:
    """Mean and variance of each group of channels, over all blocks of rows that were added, in the order they were.

    Each block gives mean and squared distances from it, merged in fp64 (Chan, Golub, LeVeque 1979): never the mean of
    squares minus the square of the mean, which cancels.
    """

    def __init__(self, row_block: int) -> None:
        """`row_block` rows are summed at a time. Strips are multiples of it, so sums do not depend on the strips."""
        self._row_block = row_block
        self._counts: list[int] = []
        self._means: list[Tensor] = []
        self._variances: list[Tensor] = []

    def add(self, rows: Tensor) -> None:  # (1, C, rows, W)
        """Add a strip."""
        history = torch.zeros(rows.shape[1], dtype=torch.float32, device=rows.device)
        for block in torch.split(rows, self._row_block, 2):
            mean, variance = mean_and_variance(block, history)
            self._counts.append(block.shape[2] * block.shape[3])
            self._means.append(mean)
            self._variances.append(variance)

    def merge(self, num_groups: int) -> tuple[Tensor, Tensor]:  # both (C,) fp32, equal within a group
        """Mean and variance of the group that each channel belongs to."""
        counts = torch.tensor(self._counts, dtype=torch.float64, device=self._means[0].device)[:, None, None]
        shape = (len(self._counts), num_groups, -1)
        means = torch.stack(self._means).double().view(shape)
        variances = torch.stack(self._variances).double().view(shape)
        num_channels = means.shape[2]
        total = counts.sum() * num_channels
        mean = (counts * means).sum((0, 2), keepdim=True) / total
        variance = (counts * (variances + (means - mean).square())).sum((0, 2)) / total
        return mean.flatten().float().repeat_interleave(num_channels), variance.float().repeat_interleave(num_channels)


def mean_and_variance(rows: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:  # of each channel, fp32
    """Over all rows (N, C, rows, W); `history` is C zeros, of running means that are not kept."""
    if rows.device.type == "cpu" and not is_emulated(rows):  # two passes in one call, without a copy in fp32
        return torch.batch_norm_update_stats(rows, history, history, 0.0)
    variance, mean = torch.var_mean(rows.float(), (0, 2, 3), correction=0)
    return mean, variance


def write(
    made: Tensor, bias: Tensor | None, target: Tensor, *, adds: bool, statistics: RunningStatistics | None
) -> None:  # (1, C, rows, W)
    """Write the result of a convolution, plus its bias, into `target`, or add it; round once."""
    target.copy_(_total(made, bias, target if adds else None))
    if statistics is not None:
        statistics.add(target)


def write_upsampled(
    even: Tensor, odd: Tensor, bias: Tensor | None, target: Tensor, *, statistics: RunningStatistics | None
) -> None:  # both (1, 2C, rows, W + 1) -> (1, C, 2 rows, 2W)
    """The same for the even and odd rows of a folded upsampling: C channels of even columns, then C of odd ones.

    Odd columns begin one column later.
    """
    for parity, made in enumerate((even, odd)):
        left, right = torch.split(made, target.shape[1], 1)
        target[:, :, parity::2, 0::2].copy_(_total(left[..., :-1], bias))
        target[:, :, parity::2, 1::2].copy_(_total(right[..., 1:], bias))
    if statistics is not None:
        statistics.add(target)


def _total(made: Tensor, bias: Tensor | None, target: Tensor | None = None) -> Tensor:
    if bias is not None:
        made = made.float() + bias.float()[:, None, None]
    return made if target is None else made + target.float()


def normalise(rows: Tensor, out: Tensor, norm: Norm, mean: Tensor, variance: Tensor, *, has_silu: bool) -> None:
    """GroupNorm from known statistics, then SiLU, into `out`; each rounds once, as torch's own do.

    Rows are taken in blocks that stay in the cache of one core between the two.
    """
    num_rows = max(1, _CORE_CACHE_BYTES // (rows.shape[1] * rows.shape[3] * rows.element_size()))
    for part, target in zip(torch.split(rows, num_rows, 2), torch.split(out, num_rows, 2), strict=True):
        normed = F.batch_norm(part, mean, variance, norm.weight, norm.bias, False, 0.0, norm.eps)
        if has_silu:
            _silu(normed)
        target.copy_(normed)


def _silu(strip: Tensor) -> None:
    """SiLU in place; the bits do not depend on where the strip was cut.

    Torch computes the end of each thread's share, if it does not fill a vector, in scalar code whose exp differs in
    the last bit. Where such an end could lie in the middle of a row, each row is a call of its own.
    """
    row_elements = strip.shape[1] * strip.shape[3]
    if strip.device.type != "cpu" or row_elements % (_VECTOR_ELEMENTS * torch.get_num_threads()) == 0:
        F.silu(strip, inplace=True)
    else:
        for row in torch.split(strip, 1, 2):
            F.silu(row, inplace=True)


def linear(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # (n, C) -> (n, C)
    """A matrix product with a bias."""
    if is_emulated(tokens):
        return F.linear(tokens.float(), weight.float(), bias.float()).to(tokens.dtype)
    return F.linear(tokens, weight, bias)


def attend(queries: Tensor, keys: Tensor) -> Tensor:  # (n, C), (m, C) -> (n, C)
    """Each query's mean of the keys, weighted by softmax(query . key); torch's kernels need memory linear in m."""
    if is_emulated(queries):
        return attend(queries.float(), keys.float()).to(queries.dtype)
    mixed = F.scaled_dot_product_attention(queries[None, None], keys[None, None], keys[None, None], scale=1.0)
    return mixed[0, 0]


def strip_of(memory: Tensor, rows: int, width: int) -> Tensor:  # (rows * width * C,) -> (1, C, rows, width)
    """A strip that lies in `memory`."""
    return memory.view(1, rows, width, -1).permute(0, 3, 1, 2)


def fill_border(padded: Tensor, dim: int, border: tuple[int, int]) -> None:
    """Copy what stands beyond the borders along `dim` to the first and the last place of `padded`."""
    for place, source in zip((0, -1), border, strict=True):
        padded.select(dim, place).copy_(padded.select(dim, 1 + source))


def is_emulated(values: Tensor) -> bool:
    """Whether a CPU lacks arithmetic in this dtype: fp16 everywhere, bf16 before AVX512. Then fp32 sums are rounded."""
    return values.device.type == "cpu" and (
        values.dtype == torch.float16 or (values.dtype == torch.bfloat16 and not _has_bf16())
    )


@cache
def _has_bf16() -> bool:
    """Whether oneDNN multiplies bf16 on this CPU."""
    return has_onednn() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_onednn() -> bool:
    """Whether this torch can call oneDNN."""
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
