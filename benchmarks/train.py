#!/usr/bin/env python
"""Steps per second of `sdvae train`'s step, beside a plain loop of diffusers' AutoencoderKL with the same loss.

    benchmarks/train.py [--family sd1] [--size 256] [--batch 8] [--device cuda] [--photos FOLDER] [--write]

Both start from the same weights and see the same pixels; their losses and gradients are compared before they are timed,
in turns. Then a whole run on photos tells how long the network waits for them.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import test_data, write_result
from diffusers import AutoencoderKL
from torch import Tensor

from sdvae.engine.precision import choose_device
from sdvae.train import terms
from sdvae.train.build import build_state
from sdvae.train.config import (
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    Rung,
    TrainConfig,
)  # fmt: skip
from sdvae.train.data import Batch, memory_format
from sdvae.train.loop import train
from sdvae.train.optimise import update_average

OURS, THEIRS = "sdvae train", "a plain loop of diffusers"
SQUARED, KL = 4.0, 1e-6


def make_config(arguments: argparse.Namespace) -> TrainConfig:
    steps = arguments.steps
    return TrainConfig(
        steps=steps,
        model=ModelConfig(arguments.family),
        precision=arguments.precision,
        data=DataConfig(str(arguments.photos), (Rung(arguments.size, arguments.batch),), held_out=0),
        loss=LossConfig(squared=SQUARED, kl=KL),
        optimizer=OptimizerConfig(learning_rate=1e-5),
        output=OutputConfig(log_every=steps, save_every=steps, validate_every=steps),
    )


def plain_loss(model: AutoencoderKL, pixels: Tensor, noise: Tensor, config: TrainConfig) -> Tensor:
    """As in a script around diffusers: encode, sample, decode, squares and KL."""
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        posterior = model.encode(pixels).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        decoded = model.decode(mean + std * noise).sample.float()
    kl = 0.5 * (mean.square() + std.square() - posterior.logvar.float() - 1.0).sum()
    return (SQUARED * (decoded - pixels).square().sum() + KL * kl) / pixels.numel()


def seconds(step: Callable[[], None], device: torch.device) -> float:
    begun = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def main() -> None:
    arguments = parse()
    config, device = make_config(arguments), choose_device(arguments.device)
    times = race(config, arguments, device)
    speed = {name: 1.0 / statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        spread = (max(values) - min(values)) / statistics.median(values)
        print(f"{speed[name]:8.3f} steps/s  {name}  (spread {spread:.0%})")
    ratio = speed[OURS] / speed[THEIRS]
    print(f"{ratio:8.3f} times as fast; to reach: 1.0")
    with tempfile.TemporaryDirectory() as folder:
        report = train(config, Path(folder) / "run", arguments.device)
    print(f"{report.steps_per_s:8.3f} steps/s on photos, waiting {report.waiting:.1%}; to reach: below 5%")
    if arguments.write:
        result = {
            "family": arguments.family, "size_px": arguments.size, "batch": arguments.batch,
            "precision": config.precision, "device": str(device), "steps_per_s": speed, "ratio": ratio,
            "seconds": times, "on_photos": {"steps_per_s": report.steps_per_s, "waiting": report.waiting},
        }  # fmt: skip
        print(f"written to {write_result(f'train-{device.type}', result)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", default="small")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=150, help="of the run on photos")
    parser.add_argument("--photos", type=Path, default=test_data() / "train")
    parser.add_argument("--write", action="store_true", help="write results/train-DEVICE.json")
    return parser.parse_args()


def race(config: TrainConfig, arguments: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step, in turns; SystemExit where the two do not compute the same."""
    state = build_state(config, device)
    model = state.networks.model
    theirs = AutoencoderKL.from_config(model.config.to_diffusers())
    theirs.load_state_dict(model.state_dict())
    theirs = theirs.to(device).train()
    average = AutoencoderKL.from_config(model.config.to_diffusers()).to(device)
    optimizer = torch.optim.AdamW(theirs.parameters(), 1e-5, betas=(0.9, 0.95), weight_decay=0.0)
    pixels = torch.rand(arguments.batch, 3, arguments.size, arguments.size, device=device) * 2 - 1
    batch = Batch(pixels.to(memory_format=memory_format(device)), list(range(arguments.batch)))
    with torch.no_grad():
        noise = terms.image_noise(batch.draws, "latents", model.encode(batch.pixels).mean)

    def ours_backward() -> Tensor:
        loss = torch.stack(list(terms.forward(state.networks, config, batch, 0).terms.values())).sum()
        torch.autograd.backward(loss)
        return loss.detach()

    def theirs_backward() -> Tensor:
        loss = plain_loss(theirs, pixels, noise, config)
        torch.autograd.backward(loss)
        return loss.detach()

    first, second = ours_backward(), theirs_backward()
    named = dict(theirs.named_parameters())
    norm = torch.stack([parameter.grad.norm() for parameter in named.values()]).norm()
    apart = torch.stack([(value.grad - named[key].grad).norm() for key, value in model.named_parameters()]).norm()
    most = 1e-4 if config.precision == "fp32" else 0.05
    print(f"losses {float(first):.6f} and {float(second):.6f}, gradients apart by {float(apart / norm):.1e}")
    if abs(float(first / second) - 1.0) > most or float(apart / norm) > 10 * most:
        raise SystemExit("the two loops do not compute the same; nothing was timed")

    def ours_step() -> None:
        state.optimizer.zero_grad(set_to_none=True)
        loss = ours_backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        state.optimizer.step()
        update_average(state.average, model, 1000, 0.999)
        loss.item()

    def theirs_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = theirs_backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for kept, current in zip(average.parameters(), theirs.parameters(), strict=True):
                kept.lerp_(current, 0.001)
        loss.item()

    contenders = {OURS: ours_step, THEIRS: theirs_step}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(arguments.rounds + 2):
        for name, step in contenders.items():
            spent = seconds(step, device)
            if round_number >= 2:  # the first ones warm up
                times[name].append(spent)
    return times


if __name__ == "__main__":
    main()
