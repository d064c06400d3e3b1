"""`sdvae inspect`: what a weights file holds."""

from collections import Counter
from dataclasses import asdict
from typing import Any

import click

from sdvae.cli.shared import FAMILY, Console, with_console
from sdvae.errors import SdvaeError
from sdvae.printable import printable


@click.command(short_help="Show what a weights file holds, or which VAE decoded a picture.")
@click.argument("file")
@FAMILY
@click.option("--tensors", is_flag=True, help="Also list every tensor.")
@with_console
def inspect(file: str, family: str | None, tensors: bool, console: Console) -> None:
    """Show the tensors, dtypes and metadata of FILE (also a folder or hub id), and the VAE in it.

    Only the VAE's tensors are read, for their fingerprint and its latent space; `sdvae identify` tells all evidence.
    Of a picture, show its metadata: which VAE decoded it.
    """
    from sdvae.cli.pictures import picture_facts
    from sdvae.images.provenance import is_picture
    from sdvae.weights.evidence import UNKNOWN
    from sdvae.weights.files import TensorFile, open_weights
    from sdvae.weights.find import find_file
    from sdvae.weights.identity import fingerprint, padded_fingerprint
    from sdvae.weights.load import open_vae

    path = find_file(file)
    if is_picture(path):
        lines, values = picture_facts(path)
        console.result("\n".join(lines), **values)
        return
    index: TensorFile = open_weights(path)
    found: dict[str, Any] = {
        "file": str(path),
        "container": index.container,
        "num_tensors": len(index.entries),
        "num_bytes": sum(entry.num_bytes for entry in index.entries.values()),
        "dtypes": dict(Counter(entry.dtype for entry in index.entries.values())),
        "metadata": index.metadata,
    }
    try:
        vae = open_vae(path, family)
    except SdvaeError as error:  # another model's weights are no error here
        found["vae"], reason = None, str(error)
    else:
        reason = "; ".join(f"its {item.kind} disagrees ({item.reason})" for item in vae.verdict.contradictions)
        found["vae"] = {
            "prefix": vae.keys.prefix,
            "layout": vae.keys.layout,
            "num_tensors": len(vae.keys.names),
            "left_out": vae.left_out,
            "family": vae.family,
            "latent_space": vae.verdict.space or UNKNOWN,
            "certainty": vae.verdict.certainty,
            "correlations": vae.verdict.correlations,
            "config": asdict(vae.config),
            "fingerprint": padded_fingerprint(fingerprint(vae.read()), vae.config.padding),
        }
    if tensors:
        found["tensors"] = {key: [entry.dtype, list(entry.shape)] for key, entry in index.entries.items()}
    console.result("\n".join(_lines(found)), **found)
    if reason:
        console.note(reason)


def _lines(found: dict[str, Any]) -> list[str]:
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in found["dtypes"].items())
    lines = [
        f"{found['file']}: {found['container']}, {found['num_bytes'] / 1e6:.1f} MB",
        f"tensors      {found['num_tensors']} ({dtypes})",
        *(f"metadata     {printable(key, 100)}: {printable(value, 100)}" for key, value in found["metadata"].items()),
    ]
    if found["vae"]:
        vae, config = found["vae"], found["vae"]["config"]
        lines += [
            f"VAE          {vae['num_tensors']} tensors in {vae['layout']} layout, prefix {vae['prefix'] or 'none'}",
            *([f"left out     {_groups(vae['left_out'])}"] if vae["left_out"] else []),
            f"family       {vae['family'] or 'not told'}",
            f"space        {_space(vae)}",
            f"widths       {list(config['block_out_channels'])}, {config['layers_per_block']} layers a block",
            f"latents      {config['latent_channels']} channels, scaling factor {config['scaling_factor']}"
            + (f", shift {config['shift_factor']}" if config["shift_factor"] is not None else ""),
            *([] if config["padding"] == "zeros" else [f"padding      {config['padding']}"]),
            f"fingerprint  {vae['fingerprint']}",
        ]
    else:
        lines.append("VAE          none")
    return lines + [f"{dtype:<8} {shape} {printable(key)}" for key, (dtype, shape) in found.get("tensors", {}).items()]


def _space(vae: dict[str, Any]) -> str:
    seen = ", ".join(f"{value:.2f} with {space}" for space, value in vae["correlations"].items())
    name = vae["certainty"] if vae["certainty"] == "unknown" else f"{vae['latent_space']}, {vae['certainty']}"
    return name + (f"; the probe correlates {seen}" if seen else "")


def _groups(left_out: dict[str, int]) -> str:
    from sdvae.weights.keymap import some

    return f"of other parts: {printable(some([f'{number} {names}' for names, number in left_out.items()]))}"
