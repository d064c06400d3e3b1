"""Peak memory of one encode or decode in a fresh process, beside what the plan predicts."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from sdvae.bench.peak import address_space, measure_peak
from sdvae.bench.rivals import Contender, diffusers, ours
from sdvae.bench.throughput import Settings, seeded_batch, seeded_model
from sdvae.config import VAEConfig
from sdvae.engine.precision import DTYPES
from sdvae.engine.stages import Direction
from sdvae.errors import BenchError
from sdvae.vae import VAE

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Task:
    """What the process is to run, on a CPU with random weights.

    `limit_bytes` is a hard limit on the address space it may take from then on (RLIMIT_AS).
    """

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
    told = json.dumps(asdict(task))
    command = [sys.executable, "-m", "sdvae.bench.memory", told]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(environment or {}))
    if done.returncode == 0:
        return Peak(**json.loads(done.stdout.splitlines()[-1]))
    if task.limit_bytes is not None and "can't allocate memory" in done.stderr:
        return None
    raise BenchError(f"the process that was to be measured ended with {done.returncode}: {done.stderr.strip()[-300:]}")


def _measure(task: Task) -> Peak:
    model = seeded_model(task.config)
    vae = VAE(model, _CPU, DTYPES[task.dtype], "random weights")
    contender = ours(vae, task.direction, task.budget_bytes) if task.who == "sdvae" else _theirs(task)
    settings = Settings(task.direction, task.height, task.width)
    batch = seeded_batch(task.config, settings)
    side = 8 * task.config.downscale
    with torch.no_grad():
        contender.run(seeded_batch(task.config, Settings(task.direction, side, side)))  # packs the weights
        predicted = None
        if task.who == "sdvae":
            plan = vae.engine.plan(task.direction, *batch.shape[2:], budget=task.budget_bytes)  # type: ignore[union-attr, misc]
            predicted = plan.predict_bytes() - batch.nbytes
        if task.limit_bytes is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_AS, (address_space() + task.limit_bytes,) * 2)
        _, peak = measure_peak(lambda: contender.run(batch), _CPU)
    if peak is None:
        raise BenchError("peak memory is read from Linux' /proc; run this there")
    return Peak(peak, predicted)


def _theirs(task: Task) -> Contender:
    return diffusers(seeded_model(task.config), task.direction, _CPU, task.dtype, "channels_last")


def _read(told: dict[str, Any]) -> Task:
    fields = told.pop("config").items()
    config: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields}
    return Task(VAEConfig(**config), **told)


if __name__ == "__main__":
    print(json.dumps(asdict(_measure(_read(json.loads(sys.argv[1]))))))
