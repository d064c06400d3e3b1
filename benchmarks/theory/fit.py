"""Training by epochs, on one thread. It goes on where it was interrupted, with the same numbers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import trange

from theory.work import Work

Network = TypeVar("Network", bound=nn.Module)
Loss = Callable[[Sequence[Tensor], torch.Generator], Tensor]  # (tensors of a batch, randomness) -> a number


@dataclass(frozen=True)
class Schedule:
    """AdamW with a learning rate that falls to zero as a cosine."""

    num_epochs: int
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.0


def generator_of(*numbers: int) -> torch.Generator:
    """Randomness that belongs to these numbers (a seed, an epoch ...) and to nothing else."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63)
    return torch.Generator("cpu").manual_seed(seed)


def seeded(make: Callable[[], Network], seed: int) -> Network:
    """A network with the weights that belong to `seed`; torch's own randomness is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def fit(
    work: Work, name: str, model: nn.Module, data: Sequence[Tensor], loss: Loss, schedule: Schedule, seed: int = 0
) -> list[float]:
    """Train `model` in place on `data`, tensors of one length; returns the mean loss of each epoch."""
    num_items = len(data[0])
    num_batches = -(-num_items // schedule.batch_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True
    )
    losses: list[float] = []
    if (kept := work.load(name)) is not None:
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        losses = kept["losses"]
    model.train()
    for epoch in trange(len(losses), schedule.num_epochs, desc=name, initial=len(losses), total=schedule.num_epochs):
        generator = generator_of(seed, epoch)
        order = torch.randperm(num_items, generator=generator).split(schedule.batch_size)
        total = 0.0
        for number, rows in enumerate(order):
            done = (epoch * num_batches + number) / (schedule.num_epochs * num_batches)
            optimizer.param_groups[0]["lr"] = schedule.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))
            value = loss([tensor[rows] for tensor in data], generator)
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += value.item() * len(rows)
        losses.append(total / num_items)
        work.save(name, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses})
    model.eval()
    return losses
