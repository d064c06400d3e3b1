"""Convolutions with packed weights, which a program runs on strips: by cuDNN on GPUs, by oneDNN on CPUs.

On a CPU the weights are packed once for each order that oneDNN's kernels read them in.
"""

import ctypes
import threading
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

    def convolve(self, images: Tensor, target: Tensor | None) -> Tensor:  # (N, C, H, W), channels_last
        """The convolution of whole images, added to `target` where the stage adds."""


class Convolution:
    """Torch's convolution, on any device; the kernels add the bias. `strip` and `target` may not overlap."""

    _kernels_bias: Tensor | None  # that the library leaves to the kernels

    def __init__(
        self, weight: Tensor, bias: Tensor, kernels: Kernels, stride: int, zeros_px: tuple[int, int], adds: bool
    ) -> None:
        """`bias` is fp32; `zeros_px` are the rows and columns of zeros beside an image: a strip has its own rows.

        `adds`: the result is added to what the target holds.
        """
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.kernel = "cuDNN" if weight.is_cuda else "torch"
        self.num_bytes = weight.nbytes + bias.nbytes
        self._kernels, self._kernels_bias, self._adds = kernels, bias, adds
        self._kernel_px = weight.shape[2]
        self._stride, self._padding, self._whole_padding = [stride, stride], [0, zeros_px[1]], list(zeros_px)

    def write(self, strip: Tensor, target: Tensor, call_rows: int, statistics: RunningStatistics | None) -> None:
        """As `PackedConvolution.write`, one block of rows after the other."""
        for first, last, part in self.parts(strip, call_rows):
            self._write_part(part, target[:, :, first:last], statistics)

    def convolve(self, images: Tensor, target: Tensor | None) -> Tensor:
        """As `PackedConvolution.convolve`."""
        made = self._apply(images, self._whole_padding)
        out = target if self._adds and target is not None else torch.empty_like(made)
        self._kernels.write(made, self._kernels_bias, out, adds=self._adds, statistics=None)
        return out

    def make(self, strip: Tensor) -> tuple[Tensor, Tensor | None]:
        """The convolution of a strip, and the bias that is still to be added."""
        return self._apply(strip, self._padding), self._kernels_bias

    def make_whole(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same of whole images."""
        return self._apply(images, self._whole_padding), self._kernels_bias

    def parts(self, strip: Tensor, call_rows: int) -> Iterator[tuple[int, int, Tensor]]:
        """Blocks of output rows: the first, the last (exclusive), and the rows of the strip that they are made of."""
        stride = self._stride[0]
        num_rows = (strip.shape[2] - self._kernel_px) // stride + 1
        for first in range(0, num_rows, call_rows):
            last = min(first + call_rows, num_rows)
            yield first, last, strip[:, :, first * stride : (last - 1) * stride + self._kernel_px]

    def _write_part(self, part: Tensor, target: Tensor, statistics: RunningStatistics | None) -> None:
        made = self._apply(part, self._padding)
        self._kernels.write(made, self._kernels_bias, target, adds=self._adds, statistics=statistics)

    def _apply(self, images: Tensor, padding: list[int]) -> Tensor:
        if ops.is_emulated(images):
            exact = F.conv2d(images.float(), self.weight.float(), None, self._stride, padding)
            return exact.to(images.dtype, memory_format=torch.channels_last)
        return F.conv2d(images, self.weight, None, self._stride, padding)


class OneDnnConvolution(Convolution):
    """The same in oneDNN, with weights in the order that its kernel reads; it adds bias and sum itself."""

    def __init__(
        self, weight: Tensor, bias: Tensor, kernels: Kernels, stride: int, zeros_px: tuple[int, int], adds: bool
    ) -> None:
        super().__init__(weight, bias, kernels, stride, zeros_px, adds)
        self.kernel = "oneDNN, packed"
        self._library_bias, self._kernels_bias = bias.to(weight.dtype), None
        self._packed: list[Tensor] = []  # one for each order
        self._packed_for: dict[tuple[object, ...], Tensor] = {}  # by the size of the input, its padding, and threads
        self._packing = threading.Lock()

    def convolve(self, images: Tensor, target: Tensor | None) -> Tensor:
        """As `PackedConvolution.convolve`."""
        if not self._adds or target is None:
            return self._apply(images, self._whole_padding)
        self._add(images, target, self._whole_padding)
        return target

    def _write_part(self, part: Tensor, target: Tensor, statistics: RunningStatistics | None) -> None:
        if not self._adds:
            target.zero_()
        self._add(part, target, self._padding)
        if statistics is not None:
            statistics.add(target)

    def _add(self, images: Tensor, target: Tensor, padding: list[int]) -> None:
        torch.ops.mkldnn._convolution_pointwise_.binary(
            target, images, self._weight_for(images, padding), self._library_bias, padding, self._stride, [1, 1], 1,
            "add", 1.0, None, [], None,
        )  # fmt: skip

    def _apply(self, images: Tensor, padding: list[int]) -> Tensor:
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(
            images, self._weight_for(images, padding), self._library_bias, padding, self._stride, [1, 1], 1,
            "none", [], "",
        )  # fmt: skip
        return out

    def _weight_for(self, images: Tensor, padding: list[int]) -> Tensor:
        """The weights in the order that the kernel reads which oneDNN takes for this size.

        It accepts them in another order, too, but then changes it in each call, which takes longer than a small
        convolution does.
        """
        size = (images.shape, *padding, torch.get_num_threads())
        known = self._packed_for.get(size)
        if known is None:
            with self._packing:
                known = self._packed_for.get(size)
                if known is None:
                    known = self._packed_for[size] = self._pack(images, padding)
        return known

    def _pack(self, images: Tensor, padding: list[int]) -> Tensor:
        if self._kernel_px == 1:  # a matrix product, whose small weights cost nothing to reorder
            return self.weight
        plain = self._packed[0].to_dense(self._library_bias.dtype) if self._packed else self.weight
        packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            plain, padding, self._stride, [1, 1], 1, list(images.shape)
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

    def convolve(self, images: Tensor, target: Tensor | None) -> Tensor:
        """As `PackedConvolution.convolve`."""
        return self._convolution.convolve(images, target)


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

    def convolve(self, images: Tensor, target: Tensor | None) -> Tensor:
        """As `PackedConvolution.convolve`: with a row above for the even rows, and one below for the odd ones."""
        even, biases = self._even.make_whole(images)
        odd, _ = self._odd.make_whole(images)
        num_images, num_channels, height, width = even.shape
        size = (num_images, num_channels // 2, 2 * (height - 1), 2 * (width - 1))
        out = torch.empty(size, dtype=images.dtype, device=images.device, memory_format=torch.channels_last)
        bias = None if biases is None else biases[: size[1]]
        self._kernels.write_upsampled(even[:, :, :-1], odd[:, :, 1:], bias, out, statistics=None)
        return out


def pack(
    weight: Tensor, bias: Tensor, kernels: Kernels, stride: int, zeros_px: tuple[int, int], adds: bool
) -> Convolution:
    """The fastest convolution for the kernels, and for the device and dtype of `weight`."""
    is_onednn = kernels is ops and weight.device.type == "cpu" and ops.has_onednn() and not ops.is_emulated(weight)
    return (OneDnnConvolution if is_onednn else Convolution)(weight, bias, kernels, stride, zeros_px, adds)


def _have_same_bytes(packed: Tensor, other: Tensor) -> bool:
    """Whether two packings of the same weights have one order, which no function of torch's tells."""
    ours, theirs = (_bytes(each) for each in (packed, other))
    return ours.equal(theirs)


def _bytes(packed: Tensor) -> Tensor:
    """The memory of packed weights."""
    num_bytes, address = torch.ops.mkldnn._nbytes(packed), torch.ops.mkldnn.data_ptr(packed)
    return torch.frombuffer((ctypes.c_char * num_bytes).from_address(address), dtype=torch.uint8)
