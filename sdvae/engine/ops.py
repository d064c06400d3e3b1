"""What a stage does to a strip, in torch: convolutions, normalisation, statistics, attention.

A strip is `(1, C, rows, W)` in channels_last memory: rows lie one after the other, and so do strips.
On a CPU, convolutions run in oneDNN with weights packed once; its results do not depend on the height of a strip.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

Kernels = ModuleType  # this one, or `triton_ops`, which has the same functions

NAME, ATTENTION = "torch", "torch's scaled_dot_product_attention"
_CORE_CACHE_BYTES = 2**19
_VECTOR_ELEMENTS = 64  # that torch's CPU loops take at a time: two AVX512 registers of bf16


class Convolution:
    """A convolution with fixed weights: torch's own, on any device; what reads its sums adds the bias.

    It makes `call_rows` output rows at a time: the library may choose another order of summation for another number of
    rows, and the last bits with it.
    """

    _kernels_bias: Tensor | None  # that the library leaves for the kernels

    def __init__(self, weight: Tensor, bias: Tensor, stride: int = 1, padding_px: int = 0) -> None:
        """`bias` is fp32; `padding_px` is on the left and on the right; rows beyond the image are part of a strip."""
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.num_bytes = weight.nbytes + bias.nbytes
        self._kernels_bias = bias
        self._kernel_px = weight.shape[2]
        self._stride, self._padding = [stride, stride], [0, padding_px]

    @property
    def kernel(self) -> str:
        """What runs it."""
        return "cuDNN" if self.weight.is_cuda else "torch"

    def write(
        self,
        strip: Tensor,
        target: Tensor,
        call_rows: int,
        kernels: Kernels,
        *,
        adds: bool = False,
        statistics: "Statistics | None" = None,
    ) -> None:
        """Write the convolution of a strip that has its neighbouring rows, or add it; the two may not overlap."""
        for first, last, part in self._parts(strip, call_rows):
            made = self._apply(part)
            kernels.write(made, self._kernels_bias, target[:, :, first:last], adds=adds, statistics=statistics)

    def write_over(self, strip: Tensor, target: Tensor, call_rows: int, kernels: Kernels) -> None:
        """Write it into memory that may be the strip's own, in any dtype and order."""
        made = [(first, last, self._apply(part)) for first, last, part in self._parts(strip, call_rows)]
        for first, last, rows in made:
            kernels.write(rows, self._kernels_bias, target[:, :, first:last], adds=False, statistics=None)

    def make(self, strip: Tensor) -> tuple[Tensor, Tensor | None]:
        """The convolution of a strip, and the bias that it still lacks."""
        return self._apply(strip), self._kernels_bias

    def _parts(self, strip: Tensor, call_rows: int) -> Iterator[tuple[int, int, Tensor]]:
        """Blocks of output rows, and the rows of the strip that they are made of."""
        stride = self._stride[0]
        num_rows = (strip.shape[2] - self._kernel_px) // stride + 1
        for first in range(0, num_rows, call_rows):
            last = min(first + call_rows, num_rows)
            yield first, last, strip[:, :, first * stride : (last - 1) * stride + self._kernel_px]

    def _apply(self, strip: Tensor) -> Tensor:
        if _is_emulated(strip):
            exact = F.conv2d(strip.float(), self.weight.float(), None, self._stride, self._padding)
            return exact.to(strip.dtype, memory_format=torch.channels_last)
        return F.conv2d(strip, self.weight, None, self._stride, self._padding)


class OneDnnConvolution(Convolution):
    """The same in oneDNN, with weights in the order its kernel reads them, the bias and the sum in the kernel."""

    kernel = "oneDNN, packed"

    def __init__(self, weight: Tensor, bias: Tensor, stride: int = 1, padding_px: int = 0) -> None:
        super().__init__(weight, bias, stride, padding_px)
        if self._kernel_px > 1:  # without knowing the strip's size, oneDNN packs 1x1 for another kernel than it takes
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, self._padding, self._stride, [1, 1], 1, None
            )
        self._library_bias, self._kernels_bias = bias.to(weight.dtype), None

    def write(
        self,
        strip: Tensor,
        target: Tensor,
        call_rows: int,
        kernels: Kernels,
        *,
        adds: bool = False,
        statistics: "Statistics | None" = None,
    ) -> None:
        """As the base's, in the target's memory."""
        if not adds:
            target.zero_()
        for first, last, part in self._parts(strip, call_rows):
            rows = target[:, :, first:last]
            torch.ops.mkldnn._convolution_pointwise_.binary(
                rows, part, self.weight, self._library_bias, self._padding, self._stride, [1, 1], 1,
                "add", 1.0, None, [], None,
            )  # fmt: skip
        if statistics is not None:
            statistics.add(target)

    def _apply(self, strip: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(
            strip, self.weight, self._library_bias, self._padding, self._stride, [1, 1], 1, "none", [], ""
        )
        return out


class Upsampling:
    """A folded upsampling: a 2x2 convolution for the even rows of its output, one for the odd rows."""

    def __init__(self, even: Convolution, odd: Convolution) -> None:
        self._even, self._odd = even, odd
        self.kernel, self.num_bytes = even.kernel, even.num_bytes + odd.num_bytes

    def write(
        self,
        strip: Tensor,
        target: Tensor,
        call_rows: int,
        kernels: Kernels,
        *,
        adds: bool = False,
        statistics: "Statistics | None" = None,
    ) -> None:
        """As a convolution's, where the target has two rows and columns for each of the strip's; it is not added to."""
        assert not adds
        step, num_rows = call_rows // 2, target.shape[2] // 2
        for first in range(0, num_rows, step):
            last = min(first + step, num_rows)
            even, biases = self._even.make(strip[:, :, first : last + 1])
            odd, _ = self._odd.make(strip[:, :, first + 1 : last + 2])
            bias = None if biases is None else biases[: target.shape[1]]  # that of even columns, and of odd ones
            kernels.write_upsampled(even, odd, bias, target[:, :, 2 * first : 2 * last], statistics=statistics)


def pack(weight: Tensor, bias: Tensor, stride: int = 1, padding_px: int = 0) -> Convolution:
    """The fastest convolution there is for the device and dtype of `weight`."""
    is_onednn = weight.device.type == "cpu" and not _is_emulated(weight) and _has_onednn()
    return (OneDnnConvolution if is_onednn else Convolution)(weight, bias, stride, padding_px)


@dataclass(frozen=True)
class Norm:
    """The weights of a GroupNorm, in fp32, and how many groups share their statistics."""

    weight: Tensor
    bias: Tensor
    eps: float
    num_groups: int


class Statistics:
    """Mean and variance of each group of channels, over all blocks of rows that were added, in the order they were.

    Each block gives mean and squared distances from it, merged in fp64 (Chan, Golub, LeVeque 1979): never the mean of
    squares minus the square of the mean, which cancels.
    """

    def __init__(self, row_block: int) -> None:
        """`row_block` rows are summed up at a time: the same whatever the strips, which are multiples of it."""
        self._row_block = row_block
        self._counts: list[int] = []
        self._means: list[Tensor] = []
        self._variances: list[Tensor] = []

    def add(self, rows: Tensor) -> None:  # (1, C, rows, W)
        """Count a strip in."""
        for block in torch.split(rows, self._row_block, 2):
            mean, variance = _mean_and_variance(block)
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


def _mean_and_variance(rows: Tensor) -> tuple[Tensor, Tensor]:  # of each channel, fp32
    if rows.device.type == "cpu" and not _is_emulated(rows):  # two passes in one call, without a copy in fp32
        history = torch.zeros(rows.shape[1])  # of a running mean, which is not kept
        return torch.batch_norm_update_stats(rows, history, history, 0.0)
    variance, mean = torch.var_mean(rows.float(), (0, 2, 3), correction=0)
    return mean, variance


def write(
    made: Tensor, bias: Tensor | None, target: Tensor, *, adds: bool, statistics: Statistics | None
) -> None:  # (1, C, rows, W)
    """What a convolution made, and its bias, into `target` or added to it; rounded once, and counted."""
    target.copy_(_total(made, bias, target if adds else None))
    if statistics is not None:
        statistics.add(target)


def write_upsampled(
    even: Tensor, odd: Tensor, bias: Tensor | None, target: Tensor, *, statistics: Statistics | None
) -> None:  # both (1, 2C, rows, W + 1) -> (1, C, 2 rows, 2W)
    """The same for a folded upsampling's even and odd rows: C channels of even columns, then C of odd ones.

    Odd columns begin a column later.
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
    """GroupNorm from known statistics, then SiLU, into `out`: rounded once after each, as torch's own are.

    As many rows at a time as stay in the cache of one core from the one to the other.
    """
    num_rows = max(1, _CORE_CACHE_BYTES // (rows.shape[1] * rows.shape[3] * rows.element_size()))
    for part, target in zip(torch.split(rows, num_rows, 2), torch.split(out, num_rows, 2), strict=True):
        normed = F.batch_norm(part, mean, variance, norm.weight, norm.bias, False, 0.0, norm.eps)
        if has_silu:
            _silu(normed)
        target.copy_(normed)


def _silu(strip: Tensor) -> None:
    """SiLU in place, to the same bits wherever the strip was cut.

    Torch leaves what does not fill a thread's last vectors to scalar code, whose exp differs in the last bit. Where
    that could happen in the middle of a row, each row is a call of its own.
    """
    row_elements = strip.shape[1] * strip.shape[3]
    if strip.device.type != "cpu" or row_elements % (_VECTOR_ELEMENTS * torch.get_num_threads()) == 0:
        F.silu(strip, inplace=True)
    else:
        for row in torch.split(strip, 1, 2):
            F.silu(row, inplace=True)


def linear(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # (n, C) -> (n, C)
    """A matrix product with a bias."""
    if _is_emulated(tokens):
        return F.linear(tokens.float(), weight.float(), bias.float()).to(tokens.dtype)
    return F.linear(tokens, weight, bias)


def attend(queries: Tensor, keys: Tensor) -> Tensor:  # (n, C), (m, C) -> (n, C)
    """Each query's mean of the keys, weighted by softmax(query . key); torch's kernels need memory linear in m."""
    if _is_emulated(queries):
        return attend(queries.float(), keys.float()).to(queries.dtype)
    mixed = F.scaled_dot_product_attention(queries[None, None], keys[None, None], keys[None, None], scale=1.0)
    return mixed[0, 0]


def strip_of(memory: Tensor, rows: int, width: int) -> Tensor:  # (rows * width * C,) -> (1, C, rows, width)
    """A strip that lies in `memory`."""
    return memory.view(1, rows, width, -1).permute(0, 3, 1, 2)


def _is_emulated(values: Tensor) -> bool:
    """Whether a CPU lacks arithmetic in this dtype: fp16 everywhere, bf16 before AVX512. Then fp32 sums are rounded."""
    return values.device.type == "cpu" and (
        values.dtype == torch.float16 or (values.dtype == torch.bfloat16 and not _has_bf16())
    )


@cache
def _has_bf16() -> bool:
    """Whether oneDNN multiplies bf16 on this CPU."""
    return _has_onednn() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
