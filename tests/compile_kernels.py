"""Compiles what `triton_ops` would launch, for a GPU that need not be there; prints one line of JSON for each kernel.

python -m tests.compile_kernels 90        its compute capability, without the dot
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sdvae.engine import triton_ops
from sdvae.engine.kernels import Norm
from sdvae.engine.ops import strip_of

KERNELS = ["_write_rows", "_merge_rows", "_normalise_tile", "_attend_block", "_merge_splits"]
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
MAX_SHARED_BYTES = {80: 166912, 90: 232448, 100: 232448}  # of a program on an A100, H200 and B200
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Recorder:
    """Stands where a kernel is, and keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        names = self.kernel.arg_names
        return lambda *values, **named: self.launches.append(dict(zip(names, values, strict=False)) | named)

    def compile(self, launch: dict[str, Any], capability: int) -> Any:
        """As Triton's own launcher: what is 1, None or constexpr is compiled in; multiples of 16 are known as such."""
        options = {name: value for name, value in launch.items() if name not in self.kernel.arg_names}
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            value = launch[parameter.name]
            signature[parameter.name] = "constexpr"
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                constants[parameter.name] = value
                continue
            signature[parameter.name] = _type(value)
            if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature=signature, constexprs=constants, attrs=attributes)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def launch_everything(dtype: torch.dtype, channels: int) -> None:
    """All that the network does to a strip of two rows, 256 wide."""
    made = strip_of(torch.empty(2 * 256 * channels, dtype=dtype), 2, 256)
    target, bias = torch.empty_like(made), torch.empty(channels)
    statistics = triton_ops.Statistics(1)
    triton_ops.write(made, bias, target, adds=False, statistics=None)
    triton_ops.write(made, bias, target, adds=True, statistics=statistics)
    norm = Norm(bias, bias, 1e-6, 32)
    triton_ops.normalise(made, target, norm, *statistics.merge(32), has_silu=True)
    narrow = strip_of(torch.empty(129 * 2 * channels, dtype=dtype), 1, 129)
    triton_ops.write_upsampled(narrow, narrow, bias, target, statistics=triton_ops.Statistics(1))


def resources(compiled: Any) -> dict[str, int]:
    """Registers and spilled bytes of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    return {"registers": int(found["REG"]), "spilled_bytes": int(found["STACK"])}


def reports(capability: int) -> Iterator[dict[str, Any]]:
    recorders = {name: Recorder(getattr(triton_ops, name)) for name in KERNELS}
    for name, recorder in recorders.items():
        setattr(triton_ops, name, recorder)
    limits = divmod(capability, 10), MAX_SHARED_BYTES[capability]
    triton_ops._device_limits = lambda device: limits
    for channels in (128, 512):
        launch_everything(torch.float16, channels)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        triton_ops.attend(torch.empty(1024, 512, dtype=dtype), torch.empty(4096, 512, dtype=dtype))
    for name, recorder in recorders.items():
        for launch in recorder.launches:
            yield {"kernel": name, "capability": capability, **report(recorder, launch, capability)}


def report(recorder: Recorder, launch: dict[str, Any], capability: int) -> dict[str, Any]:
    compiled = recorder.compile(launch, capability)
    assembly = compiled.asm["ptx"]
    return {
        "types": sorted({_type(value) for value in launch.values() if isinstance(value, Tensor)}),
        "shared_bytes": compiled.metadata.shared,
        "max_shared_bytes": MAX_SHARED_BYTES[capability],
        "has_wgmma": "wgmma.mma_async" in assembly,
        "num_wide_loads": assembly.count("ld.global.v4.b32"),
        "num_wide_stores": assembly.count("st.global.v4.b32"),
        "num_narrow_halves": len(re.findall(r"(?:ld|st)\.global\.(?:v\d\.)?b16", assembly)),
        **resources(compiled),
    }


if __name__ == "__main__":
    for each in reports(int(sys.argv[1])):
        print(json.dumps(each))
