"""Who runs the same network on the same weights: sdvae, and diffusers in the forms that people use."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdvae.engine.precision import DTYPES
from sdvae.engine.stages import Direction
from sdvae.errors import BenchError
from sdvae.model import AutoencoderKL
from sdvae.vae import VAE

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
RIVALS = ("loaded", "best", "compile", "tiled")


@dataclass(frozen=True)
class Contender:
    """One way to encode or decode a batch: fp32 pixels in and the mean of the posterior out, or latents and pixels.

    `obstacle` says why it cannot run here, where it cannot.
    """

    name: str
    dtype: str  # fp32, bf16, fp16
    memory_format: str
    run: Callable[[Tensor], Tensor]
    is_approximate: bool = False
    obstacle: str | None = None


def ours(vae: VAE, direction: Direction, budget_bytes: int | None = None) -> Contender:
    """sdvae, through its public methods."""
    dtype = next(name for name, dtype in DTYPES.items() if dtype == vae.dtype)

    def run(batch: Tensor) -> Tensor:
        if direction == "encode":
            return vae.encode(batch, budget_bytes).mean
        return vae.decode(batch, budget_bytes)

    return Contender("sdvae", dtype, "channels_last", run)


def reference(model: AutoencoderKL, direction: Direction, batch: Tensor) -> Tensor:
    """What is right: the reference network in fp32, which tests hold to diffusers; on the CPU."""
    network = model.float()
    with torch.no_grad():
        return network.encode(batch.cpu().float()).mean if direction == "encode" else network.decode(batch.cpu())


def survey_configurations(device: torch.device) -> list[tuple[str, str]]:
    """The dtypes and memory formats that diffusers is tried in; fp16 on a CPU runs on reference kernels for hours."""
    dtypes = [name for name in DTYPES if name != "fp16" or device.type != "cpu"]
    return [(dtype, memory_format) for dtype in dtypes for memory_format in MEMORY_FORMATS]


def diffusers(
    model: AutoencoderKL,
    direction: Direction,
    device: torch.device,
    dtype: str,
    memory_format: str,
    *,
    title: str = "diffusers",
) -> Contender:
    """`diffusers.AutoencoderKL` with these weights."""
    theirs = _theirs(model, device, dtype, memory_format)
    return Contender(title, dtype, memory_format, _caller(theirs, direction, dtype, memory_format))


def diffusers_tiled(
    model: AutoencoderKL, direction: Direction, device: torch.device, dtype: str, memory_format: str, side_px: int
) -> Contender:
    """`enable_tiling`, which gives another picture than the whole network does; `side_px` is the longer side."""
    if side_px <= model.config.sample_size:
        why = f"{side_px} px are one tile of {model.config.sample_size}"
        return Contender("diffusers tiled", dtype, memory_format, _cannot_run, True, why)
    theirs = _theirs(model, device, dtype, memory_format)
    theirs.enable_tiling()
    return Contender("diffusers tiled", dtype, memory_format, _caller(theirs, direction, dtype, memory_format), True)


def diffusers_compiled(
    model: AutoencoderKL,
    direction: Direction,
    device: torch.device,
    dtype: str,
    memory_format: str,
    *,
    is_reindexed: bool = True,
) -> Contender:
    """Its `encode` or `decode` compiled: `torch.compile(vae)` would compile `forward`, which nobody calls.

    Without `is_reindexed`, inductor does not reindex loops after it fused them, which made upsampling six times slower
    in some versions (pytorch#189488). Where the machine has no compiler, the obstacle is what torch says of it.
    """
    from torch._inductor import config as inductor

    torch.compiler.reset()  # after a few sizes, dynamo would run the next one uncompiled
    theirs = _theirs(model, device, dtype, memory_format)
    setattr(theirs, direction, torch.compile(getattr(theirs, direction), dynamic=False))
    name = "diffusers compiled" if is_reindexed else "diffusers compiled, no reindexing"
    call = _caller(theirs, direction, dtype, memory_format)

    if not is_reindexed and not hasattr(inductor, "loop_reindexing_after_fusion"):
        return Contender(name, dtype, memory_format, _cannot_run, obstacle="this torch has no such pass")
    changes = {} if is_reindexed else {"loop_reindexing_after_fusion": False}

    def run(batch: Tensor) -> Tensor:
        with inductor.patch(changes):
            return call(batch)

    side = 8 * model.config.downscale
    shape = (1, 3, side, side) if direction == "encode" else (1, model.config.latent_channels, 8, 8)
    try:
        with torch.no_grad():
            run(torch.zeros(shape, device=device))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        return Contender(name, dtype, memory_format, _cannot_run, obstacle=_reason(error))
    return Contender(name, dtype, memory_format, run)


def _theirs(model: AutoencoderKL, device: torch.device, dtype: str, memory_format: str) -> Any:
    try:
        from diffusers import AutoencoderKL as TheirAutoencoderKL
    except ImportError as error:
        raise BenchError(
            f"rivals need diffusers, and it cannot be imported: {error}; or ask for --rivals none"
        ) from error
    with torch.device("meta"):
        vae = TheirAutoencoderKL.from_config(model.config.to_diffusers())  # type: ignore[no-untyped-call]
    weights = {name: values.to(device, DTYPES[dtype]) for name, values in model.state_dict().items()}
    vae.load_state_dict(weights, assign=True)
    return vae.requires_grad_(False).eval().to(memory_format=MEMORY_FORMATS[memory_format])


def _caller(theirs: Any, direction: Direction, dtype: str, memory_format: str) -> Callable[[Tensor], Tensor]:
    def run(batch: Tensor) -> Tensor:
        batch = batch.to(DTYPES[dtype]).contiguous(memory_format=MEMORY_FORMATS[memory_format])
        out: Tensor = theirs.encode(batch).latent_dist.mean if direction == "encode" else theirs.decode(batch).sample
        return out

    return run


def _cannot_run(batch: Tensor) -> Tensor:
    raise BenchError("a contender with an obstacle was run; report this")


def _reason(error: BaseException) -> str:
    """The sentence in what torch's compiler raises."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "ompiler" in line), lines[0] if lines else type(error).__name__)[:200]
