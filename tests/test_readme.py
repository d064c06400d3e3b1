"""The README says what is so: its Python runs, its commands exist, its numbers are those of the benchmarks."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdvae.cli.main import cli
from sdvae.config import FAMILIES
from sdvae.errors import SdvaeError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("block", PYTHON)
def test_python_blocks_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    Image.fromarray(noise).save("photo.jpg")
    exec(compile(block, "README.md", "exec"), {})
    if "back.png" in block:
        with Image.open("back.png") as back:
            assert back.size == (130, 90)


def test_every_command_of_the_readme_parses_and_every_verb_is_in_it() -> None:
    lines = [shlex.split(line) for line in SHELL if line.startswith("sdvae ")]
    for _, verb, *arguments in lines:
        cli.commands[verb].make_context(verb, arguments)  # raises on an option that does not exist
    assert {line[1] for line in lines} == set(cli.commands)


def test_scripts_of_the_readme_exist_and_say_what_they_are_for() -> None:
    scripts = [line for line in SHELL if line.startswith("scripts/")]
    assert scripts == ["scripts/demo", "scripts/test"]
    for script in (ROOT / "scripts").iterdir():
        if script.is_file():
            first, second = script.read_text().splitlines()[:2]
            assert second.startswith(("# ", '"""')) or first.startswith('"""'), f"{script} does not say what it is for"


def test_families_of_the_readme_are_those_of_the_code() -> None:
    numbers = r"\| (\d+) channels, (\d+)x \| ([\d.]+) \| ([\d.]*) ?\| (yes|no) \| [^|]+ \| [^|]+ \|$"
    rows = re.findall(rf"^\| `([\w-]+)`[^|]* {numbers}", README, re.MULTILINE)
    for name, channels, downscale, scaling, shift, upcast in rows:
        config = FAMILIES[name]
        assert (config.latent_channels, config.downscale) == (int(channels), int(downscale))
        assert (config.scaling_factor, config.shift_factor) == (float(scaling), float(shift) if shift else None)
        assert config.force_upcast == (upcast == "yes")
    assert {row[0] for row in rows} == set(FAMILIES)


def test_quality_in_the_readme_is_the_benchmarks() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "quality-kodak.json").read_text())
    for row, value in result["mean_psnr_db"].items():
        assert f"| {row} | {value:.2f} |" in README
    assert f"{result['mean_psnr_db']['sdvae-small']:.1f} dB on the Kodak photos" in " ".join(README.split())


def test_exit_codes_of_the_readme_are_those_of_the_errors() -> None:
    codes = {error.exit_code for error in [SdvaeError, *SdvaeError.__subclasses__()]}
    codes |= {child.exit_code for error in SdvaeError.__subclasses__() for child in error.__subclasses__()}
    assert codes == {1, 4, 5}
    for code in codes:
        assert re.search(rf"\b{code} [a-z]", README)
