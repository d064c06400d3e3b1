"""The card of the machine: what a measured number means nothing without."""

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

import torch

from sdvae import __version__

_PACKAGES = ("diffusers", "triton", "numpy")


def machine_card() -> dict[str, Any]:
    """Processor and GPU, cores and threads, versions of all that computes."""
    card: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": None,
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sdvae": __version__,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        card["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        card["cuda"], card["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    for package in _PACKAGES:
        is_there = importlib.util.find_spec(package) is not None
        card[package] = importlib.metadata.version(package) if is_there else None
    return card


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.processor()
    lines = cpuinfo.read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
