"""Which device and dtype a VAE computes in, and why."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from sdvae.errors import DeviceError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PROBE_GAIN = 1.3  # bf16 must win by this much on the CPU to be worth its rounding


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


def choose_dtype(name: str, device: torch.device) -> DtypeChoice:
    """The dtype called `name` (fp32, bf16, fp16) or, for "auto", the one this device serves best."""
    if name in DTYPES:
        if name == "fp16" and device.type == "cpu":
            raise DeviceError("fp16 on a CPU runs on slow reference kernels; use --dtype bf16 or fp32")
        return DtypeChoice(DTYPES[name], "asked for")
    if name != "auto":
        raise DeviceError(f"unknown dtype {name!r}; choose auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        # fp16 with its range scaled becomes the default when it has been measured on a GPU.
        if torch.cuda.is_bf16_supported():
            return DtypeChoice(torch.bfloat16, "this GPU computes bf16, which cannot overflow")
        return DtypeChoice(torch.float32, "this GPU has no bf16")
    if device.type == "cpu":
        return _probe_cpu()
    return DtypeChoice(torch.float32, f"the safe choice on {device.type}")


@contextmanager
def full_precision(*, is_deterministic: bool = True, is_tuned: bool = False) -> Iterator[None]:
    """Inside, fp32 means fp32: no TF32, which rounds what is multiplied to 10 bits, whatever the program allows.

    `is_tuned` lets cuDNN try algorithms and keep the fastest: it takes memory, and the clock decides on the last bits.
    """
    cudnn = torch.backends.cudnn.flags(
        enabled=True,
        benchmark=is_tuned,
        deterministic=is_deterministic,
        allow_tf32=False,
        fp32_precision="ieee",
    )
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with cudnn:
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before


@cache
def _probe_cpu() -> DtypeChoice:
    """Time one convolution in bf16 and fp32: 3x faster on AVX512-bf16, many times slower on older CPUs."""
    seconds = {name: _convolution_seconds(DTYPES[name]) for name in ("fp32", "bf16")}
    gain = seconds["fp32"] / seconds["bf16"]
    if gain >= _PROBE_GAIN:
        return DtypeChoice(torch.bfloat16, f"bf16 convolutions run {gain:.1f}x as fast as fp32 on this CPU")
    return DtypeChoice(torch.float32, f"bf16 convolutions run only {gain:.1f}x as fast as fp32 on this CPU")


def _convolution_seconds(dtype: torch.dtype) -> float:
    x = torch.zeros(1, 128, 48, 48, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.zeros(128, 128, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
    timings = []
    with torch.no_grad():
        for _ in range(6):
            start = time.perf_counter()
            F.conv2d(x, weight, padding=1)
            timings.append(time.perf_counter() - start)
    return min(timings)
