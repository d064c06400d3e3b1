"""`sdvae verify`: whether a store still holds every byte that was committed."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sdvae.cli.shared import PATH, Console, with_console
from sdvae.errors import VerifyError

if TYPE_CHECKING:
    from sdvae.data.verify import Verdict

_NUM_NAMES = 20  # of lost records that a person is shown; --json has them all


@click.command()
@click.argument("store", type=PATH)
@with_console
def verify(store: Path, console: Console) -> None:
    """Check every byte of the latent store STORE against its digest.

    Exit code 5 where a file is damaged or missing; the records that are lost are named.
    """
    from sdvae.data.verify import verify as examine

    with console.progress() as show:
        verdict = examine(store, lambda num_done, num_all: show("verify", num_done, num_all))
    console.result(
        _describe(store, verdict),
        store=str(store),
        is_whole=not verdict.damages,
        num_files=verdict.num_files,
        num_bytes=verdict.num_bytes,
        num_records=verdict.num_records,
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


def _describe(store: Path, verdict: "Verdict") -> str:
    if not verdict.damages:
        return (
            f"{store} is whole: {verdict.num_records:,} records in {verdict.num_files:,} files, "
            f"{verdict.num_bytes / 1e6:,.1f} MB, every byte as it was committed"
        )
    if verdict.is_unfinished:
        return (
            f"{store} is whole as far as it goes, but {_count(len(verdict.damages), 'shard')} not encoded yet; "
            "run the command that encoded it again"
        )
    broken = [damage for damage in verdict.damages if damage.state != "not encoded yet"]
    names = [damage.path.relative_to(store).as_posix() for damage in broken]
    width = max(map(len, names))
    lines = [f"{store} is damaged:"]
    for name, damage in zip(names, broken, strict=True):
        lost = _count(len(damage.lost), "record") + " lost" if damage.lost else ""
        lines.append(f"  {name:{width}}  {damage.state:7}  {lost}".rstrip())
    if len(broken) < len(verdict.damages):
        lines.append(f"  not encoded yet: {_count(len(verdict.damages) - len(broken), 'shard')}")
    if verdict.lost:
        lines.append("lost: " + ", ".join(verdict.lost[:_NUM_NAMES]) + ", ..." * (len(verdict.lost) > _NUM_NAMES))
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"
