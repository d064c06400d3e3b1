"""Single kernels: the roofline of a device, and the operations of a network one by one as torch has them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sdvae.bench.timing import median_seconds
from sdvae.engine.precision import DTYPES
from sdvae.engine.stages import KERNEL_PX, Network

_MATMUL_SIDE = {"cuda": 8192, "cpu": 2048}
_NUM_GROUPS = 32


@dataclass(frozen=True)
class Convolution:
    """The shape of a convolution: channels, kernel and stride, and the size of what it writes."""

    in_channels: int
    out_channels: int
    kernel_px: int
    stride: int
    height: int
    width: int

    def flops(self, batch_size: int) -> int:
        """Multiplications and additions."""
        per_px = 2 * self.kernel_px**2 * self.in_channels * self.out_channels
        return batch_size * self.height * self.width * per_px


@dataclass(frozen=True)
class KernelTiming:
    """How one operation ran: compare TFLOP/s with the roofline's, GB/s with the memory's."""

    operation: str
    shape: str
    seconds: float
    tflops: float | None
    gb_per_s: float


def measure_roofline(device: torch.device, dtype: str, rounds: int = 5) -> float:
    """TFLOP/s of a large square matrix product, which no convolution of the same dtype is expected to beat."""
    side = _MATMUL_SIDE.get(device.type, 2048)
    left, right = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    return 2 * side**3 / median_seconds(lambda: left @ right, device, rounds) / 1e12


def convolutions(network: Network, height: int, width: int) -> list[Convolution]:  # size of the input
    """The distinct convolutions of a network. An upsampling's is folded: 2x2, with four outputs a pixel."""
    sizes = network.sizes(height, width)
    found = []
    for stage in network.stages:
        if stage.kind == "attention":
            continue
        is_folded = stage.kind == "up"
        rows, columns = sizes[stage.source_level if is_folded else stage.level]
        out_channels = stage.out_channels * (4 if is_folded else 1)
        stride = 2 if stage.kind == "down" else 1
        found.append(Convolution(stage.in_channels, out_channels, KERNEL_PX[stage.kind], stride, rows, columns))
        if stage.shortcut:
            found.append(Convolution(stage.in_channels, stage.out_channels, 1, 1, rows, columns))
    return list(dict.fromkeys(found))


def time_kernels(
    network: Network, height: int, width: int, batch_size: int, device: torch.device, dtype: str, rounds: int
) -> list[KernelTiming]:
    """Each distinct convolution of a network in NHWC, each GroupNorm, each attention: as torch has them.

    On a GPU the convolution is `aten.cudnn_convolution`, without bias.
    """
    timings = []

    def note(operation: str, shape: str, run: Callable[[], Tensor], flops: int | None, num_bytes: int) -> None:
        seconds = median_seconds(run, device, rounds)
        tflops = None if flops is None else flops / seconds / 1e12
        timings.append(KernelTiming(operation, shape, seconds, tflops, num_bytes / seconds / 1e9))

    def random(*shape: int) -> Tensor:
        values = torch.randn(shape, device=device).to(DTYPES[dtype])
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    operation, convolve = _CONVOLUTION[device.type == "cuda"]
    with torch.no_grad():
        for shape in convolutions(network, height, width):
            strip = random(batch_size, shape.in_channels, *_input_px(shape))
            weight = random(shape.out_channels, shape.in_channels, shape.kernel_px, shape.kernel_px)
            out_elements = batch_size * shape.out_channels * shape.height * shape.width
            note(
                operation,
                f"{shape.in_channels} > {shape.out_channels}, {shape.kernel_px}x{shape.kernel_px}"
                f"{'/2' if shape.stride == 2 else ''}, {shape.width}x{shape.height}",
                partial(convolve, strip, weight, shape),
                shape.flops(batch_size),
                strip.nbytes + weight.nbytes + out_elements * strip.itemsize,
            )
        sizes = network.sizes(height, width)
        norms = {(stage.in_channels, stage.source_level) for stage in network.stages if stage.norm}
        for channels, level in sorted(norms, key=lambda norm: (norm[1], norm[0])):
            x = random(batch_size, channels, *sizes[level])
            num_groups = _NUM_GROUPS if channels % _NUM_GROUPS == 0 else 1
            note(
                "group_norm",
                f"{channels}, {sizes[level][1]}x{sizes[level][0]}",
                partial(F.group_norm, x, num_groups),
                None,
                2 * x.nbytes,
            )
        attentions = {(stage.out_channels, stage.level) for stage in network.stages if stage.kind == "attention"}
        for channels, level in sorted(attentions):
            num_tokens = sizes[level][0] * sizes[level][1]
            tokens = random(batch_size, 1, num_tokens, channels).contiguous()
            note(
                "scaled_dot_product_attention",
                f"{num_tokens} tokens of {channels}",
                partial(F.scaled_dot_product_attention, tokens, tokens, tokens),
                4 * batch_size * num_tokens**2 * channels,
                4 * tokens.nbytes,
            )
    return timings


def _input_px(shape: Convolution) -> tuple[int, int]:
    """The size it reads: with padding on one side where it halves, and on both where its kernel is 3x3."""
    if shape.stride == 2:
        return 2 * shape.height + 1, 2 * shape.width + 1
    halo = 1 if shape.kernel_px == 2 else 0
    return shape.height + halo, shape.width + halo


def _padding(shape: Convolution) -> int:
    return 1 if shape.kernel_px == 3 and shape.stride == 1 else 0


def _torch_convolution(x: Tensor, weight: Tensor, shape: Convolution) -> Tensor:
    return F.conv2d(x, weight, stride=shape.stride, padding=_padding(shape))


def _cudnn_convolution(x: Tensor, weight: Tensor, shape: Convolution) -> Tensor:
    pads, strides = [_padding(shape)] * 2, [shape.stride] * 2
    out: Tensor = torch.ops.aten.cudnn_convolution(x, weight, pads, strides, [1, 1], 1, True, False, True)
    return out


_CONVOLUTION: dict[bool, tuple[str, Callable[[Tensor, Tensor, Convolution], Tensor]]] = {
    False: ("conv2d", _torch_convolution),
    True: ("cudnn_convolution", _cudnn_convolution),
}
