import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from sdvae import VAE, __version__
from sdvae.cli import doctor as doctor_module
from sdvae.cli.doctor import Finding
from sdvae.cli.grouped import Grouped
from sdvae.cli.main import cli
from sdvae.cli.shared import Console
from sdvae.encoding.resize import choose_resizer

Run = Callable[..., Result]
VERBS = [
    "encode", "decode", "verify", "compact", "stats", "export", "roundtrip", "eval", "report", "app",
    "sample", "interpolate", "arithmetic", "anomaly", "augment", "inspect", "identify", "compare",
    "convert", "extract", "swap", "train", "plan", "bench", "doctor",
]  # fmt: skip


@pytest.fixture(scope="module")
def vae_folder(small_vae: VAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    small_vae.save(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for seed, (name, size) in enumerate({"a.png": (60, 44), "b.png": (40, 52), "c.jpg": (48, 48)}.items()):
        small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def run(vae_folder: Path) -> Run:
    """Run a verb with the small VAE, which the environment names."""
    environment = {"SDVAE_VAE": str(vae_folder), "SDVAE_DEVICE": "cpu", "SDVAE_DTYPE": "fp32"}

    def run_cli(*arguments: object) -> Result:
        return CliRunner(env=environment).invoke(cli, [str(argument) for argument in arguments], prog_name="sdvae")

    return run_cli


def process(*arguments: object, **environment: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "sdvae", *map(str, arguments)]
    # One thread: many small processes on few cores would wait for each other.
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# --- The command itself ---


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from sdvae.cli.main import cli; cli(['--help'], standalone_mode=False);"
        "heavy = {'torch', 'numpy', 'PIL', 'diffusers', 'safetensors', 'tqdm', 'huggingface_hub'} & set(sys.modules);"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = done.stdout.partition("Commands:")[2].partition("\n\n")[0]
    assert re.findall(r"^  ([a-z]+) ", commands, re.MULTILINE) == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_explains_itself(run: Run, verb: str) -> None:
    result = run(verb, "-h")
    assert result.exit_code == 0
    assert f"Usage: sdvae {verb}" in result.stdout


GROUPED = [name for name, verb in cli.commands.items() if isinstance(verb, Grouped)]


@pytest.mark.parametrize("verb", GROUPED)
def test_long_helps_are_in_groups_with_examples_that_parse(run: Run, verb: str) -> None:
    command = cli.commands[verb]
    shown = run(verb, "--help").stdout
    titles = re.findall(r"^(\S.*):$", shown, re.MULTILINE)
    assert titles[-3:] == ["The VAE, and where it runs", "Output", "Examples"] and len(titles) >= 4
    options = [param for param in command.params if isinstance(param, click.Option)]
    listed = re.findall(
        r"^  (?:-\w, )?(--[\w-]+)", shown[shown.index(f"\n{titles[0]}:") :].partition("Examples:")[0], re.MULTILINE
    )
    assert sorted(listed) == sorted([option.opts[-1] for option in options] + ["--help"])
    assert max(map(len, shown.splitlines())) <= 80
    for example in command.examples:  # type: ignore[attr-defined]
        words = shlex.split(example.partition("sdvae ")[2], comments=True)
        assert words[0] == verb
        parent = click.Context(cli, **cli.context_settings)
        command.make_context(verb, words[1:], parent=parent)


def test_no_summary_is_cut_off(run: Run) -> None:
    assert not re.search(r"^  .*\.\.\.$", run("-h").stdout, re.MULTILINE)


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"sdvae {__version__}\n"
    with process("--version") as as_module:
        assert as_module.communicate()[0] == f"sdvae {__version__}\n"


def test_options_are_the_documented_ones() -> None:
    console = "--json -q --quiet -v --verbose"
    shared = f"--vae --family --device --dtype {console}"
    runs = f"{shared} --padding"
    rewriting = f"{console} -o --output --family --dry-run --force"
    own = {
        "encode": f"{runs} --size --crop --seed --buckets --flip --max-upscale --min-size --resample --decoder "
        "--resizer --jpeg-draft --shard-rows --store-dtype --resume --restart --yes --workers --on-oom --audit "
        "--runner --address --batch-size --budget --limit --keep-vanished --dry-run --caption --with",
        "decode": f"{runs} --format --latents --space --no-metadata --batch-size --budget",
        "verify": f"{runs} --repair --source",
        "compact": f"{console} -o --output",
        "stats": console,
        "export": f"{console} --to -o --output --seed",
        "roundtrip": f"{runs} -o --output --size --no-metadata --budget",
        "sample": f"{runs} -n --num -o --output --from --components --size --seed --space --no-metadata --budget",
        "interpolate": f"{runs} -o --output --steps --mode --size --no-metadata --budget",
        "arithmetic": f"{runs} -o --output --strength --size --no-metadata --budget",
        "anomaly": f"{runs} -o --output --clean --by --quantile --samples --seed --scores --size --crop --no-metadata "
        "--batch-size --budget",
        "augment": f"{runs} --copies --strength --seed --size --crop --batch-size --budget",
        "eval": f"{shared} -o --output --recipe --metrics --vary --explain-difference --limit --batch-size --budget",
        "report": f"{runs} -o --output --space",
        "app": f"{console} --vae --device --port --open",
        "inspect": f"{console} --family --tensors",
        "identify": console,
        "compare": console,
        "convert": f"{rewriting} --layout --dtype",
        "extract": rewriting,
        "swap": f"{rewriting} --vae --dtype",
        "train": f"{console} --set -o --output --device",
        "plan": f"{shared} --size --budget",
        "bench": f"{shared} --size --direction --rounds --batch-size --alone --output",
        "doctor": "--json",
    }
    expected = {name: set(options.split()) for name, options in own.items()}
    found = {
        name: {option for param in command.params if isinstance(param, click.Option)
               for option in (*param.opts, *param.secondary_opts)}
        for name, command in cli.commands.items()
    }  # fmt: skip
    assert found == expected


@pytest.mark.parametrize("spelling", [["--batch-size", "2"], ["--batch_size", "2"], ["--batch_size=auto"]])
def test_options_take_underscores(run: Run, photos: Path, tmp_path: Path, spelling: list[str]) -> None:
    result = run("encode", photos, tmp_path / "store", "--size", 32, *spelling)
    assert result.exit_code == 0, result.stderr


def test_the_environment_sets_options_and_the_command_line_wins(run: Run, photos: Path, tmp_path: Path) -> None:
    picture = tmp_path / "x.png"
    environment = {"SDVAE_STEPS": "3", "SDVAE_SIZE": "16", "SDVAE_JSON": "1"}
    arguments = ["interpolate", photos / "a.png", photos / "b.png", "-o", picture]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        assert json.loads(run(*arguments).stdout)["steps"] == 3
        assert json.loads(run(*arguments, "--steps", 2).stdout)["steps"] == 2


# --- Verbs ---


def test_encode_and_decode(run: Run, photos: Path, tmp_path: Path) -> None:
    encoded = run("encode", photos, tmp_path / "store", "--crop", "none")
    assert encoded.exit_code == 0, encoded.stderr
    assert encoded.stdout.startswith(f"3 of 3 photos stored in {tmp_path / 'store'}; ")
    decoded = run("decode", tmp_path / "store", tmp_path / "out", "--format", "webp")
    assert decoded.exit_code == 0, decoded.stderr
    assert decoded.stdout.startswith(f"3 images written to {tmp_path / 'out'}, ")
    sizes = {}
    for path in (tmp_path / "out").iterdir():
        with Image.open(path) as image:
            sizes[path.name] = image.size
    assert sizes == {"a.webp": (60, 44), "b.webp": (40, 52), "c.webp": (48, 48)}


def test_json_is_one_object_on_stdout_and_quiet_is_quiet(
    run: Run, photos: Path, tmp_path: Path, vae_folder: Path
) -> None:
    out = tmp_path / "store"
    encoded = run("encode", photos, out, "--size", 32, "--json", "-q")
    assert encoded.stderr == ""
    values = json.loads(encoded.stdout)
    assert values.keys() == {
        "command", "output", "num_seen", "num_written", "quarantined", "num_shards_left",
        "num_degraded", "seconds", "images_per_s", "steps_s", "slowest", "psnr_db", "remarks",
        "streams", "changes", "vae",
    }  # fmt: skip
    assert (values["command"], values["num_seen"], values["num_written"]) == ("encode", 3, 3)
    assert values["quarantined"] == {}
    assert values["vae"] == str(vae_folder)
    told = run("decode", out, tmp_path / "out").stderr
    assert told.splitlines() == [
        f"sdvae: decoding {out} into {tmp_path / 'out'}", f"sdvae: VAE: {vae_folder}, float32 on cpu",
    ]  # fmt: skip
    decoded = run("decode", out, tmp_path / "out", "--json", "-q")
    assert decoded.stderr == ""
    values = json.loads(decoded.stdout)
    assert values.keys() == {"command", "output", "num_written", "skipped", "remarks", "seconds", "images_per_s", "vae"}
    assert values["num_written"] == 3


def test_one_process_of_several_says_so_and_what_it_leaves(
    run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `srun -n 4 --pty bash` sets it: one process is there, and takes itself for one of four."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    arguments = ("encode", photos, tmp_path / "store", "--size", 32, "--shard-rows", 1)
    first, again = run(*arguments), run(*arguments)
    assert "sdvae: this is process 1 of 4, as its launcher says; it takes its share\n" in first.stderr
    summary = f"1 of 3 photos stored in {tmp_path / 'store'}, 2 shards left to others; "
    assert re.fullmatch(re.escape(summary) + r"[\d.]+ photos/s\n", first.stdout)
    assert again.stdout == summary + "nothing left to do for this process\n"


def test_quarantined_photos_are_told_and_give_exit_code_3(run: Run, photos: Path, tmp_path: Path) -> None:
    source = tmp_path / "photos"
    source.mkdir()
    (source / "a.png").write_bytes((photos / "a.png").read_bytes())
    for name in ("x.jpg", "y.jpg"):
        (source / name).write_bytes(b"no photo")
    result = run("encode", source, tmp_path / "store", "--size", 32)
    assert result.exit_code == 3
    assert result.stdout.startswith("1 of 3 photos stored in ")
    assert f"2 quarantined in {tmp_path / 'store' / 'quarantine.jsonl'}" in result.stdout
    begun, described, first, *table = result.stderr.splitlines()
    assert begun == f"sdvae: encoding {source} into {tmp_path / 'store'}"
    assert described.startswith("sdvae: VAE: ") and "32x32 px, crop center" in described
    assert first.startswith("sdvae: 2 photos quarantined: ")
    assert table[-1].startswith("sdvae: held up by: ") and len(table) == 7
    again = run("encode", source, tmp_path / "store", "--size", 32, "--json")
    assert again.exit_code == 3
    values = json.loads(again.stdout)
    assert sum(values["quarantined"].values()) == 2
    assert [values[name] for name in ("seconds", "images_per_s", "steps_s", "slowest")] == [None] * 4


@pytest.mark.skipif(choose_resizer("lanczos") != "torch", reason="this torch has no lanczos for bytes")
def test_encode_resizes_by_torch_unless_the_store_was_begun_otherwise(run: Run, photos: Path, tmp_path: Path) -> None:
    for begun, chosen in ((), "torch"), (("--resizer", "pillow"), "pillow"):
        out = tmp_path / chosen
        assert run("encode", photos, out, "--size", 32, *begun).exit_code == 0
        (out / "done" / "00000.json").unlink()
        assert run("encode", photos, out, "--size", 32).exit_code == 0
        preprocess = json.loads((out / "manifest.json").read_bytes())["preprocess"]
        assert preprocess.get("resizer", "pillow") == chosen
    refused = run("encode", photos, out, "--size", 32, "--resizer", "torch")
    assert refused.exit_code == 1 and "preprocess.resizer" in refused.stderr


def test_encode_resumes_by_default_and_restarts_when_told(run: Run, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    assert run("encode", photos, out, "--size", 32).exit_code == 0
    manifest = (out / "manifest.json").read_bytes()
    assert run("encode", photos, out, "--size", 32).exit_code == 0
    refused = run("encode", photos, out, "--size", 16)
    assert refused.exit_code == 1
    assert "preprocess.size_px was 32, now 16" in refused.stderr
    assert (out / "manifest.json").read_bytes() == manifest
    asked = run("encode", photos, out, "--size", 16, "--restart")  # nobody is there who could say yes
    assert asked.exit_code == 1 and "Delete 1 shard in" in asked.stderr and "nothing was deleted" in asked.stderr
    assert run("encode", photos, out, "--size", 16, "--restart", "--yes").exit_code == 0
    assert (out / "manifest.json").read_bytes() != manifest


def test_crop_center_has_512_pixels_and_crop_none_the_photos_own(run: Run, photos: Path, tmp_path: Path) -> None:
    source = tmp_path / "photos"
    source.mkdir()
    (source / "a.png").write_bytes((photos / "a.png").read_bytes())
    for crop, size_px in (("center", 512), ("none", None)):
        out = tmp_path / crop
        assert run("encode", source, out, "--crop", crop).exit_code == 0
        assert json.loads((out / "manifest.json").read_bytes())["preprocess"]["size_px"] == size_px


def test_roundtrip_shows_both_and_tells_the_psnr(run: Run, photos: Path, tmp_path: Path, small_vae: VAE) -> None:
    picture = tmp_path / "compare.png"
    values = json.loads(run("roundtrip", photos / "a.png", "-o", picture, "--json").stdout)
    with Image.open(photos / "a.png") as image:
        before = np.asarray(image)
    after = np.asarray(small_vae.roundtrip([before])[0])
    mse = np.mean((before.astype(float) - after) ** 2)
    assert values["psnr_db"] == pytest.approx(10 * np.log10(255**2 / mse), abs=0.02)  # 8-bit rounding may differ
    assert (values["height"], values["width"]) == before.shape[:2]
    with Image.open(picture) as image:
        sheet = np.asarray(image)
    assert np.array_equal(sheet[8:52, 8:68], before)
    assert np.abs(sheet[8:52, 76:136].astype(int) - after).max() <= 1
    caption = sheet[53:-8]
    assert caption.min() < 128, "the captions are there"
    assert (sheet[:8] == 255).all()


def test_roundtrip_shrinks_a_large_photo_and_0_keeps_it(run: Run, photos: Path, tmp_path: Path) -> None:
    for size, expected in ((22, (22, 30)), (0, (44, 60)), (100, (44, 60))):
        result = run("roundtrip", photos / "a.png", "-o", tmp_path / "x.webp", "--size", size, "--json")
        values = json.loads(result.stdout)
        assert (values["height"], values["width"]) == expected


def test_sample_fills_a_sheet_that_depends_on_the_seed(run: Run, tmp_path: Path, small_vae: VAE) -> None:
    sheets = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = tmp_path / f"{name}.png"
        result = run("sample", "-n", 5, "-o", path, "--size", 16, "--seed", seed)
        assert result.exit_code == 0, result.stderr
        sheets[name] = path.read_bytes()
    assert sheets["a"] == sheets["b"] != sheets["c"]
    with Image.open(tmp_path / "a.png") as image:
        sheet = np.asarray(image)
    assert sheet.shape == (2 * (16 + 8) + 8, 3 * (16 + 8) + 8, 3)
    last = np.asarray(small_vae.sample(5, 16, 16, seed=1)[4]).astype(int)
    assert np.abs(sheet[32:48, 32:48] - last).max() <= 1
    assert (sheet[32:48, 56:72] == 255).all(), "the sixth place stays empty"


@pytest.mark.parametrize("mode", ["lerp", "slerp"])
def test_interpolate_makes_a_film_strip(run: Run, photos: Path, tmp_path: Path, small_vae: VAE, mode: str) -> None:
    path = tmp_path / "strip.png"
    ends = [photos / "c.jpg", photos / "c.jpg"]
    result = run("interpolate", *ends, "-o", path, "--steps", 4, "--mode", mode, "--size", 48)
    assert result.exit_code == 0, result.stderr
    with Image.open(path) as image, Image.open(photos / "c.jpg") as photo:
        strip, expected = np.asarray(image), np.asarray(small_vae.roundtrip([photo])[0]).astype(int)
    assert strip.shape == (48 + 16, 4 * 56 + 8, 3)
    for step in range(4):  # from a photo to itself, every image is its reconstruction
        assert np.abs(strip[8:56, 8 + 56 * step : 56 + 56 * step] - expected).max() <= 2


def test_interpolate_moves_from_a_to_b(run: Run, photos: Path, tmp_path: Path) -> None:
    strips = {}
    for mode in ("lerp", "slerp"):
        path = tmp_path / f"{mode}.png"
        run("interpolate", photos / "a.png", photos / "b.png", "-o", path, "--steps", 3, "--mode", mode, "--size", 32)
        with Image.open(path) as image:
            strips[mode] = np.asarray(image)[8:40, 8:]
    first, middle, last = ({mode: strip[:, x : x + 32] for mode, strip in strips.items()} for x in (0, 40, 80))
    assert differ(first["lerp"], first["slerp"]) <= 1  # slerp gives the ends up to rounding
    assert differ(last["lerp"], last["slerp"]) <= 1
    assert differ(middle["lerp"], middle["slerp"]) > 8
    assert differ(first["lerp"], last["lerp"]) > 8


def differ(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b).max())


def test_interpolate_makes_a_gif_that_goes_forth_and_back(run: Run, photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "way.GIF"
    result = run("interpolate", photos / "a.png", photos / "b.png", "-o", path, "--steps", 4, "--size", 32)
    assert result.exit_code == 0, result.stderr
    with Image.open(path) as image:
        assert (image.format, image.size, image.info["loop"]) == ("GIF", (32, 32), 0)
        assert image.n_frames == 6  # type: ignore[attr-defined]


# --- Progress, signals, pipes ---


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_draws_a_bar_a_phase_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Console("encode", is_json=False, is_quiet=False).progress() as show:
        for phase in ("scan", "encode"):
            for done in range(4):
                show(phase, done, 3)
                time.sleep(0.11)
    drawn = terminal.getvalue()
    assert re.search(r"scan 100%\|\S{30}\| 3 of 3, +[0-9.]+ photos/s, 00:00 left", drawn)
    assert re.search(r"encode  67%\|.{30}\| 2 of 3, +[0-9.]+ photos/s, \d\d:\d\d left", drawn)


@pytest.mark.parametrize(("stream", "is_quiet"), [(io.StringIO(), False), (Terminal(), True)])
def test_progress_is_silent_in_a_short_log_and_when_told(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, is_quiet: bool
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    with Console("encode", is_json=False, is_quiet=is_quiet).progress() as show:
        show("scan", 0, 2)
        time.sleep(0.11)
        show("scan", 2, 2)
    assert stream.getvalue() == ""


def test_what_an_earlier_run_did_is_no_speed_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Console("encode", is_json=False, is_quiet=False).progress() as show:
        show("encode", 1_000_000, 1_000_010)
        time.sleep(0.11)
        show("encode", 1_000_001, 1_000_010)
    (speed,) = re.findall(r"1000001 of 1000010, +([0-9.]+) photos/s", terminal.getvalue())[-1:]
    assert float(speed) < 10


@pytest.mark.parametrize(("signum", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_become_exit_codes(vae_folder: Path, tmp_path: Path, signum: int, exit_code: int) -> None:
    arguments = ["sample", "-n", 10**6, "-o", tmp_path / "x.png", "--vae", vae_folder, "--device", "cpu", "-v"]
    with process(*arguments) as running:
        assert running.stderr is not None
        assert "fingerprint" in running.stderr.readline()  # the VAE is loaded, sampling begins
        running.send_signal(signum)
        stdout, stderr = running.communicate(timeout=120)
    assert running.returncode == exit_code
    assert stderr == f"sdvae: stopped by {signal.Signals(signum).name}\n"
    assert stdout == ""
    assert not list(tmp_path.iterdir())


def test_a_closed_pipe_is_quiet() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run([sys.executable, "-m", "sdvae", "--help"], stdout=pipe, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == ""


# --- doctor ---


def test_doctor_finds_a_torchvision_that_does_not_belong_to_this_torch(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    with process("doctor", "--json", PYTHONPATH=str(tmp_path)) as running:
        stdout, stderr = running.communicate(timeout=300)
    assert running.returncode == 1, stderr
    report = json.loads(stdout)
    assert report["is_healthy"] is False
    findings = {(item["section"], item["name"]): item for item in report["findings"]}
    torchvision = findings["packages", "torchvision"]
    assert torchvision["status"] == "broken"
    assert torchvision["advice"].startswith("RuntimeError: operator torchvision::nms does not exist; uninstall it")
    assert findings["packages", "torch"]["value"] == torch.__version__
    for name in ("numpy", "pillow", "huggingface-hub", "safetensors"):
        assert findings["packages", name]["status"] == "ok", findings["packages", name]
    assert re.fullmatch(r"(cpu|cuda) in (float32|bfloat16): .+", findings["devices", "chosen"]["value"])
    assert findings["images", "JPEG"]["status"] == "ok"


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("pass", ""),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("import os; os.abort()", "the import ended with code -6"),
        ("raise SystemExit(7)", "the import ended with code 7"),
    ],
)
def test_a_broken_import_is_described_even_when_it_kills_its_process(statement: str, says: str) -> None:
    assert doctor_module._failure(statement) == says


@pytest.mark.parametrize(("status", "exit_code", "last"), [("warning", 0, "all well"), ("broken", 1, "1 broken")])
def test_doctor_prints_a_table(
    run: Run, monkeypatch: pytest.MonkeyPatch, status: str, exit_code: int, last: str
) -> None:  # fmt: skip
    findings = [
        Finding("packages", "torch", "2.13.0"),
        Finding("images", "AVIF", "missing", status, "do this"),  # type: ignore[arg-type]
    ]
    monkeypatch.setattr(doctor_module, "examine", lambda: iter(findings))
    result = run("doctor")
    assert result.exit_code == exit_code
    mark = {"warning": "!", "broken": "x"}[status]
    assert result.stdout.splitlines() == [
        "packages", "  torch  2.13.0", "images", f"{mark} AVIF   missing", "         do this", "", last,
    ]  # fmt: skip


def test_missing_codecs_are_warnings_but_for_jpeg_and_png(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.features.check", lambda codec: False)
    statuses = {finding.name: finding.status for finding in doctor_module._check_codecs()}
    assert {name for name, status in statuses.items() if status == "broken"} == {"JPEG", "PNG"}
    assert {"AVIF", "WebP", "JPEG 2000", "colour profiles"} <= {n for n, s in statuses.items() if s == "warning"}
