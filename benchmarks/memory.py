#!/usr/bin/env python
"""Peak memory of fresh processes on a CPU: sdvae beside its own prediction, and diffusers without tiles.

    benchmarks/memory.py [--size 512 ...] [--dtype bf16] [--family sd1] [--write]

Bytes above the process with its packed weights, its input and warm libraries. Weights are random.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from common import write_result

from sdvae.bench.contenders import diffusers, sdvae
from sdvae.bench.peak import measure_peak, resident
from sdvae.bench.throughput import Settings, seeded_batch, seeded_model
from sdvae.config import VAEConfig
from sdvae.engine.precision import DTYPES
from sdvae.engine.stages import Direction
from sdvae.vae import VAE

_CPU = torch.device("cpu")
_TASK = "--task"  # what this script calls itself with


@dataclass(frozen=True)
class Task:
    """What a process is to run. `limit_bytes` is a hard limit on the address space it may take (RLIMIT_AS)."""

    config: VAEConfig
    direction: Direction
    height: int
    width: int
    dtype: str = "bf16"
    who: Literal["sdvae", "diffusers"] = "sdvae"
    budget_bytes: int | None = None
    limit_bytes: int | None = None


@dataclass(frozen=True)
class Peak:
    """Bytes above the process with its packed weights, its input and warm libraries."""

    peak_bytes: int
    predicted_bytes: int | None  # by the plan; None of diffusers


def measure_fresh(task: Task, environment: Mapping[str, str] | None = None) -> Peak | None:
    """The peak of a task in a process of its own; None where memory ran out under its limit."""
    command = [sys.executable, __file__, _TASK, json.dumps(asdict(task))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(environment or {}))
    if done.returncode == 0:
        return Peak(**json.loads(done.stdout.splitlines()[-1]))
    if task.limit_bytes is not None and "can't allocate memory" in done.stderr:
        return None
    raise RuntimeError(f"the process to be measured ended with {done.returncode}: {done.stderr.strip()[-300:]}")


def measure_here(task: Task) -> Peak:
    model = seeded_model(task.config)
    vae = VAE(model, _CPU, DTYPES[task.dtype], "random weights")
    engine: Any = vae.engine
    contender = (
        sdvae(vae, task.direction, task.budget_bytes)
        if task.who == "sdvae"
        else diffusers(model, task.direction, _CPU, task.dtype, "channels_last")
    )
    batch = seeded_batch(task.config, Settings(task.direction, task.height, task.width))
    with torch.no_grad():
        contender.run(batch)  # packs the weights as this size reads them
        predicted = None
        if task.who == "sdvae":
            plan = engine.plan(task.direction, *batch.shape[2:], budget=task.budget_bytes)
            predicted = plan.predict_bytes() - batch.nbytes
        if task.limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_AS, (resident("VmSize") + task.limit_bytes,) * 2)
        _, peak = measure_peak(lambda: contender.run(batch), _CPU)
    assert peak is not None, "peak memory is read from Linux' /proc"
    return Peak(peak, predicted)


def read_task(text: str) -> Task:
    values = json.loads(text)
    fields = values.pop("config").items()
    config: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields}
    return Task(VAEConfig(**config), **values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, action="append", help="pixels along each side (512 and 1024)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--family", default="sd1")
    parser.add_argument("--write", action="store_true")
    parser.add_argument(_TASK, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.task:
        print(json.dumps(asdict(measure_here(read_task(chosen.task)))))
        return
    config = VAEConfig.from_family(chosen.family)
    rows = []
    print(f"{'':<24}{'peak MB':>10}{'predicted':>11}{'ratio':>8}")
    for size in chosen.size or [512, 1024]:
        for direction in ("encode", "decode"):
            for who in ("sdvae", "diffusers"):
                peak = measure_fresh(Task(config, direction, size, size, chosen.dtype, who))
                assert peak is not None  # None is for tasks with a limit
                rows.append({"direction": direction, "size": size, "who": who} | asdict(peak))
                expected = peak.predicted_bytes
                told = "" if expected is None else f"{expected / 1e6:>11.0f}{peak.peak_bytes / expected:>8.2f}"
                print(f"{direction} {size:<6} {who:<10}{peak.peak_bytes / 1e6:>10.0f}{told}", flush=True)
    if chosen.write:
        print(write_result(f"memory-{chosen.dtype}", {"family": chosen.family, "dtype": chosen.dtype, "rows": rows}))


if __name__ == "__main__":
    main()
