"""The command line where the world is bare: closed streams, a reader that went away, a locale that is not UTF-8."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SDVAE = [sys.executable, "-m", "sdvae"]


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    folder = tmp_path / "latents"
    folder.mkdir()
    np.save(folder / "狐 é.npy", np.zeros((1, 4, 2, 2), np.float32))
    return folder


def decode(latents: Path, **options: object) -> "subprocess.CompletedProcess[bytes]":
    command = [
        *SDVAE,
        "decode",
        latents,
        latents.parent / "out",
        "--latents",
        "raw",
        "--device",
        "cpu",
        "--dtype",
        "fp32",
    ]
    return subprocess.run(command, capture_output="stdout" not in options, timeout=300, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_closed_streams_harm_nothing(latents: Path, closed: tuple[int, ...]) -> None:
    def close() -> None:
        for number in closed:
            os.close(number)

    done = decode(latents, preexec_fn=close)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    with Image.open(latents.parent / "out" / "狐 é.png") as image:
        image.load()
    assert bool(done.stdout) == (1 not in closed)


def test_a_reader_that_went_away_is_no_traceback(latents: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = decode(latents, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr


def test_names_are_utf8_in_any_locale(latents: Path) -> None:
    bare = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHONUTF8"))}
    done = decode(latents, env=bare | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"})
    assert done.returncode == 0, done.stderr
    assert [os.fsencode(path.name) for path in (latents.parent / "out").iterdir()] == ["狐 é.png".encode()]
