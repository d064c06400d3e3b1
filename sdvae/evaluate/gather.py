"""The notes of all chunks together, and the scores of each image on their way to scores.jsonl."""

import math
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from sdvae.amounts import count
from sdvae.evaluate.evaluation import Evaluation
from sdvae.evaluate.round_trip import Part
from sdvae.metrics import METRICS
from sdvae.sealed import canonical_json


class Gathered:
    """What all chunks say together: eight bytes in memory for each score of each image."""

    def __init__(self, work: Evaluation) -> None:
        self.work = work
        self.parts = [Part() for _ in work.candidates]
        self.values = [{name: array("d") for name in work.judge.scores} for _ in work.candidates]
        self.indices = array("q")
        self.left_out: Counter[str] = Counter()

    @property
    def num_images(self) -> int:
        """Images that were judged."""
        return len(self.indices)

    def lines(self) -> Iterator[bytes]:
        """The lines of scores.jsonl; what else the chunks say is gathered as they pass."""
        for number in range(self.work.num_chunks):
            line = self.work.notes.chunk(number)
            self.left_out.update(line["left_out"].values())
            parts = [Part.from_json(values) for values in line["parts"]]
            for whole, part in zip(self.parts, parts, strict=True):
                whole.sums.merge(part.sums)
                whole.num_images += part.num_images
                whole.num_failed += part.num_failed
                whole.encode_s, whole.decode_s = whole.encode_s + part.encode_s, whole.decode_s + part.decode_s
                whole.bits += part.bits
            yield from self._scores(parts)

    def has(self, name: str) -> bool:
        """Whether any image has this score."""
        return bool(np.isfinite(np.concatenate([self.array(place, name) for place in range(len(self.parts))])).any())

    def array(self, place: int, name: str) -> NDArray[np.float64]:
        """The scores of a candidate, one an image; NaN where there is none."""
        return np.frombuffer(self.values[place][name], np.float64)

    def ranking(self, name: str) -> NDArray[np.float64]:
        """One number an image: the mean over the candidates that have one."""
        stacked = np.stack([self.array(place, name) for place in range(len(self.parts))])
        present = np.isfinite(stacked)
        total = np.where(present, stacked, 0.0).sum(0)
        num = present.sum(0)
        mean: NDArray[np.float64] = np.where(num > 0, total / np.maximum(num, 1), math.nan)
        return mean

    def remarks(self) -> Iterator[str]:
        """Sentences on what the numbers lack."""
        if self.num_images == 1:
            yield "Of one image no interval can be given."
        counts = {name: int(np.isfinite(self.array(0, name)).sum()) for name in self.work.judge.scores}
        for name, num in counts.items():
            if num < max(counts.values()):
                small = max(counts.values()) - num
                are = "is" if small == 1 else "are"
                yield f"{small} of {count(self.num_images, 'image')} {are} too small for {METRICS[name].label}."
        for candidate, part in zip(self.work.candidates, self.parts, strict=True):
            if part.num_failed:
                yield f"{candidate.identity.label} gave no finite picture of {part.num_failed} images."

    def _scores(self, parts: Sequence[Part]) -> Iterator[bytes]:
        for index in sorted({index for part in parts for index in part.scores}):
            self.indices.append(index)
            found = [part.scores.get(index, {}) for part in parts]
            for values, scores in zip(self.values, found, strict=True):
                for name, column in values.items():
                    column.append(scores.get(name, math.nan))
            labels = [candidate.identity.label for candidate in self.work.candidates]
            named = dict(zip(labels, found, strict=True))
            yield canonical_json({"index": index, "key": self.work.entries[index].key, "scores": named})
