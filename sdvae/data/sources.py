"""Where photos come from: what a user names, and the source that reads it."""

from pathlib import Path

from sdvae.data.entries import Entry, Source
from sdvae.data.folders import FolderSource

__all__ = ["Entry", "FolderSource", "Source", "open_source"]


def open_source(spec: str | Path) -> Source:
    """The source that a user means by `spec`, a folder; StoreError where there is none."""
    return FolderSource(Path(spec))
