#!/usr/bin/env python
"""Train a small class-conditional DiT on a latent store, sample it, and save latents that `sdvae decode` reads.

    sdvae encode train-images-idx3-ubyte.gz STORE --size 64     # MNIST's digits; or a folder of photos for each class
    scripts/train_tiny_diffusion.py STORE -o samples.safetensors     # 14 minutes on one core
    sdvae decode samples.safetensors SAMPLES

The loop of any latent-diffusion training, as short as it gets: LatentDataset -> DataLoader -> DiT -> latents.
Rectified flow: x_t = (1 - t) x + t noise, and the network learns the velocity noise - x (Liu 2022; Esser 2024).
"""

import argparse
import copy
import itertools
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sdvae import LatentDataset
from sdvae.reading.samplers import BucketBatchSampler

SEED = 0
NUM_LAYERS, NUM_HEADS, HEAD_DIM = 6, 3, 64
BATCH_SIZE = 128
LEARNING_RATE, WARMUP_STEPS = 1e-3, 100
EMA_DECAY = 0.995
NUM_SAMPLING_STEPS, GUIDANCE = 40, 2.0
SAMPLES_PER_CLASS = 8


def make_model(dataset: LatentDataset) -> DiTTransformer2DModel:
    """A DiT whose blocks begin as the identity; while training it drops a tenth of the labels, for guidance."""
    channels, height, _ = dataset[0]["latents"].shape
    model = DiTTransformer2DModel(
        in_channels=channels, sample_size=height, patch_size=2, num_layers=NUM_LAYERS, num_attention_heads=NUM_HEADS,
        attention_head_dim=HEAD_DIM, num_embeds_ada_norm=len(dataset.classes),
    )  # fmt: skip
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
    nn.init.zeros_(model.proj_out_2.weight)
    return model


def velocity(model: DiTTransformer2DModel, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x, timestep=1000.0 * t, class_labels=labels).sample.float()


def train(dataset: LatentDataset, num_steps: int) -> DiTTransformer2DModel:  # with averaged weights
    sampler = BucketBatchSampler(dataset, BATCH_SIZE, seed=SEED)
    loader = DataLoader(dataset, batch_sampler=sampler)
    model = make_model(dataset)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    step, started, mean_loss = 0, time.monotonic(), math.nan
    while step < num_steps:
        for batch in loader:  # one epoch; each has an order and noise of its own
            x, labels = batch["latents"], batch["label"]
            noise = torch.randn_like(x)
            t = torch.sigmoid(torch.randn(len(x)))  # SD3's choice: most often in the middle
            x_t = torch.lerp(x, noise, t.view(-1, 1, 1, 1))
            loss = F.mse_loss(velocity(model, x_t, t, labels), noise - x)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            warm, decay = min(1.0, (step + 1) / WARMUP_STEPS), 0.5 * (1 + math.cos(math.pi * step / num_steps))
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * warm * decay
            optimizer.step()
            for kept, current in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(current.detach(), 1 - min(EMA_DECAY, (1 + step) / (10 + step)))
            mean_loss = loss.item() if step == 0 else 0.98 * mean_loss + 0.02 * loss.item()
            step += 1
            if step % 100 == 0 or step == num_steps:
                print(
                    f"step {step} of {num_steps}, loss {mean_loss:.4f}, {time.monotonic() - started:.0f} s", flush=True
                )
            if step == num_steps:
                break
    return average.eval()


@torch.no_grad()
def sample(model: DiTTransformer2DModel, labels: Tensor, shape: tuple[int, ...]) -> Tensor:  # (N, C, h, w) scaled
    """Euler steps from noise to latents, with classifier-free guidance: label number `num_classes` is no class."""
    x = torch.randn(len(labels), *shape)
    no_class = torch.full_like(labels, model.config.num_embeds_ada_norm)
    times = torch.linspace(1, 0, NUM_SAMPLING_STEPS + 1)
    for t, t_next in itertools.pairwise(times):
        both = velocity(model, x.repeat(2, 1, 1, 1), t.expand(2 * len(x)), torch.cat([labels, no_class]))
        with_class, without = both.chunk(2)
        x = x + (t_next - t) * torch.lerp(without, with_class, GUIDANCE)
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1800)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    dataset = LatentDataset(arguments.store, seed=SEED)
    model = train(dataset, arguments.steps)
    labels = torch.arange(len(dataset.classes)).repeat(SAMPLES_PER_CLASS)
    latents = sample(model, labels, dataset[0]["latents"].shape)
    save_file({"latents": latents}, arguments.output, {"latents": "scaled"})  # `sdvae decode` reads how they are scaled
    print(f"{len(latents)} latents of classes {dataset.classes} are in {arguments.output}")


if __name__ == "__main__":
    main()
