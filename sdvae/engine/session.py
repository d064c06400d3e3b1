"""What the runs on one device have in common: the device itself, its stream for captures, its pinned memory."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from sdvae.engine.arena import PinnedMemory

logger = logging.getLogger(__name__)

STRICT_VARIABLE = "SDVAE_STRICT"  # 1: what a GPU cannot do as meant is an error, not a warning


def is_strict() -> bool:
    """Whether a fall back to something slower should be an error."""
    return os.environ.get(STRICT_VARIABLE) == "1"


class DeviceSession:
    """Owns what an engine holds on a device. On a CPU there is nothing to own, and nothing is captured."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pinned = PinnedMemory()
        self.has_graphs = device.type == "cuda"  # until a capture fails
        self._stream: torch.cuda.Stream | None = None

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Inside, this device is the current one: Triton, events and libraries launch on the current one."""
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.device(self.device):
            yield

    def capture(self, run: Callable[[], None]) -> "torch.cuda.CUDAGraph | None":
        """A graph of what `run` launches; None where the driver or a library refuses, which is said once.

        `run` is called twice, on a stream of this device: cuDNN keeps what it has chosen for each thread apart, and
        may not choose inside of a capture. Other threads may use CUDA meanwhile.
        """
        if not self.has_graphs:
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        caller = torch.cuda.current_stream(self.device)
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):
                run()
            torch.cuda.empty_cache()  # of the run before, whose memory a graph cannot use
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                run()
        except RuntimeError as error:  # what torch raises for all that CUDA reports
            if is_strict():
                raise
            self.has_graphs = False
            reason = str(error).partition("\n")[0]
            logger.warning(
                "no CUDA graph can be captured on %s, so runs are launched one by one: %s", self.device, reason
            )
            return None
        finally:
            caller.wait_stream(self._stream)
        return graph

    def release(self) -> None:
        """Give back the pinned memory."""
        self.pinned.free()
