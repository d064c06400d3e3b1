"""`sdvae encode`: photos into a latent store."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from sdvae.amounts import count, size_text
from sdvae.cli.grouped import Grouped
from sdvae.cli.preprocess import with_preprocess
from sdvae.cli.shared import (
    BATCH_SIZE,
    BUDGET,
    PATH,
    Console,
    describe_vae,
    take_own_gpu,
    with_console,
    with_vae,
)
from sdvae.errors import StoreError

if TYPE_CHECKING:
    from sdvae.encoding.attach import StreamReport
    from sdvae.encoding.encode import EncodeReport, Survey
    from sdvae.encoding.runners import Runner
    from sdvae.encoding.times import Times
    from sdvae.store.geometry import Preprocess, Resizer
    from sdvae.vae import VAE

_STEPS = {
    "read": "read files", "decode": "decode, resize", "copy": "copy to the device", "encode": "encode",
    "write": "copy back, write", "waiting": "encoder waits", "start": "the start of the processes",
}  # fmt: skip


def _parse_share(ctx: click.Context, param: click.Parameter, value: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)%", value)
    if match is None or float(match[1]) > 100:
        raise click.BadParameter(f"{value!r} is not a share from 0% to 100%.")
    return float(match[1]) / 100


def _parse_workers(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    if value != "auto" and not value.isdecimal():
        raise click.BadParameter(f"{value!r} is neither auto nor a number of processes.")
    return None if value == "auto" else int(value)


def _parse_streams(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    streams: dict[str, str] = {}
    for value in values:
        name, _, source = value.partition("=")
        if not source or name in streams:
            raise click.BadParameter(f"{value!r} is not NAME=SRC with a name of its own, such as mask=masks.")
        streams[name] = source
    return streams


@click.command(
    cls=Grouped,
    short_help="Encode photos to a latent store.",
    groups={
        "What is encoded": ("caption", "with", "limit", "keep_vanished"),
        "How photos are prepared": (
            "size",
            "crop",
            "seed",
            "buckets",
            "flip",
            "max_upscale",
            "min_size",
            "resample",
            "decoder",
            "resizer",
            "jpeg_draft",
        ),
    },
    examples=(
        "sdvae encode photos latents --dry-run                  # what would be encoded",
        "sdvae encode photos latents --vae stabilityai/sd-vae-ft-mse --buckets sd1",
        "srun --ntasks 16 sdvae encode photos.tar s3://bucket/latents --size 1024",
    ),
)
@click.argument("source", metavar="SRC")
@click.argument("out", type=PATH)
@click.option(
    "--caption",
    metavar="NAME",
    help="The ending of the files, or the column, that holds captions.  [default: .txt, .caption; caption, text]",
)
@click.option(
    "--with",
    "streams",
    metavar="NAME=SRC",
    multiple=True,
    callback=_parse_streams,
    help="Pictures beside the photos, of the same names: mask=SRC for masks, any other name for controls. Repeatable.",
)
@with_preprocess
@click.option(
    "--shard-rows",
    type=click.IntRange(min=1),
    metavar="N",
    default=1024,
    show_default=True,
    help="Maximum number of records in a shard.",
)
@click.option(
    "--store-dtype",
    type=click.Choice(["fp16", "fp32"]),
    default="fp16",
    show_default=True,
    help="The dtype that latents are stored in.",
)
@click.option(
    "--resume/--restart", default=True, show_default=True, help="Continue the store in OUT, or delete it first."
)
@click.option("--yes", is_flag=True, help="With --restart: delete without asking.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Encode only the first N photos of SRC.")
@click.option("--keep-vanished", is_flag=True, help="Keep the records of photos that are no longer in SRC.")
@click.option("--dry-run", is_flag=True, help="Report what would be encoded, and write nothing.")
@click.option(
    "--workers",
    metavar="auto|N",
    default="auto",
    show_default=True,
    callback=_parse_workers,
    help="Processes that read and decode photos.",
)
@click.option(
    "--on-oom",
    type=click.Choice(["stop", "degrade"]),
    default="stop",
    show_default=True,
    help="When memory runs out: stop and report what fits, or go on with smaller batches and mark the shards.",
)
@click.option(
    "--audit",
    metavar="P%",
    default="0%",
    callback=_parse_share,
    help="Decode this share of the photos; report the PSNR.",
)
@click.option(
    "--runner", type=click.Choice(["local", "ray"]), default="local", show_default=True, help="What runs the encoding."
)
@click.option("--address", metavar="HOST:PORT", help="Address of the Ray cluster.  [default: one on this machine]")
@BATCH_SIZE
@BUDGET
@with_vae
@with_console
def encode(
    source: str,
    out: Path,
    caption: str | None,
    streams: dict[str, str],
    size: int | None,
    min_size: int | None,
    shard_rows: int,
    store_dtype: Literal["fp16", "fp32"],
    resume: bool,
    yes: bool,
    limit: int | None,
    keep_vanished: bool,
    dry_run: bool,
    workers: int | None,
    on_oom: Literal["stop", "degrade"],
    audit: float,
    resizer: "Literal['auto'] | Resizer",
    runner: Literal["local", "ray"],
    address: str | None,
    batch_size: int | None,
    budget: int | None,
    load_vae: "Callable[[str], VAE]",
    console: Console,
    **preprocess: Any,
) -> None:
    """Encode the photos in SRC into the latent store OUT, a folder or s3://BUCKET/STORE.

    After an interruption, the same command continues. Where SRC has changed, it encodes new and changed photos, takes
    over new names, captions and labels, and retires photos that are gone. A photo that cannot be read is quarantined
    with a reason, and the exit code is then 3. Under accelerate launch, torchrun or srun, each process encodes its
    share.
    """
    from sdvae.store.remote import local_copy, url_of

    if not resume and not yes and not dry_run:
        _ask_before_restart(out)
    place = url_of(out) or str(out)
    console.note(f"encoding {source} into {place}")  # before the seconds that imports and weights take

    from sdvae.encoding.encode import encode_dataset, survey
    from sdvae.encoding.manifest import EncodeSettings, recorded_settings
    from sdvae.encoding.pictures import encode_pictures
    from sdvae.encoding.resize import choose_resizer
    from sdvae.encoding.runners import Ranks
    from sdvae.encoding.tasks import Work, encode_tasks
    from sdvae.sources.open import open_source
    from sdvae.store.geometry import Preprocess
    from sdvae.store.store import Store
    from sdvae.store.streams import require_stream_name

    for name in streams:
        require_stream_name(name)
    others = {name: open_source(pictures) for name, pictures in streams.items()}
    if streams and url_of(out):
        raise StoreError(f"--with needs a store in a local folder, not {place}")
    has_own_size = preprocess["crop"] == "none" or preprocess["buckets"] is not None
    size_px = size or (None if has_own_size else 512)
    settings = EncodeSettings(
        Preprocess(size_px=size_px, min_size_px=min_size, **preprocess), store_dtype, shard_rows, batch_size
    )
    ranks = Ranks.of_environment()
    take_own_gpu(ranks)
    if ranks.world_size > 1:
        console.note(
            f"this is process {ranks.rank + 1} of {ranks.world_size}, as its launcher says; it takes its share"
        )
    begun = Store.find(local_copy(out)) if resume else None
    with console.progress() as show:
        if resizer == "auto":
            resizer = recorded_settings(begun).preprocess.resizer if begun else choose_resizer(preprocess["resample"])
        settings = replace(settings, preprocess=replace(settings.preprocess, resizer=resizer))
        vae = load_vae(begun.manifest["compute"]["dtype"] if begun else "auto")  # a store holds latents of one dtype
        console.note(_describe_run(vae, settings.preprocess))
        photos = open_source(source, caption)
        if dry_run:
            found = survey(photos, out, vae, settings, limit=limit, keep_vanished=keep_vanished, progress=show)
            _tell_survey(console, found, place)
            return
        work = Work(workers, on_oom, audit, budget)
        with _telling_what_is_kept(out):
            report = encode_dataset(
                photos,
                out,
                vae,
                settings,
                restart=not resume,
                limit=limit,
                keep_vanished=keep_vanished,
                work=work,
                runner=encode_tasks if runner == "local" else _ray_runner(address),
                ranks=ranks,
                progress=show,
            )
            made = [
                encode_pictures(out, name, pictures, vae, work, show)
                for name, pictures in others.items()
                if not report.num_shards_left  # else the process that finishes the store makes them
            ]
    _tell(console, report, made, place, vae.name)
    if report.quarantined and ranks.world_size == 1:  # a launcher ends all ranks when one does not exit with 0
        click.get_current_context().exit(3)


@contextmanager
def _telling_what_is_kept(out: Path) -> Iterator[None]:
    """Where a signal stops the run, a note for the closing line: what is not lost, and how to go on."""
    try:
        yield
    except SystemExit as stopped:
        from sdvae.encoding.encode import count_kept

        num_kept, num_all = count_kept(out)
        kept = f"{num_kept} of {count(num_all, 'photo')} are encoded and kept" if num_all else "nothing is encoded yet"
        without = "" if click.get_current_context().params["resume"] else " without --restart"
        stopped.add_note(f"{kept}; the same command{without} goes on")
        raise


def _describe_run(vae: "VAE", preprocess: "Preprocess") -> str:
    buckets = preprocess.buckets if isinstance(preprocess.buckets, str) else "the given"
    size = f"{size_text(preprocess.size_px, preprocess.size_px)} px" if preprocess.size_px else "the photos' own sizes"
    what = f"{buckets} buckets" if preprocess.buckets else size
    hint = (
        "; to train a diffusion model, give its VAE with --vae"
        if click.get_current_context().params["vae"] is None
        else ""
    )
    return f"{describe_vae(vae)}; {what}, crop {preprocess.crop}{hint}"


def _tell_survey(console: Console, found: "Survey", place: str) -> None:
    from sdvae.encoding.prepare import KINDS

    for kind, number in found.changes.items() if sum(found.changes.values()) else ():
        console.note(f"{number:>9} {KINDS[kind]}")
    for size, number in found.sizes.items():
        console.note(f"{number:>9} of {size_text(*size)} px")
    for reason, number in found.quarantined.items():
        console.note(f"{count(number, 'photo')} would be quarantined: {reason}")
    num_new = sum(found.sizes.values())
    console.result(
        f"would encode {count(num_new, 'photo')} of {found.num_seen} into {place}, {found.num_bytes / 1e6:,.1f} MB of "
        "latents; nothing was written",
        output=place,
        num_seen=found.num_seen,
        num_to_encode=num_new,
        sizes=[{"width": width, "height": height, "num_photos": n} for (height, width), n in found.sizes.items()],
        quarantined=found.quarantined,
        changes=found.changes,
        num_bytes=found.num_bytes,
    )


def _ask_before_restart(out: Path) -> None:
    from sdvae.store.paths import StorePaths

    num_shards = len(list(StorePaths(out).done(0).parent.glob("*.json")))
    try:
        is_sure = not num_shards or click.confirm(f"Delete {count(num_shards, 'shard')} in {out}?", err=True)
    except click.Abort:  # there is no terminal to ask on
        is_sure = False
    if not is_sure:
        raise StoreError(f"{out} holds {count(num_shards, 'shard')}, nothing was deleted; --yes deletes unasked")


def _ray_runner(address: str | None) -> "Runner":
    from sdvae.encoding.runners import RayRunner, VAESpec

    given = click.get_current_context().params
    return RayRunner(VAESpec(given["vae"], given["family"], given["padding"]), address)


def _tell(console: Console, report: "EncodeReport", streams: "list[StreamReport]", place: str, vae_name: str) -> None:
    for stream in streams:
        missing = ", ".join(f"{number} {reason}" for reason, number in stream.missing.items())
        console.note(
            f"{stream.name}: of {count(stream.num_records, 'photo')}" + f"; without: {missing}" * bool(missing)
        )
    for reason, number in Counter(report.quarantined).most_common(10):
        console.note(f"{count(number, 'photo')} quarantined: {reason}")
    if report.num_degraded:
        console.note(f"{count(report.num_degraded, 'shard')} degraded: there was not enough memory for whole batches")
    times = report.times
    if times.num_images:
        for line in _table(times):
            console.note(line)
    if times.psnr_db:
        values = times.psnr_db
        worst = min(values, key=values.__getitem__)
        mean = sum(values.values()) / len(values)
        console.note(
            f"audit of {count(len(values), 'photo')}: {mean:.2f} dB PSNR, lowest {values[worst]:.2f} dB ({worst})"
        )
    num_quarantined = sum(report.quarantined.values())
    quarantined = f", {num_quarantined} quarantined in {place}/quarantine.jsonl" if num_quarantined else ""
    others = f", {count(report.num_shards_left, 'shard')} left to others" if report.num_shards_left else ""
    nothing = "nothing left to do for this process" if report.num_shards_left else "nothing left to do"
    speed = f"{report.images_per_s:.2f} photos/s" if times.num_images else nothing
    console.result(
        f"{report.num_written} of {count(report.num_seen, 'photo')} stored in {place}{quarantined}{others}; {speed}",
        output=place,
        num_seen=report.num_seen,
        num_written=report.num_written,
        quarantined=report.quarantined,
        num_shards_left=report.num_shards_left,
        num_degraded=report.num_degraded,
        seconds=report.seconds if times.num_images else None,  # of a run that had nothing to do, time says nothing
        images_per_s=report.images_per_s if times.num_images else None,
        steps_s=times.steps() if times.num_images else None,
        slowest=times.slowest() if times.num_images else None,
        psnr_db=times.psnr_db,
        remarks=list(report.remarks),
        streams=[
            {"name": stream.name, "num_records": stream.num_records, "missing": stream.missing} for stream in streams
        ],
        changes=report.changes,
        vae=vae_name,
    )


def _table(times: "Times") -> list[str]:
    """Where the time went, and which step limited the speed."""
    shares = times.shares()
    rows = [f"{_STEPS[step]:>18} {seconds:8.1f} s {shares[step]:5.0%}" for step, seconds in times.steps().items()]
    who = f"{times.num_workers} processes" if times.num_workers > 1 else "one process"
    return [*rows, f"held up by: {_STEPS[times.slowest()]} ({who} decoded)"]
