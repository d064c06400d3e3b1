"""The engine's kernels on the strips of a network, each beside its twin in torch: which of them earn their place."""

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sdvae.bench.kernels import KernelTiming
from sdvae.bench.timing import in_turns
from sdvae.engine import ops
from sdvae.engine.kernels import Kernels, Norm
from sdvae.engine.plan import Level, make_plan
from sdvae.engine.precision import DTYPES
from sdvae.engine.program import choose_kernels
from sdvae.engine.stages import Network, Stage

_NUM_GROUPS = 32


def time_twins(
    network: Network, height: int, width: int, device: torch.device, dtype: str, rounds: int
) -> list[KernelTiming]:
    """Each function of `ops` and of the device's kernels, on one strip of each distinct shape, in turns."""
    element = DTYPES[dtype]
    plan = make_plan(network, height, width, element.itemsize, is_gpu=device.type != "cpu")
    sets = list(dict.fromkeys([ops, choose_kernels(device)]))
    timings = []
    seen = set()
    for stage in network.stages:
        level = plan.levels[stage.level]
        kind = stage.kind if stage.kind in ("up", "attention") else "conv"
        if stage.target == "output" or (kind, stage.out_channels, stage.level) in seen:
            continue
        seen.add((kind, stage.out_channels, stage.level))
        for name, (run, num_bytes, flops) in _runs(stage, level, plan.num_queries, device, element).items():
            runs = {kernels.NAME: partial(run, kernels) for kernels in sets}
            for each in runs.values():
                each()
            for title, seconds in in_turns(runs, rounds, device).items():
                middle = statistics.median(seconds)
                tflops = flops / middle / 1e12 if flops else None
                shape = f"{stage.out_channels}, {level.width}x{level.bounds[1]}"
                timings.append(KernelTiming(f"{name}, {title}", shape, middle, tflops, num_bytes / middle / 1e9))
    return timings


Run = tuple[Callable[[Kernels], object], int, int]  # what is run, the bytes it moves, its operations


def _runs(stage: Stage, level: Level, num_queries: int, device: torch.device, dtype: torch.dtype) -> dict[str, Run]:
    channels, rows = stage.out_channels, level.bounds[1]

    def strip(channels: int, rows: int, width: int) -> Tensor:
        values = torch.randn(1, channels, rows, width, device=device).to(dtype)
        return values.contiguous(memory_format=torch.channels_last)

    if stage.kind == "attention":
        num_tokens = level.height * level.width
        keys = torch.randn(num_tokens, channels, device=device).to(dtype)
        queries = keys[:num_queries] * channels**-0.5
        flops = 4 * len(queries) * num_tokens * channels
        return {"attend": (lambda kernels: kernels.attend(queries, keys), 2 * queries.nbytes + keys.nbytes, flops)}
    target, bias = strip(channels, rows, level.width), torch.randn(channels, device=device)
    if stage.kind == "up":
        made = strip(2 * channels, rows // 2, level.width // 2 + 1)
        return {
            "write upsampled": (
                lambda kernels: kernels.write_upsampled(made, made, bias, target, statistics=None),
                2 * made.nbytes + target.nbytes,
                0,
            )
        }
    made, out = strip(channels, rows, level.width), strip(channels, rows, level.width)
    norm = Norm(torch.ones(channels, device=device), bias, 1e-6, _NUM_GROUPS)

    def write(kernels: Kernels) -> None:
        kernels.write(made, bias, target, adds=True, statistics=kernels.Statistics(level.row_block))

    def normalise(kernels: Kernels) -> None:
        kernels.normalise(made, out, norm, bias, bias.square(), has_silu=True)

    return {"write and count": (write, 3 * made.nbytes, 0), "normalise, SiLU": (normalise, 2 * made.nbytes, 0)}
