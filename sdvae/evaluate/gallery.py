"""How images look after each candidate: the picture files of a report, made while a reconstruction is at hand."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from sdvae.evaluate.candidates import VAECandidate
from sdvae.evaluate.pictures import ERROR_FULL_SCALE, PictureFolder
from sdvae.evaluate.results import ImageResult, Picture, View
from sdvae.evaluate.round_trip import Candidate, Reconstruction


class Gallery:
    """The views that this process has made, by image and candidate; their scores are filled in by whoever takes one."""

    def __init__(self, report: Path) -> None:
        self.folder = PictureFolder(report)
        self._views: dict[tuple[int, int], View] = {}
        self._originals: dict[tuple[int, int | None], Picture] = {}

    def add(self, place: int, candidate: Candidate, one: Reconstruction) -> None:
        """Write the pictures of an image after the candidate at `place`."""
        self._views[one.item.index, place] = self._view(place, candidate, one)

    def find(self, index: int, place: int) -> View | None:
        """The view of an image after a candidate, if it was made."""
        return self._views.get((index, place))

    def keep_only(self, images: Iterable[ImageResult]) -> None:
        """Remove the picture files that none of `images` shows."""
        pictures = (picture for image in images for view in image.views for picture in view.pictures())
        self.folder.keep_only({Path(picture.file).name for picture in pictures})

    def _view(self, place: int, candidate: Candidate, one: Reconstruction) -> View:
        item, stem = one.item, f"{one.item.index:07}-{place}"
        image = one.levels[0].nan_to_num(0.0).round().permute(1, 2, 0).cpu().numpy().astype(np.uint8)
        channels = std = None
        ranges: tuple[tuple[float, float], ...] = ()
        std_range = None
        if one.scaled is not None:
            channels, ranges = self.folder.grey(f"{stem}-channels", one.scaled.mean[0], 0.01, 0.99)
            if isinstance(candidate, VAECandidate) and candidate.has_posterior:
                std, (std_range,) = self.folder.grey(f"{stem}-std", one.scaled.std[0].mean(0, keepdim=True), 0.0, 1.0)
        return View(
            {},
            self._original(one, candidate.identity.size_px),
            self.folder.view(f"{stem}-reconstruction", image),
            self.folder.error(f"{stem}-error", item.image, image),
            ERROR_FULL_SCALE,
            self.folder.worst(f"{stem}-worst", item.image, image, f"{stem}-worst-original"),
            channels,
            len(ranges),
            ranges,
            std,
            std_range,
        )

    def _original(self, one: Reconstruction, size_px: int | None) -> Picture:
        """One file for all candidates of a size."""
        key = one.item.index, size_px
        if key not in self._originals:
            name = f"{one.item.index:07}-original" + (f"-{size_px}" if size_px else "")
            self._originals[key] = self.folder.view(name, one.item.image)
        return self._originals[key]
