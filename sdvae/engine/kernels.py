"""What a set of kernels must have: `ops` has it in torch, `triton_ops` in Triton, and mypy holds both to it.

A strip is `(1, C, rows, W)` in channels_last memory: rows lie one after the other, and so do strips.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """The weights of a GroupNorm, in fp32, and how many groups share their statistics."""

    weight: Tensor
    bias: Tensor
    eps: float
    num_groups: int


class RunningStatistics(Protocol):
    """Mean and variance of each group of channels, over all rows that were added."""

    def add(self, rows: Tensor) -> None:  # (1, C, rows, W)
        """Add a strip."""

    def merge(self, num_groups: int) -> tuple[Tensor, Tensor]:  # both (C,) fp32, equal within a group
        """Mean and variance of the group that each channel belongs to."""


class Kernels(Protocol):
    """A module of kernels; `statistics` are of the same module."""

    NAME: str
    ATTENTION: str

    def Statistics(self, row_block: int) -> RunningStatistics:  # noqa: N802
        """Statistics that are summed over `row_block` rows at a time, whatever the strips."""

    def write(
        self, made: Tensor, bias: Tensor | None, target: Tensor, *, adds: bool, statistics: RunningStatistics | None
    ) -> None:  # (1, C, rows, W)
        """Write the result of a convolution, plus its bias, into `target`, or add it; round once."""

    def write_upsampled(
        self, even: Tensor, odd: Tensor, bias: Tensor | None, target: Tensor, *, statistics: RunningStatistics | None
    ) -> None:  # both (1, 2C, rows, W + 1) -> (1, C, 2 rows, 2W)
        """The same for the even and odd rows of a folded upsampling.

        The first C channels are even columns, the others odd columns, which begin one column later.
        """

    def normalise(
        self, rows: Tensor, out: Tensor, norm: Norm, mean: Tensor, variance: Tensor, *, has_silu: bool
    ) -> None:
        """GroupNorm from known statistics, then SiLU, into `out`."""

    def attend(self, queries: Tensor, keys: Tensor) -> Tensor:  # (n, C), (m, C) -> (n, C)
        """The mean of the keys for each query, weighted by softmax(query . key)."""
