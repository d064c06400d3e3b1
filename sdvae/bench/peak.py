"""How far memory rises while something runs."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # man 5 proc, clear_refs


def measure_peak(run: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """The result of `run`, and the peak of memory above where it began, in bytes.

    On a GPU, what torch reserved; on a CPU, resident memory of this process. None where the system does not say
    (the CPU of anything but Linux). A process that ran other things before may hold memory that `run` takes unseen:
    free memory is given back first, and what libraries keep for themselves cannot be.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_reserved(device)
        result = run()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_reserved(device) - before
    if device.type != "cpu" or not _CLEAR.exists():
        return run(), None
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text(_RESET_PEAK)
    before = resident("VmRSS")
    result = run()
    return result, resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes in a field of /proc/self/status, such as VmRSS; Linux only."""
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
