"""`sdvae compare`: whether two VAEs are the same, and what differs."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from sdvae.amounts import count
from sdvae.cli.shared import Console, with_console
from sdvae.errors import VerifyError

if TYPE_CHECKING:
    from sdvae.weights.compare import Comparison, Side
    from sdvae.weights.evidence import Relation

_NUM_ROWS = 10  # of tensors that a person is shown; --json has them all


@click.command(short_help="Compare two VAEs: tensors, latent space, config.")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@with_console
def compare(a: str, b: str, console: Console) -> None:
    """Compare the VAEs A and B: which tensors differ, by how much, and whether they share a latent space.

    Each is a folder, a file of a VAE, a checkpoint or a hub id. Layouts and dtypes may differ: values are compared. The
    exit code is 0 where all values and the config are equal, else 5.
    """
    from sdvae.weights.compare import compare

    found = compare(a, b)
    console.result("\n".join(_lines(found)), **asdict(found))
    if found.verdict != "equal":
        click.get_current_context().exit(VerifyError.exit_code)


def _lines(found: "Comparison") -> list[str]:
    num_equal = found.num_shared - len(found.differences)
    only = [(side, names) for side, names in (("A", found.only_in_a), ("B", found.only_in_b)) if names]
    tensors = f"{found.num_shared} in both, {num_equal} equal" + "".join(
        f"; {len(names)} only in {side}, such as {names[0]}" for side, names in only
    )
    config = "; ".join(f"{name} {ours} in A, {theirs} in B" for name, (ours, theirs) in found.config.items())
    untold = f"; not told by both: {', '.join(found.untold)}" if found.untold else ""
    lines = [
        _verdict(found),
        f"A        {_describe(found.a)}",
        f"B        {_describe(found.b)}",
        f"tensors  {tensors}",
        f"space    {_space(found.space)}: {found.space.reason}",
        f"config   {config or 'the same'}{untold}",
    ]
    if found.differences:
        width = max(len(each.name) for each in found.differences[:_NUM_ROWS])
        lines.append(f"{'largest differences':<{width}}{'max abs':>12}{'relative L2':>13}{'values':>18}")
        for each in found.differences[:_NUM_ROWS]:
            share = f"{each.num_differing:,} of {each.num_values:,}"
            numbers = f"{_number(each.max_abs):>12}{_number(each.relative_l2):>13}"
            lines.append(f"{each.name:<{width}}{numbers}  {share:>16}")
        if len(found.differences) > _NUM_ROWS:
            lines.append(f"and {count(len(found.differences) - _NUM_ROWS, 'more tensor')}; --json lists all")
    return lines


def _verdict(found: "Comparison") -> str:
    if found.verdict == "equal":
        return f"equal: {count(found.num_shared, 'tensor')} with the same values"
    if found.verdict == "rounded":
        return f"equal but for rounding to {found.rounding}: {_differing(found)}"
    if found.a.network != found.b.network:
        return f"different: {found.a.network} and {found.b.network}; {_space(found.space)}"
    if found.only_in_a or found.only_in_b:
        return f"different: networks of other shapes; {_space(found.space)}"
    if not found.differences:
        return f"different: equal tensors, but another config ({', '.join(found.config)})"
    return f"different: {_differing(found)}; {_space(found.space)}"


def _differing(found: "Comparison") -> str:
    halves = {each.name.startswith(("decoder.", "post_quant_conv.")) for each in found.differences}
    where = ", all of the decoder" if halves == {True} else ", all of the encoder" if halves == {False} else ""
    tensors = f"{len(found.differences)} of {count(found.num_shared, 'tensor')} differ{where}"
    return f"{tensors}, relative L2 {_number(found.relative_l2)}"


def _space(space: "Relation") -> str:
    if space.is_same is None:
        return "perhaps another latent space"
    declared = "declared " if space.certainty == "declared" else ""
    name = f" ({space.name})" if space.name else ""
    return f"{declared}the same latent space{name}" if space.is_same else f"{declared}another latent space"


def _describe(side: "Side") -> str:
    dtypes = " and ".join(side.dtypes)
    family = f"family {side.family or 'not told'}"
    return f"{side.file}: {side.network}, {dtypes}, {side.layout} layout, {family}, space {_named(side)}"


def _named(side: "Side") -> str:
    return side.certainty if side.certainty == "unknown" else f"{side.certainty} {side.latent_space}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2g}"
