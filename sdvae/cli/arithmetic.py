"""`sdvae arithmetic`: what A has and B has not, added to C, in latent space."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sdvae.cli.grouped import Grouped
from sdvae.cli.pictures import METADATA, check_output, grid, read_square, write_picture
from sdvae.cli.shared import BUDGET, OUTPUT, PATH, SIDE, Console, tell_left_out, with_console, with_vae
from sdvae.errors import SourceError
from sdvae.sources.kinds import PACKED
from sdvae.sources.tables import SUFFIXES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from sdvae.vae import VAE


@click.command(
    cls=Grouped,
    short_help="Add what tells A from B to a photo, in latent space.",
    groups={"What is added": ("strength", "size")},
    examples=(
        "sdvae arithmetic glasses.jpg same-without.jpg c.jpg -o out.png",
        "sdvae arithmetic SMILING/ NEUTRAL/ c.jpg -o out.png --strength 1.5",
    ),
)
@click.argument("a", metavar="A", type=PATH)
@click.argument("b", metavar="B", type=PATH)
@click.argument("c", metavar="C", type=PATH)
@OUTPUT
@click.option(
    "--strength",
    type=float,
    metavar="X",
    default=1.0,
    show_default=True,
    help="How often A - B is added; below 0 it is taken away.",
)
@SIDE
@METADATA
@BUDGET
@with_vae
@with_console
def arithmetic(
    a: Path,
    b: Path,
    c: Path,
    output: Path,
    strength: float,
    size: int,
    no_metadata: bool,
    budget: int | None,
    load_vae: "Callable[[], VAE]",
    console: Console,
) -> None:
    """Decode A - B + C, in latents, beside A, B and C.

    A and B are photos, or sources of photos (a folder, a tar, ...): then the mean of their latents stands for them, and
    A - B is the attribute that the photos in A have and those in B have not. C is a photo.
    """
    check_output(output, a, b, c)
    from sdvae.pixels import to_images

    third = read_square(c, size)
    vae = load_vae()
    first, second = (_read(vae, path, size, budget) for path in (a, b))
    latents = vae.encode_images([third], budget).latents[0] + strength * (first.latents - second.latents)
    result = to_images(vae.decode(latents, budget))[0, :size, :size]
    sum_text = "A - B + C" if strength == 1 else f"C + {strength:g} (A - B)"
    captions = [f"A: {first.caption}", f"B: {second.caption}", f"C: {c.name}", sum_text]
    sheet = grid([first.image, second.image, third, result], 4, captions)
    write_picture(output, sheet, vae, has_metadata=not no_metadata)
    left_out = first.left_out | second.left_out
    console.result(
        f"{sum_text} of {a}, {b} and {c} written to {output}",
        output=str(output), strength=strength, num_a=first.number, num_b=second.number, left_out=left_out,
    )  # fmt: skip
    tell_left_out(console, left_out)


@dataclass(frozen=True)
class _Term:
    """A photo, or the mean of many."""

    latents: "Tensor"  # (1, C, h, w)
    image: "NDArray[np.uint8]"
    caption: str
    number: int
    left_out: dict[str, str]


def _read(vae: "VAE", path: Path, size: int, budget: int | None) -> _Term:
    from sdvae.encoding.prepare import list_entries
    from sdvae.explore.arithmetic import mean_latents
    from sdvae.explore.photos import cut_photos
    from sdvae.pixels import to_images
    from sdvae.sources.open import open_source
    from sdvae.store.geometry import Preprocess

    if not (path.is_dir() or path.suffix.lower() in (*PACKED, *SUFFIXES)):
        photo = read_square(path, size)
        return _Term(mean_latents(vae, [photo], budget), photo, path.name, 1, {})
    source = open_source(path)
    entries = list_entries(source)
    left_out: dict[str, str] = {}
    items = cut_photos(source, entries, Preprocess(size), left_out)
    first = next(items, None)
    if first is None:
        raise SourceError(f"no photo of {path} can be read: {next(iter(left_out.values()))}")
    latents = mean_latents(vae, (item.image for item in chain([first], items)), budget)
    image = to_images(vae.decode(latents, budget))[0, :size, :size]
    number = len(entries) - len(left_out)
    caption = f"mean of {number:,} in {path.name}"
    return _Term(latents, image, caption, number, {f"{path / key}": reason for key, reason in left_out.items()})
