"""The memory of a run: the arena that a plan lays out, on the device or on its host, and what lies beside it."""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from sdvae.amounts import memory_text
from sdvae.engine.plan import Plan
from sdvae.errors import BudgetError


@dataclass(frozen=True)
class Memory:
    """What a run writes to before its output."""

    arena: Tensor
    window: Tensor
    own_keys: Tensor | None  # where libraries, which read them, do not reach into the arena

    def keys(self, offset: int, num_elements: int) -> Tensor:
        """The keys of an attention, in the arena where that has room for them."""
        return self.arena[offset : offset + num_elements] if self.own_keys is None else self.own_keys[:num_elements]


class PinnedMemory:
    """Memory of the host that a GPU's kernels reach; kept from run to run, because pinning gigabytes takes seconds."""

    def __init__(self) -> None:
        self._bytes: Tensor | None = None
        self._unpin: weakref.finalize | None = None  # type: ignore[type-arg]

    def take(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        """So many elements, uninitialised; BudgetError where the host cannot pin them."""
        num_bytes = num_elements * dtype.itemsize
        if self._bytes is None or self._bytes.numel() < num_bytes:
            self.free()
            self._bytes = _pin(num_bytes)
            self._unpin = weakref.finalize(self, _unpin, self._bytes)
            self._unpin.atexit = False  # the driver may be gone by then, and the memory with it
        return self._bytes[:num_bytes].view(dtype)

    def free(self) -> None:
        """Give the memory back, once no kernel is at work in it."""
        if self._unpin is not None:
            self._unpin()
        self._bytes = self._unpin = None


def allocate(plan: Plan, dtype: torch.dtype, device: torch.device, pinned: PinnedMemory) -> Memory:
    """The memory of a plan, the arena in `pinned` where the plan has it on the host."""
    window = torch.empty(plan.window_elements, dtype=dtype, device=device)
    if not plan.is_on_host:
        return Memory(torch.empty(plan.arena_elements, dtype=dtype, device=device), window, None)
    keys = torch.empty(plan.keys_elements, dtype=dtype, device=device)
    return Memory(pinned.take(plan.arena_elements, dtype), window, keys)


def _pin(num_bytes: int) -> Tensor:
    """Torch's own pinned memory would be rounded up to a power of two."""
    memory = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
    code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), num_bytes, 0)  # type: ignore[no-untyped-call]
    if int(code):
        raise BudgetError(
            f"{memory_text(num_bytes)} of the host's memory could not be pinned for the GPU (CUDA error {int(code)}); "
            "give a larger --budget or a smaller size, or free memory of the host"
        )
    return memory


def _unpin(memory: Tensor) -> None:
    try:
        torch.cuda.synchronize()  # kernels may still be at work in it
    finally:
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]
