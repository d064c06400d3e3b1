"""`sdvae verify`: whether a store still holds every byte that was committed, and how to restore the others."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sdvae.amounts import count
from sdvae.cli.grouped import Grouped
from sdvae.cli.shared import PATH, Console, with_console, with_vae
from sdvae.errors import StoreError, VerifyError

if TYPE_CHECKING:
    from sdvae.encoding.repair import Repair
    from sdvae.progress import Progress
    from sdvae.store.verify import Verdict
    from sdvae.vae import VAE

_NUM_NAMES = 20  # of lost records that a person is shown; --json has them all


@click.command(
    cls=Grouped,
    short_help="Check every byte of a store; restore what is lost.",
    groups={"What is restored": ("repair", "source")},
    examples=(
        "sdvae verify latents",
        "sdvae verify latents --repair                  # from the rest of the store",
        "sdvae verify latents --repair --source photos  # encode what is lost again",
    ),
)
@click.argument("store", type=PATH)
@click.option("--repair", is_flag=True, help="Restore damaged files from the rest of the store where possible.")
@click.option("--source", metavar="SRC", help="With --repair: the photos, to encode lost latents again.")
@with_vae
@with_console
def verify(store: Path, repair: bool, source: str | None, load_vae: "Callable[[str], VAE]", console: Console) -> None:
    """Check every byte of the latent store STORE against its digest.

    If a file is damaged or missing, the exit code is 5 and the lost records are listed.
    """
    from sdvae.store.remote import url_of

    if source is not None and not repair:
        raise click.UsageError("--source needs --repair.")
    if url := url_of(store):
        raise StoreError(f"verify needs a local folder; {url} is checked against its commits whenever it is copied")
    with console.progress() as show:
        if repair:
            found = _repair(store, source, load_vae, show)
            restored, verdict = found.restored, found.verdict
        else:
            from sdvae.store.verify import verify as examine

            restored, verdict = [], examine(store, show)
    for path in restored:
        console.note(f"restored {path}")
    console.result(
        _describe(store, verdict, is_repaired=repair),
        store=str(store),
        is_whole=not verdict.damages,
        num_files=verdict.num_files,
        num_bytes=verdict.num_bytes,
        num_records=verdict.num_records,
        restored=[path.relative_to(store).as_posix() for path in restored],
        damages=[
            {
                "path": damage.path.relative_to(store).as_posix(),
                "state": damage.state,
                "shard": damage.shard,
                "lost": damage.lost,
            }
            for damage in verdict.damages
        ],
    )
    if verdict.damages:
        click.get_current_context().exit(1 if verdict.is_unfinished else VerifyError.exit_code)


def _repair(store: Path, source: str | None, load_vae: "Callable[[str], VAE]", progress: "Progress") -> "Repair":
    from sdvae.encoding.repair import Photos, repair
    from sdvae.sources.open import open_source

    return repair(store, Photos(open_source(source), load_vae) if source else None, progress)


def _describe(store: Path, verdict: "Verdict", is_repaired: bool) -> str:
    if not verdict.damages:
        return (
            f"{store} is whole: {count(verdict.num_records, 'record')} in {count(verdict.num_files, 'file')}, "
            f"{verdict.num_bytes / 1e6:,.1f} MB, every byte as it was committed"
        )
    if verdict.is_unfinished:
        return (
            f"{store} is not complete: {count(len(verdict.damages), 'shard')} not encoded yet, none damaged; "
            "run its encode command again"
        )
    broken = [damage for damage in verdict.damages if damage.state != "not encoded yet"]
    names = [damage.path.relative_to(store).as_posix() for damage in broken]
    width = max(map(len, names))
    lines = [f"{store} is damaged:"]
    for name, damage in zip(names, broken, strict=True):
        lost = count(len(damage.lost), "record") + " lost" if damage.lost else ""
        lines.append(f"  {name:{width}}  {damage.state:7}  {lost}".rstrip())
    if len(broken) < len(verdict.damages):
        lines.append(f"  not encoded yet: {count(len(verdict.damages) - len(broken), 'shard')}")
    if verdict.lost:
        lines.append("lost: " + ", ".join(verdict.lost[:_NUM_NAMES]) + ", ..." * (len(verdict.lost) > _NUM_NAMES))
    if not is_repaired:
        lines.append(f"next: sdvae verify {store} --repair, with --source SRC --vae VAE where latents are lost")
        return "\n".join(lines)
    from sdvae.encoding.repair import remedy

    files: dict[str, list[str]] = {}
    for name, damage in zip(names, broken, strict=True):
        files.setdefault(remedy(damage), []).append(name)
    lines += [f"{', '.join(group[:3])}{', ...' * (len(group) > 3)}: {text}" for text, group in files.items()]
    return "\n".join(lines)
