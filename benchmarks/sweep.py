"""The table of `throughput.py --sweep`: sdvae beside the best of diffusers, by network, direction, size and batch."""

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdvae.bench.contenders import (
    MEMORY_FORMATS,
    TOLERANCES,
    Contender,
    diffusers_contender,
    load_diffusers,
    sdvae,
)
from sdvae.bench.throughput import Settings, relative_error, seeded_batch, seeded_model
from sdvae.bench.timing import in_turns
from sdvae.config import FAMILIES
from sdvae.engine.precision import DTYPES
from sdvae.engine.stages import Direction
from sdvae.tiny import AutoencoderTiny, TinyConfig
from sdvae.vae import VAE

NETWORKS = ("embedded", "sd1", "taesd")
_SMALL_PX, _SMALL_PAIRS = 128, 9  # so small images take so little time that a moment's noise shows
_BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): sum(range(10**6))"


@dataclass(frozen=True)
class Cell:
    """One cell of the table; `ratio` is the median of theirs / ours over the pairs, above 1 where sdvae is faster."""

    network: str
    direction: Direction
    size_px: int
    batch_size: int
    memory_format: str  # diffusers' faster one
    relative_error: float  # between the two outputs
    our_seconds: tuple[float, ...]
    their_seconds: tuple[float, ...]
    ratio: float
    first_ratio: float | None  # of a cell that was measured again because it was below 1


def sweep(
    names: Sequence[str], sizes: Sequence[int], batches: Sequence[int], dtype: str, pairs: int, num_busy: int
) -> Iterator[Cell]:
    """Measure each cell on the CPU, beside so many busy processes."""
    with ExitStack() as stack, torch.no_grad():
        for _ in range(num_busy):
            stack.enter_context(_busy_process())
        for name in names:
            vae, model = _load(name, dtype)
            for direction in ("encode", "decode"):
                rivals = [_rival(model, direction, dtype, memory_format) for memory_format in MEMORY_FORMATS]
                for size_px in sizes:
                    for batch_size in batches:
                        batch = seeded_batch(vae.config, Settings(direction, size_px, size_px, batch_size))
                        num_pairs = max(pairs, _SMALL_PAIRS) if size_px <= _SMALL_PX else pairs
                        measure = partial(_measure, sdvae(vae, direction), rivals, batch, num_pairs)
                        place = name, direction, size_px, batch_size
                        cell = Cell(*place, *measure(), first_ratio=None)
                        if cell.ratio < 1:
                            cell = Cell(*place, *measure(), first_ratio=cell.ratio)
                        yield cell


def table(cells: Sequence[Cell]) -> Iterator[str]:
    """Ratios, a line for each network and direction."""
    columns = sorted({(cell.size_px, cell.batch_size) for cell in cells})
    yield f"{'theirs / ours':<20}" + "".join(f"{f'{size}px b{batch}':>10}" for size, batch in columns)
    for name, direction in dict.fromkeys((cell.network, cell.direction) for cell in cells):
        found = {
            (cell.size_px, cell.batch_size): cell.ratio
            for cell in cells
            if (cell.network, cell.direction) == (name, direction)
        }
        yield f"{f'{name} {direction}':<20}" + "".join(
            f"{found[column]:>10.2f}" if column in found else f"{'':>10}" for column in columns
        )


def values(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The cells as plain values."""
    return [asdict(cell) for cell in cells]


def _measure(
    ours: Contender, rivals: Sequence[Contender], batch: Tensor, num_pairs: int
) -> tuple[str, float, tuple[float, ...], tuple[float, ...], float]:
    """Compare the outputs, find the best rival, then time the two in turns."""
    found = ours.run(batch).float()
    error = max(relative_error(found, rival.run(batch).float()) for rival in rivals)
    if not error <= 2 * ours.tolerance:
        raise SystemExit(f"the outputs differ by {error:.2g}, more than {2 * ours.tolerance:g}: nothing was timed")
    cpu = torch.device("cpu")
    trial = in_turns({str(index): partial(rival.run, batch) for index, rival in enumerate(rivals)}, 3, cpu)
    best = rivals[min(range(len(rivals)), key=lambda index: statistics.median(trial[str(index)]))]
    seconds = in_turns({"ours": partial(ours.run, batch), "theirs": partial(best.run, batch)}, num_pairs, cpu)
    pairs = zip(seconds["theirs"], seconds["ours"], strict=True)
    ratio = statistics.median(theirs / ours for theirs, ours in pairs)
    return best.memory_format, error, tuple(seconds["ours"]), tuple(seconds["theirs"]), ratio


def _load(name: str, dtype: str) -> tuple[VAE, Any]:
    """A VAE that holds its weights alone, and a model with the same weights for diffusers."""
    cpu = torch.device("cpu")
    if name == "embedded":
        return VAE.load(device="cpu", dtype=dtype), VAE.load(device="cpu", dtype=dtype).model
    ours, theirs = (_seeded(name) for _ in range(2))
    return VAE(ours, cpu, DTYPES[dtype], f"{name} with random weights, seed 0", is_private=True), theirs


def _seeded(name: str) -> Any:
    if name == "sd1":
        return seeded_model(FAMILIES["sd1"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderTiny(TinyConfig(scaling_factor=1.0)).requires_grad_(False).eval()


def _rival(model: Any, direction: Direction, dtype: str, memory_format: str) -> Contender:
    if not isinstance(model, AutoencoderTiny):
        theirs = load_diffusers(model, torch.device("cpu"), dtype, memory_format)
        return diffusers_contender("diffusers", theirs, direction, dtype, memory_format)
    import diffusers

    tiny = diffusers.AutoencoderTiny.from_config(model.config.to_diffusers())
    tiny.load_state_dict(model.state_dict())
    tiny = tiny.requires_grad_(False).eval().to(dtype=DTYPES[dtype], memory_format=MEMORY_FORMATS[memory_format])

    def run(batch: Tensor) -> Tensor:
        batch = batch.to(DTYPES[dtype]).contiguous(memory_format=MEMORY_FORMATS[memory_format])
        out: Tensor = tiny.encode(batch).latents if direction == "encode" else tiny.decode(batch).sample
        return out

    return Contender("diffusers", dtype, memory_format, run, TOLERANCES[dtype])


@contextmanager
def _busy_process() -> Iterator[None]:
    """A process that keeps a core busy, and ends with this one."""
    process = subprocess.Popen([sys.executable, "-c", _BUSY, str(os.getpid())])
    try:
        yield
    finally:
        process.kill()
        process.wait()
