"""The Inception-v3 of FID (Heusel et al. 2017): TensorFlow's of 2015-12-05, under the names of its torch conversion.

It differs from torchvision's: means over pooled windows leave the padding out, and the last block takes the maximum.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvae.perceptual import files

NUM_FEATURES = 2048
SIDE_PX = 299

Kernel = int | tuple[int, int]
Step = tuple[str, int, Kernel]  # name, outputs, kernel
# A branch: its pooling or none, its convolutions, and the two that go side by side at its end, if any.
Branch = tuple[str, Sequence[Step], Sequence[Step]]


def _chain(name: str, *steps: tuple[int, Kernel]) -> list[Step]:
    return [(f"{name}_{number}", outputs, kernel) for number, (outputs, kernel) in enumerate(steps, 1)]


def _block_a(pooled: int) -> list[Branch]:
    return [
        ("", [("branch1x1", 64, 1)], []),
        ("", _chain("branch5x5", (48, 1), (64, 5)), []),
        ("", _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3)), []),
        ("mean", [("branch_pool", pooled, 1)], []),
    ]


def _block_c(narrow: int) -> list[Branch]:
    wide, tall = (1, 7), (7, 1)
    return [
        ("", [("branch1x1", 192, 1)], []),
        ("", _chain("branch7x7", (narrow, 1), (narrow, wide), (192, tall)), []),
        ("", _chain("branch7x7dbl", (narrow, 1), (narrow, tall), (narrow, wide), (narrow, tall), (192, wide)), []),
        ("mean", [("branch_pool", 192, 1)], []),
    ]


def _block_e(pooling: str) -> list[Branch]:
    return [
        ("", [("branch1x1", 320, 1)], []),
        ("", _chain("branch3x3", (384, 1)), _fork("branch3x3_2")),
        ("", _chain("branch3x3dbl", (448, 1), (384, 3)), _fork("branch3x3dbl_3")),
        (pooling, [("branch_pool", 192, 1)], []),
    ]


def _fork(name: str) -> list[Step]:
    return [(f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))]


# The last convolution of each branch here has stride 2 and no padding; the pooling, too.
_BLOCK_B: list[Branch] = [
    ("", [("branch3x3", 384, 3)], []),
    ("", _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3)), []),
    ("max", [], []),
]
_BLOCK_D: list[Branch] = [
    ("", _chain("branch3x3", (192, 1), (320, 3)), []),
    ("", _chain("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)), []),
    ("max", [], []),
]

_BLOCKS: Mapping[str, tuple[list[Branch], bool]] = {  # whether it halves the image
    "Mixed_5b": (_block_a(32), False), "Mixed_5c": (_block_a(64), False), "Mixed_5d": (_block_a(64), False),
    "Mixed_6a": (_BLOCK_B, True),
    "Mixed_6b": (_block_c(128), False), "Mixed_6c": (_block_c(160), False), "Mixed_6d": (_block_c(160), False),
    "Mixed_6e": (_block_c(192), False),
    "Mixed_7a": (_BLOCK_D, True),
    "Mixed_7b": (_block_e("mean"), False), "Mixed_7c": (_block_e("max"), False),
}  # fmt: skip


class Inception(nn.Module):
    """The network up to its last mean: what FID and KID compare."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        channels = 192
        for name, (branches, is_halving) in _BLOCKS.items():
            block = _Mixed(channels, branches, is_halving)
            self.add_module(name, block)
            channels = block.out_channels

    @classmethod
    def load(cls) -> "tuple[Inception, files.Loaded]":
        """The published network and its file; MissingNetwork where it is not on this machine."""
        loaded = files.read("fid-inception")
        network = cls()
        files.fill(network, loaded.tensors, loaded.file)
        return network.eval().requires_grad_(False), loaded

    def forward(self, levels: Tensor) -> Tensor:  # (N, 3, H, W) in 0..255 -> (N, 2048)
        """The features of images of any size."""
        x = (resize_as_tensorflow1(levels, SIDE_PX) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, 2)
        for name in _BLOCKS:
            x = self.get_submodule(name)(x)
        return x.mean((2, 3))


class _Conv(nn.Module):
    """Convolution, batch norm with fixed statistics, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: Kernel, stride: int = 1, padding: int | tuple[int, int] = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = _Norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x))
        return out.relu_()


class _Norm(nn.Module):
    """nn.BatchNorm2d in evaluation, without the count of batches that old files lack."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels, dtype=torch.float32, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-3)  # type: ignore[arg-type]


class _Mixed(nn.Module):
    """Branches side by side, their outputs joined."""

    def __init__(self, channels: int, branches: Sequence[Branch], is_halving: bool) -> None:
        super().__init__()
        self.branches, self.is_halving = branches, is_halving
        self.out_channels = 0
        for _, steps, fork in branches:
            inputs = channels
            for number, (name, outputs, kernel) in enumerate(steps, 1):
                is_last = is_halving and number == len(steps)
                self.add_module(name, _Conv(inputs, outputs, kernel, *((2, 0) if is_last else (1, _same(kernel)))))
                inputs = outputs
            for name, outputs, kernel in fork:
                self.add_module(name, _Conv(inputs, outputs, kernel, 1, _same(kernel)))
            self.out_channels += sum(outputs for _, outputs, _ in fork) or inputs

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part for branch in self.branches for part in self._run(branch, x)], 1)

    def _run(self, branch: Branch, x: Tensor) -> Iterator[Tensor]:
        pooling, steps, fork = branch
        if pooling == "mean":
            x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        elif pooling == "max":
            x = F.max_pool2d(x, 3, 2) if self.is_halving else F.max_pool2d(x, 3, 1, 1)
        for name, _, _ in steps:
            x = self.get_submodule(name)(x)
        if not fork:
            yield x
        for name, _, _ in fork:
            yield self.get_submodule(name)(x)


def _same(kernel: Kernel) -> tuple[int, int]:
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    return height // 2, width // 2


def resize_as_tensorflow1(levels: Tensor, side: int) -> Tensor:  # (N, 3, H, W) -> (N, 3, side, side)
    """Bilinear without antialias, as TensorFlow 1 did it: pixel i of the result is at i * H / side, not at its centre.

    Shrunk images alias; published FIDs were measured so.
    """
    rows, columns = (_between(size, side, levels) for size in levels.shape[2:])
    above, below, down = rows
    left, right, across = columns
    upper, lower = levels[:, :, above], levels[:, :, below]
    top = upper[..., left] + (upper[..., right] - upper[..., left]) * across
    bottom = lower[..., left] + (lower[..., right] - lower[..., left]) * across
    return top + (bottom - top) * down[:, None]


def _between(size: int, side: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each pixel of the result: the two it lies between, and how far from the first."""
    place = torch.arange(side, device=like.device, dtype=torch.float32) * torch.tensor(
        size / side, dtype=torch.float32, device=like.device
    )
    before = place.long()
    return before, (before + 1).clamp_max(size - 1), (place - before).to(like.dtype)
