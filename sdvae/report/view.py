"""What a page shows, ready to be set: texts, numbers, pictures as data. It knows neither VAEs nor files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Picture:
    """A picture inside the page."""

    src: str  # a data: address
    alt: str
    width: int
    height: int
    is_lossless: bool = True


@dataclass(frozen=True)
class Plot:
    """A drawing with its caption."""

    title: str
    svg: str  # made by `plots`, where every text is escaped
    caption: str


@dataclass(frozen=True)
class Metric:
    """One number that photos and VAEs are judged by."""

    key: str
    name: str
    unit: str = ""
    better: Literal["higher", "lower", ""] = ""
    digits: int = 2


@dataclass(frozen=True)
class Cell:
    """One number of a table."""

    text: str
    note: str = ""  # its interval
    is_best: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a table, and what its first column says beneath the name."""

    name: str
    note: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Table:
    """Columns of numbers; the first column holds the names of the rows."""

    columns: Sequence[Metric]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Latents:
    """How one VAE sees a photo."""

    channels: Sequence[Picture]
    notes: Sequence[str] = ()  # what black and white mean, one a channel
    std: Picture | None = None  # of the posterior, all channels together
    std_note: str = ""

    def pictures(self) -> Iterator[Picture]:
        """Every picture of them."""
        yield from self.channels
        yield from [self.std] if self.std else []


@dataclass(frozen=True)
class Version:
    """What one VAE made of a photo."""

    whole: Picture
    error: Picture | None = None
    detail: tuple[Picture, Picture] | None = None  # before and after, where it is worst
    detail_note: str = ""
    latents: Latents | None = None
    values: Sequence[float | None] = ()  # one a metric

    def pictures(self) -> Iterator[Picture]:
        """Every picture of it."""
        yield self.whole
        yield from (picture for picture in (self.error, *(self.detail or ())) if picture)
        if self.latents:
            yield from self.latents.pictures()


@dataclass(frozen=True)
class Photo:
    """One photo and its versions, one a VAE."""

    name: str
    size: str
    whole: Picture
    versions: Sequence[Version]
    tag: str = ""  # "worst", "median"

    def pictures(self) -> Iterator[Picture]:
        """Every picture of it and of its versions."""
        yield self.whole
        for version in self.versions:
            yield from version.pictures()


@dataclass(frozen=True)
class Fact:
    """A name and what it stands for, in lists of settings."""

    name: str
    value: str


@dataclass(frozen=True)
class Comparison:
    """The page of `sdvae eval`."""

    title: str
    caption: str
    findings: str
    vaes: Sequence[str]
    summary: Table
    metrics: Sequence[Metric]  # of the photos, the one they are sorted by first
    photos: Sequence[Photo]
    num_photos: int  # of which `photos` are some
    plots: Sequence[Plot] = ()
    remarks: Sequence[str] = ()
    facts: Sequence[Fact] = ()
    heat_note: str = ""
    footer: str = ""
    tables: Sequence[tuple[str, str, Table]] = ()  # title, caption, numbers


@dataclass(frozen=True)
class Decode:
    """One record of a store, decoded."""

    key: str
    caption: str
    size: str
    picture: Picture
    latents: Latents | None = None


@dataclass(frozen=True)
class StorePage:
    """The page of a latent store."""

    title: str
    caption: str
    figures: Sequence[Fact]  # the few numbers shown large
    decodes: Sequence[Decode]
    decodes_note: str
    channels: Table
    plots: Sequence[Plot]  # of sizes and labels
    quarantined: Sequence[tuple[str, int, str]] = ()  # reason, records, the first keys
    texts: Sequence[Fact] = ()  # captions and labels
    remarks: Sequence[str] = ()
    facts: Sequence[Fact] = ()
    footer: str = ""
