"""`sdvae compact`: the newest view of a store, as a new store."""

from pathlib import Path

import click

from sdvae.amounts import count
from sdvae.cli.shared import PATH, Console, with_console


@click.command(short_help="Write the newest generation of a store as a new store.")
@click.argument("path", metavar="STORE", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, metavar="NEW", help="The new folder to write.")
@with_console
def compact(path: Path, output: Path, console: Console) -> None:
    """Write the records that STORE holds now to the store NEW, without those that were retired or replaced.

    Latents are copied, not encoded again. A store of version 1 becomes one of version 2, which can change with its
    source. Older generations are not in NEW.
    """
    from sdvae.encoding.compact import compact
    from sdvae.store.remote import local_copy

    with console.progress() as show:
        num_records = compact(local_copy(path), output, show)
    console.result(
        f"{count(num_records, 'record')} of {path} written to {output}",
        store=str(path),
        output=str(output),
        num_records=num_records,
    )
