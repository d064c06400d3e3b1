"""`sdvae plan`: whether images of a size fit a memory on any machine, and how they would run."""

from typing import Literal

import click

from sdvae.amounts import size_text
from sdvae.cli.grouped import Grouped
from sdvae.cli.shared import FAMILY, SIZES, Console, parse_budget, with_console
from sdvae.config import VAEConfig
from sdvae.engine.verdict import ELEMENT_BYTES, Dtype
from sdvae.errors import ShapeError


@click.command(
    cls=Grouped,
    short_help="Tell whether images of a size fit a memory, and how they would run.",
    groups={"What is planned": ("sizes",)},
    examples=(
        "sdvae plan --size 4096 --family sd1 --budget 12GiB",
        "sdvae plan --size 8192x4096 --device cuda --dtype fp16 --budget 16GiB",
        "sdvae plan --family sdxl --size 1024 -v                # every stage",
    ),
)
@SIZES
@click.option(
    "--budget",
    metavar="BYTES",
    callback=parse_budget,
    help="Memory of the device, weights included: 8GiB, 800MiB.  [default: enough]",
)
@click.option("--dtype", type=click.Choice(list(ELEMENT_BYTES)), default="bf16", show_default=True)
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
    dtype: Dtype,
    device: Literal["cpu", "cuda"],
    vae: str | None,
    family: str | None,
    console: Console,
) -> None:
    """Tell whether images of a size can be encoded and decoded within --budget: yes or no, and how much it takes.

    Nothing is run. With -v, also every stage with its strips and memory. Without --vae or --family, the plan is that of
    the embedded VAE. Decoding within a budget gives the pixels that decoding without one gives, to rounding. The exit
    code is 1 where the answer is no.
    """
    from functools import partial

    from sdvae.engine.describe import describe_plan, plan_values
    from sdvae.engine.plan import max_images
    from sdvae.engine.verdict import find_need, verdict

    config = _config(vae, family)
    verdicts, tables, values = [], [], []
    for size in sizes:
        if size[0] % config.downscale or size[1] % config.downscale:
            raise ShapeError(f"{size_text(*size)} px: both sides must be multiples of {config.downscale}")
        find = partial(find_need, config, size_px=size, is_gpu=device == "cuda", memory_bytes=budget)
        needs = [find(direction, dtype=dtype) for direction in ("encode", "decode")]
        narrower: Dtype = "fp16" if device == "cuda" else "bf16"  # a CPU has no use for fp16
        is_mended = dtype == "fp32" and all(find(way, dtype=narrower).fits for way in ("encode", "decode"))
        verdicts.append(verdict(needs, dtype, budget, [narrower] if is_mended else []))
        for need in needs:
            tables.append(describe_plan(need.plan))
            values.append(
                {"height": size[0], "width": size[1], "fits": None if budget is None else need.fits}
                | {"needed_bytes": need.num_bytes, "least_bytes": need.least_bytes, "weights_bytes": need.weights_bytes}
                | plan_values(need.plan)
                | {"max_images": None if budget is None else max_images(need.plan, budget - need.weights_bytes)}
            )
    fits = None if budget is None else all(value["fits"] for value in values)
    console.result(
        "\n\n".join(["\n".join(verdicts), *(tables if console.is_verbose else [])]),
        verdicts=verdicts,
        fits=fits,
        vae=vae,
        family=family,
        dtype=dtype,
        device=device,
        budget_bytes=budget,
        plans=values,
    )
    if fits is False:
        click.get_current_context().exit(1)


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
