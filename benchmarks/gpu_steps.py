#!/usr/bin/env python
"""The programs that `scripts/gpu` runs, for Stable Diffusion's VAE with random weights. One JSON line for each result.

    benchmarks/gpu_steps.py check       versions, doctor, and the engine beside the reference network
    benchmarks/gpu_steps.py decode      one small decode and no more, for compute-sanitizer
    benchmarks/gpu_steps.py memory      a decode from a second thread; reserved memory beside the plan's prediction
    benchmarks/gpu_steps.py profile     where the time of sdvae's kernels goes
    benchmarks/gpu_steps.py strips      speed by the size of strips, with cuDNN's tuning and without; two streams
    benchmarks/gpu_steps.py diffusers   diffusers, eager, NCHW and NHWC
    benchmarks/gpu_steps.py host        2048 px with the arena in the host's memory

Options: --device, --dtype, --size (pixels of `decode`), --tiny (a narrow network and small images: a trial on a CPU).
A result that fails has an "error" in its line, the others go on, and the exit code is 1.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdvae.config import FAMILIES, VAEConfig
from sdvae.engine import plan as planning
from sdvae.engine import run as running
from sdvae.engine.precision import DTYPES
from sdvae.model import AutoencoderKL
from sdvae.vae import VAE

_STRIP_MIB = (8, 16, 32, 64)
_ROUNDS = 5
_MOST_ERROR = {"fp32": 1e-4, "bf16": 0.15, "fp16": 0.03}  # relative L2, random weights
# Parts of a kernel's name -> what the kernel does; the first that fits.
_KINDS = {
    "norm": ("_normalise_tile", "_merge_rows"),
    "write": ("_write_rows",),
    "attention": ("_attend_block", "_merge_splits", "flash"),
    "convolution": ("conv", "xmma", "cutlass", "cudnn", "gemm", "cublas", "winograd", "nvjet", "sm90_", "sm80_"),
}


class Bench:
    """What the steps share: the VAE, its inputs, and lines of results."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.device = torch.device(chosen.device)
        self.dtype: str = chosen.dtype
        self.is_tiny: bool = chosen.tiny
        self.size_px: int = chosen.size
        self.has_failed = False

    @property
    def config(self) -> VAEConfig:
        """Stable Diffusion 1's, or a narrow one for a trial."""
        sd1 = FAMILIES["sd1"]
        return replace(sd1, block_out_channels=(32, 32, 64, 64), layers_per_block=1) if self.is_tiny else sd1

    def model(self) -> AutoencoderKL:
        """The reference network, fp32, on the CPU."""
        torch.manual_seed(0)
        return AutoencoderKL(self.config).eval()

    def vae(self) -> VAE:
        """The same weights in the engine."""
        return VAE(self.model(), self.device, DTYPES[self.dtype], "random weights, seed 0")

    def px(self, size: int) -> int:
        """The side of an image that is measured as `size`; smaller in a trial."""
        return size // 16 if self.is_tiny else size

    def latents(self, size_px: int, batch_size: int = 1) -> Tensor:
        """Seeded latents of square images."""
        side = size_px // 8
        values = torch.randn(batch_size, 4, side, side, generator=torch.Generator().manual_seed(1))
        return values.to(self.device)

    def pixels(self, size_px: int, batch_size: int = 1) -> Tensor:
        """Seeded pixels of square images."""
        values = torch.rand(batch_size, 3, size_px, size_px, generator=torch.Generator().manual_seed(2))
        return (values * 2 - 1).to(self.device)

    def synchronize(self) -> None:
        """Wait for the GPU, where it is one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object]) -> float:
        """The median of some calls, each until its result is there, after three that warm up and capture."""
        for _ in range(1 if self.is_tiny else 3):
            run()
        times = []
        for _ in range(1 if self.is_tiny else _ROUNDS):
            self.synchronize()
            start = time.perf_counter()
            run()
            self.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    @contextmanager
    def result(self, name: str) -> Iterator[dict[str, Any]]:
        """A mapping to fill; printed at once, with the error where one ends it."""
        values: dict[str, Any] = {"result": name}
        try:
            yield values
        except Exception as error:  # noqa: BLE001 - the other results are wanted, whatever fails here
            traceback.print_exc()
            values["error"] = f"{type(error).__name__}: {error}"
            self.has_failed = True
        print(json.dumps(values), flush=True)


def check(bench: Bench) -> None:
    with bench.result("versions") as values:
        values |= {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda}
        if bench.device.type == "cuda":
            values["gpu"] = torch.cuda.get_device_name(bench.device)
            values["capability"] = torch.cuda.get_device_capability(bench.device)
            values["cudnn"] = torch.backends.cudnn.version()
    with bench.result("triton") as values:
        import triton

        values["version"] = triton.__version__
    with bench.result("doctor") as values:
        values["rc"] = subprocess.run([sys.executable, "-m", "sdvae", "doctor"], stdout=sys.stderr).returncode
    size = bench.px(256)
    vae, model = bench.vae(), bench.model()
    for direction in ("encode", "decode"):
        with bench.result(f"error of {direction}") as values, torch.no_grad():
            if direction == "encode":
                batch = bench.pixels(size)
                expected, found = model.encode(batch.cpu()).mean, vae.encode(batch).mean
            else:
                batch = bench.latents(size)
                expected, found = model.decode(batch.cpu()), vae.decode(batch)
            values["relative_error"] = float((found.cpu() - expected).norm() / expected.norm())
            if not values["relative_error"] <= _MOST_ERROR[bench.dtype]:
                raise ValueError(f"more than {_MOST_ERROR[bench.dtype]} off")
    with bench.result("describe") as values:
        print(vae.engine.describe(), file=sys.stderr)  # type: ignore[union-attr]


def decode(bench: Bench) -> None:
    with bench.result("decode") as values:
        vae, latents = bench.vae(), bench.latents(bench.size_px)[:, :, :1]  # 8 rows of pixels, the whole width
        values["pixels"] = list(vae.decode(latents).shape)
        bench.synchronize()


def memory(bench: Bench) -> None:
    vae = bench.vae()
    engine: Any = vae.engine
    small = bench.latents(bench.px(512))
    with bench.result("second thread") as values:
        first = vae.decode(small)
        outputs: list[Tensor] = []
        thread = threading.Thread(target=lambda: outputs.append(vae.decode(small)))
        thread.start()
        thread.join()
        if not outputs:
            raise RuntimeError("the decode of the second thread raised; its traceback is above")
        values["equal"] = bool(outputs[0].equal(first))
    for size in (512, 1024, 2048):
        with bench.result(f"memory {size}") as values:
            latents = bench.latents(bench.px(size))
            side = latents.shape[-1]
            values["predicted_bytes"] = engine.plan("decode", side, side).predict_bytes()
            if bench.device.type == "cuda":
                for name in ("first", "captured", "replayed"):
                    values[f"{name}_reserved_bytes"] = _reserved(bench, partial(vae.decode, latents))


def _reserved(bench: Bench, run: Callable[[], object]) -> int:
    """How far reserved memory rises above where it was."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(bench.device)
    before = torch.cuda.memory_reserved(bench.device)
    run()
    bench.synchronize()
    return torch.cuda.max_memory_reserved(bench.device) - before


def profile(bench: Bench) -> None:
    vae = bench.vae()
    for name, size, batch_size in (("decode", 512, 8), ("decode", 512, 1), ("decode", 1024, 1), ("encode", 512, 8)):
        with bench.result(f"{name} {size} batch {batch_size}") as values:
            run = _work(bench, vae, name, bench.px(size), batch_size)
            values["seconds"] = bench.seconds(run)
            values["images_per_s"] = batch_size / values["seconds"]
            values |= _profiled(bench, run)


def _work(bench: Bench, vae: VAE, direction: str, size_px: int, batch_size: int) -> Callable[[], object]:
    if direction == "encode":
        pixels = bench.pixels(size_px, batch_size)
        return lambda: vae.encode(pixels)
    latents = bench.latents(size_px, batch_size)
    return lambda: vae.decode(latents)


def _profiled(bench: Bench, run: Callable[[], object]) -> dict[str, Any]:
    """Seconds and number of kernels by kind, in one call; on a CPU of torch's operations."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    is_gpu = bench.device.type == "cuda"
    wanted = DeviceType.CUDA if is_gpu else DeviceType.CPU
    with torch_profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]) as profiler:
        run()
        bench.synchronize()
    seconds: Counter[str] = Counter()
    num_kernels: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == wanted:
            spent_us = event.time_range.elapsed_us() if is_gpu else event.self_cpu_time_total
            name = event.name.lower()
            kind = next((kind for kind, parts in _KINDS.items() if any(part in name for part in parts)), "tiny")
            seconds[kind] += spent_us / 1e6
            num_kernels[kind] += 1
    return {"kernel_seconds": dict(seconds), "num_kernels": dict(num_kernels)}


def strips(bench: Bench) -> None:
    if not hasattr(planning, "GPU_STRIP_BYTES"):
        raise AttributeError("sdvae.engine.plan has no GPU_STRIP_BYTES; name here what sets the size of strips")
    vae = bench.vae()  # another plan, or another choice of algorithms, is captured anew
    for mib in _STRIP_MIB:
        for is_tuned in (False, True):
            for name, size, batch_size in (("decode", 512, 8), ("decode", 1024, 1), ("encode", 512, 8)):
                with (
                    bench.result(f"{name} {size} batch {batch_size}, strips {mib} MiB, tuned {is_tuned}") as values,
                    _changed(planning, "GPU_STRIP_BYTES", mib << 20),
                    _changed(running, "full_precision", partial(_precision, running.full_precision, is_tuned)),
                ):
                    run = _work(bench, vae, name, bench.px(size), batch_size)
                    values["images_per_s"] = batch_size / bench.seconds(run)
    if bench.device.type == "cuda":
        with bench.result("decode 512 on two streams, batch 4 each") as values:
            values["images_per_s"] = 8 / bench.seconds(_two_streams(bench))


def _two_streams(bench: Bench) -> Callable[[], object]:
    vaes, latents = [bench.vae(), bench.vae()], bench.latents(bench.px(512), 4)
    streams = [torch.cuda.Stream(bench.device) for _ in vaes]

    def run() -> None:
        for vae, stream in zip(vaes, streams, strict=True):
            with torch.cuda.stream(stream):
                vae.decode(latents)

    return run


def _precision(original: Callable[..., Any], forced: bool, **settings: bool) -> Any:
    return original(**settings | {"is_tuned": forced})


@contextmanager
def _changed(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@torch.no_grad()
def diffusers(bench: Bench) -> None:
    from diffusers import AutoencoderKL as Theirs

    theirs = Theirs.from_config(bench.config.to_diffusers())
    theirs.load_state_dict(bench.model().state_dict())
    theirs = theirs.eval().to(bench.device, DTYPES[bench.dtype])
    for layout, memory_format in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
        theirs = theirs.to(memory_format=memory_format)
        for name, size, batch_size in (("decode", 512, 8), ("decode", 512, 1), ("decode", 1024, 1), ("encode", 512, 8)):
            with bench.result(f"diffusers {layout} {name} {size} batch {batch_size}") as values:
                batch = (bench.latents if name == "decode" else bench.pixels)(bench.px(size), batch_size)
                batch = batch.to(DTYPES[bench.dtype]).contiguous(memory_format=memory_format)
                values["images_per_s"] = batch_size / bench.seconds(partial(getattr(theirs, name), batch))


def host(bench: Bench) -> None:
    with bench.result("host arena 2048") as values:
        vae = bench.vae()
        engine: Any = vae.engine
        latents = bench.latents(bench.px(2048))
        side = latents.shape[-1]
        budget = "400MiB" if bench.device.type == "cuda" else None  # less than the arena on the device takes
        values["is_on_host"] = engine.plan("decode", side, side, budget=budget).is_on_host
        whole, near = vae.decode(latents), vae.decode(latents, budget)
        values["relative_difference"] = float((near - whole).norm() / whole.norm())
        values["seconds"] = bench.seconds(lambda: vae.decode(latents, budget))
        if bench.device.type == "cuda" and not values["is_on_host"]:
            raise RuntimeError("the plan within this budget does not lie on the host")


STEPS = {step.__name__: step for step in (check, decode, memory, profile, strips, diffusers, host)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--tiny", action="store_true")
    chosen = parser.parse_args()
    bench = Bench(chosen)
    with bench.result(chosen.step) as whole:
        start = time.perf_counter()
        STEPS[chosen.step](bench)
        whole["seconds"] = time.perf_counter() - start
    sys.exit(int(bench.has_failed))


if __name__ == "__main__":
    main()
