"""The optimiser: AdamW, its schedule, the average of the weights, and gradients that all ranks share."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from sdvae.train.config import OptimizerConfig


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig, rate: float) -> torch.optim.AdamW:
    """AdamW over the parameters that are trained, with the tensors that its first step would make."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    is_fused = all(parameter.device.type == "cuda" for parameter in trained)
    optimizer = torch.optim.AdamW(trained, rate, config.betas, weight_decay=config.weight_decay, fused=is_fused)
    for parameter in trained:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device if is_fused else "cpu"),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def rate_share(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """What the learning rate is multiplied by: a linear warm-up, then half a cosine down to `final_share`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.final_share + (1.0 - config.final_share) * cosine


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Move the averaged weights towards the model's; at first fast, so that the start is forgotten."""
    decay = min(decay, (1 + step) / (10 + step))
    pairs = zip(average.parameters(), model.parameters(), strict=True)
    kept, current = zip(*[(a, b) for a, b in pairs if b.requires_grad], strict=True)
    torch._foreach_lerp_(list(kept), list(current), 1.0 - decay)


def mean_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their mean over all ranks, in place.

    Gradients go through here in one piece. torch's DDP cannot: R1 and the adversary's weight take gradients themselves
    (`torch.autograd.grad`), which DDP does not see.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The gradients of an optimiser's parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
