"""What an evaluation works with, from its first chunk to its last file."""

from collections.abc import Sequence
from dataclasses import dataclass

from sdvae.evaluate.gallery import Gallery
from sdvae.evaluate.judge import Judge
from sdvae.evaluate.notes import Notes
from sdvae.evaluate.recipes import Recipe
from sdvae.evaluate.round_trip import Candidate
from sdvae.sources.entries import Entry, Source

CHUNK = 8  # photos of a line in the journal; a kill costs at most one


@dataclass(frozen=True)
class Evaluation:
    """Photos, who is judged, by what, and where it is noted."""

    source: Source
    entries: Sequence[Entry]
    candidates: Sequence[Candidate]
    recipe: Recipe
    judge: Judge
    notes: Notes
    gallery: Gallery

    @property
    def num_chunks(self) -> int:
        """Lines that the journal has in the end."""
        return -(-len(self.entries) // CHUNK)

    def places(self, chunk: int) -> range:
        """Which entries are in a chunk."""
        return range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self.entries)))
