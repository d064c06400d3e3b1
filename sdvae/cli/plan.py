"""`sdvae plan`: how large images would run on any machine, and what memory they would take."""

from typing import Literal

import click

from sdvae.cli.shared import BUDGET, FAMILY, SIZES, Console, with_console
from sdvae.config import VAEConfig
from sdvae.errors import ShapeError

_HOST_BYTES = 2**40  # a plan for any machine supposes that its host has enough
_ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@click.command(short_help="Show how images of a size would run, and their memory.")
@SIZES
@BUDGET
@click.option("--dtype", type=click.Choice(list(_ELEMENT_BYTES)), default="bf16", show_default=True)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="A GPU has higher strips, and may borrow its host's memory.",
)
@click.option("--vae", metavar="VAE", help="A folder, a file, a hub id: its shapes are read, not its weights.")
@FAMILY
@with_console
def plan(
    sizes: tuple[tuple[int, int], ...],
    budget: int | None,
    dtype: Literal["fp32", "bf16", "fp16"],
    device: Literal["cpu", "cuda"],
    vae: str | None,
    family: str | None,
    console: Console,
) -> None:
    """Show how images of a size would be encoded and decoded: stages, strips, memory. Nothing is run.

    Without --vae or --family, the plan is that of the embedded VAE. Decoding within --budget gives the pixels that
    decoding without one gives, to rounding; a budget that no plan can keep is an error that names the smallest.
    """
    from sdvae.engine.describe import describe_plan, plan_values
    from sdvae.engine.plan import MAX_GROUP, make_plan, max_images
    from sdvae.engine.stages import Direction, build_network

    config = _config(vae, family)
    scales: dict[Direction, int] = {"encode": 1, "decode": config.downscale}
    lines, values = [], []
    for height, width in sizes:
        if height % config.downscale or width % config.downscale:
            raise ShapeError(f"{width}x{height} px: both sides must be multiples of {config.downscale}")
        for direction, scale in scales.items():
            network = build_network(config, direction)
            found = make_plan(
                network,
                height // scale,
                width // scale,
                _ELEMENT_BYTES[dtype],
                budget_bytes=budget,
                is_gpu=device == "cuda",
                host_bytes=_HOST_BYTES if device == "cuda" else 0,
                max_group=MAX_GROUP,
            )
            num_images = None if budget is None else max_images(found, budget)
            within = [] if num_images is None else [f"within the budget: {num_images} image(s) in one call"]
            lines.append("\n".join([describe_plan(found), *within]))
            values.append({"height": height, "width": width} | plan_values(found) | {"max_images": num_images})
    console.result(
        "\n\n".join(lines), vae=vae, family=family, dtype=dtype, device=device, budget_bytes=budget, plans=values
    )


def _config(vae: str | None, family: str | None) -> VAEConfig:
    """The shape of a VAE; only a file that is named must be opened for it."""
    if vae is None:
        return VAEConfig.from_family(family or "small")
    from sdvae.tiny import TinyConfig
    from sdvae.weights.find import find_file
    from sdvae.weights.load import open_vae

    config = open_vae(find_file(vae), family).config
    if isinstance(config, TinyConfig):
        raise ShapeError(f"{vae} is a TAESD, which runs as a whole and has no plan; take a KL-VAE")
    return config
