"""Whether a GPU's fast kernels can be trusted: a small decode by them, at first use, beside torch's own operations."""

import json
import logging
import os
import sys
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from sdvae import __version__, atomic
from sdvae.config import FAMILIES, VAEConfig
from sdvae.engine import ops
from sdvae.engine.execute import execute
from sdvae.engine.graphs import ImageGraph
from sdvae.engine.kernels import Kernels
from sdvae.engine.plan import make_plan
from sdvae.engine.precision import inference
from sdvae.engine.program import Weights, choose_kernels, compile_program, triton_obstacle
from sdvae.engine.session import STRICT_VARIABLE, DeviceSession, is_strict
from sdvae.errors import DeviceError, OutputError
from sdvae.model import AutoencoderKL

logger = logging.getLogger(__name__)

_CONFIG = replace(FAMILIES["sd1"], layers_per_block=1)  # all kernels at all of its widths
_SIZE = 2, 32  # of the latents: two strips, so that rows pass between them
_MOST_APART = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.10}  # relative L2, from torch's operations


def trusted_kernels(device: torch.device) -> Kernels:
    """The kernels that run on a device: torch's where nothing faster is there, or where it computes something else."""
    kernels = choose_kernels(device)
    return kernels if kernels is ops or device.type != "cuda" or kernels_fault(device) is None else ops


def why_torch(device: torch.device) -> str | None:
    """Why torch's operations run on a GPU instead of kernels of our own; None where they do not, or on a CPU."""
    if device.type == "cpu":
        return None
    return triton_obstacle(device) or kernels_fault(device)


def kernels_fault(device: torch.device) -> str | None:
    """What the self-check of a GPU found, or None; run once for each GPU, driver, torch, Triton and version of sdvae.

    Where it found something there is one warning; DeviceError where SDVAE_STRICT is 1.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    fault = _fault(index)
    if fault is not None and is_strict():
        raise DeviceError(f"{_sentence(index, fault)}; unset {STRICT_VARIABLE} to run torch's operations instead")
    return fault


@cache
def _fault(index: int) -> str | None:
    known, key = _read_verdicts(), _identity(index)
    if key not in known:
        known[key] = examine(index)
        _keep_verdicts(known)
    fault = known[key]
    if fault is not None and not is_strict():
        logger.warning("%s; torch's operations run instead, several times slower", _sentence(index, fault))
    return fault


def examine(index: int) -> str | None:
    """What is wrong with the kernels on a GPU now, whatever was found before; or None."""
    device = torch.device("cuda", index)
    session = DeviceSession(device)
    try:
        with session.guard(), inference():
            return find_fault(choose_kernels(device), session)
    except Exception as error:  # noqa: BLE001  (Triton, its C compiler, the driver: whatever they raise is the finding)
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def find_fault(
    kernels: Kernels, session: DeviceSession, config: VAEConfig = _CONFIG, size: tuple[int, int] = _SIZE
) -> str | None:
    """Where a decode by `kernels`, launched and replayed, is not what torch's operations make of it; or None."""
    weights = _weights(config)
    generator = torch.Generator("cpu").manual_seed(1)
    shape = 2, config.latent_channels, *size
    images = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(session.device)
    for dtype, most in _MOST_APART.items():
        program, plain = (
            compile_program(config, "decode", weights, dtype, session.device, kernels=each) for each in (kernels, ops)
        )
        plan = make_plan(program.network, *size, dtype.itemsize, num_strips=2, is_gpu=True)
        expected = execute(plain, plan, images)
        found = {"launched": execute(program, plan, images)}
        if (graph := ImageGraph.capture(session, program, plan, images[0])) is not None:
            found["replayed"] = torch.empty_like(expected)
            for image, out in zip(images, found["replayed"], strict=True):
                graph.replay(image, out)
        for how, made in found.items():
            apart = _apart(made, expected)
            if not apart <= most:
                name = str(dtype).removeprefix("torch.")
                return f"a decode in {name}, {how}, differs by {apart:.2g} from torch's; {most:g} is allowed"
    return None


def _weights(config: VAEConfig) -> Weights:
    """Seeded weights. What the first norm reads is as small as its eps, so that a wrong eps shows."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        weights = AutoencoderKL(config).to(torch.float32).state_dict()
        for values in weights.values():
            if values.dim() == 1:
                values += 0.1 * torch.randn(values.shape, dtype=torch.float32, device="cpu")
    for name in ("decoder.conv_in.weight", "decoder.conv_in.bias"):
        weights[name] *= 1e-3
    return weights


def _apart(made: Tensor, expected: Tensor) -> float:
    """Relative L2 distance; NaN where one of them is not finite."""
    made, expected = made.to(torch.float64), expected.to(torch.float64)
    return float((made - expected).norm() / expected.norm())


# --- What was found before ---


def _identity(index: int) -> str:
    """What a verdict depends on."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # absent in builds without CUDA
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    return f"{name} {capability}, driver {driver}, torch {torch.__version__}, Triton {triton}, sdvae {__version__}"


def _verdicts_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdvae" / "kernels.json"


def _read_verdicts() -> dict[str, str | None]:
    try:
        found = json.loads(_verdicts_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):  # never asked before, or torn: asked again
        return {}
    return found if isinstance(found, dict) else {}


def _keep_verdicts(verdicts: dict[str, str | None]) -> None:
    path = _verdicts_file()
    try:
        atomic.make_folder(path.parent)
        atomic.write_bytes(path, json.dumps(verdicts, indent=1).encode())
    except (OSError, OutputError) as error:
        logger.info("the verdict on the GPU's kernels is not kept, and found again next time: %s", error)


def _sentence(index: int, fault: str) -> str:
    return f"the kernels for cuda:{index} failed their self-check ({fault})"


if __name__ == "__main__":  # `sdvae doctor`, in a process of its own: an illegal address ends it
    for number in map(int, sys.argv[1:]):
        print(json.dumps(triton_obstacle(torch.device("cuda", number)) or examine(number)))
