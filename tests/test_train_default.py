"""The committed training log is what the committed script does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
LOG = ROOT / "sdvae" / "assets" / "small.training.jsonl"


@pytest.mark.slow
def test_the_first_50_steps_give_the_logged_losses(data_dir: Path, tmp_path: Path) -> None:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("the log was made with bf16 autocast on an AVX512 CPU; another rounds otherwise")
    script = ROOT / "scripts" / "train_default.py"
    folders = [data_dir / "train", data_dir / "weights" / "taesd_bf16", "-o", tmp_path / "run"]
    subprocess.run([sys.executable, script, *folders, "--stop-after", "50"], check=True)
    again = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    logged = [json.loads(line) for line in LOG.read_text().splitlines()][:50]
    assert len(again) == 50
    for now, before in zip(again, logged, strict=True):
        now.pop("seconds"), before.pop("seconds")
        # The same CPU repeats every digit; 2% is room for another AVX512 CPU's kernels.
        assert now == pytest.approx(before, rel=0.02, abs=2e-5)
