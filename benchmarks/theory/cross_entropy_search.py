"""Cross-entropy search (Rubinstein 1999; for linear policies Szita and Lorincz 2006): no gradient, only scores."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Score = Callable[[Tensor, torch.Generator], Tensor]  # (P, D) parameters -> (P,), larger is better


@dataclass(frozen=True)
class Search:
    """How many parameters are tried, and how many of the best shape the next ones."""

    num_rounds: int = 40
    population: int = 100
    num_best: int = 10
    extra_std: float = 0.5  # added in the first round, less in each; 0 in the last


def cross_entropy_search(
    score: Score, num_parameters: int, generator: torch.Generator, search: Search
) -> Tensor:  # (D,)
    """The mean of the last round's best parameters.

    Each round draws parameters from a Gaussian, and fits it to the best of them. Noise that fades is added to its
    std, so that it does not narrow too early (Szita and Lorincz 2006).
    """
    mean = torch.zeros(num_parameters, dtype=torch.float32, device="cpu")
    std = torch.ones(num_parameters, dtype=torch.float32, device="cpu")
    for number in range(search.num_rounds):
        noise = torch.randn((search.population, num_parameters), generator=generator, dtype=torch.float32, device="cpu")
        tried = mean + std * noise
        best = tried[score(tried, generator).topk(search.num_best).indices]
        left = 1.0 - (number + 1) / search.num_rounds
        mean, std = best.mean(0), best.std(0, correction=0) + search.extra_std * left
    return mean
