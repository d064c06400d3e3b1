"""Help of verbs with many options: in groups, with examples at the end."""

from collections.abc import Mapping, Sequence
from typing import Any

import click

_RUNS = (
    "vae", "family", "padding", "device", "dtype", "batch_size", "budget", "workers", "on_oom", "runner", "address"
)  # fmt: skip


class Grouped(click.Command):
    """A verb whose help lists its options in groups.

    `groups` are those of its own: title -> names of parameters. The VAE's and the machine's options follow in a group
    for all verbs, then everything else, as "Output".
    """

    def __init__(
        self, *arguments: Any, groups: Mapping[str, Sequence[str]], examples: Sequence[str], **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.groups = {**groups, "The VAE, and where it runs": _RUNS}
        self.examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options, group by group."""
        records = {param.name: param.get_help_record(ctx) for param in self.get_params(ctx)}
        options = {param.name for param in self.get_params(ctx) if isinstance(param, click.Option)}
        grouped = {name for names in self.groups.values() for name in names}
        others = [name for name in records if name in options - grouped]
        for title, names in {**self.groups, "Output": others}.items():
            rows = [record for name in names if (record := records.get(name)) is not None]
            with formatter.section(title):
                formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples."""
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':>{formatter.current_indent}}{example}\n")
