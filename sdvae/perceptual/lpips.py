"""LPIPS 0.1 (Zhang et al. 2018): how far two images are apart in the features of AlexNet or VGG16.

The backbones are torchvision's, cut off behind their last ReLU; names of parameters are those of its files.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvae.perceptual import files

Net = Literal["alex", "vgg"]

# A number is a convolution with so many outputs, "P" a max pooling; after "|" the features are compared.
_LAYERS: Mapping[Net, tuple[int | str, ...]] = {
    "alex": (64, "|", "P", 192, "|", "P", 384, "|", 256, "|", 256, "|"),
    "vgg": (64, 64, "|", "P", 128, 128, "|", "P", 256, 256, 256, "|", "P", 512, 512, 512, "|", "P", 512, 512, 512, "|"),
}
_BACKBONES: Mapping[Net, str] = {"alex": "alexnet", "vgg": "vgg16"}
# (kernel, stride, padding) of AlexNet's convolutions; VGG16's are all 3, 1, 1.
_ALEX = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))
_POOL = {"alex": (3, 2), "vgg": (2, 2)}
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and std, of pixels in [-1, 1]


class LPIPS(nn.Module):
    """The network with its linear layers; without `load`, these are zero."""

    shift: Tensor
    scale: Tensor

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.features, self.ends = _backbone(net)
        widths = [layer for layer, end in zip(_LAYERS[net], _LAYERS[net][1:], strict=False) if end == "|"]
        self.heads = nn.ParameterList(
            torch.zeros(1, int(width), 1, 1, dtype=torch.float32, device="cpu") for width in widths
        )
        self.register_buffer("shift", _constant(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", _constant(_SCALE).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def load(cls, net: Net) -> "tuple[LPIPS, tuple[files.Loaded, files.Loaded]]":
        """The published network, and its two files; MissingNetwork where one is not on this machine."""
        heads, backbone = files.read_lpips_heads(net), files.read(_BACKBONES[net])
        network = cls(net)
        named = {f"heads.{index}": heads.tensors.get(f"lin{index}.model.1.weight") for index in range(5)}
        tensors = {**backbone.tensors, **{key: value for key, value in named.items() if value is not None}}
        files.fill(network, tensors, f"{backbone.file} with LPIPS' {heads.file}")
        return network.eval().requires_grad_(False), (backbone, heads)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:  # both (N, 3, H, W) in [-1, 1] -> (N,)
        """How far each image of `first` is from the one of `second`."""
        distance = torch.zeros(len(first), dtype=first.dtype, device=first.device)
        for head, ours, theirs in zip(self.heads, self._maps(first), self._maps(second), strict=True):
            squares = (_unit(ours) - _unit(theirs)).square()
            distance = distance + F.conv2d(squares, head).mean((1, 2, 3))
        return distance

    def _maps(self, pixels: Tensor) -> Iterator[Tensor]:
        x = (pixels - self.shift) / self.scale
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.ends:
                yield x


def _backbone(net: Net) -> tuple[nn.Sequential, frozenset[int]]:
    """The layers under the numbers that torchvision gives them, and those behind which features are compared."""
    layers: list[nn.Module] = []
    ends: list[int] = []
    channels = 3
    shapes = iter(_ALEX)
    for layer in _LAYERS[net]:
        if layer == "|":
            ends.append(len(layers) - 1)
        elif layer == "P":
            layers.append(nn.MaxPool2d(*_POOL[net]))
        else:
            kernel, stride, padding = next(shapes) if net == "alex" else (3, 1, 1)
            layers += [nn.Conv2d(channels, int(layer), kernel, stride, padding), nn.ReLU()]
            channels = int(layer)
    return nn.Sequential(*layers), frozenset(ends)


def _unit(features: Tensor) -> Tensor:
    """Each position's features over their length, whose gradient is 0 where all of them are."""
    length = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    scaled: Tensor = features / (length + 1e-10)
    return scaled


def _constant(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")
