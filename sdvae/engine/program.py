"""A network with its weights, rewritten once into what runs fastest; each rewrite is exact on paper."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType

import torch
from torch import Tensor

from sdvae.config import VAEConfig
from sdvae.engine import ops
from sdvae.engine.convolutions import Convolution, CopiedConvolution, PackedConvolution, Upsampling, pack
from sdvae.engine.kernels import Kernels, Norm
from sdvae.engine.scaling import Exponents, Scale, plan_scales
from sdvae.engine.stages import Direction, Network, Stage, build_network
from sdvae.model import NORM_EPS

Weights = Mapping[str, Tensor]  # a state dict of AutoencoderKL
Pair = tuple[Tensor, Tensor]  # weight and bias


@dataclass(frozen=True)
class PackedStage:
    """A stage and its weights on the device.

    Attention has no `convolution` but `projections`, which make queries and output.
    """

    stage: Stage
    convolution: PackedConvolution | None = None
    shortcut: PackedConvolution | None = None
    projections: tuple[Pair, ...] = ()
    norm: Norm | None = None
    has_ones: bool = False  # whether the input carries a channel of ones

    @property
    def num_bytes(self) -> int:
        """Memory of the weights."""
        convolutions = [each for each in (self.convolution, self.shortcut) if each is not None]
        tensors = [tensor for pair in self.projections for tensor in pair]
        return sum(each.num_bytes for each in convolutions) + sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True, eq=False)  # tensors are neither equal nor unequal
class Program:
    """One direction of a VAE, ready to run in one dtype on one device."""

    network: Network
    stages: tuple[PackedStage, ...]
    dtype: torch.dtype
    device: torch.device
    kernels: Kernels
    exponents: Exponents  # of its range scaling

    @property
    def num_bytes(self) -> int:
        """Memory of all weights."""
        return sum(stage.num_bytes for stage in self.stages)


def compile_program(
    config: VAEConfig,
    direction: Direction,
    weights: Weights,
    dtype: torch.dtype,
    device: torch.device,
    exponents: Exponents = MappingProxyType({}),
    kernels: Kernels | None = None,
) -> Program:
    """Rewrite and pack one direction of a VAE; weights are added up and scaled in fp32 and rounded once."""
    kernels = kernels or choose_kernels(device)
    compiler = _Compiler(weights, config.norm_num_groups, dtype, device, kernels)
    network = build_network(config, direction)
    scales = plan_scales(network, exponents)
    stages = tuple(compiler.stage(stage, scale) for stage, scale in zip(network.stages, scales, strict=True))
    return Program(network, stages, dtype, device, kernels, exponents)


def choose_kernels(device: torch.device) -> Kernels:
    """Triton's on a GPU that has it, torch's elsewhere."""
    if triton_obstacle(device) is None:
        from sdvae.engine import triton_ops

        return triton_ops
    return ops


def triton_obstacle(device: torch.device) -> str | None:
    """Why Triton's kernels are not for a device, as far as it can be told without running one; or None."""
    if device.type != "cuda":
        return f"there are no others for {device.type}"
    if torch.version.hip is not None:
        return "ROCm's convolutions give another order of memory than our kernels read"
    if find_spec("triton") is None:
        return "Triton is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"our kernels need compute capability 8.0, and this GPU has {major}.{minor}"
    return None


class _Compiler:
    def __init__(
        self, weights: Weights, num_groups: int, dtype: torch.dtype, device: torch.device, kernels: Kernels
    ) -> None:
        self._weights, self._num_groups, self._dtype, self._device = weights, num_groups, dtype, device
        self._kernels = kernels

    def stage(self, stage: Stage, scale: Scale) -> PackedStage:
        norm = self._norm(stage.norm, scale.eps) if stage.norm else None
        if stage.kind == "attention":
            queries, out = self._attention(stage.name)
            projections = self._place(*queries), self._place(out[0] * scale.weight, out[1] * scale.bias)
            return PackedStage(stage, projections=projections, norm=norm)
        weight, bias = self._pair(stage.name)
        has_ones = stage.name == "decoder.conv_in" and "post_quant_conv.weight" in self._weights
        if has_ones:
            weight = fold_before(weight, *self._pair("post_quant_conv"))
        if stage.name == "encoder.conv_out" and "quant_conv.weight" in self._weights:
            weight, bias = fold_after(weight, bias, *self._pair("quant_conv"))
        weight, bias = weight * scale.weight, bias * scale.bias
        if stage.kind == "up":
            even, odd = (self._pack(half, bias.repeat(2), zeros_px=stage.zeros_px) for half in fold_upsample(weight))
            return PackedStage(stage, Upsampling(even, odd, self._kernels))
        if stage.kind == "down":
            return PackedStage(stage, self._pack(weight, bias, stride=2))
        convolution = self._pack(weight, bias, zeros_px=stage.zeros_px, adds=stage.adds)
        if stage.target == "output":  # fp32 in NCHW, which Triton's kernels do not write
            return PackedStage(stage, CopiedConvolution(convolution, ops), norm=norm)
        shortcut = None
        if stage.shortcut:
            projection, offset = self._pair(stage.shortcut)
            projected = self._pack(projection * scale.shortcut_weight, offset * scale.shortcut_bias)
            shortcut = CopiedConvolution(projected, self._kernels)
        return PackedStage(stage, convolution, shortcut, norm=norm, has_ones=has_ones)

    def _pair(self, name: str) -> Pair:
        return self._weights[f"{name}.weight"].detach().float(), self._weights[f"{name}.bias"].detach().float()

    def _norm(self, name: str, eps_scale: float) -> Norm:
        weight, bias = (values.to(self._device) for values in self._pair(name))
        return Norm(weight, bias, NORM_EPS * eps_scale, self._num_groups)

    def _attention(self, name: str) -> tuple[Pair, Pair]:
        q, k, v, out = (self._pair(f"{name}.{layer}") for layer in ("to_q", "to_k", "to_v", "to_out.0"))
        return fold_attention(q, k, v, out)

    def _pack(
        self, weight: Tensor, bias: Tensor, stride: int = 1, zeros_px: tuple[int, int] = (0, 0), adds: bool = False
    ) -> Convolution:
        weight, bias = weight.to(self._device, self._dtype), bias.to(self._device)
        return pack(weight, bias, self._kernels, stride, zeros_px, adds)

    def _place(self, weight: Tensor, bias: Tensor) -> Pair:
        return weight.to(self._device, self._dtype), bias.to(self._device, self._dtype)


def fold_upsample(weight: Tensor) -> Tensor:  # (O, I, 3, 3) -> (2, 2 * O, I, 2, 2): for even and for odd rows
    """Nearest-neighbour doubling and a 3x3 convolution as 2x2 convolutions of the small image: 4 taps for 9.

    Two rows (and columns) of three fall on one small pixel, so their weights add up. The first O outputs are even
    columns, made of a pixel and its left neighbour; the others are odd ones, of a pixel and its right neighbour.
    """
    top, middle, bottom = weight.unbind(2)
    rows = [torch.stack([top, middle + bottom], 2), torch.stack([top + middle, bottom], 2)]
    folded = []
    for row in rows:
        left, centre, right = row.unbind(3)
        folded.append(torch.cat([torch.stack([left, centre + right], 3), torch.stack([left + centre, right], 3)]))
    return torch.stack(folded)


def fold_before(
    weight: Tensor, before: Tensor, bias: Tensor
) -> Tensor:  # (O, I, 3, 3), (I, J, 1, 1) -> (O, J + 1, 3, 3)
    """A 1x1 convolution and the padded one after it as one, whose last input channel is 1 inside the image.

    Beyond the border that channel is 0 where zeros are, like the bias that they never saw, and 1 where pixels are.
    """
    before = torch.cat([before.flatten(1), bias[:, None]], 1)
    return torch.einsum("oihw,ij->ojhw", weight, before)


def fold_after(weight: Tensor, bias: Tensor, after: Tensor, after_bias: Tensor) -> Pair:
    """A convolution and the 1x1 convolution after it as one."""
    after = after.flatten(1)
    return torch.einsum("po,oihw->pihw", after, weight), after @ bias + after_bias


def fold_attention(q: Pair, k: Pair, v: Pair, out: Pair) -> tuple[Pair, Pair]:
    """Projections of queries and output such that the normalised tokens themselves are keys and values.

    Scores q.k are h' Wq' Wk h and what is the same for every key, which softmax forgets; and since its weights add up
    to one, the values' projection commutes with their mean. The usual 1 / sqrt(C) of the scores is in the queries.
    """
    scale = len(q[1]) ** -0.5
    queries = scale * (k[0].T @ q[0]), scale * (k[0].T @ q[1])
    return queries, (out[0] @ v[0], out[0] @ v[1] + out[1])
