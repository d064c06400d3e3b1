"""Where a run stands, in one file: written whole or not at all, so that a kill costs the steps since the last one."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sdvae.errors import TrainError, WeightsError
from sdvae.model import AutoencoderKL
from sdvae.train.terms import Networks
from sdvae.weights.files import open_weights
from sdvae.weights.keymap import some
from sdvae.weights.write import OutputTensor, write_safetensors

_STEP_KEY = "sdvae.step"
_ADVERSARY = ("discriminator.", "adversary.")


@dataclass
class State:
    """All that a step changes."""

    step: int  # steps done
    networks: Networks
    average: AutoencoderKL
    optimizer: torch.optim.Optimizer
    discriminator_optimizer: torch.optim.Optimizer | None = None

    def save(self, path: Path) -> None:
        """Replace the file; OutputError where that fails, and then it is what it was."""
        tensors = {key: OutputTensor.of(tensor) for key, tensor in self._tensors()}
        write_safetensors(path, tensors, {_STEP_KEY: str(self.step)})

    def load(self, path: Path) -> None:
        """Become what `save` wrote; TrainError where the file has other tensors, or is damaged."""
        try:
            file = open_weights(path)
            ours, theirs = dict(self._tensors()), file.entries
            # An adversary may join a run later; its tensors then begin as they are.
            differing = [key for key in ours.keys() ^ theirs.keys() if not key.startswith(_ADVERSARY)]
            if differing:
                raise TrainError(f"{path} is not the state of this run: {some(sorted(differing))} differ")
            for key in ours.keys() & theirs.keys():
                ours[key].copy_(theirs[key].read())
            self.step = int(file.metadata[_STEP_KEY])
        except (WeightsError, KeyError, ValueError, RuntimeError) as error:
            raise TrainError(f"{path} cannot be read: {error}; remove it to begin anew") from error

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        networks = self.networks
        modules: dict[str, nn.Module | None] = {
            "model": networks.model, "average": self.average, "discriminator": networks.discriminator
        }  # fmt: skip
        for name, module in modules.items():
            if module is not None:
                yield from ((f"{name}.{key}", tensor) for key, tensor in module.state_dict().items())
        yield "log_scale", networks.log_scale.detach()
        for name, optimizer in (("optimizer", self.optimizer), ("adversary", self.discriminator_optimizer)):
            if optimizer is not None:
                for number, values in optimizer.state_dict()["state"].items():
                    yield from ((f"{name}.{number}.{key}", value) for key, value in values.items())
