"""An agent that sees a game only through a VAE's latents: can it play with a linear policy?"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from theory import catch
from theory.cross_entropy_search import Search, cross_entropy_search
from theory.dense import DenseVAE
from theory.figures import Grid, draw_grids
from theory.fit import Schedule, generator_of
from theory.grey import Shape, latent_means, train_grey_vae
from theory.work import Findings, Row, Work

TO_REACH = 0.95


@dataclass(frozen=True)
class Settings:
    """The VAE sees frames of games played at random; the three policies have the same budget."""

    num_random_games: int = 1000
    shape: Shape = field(default_factory=lambda: Shape(num_latents=8, width=256))
    schedule: Schedule = field(default_factory=lambda: Schedule(15))
    search: Search = field(default_factory=lambda: Search(num_rounds=20, population=50, num_best=8))
    num_games: int = 16  # each policy is judged by in a round
    num_seeds: int = 5


def random_frames(num_games: int, generator: torch.Generator) -> Tensor:  # (num_games * NUM_STEPS, D)
    """What is seen in games from random starts, with random actions."""
    starts = catch.every_start()
    states = starts[torch.randint(len(starts), (num_games,), generator=generator, dtype=torch.int64, device="cpu")]
    seen = []
    for _ in range(catch.NUM_STEPS):
        seen.append(states)
        actions = torch.randint(len(catch.MOVES), (num_games,), generator=generator, dtype=torch.int64, device="cpu")
        states = catch.step(states, actions)
    return catch.frames(torch.cat(seen)).flatten(1)


def play(policies: Tensor, seen: Tensor, starts: Tensor) -> Tensor:  # (P, 3(F + 1)), (S, F), (G, 3) -> (P, G) states
    """The last state of each game that each linear policy plays; `seen` is what it sees in each of `every_state`."""
    weights = policies.view(len(policies), len(catch.MOVES), -1)
    states = starts.expand(len(policies), -1, -1)
    for _ in range(catch.NUM_STEPS):
        inputs = seen[catch.number_of(states)]
        logits = torch.einsum("pgf,paf->pga", inputs, weights[:, :, :-1]) + weights[:, None, :, -1]
        states = catch.step(states, logits.argmax(2))
    return states


def share_caught(policies: Tensor, seen: Tensor, starts: Tensor) -> Tensor:  # (P,)
    """The share of games that each policy wins."""
    return catch.is_caught(play(policies, seen, starts)).to(torch.float32).mean(1)


def find_policy(seen: Tensor, settings: Settings, seed: int) -> Tensor:  # (1, 3(F + 1))
    """A linear policy found by playing: (weights, bias) of each action."""
    starts = catch.every_start()

    def score(policies: Tensor, generator: torch.Generator) -> Tensor:
        drawn = torch.randint(len(starts), (settings.num_games,), generator=generator, dtype=torch.int64, device="cpu")
        return share_caught(policies, seen, starts[drawn])

    num_parameters = len(catch.MOVES) * (seen.shape[1] + 1)
    return cross_entropy_search(score, num_parameters, generator_of(seed), settings.search)[None]


def standardised(values: Tensor) -> Tensor:  # (S, F), each column of mean 0 and std 1, or 0 where it never changes
    """What a policy sees, in units that suit every search alike."""
    centred = values - values.mean(0)
    return centred / centred.square().mean(0).sqrt().clamp_min(1e-6)


def run(work: Work, settings: Settings = Settings()) -> Findings:
    """The share of all games that is won, by what the policy sees."""
    model = train_grey_vae(
        work, "vae", random_frames(settings.num_random_games, generator_of(0)), settings.shape, settings.schedule
    )
    states = catch.every_state()
    pixels = catch.frames(states).flatten(1)
    seen = {
        "latents": standardised(latent_means(model, pixels)),
        "the true state": standardised(states.to(torch.float32)),
        "pixels": standardised(pixels),
    }
    caught: dict[str, list[float]] = {}
    for name, inputs in seen.items():
        policies = [find_policy(inputs, settings, seed) for seed in range(settings.num_seeds)]
        caught[name] = [share_caught(policy, inputs, catch.every_start()).item() for policy in policies]
    idle = catch.is_caught(catch.every_start()).to(torch.float32).mean().item()
    search = settings.search
    budget = f"{search.num_rounds * search.population * settings.num_games:,} games"
    rows = [
        Row(
            f"catch, a linear policy on {name} ({inputs.shape[1]} numbers), {budget}: share of all "
            f"{catch.NUM_GAMES} starts caught, mean of {settings.num_seeds} searches",
            f"{np.mean(caught[name]):.1%} (worst {min(caught[name]):.1%})",
            f">= {TO_REACH:.0%}" if name == "latents" else "",
            bool(np.mean(caught[name]) >= TO_REACH) if name == "latents" else None,
            f"{idle:.1%} by standing still" if name == "latents" else "",
        )
        for name, inputs in seen.items()
    ]
    text = (
        "The frames of a game that is played on latents. Below each: what the VAE decodes from the eight numbers "
        "that the policy sees."
    )
    policy = find_policy(seen["latents"], settings, 0)
    return Findings(
        rows, {"caught": caught, "standing_still": idle}, {_draw(work, model, policy, seen["latents"]): text}
    )


@torch.inference_mode()
def _draw(work: Work, model: DenseVAE, policy: Tensor, seen: Tensor) -> str:
    states = torch.tensor([[2, 0, catch.SIDE - catch.PADDLE]], dtype=torch.int64, device="cpu")
    shown = []
    weights = policy.view(len(catch.MOVES), -1)
    for _ in range(catch.NUM_STEPS):
        shown.append(states)
        logits = seen[catch.number_of(states)] @ weights[:, :-1].T + weights[:, -1]
        states = catch.step(states, logits.argmax(1))
    frames = catch.frames(torch.cat(shown)).flatten(1)
    both = torch.stack([frames, model.mean_image(latent_means(model, frames))]).view(2, -1, catch.SIDE, catch.SIDE)
    return draw_grids(work, "game", [Grid("A game played on latents", both, ("frame", "decoded"))])
