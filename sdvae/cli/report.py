"""`sdvae report`: the page of an evaluation or of a store."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sdvae.cli.shared import PATH, SPACE, Console, with_console, with_vae
from sdvae.errors import OutputError

if TYPE_CHECKING:
    from sdvae.vae import VAE


@click.command(short_help="Make the page of an evaluation or of a store.")
@click.argument("path", metavar="REPORT|STORE", type=PATH)
@click.option(
    "-o", "--output", type=PATH, metavar="FILE", help="The HTML file.  [default: REPORT/report.html, or STORE.html]"
)
@SPACE
@with_vae
@with_console
def report(path: Path, output: Path | None, space: str | None, load_vae: "Callable[[], VAE]", console: Console) -> None:
    """Make one self-contained HTML file of what `sdvae eval` found in REPORT, or of a latent STORE.

    The page of a store shows some of its records, decoded by the VAE, beside its statistics.
    """
    from sdvae import atomic
    from sdvae.report.comparison import REPORT_NAME
    from sdvae.report.render import render
    from sdvae.store.remote import local_copy

    folder = local_copy(path)
    is_store = (folder / "manifest.json").exists()
    target = output or (folder.with_name(f"{folder.name}.html") if is_store else folder / REPORT_NAME)
    if target.is_dir() or not target.parent.is_dir():
        what = "it is a folder" if target.is_dir() else f"there is no folder {target.parent}"
        raise OutputError(f"cannot write {target}: {what}")
    if is_store:
        from sdvae.report.store import store_page
        from sdvae.store.store import Store

        with console.progress() as progress:
            html = render(store_page(Store.open(folder), load_vae(), progress, space))
    else:
        from sdvae.evaluate.results import read_results
        from sdvae.report.comparison import comparison

        html = render(comparison(folder, read_results(folder)))
    data = html.encode()
    atomic.write_bytes(target, data)
    console.result(f"{target}, {len(data) / 1e6:.1f} MB", output=str(target), num_bytes=len(data))
