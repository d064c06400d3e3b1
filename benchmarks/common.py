"""What every benchmark shares: the card of the machine, and where results go."""

import json
import os
import platform
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def test_data() -> Path:
    """The folder of photos and TAESD weights that tests use, too."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    return Path(os.environ.get("SDVAE_TEST_DATA", beside))


def machine_card() -> dict[str, Any]:
    """What a number means nothing without: hardware and versions."""
    import diffusers
    import torch

    import sdvae

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "sdvae": sdvae.__version__,
    }


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write `results/NAME.json` with the machine's card."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine_card()} | result, indent=2) + "\n")
    return path


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.processor()
    lines = cpuinfo.read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
