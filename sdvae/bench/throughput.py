"""Ours against rivals, in one process and in turns; what does not compute the same is not timed."""

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sdvae.bench.kernels import measure_roofline
from sdvae.bench.peak import measure_peak
from sdvae.bench.rivals import (
    Contender,
    diffusers,
    diffusers_compiled,
    diffusers_tiled,
    ours,
    reference,
    survey_configurations,
)
from sdvae.bench.timing import in_turns
from sdvae.config import VAEConfig
from sdvae.engine.run import Engine
from sdvae.engine.stages import Direction, build_network
from sdvae.model import AutoencoderKL
from sdvae.vae import VAE

# Relative L2 from fp32 at which a result is another one: several times what rounding does to this network.
TOLERANCES = {"fp32": 1e-3, "fp16": 0.03, "bf16": 0.15}
APPROXIMATE = 0.8  # tiles have statistics of their own: far off on random weights, but still akin
_SURVEY_ROUNDS = 2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One contender's result; `refused` says why there is none."""

    name: str
    dtype: str
    memory_format: str
    relative_error: float | None = None  # L2, of the output against the reference network in fp32
    seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None  # above what was there before the call, weights not counted
    refused: str | None = None

    @property
    def median_s(self) -> float | None:
        """The middle of its times."""
        return statistics.median(self.seconds) if self.seconds else None


@dataclass(frozen=True)
class Measurement:
    """One direction at one size."""

    direction: Direction
    height: int
    width: int
    batch_size: int
    flops: int  # of the batch, as sdvae computes it; rivals, which fold no upsampling, do more for the same result
    predicted_bytes: int  # by sdvae's plan
    rows: tuple[Row, ...]  # sdvae first
    survey: tuple[Row, ...]  # diffusers in each dtype and memory format


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    direction: Direction
    height: int
    width: int
    batch_size: int = 1
    rounds: int = 5
    rivals: tuple[str, ...] = ()  # of RIVALS


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
        return torch.rand(shape, generator=generator) * 2 - 1
    scale = config.downscale
    shape = (settings.batch_size, config.latent_channels, settings.height // scale, settings.width // scale)
    return torch.randn(shape, generator=generator)


def measure(vae: VAE, model: AutoencoderKL, settings: Settings) -> Measurement:
    """Compare, then time: A B A B. `model` holds the same weights in fp32 on the CPU."""
    direction, device = settings.direction, vae.device
    batch = seeded_batch(model.config, settings)
    logger.info("the reference network in fp32")
    expected = reference(model, direction, batch)
    batch = batch.to(device)
    survey: tuple[Row, ...] = ()
    contenders = [ours(vae, direction)]
    if "loaded" in settings.rivals:
        title = "diffusers as loaded"
        contenders.append(diffusers(model, direction, device, "fp32", "contiguous", title=title))
    dtype, memory_format = contenders[0].dtype, "channels_last"
    if {"best", "compile"} & set(settings.rivals):
        survey = _survey(model, batch, expected, settings, device)
        best = min((row for row in survey if row.seconds), key=lambda row: row.median_s or 0.0)
        best_configuration = best.dtype, best.memory_format
        if "best" in settings.rivals:
            contenders.append(diffusers(model, direction, device, *best_configuration, title="diffusers at its best"))
        if "compile" in settings.rivals:
            for is_reindexed in (True, False) if device.type == "cuda" else (True,):
                logger.info("compiling diffusers")
                contenders.append(
                    diffusers_compiled(model, direction, device, *best_configuration, is_reindexed=is_reindexed)
                )
    if "tiled" in settings.rivals:
        side_px = max(settings.height, settings.width)
        contenders.append(diffusers_tiled(model, direction, device, dtype, memory_format, side_px))
    rows = _race(contenders, batch, expected, settings.rounds, device)
    height, width = batch.shape[2:]
    assert isinstance(vae.engine, Engine)  # a TAESD is not measured
    predicted = vae.engine.plan(direction, height, width, len(batch)).predict_bytes(len(batch))
    flops = len(batch) * build_network(model.config, direction).flops(height, width)
    size = settings.height, settings.width
    return Measurement(direction, *size, len(batch), flops, predicted, tuple(rows), survey)


def rooflines(measurements: Sequence[Measurement], device: torch.device) -> dict[str, float]:
    """TFLOP/s of a large matrix product in each dtype that was timed."""
    rows = [row for measurement in measurements for row in measurement.rows if row.seconds]
    return {dtype: measure_roofline(device, dtype) for dtype in sorted({row.dtype for row in rows})}


def _survey(
    model: AutoencoderKL, batch: Tensor, expected: Tensor, settings: Settings, device: torch.device
) -> tuple[Row, ...]:
    """A row for each dtype and memory format of diffusers."""
    configurations = survey_configurations(device)
    contenders = [diffusers(model, settings.direction, device, *one) for one in configurations]
    return tuple(_race(contenders, batch, expected, min(settings.rounds, _SURVEY_ROUNDS), device))


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
    row = Row(contender.name, contender.dtype, contender.memory_format, refused=contender.obstacle)
    if contender.obstacle is not None:
        return row
    logger.info("%s in %s, %s", contender.name, contender.dtype, contender.memory_format)
    error = relative_error(contender.run(batch), expected)
    tolerance = APPROXIMATE if contender.is_approximate else TOLERANCES[contender.dtype]
    if not error <= tolerance:  # NaN is refused, too
        return replace(row, relative_error=error, refused=f"differs from fp32 by {error:.2g}, more than {tolerance:g}")
    _, peak_bytes = measure_peak(lambda: contender.run(batch), device)
    return replace(row, relative_error=error, peak_bytes=peak_bytes)


def relative_error(values: Tensor, expected: Tensor) -> float:
    """L2 of the difference over that of what is expected."""
    return float((values.cpu().float() - expected).norm() / expected.norm())
