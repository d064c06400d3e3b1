"""What the verbs share: options, the VAE they load, progress on stderr, results on stdout."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from sdvae.config import FAMILIES, PADDINGS, Padding
from sdvae.errors import BudgetError, SdvaeError

if TYPE_CHECKING:
    from tqdm import tqdm

    from sdvae.encoding.runners import Ranks
    from sdvae.vae import VAE
    from sdvae.weights.edit import Written

PATH = click.Path(path_type=Path)
OUTPUT = click.option("-o", "--output", type=PATH, required=True, metavar="FILE", help="The image file to write.")

_LOG = logging.getLogger("sdvae")
_MOST_NAMED = 10
_LINE_EACH_S = 30.0  # of progress, where there is no terminal
_COUNTED = {  # phase -> what it counts
    "scan": "photos", "encode": "photos", "judge": "photos", "probes": "VAEs", "score": "photos",
    "score clean photos": "photos", "measure the error": "photos", "verify": "records", "export": "records",
    "train": "steps",
}  # fmt: skip


class Console:
    """Where a verb prints: results on stdout, everything else on stderr."""

    def __init__(self, command: str, is_json: bool, is_quiet: bool, is_verbose: bool = False) -> None:
        self.command = command
        self.is_json = is_json
        self.is_quiet = is_quiet
        self.is_verbose = is_verbose

    def result(self, line: str, **values: Any) -> None:
        """The outcome: one line for a person, or `values` as one JSON object."""
        click.echo(json.dumps({"command": self.command} | values, allow_nan=False) if self.is_json else line)

    def note(self, message: str) -> None:
        """A remark on the outcome."""
        if not self.is_quiet:
            click.echo(f"sdvae: {message}", err=True)

    @contextmanager
    def progress(self) -> Iterator[Callable[[str, int, int], None]]:
        """A function of (phase, done, total) that shows photos per second and time left.

        On a terminal it draws one bar a phase; elsewhere, in a log, it writes a line each 30 s.
        """
        if self.is_quiet or not sys.stderr.isatty():
            yield self._progress_lines()
            return
        with ExitStack() as open_bars:
            bars: dict[str, tqdm[Any]] = {}

            def show(phase: str, done: int, total: int) -> None:
                if phase not in bars:
                    open_bars.close()
                    bars[phase] = open_bars.enter_context(self._bar(phase, done, total))
                bars[phase].update(done - bars[phase].n)

            yield show

    def _progress_lines(self) -> Callable[[str, int, int], None]:
        begun: dict[str, tuple[float, int]] = {}  # phase -> when it began, and what an earlier run had done by then
        told_s = time.monotonic()

        def show(phase: str, done: int, total: int) -> None:
            nonlocal told_s
            now = time.monotonic()
            start_s, done_before = begun.setdefault(phase, (now, done))
            if now - told_s >= _LINE_EACH_S and done > done_before:
                from tqdm import tqdm

                told_s = now
                per_s = (done - done_before) / (now - start_s)
                left = tqdm.format_interval((total - done) / per_s)
                self.note(f"{phase}: {done} of {total}, {per_s:.1f} {_counted(phase)}/s, {left} left")

        return show

    def _bar(self, phase: str, done: int, total: int) -> "tqdm[Any]":
        from tqdm import tqdm

        return tqdm(
            desc=phase,
            initial=done,  # what an earlier run did says nothing about the speed of this one
            total=total,
            file=sys.stderr,
            unit=f" {_counted(phase)}",
            dynamic_ncols=True,
            delay=0.1,
            bar_format="{desc} {percentage:3.0f}%|{bar:30}| {n_fmt} of {total_fmt}, {rate_noinv_fmt}, {remaining} left",
        )


def _counted(phase: str) -> str:
    return _COUNTED.get(phase, "images")


class _StderrHandler(logging.Handler):
    """Writes a log record as one line beside a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = "warning: " if record.levelno == logging.WARNING else ""
        tqdm.write(f"sdvae: {prefix}{self.format(record)}", file=sys.stderr)


@contextmanager
def _log_on_stderr(level: int) -> Iterator[None]:
    handler, before = _StderrHandler(), _LOG.level
    _LOG.addHandler(handler)
    _LOG.setLevel(level)
    try:
        yield
    except SdvaeError:
        _LOG.debug("the error occurred here", exc_info=True)
        raise
    finally:
        _LOG.setLevel(before)
        _LOG.removeHandler(handler)


def _parse_batch_size(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    if value == "auto":
        return None
    if not value.isdecimal() or int(value) == 0:
        raise click.BadParameter(f"{value!r} is neither auto nor a number of images above 0.")
    return int(value)


def parse_budget(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """The bytes of an option such as 6GiB."""
    if value is None:
        return None
    from sdvae.engine.memory import parse_bytes

    try:
        return parse_bytes(value)
    except BudgetError as error:
        raise click.BadParameter(f"{error}." if not str(error).endswith("?") else str(error)) from error


def _parse_sizes(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(_parse_size(value) for value in values)


def _parse_size(value: str) -> tuple[int, int]:  # "1024x768" -> (768, 1024)
    sides = value.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise click.BadParameter(f"{value!r} is not a size; write 512, or 1024x768 for width and height.")
    return int(sides[-1]), int(sides[0])


FAMILY = click.option(
    "--family",
    type=click.Choice(list(FAMILIES)),
    metavar="FAMILY",
    help=f"The family of the VAE, if its file does not tell it: {', '.join(FAMILIES)}.",
)
WEIGHTS_OUTPUT = click.option(
    "-o", "--output", type=PATH, required=True, metavar="OUT", help="The file or folder to write."
)
STORED_DTYPE = click.option(
    "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="The dtype to store the VAE in.  [default: unchanged]"
)
DRY_RUN = click.option(
    "--dry-run", is_flag=True, help="Check everything and report what would be written, but write nothing."
)
FORCE = click.option("--force", is_flag=True, help="Write over what OUT holds already.")
DEVICE = click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps.")
VAES = click.option(
    "--vae",
    "vaes",
    metavar="VAE",
    multiple=True,
    help="A folder, a VAE or checkpoint file, or a hub id; can be repeated.  [default: the embedded VAE]",
)


def dtype_option(default: str) -> Callable[..., Any]:
    """--dtype: what a network computes in."""
    return click.option(
        "--dtype",
        type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
        default=default,
        show_default=True,
        help="The dtype that the network computes in.",
    )


_VAE_OPTIONS = (
    click.option(
        "--vae", metavar="VAE", help="A folder, a VAE or checkpoint file, or a hub id.  [default: the embedded VAE]"
    ),
    FAMILY,
    click.option(
        "--padding",
        type=click.Choice(PADDINGS),
        help="What lies beyond the borders; circular joins them, also in x or y only.  [default: the VAE's, zeros]",
    ),
    DEVICE,
    dtype_option("auto"),
)
SPACE = click.option(
    "--space", metavar="NAME", help="The latent space that the latents and the VAE have, where it is not proved."
)
BATCH_SIZE = click.option(
    "--batch-size",
    metavar="auto|N",
    default="auto",
    show_default=True,
    callback=_parse_batch_size,
    help="Images in one batch.",
)
BUDGET = click.option(
    "--budget",
    metavar="BYTES",
    callback=parse_budget,
    help="Memory limit, weights not included: 6GiB, 800MiB.  [default: free memory]",
)
SIZES = click.option(
    "--size",
    "sizes",
    metavar="PX|WxH",
    multiple=True,
    default=("512",),
    show_default=True,
    callback=_parse_sizes,
    help="Pixels along each side, or width and height; can be repeated.",
)
SIDE = click.option(
    "--size", type=click.IntRange(min=1), metavar="PX", default=512, show_default=True, help="Pixels along each side."
)
SHORTER_SIDE = click.option(
    "--size",
    type=click.IntRange(min=1),
    metavar="PX",
    help="Pixels of the shorter side.  [default: 512; with --crop none the photo's own size]",
)
SEED = click.option(
    "--seed",
    type=click.IntRange(min=0),
    metavar="N",
    default=0,
    show_default=True,
    help="The same seed gives the same images.",
)
_CROP_OPTIONS = (
    SHORTER_SIDE,
    click.option(
        "--crop",
        type=click.Choice(["center", "none"]),
        default="center",
        show_default=True,
        help="center cuts a square; none keeps the whole photo.",
    ),
)
_CONSOLE_OPTIONS = (
    click.option("--json", is_flag=True, help="Print the result as one JSON object."),
    click.option("-q", "--quiet", is_flag=True, help="Print only errors on stderr."),
    click.option("-v", "--verbose", is_flag=True, help="Log what is done, and where an error occurred."),
)


def with_console(function: Callable[..., None]) -> Callable[..., None]:
    """Add --json, -q and -v to a verb, and hand it a `console`."""

    @wraps(function)
    def run(*, json: bool, quiet: bool, verbose: bool, **arguments: Any) -> None:
        command = click.get_current_context().info_name or ""
        with _log_on_stderr(logging.DEBUG if verbose else logging.ERROR if quiet else logging.WARNING):
            function(console=Console(command, json, quiet, verbose), **arguments)

    return _add(_CONSOLE_OPTIONS, run)


def with_crop(function: Callable[..., None]) -> Callable[..., None]:
    """Add --size and --crop to a verb, and hand it the `preprocess` that `encode` would have with them."""

    @wraps(function)
    def run(*, size: int | None, crop: Literal["center", "none"], **arguments: Any) -> None:
        from sdvae.store.geometry import Preprocess

        function(preprocess=Preprocess(size or (None if crop == "none" else 512), crop), **arguments)

    return _add(_CROP_OPTIONS, run)


def with_vae(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a VAE to a verb, and hand it `load_vae`, to be called when its input is known good.

    `load_vae(auto_dtype)` takes the dtype that "auto" stands for, so that work continues in the dtype it began in.
    """

    @wraps(function)
    def run(
        *, vae: str | None, family: str | None, padding: Padding | None, device: str, dtype: str, **arguments: Any
    ) -> None:
        def load_vae(auto_dtype: str = "auto") -> "VAE":
            from sdvae.vae import VAE

            loaded = VAE.load(vae, device, auto_dtype if dtype == "auto" else dtype, family, padding)
            _LOG.info("%s on %s in %s, fingerprint %s", loaded.name, loaded.device, loaded.dtype, loaded.fingerprint)
            return loaded

        function(load_vae=load_vae, **arguments)

    return _add(_VAE_OPTIONS, run)


def describe_vae(vae: "VAE") -> str:
    """What a run computes with, for its first lines."""
    padding = "" if vae.config.padding == "zeros" else f", padding {vae.config.padding}"
    return f"VAE: {vae.name}, {str(vae.dtype).removeprefix('torch.')} on {vae.device}{padding}"


def take_own_gpu(ranks: "Ranks") -> None:
    """Of several processes on a machine, each takes a GPU of its own."""
    import torch

    if ranks.local_world_size > 1 and torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())


def tell_left_out(console: Console, left_out: Mapping[str, str]) -> None:
    """Name the photos that were left out, and why; the exit code is then 3."""
    for key, reason in list(left_out.items())[:_MOST_NAMED]:
        console.note(f"left out: {key}: {reason}")
    if len(left_out) > _MOST_NAMED:
        console.note(f"left out: {len(left_out) - _MOST_NAMED:,} more")
    if left_out:
        click.get_current_context().exit(3)


def tell_written(console: Console, written: "Written", is_dry_run: bool) -> None:
    """Say what a verb wrote into a weights file, or would write."""
    would = "would have" if is_dry_run else "has"
    console.result(
        f"{written.output} {would} {written.num_tensors} tensors, {written.num_bytes / 1e6:.1f} MB; "
        f"{written.num_vae} are the VAE's, in {written.layout} layout, family {written.family or 'unknown'}",
        **asdict(written) | {"output": str(written.output), "is_dry_run": is_dry_run},
    )


def _add(options: tuple[Callable[..., Any], ...], function: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(options):
        function = option(function)
    return function
