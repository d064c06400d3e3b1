"""Engine: runs the weights of a module that is alive, be it ours or diffusers', in our network."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sdvae.config import VAEConfig
from sdvae.model import AutoencoderKL


class Engine:
    """Encodes and decodes with the layers of `source`, whose names are those of `AutoencoderKL`.

    The layers (convolutions, norms, linear maps) are borrowed whole, not copied: what happens to them (`.to()`, new
    weights, gradients, offload hooks, adapters) happens here. Nothing is packed, so nothing can be stale.
    `calls` counts the runs of a network: one per encode and decode, one per tile where those are tiled.
    """

    def __init__(self, source: nn.Module, config: VAEConfig) -> None:
        self.source = source
        self.calls = 0
        with torch.device("meta"):
            self._model = AutoencoderKL(config)
        self.layer_names = frozenset(
            name for name, module in self._model.named_modules() if any(True for _ in module.parameters(recurse=False))
        )
        self._layers: dict[str, nn.Module] = {}

    def encode_moments(self, pixels: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, 2C, H/8, W/8), sizes floored
        """The encoder's output, after `quant_conv`; differentiable."""
        return self._run().encode_moments(pixels)

    def decode(self, latents: Tensor) -> Tensor:  # raw (N, C, h, w) -> (N, 3, 8h, 8w)
        """Pixels of raw latents; differentiable."""
        return self._run().decode(latents)

    def describe(self) -> str:
        """What runs, in words."""
        parameter = next(self.source.parameters())
        return f"sdvae's reference network, {str(parameter.dtype).removeprefix('torch.')} on {parameter.device}"

    def _run(self) -> AutoencoderKL:
        self.calls += 1
        layers = dict(self._borrowed())
        if layers != self._layers:  # modules compare by identity: an adapter or another module took a layer's place
            for name, layer in layers.items():
                self._model.set_submodule(name, layer)
            self._layers = layers
        for ours, theirs in ((self._model.encoder, "encoder"), (self._model.decoder, "decoder")):
            ours.gradient_checkpointing = bool(self.source.get_submodule(theirs).gradient_checkpointing)
        return self._model

    def _borrowed(self) -> Iterator[tuple[str, nn.Module]]:
        return ((name, self.source.get_submodule(name)) for name in self.layer_names)
