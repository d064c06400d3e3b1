"""Runs a program; on a GPU, what is asked for a second time is captured as a CUDA graph and replayed."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdvae.engine import ops
from sdvae.engine.arena import Memory, allocate
from sdvae.engine.execute import empty_output, execute, execute_image
from sdvae.engine.groups import execute_groups
from sdvae.engine.plan import Plan
from sdvae.engine.program import Program
from sdvae.engine.session import DeviceSession


@dataclass
class _Call:
    """What ran last."""

    program: Program
    plan: Plan
    size: torch.Size  # of its images
    algorithms: tuple[bool, bool]  # whether cuDNN chose them by trial, and whether among deterministic ones
    graph: "ImageGraph | None" = None


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

    @property
    def held_bytes(self) -> int:
        """Memory that the graph holds: the next run has it, though the device does not call it free."""
        return self._last.plan.predict_bytes() if self._last is not None and self._last.graph is not None else 0

    def run(self, session: DeviceSession, program: Program, plan: Plan, images: Tensor) -> Tensor:
        """All images (N, C, H, W) through the network, on the device of the program -> (N, C', H', W') fp32."""
        if plan.group:
            return execute_groups(program, plan, images)
        if not plan.is_on_host:
            session.pinned.free()
        if not _is_repeatable(session, program, plan):
            self._last = None
            return execute(program, plan, images, pinned=session.pinned)
        cudnn = torch.backends.cudnn
        now = _Call(program, plan, images.shape[2:], (cudnn.benchmark, cudnn.deterministic))
        if self._last is None or replace(self._last, graph=None) != now:
            self._last = None  # its memory is free before the next is allocated
            out = execute(program, plan, images)
            self._last = now
            return out
        if self._last.graph is None:
            self._last.graph = ImageGraph.capture(session, program, plan, images[0])
        if self._last.graph is None:
            return execute(program, plan, images)
        out = empty_output(program, plan, len(images))
        for image, target in zip(images, out, strict=True):
            self._last.graph.replay(image, target)
        return out


def _is_repeatable(session: DeviceSession, program: Program, plan: Plan) -> bool:
    """Whether a graph can hold a run: torch's statistics are merged with the host's help."""
    return session.has_graphs and program.kernels is not ops and not plan.is_on_host


class ImageGraph:
    """The run of one image, captured; from and to memory of its own, which one replay at a time uses."""

    def __init__(
        self, device: torch.device, graph: "torch.cuda.CUDAGraph", memory: Memory, image: Tensor, out: Tensor
    ) -> None:
        self._device, self._graph, self._memory, self._image, self._out = device, graph, memory, image, out
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @classmethod
    def capture(cls, session: DeviceSession, program: Program, plan: Plan, image: Tensor) -> "ImageGraph | None":
        """The graph of a run; None where none can be captured."""
        with torch.inference_mode(False):  # else no later run, outside of that mode, could write to them
            given = torch.zeros(image.shape, dtype=torch.float32, device=program.device)
            out = empty_output(program, plan, 1)[0]
        memory = allocate(plan, program.dtype, program.device, session.pinned)
        graph = session.capture(lambda: execute_image(program, plan, memory, given, out))
        return None if graph is None else cls(session.device, graph, memory, given, out)

    def replay(self, image: Tensor, out: Tensor) -> None:
        """One image (C, H, W) into `out`, behind the last replay, whatever stream that was on."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._done)
        self._image.copy_(image, non_blocking=True)
        self._graph.replay()
        out.copy_(self._out)
        self._done.record(stream)
