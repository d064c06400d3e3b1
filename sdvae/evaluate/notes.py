"""What an evaluation notes while it runs: a line for each chunk of photos, so that a kill costs at most one chunk.

REPORT/journal/plan.json               what is evaluated; another evaluation is refused
REPORT/journal/notes-RANK.jsonl        lines of one rank: chunks, probes, peaks of memory
REPORT/journal/features/CHUNK-NAME.npy features for rFID and rKID, (images, 2048) fp32
"""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdvae import atomic, sealed
from sdvae.errors import ReportError
from sdvae.evaluate.results import PICTURES_NAME, RESULTS_NAME, SCORES_NAME
from sdvae.journal import Journal

_JOURNAL = "journal"
_OURS = {_JOURNAL, RESULTS_NAME, SCORES_NAME, PICTURES_NAME, "report.html"}

Line = dict[str, Any]


class Notes:
    """The journal of a report's folder. Lines are read where they lie: a million images do not fill the memory."""

    def __init__(self, report: Path, plan: Mapping[str, Any], rank: int) -> None:
        """Begin or continue; ReportError where the folder holds something else or another evaluation."""
        self.report, self.folder = report, report / _JOURNAL
        _require_ours(report)
        for folder in (report, self.folder, self.folder / "features"):
            atomic.make_folder(folder)
        path = self.folder / "plan.json"
        if not path.exists():
            atomic.create_bytes(path, sealed.seal(dict(plan)))
        _require_same(sealed.read_json(path), plan, report)
        self.path = self.folder / f"notes-{rank}.jsonl"
        self.chunks: dict[int, tuple[Path, int]] = {}
        self.probes: dict[str, Line] = {}
        self.peaks: dict[str, int | None] = {}
        self.read()

    def append(self, line: Line) -> None:
        """Add a line to this rank's journal."""
        with Journal(self.path) as journal:
            journal.append(line)

    def read(self) -> None:
        """Look at all ranks' lines again: where each chunk lies, and the small ones themselves."""
        for path in sorted(self.folder.glob("notes-*.jsonl")):
            for place, line in _lines(path):
                if "chunk" in line:
                    self.chunks[line["chunk"]] = (path, place)
                elif "probe" in line:
                    self.probes[line["probe"]] = line
                elif "peak" in line:
                    self.peaks.setdefault(line["peak"], line["bytes"])

    def chunk(self, number: int) -> Line:
        """The line of a chunk."""
        path, place = self.chunks[number]
        with path.open("rb") as file:
            file.seek(place)
            line = sealed.unseal(file.readline())
        if line is None:
            raise ReportError(f"{path} changed while it was read; run sdvae eval again")
        return line

    def write_features(self, chunk: int, name: str, features: NDArray[np.float32]) -> None:
        """Keep the features of a chunk, before its line is written."""
        file = io.BytesIO()
        np.save(file, features)
        atomic.write_bytes(self._features(chunk, name), file.getbuffer())

    def read_features(self, chunk: int, name: str) -> NDArray[np.float32]:
        """The features of a chunk, mapped from disk."""
        try:
            features: NDArray[np.float32] = np.load(self._features(chunk, name), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ReportError(f"{self._features(chunk, name)} cannot be read: {error}; evaluate again") from error
        return features

    def _features(self, chunk: int, name: str) -> Path:
        return self.folder / "features" / f"{chunk:07}-{name}.npy"


def _lines(path: Path) -> Iterator[tuple[int, Line]]:
    """The whole lines of a journal, each with its place; a torn one is passed over."""
    with path.open("rb") as file:
        place = 0
        for data in file:
            line = sealed.unseal(data)
            if line is not None:
                yield place, line
            place += len(data)


def _require_ours(report: Path) -> None:
    if report.exists() and not report.is_dir():
        raise ReportError(f"{report} is not a folder; give the report a folder of its own")
    if (report / _JOURNAL / "plan.json").exists():
        return
    ours = _OURS if (report / RESULTS_NAME).exists() else {_JOURNAL}
    other = sorted(path.name for path in report.iterdir() if path.name not in ours) if report.exists() else []
    if other:
        raise ReportError(f"{report} holds files of others ({', '.join(other[:3])}); give the report its own folder")


def _require_same(found: Mapping[str, Any], plan: Mapping[str, Any], report: Path) -> None:
    differing = sorted(key for key in found.keys() | plan.keys() if found.get(key) != plan.get(key))
    if differing:
        raise ReportError(
            f"{report} holds another evaluation (another {', another '.join(differing)}); give another folder, or "
            "remove this one"
        )
