"""Amounts of memory: as people write them, and as a device has them free."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from sdvae.errors import BudgetError

if TYPE_CHECKING:
    import torch

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_CGROUP = Path("/sys/fs/cgroup")


def parse_bytes(amount: int | str) -> int:
    """The bytes in "6GiB", "800 MB" or a number of them; BudgetError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(amount).strip().lower())
    if match is None or match[2] not in _UNITS:
        raise BudgetError(f"{amount!r} is no amount of memory; write 6GiB, 800MiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]])


def free_bytes(device: "torch.device") -> int | None:
    """Memory that a run could take on a device now; None where the system does not say."""
    if device.type == "cuda":
        import torch

        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.is_file():
        return None
    available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    known = [int(available[1]) * 1024] if available else []
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.is_file() and (most := limit.read_text().strip()) != "max":
        known.append(int(most) - int(used.read_text()))
    return min(known, default=None)
