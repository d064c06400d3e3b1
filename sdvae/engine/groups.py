"""Runs a program on groups of whole images: a stage is one call of the library for a group, without windows.

The statistics are those of each image. Groups run apart from each other, on threads. In deterministic plans each group
has one thread and one size, because libraries order their sums by both: the last is filled up with zeros.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sdvae.engine import ops
from sdvae.engine.execute import empty_output
from sdvae.engine.parallel import run_apart, torch_threads
from sdvae.engine.plan import Plan
from sdvae.engine.program import PackedStage, Program
from sdvae.engine.stages import Stage

_UNUSED = torch.empty(0, dtype=torch.float32, device="cpu")  # for statistics that are known
_ALONE_ELEMENTS = 2**18  # of an image, below which a second thread costs more than it does


def execute_groups(program: Program, plan: Plan, images: Tensor) -> Tensor:
    """All images (N, C, H, W) through the network, `plan.group` in each call -> (N, C', H', W') fp32."""
    out = empty_output(program, plan, len(images))
    groups = zip(torch.split(images, plan.group), torch.split(out, plan.group), strict=True)
    work = [partial(_run_group, program, plan, *group) for group in groups]
    num_workers = plan.num_workers(len(images))
    run_apart(work, num_workers, 1 if plan.is_filled else max(1, torch.get_num_threads() // num_workers))
    return out


def _run_group(program: Program, plan: Plan, images: Tensor, out: Tensor) -> None:
    size = plan.group if plan.is_filled else len(images)
    out.copy_(_run(program, plan, _input(program, images, size))[: len(images)])


def _run(program: Program, plan: Plan, images: Tensor) -> Tensor:
    """One group through the network."""
    places = {"input": images}
    for packed in program.stages:
        stage = packed.stage
        source = places[stage.source]
        if packed.norm is not None:
            source = _normalise(packed, plan, source)
        if stage.kind == "attention":
            _attend(packed, source, places["x"])
            continue
        if stage.kind == "down":
            source = F.pad(source, (0, 1, 0, 1))  # SD's stride-2 convolution is asymmetric
        if stage.padding != "zeros":
            source = _pad(stage, source)
        if packed.shortcut is not None:
            places["x"] = packed.shortcut.convolve(places["x"], None)
        assert packed.convolution is not None  # as in all stages but attention
        places[stage.target] = packed.convolution.convolve(source, places.get(stage.target))
        if stage.source != "x":
            del places[stage.source]
    return places["output"]


def _input(program: Program, images: Tensor, size: int) -> Tensor:
    """The images, filled up to `size` with zeros, with a channel of ones where the program has one."""
    first = program.stages[0]
    num_channels = first.stage.in_channels
    shape = (size, num_channels + first.has_ones, *images.shape[2:])
    group = torch.zeros(shape, dtype=program.dtype, device=program.device).to(memory_format=torch.channels_last)
    group[: len(images), :num_channels] = images
    group[:, num_channels:] = 1
    return group


def _normalise(packed: PackedStage, plan: Plan, images: Tensor) -> Tensor:
    """GroupNorm of each image, then SiLU but before an attention; h, which nothing else reads, in place."""
    stage, norm = packed.stage, packed.norm
    assert norm is not None
    out = images if stage.source == "h" else torch.empty_like(images)
    is_small = images.numel() // len(images) < _ALONE_ELEMENTS
    with torch_threads(1 if is_small else torch.get_num_threads()):
        statistics = _statistics(images, plan.levels[stage.source_level].row_block, norm.num_groups)
        for image, target, mean, variance in zip(_singly(images), _singly(out), *statistics, strict=True):
            # Image by image: the ends of a thread's share are rounded otherwise, wherever they lie in a group.
            torch.native_batch_norm(
                image, norm.weight, norm.bias, mean, variance, False, 0.0, norm.eps, out=(target, _UNUSED, _UNUSED)
            )
            if stage.kind != "attention":
                torch.ops.aten.silu_(target)
    return out


def _statistics(images: Tensor, row_block: int, num_groups: int) -> Tensor:  # -> (2, N, C) fp32
    """Mean and variance of the group that each channel belongs to, for each image: of equal blocks of its rows.

    They are merged in fp64, by numpy: a dozen of torch's calls take longer than the sums over a small image.
    """
    num_images, num_channels, height = images.shape[:3]
    history = torch.zeros(num_channels, dtype=torch.float32, device="cpu")
    found = [
        each.numpy()
        for image in _singly(images)
        for block in ([image] if row_block == height else torch.split(image, row_block, 2))
        for each in ops.mean_and_variance(block, history)
    ]
    in_group = num_channels // num_groups
    of_blocks = np.array(found, np.float64).reshape(num_images, -1, 2, num_groups, in_group)
    means, variances = of_blocks[:, :, 0], of_blocks[:, :, 1]
    num_means = means.shape[1] * in_group
    mean = np.add.reduce(means, (1, 3), keepdims=True) / num_means
    merged = np.empty((2, num_images, num_groups, in_group), np.float32)
    merged[0] = mean[:, 0]
    merged[1] = np.add.reduce(variances + (means - mean) ** 2, (1, 3), keepdims=True)[:, 0] / num_means
    return torch.from_numpy(merged).view(2, num_images, num_channels)


def _pad(stage: Stage, images: Tensor) -> Tensor:
    """The images with what stands beyond their borders; zeros are left to the libraries."""
    num_images, num_channels, height, width = images.shape
    rows, columns = stage.border("y", height), stage.border("x", width)
    top, left = int(rows is not None), int(columns is not None)
    size = num_images, num_channels, height + 2 * top, width + 2 * left
    padded = torch.empty(size, dtype=images.dtype, device=images.device, memory_format=torch.channels_last)
    padded[:, :, top : top + height, left : left + width] = images
    if columns is not None:
        ops.fill_border(padded[:, :, top : top + height], 3, columns)
    if rows is not None:
        ops.fill_border(padded, 2, rows)
    return padded


def _singly(images: Tensor) -> Sequence[Tensor]:
    """Each image as a batch of its own."""
    return [images] if len(images) == 1 else torch.split(images, 1)


def _attend(packed: PackedStage, images: Tensor, x: Tensor) -> None:
    """Add the attention of each normalised image to x."""
    queries, out = packed.projections
    for image, target in zip(_singly(images), _singly(x), strict=True):
        tokens = image[0].flatten(1).T
        mixed = ops.linear(ops.attend(ops.linear(tokens, *queries), tokens), *out)
        added = ops.strip_of(mixed.flatten(), *image.shape[2:])
        ops.write(added, None, target, adds=True, statistics=None)
