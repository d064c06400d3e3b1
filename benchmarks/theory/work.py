"""Where a part of the theory run keeps what it has done, and what it has found."""

import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sdvae import atomic


@dataclass(frozen=True)
class Row:
    """One line of the table in docs/theory.md; `reached` is None where there is nothing to reach."""

    what: str
    measured: str
    to_reach: str = ""
    reached: bool | None = None
    beside: str = ""  # whose figure stands beside it


@dataclass
class Findings:
    """What a part has found: lines for the table, every number behind them, its pictures."""

    rows: list[Row] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)  # file name -> what it shows, in one sentence


class Work:
    """The folder of one part. `digits` is MNIST's folder. What is there already is not computed again."""

    def __init__(self, folder: Path, digits: Path) -> None:
        self.folder, self.digits = folder, digits
        atomic.make_folder(folder)

    def beside(self, part: str) -> "Work":
        """The folder of another part, whose models this one goes on from."""
        return Work(self.folder.parent / part, self.digits)

    def findings(self) -> Findings | None:
        """What the part found when it ran; None before."""
        path = self.folder / "findings.json"
        if not path.exists():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        return Findings([Row(**row) for row in found["rows"]], found["numbers"], found["pictures"])

    def finish(self, findings: Findings) -> None:
        """Keep the findings: from now on the part is done."""
        atomic.write_bytes(self.folder / "findings.json", json.dumps(asdict(findings), indent=1).encode())

    def save(self, name: str, state: Any) -> None:
        """Keep tensors (a state dict, a list of numbers) as NAME.pt."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        atomic.write_bytes(self.folder / f"{name}.pt", buffer.getbuffer())

    def load(self, name: str) -> Any | None:
        """What `save` kept; None where nothing is."""
        path = self.folder / f"{name}.pt"
        return torch.load(path, weights_only=True) if path.exists() else None

    def draw(self, name: str, sheet: Tensor) -> str:  # (H, W) or (H, W, 3), values in [0, 1]
        """Write NAME.png, and return the file's name."""
        levels = (sheet.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
        buffer = io.BytesIO()
        Image.fromarray(levels.numpy()).save(buffer, "PNG", optimize=True)
        atomic.write_bytes(self.folder / f"{name}.png", buffer.getbuffer())
        return f"{name}.png"


def sheet(images: Tensor, num_columns: int, scale: int = 1, gap: int = 2) -> Tensor:  # (N, H, W) -> (H', W')
    """Images in rows of `num_columns` on white, each pixel `scale` times as wide and high."""
    images = images.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    count, height, width = images.shape
    num_rows = -(-count // num_columns)
    page = torch.ones(num_rows * (height + gap) - gap, num_columns * (width + gap) - gap, dtype=images.dtype)
    for number, image in enumerate(images):
        top, left = number // num_columns * (height + gap), number % num_columns * (width + gap)
        page[top : top + height, left : left + width] = image
    return page
