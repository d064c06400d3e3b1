"""What each verb says to input it cannot use: one sentence, the right exit code, and nothing touched."""

import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from sdvae import VAE
from sdvae.cli.main import cli


@dataclass
class Place:
    """A folder with good input in it: photos/, a store, latents, a VAE; to be spoiled by one thing."""

    root: Path

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def snapshot(self) -> dict[str, bytes | None]:
        return {
            path.relative_to(self.root).as_posix(): path.read_bytes() if path.is_file() else None
            for path in self.root.rglob("*")
        }

    def command(self, verb: str) -> list[str]:
        """A command that would succeed, writing to `out` or `out.png`."""
        arguments = {
            "encode": ["photos", "out", "--size", "16"],
            "decode": ["latents", "out", "--latents", "raw"],
            "decode store": ["store", "out"],
            "roundtrip": ["photos/a.png", "-o", "out.png"],
            "sample": ["-n", "1", "-o", "out.png", "--size", "16"],
            "interpolate": ["photos/a.png", "photos/b.png", "-o", "out.png", "--size", "16", "--steps", "2"],
            "arithmetic": ["photos/a.png", "photos/b.png", "photos/a.png", "-o", "out.png", "--size", "16"],
            "anomaly": ["photos", "-o", "out.png", "--size", "16"],
            "augment": ["photos", "out", "--size", "16"],
        }[verb]
        vae = ["--vae", "vae", "--device", "cpu", "--dtype", "fp32"]
        return [verb.split()[0], *arguments, *vae]

    def run(self, *command: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(cli, command, prog_name="sdvae")
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout, result.stderr

    def refuses(self, *command: str, exit_code: int = 1, says: str) -> None:
        """Check the sentence, the exit code, and that every file is as it was."""
        before = self.snapshot()
        code, stdout, stderr = self.run(*command)
        assert code == exit_code, stderr
        assert stdout == ""
        sentence = without_announcement(stderr)
        assert sentence.startswith("sdvae: "), stderr
        assert sentence.endswith("\n")
        assert sentence.count("\n") == 1, stderr
        assert says in sentence
        assert "Traceback" not in stderr
        assert self.snapshot() == before


def without_announcement(stderr: str) -> str:
    """Without the lines by which `encode` and `decode` say what they are about to do."""
    lines = stderr.splitlines(keepends=True)
    return "".join(
        line for line in lines if not line.startswith(("sdvae: encoding ", "sdvae: decoding ", "sdvae: VAE: "))
    )


TO_FOLDERS = ["encode", "decode", "decode store", "augment"]
TO_PICTURES = ["roundtrip", "sample", "interpolate", "arithmetic", "anomaly"]
WRITING = [*TO_FOLDERS, *TO_PICTURES]


@pytest.fixture(scope="module")
def good(small_vae: VAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    (root / "photos").mkdir()
    for seed, name in enumerate(("a.png", "b.png")):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 24, 3), np.uint8)).save(
            root / "photos" / name
        )
    (root / "latents").mkdir()
    np.save(root / "latents" / "z.npy", np.zeros((1, 4, 2, 2), np.float32))
    (root / "notes.txt").write_text("a text file\n" * 40)
    (root / "empty").mkdir()
    small_vae.save(root / "vae")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        place = Place(root)
        for command in (["encode", "photos", "store", *place.command("encode")[3:]], *map(place.command, WRITING)):
            code, _, stderr = place.run(*command)
            assert code == 0, stderr  # the commands that each test spoils in one respect do work
            shutil.rmtree(root / "out", ignore_errors=True)
            (root / "out.png").unlink(missing_ok=True)
    return root


@pytest.fixture
def place(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    shutil.copytree(good, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return Place(tmp_path / "work")


def replaced(command: list[str], old: str, new: str) -> list[str]:
    assert old in command
    return [new if argument == old else argument for argument in command]


# --- Sources ---


@pytest.mark.parametrize(
    ("verb", "source", "says"),
    [
        ("encode", "photos", "there is no gone"),
        ("decode", "latents", "gone does not exist"),
        ("roundtrip", "photos/a.png", "gone: cannot be read: No such file"),
        ("interpolate", "photos/a.png", "gone: cannot be read: No such file"),
        ("interpolate", "photos/b.png", "gone: cannot be read: No such file"),
        ("arithmetic", "photos/b.png", "gone: cannot be read: No such file"),
        ("anomaly", "photos", "there is no gone"),
        ("augment", "photos", "there is no gone"),
    ],
)
def test_a_missing_source(place: Place, verb: str, source: str, says: str) -> None:
    place.refuses(*replaced(place.command(verb), source, "gone"), says=says)


@pytest.mark.parametrize(
    ("verb", "source", "says"),
    [
        ("encode", "photos", "empty holds no photos"),
        ("decode", "latents", "empty holds no latents"),
        ("arithmetic", "photos/b.png", "empty holds no photos"),
        ("anomaly", "photos", "empty holds no photos"),
        ("augment", "photos", "empty holds no photos"),
    ],
)
def test_an_empty_folder(place: Place, verb: str, source: str, says: str) -> None:
    place.refuses(*replaced(place.command(verb), source, "empty"), says=says)


@pytest.mark.parametrize(
    ("verb", "source", "says"),
    [
        ("encode", "photos", "notes.txt is neither a folder"),
        ("decode", "latents", "notes.txt is not a latents file"),
        ("roundtrip", "photos/a.png", "notes.txt: not an image"),
        ("interpolate", "photos/b.png", "notes.txt: not an image"),
    ],
)
def test_a_text_file_as_source(place: Place, verb: str, source: str, says: str) -> None:
    place.refuses(*replaced(place.command(verb), source, "notes.txt"), says=says)


@pytest.mark.parametrize("verb", ["roundtrip", "interpolate"])
def test_a_folder_as_photo(place: Place, verb: str) -> None:
    place.refuses(*replaced(place.command(verb), "photos/a.png", "photos"), says="photos")


@pytest.mark.parametrize("verb", ["encode", "decode"])
def test_a_source_that_is_the_output(place: Place, verb: str) -> None:
    source = {"encode": "photos", "decode": "latents"}[verb]
    place.refuses(*replaced(place.command(verb), "out", source), says=source)


def test_latents_with_five_channels(place: Place) -> None:
    np.save(place / "latents" / "z.npy", np.zeros((1, 5, 2, 2), np.float32))
    place.refuses(*place.command("decode"), says="has 5 channels (1, 5, 2, 2), but this VAE's latents have 4")


def test_latents_that_are_nan(place: Place) -> None:
    np.save(place / "latents" / "later.npy", np.full((2, 4, 2, 2), np.nan, np.float32))
    code, _, stderr = place.run(*place.command("decode"))
    assert code == 3 and "later.npy holds NaN or infinite latents (image 0 of 2)" in stderr
    assert [path.suffix for path in (place / "out").iterdir()] == [".png"], "the others are decoded"


def test_latents_of_unknown_scale(place: Place) -> None:
    command = [argument for argument in place.command("decode") if argument not in ("--latents", "raw")]
    place.refuses(*command, says="add --latents scaled")


def test_latents_that_run_code(place: Place) -> None:
    (place / "latents" / "evil.pt").write_bytes(pickle.dumps(os.getcwd, 2))
    place.refuses(
        *place.command("decode"),
        exit_code=4,
        says="evil.pt is refused: it asks for 'posix'.'getcwd', which could run code",
    )


def test_a_store_whose_manifest_was_altered(place: Place) -> None:
    manifest = place / "store" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"size_px":16', b'"size_px":17'))
    place.refuses(*place.command("decode store"), exit_code=5, says="manifest.json is damaged")


def test_a_store_whose_shard_was_cut(place: Place) -> None:
    (shard,) = (place / "store" / "shards").iterdir()
    shard.write_bytes(shard.read_bytes()[:-1])
    place.refuses(*place.command("decode store"), exit_code=5, says=shard.name)


def test_a_store_with_other_settings_is_not_continued(place: Place) -> None:
    command = replaced(place.command("encode"), "out", "store")
    place.refuses(*replaced(command, "16", "24"), says="preprocess.size_px was 16, now 24")


# --- Weights ---


@pytest.mark.parametrize("verb", WRITING)
def test_a_text_file_as_weights(place: Place, verb: str) -> None:
    shutil.copy(place / "notes.txt", place / "vae" / "diffusion_pytorch_model.safetensors")
    place.refuses(*place.command(verb), says="is a text file, not safetensors weights")


@pytest.mark.parametrize("verb", WRITING)
def test_weights_that_run_code(place: Place, verb: str) -> None:
    torch.save({}, place / "vae" / "diffusion_pytorch_model.safetensors")
    place.refuses(*place.command(verb), exit_code=4, says="is a pickle, which can run code")


@pytest.mark.parametrize("vae", ["gone", "./gone/vae", "empty"])
def test_no_weights(place: Place, vae: str) -> None:
    place.refuses(*replaced(place.command("sample"), "vae", vae), says=vae.removeprefix("./"))


@pytest.mark.parametrize("device", ["cuda:99", "toaster"])
def test_a_device_that_is_not_there(place: Place, device: str) -> None:
    place.refuses(*replaced(place.command("sample"), "cpu", device), says=device)


# --- Outputs ---


@pytest.mark.parametrize("verb", WRITING)
def test_an_output_below_a_file(place: Place, verb: str) -> None:
    old = "out.png" if verb in TO_PICTURES else "out"
    place.refuses(*replaced(place.command(verb), old, f"notes.txt/{old}"), says="notes.txt")


@pytest.mark.parametrize("verb", WRITING)
def test_a_read_only_output(open_place: Place, verb: str) -> None:
    old = "out.png" if verb in TO_PICTURES else "out"
    (open_place / "locked").mkdir(mode=0o555)
    with without_privileges():
        command = replaced(open_place.command(verb), old, f"locked/{old}")
        open_place.refuses(*command, says="Permission denied")


@pytest.mark.parametrize("verb", ["encode", "decode"])
def test_a_source_that_may_not_be_read(open_place: Place, verb: str) -> None:
    source = {"encode": "photos", "decode": "latents"}[verb]
    (open_place / source).chmod(0)
    with without_privileges():
        code, _, stderr = open_place.run(*open_place.command(verb))
    assert code == 1
    assert stderr.startswith("sdvae: ")
    assert without_announcement(stderr).count("\n") == 1
    assert source in stderr


@pytest.fixture
def open_place(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A place that nobody may read: pytest's own folders are for their owner only."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve() / "work"
        shutil.copytree(place.root, root)
        for folder in (root.parent, root, *root.rglob("*")):
            folder.chmod(0o755 if folder.is_dir() else 0o644)
        monkeypatch.chdir(root)
        yield Place(root)
        monkeypatch.chdir("/")


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root may write anywhere, so it becomes nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("verb", TO_FOLDERS)
@pytest.mark.parametrize("name", ["thesis.txt", "sub/thesis.txt"])
def test_an_output_folder_that_holds_something_else(place: Place, verb: str, name: str) -> None:
    (place / "out" / name).parent.mkdir(parents=True)
    (place / "out" / name).write_text("years of work")
    place.refuses(*place.command(verb), says=name.split("/")[0])


@pytest.mark.parametrize("verb", TO_FOLDERS)
@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "desktop.ini"])
def test_what_desktops_leave_in_an_output_folder_stays_there(place: Place, verb: str, name: str) -> None:
    (place / "out").mkdir()
    (place / "out" / name).write_text("a desktop's")
    code, _, stderr = place.run(*place.command(verb))
    assert (code, (place / "out" / name).read_text()) == (0, "a desktop's"), stderr


@pytest.mark.parametrize("verb", TO_FOLDERS)
def test_an_output_folder_that_is_a_file(place: Place, verb: str) -> None:
    (place / "out").write_text("years of work")
    place.refuses(*place.command(verb), says="out is")


def test_restart_removes_a_store_and_nothing_else(place: Place) -> None:
    (place / "store" / "thesis.txt").write_text("years of work")
    command = replaced(place.command("encode"), "out", "store")
    place.refuses(*command, "--restart", "--yes", says="thesis.txt")


@pytest.mark.parametrize("verb", TO_PICTURES)
def test_an_output_picture_that_is_a_folder(place: Place, verb: str) -> None:
    (place / "out.png").mkdir()
    place.refuses(*place.command(verb), says="cannot write out.png: it is a folder")


@pytest.mark.parametrize("verb", TO_PICTURES)
def test_an_output_picture_in_a_folder_that_is_not_there(place: Place, verb: str) -> None:
    command = replaced(place.command(verb), "out.png", "gone/out.png")
    place.refuses(*command, says="cannot write gone/out.png: there is no folder gone")


@pytest.mark.parametrize("verb", ["roundtrip", "interpolate"])
def test_an_output_picture_that_is_the_input(place: Place, verb: str) -> None:
    (place / "link.png").symlink_to(place / "photos" / "a.png")
    for name in ("photos/a.png", "photos/../photos/a.png", "link.png"):
        place.refuses(*replaced(place.command(verb), "out.png", name), says="is the input, too")


# --- Memory and usage ---


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), MemoryError()])
def test_too_little_memory(place: Place, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def decode(self: VAE, latents: torch.Tensor, budget: object) -> torch.Tensor:
        raise error

    monkeypatch.setattr(VAE, "decode", decode)
    place.refuses(*place.command("sample"), says="out of memory; try a smaller --batch-size or --size")


def test_an_error_of_ours_is_no_sentence(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(self: VAE, latents: torch.Tensor, budget: object) -> torch.Tensor:
        raise RuntimeError("a bug")

    monkeypatch.setattr(VAE, "decode", decode)
    with pytest.raises(RuntimeError, match="a bug"):
        CliRunner().invoke(cli, place.command("sample"), catch_exceptions=False)


def test_verbose_tells_where_an_error_arose(place: Place) -> None:
    code, _, stderr = place.run(*replaced(place.command("decode"), "latents", "gone"), "-v")
    assert code == 1
    assert "latent_files.py" in stderr
    assert "gone does not exist" in stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda command: command[: 1 if command[0] == "anomaly" else 2],  # a source is all that one needs
        lambda command: [*command, "--no-such-option"],
        lambda command: [*command, "--dtype", "fp8"],
        lambda command: ["no-such-verb", *command[1:]],
    ],
    ids=["missing argument", "unknown option", "unknown dtype", "unknown verb"],
)
@pytest.mark.parametrize("verb", WRITING)
def test_wrong_usage_is_2(place: Place, verb: str, spoil: Callable[[list[str]], list[str]]) -> None:
    before = place.snapshot()
    code, stdout, stderr = place.run(*spoil(place.command(verb)))
    assert code == 2
    assert stdout == ""
    assert "Error: " in stderr.splitlines()[-1]
    assert place.snapshot() == before


@pytest.mark.parametrize(
    "options", ["--batch-size 0", "--batch-size many", "--size 0", "--shard-rows 0", "--crop left"]
)
def test_values_out_of_range_are_2(place: Place, options: str) -> None:
    code, _, stderr = place.run(*place.command("encode"), *options.split())
    assert code == 2
    assert options.split()[0] in stderr


@pytest.mark.parametrize("verb", TO_PICTURES)
@pytest.mark.parametrize("name", ["out.txt", "out", "out.tiff"])
def test_a_picture_of_unknown_format_is_2(place: Place, verb: str, name: str) -> None:
    before = place.snapshot()
    code, _, stderr = place.run(*replaced(place.command(verb), "out.png", name))
    assert code == 2
    assert f"{name} must end with one of .png .jpg" in stderr
    assert place.snapshot() == before
