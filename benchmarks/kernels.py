#!/usr/bin/env python
"""The operations of Stable Diffusion's VAE one by one: the library's convolutions, and the engine's kernels on a strip.

    benchmarks/kernels.py [--size 512] [--device cuda] [--dtype fp16] [--batch-size 1] [--rounds 5] [--write]

Triton's kernels run beside torch's, in turns: one that does not win is to be deleted. Compare TFLOP/s with the roofline
of `sdvae bench`, GB/s with the memory's. With --write, results/kernels-<device>-<dtype>.json.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from common import write_result
from torch import Tensor

from sdvae.bench.timing import in_turns, median_seconds
from sdvae.config import FAMILIES
from sdvae.engine import ops
from sdvae.engine.kernels import Kernels, Norm
from sdvae.engine.levels import Level
from sdvae.engine.plan import make_plan
from sdvae.engine.precision import DTYPES
from sdvae.engine.program import choose_kernels
from sdvae.engine.stages import KERNEL_PX, Network, Stage, build_network


@dataclass(frozen=True)
class Shape:
    """A convolution: channels, kernel and stride, and the size of what it writes."""

    in_channels: int
    out_channels: int
    kernel_px: int
    stride: int
    height: int
    width: int

    def __str__(self) -> str:
        stride = "/2" if self.stride == 2 else ""
        channels = f"{self.in_channels} > {self.out_channels}"
        return f"{channels}, {self.kernel_px}x{self.kernel_px}{stride}, {self.width}x{self.height}"

    @property
    def flops(self) -> int:
        """Multiplications and additions for one image."""
        return 2 * self.height * self.width * self.kernel_px**2 * self.in_channels * self.out_channels


@dataclass(frozen=True)
class Timing:
    """How one operation ran."""

    operation: str
    shape: str
    seconds: float
    tflops: float | None
    gb_per_s: float


def convolutions(network: Network, height: int, width: int) -> list[Shape]:  # size of the input
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
        found.append(Shape(stage.in_channels, out_channels, KERNEL_PX[stage.kind], stride, rows, columns))
        if stage.shortcut:
            found.append(Shape(stage.in_channels, stage.out_channels, 1, 1, rows, columns))
    return list(dict.fromkeys(found))


def time_convolutions(
    network: Network, height: int, width: int, batch_size: int, device: torch.device, dtype: torch.dtype, rounds: int
) -> Iterator[Timing]:
    """Each distinct convolution in NHWC, without bias: cuDNN's on a GPU."""
    is_gpu = device.type == "cuda"
    for shape in convolutions(network, height, width):
        halo = 1 if shape.kernel_px == 2 else 0
        sides = [2 * side + 1 if shape.stride == 2 else side + halo for side in (shape.height, shape.width)]
        x = _nhwc(batch_size, shape.in_channels, *sides, device, dtype)
        weight = _nhwc(shape.out_channels, shape.in_channels, shape.kernel_px, shape.kernel_px, device, dtype)
        padding = 1 if shape.kernel_px == 3 and shape.stride == 1 else 0
        run: Callable[[], Tensor] = partial(F.conv2d, x, weight, stride=shape.stride, padding=padding)
        if is_gpu:
            run = partial(
                torch.ops.aten.cudnn_convolution,
                x, weight, [padding] * 2, [shape.stride] * 2, [1, 1], 1, True, False, True,
            )  # fmt: skip
        num_bytes = x.nbytes + weight.nbytes + run().nbytes
        seconds = median_seconds(run, device, rounds)
        operation = "cudnn_convolution" if is_gpu else "conv2d"
        tflops = batch_size * shape.flops / seconds / 1e12
        yield Timing(operation, str(shape), seconds, tflops, num_bytes / seconds / 1e9)


def time_twins(
    network: Network, height: int, width: int, device: torch.device, dtype: torch.dtype, rounds: int
) -> Iterator[Timing]:
    """Torch's kernels and the device's, on one strip of each distinct shape, in turns."""
    plan = make_plan(network, height, width, dtype.itemsize, is_gpu=device.type != "cpu")
    modules = list(dict.fromkeys([ops, choose_kernels(device)]))
    seen = set()
    for stage in network.stages:
        level = plan.levels[stage.level]
        kind = stage.kind if stage.kind in ("up", "attention") else "conv"
        if stage.target == "output" or (kind, stage.out_channels, stage.level) in seen:
            continue
        seen.add((kind, stage.out_channels, stage.level))
        for operation, (run, num_bytes, flops) in _runs(stage, level, plan.num_queries, device, dtype).items():
            runs = {kernels.NAME: partial(run, kernels) for kernels in modules}
            for each in runs.values():
                each()
            for name, seconds in in_turns(runs, rounds, device).items():
                median_s = statistics.median(seconds)
                tflops = flops / median_s / 1e12 if flops else None
                shape = f"{stage.out_channels}, {level.width}x{level.bounds[1]}"
                yield Timing(f"{operation}, {name}", shape, median_s, tflops, num_bytes / median_s / 1e9)


Run = tuple[Callable[[Kernels], object], int, int]  # what is run, the bytes it moves, its operations


def _runs(stage: Stage, level: Level, num_queries: int, device: torch.device, dtype: torch.dtype) -> dict[str, Run]:
    channels, rows, width = stage.out_channels, level.bounds[1], level.width
    if stage.kind == "attention":
        num_tokens = level.height * width
        keys = torch.randn(num_tokens, channels, device=device).to(dtype)
        queries = keys[:num_queries] * channels**-0.5
        flops = 4 * len(queries) * num_tokens * channels
        return {"attend": (lambda kernels: kernels.attend(queries, keys), 2 * queries.nbytes + keys.nbytes, flops)}
    target, bias = _nhwc(1, channels, rows, width, device, dtype), torch.randn(channels, device=device)
    if stage.kind == "up":
        half = _nhwc(1, 2 * channels, rows // 2, width // 2 + 1, device, dtype)

        def write_upsampled(kernels: Kernels) -> None:
            kernels.write_upsampled(half, half, bias, target, statistics=None)

        return {"write upsampled": (write_upsampled, 2 * half.nbytes + target.nbytes, 0)}
    made = _nhwc(1, channels, rows, width, device, dtype)
    norm = Norm(torch.ones(channels, device=device), bias, 1e-6, 32)

    def write(kernels: Kernels) -> None:
        kernels.write(made, bias, target, adds=True, statistics=kernels.Statistics(level.row_block))

    def normalise(kernels: Kernels) -> None:
        kernels.normalise(made, target, norm, bias, bias.square(), has_silu=True)

    return {"write and count": (write, 3 * made.nbytes, 0), "normalise, SiLU": (normalise, 2 * made.nbytes, 0)}


def _nhwc(n: int, channels: int, height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return (
        torch.randn(n, channels, height, width, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--batch-size", type=int, default=1, help="of the library's convolutions")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    device, dtype = torch.device(chosen.device), DTYPES[chosen.dtype]
    rows = []
    print(f"{'':<69}{'TFLOP/s':>12}")
    for direction, side in (("encode", chosen.size), ("decode", chosen.size // 8)):
        network = build_network(FAMILIES["sd1"], direction)
        timings = list(time_convolutions(network, side, side, chosen.batch_size, device, dtype, chosen.rounds))
        timings += time_twins(network, side, side, device, dtype, chosen.rounds)
        for one in timings:
            tflops = "" if one.tflops is None else f"{one.tflops:.3g}"
            print(f"{one.operation:<26}{one.shape:<34}{one.seconds * 1e3:>9.3f} ms{tflops:>9}{one.gb_per_s:>9.0f} GB/s")
            rows.append({"direction": direction} | asdict(one))
    if chosen.write:
        settings = {"size": chosen.size, "dtype": chosen.dtype, "batch_size": chosen.batch_size}
        print(write_result(f"kernels-{device.type}-{chosen.dtype}", settings | {"kernels": rows}))


if __name__ == "__main__":
    main()
