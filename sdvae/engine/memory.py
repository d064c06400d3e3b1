"""Amounts of memory: as people write them, and as a device has them free."""

import re
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from sdvae.errors import BudgetError

if TYPE_CHECKING:
    import torch

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_CGROUP = Path("/sys/fs/cgroup")
_LEAST_BYTES = 10**5  # less is a number whose unit was forgotten: no network runs in it


def parse_bytes(amount: int | str) -> int:
    """The bytes in "6GiB", "800 MB" or a number of them; BudgetError for other words or a bare number below 100,000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(amount).strip().lower())
    if match is None or match[2] not in _UNITS:
        raise BudgetError(f"{amount!r} is no amount of memory; write 6GiB, 800MiB or a number of bytes")
    number, unit = match.groups()
    num_bytes = int(Decimal(number) * _UNITS[unit])
    if not num_bytes:
        raise BudgetError(f"{amount} is too little memory; write 6GiB, or 800MiB")
    if unit or num_bytes >= _LEAST_BYTES:
        return num_bytes
    meant = f"{number}{'GiB' if num_bytes < 100 else 'MiB'}"  # cards have up to a hundred GiB, or thousands of MiB
    raise BudgetError(f"{number} bytes: did you mean {meant}?")


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
