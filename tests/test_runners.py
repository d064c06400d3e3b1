"""One process, the ranks of a launcher, Ray workers: the same bytes."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image
from skimage import data as skimage_data

from sdvae.encoding.encode import encode_dataset
from sdvae.encoding.manifest import EncodeSettings, num_cores, recorded_settings
from sdvae.encoding.resize import choose_resizer
from sdvae.encoding.runners import Ranks, RayRunner, VAESpec
from sdvae.encoding.tasks import Work
from sdvae.errors import ConfigError, StoreError
from sdvae.sources.open import open_source
from sdvae.store.geometry import Preprocess
from sdvae.store.store import Store
from sdvae.store.verify import verify
from sdvae.vae import VAE

NUM_PHOTOS = 96
BUCKETS = ((64, 64), (48, 80), (80, 48))
OPTIONS = ["--buckets", "64x64,80x48,48x80", "--flip", "--max-upscale", "2", "--shard-rows", "10", "--batch-size", "4"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 cuttings of real photos, of all shapes, in class folders; one of them broken."""
    folder = tmp_path_factory.mktemp("photos")
    originals = [Image.fromarray(getattr(skimage_data, name)()) for name in ("astronaut", "coffee", "chelsea")]
    for number in range(NUM_PHOTOS):
        width, height = 60 + number * 7 % 50, 60 + number * 11 % 50
        left, top = number * 13 % 200, number * 17 % 150
        path = folder / f"class{number % 3}" / f"{number:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        originals[number % 3].crop((left, top, left + width, top + height)).save(path, quality=92)
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def vae_folder(small_vae: VAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    small_vae.save(folder)
    return folder


PREPROCESS = Preprocess(size_px=None, buckets=BUCKETS, flip=True, max_upscale=2.0, resizer=choose_resizer("lanczos"))
SETTINGS = EncodeSettings(PREPROCESS, shard_rows=10, batch_rows=4, num_threads=1)


def files(root: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(root.rglob("*")) if path.is_file() and path.parent.name != "journal"]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def expected(photos: Path, small_vae: VAE, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes that decodes on a thread of its own."""
    out = tmp_path_factory.mktemp("expected") / "out"
    report = encode_dataset(photos, out, small_vae, SETTINGS, work=Work(num_workers=0))
    assert (report.num_written, report.num_shards_left) == (NUM_PHOTOS, 0)
    store = Store.open(out)
    assert store.num_shards > 8 and {shard.bucket_px for shard in store.shards()} == {*BUCKETS, None}
    assert len(store.shard(0).moments(flipped=True)[0]) == 10
    assert verify(out).damages == []
    return files(out)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_number_of_decoding_processes_changes_no_byte(
    photos: Path, small_vae: VAE, tmp_path: Path, expected: dict[str, bytes], num_workers: int
) -> None:
    report = encode_dataset(photos, tmp_path / "out", small_vae, SETTINGS, work=Work(num_workers))
    assert files(tmp_path / "out") == expected
    assert report.times.num_workers == num_workers and report.times.decode > 0


def launch(*arguments: object, launcher: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, *map(str, arguments)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)


def encode_arguments(photos: Path, out: Path, vae_folder: Path) -> list[object]:
    return ["encode", photos, out, *OPTIONS, "--vae", vae_folder, "--dtype", "fp32", "--device", "cpu", "--json", "-q"]


def require_bytes_of_one_process(photos: Path, out: Path, vae: VAE) -> None:
    one = out.with_name("one")
    encode_dataset(photos, one, vae, recorded_settings(Store.open(out)), work=Work(num_workers=2))
    assert files(out) == files(one)


ACCELERATE = [
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "sdvae"),
]


def test_two_ranks_of_accelerate_write_what_one_process_writes(
    photos: Path, vae_folder: Path, tmp_path: Path, small_vae: VAE
) -> None:
    out = tmp_path / "out"
    done = launch(*encode_arguments(photos, out, vae_folder), launcher=ACCELERATE, environment={})
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) == 2, done.stderr
    assert {result["num_seen"] for result in results} == {NUM_PHOTOS + 1}
    assert min(result["num_shards_left"] for result in results) == 0  # who came last finished it
    assert all(result["steps_s"]["encode"] > 0 for result in results)  # both had work
    require_bytes_of_one_process(photos, out, small_vae)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_what_a_killed_rank_left_is_done_by_the_next_launch(
    photos: Path, vae_folder: Path, tmp_path: Path, small_vae: VAE, killed: int
) -> None:
    out = tmp_path / "out"
    arguments = encode_arguments(photos, out, vae_folder)
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, *ACCELERATE, *map(str, arguments)], **quiet) as launcher:
        while not list(out.glob("done/*.json")):
            assert launcher.poll() is None, "it ended before it was killed"
            time.sleep(0.001)
        processes = psutil.Process(launcher.pid).children(recursive=True)
        (rank,) = [one for one in processes if "encode" in one.cmdline() and one.environ()["RANK"] == str(killed)]
        rank.kill()
        assert launcher.wait(120) != 0
    assert psutil.wait_procs(processes, 120)[1] == [], "orphans"
    left_behind = {path: path.stat().st_mtime_ns for path in out.glob("done/*.json")}
    assert len(left_behind) < Store.open(out).num_shards
    done = launch(*arguments, launcher=ACCELERATE, environment={})
    assert done.returncode == 0, done.stderr
    assert left_behind.items() <= {path: path.stat().st_mtime_ns for path in out.glob("done/*.json")}.items()
    require_bytes_of_one_process(photos, out, small_vae)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_two_ranks_write_what_one_process_writes_of_thousands_of_photos(data_dir: Path, tmp_path: Path) -> None:
    """At 256 px, with the embedded VAE, as on the command line."""
    photos, out = data_dir / "train", tmp_path / "out"
    arguments = ["encode", photos, out, "--size", "256", "--device", "cpu", "--json", "-q"]
    command = [sys.executable, *ACCELERATE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) == 2, done.stderr
    assert results[0]["num_seen"] == len(open_source(photos).entries()) > 2000
    dtype = Store.open(out).manifest["compute"]["dtype"]
    assert dtype is not None
    require_bytes_of_one_process(photos, out, VAE.load(device="cpu", dtype=dtype))
    seconds = [round(result["seconds"]) for result in results]
    print(f"\n{results[0]['num_seen']} photos at 256 px: the bytes of one process; two ranks took {seconds} s")


def test_ranks_one_after_the_other_finish_each_others_store(
    photos: Path, small_vae: VAE, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    encode = partial(encode_dataset, photos, tmp_path / "out", small_vae, SETTINGS, work=Work(num_workers=0))
    num_shards = len([name for name in expected if name.startswith("done/")])
    last = encode(ranks=Ranks(2, 3))
    assert last.num_shards_left == num_shards - num_shards // 3
    assert not (tmp_path / "out" / "quarantine.jsonl").exists()
    assert encode(ranks=Ranks(0, 3)).num_shards_left == len(range(1, num_shards, 3))
    assert encode(ranks=Ranks(1, 3)).num_shards_left == 0
    assert files(tmp_path / "out") == expected


def test_ranks_cannot_restart(photos: Path, small_vae: VAE, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="2 processes cannot all delete"):
        encode_dataset(photos, tmp_path / "out", small_vae, SETTINGS, ranks=Ranks(0, 2), restart=True)
    assert not (tmp_path / "out").exists()


SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8"}
ARRAY = {
    "SLURM_ARRAY_TASK_ID": "6",
    "SLURM_ARRAY_TASK_MIN": "2",
    "SLURM_ARRAY_TASK_MAX": "8",
    "SLURM_ARRAY_TASK_STEP": "2",
}


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, Ranks()),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Ranks(1, 2)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, Ranks(5, 8, 1, 4)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, Ranks(1, 2)),
        (SRUN, Ranks(5, 8)),
        (SRUN | {"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, Ranks(5, 8, 1, 4)),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Ranks()),  # a batch script, without srun
        (ARRAY | {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Ranks(2, 4)),
        (ARRAY | SRUN, Ranks(2 * 8 + 5, 4 * 8)),
        (ARRAY | {"SLURM_ARRAY_TASK_MIN": "6", "SLURM_ARRAY_TASK_MAX": "6"}, Ranks()),  # one of them, again
    ],
)  # fmt: skip
def test_launchers_tell_the_rank(environment: dict[str, str], ranks: Ranks) -> None:
    assert Ranks.of_environment(environment) == ranks


@pytest.mark.parametrize(
    "environment", [{"RANK": "0"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "one", "WORLD_SIZE": "2"}]
)
def test_a_rank_that_makes_no_sense_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="launcher"):
        Ranks.of_environment(environment)


def test_every_shard_belongs_to_one_rank() -> None:
    for world_size in (1, 2, 5):
        shares = [number for rank in range(world_size) for number in Ranks(rank, world_size).share(range(11))]
        assert sorted(shares) == list(range(11))


# --- Ray ---


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray cluster with room for two workers, whatever the machine has."""
    pytest.importorskip("ray", reason="Ray is not installed; install sdvae[ray]")
    command = [sys.executable, "-m", "ray.scripts.scripts"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 120}
    port = free_port()
    start = ["start", "--head", f"--port={port}", f"--num-cpus={2 * num_cores()}", "--include-dashboard=false"]
    subprocess.run([*command, *start, "--disable-usage-stats"], check=True, **quiet)
    yield f"127.0.0.1:{port}"
    subprocess.run([*command, "stop", "--force"], check=True, **quiet)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.slow
def test_ray_workers_write_what_one_process_writes_though_two_are_killed(
    photos: Path, vae_folder: Path, tmp_path: Path, small_vae: VAE, cluster: str
) -> None:
    out, killed = tmp_path / "out", set[int]()
    arguments = [*encode_arguments(photos, out, vae_folder), "--runner", "ray", "--address", cluster]
    arguments += ["--shard-rows", 24]  # the last one counts; each task costs a start of a decoding process
    command = [sys.executable, "-m", "sdvae", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as driver:
        while driver.poll() is None:
            for process in psutil.process_iter(["cmdline"]):
                title = " ".join(process.info["cmdline"] or [])
                if len(killed) < 2 and title.startswith("ray::_encode_on_worker") and process.pid not in killed:
                    process.kill()
                    killed.add(process.pid)
            time.sleep(0.05)
        printed, said = driver.communicate()
    assert driver.returncode == 3, said
    assert json.loads(printed.splitlines()[-1])["num_written"] == NUM_PHOTOS
    assert len(killed) == 2
    require_bytes_of_one_process(photos, out, small_vae)


def test_without_ray_its_name_is_told(
    photos: Path, small_vae: VAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"install sdvae\[ray\]"):
        encode_dataset(photos, tmp_path / "out", small_vae, SETTINGS, runner=RayRunner(VAESpec(None, None)))
