"""TinyEngine: what `Engine` is to a KL-VAE. A TAESD, which has no statistics, runs on groups of whole images."""

import copy
import logging
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from sdvae.engine import ops
from sdvae.engine.convolutions import PackedConvolution, Upsampling, pack
from sdvae.engine.memory import parse_bytes
from sdvae.engine.parallel import run_apart
from sdvae.engine.plan import IMAGES_AT_ONCE, PIXEL_BYTES, budget_refusal, group_sizes
from sdvae.engine.program import fold_upsample
from sdvae.engine.stages import Direction
from sdvae.latents import standardise, unstandardise
from sdvae.posterior import LOGVAR_MIN
from sdvae.tiny import CLAMP, AutoencoderTiny, TinyBlock

logger = logging.getLogger(__name__)

Step = Callable[[Tensor], Tensor]

_LIVE = 4  # tensors of the network's width and the pixels' size that are there at once, and a rest


class TinyEngine:
    """Runs a TAESD in one dtype on one device; on a CPU with its weights packed, elsewhere as its module is."""

    def __init__(self, source: AutoencoderTiny, device: torch.device, dtype: torch.dtype) -> None:
        self.source = source
        self.calls = 0
        self.is_deterministic = False  # whether groups have one size for a size of images
        self.images_at_once = IMAGES_AT_ONCE  # images that run at once
        self._device, self._dtype = device, dtype
        placed = copy.deepcopy(source).requires_grad_(False).eval().to(device, dtype)
        self._layers: dict[Direction, nn.Sequential] = {
            "encode": placed.encoder.layers,
            "decode": placed.decoder.layers,
        }
        is_cpu = device.type == "cpu"
        self._steps: dict[Direction, list[Step]] = {
            side: list(_pack(layers)) if is_cpu else [layers] for side, layers in self._layers.items()
        }
        self._float32: TinyEngine | None = None  # the twin that runs what overflows

    def encode_moments(self, pixels: Tensor, budget: int | str | None = None) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, 2C, H/8, W/8): mean and logvar of raw latents."""
        mean = unstandardise(self._run("encode", (pixels + 1.0) / 2.0, budget), self.source.config)
        return torch.cat([mean, torch.full_like(mean, LOGVAR_MIN)], dim=1)

    def decode(self, latents: Tensor, budget: int | str | None = None) -> Tensor:
        """Raw (N, C, h, w) -> pixels (N, 3, 8h, 8w)."""
        scaled = standardise(latents.float(), self.source.config)
        # Image by image: the end of a thread's share is rounded otherwise, wherever it lies in a batch.
        clamped = torch.cat([torch.tanh(image / CLAMP) * CLAMP for image in torch.split(scaled, 1)])
        return self._run("decode", clamped, budget) * 2.0 - 1.0

    def in_float32(self) -> "TinyEngine":
        """The twin that computes in fp32, as deterministic as this engine is now; itself if it computes in fp32."""
        if self._dtype == torch.float32:
            return self
        if self._float32 is None:
            self._float32 = TinyEngine(self.source, self._device, torch.float32)
        self._float32.is_deterministic, self._float32.images_at_once = self.is_deterministic, self.images_at_once
        return self._float32

    def describe(self) -> str:
        """What runs, in words."""
        kernels = "oneDNN, packed" if self._device.type == "cpu" and ops.has_onednn() else "torch"
        return f"sdvae's TAESD, {str(self._dtype).removeprefix('torch.')} on {self._device}, {kernels}"

    def predict_bytes(
        self, direction: Direction, height: int, width: int, num_images: int = 1, at_once: int = 1
    ) -> int:
        """Peak memory of a run on inputs of this size, so many of them at once, beside the weights."""
        config = self.source.config
        side = config.downscale if direction == "decode" else 1
        num_px = height * side * width * side
        latents_px = config.downscale**2
        of_image = num_px * config.in_channels + num_px * config.latent_channels // latents_px
        return (
            at_once * _LIVE * config.block_out_channels[0] * num_px * self._dtype.itemsize
            + 2 * num_images * of_image * PIXEL_BYTES
        )

    def _group(self, direction: Direction, batch: Tensor, budget: int | str | None) -> tuple[int, int]:
        """How many images run in a call, and how many calls at a time; BudgetError where they need more memory."""
        num_images, _, height, width = batch.shape
        flops = _flops(self._layers[direction], height, width)
        num_threads = torch.get_num_threads() if self._device.type == "cpu" else 1
        budget_bytes = None if budget is None else parse_bytes(budget)
        for group, most_workers in group_sizes(
            flops, num_images, self.images_at_once, num_threads, self.is_deterministic
        ):
            num_workers = min(most_workers, -(-num_images // group))
            num_bytes = self.predict_bytes(direction, height, width, num_images, group * num_workers)
            if budget_bytes is None or num_bytes <= budget_bytes:
                return group, num_workers
        assert budget_bytes is not None
        side = self.source.config.downscale if direction == "decode" else 1
        raise budget_refusal(direction, num_images, (height * side, width * side), num_bytes, budget_bytes)

    def _run(self, direction: Direction, batch: Tensor, budget: int | str | None) -> Tensor:
        self.calls += 1
        size, num_workers = self._group(direction, batch, budget)
        parts = torch.split(batch, size)
        done: list[Tensor] = [batch] * len(parts)

        def run_part(index: int) -> None:
            done[index] = self._run_group(direction, parts[index], size)

        threads_each = 1 if self.is_deterministic else max(1, torch.get_num_threads() // num_workers)
        run_apart([partial(run_part, index) for index in range(len(parts))], num_workers, threads_each)
        out = torch.cat(done) if len(done) > 1 else done[0]
        if self._dtype != torch.float32 and not out.sum().isfinite():
            for index, image in enumerate(out):
                if not image.isfinite().all():
                    logger.warning("image %d of the batch overflowed in %s and runs again in fp32", index, self._dtype)
                    image.copy_(self.in_float32()._run(direction, batch[index : index + 1], budget)[0])
        return out

    def _run_group(self, direction: Direction, images: Tensor, size: int) -> Tensor:
        """Images through the layers -> fp32; a deterministic group is filled up with zeros."""
        # NHWC is 2x faster on CPUs, and loses on CUDA where GroupNorm is torch's own.
        memory_format = torch.channels_last if self._device.type == "cpu" else torch.contiguous_format
        num_images = len(images)
        if self.is_deterministic and num_images < size:
            images = torch.cat([images, images.new_zeros(size - num_images, *images.shape[1:])])
        x = images.to(self._device, self._dtype).contiguous(memory_format=memory_format)
        for step in self._steps[direction]:
            x = step(x)
        return x[:num_images].float()


def _pack(layers: nn.Sequential) -> Iterator[Step]:
    """The layers of an encoder or a decoder, with packed convolutions; what they alone read is written over."""
    is_upsampled = False
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            packed = _upsampling(layer) if is_upsampled else _convolution(layer)
            yield partial(_convolve, packed)
        elif isinstance(layer, TinyBlock):
            yield _Block(layer)
        elif isinstance(layer, nn.ReLU):
            yield torch.relu_
        is_upsampled = isinstance(layer, nn.Upsample)


class _Block:
    """A TinyBlock, whose sum is made in the memory of its input."""

    def __init__(self, block: TinyBlock) -> None:
        first, _, second, _, last = block.conv
        self._pool = block.pool
        self._first, self._second, self._last = _convolution(first), _convolution(second), _convolution(last, adds=True)

    def __call__(self, x: Tensor) -> Tensor:
        if self._pool is not None:
            x = x + self._pool(x)
        made = torch.relu_(self._first.convolve(x, None))
        made = torch.relu_(self._second.convolve(made, None))
        return torch.relu_(self._last.convolve(made, x))


def _convolve(packed: PackedConvolution, x: Tensor) -> Tensor:
    return packed.convolve(x, None)


def _convolution(layer: nn.Module, adds: bool = False) -> PackedConvolution:
    assert isinstance(layer, nn.Conv2d)
    return pack(layer.weight, _bias(layer), ops, stride=layer.stride[0], zeros_px=(1, 1), adds=adds)


def _upsampling(layer: nn.Conv2d) -> PackedConvolution:
    """Nearest-neighbour doubling and the convolution after it, folded."""
    bias = _bias(layer).repeat(2)
    folded = fold_upsample(layer.weight.float()).to(layer.weight.dtype)
    even, odd = (pack(half, bias, ops, stride=1, zeros_px=(1, 1), adds=False) for half in folded)
    return Upsampling(even, odd, ops)


def _bias(layer: nn.Conv2d) -> Tensor:
    return (
        torch.zeros(layer.out_channels, dtype=torch.float32, device=layer.weight.device)
        if layer.bias is None
        else layer.bias.float()
    )


def _flops(layers: nn.Sequential, height: int, width: int) -> int:
    """Operations of one image, of convolutions only."""
    num_px, flops = height * width, 0
    for layer in layers:
        if isinstance(layer, nn.Upsample):
            num_px *= 4
        for part in layer.modules():
            if isinstance(part, nn.Conv2d):
                num_px //= part.stride[0] ** 2
                flops += 2 * num_px * part.weight.numel()
    return max(1, flops)
