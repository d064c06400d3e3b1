"""The machine the tests run on is the one they were written for."""

from importlib.metadata import distributions
from pathlib import Path

import torch


def test_no_torchvision_and_no_cuda_wheels_beside_a_cpu_torch() -> None:
    names = {distribution.name.lower() for distribution in distributions()}
    assert "torchvision" not in names  # broken beside this torch, it breaks `import diffusers`
    if torch.version.cuda is None:
        assert not {name for name in names if name.startswith("nvidia")}


def test_every_dependency_that_tests_use_is_pinned() -> None:
    lines = (Path(__file__).parents[1] / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    installed = {distribution.name.lower().replace("-", "_"): distribution.version for distribution in distributions()}
    for name, version in pins.items():
        found = installed[name.lower().replace("-", "_")]
        assert found.split("+")[0] == version, f"{name} {found} is installed, constraints.txt says {version}"
