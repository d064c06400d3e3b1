"""sdvae beside rivals, in one process and in turns; what does not compute the same is not timed."""

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sdvae.bench.contenders import Contender, sdvae
from sdvae.bench.peak import measure_peak
from sdvae.bench.timing import in_turns, median_seconds
from sdvae.config import VAEConfig
from sdvae.engine.precision import DTYPES
from sdvae.engine.run import Engine
from sdvae.engine.stages import Direction, build_network
from sdvae.model import AutoencoderKL
from sdvae.vae import VAE

_MATMUL_SIDE = {"cuda": 8192}
_CPU_MATMUL_SIDE = 2048

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One contender's result; `refused` says why there is none."""

    name: str
    dtype: str
    memory_format: str
    relative_error: float  # L2, of the output against the reference network in fp32
    seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None  # above what was there before the call, weights not counted
    refused: str | None = None

    @property
    def median_s(self) -> float | None:
        """The middle of its times."""
        return statistics.median(self.seconds) if self.seconds else None


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    direction: Direction
    height: int
    width: int
    batch_size: int = 1
    rounds: int = 5


@dataclass(frozen=True)
class Measurement:
    """One direction at one size."""

    settings: Settings
    flops: int  # of the batch, as sdvae computes it; rivals, which fold no upsampling, do more for the same result
    predicted_bytes: int  # by sdvae's plan
    rows: tuple[Row, ...]  # sdvae first


def seeded_model(config: VAEConfig, seed: int = 0) -> AutoencoderKL:
    """A network with random weights: how long it takes does not depend on them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(config).requires_grad_(False).eval()


def seeded_batch(config: VAEConfig, settings: Settings) -> Tensor:
    """Pixels in [-1, 1], or latents, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    if settings.direction == "encode":
        shape = (settings.batch_size, config.in_channels, settings.height, settings.width)
        return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") * 2 - 1
    scale = config.downscale
    shape = (settings.batch_size, config.latent_channels, settings.height // scale, settings.width // scale)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def measure(vae: VAE, model: AutoencoderKL, settings: Settings, rivals: Sequence[Contender] = ()) -> Measurement:
    """Compare, then time: A B A B. `model` holds the same weights in fp32 on the CPU."""
    direction = settings.direction
    batch = seeded_batch(model.config, settings)
    logger.info("the reference network in fp32")
    expected = _reference(model, direction, batch)
    batch = batch.to(vae.device)
    rows = _race([sdvae(vae, direction), *rivals], batch, expected, settings.rounds, vae.device)
    height, width = batch.shape[2:]
    assert isinstance(vae.engine, Engine)  # a TAESD is not measured
    predicted = vae.engine.plan(direction, height, width, len(batch)).predict_bytes(len(batch))
    flops = len(batch) * build_network(model.config, direction).flops(height, width)
    return Measurement(settings, flops, predicted, tuple(rows))


def measure_roofline(device: torch.device, dtype: str, rounds: int = 5) -> float:
    """TFLOP/s of a large square matrix product, which no convolution of the same dtype is expected to beat."""
    side = _MATMUL_SIDE.get(device.type, _CPU_MATMUL_SIDE)
    left, right = (torch.randn((side, side), dtype=torch.float32, device=device).to(DTYPES[dtype]) for _ in range(2))
    return 2 * side**3 / median_seconds(lambda: left @ right, device, rounds) / 1e12


def relative_error(values: Tensor, expected: Tensor) -> float:
    """L2 of the difference over that of what is expected."""
    return float((values.cpu().float() - expected).norm() / expected.norm())


def _reference(model: AutoencoderKL, direction: Direction, batch: Tensor) -> Tensor:
    """What is right: the reference network in fp32 on the CPU, which tests compare with diffusers."""
    network = model.float()
    with torch.no_grad():
        return network.encode(batch).mean if direction == "encode" else network.decode(batch)


def _race(
    contenders: Sequence[Contender], batch: Tensor, expected: Tensor, rounds: int, device: torch.device
) -> list[Row]:
    """A row for each contender: its first run is compared, its second weighed, the others timed."""
    with torch.no_grad():
        rows = [_check(contender, batch, expected, device) for contender in contenders]
        running = [index for index, row in enumerate(rows) if row.refused is None]
        runs = {str(index): partial(contenders[index].run, batch) for index in running}
        seconds = in_turns(runs, rounds, device)
    return [replace(row, seconds=tuple(seconds.get(str(index), ()))) for index, row in enumerate(rows)]


def _check(contender: Contender, batch: Tensor, expected: Tensor, device: torch.device) -> Row:
    logger.info("%s in %s, %s", contender.name, contender.dtype, contender.memory_format)
    error = relative_error(contender.run(batch), expected)
    row = Row(contender.name, contender.dtype, contender.memory_format, error)
    if not error <= contender.tolerance:  # NaN is refused, too
        return replace(row, refused=f"differs from fp32 by {error:.2g}, more than {contender.tolerance:g}")
    _, peak_bytes = measure_peak(lambda: contender.run(batch), device)
    return replace(row, peak_bytes=peak_bytes)
