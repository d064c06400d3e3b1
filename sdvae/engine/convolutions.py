"""Convolutions with packed weights, which a program runs on strips: by cuDNN on GPUs, by oneDNN on CPUs.

On a CPU the weights are packed once for each order that oneDNN's kernels read them in.
"""

import ctypes
from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sdvae.engine import ops
from sdvae.engine.kernels import Kernels, RunningStatistics

_MOST_ORDERS = 2  # of packed weights that are kept: for strips, and for a last strip that is lower


class PackedConvolution(Protocol):
    """What a stage runs: a convolution, its weights, and what is done with the result."""

    @property
    def kernel(self) -> str:
        """What runs it."""

    @property
    def num_bytes(self) -> int:
        """Memory of the weights."""

    def write(self, strip: Tensor, target: Tensor, call_rows: int, statistics: RunningStatistics | None) -> None:
        """Write the convolution of a strip, which has its neighbouring rows, into `target`.

        It makes `call_rows` output rows at a time: a library may sum in another order for another number of rows, and
        the last bits change.
        """


class Convolution:
    """Torch's convolution, on any device; the kernels add the bias. `strip` and `target` may not overlap."""

    _kernels_bias: Tensor | None  # that the library leaves to the kernels

    def __init__(
        self, weight: Tensor, bias: Tensor, kernels: Kernels, stride: int, padding_px: int, adds: bool
    ) -> None:
        """`bias` is fp32; `padding_px` is left and right, for a strip has the rows beyond the image.

        `adds`: the result is added to what the target holds.
        """
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.kernel = "cuDNN" if weight.is_cuda else "torch"
        self.num_bytes = weight.nbytes + bias.nbytes
        self._kernels, self._kernels_bias, self._adds = kernels, bias, adds
        self._kernel_px = weight.shape[2]
        self._stride, self._padding = [stride, stride], [0, padding_px]

    def write(self, strip: Tensor, target: Tensor, call_rows: int, statistics: RunningStatistics | None) -> None:
        """As `PackedConvolution.write`, one block of rows after the other."""
        for first, last, part in self.parts(strip, call_rows):
            self._write_part(part, target[:, :, first:last], statistics)

    def make(self, strip: Tensor) -> tuple[Tensor, Tensor | None]:
        """The convolution of a strip, and the bias that is still to be added."""
        return self._apply(strip), self._kernels_bias

    def parts(self, strip: Tensor, call_rows: int) -> Iterator[tuple[int, int, Tensor]]:
        """Blocks of output rows: the first, the last (exclusive), and the rows of the strip that they are made of."""
        stride = self._stride[0]
        num_rows = (strip.shape[2] - self._kernel_px) // stride + 1
        for first in range(0, num_rows, call_rows):
            last = min(first + call_rows, num_rows)
            yield first, last, strip[:, :, first * stride : (last - 1) * stride + self._kernel_px]

    def _write_part(self, part: Tensor, target: Tensor, statistics: RunningStatistics | None) -> None:
        self._kernels.write(self._apply(part), self._kernels_bias, target, adds=self._adds, statistics=statistics)

    def _apply(self, strip: Tensor) -> Tensor:
        if ops.is_emulated(strip):
            exact = F.conv2d(strip.float(), self.weight.float(), None, self._stride, self._padding)
            return exact.to(strip.dtype, memory_format=torch.channels_last)
        return F.conv2d(strip, self.weight, None, self._stride, self._padding)


class OneDnnConvolution(Convolution):
    """The same in oneDNN, with weights in the order that its kernel reads; it adds bias and sum itself."""

    def __init__(
        self, weight: Tensor, bias: Tensor, kernels: Kernels, stride: int, padding_px: int, adds: bool
    ) -> None:
        super().__init__(weight, bias, kernels, stride, padding_px, adds)
        self.kernel = "oneDNN, packed"
        self._library_bias, self._kernels_bias = bias.to(weight.dtype), None
        self._packed: list[Tensor] = []  # one for each order
        self._packed_for: dict[torch.Size, Tensor] = {}  # by the size of the input

    def _write_part(self, part: Tensor, target: Tensor, statistics: RunningStatistics | None) -> None:
        if not self._adds:
            target.zero_()
        torch.ops.mkldnn._convolution_pointwise_.binary(
            target, part, self._weight_for(part), self._library_bias, self._padding, self._stride, [1, 1], 1,
            "add", 1.0, None, [], None,
        )  # fmt: skip
        if statistics is not None:
            statistics.add(target)

    def _apply(self, strip: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(
            strip, self._weight_for(strip), self._library_bias, self._padding, self._stride, [1, 1], 1, "none", [], ""
        )
        return out

    def _weight_for(self, strip: Tensor) -> Tensor:
        """The weights in the order that the kernel reads which oneDNN takes for this size.

        It accepts them in another order, too, but then changes it in each call, which takes longer than a small
        convolution does.
        """
        known = self._packed_for.get(strip.shape)
        if known is None:
            known = self._packed_for[strip.shape] = self._pack(strip)
        return known

    def _pack(self, strip: Tensor) -> Tensor:
        if self._kernel_px == 1:  # a matrix product, whose small weights cost nothing to reorder
            return self.weight
        plain = self._packed[0].to_dense(self._library_bias.dtype) if self._packed else self.weight
        packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            plain, self._padding, self._stride, [1, 1], 1, list(strip.shape)
        )
        for other in self._packed:
            if _have_same_bytes(packed, other):
                return other
        self._packed.append(packed)
        self.weight = packed
        if len(self._packed) > _MOST_ORDERS:
            oldest = self._packed.pop(0)
            self._packed_for = {size: kept for size, kept in self._packed_for.items() if kept is not oldest}
        return packed


class CopiedConvolution:
    """A convolution that is made whole and then copied: the target may be its own strip, in any dtype and order."""

    def __init__(self, convolution: Convolution, kernels: Kernels) -> None:
        self.kernel, self.num_bytes = convolution.kernel, convolution.num_bytes
        self._convolution, self._kernels = convolution, kernels

    def write(self, strip: Tensor, target: Tensor, call_rows: int, statistics: RunningStatistics | None) -> None:
        """As `PackedConvolution.write`, after all of it is made."""
        parts = self._convolution.parts(strip, call_rows)
        made = [(first, last, *self._convolution.make(part)) for first, last, part in parts]
        for first, last, rows, bias in made:
            self._kernels.write(rows, bias, target[:, :, first:last], adds=False, statistics=statistics)


class Upsampling:
    """A folded upsampling: a 2x2 convolution for the even rows of its output, and one for the odd rows."""

    def __init__(self, even: Convolution, odd: Convolution, kernels: Kernels) -> None:
        self.kernel, self.num_bytes = even.kernel, even.num_bytes + odd.num_bytes
        self._even, self._odd, self._kernels = even, odd, kernels

    def write(self, strip: Tensor, target: Tensor, call_rows: int, statistics: RunningStatistics | None) -> None:
        """As `PackedConvolution.write`; the target has two rows and columns for each of the strip."""
        step, num_rows = call_rows // 2, target.shape[2] // 2
        for first in range(0, num_rows, step):
            last = min(first + step, num_rows)
            even, biases = self._even.make(strip[:, :, first : last + 1])
            odd, _ = self._odd.make(strip[:, :, first + 1 : last + 2])
            bias = None if biases is None else biases[: target.shape[1]]  # that of even columns, and of odd ones
            self._kernels.write_upsampled(even, odd, bias, target[:, :, 2 * first : 2 * last], statistics=statistics)


def pack(weight: Tensor, bias: Tensor, kernels: Kernels, stride: int, padding_px: int, adds: bool) -> Convolution:
    """The fastest convolution for the kernels, and for the device and dtype of `weight`."""
    is_onednn = kernels is ops and weight.device.type == "cpu" and ops.has_onednn() and not ops.is_emulated(weight)
    return (OneDnnConvolution if is_onednn else Convolution)(weight, bias, kernels, stride, padding_px, adds)


def _have_same_bytes(packed: Tensor, other: Tensor) -> bool:
    """Whether two packings of the same weights have one order, which no function of torch's tells."""
    ours, theirs = (_bytes(each) for each in (packed, other))
    return ours.equal(theirs)


def _bytes(packed: Tensor) -> Tensor:
    """The memory of packed weights."""
    num_bytes, address = torch.ops.mkldnn._nbytes(packed), torch.ops.mkldnn.data_ptr(packed)
    return torch.frombuffer((ctypes.c_char * num_bytes).from_address(address), dtype=torch.uint8)
