"""Runs a program; on a GPU, what is asked for a second time is captured as a CUDA graph and replayed."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdvae.engine import ops
from sdvae.engine.arena import allocate
from sdvae.engine.execute import empty_output, execute, execute_image
from sdvae.engine.groups import execute_groups
from sdvae.engine.plan import Plan
from sdvae.engine.program import Program


@dataclass
class _Call:
    """What ran last."""

    program: Program
    plan: Plan
    size: torch.Size  # of its images
    algorithms: tuple[bool, bool]  # whether cuDNN chose them by trial, and whether among deterministic ones
    graph: "_Graph | None" = None


class Executor:
    """Runs the programs of one direction; keeps one graph, that of the last size.

    A graph saves the host some hundred launches an image. Its memory stays reserved until another size comes.
    """

    def __init__(self) -> None:
        self._last: _Call | None = None

    def make_room(self, size: torch.Size) -> None:
        """Forget the graph of another size, so that its memory counts as free."""
        if self._last is not None and self._last.size != size:
            self._last = None

    def run(self, program: Program, plan: Plan, images: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C', H', W') fp32
        """All images through the network, on the device of the program."""
        if plan.group:
            return execute_groups(program, plan, images)
        with torch.cuda.device(program.device) if program.device.type == "cuda" else nullcontext():
            if not _is_repeatable(program, plan):
                return execute(program, plan, images)
            cudnn = torch.backends.cudnn
            now = _Call(program, plan, images.shape[2:], (cudnn.benchmark, cudnn.deterministic))
            if self._last is None or replace(self._last, graph=None) != now:
                self._last = None  # its memory is free before the next is allocated
                out = execute(program, plan, images)
                self._last = now
                return out
            if self._last.graph is None:  # libraries have chosen their algorithms in the first run
                self._last.graph = _Graph(program, plan, images[0])
            out = empty_output(program, plan, len(images))
            for image, target in zip(images, out, strict=True):
                self._last.graph.replay(image, target)
            return out


def _is_repeatable(program: Program, plan: Plan) -> bool:
    """Whether a graph can hold a run: torch's statistics are merged with the host's help."""
    return program.device.type == "cuda" and program.kernels is not ops and not plan.is_on_host


class _Graph:
    """The run of one image, from and to memory of its own."""

    def __init__(self, program: Program, plan: Plan, image: Tensor) -> None:
        with torch.inference_mode(False):  # else no later run, outside of that mode, could write to them
            self._image = torch.empty(image.shape, dtype=torch.float32, device=program.device)
            self._out = empty_output(program, plan, 1)[0]
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()  # of the run before, whose memory a graph cannot use
        with allocate(plan, program.dtype, program.device) as self._memory, torch.cuda.graph(self._graph):
            execute_image(program, plan, self._memory, self._image, self._out)

    def replay(self, image: Tensor, out: Tensor) -> None:
        self._image.copy_(image, non_blocking=True)
        self._graph.replay()
        out.copy_(self._out)
