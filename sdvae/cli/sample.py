"""`sdvae sample`: images decoded from the prior, or from what photos' latents are like, on one contact sheet."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sdvae.amounts import count
from sdvae.cli.grouped import Grouped
from sdvae.cli.pictures import METADATA, check_output, grid, write_picture
from sdvae.cli.shared import BUDGET, OUTPUT, SEED, SPACE, Console, tell_left_out, with_console, with_vae

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sdvae.store.store import Store
    from sdvae.vae import VAE


@click.command(
    cls=Grouped,
    short_help="Decode latents drawn at random.",
    groups={"What is drawn": ("num", "source", "components", "size", "seed", "space")},
    examples=(
        "sdvae sample -o sheet.png",
        "sdvae sample -n 4 --size 512 --seed 7 -o sheet.png",
        "sdvae sample --from photos -o sheet.png",
        "sdvae sample --from latents --components 10 -o sheet.png",
    ),
)
@click.option(
    "-n", "--num", type=click.IntRange(min=1), metavar="N", default=16, show_default=True, help="How many images."
)
@click.option(
    "--from",
    "source",
    metavar="PHOTOS|STORE",
    help="Draw from a distribution fitted to the latents of these, not from the prior.",
)
@click.option(
    "--components",
    type=click.IntRange(min=1),
    metavar="K",
    default=1,
    show_default=True,
    help="With --from: 1 fits a Gaussian, more a mixture.",
)
@OUTPUT
@click.option(
    "--size",
    type=click.IntRange(min=1),
    metavar="PX",
    default=256,
    show_default=True,
    help="Pixels along each side; a store has its own.",
)
@SEED
@SPACE
@METADATA
@BUDGET
@with_vae
@with_console
def sample(
    num: int,
    source: str | None,
    components: int,
    output: Path,
    size: int,
    seed: int,
    space: str | None,
    no_metadata: bool,
    budget: int | None,
    load_vae: "Callable[[], VAE]",
    console: Console,
) -> None:
    """Decode latents drawn from the prior N(0, I) to a contact sheet.

    The VAE of a diffusion model is only weakly regularised towards its prior: expect textures, not photos. --from
    draws from a Gaussian or a mixture fitted to the whole latents of photos, at most 1,000 of them: expect blends of
    those photos.
    """
    if components > 1 and source is None:
        raise click.UsageError("--components says how many Gaussians are fitted; give the photos with --from.")
    check_output(output)
    import numpy as np

    vae = load_vae()
    left_out: dict[str, str] = {}
    if source is None:
        images = [np.asarray(image) for image in vae.sample(num, size, size, seed, budget)]
    else:
        images = _draw(vae, source, components, num, size, seed, space, budget, left_out, console)
    write_picture(output, grid(images, columns=math.ceil(math.sqrt(num))), vae, has_metadata=not no_metadata)
    height, width, _ = images[0].shape
    console.result(
        f"{count(num, 'image')} written to {output}",
        output=str(output), num=num, width=width, height=height, seed=seed, source=source, left_out=left_out,
    )  # fmt: skip
    tell_left_out(console, left_out)


def _draw(
    vae: "VAE",
    source: str,
    components: int,
    num: int,
    size: int,
    seed: int,
    space: str | None,
    budget: int | None,
    left_out: dict[str, str],
    console: Console,
) -> "list[NDArray[np.uint8]]":
    import torch

    from sdvae.explore.fit import fit_latents
    from sdvae.explore.posteriors import of_photos, of_store
    from sdvae.pixels import to_images
    from sdvae.sources.open import open_source

    store = _find_store(source)
    if store is not None:
        posterior, crop = of_store(store, vae, space), slice(None)
    else:
        with console.progress() as show:
            posterior = of_photos(open_source(source), vae, size, budget=budget, left_out=left_out, progress=show)
        crop = slice(size)
    fitted = fit_latents(posterior, components, seed)
    generator = torch.Generator().manual_seed(seed)
    drawn = (fitted.sample(1, generator) for _ in range(num))
    return [to_images(vae.decode(latents, budget))[0, crop, crop] for latents in drawn]


def _find_store(source: str) -> "Store | None":
    from sdvae.store.remote import local_copy
    from sdvae.store.store import Store

    if source.startswith("hf://"):  # photos on the hub
        return None
    place = local_copy(source)
    return Store.open(place) if (place / "manifest.json").exists() else None
