"""The script that closes the loop: what it saves is what `sdvae decode` reads, and its flow leads back to the data."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from sdvae.cli.main import cli
from tests.made_stores import make_store

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_tiny_diffusion.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tiny_diffusion", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in {"BATCH_SIZE": 4, "NUM_SAMPLING_STEPS": 3, "SAMPLES_PER_CLASS": 1, "NUM_LAYERS": 1}.items():
        assert hasattr(module, name)
        monkeypatch.setattr(module, name, value)
    return module


def test_what_it_saves_decodes(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "store", {(64, 64): 9})
    output = tmp_path / "samples.safetensors"
    arguments = ["train", str(store.paths.root), "-o", str(output), "--steps", "3"]
    monkeypatch.setattr("sys.argv", arguments)
    script.main()
    latents = load_file(output)["latents"]
    assert latents.shape == (3, 4, 8, 8) and latents.isfinite().all()
    arguments = ["decode", str(output), str(tmp_path / "images"), "--device", "cpu", "--dtype", "fp32", "--json"]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["num_written"] == 3
    assert len(list((tmp_path / "images").glob("*.png"))) == 3


def test_its_steps_follow_the_flow_to_the_data(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the true velocity for data that is one point, every Euler step stays on the straight line to it."""
    target = torch.randn(4, 8, 8)

    def true_velocity(model: object, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (x - target) / t.view(-1, 1, 1, 1)  # x = (1 - t) target + t noise

    monkeypatch.setattr(script, "velocity", true_velocity)
    model = type("Model", (), {"config": type("Config", (), {"num_embeds_ada_norm": 3})})
    sampled = script.sample(model, torch.tensor([0, 1]), (4, 8, 8))
    assert (sampled - target).abs().max() < 1e-5
