"""What a run writes for people: the log, plots of every term, pictures, the card."""

import json
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sdvae import __version__, atomic
from sdvae.config import VAEConfig
from sdvae.errors import TrainError
from sdvae.images.write import encode_image
from sdvae.metrics import METRICS
from sdvae.train.config import TrainConfig, to_toml
from sdvae.train.data import Photos
from sdvae.train.validate import Image

_LOG = logging.getLogger(__name__)

_COLUMNS = 3  # of plots
Line = dict[str, Any]


@dataclass(frozen=True)
class RunPaths:
    """Where each file of a run lies. At the top lies what `VAE.load` and diffusers read."""

    root: Path

    @property
    def card(self) -> Path:
        """README.md, as the hub wants it."""
        return self.root / "README.md"

    @property
    def figures(self) -> Path:
        """Plots and pictures, which the card shows."""
        return self.root / "figures"

    @property
    def working(self) -> Path:
        """What only the training needs: it may be deleted when that is over."""
        return self.root / "train"

    @property
    def state(self) -> Path:
        """Where the run stands."""
        return self.working / "state.safetensors"

    @property
    def config(self) -> Path:
        """The config, complete."""
        return self.working / "config.toml"

    @property
    def photos(self) -> Path:
        """The photos, and which are held out."""
        return self.working / "photos.jsonl"

    @property
    def scan(self) -> Path:
        """The journal of the scan."""
        return self.working / "scan.jsonl"

    @property
    def log(self) -> Path:
        """One line of JSON every few steps."""
        return self.working / "log.jsonl"

    def picture(self, step: int) -> Path:
        """The strip of a validation."""
        return self.figures / f"step-{step:07d}.png"


class Log:
    """The log of a run: lines in a file, and TensorBoard's beside them where the config asks for it."""

    def __init__(self, paths: RunPaths, has_tensorboard: bool, step: int) -> None:
        """Forget what was logged after `step`: those steps are done again."""
        self._path = paths.log
        self.lines = [line for line in read_log(paths.log) if line["step"] <= step] if step else []
        atomic.write_bytes(self._path, *map(_as_bytes, self.lines))
        self._tensorboard = _open_tensorboard(paths.working / "tensorboard", step) if has_tensorboard else None

    def add(self, step: int, values: Line) -> None:
        """One more line."""
        line = {"step": step} | {name: _rounded(value) for name, value in values.items()}
        self.lines.append(line)
        with atomic.explained(self._path, (_as_bytes(line),)), self._path.open("ab", buffering=0) as file:
            atomic.hook("append", self._path)
            atomic.write_all(file.fileno(), _as_bytes(line))
        if self._tensorboard is not None:
            for name, value in line.items():
                if isinstance(value, int | float):
                    self._tensorboard.add_scalar(name, value, step)


def read_log(path: Path) -> list[Line]:
    """The lines of a log; one that a kill has torn is passed over."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            _LOG.info("%s has a torn line", path)
    return lines


def _as_bytes(line: Line) -> bytes:
    return json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value


def _open_tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainError(
            "output.tensorboard needs tensorboard, which is not installed; pip install 'sdvae[train]'"
        ) from error
    return SummaryWriter(str(folder), purge_step=step)


def write_plots(paths: RunPaths, lines: Iterable[Line]) -> None:
    """Every number of the log over the steps; a warning where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        _LOG.warning("plots need matplotlib, which is not installed; pip install 'sdvae[train]'")
        return
    import io

    from matplotlib.figure import Figure

    series: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                series.setdefault(name, []).append((line["step"], value))
    if not series:
        return
    num_rows = math.ceil(len(series) / _COLUMNS)
    figure = Figure(figsize=(4.0 * _COLUMNS, 2.4 * num_rows), layout="tight")
    for place, (name, points) in enumerate(series.items(), 1):
        axes = figure.add_subplot(num_rows, _COLUMNS, place)
        axes.plot(*zip(*points, strict=True), linewidth=1.0, marker="." if len(points) < 30 else None)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    atomic.write_bytes(paths.figures / "terms.png", buffer.getvalue())


def write_picture(path: Path, image: Image) -> None:
    """A PNG."""
    atomic.write_bytes(path, encode_image(image, "png"))


def write_card(
    paths: RunPaths, config: TrainConfig, network: VAEConfig, photos: Photos, source: str, step: int, lines: list[Line]
) -> None:
    """README.md: what the VAE is, what it was trained on, how, and how good it became."""
    found = [line for line in lines if "psnr" in line]
    picture = paths.picture(found[-1]["step"]).relative_to(paths.root) if found else None
    config = _without_folders(config, source)
    begun = f"the weights of `{config.model.start}`" if config.model.start else "random weights"
    text = f"""---
library_name: diffusers
tags:
- autoencoder
- vae
---

# {paths.root.resolve().name}

A KL-VAE: {network.downscale}x downscale, {network.latent_channels} latent channels, channels \
{", ".join(map(str, network.block_out_channels))}; scaling factor {network.scaling_factor}. \
Trained by sdvae {__version__} \
from {begun}, {step:,} of {config.steps:,} steps; the weights are averages over steps (EMA {config.optimizer.ema}).

```py
sdvae.VAE.load("{paths.root.resolve().name}")  # or diffusers.AutoencoderKL.from_pretrained
```

## Data

{len(photos.train):,} photos of `{source}`, and {len(photos.held_out)} held out for validation. Their licences are not \
known to sdvae: add them here.

## Quality

Mean over the held-out photos, centre crops, 8 bits.

"""
    text += _quality(found)
    if picture is not None and (paths.root / picture).exists():
        text += f"\n![Held-out photos, and below each what this VAE makes of it]({picture.as_posix()})\n"
    if (paths.figures / "terms.png").exists():
        text += "\n![Every term over the steps](figures/terms.png)\n"
    text += f"\n## Config\n\n```toml\n{to_toml(config)}```\n"
    atomic.write_bytes(paths.card, text.encode())


def _quality(lines: list[Line]) -> str:
    """A table of the validations: ten of them at most, the first and the last among them."""
    if not lines:
        return "No photo was held out.\n"
    shown = lines if len(lines) <= 10 else [*lines[: -1 : -(-len(lines) // 9)], lines[-1]]
    metrics = [metric for name, metric in METRICS.items() if name in lines[-1]]
    titles = [f"{metric.label} in {metric.unit}" if metric.unit else metric.label for metric in metrics]
    rows = [["step", *titles], ["---"] * (1 + len(titles))]
    rows += [[f"{line['step']:,}", *(f"{line[metric.name]:.4g}" for metric in metrics)] for line in shown]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _without_folders(config: TrainConfig, source: str) -> TrainConfig:
    """For a card that others read: files by their names, without the folders of this machine."""
    model = replace(config.model, start=_name(config.model.start))
    teacher = replace(config.teacher, start=_name(config.teacher.start))
    return replace(config, model=model, teacher=teacher, data=replace(config.data, source=source))


def _name(spec: str | None) -> str | None:
    return Path(spec).name if spec is not None and Path(spec).exists() else spec
