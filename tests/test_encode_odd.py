"""All odd files in one `sdvae encode`, as a user would run it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sdvae.store.store import Store
from sdvae.store.verify import verify
from sdvae.vae import VAE
from tests.test_odd_images import REASONS

PEAK_LIMIT_BYTES = 1_500_000_000


def encode(source: Path, out: Path, vae: Path) -> tuple[int, dict[str, object], int]:
    """Exit code, result and peak memory of one run."""
    arguments = ["encode", source, out, "--vae", vae, "--dtype", "fp32", "--size", "64", "--json", "-q"]
    arguments += ["--workers", "0"]  # decoded in the process that is measured
    # A child's peak begins with its parent's memory, so the parent of the measured one is a small process.
    measure = (
        "import json, resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE)\n"
        "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024\n"
        "print(json.dumps([done.returncode, json.loads(done.stdout), peak]))"
    )
    command = [sys.executable, "-c", measure, sys.executable, "-m", "sdvae", *arguments]
    code, result, peak = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return code, result, peak


@pytest.fixture(scope="module")
def vae_folder(small_vae: VAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    small_vae.save(folder)
    return folder


def test_every_odd_file_is_encoded_or_quarantined_and_none_crashes(
    data_dir: Path, vae_folder: Path, tmp_path: Path
) -> None:
    odd = data_dir / "odd"
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "ball.png").write_bytes((odd / "ball.png").read_bytes())
    _, _, peak_of_one_small_photo = encode(tmp_path / "one", tmp_path / "out-one", vae_folder)

    exit_code, result, peak = encode(odd, tmp_path / "out", vae_folder)
    assert exit_code == 3
    assert 100_000_000 < peak - peak_of_one_small_photo < PEAK_LIMIT_BYTES  # the 33 megapixels alone are 100 MB

    store = Store.open(tmp_path / "out")
    lines = [line for shard in store.shards() for line in shard.records()]
    names = {path.name for path in odd.iterdir()} - {"MANIFEST.csv"}
    assert {line["key"] for line in lines} == names
    assert len(lines) == len(names) == result["num_seen"]
    quarantined = {line["key"]: line["reason"] for line in lines if line["status"] == "quarantined"}
    assert quarantined.keys() == REASONS.keys()
    assert all(REASONS[key] in reason for key, reason in quarantined.items())
    assert result["num_written"] == len(names) - len(quarantined)
    assert sum(result["quarantined"].values()) == len(quarantined)  # type: ignore[attr-defined]
    sizes = {line["key"]: line["original_px"] for line in lines}
    assert sizes["Portrait_5.jpg"] == [1800, 1200]  # stored lying on its side
    assert sizes["rot1mir0.avif"] == [427, 640]
    assert verify(store.paths.root).damages == []
