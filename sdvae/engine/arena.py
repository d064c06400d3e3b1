"""The memory of a run: the arena that a plan lays out, on the device or on its host, and what lies beside it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sdvae.engine.plan import Plan


@dataclass(frozen=True)
class Memory:
    """What a run writes to before its output."""

    arena: Tensor
    window: Tensor
    own_keys: Tensor | None  # where libraries, which read them, do not reach into the arena

    def keys(self, offset: int, num_elements: int) -> Tensor:
        """The keys of an attention, in the arena where that has room for them."""
        return self.arena[offset : offset + num_elements] if self.own_keys is None else self.own_keys[:num_elements]


@contextmanager
def allocate(plan: Plan, dtype: torch.dtype, device: torch.device) -> Iterator[Memory]:
    """The memory of a plan, for as long as the context lasts."""
    window = torch.empty(plan.window_elements, dtype=dtype, device=device)
    if not plan.is_on_host:
        yield Memory(torch.empty(plan.arena_elements, dtype=dtype, device=device), window, None)
        return
    keys = torch.empty(plan.keys_elements, dtype=dtype, device=device)
    with _pinned(plan.arena_elements, dtype) as arena:
        yield Memory(arena, window, keys)


@contextmanager
def _pinned(num_elements: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Memory of the host that kernels reach; torch would round such blocks up to a power of two."""
    memory = torch.empty(num_elements, dtype=dtype, device="cpu")
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    try:
        yield memory
        torch.cuda.synchronize()  # kernels may still be at work in it
    finally:
        cudart.cudaHostUnregister(memory.data_ptr())
