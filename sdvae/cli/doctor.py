"""`sdvae doctor`: what is installed, what this machine can compute with, and what is broken."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Literal

import click

from sdvae import __version__
from sdvae.errors import SdvaeError

# What to import to know that a package works: diffusers imports lazily, so its own name proves nothing.
_PROBES = {
    "torch": "import torch",
    "diffusers": "from diffusers import AutoencoderKL",
    "accelerate": "import accelerate",
    "pillow": "from PIL import Image",
}
# Not needed by sdvae, but diffusers and torchmetrics import it where it is installed and fail where it is broken.
_NEIGHBOURS = {"torchvision": "import torchvision"}
_CODECS = {
    "jpg": "JPEG",
    "zlib": "PNG",
    "webp": "WebP",
    "avif": "AVIF",
    "jpg_2000": "JPEG 2000",
    "libtiff": "compressed TIFF",
    "littlecms2": "colour profiles",
}
_NEEDED_CODECS = {"jpg", "zlib"}


@dataclass(frozen=True)
class Finding:
    """One line of the table; `advice` says what to do where the status is not ok."""

    section: str
    name: str
    value: str
    status: Literal["ok", "warning", "broken"] = "ok"
    advice: str = ""


@click.command(short_help="Check this installation.")
@click.option("--json", "is_json", is_flag=True, help="Print the findings as one JSON object.")
def doctor(is_json: bool) -> None:
    """Check this installation: versions, devices, the dtype that will be chosen, broken packages.

    Exits with 1 when something is broken.
    """
    findings = list(examine())
    is_healthy = all(finding.status != "broken" for finding in findings)
    if is_json:
        values = [asdict(finding) for finding in findings]
        click.echo(json.dumps({"command": "doctor", "is_healthy": is_healthy, "findings": values}))
    else:
        _print_table(findings)
    if not is_healthy:
        click.get_current_context().exit(1)


def examine() -> Iterator[Finding]:
    """Every finding, in the order of the table."""
    yield Finding("system", "python", f"{platform.python_version()} on {platform.platform()}")
    yield Finding("system", "sdvae", __version__)
    packages = list(_check_packages())
    yield from packages
    broken = {finding.name for finding in packages if finding.status == "broken"}
    if "torch" not in broken:
        yield from _check_devices()
    if not broken & {"torch", "numpy", "safetensors"}:
        yield from _check_embedded_vae()
    if "pillow" not in broken:
        yield from _check_codecs()


def _check_packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    requirements = [Requirement(line) for line in importlib.metadata.requires("sdvae") or []]
    ranges = {item.name: item.specifier for item in requirements if item.marker is None}
    probes = {name: _PROBES.get(name, f"import {name.replace('-', '_')}") for name in ranges} | _NEIGHBOURS
    found = {name: probe for name, probe in probes.items() if name in ranges or importlib.util.find_spec(name)}
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        failures = dict(zip(found, pool.map(_failure, found.values()), strict=True))
    for name, failure in failures.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed" if name in ranges else "unknown version"
        if failure:
            others = "uninstall it, or install" if name in _NEIGHBOURS else "install"
            advice = f"{failure}; {others} the build that belongs to this Python and this torch"
            yield Finding("packages", name, version, "broken", advice)
        elif name in ranges and not ranges[name].contains(version, prereleases=True):
            yield Finding("packages", name, version, "broken", f"sdvae needs {name}{ranges[name]}")
        else:
            yield Finding("packages", name, version)


def _failure(statement: str) -> str:
    """What an import says when it fails, or nothing; in a process of its own, since a broken library may crash it."""
    # -P: a folder named torch in the current directory is not the installation
    command = [sys.executable, "-P", "-c", statement]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines()
    return lines[-1].rstrip(".") if lines else f"the import ended with code {done.returncode}"


def _check_devices() -> Iterator[Finding]:
    import torch

    from sdvae.engine.precision import choose_device, choose_dtype

    threads = torch.get_num_threads()
    yield Finding("devices", "cpu", f"{threads} threads, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory_gib = properties.total_memory / 2**30
        capability = f"compute capability {properties.major}.{properties.minor}"
        yield Finding("devices", f"cuda:{index}", f"{properties.name}, {memory_gib:.0f} GiB, {capability}")
        yield _check_kernels(index)
    if torch.backends.mps.is_available():
        yield Finding("devices", "mps", "Apple GPU")
    device = choose_device("auto")
    choice = choose_dtype("auto", device)
    dtype = str(choice.dtype).removeprefix("torch.")
    yield Finding("devices", "chosen", f"{device} in {dtype}: {choice.reason}")


def _check_kernels(index: int) -> Finding:
    """The kernels of a GPU on a small decode, in a process of their own: an illegal address would end this one."""
    command = [sys.executable, "-P", "-m", "sdvae.engine.selfcheck", str(index)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    name = f"kernels of cuda:{index}"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        return Finding("devices", name, "the self-check fails", "broken", lines[-1])
    fault = json.loads(done.stdout)
    if fault is None:
        return Finding("devices", name, "Triton's, which decode as torch's operations do")
    return Finding("devices", name, "torch's operations, several times slower", "warning", fault)


def _check_embedded_vae() -> Iterator[Finding]:
    from sdvae.vae import VAE

    try:
        vae = VAE.load(device="cpu", dtype="fp32")
    except SdvaeError as error:
        yield Finding("weights", "embedded VAE", "not usable", "broken", str(error))
    else:
        yield Finding("weights", "embedded VAE", f"fingerprint {vae.fingerprint[:16]}")


def _check_codecs() -> Iterator[Finding]:
    from PIL import features

    for codec, name in _CODECS.items():
        if features.check(codec):
            yield Finding("images", name, features.version(codec) or "")
        elif codec in _NEEDED_CODECS:
            yield Finding("images", name, "missing", "broken", "install a pillow wheel: pip install --upgrade pillow")
        else:
            what = "colour profiles are ignored" if codec == "littlecms2" else "such photos are quarantined"
            yield Finding("images", name, "missing", "warning", f"{what}; the wheels of pillow include it")


def _print_table(findings: list[Finding]) -> None:
    marks = {"ok": " ", "warning": "!", "broken": "x"}
    colours = {"ok": None, "warning": "yellow", "broken": "red"}
    width = max(len(finding.name) for finding in findings)
    section = None
    for finding in findings:
        if finding.section != section:
            section = finding.section
            click.secho(section, bold=True)
        line = f"{marks[finding.status]} {finding.name:<{width}}  {finding.value}"
        click.secho(line, fg=colours[finding.status])
        if finding.advice:
            click.echo(f"  {'':<{width}}  {finding.advice}")
    problems = sum(finding.status == "broken" for finding in findings)
    click.echo(f"\n{problems} broken" if problems else "\nall well")
