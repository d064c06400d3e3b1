"""The `sdvae` command: its verbs, and how errors and signals become sentences and exit codes."""

import errno
import io
import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

import click

from sdvae import __version__
from sdvae.cli.anomaly import anomaly
from sdvae.cli.app import app
from sdvae.cli.arithmetic import arithmetic
from sdvae.cli.augment import augment
from sdvae.cli.bench import bench
from sdvae.cli.compact import compact
from sdvae.cli.compare import compare
from sdvae.cli.convert import convert
from sdvae.cli.decode import decode
from sdvae.cli.doctor import doctor
from sdvae.cli.encode import encode
from sdvae.cli.eval import evaluate
from sdvae.cli.export import export
from sdvae.cli.extract import extract
from sdvae.cli.identify import identify
from sdvae.cli.inspect import inspect
from sdvae.cli.interpolate import interpolate
from sdvae.cli.plan import plan
from sdvae.cli.report import report
from sdvae.cli.roundtrip import roundtrip
from sdvae.cli.sample import sample
from sdvae.cli.stats import stats
from sdvae.cli.swap import swap
from sdvae.cli.train import train
from sdvae.cli.verify import verify
from sdvae.errors import SdvaeError
from sdvae.printable import printable


class _Sdvae(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of use, not of the alphabet

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SdvaeError as error:
            self._fail(ctx, str(error), error.exit_code)
        except OSError as error:
            if error.errno in (None, errno.EPIPE):  # a closed pipe: click leaves quietly
                raise
            where = f" {error.filename}" if error.filename else ""
            self._fail(ctx, f"cannot use{where}: {error.strerror}", 1)
        except (RuntimeError, MemoryError) as error:
            if type(error).__name__ not in ("OutOfMemoryError", "MemoryError"):  # torch's, which is not imported here
                raise
            self._fail(ctx, "out of memory; try a smaller --batch-size or --size, or --device cpu", 1)

    def _fail(self, ctx: click.Context, message: str, exit_code: int) -> NoReturn:
        # What a message quotes of a stranger's file must not move the cursor.
        click.echo(f"sdvae: {printable(message)}", err=True)
        ctx.exit(exit_code)


@click.group(
    cls=_Sdvae,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
    epilog="Every option can also be set in the environment, for example SDVAE_DEVICE=cpu. "
    "Exit codes: 0 done, 1 error, 2 usage, 3 some photos or files left out, 4 an unsafe file refused, "
    "5 mismatch.",
)
@click.version_option(__version__, prog_name="sdvae", message="%(prog)s %(version)s")
def cli() -> None:
    """Turn photos into latents and back, with a KL-VAE in Stable Diffusion's format."""


_PICTURES = (encode, decode, verify, compact, stats, export, roundtrip, evaluate, report, app)
_SPACE = (sample, interpolate, arithmetic, anomaly, augment)
_WEIGHTS = (inspect, identify, compare, convert, extract, swap)
_TRAINING = (train,)
_ENGINE = (plan, bench)
for _verb in (*_PICTURES, *_SPACE, *_WEIGHTS, *_TRAINING, *_ENGINE, doctor):
    _verb.context_settings["auto_envvar_prefix"] = "SDVAE"  # one name for an option, whatever the verb
    cli.add_command(_verb)


class _Stopped(SystemExit):
    """Raised where the program is when a signal comes, so that open files are left through their `finally`."""


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    raise _Stopped(128 + signum)


def _open_streams() -> None:
    """Put /dev/null where standard streams are closed: else the next file that is opened would take their place."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)


def _use_utf8() -> None:
    """Start again in Python's UTF-8 mode where the locale has another encoding: a store's names and texts are UTF-8."""
    if sys.getfilesystemencoding() != "utf-8":
        os.execve(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]], os.environ | {"PYTHONUTF8": "1"})
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file may name what no encoding can spell


def main() -> NoReturn:
    """Run the command line as a process: SIGINT exits with 130 and SIGTERM with 143."""
    _open_streams()
    _use_utf8()
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    try:
        sys.exit(cli.main(prog_name="sdvae"))
    except _Stopped as stopped:
        name = signal.Signals(int(stopped.code or 0) - 128).name
        click.echo("; ".join([f"sdvae: stopped by {name}", *getattr(stopped, "__notes__", [])]), err=True)
        raise
