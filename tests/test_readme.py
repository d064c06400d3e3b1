"""README and docs are true: their Python runs, their commands exist, their numbers are those of the benchmarks."""

import json
import re
import shlex
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import sdvae
from sdvae.cli.main import cli
from sdvae.config import FAMILIES
from sdvae.errors import SdvaeError

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"]
PAGES += [f"docs/{name}.md" for name in ("cli", "python", "sources", "formats", "weights", "gpu", "report", "training")]
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
README = TEXT["README.md"]


def commands(text: str) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]


def sdvae_commands(text: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in commands(text) if line.startswith("sdvae ")]


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a clone with photos in it, where the examples run one after the other."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "sdvae").symlink_to(ROOT / "sdvae")
    (folder / "photos").mkdir()
    for name in ("photo.jpg", "photos/a.png", "photos/b.png"):
        noise = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
    return folder


def run(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_commands_of_the_readme_run_in_their_order(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clone)
    for name, value in {"SIZE": "64", "WORKERS": "0", "DEVICE": "cpu", "DTYPE": "fp32"}.items():
        monkeypatch.setenv(f"SDVAE_{name}", value)  # what the examples leave open
    verbs = [arguments[0] for arguments in sdvae_commands(README)]
    assert verbs == ["encode", "verify", "decode", "identify", "convert", "plan"]
    for arguments in sdvae_commands(README):
        run(arguments)
    assert sorted(path.name for path in (clone / "images").iterdir()) == ["a.png", "b.png"]
    assert (clone / "small-ldm.safetensors").is_file()


@pytest.mark.parametrize("place", range(len(python_blocks(README))))
def test_python_of_the_readme_runs(place: int, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clone)
    if not (clone / "latents").exists():
        run(["encode", "photos", "latents", "--size", "64", "--workers", "0", "--device", "cpu", "--dtype", "fp32"])
    block = python_blocks(README)[place]
    exec(compile(block, "README.md", "exec"), {})
    if "back.png" in block:
        with Image.open("back.png") as back:
            assert back.size == (130, 90)


@pytest.mark.parametrize("place", range(len(python_blocks(TEXT["docs/python.md"]))))
def test_python_of_the_docs_runs(place: int, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clone)
    exec(compile(python_blocks(TEXT["docs/python.md"])[place], "docs/python.md", "exec"), {})


def test_every_public_name_is_in_the_docs() -> None:
    documented = set(re.findall(r"`sdvae\.(\w+)", TEXT["docs/python.md"].split("\n## ")[0]))
    assert documented == set(sdvae.__all__)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses(page: str) -> None:
    for verb, *arguments in sdvae_commands(TEXT[page]):
        parent = click.Context(cli, **cli.context_settings)  # click keeps a command's help option: let it be ours
        cli.commands[verb].make_context(verb, arguments, parent=parent)  # raises on an option that does not exist


def test_every_verb_is_in_the_docs() -> None:
    assert {verb for verb, *_ in sdvae_commands(TEXT["docs/cli.md"])} == set(cli.commands)


@pytest.mark.parametrize(
    "page", [*PAGES, "docs/design.md", "docs/store.md", "docs/theory.md", "docs/evaluation.md", "CHANGELOG.md"]
)
def test_every_link_leads_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, section = target.partition("#")
        if file.startswith("https:"):
            continue
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        if section:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert section in [heading.lower().replace(" ", "-") for heading in headings], f"{page} links to {target}"


def test_scripts_of_the_readme_exist_and_say_what_they_are_for() -> None:
    scripts = [line for line in commands(README) if line.startswith("scripts/")]
    assert scripts == ["scripts/demo", "scripts/test"]
    for script in (ROOT / "scripts").iterdir():
        if script.is_file():
            first, second = script.read_text().splitlines()[:2]
            assert second.startswith(("# ", '"""')) or first.startswith('"""'), f"{script} does not say what it is for"


def test_picture_of_the_readme_is_small() -> None:
    (name,) = re.findall(r"!\[.+\]\((.+)\)", README)
    assert (ROOT / name).stat().st_size < 300_000


def test_families_of_the_docs_are_those_of_the_code() -> None:
    numbers = r"\| (\d+) channels, (\d+)x \| ([\d.]+) \| ([\d.]*) ?\| (yes|no) \| [^|]+ \| [^|]+ \|$"
    rows = re.findall(rf"^\| `([\w-]+)`[^|]* {numbers}", TEXT["docs/weights.md"], re.MULTILINE)
    for name, channels, downscale, scaling, shift, upcast in rows:
        config = FAMILIES[name]
        assert (config.latent_channels, config.downscale) == (int(channels), int(downscale))
        assert (config.scaling_factor, config.shift_factor) == (float(scaling), float(shift) if shift else None)
        assert config.force_upcast == (upcast == "yes")
    assert {row[0] for row in rows} == set(FAMILIES)


def test_quality_in_readme_docs_and_card_is_the_benchmarks() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "quality-kodak.json").read_text())
    card = (ROOT / "sdvae" / "assets" / "README.md").read_text(encoding="utf-8")
    for row, value in result["mean_psnr_db"].items():
        assert f"| {row} | {value:.2f} |" in card
    for page in ("README.md", "docs/weights.md"):
        assert f"{result['mean_psnr_db']['sdvae-small']:.1f} dB on the Kodak photos" in " ".join(TEXT[page].split())


def test_exit_codes_of_the_docs_are_those_of_the_errors() -> None:
    codes = {error.exit_code for error in [SdvaeError, *SdvaeError.__subclasses__()]}
    codes |= {child.exit_code for error in SdvaeError.__subclasses__() for child in error.__subclasses__()}
    assert codes == {1, 4, 5}
    for code in codes:
        assert re.search(rf"^\| {code} [a-z]", TEXT["docs/cli.md"], re.MULTILINE)
