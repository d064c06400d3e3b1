"""The discriminator: a PatchGAN, which says of each patch of an image whether it is real or decoded."""

from torch import Tensor, nn

_MAX_GROWTH = 8  # of the width, over the layers
_INIT_STD = 0.02


class PatchDiscriminator(nn.Module):
    """Convolutions of 4x4, as in pix2pix (Isola et al. 2017, arXiv 1611.07004); logits, one for each patch.

    It normalises by GroupNorm where pix2pix has BatchNorm: an image's logits depend on no other image, so that a
    batch may be spread over ranks, and real and decoded images need not be kept apart.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, num_layers: int = 3, num_groups: int = 8) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        before = width
        for layer in range(1, num_layers + 1):
            after = width * min(2**layer, _MAX_GROWTH)
            stride = 2 if layer < num_layers else 1
            layers += [
                nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(num_groups, after),
                nn.LeakyReLU(0.2),
            ]
            before = after
        self.layers = nn.Sequential(*layers, nn.Conv2d(before, 1, 4, padding=1))
        self.apply(_initialise)

    def forward(self, pixels: Tensor) -> Tensor:  # (N, 3, H, W) in [-1, 1] -> logits (N, 1, h, w)
        """Above 0 where a patch is taken for real."""
        logits: Tensor = self.layers(pixels)
        return logits


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, _INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
