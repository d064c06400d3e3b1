"""Which device and dtype a VAE computes in, and why."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdvae.errors import DeviceError

_SPELLINGS = {"float32": "fp32", "float": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}  # torch's
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# What a program may set for all of torch, and what it is while a VAE computes: torch's defaults, but
# neither TF32 nor, on CPUs, sums of bf16 products for fp32 ones.
_SETTINGS: tuple[tuple[Any, str, Any], ...] = (
    (torch.backends.cuda.matmul, "fp32_precision", "ieee"),
    (torch.backends.cuda.matmul, "allow_fp16_accumulation", False),
    (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", True),
    (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", True),
    (torch.backends.mkldnn, "enabled", True),
    (torch.backends.mkldnn, "deterministic", False),
    (torch.backends.mkldnn.matmul, "fp32_precision", "ieee"),  # type: ignore[attr-defined]
    (torch.backends.mkldnn.conv, "fp32_precision", "ieee"),  # type: ignore[attr-defined]
)
_ATTENTION_KERNELS = [
    SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION,
]  # fmt: skip
_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


@dataclass(frozen=True)
class DtypeChoice:
    """A dtype and the reason for it, as `sdvae doctor` prints them."""

    dtype: torch.dtype
    reason: str


def choose_device(name: str) -> torch.device:
    """The torch device called `name`; "auto" takes CUDA where there is one. DeviceError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"unknown device {name!r}; try auto, cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA device(s)")
    return device


def choose_dtype(name: str | torch.dtype, device: torch.device) -> DtypeChoice:
    """The dtype called `name` (fp32, bf16, fp16, or torch's names) or, for "auto", the one this device serves best."""
    name = _SPELLINGS.get(str(name).removeprefix("torch."), name)
    if name in DTYPES:
        if name == "fp16" and device.type == "cpu":
            raise DeviceError("fp16 on a CPU runs on slow reference kernels; use --dtype bf16 or fp32")
        return DtypeChoice(DTYPES[name], "asked for")
    if name != "auto":
        raise DeviceError(f"unknown dtype {name!r}; choose auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        # fp16 with its range scaled becomes the default when it has been measured on a GPU.
        if torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8:  # older ones emulate it
            return DtypeChoice(torch.bfloat16, "this GPU computes bf16, which cannot overflow")
        return DtypeChoice(torch.float32, "this GPU has no bf16")
    if device.type == "cpu":
        return _choose_for_cpu(_cpu_capabilities())
    return DtypeChoice(torch.float32, f"the safe choice on {device.type}")


def served_dtypes(device: torch.device) -> list[str]:
    """The dtypes that a device computes in; a CPU emulates the others, many times slower than fp32."""
    if device.type != "cpu":
        return list(DTYPES)
    best = _choose_for_cpu(_cpu_capabilities()).dtype
    return [name for name, dtype in DTYPES.items() if dtype in (torch.float32, best)]


@contextmanager
def full_precision(*, is_deterministic: bool = True, is_tuned: bool = False) -> Iterator[None]:
    """Inside, fp32 means fp32, whatever the program allows: no autocast, no TF32, and torch's own choice of kernels.

    `is_tuned` lets cuDNN try algorithms and keep the fastest: it takes memory, and the clock decides on the last bits.
    """
    cudnn = torch.backends.cudnn.flags(
        enabled=True,
        benchmark=is_tuned,
        deterministic=is_deterministic,
        allow_tf32=False,
        fp32_precision="ieee",
    )
    before = [getattr(owner, name) for owner, name, _ in _SETTINGS]
    with cudnn, sdpa_kernel(_ATTENTION_KERNELS), ExitStack() as stack:
        for device_type in filter(torch.is_autocast_enabled, _AUTOCAST_DEVICES):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        try:
            for owner, name, value in _SETTINGS:
                setattr(owner, name, value)
            yield
        finally:
            for (owner, name, _), value in zip(_SETTINGS, before, strict=True):
                setattr(owner, name, value)


@contextmanager
def inference(*, is_deterministic: bool = True, is_tuned: bool = False) -> Iterator[None]:
    """`full_precision` without gradients; what is made inside may be written to, and trained, outside of any mode."""
    precision = full_precision(is_deterministic=is_deterministic, is_tuned=is_tuned)
    with torch.inference_mode(False), torch.no_grad(), precision:
        yield


def _choose_for_cpu(capabilities: Mapping[str, Any]) -> DtypeChoice:
    """By what the CPU says of itself, never by a clock: a busy machine would answer otherwise, and results with it."""
    for flag in ("avx512_bf16", "amx_bf16"):  # 2-4x as fast as fp32; elsewhere bf16 is emulated, and slower
        if capabilities.get(flag):
            return DtypeChoice(torch.bfloat16, f"this CPU computes bf16 ({flag})")
    return DtypeChoice(torch.float32, "this CPU does not compute bf16")


def _cpu_capabilities() -> Mapping[str, Any]:
    """Torch's list of CPU features; empty in versions that have none."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
