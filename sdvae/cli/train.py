"""`sdvae train`: a VAE trained or fine-tuned on photos."""

from dataclasses import asdict
from pathlib import Path

import click

from sdvae.amounts import count
from sdvae.cli.shared import DEVICE, PATH, Console, with_console


@click.command(short_help="Train or fine-tune a VAE on photos.")
@click.argument("config", metavar="CONFIG")
@click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="Change one key of the config: data.source=PHOTOS, optimizer.learning_rate=5e-5; can be repeated.",
)
@click.option("-o", "--output", type=PATH, required=True, metavar="RUN", help="The folder of the run.")
@DEVICE
@with_console
def train(config: str, settings: tuple[str, ...], output: Path, device: str, console: Console) -> None:
    """Train as CONFIG says, a TOML file or the name of a ready one: finetune_decoder, photos_kl_f8, small.

    After an interruption the same command continues. Ctrl-C saves first. RUN becomes a folder that --vae and diffusers
    load. Under accelerate launch or torchrun, the processes share each batch.
    """
    from accelerate import PartialState

    from sdvae.train.config import load_config
    from sdvae.train.loop import train

    settled = load_config(config, settings)
    console.note(f"training {settled.model.start or settled.model.family} on {settled.data.source} in {output}")
    with console.progress() as show:
        report = train(settled, output, device, progress=show)
    ranks = PartialState()
    ranks.destroy_process_group()
    if not ranks.is_main_process:
        return
    speed = f"{report.steps_per_s:.2f} steps/s, {report.waiting:.0%} of the time waiting for photos"
    quality = "" if report.psnr_db is None else f", {report.psnr_db:.2f} dB PSNR on held-out photos"
    console.result(
        f"{count(report.step, 'step')} on {count(report.num_photos, 'photo')} in {output}{quality}; "
        f"{speed if report.steps_per_s else 'nothing left to do'}",
        output=str(output),
        **asdict(report),
    )
