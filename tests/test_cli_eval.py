import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from sdvae import VAE
from sdvae.cli.main import cli
from sdvae.evaluate import pictures, probes
from sdvae.evaluate.results import read_results

Run = Callable[..., Result]


@pytest.fixture(scope="module", autouse=True)
def _few() -> Iterator[None]:
    """Less of what takes time: two round trips, one image pictured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "NUM_PICTURED", 1)
        patch.setattr(probes, "TRIPS", (1, 2))
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for seed, size in enumerate(((40, 32), (32, 40))):
        noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(folder / f"{seed}.png")
    return folder


@pytest.fixture(scope="module")
def run(small_vae: VAE, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("vaes") / "small"
    small_vae.save(folder)

    def run_cli(*arguments: object, vae: object = folder) -> Result:
        command = ["eval", "--vae", str(vae), "--device", "cpu", *map(str, arguments)]
        return CliRunner().invoke(cli, command, prog_name="sdvae")

    return run_cli


def test_a_report_is_written_and_its_table_printed(run: Run, photos: Path, tmp_path: Path) -> None:
    done = run(photos, "-o", tmp_path / "report", "--metrics", "psnr,ssim")
    assert done.exit_code == 0, done.output
    results = read_results(tmp_path / "report")
    assert results.caption in done.stdout
    assert f"{results.candidates[0].summaries['psnr'].mean:.2f} [" in done.stdout
    assert "<h1>1 VAE on 2 photos</h1>" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


def test_json_is_the_results(run: Run, photos: Path, tmp_path: Path) -> None:
    done = run(photos, "-o", tmp_path / "report", "--metrics", "psnr", "--json", "--limit", 1)
    assert done.exit_code == 0, done.output
    value = json.loads(done.stdout)
    assert value["num_images"] == 1
    assert value["recipe"]["max_images"] == 1
    assert value["candidates"][0]["summaries"]["psnr"]["low"] is None


def test_tiling_is_varied_with_diffusers_own_tiles(
    run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdvae.cli.eval._TILES", (32,))
    done = run(photos, "-o", tmp_path / "report", "--metrics", "psnr", "--vary", "tiling")
    assert done.exit_code == 0, done.output
    assert "diffusers' 32 px tiles" in done.stdout
    whole, tiled = read_results(tmp_path / "report").candidates
    assert (whole.tiling, tiled.tiling) == ("none", "diffusers 32 px")
    assert whole.summaries["psnr"].mean != tiled.summaries["psnr"].mean  # the photos are wider than a tile
    assert whole.summaries["psnr"].mean == pytest.approx(tiled.summaries["psnr"].mean, abs=3)


def test_dtypes_are_varied(run: Run, photos: Path, tmp_path: Path) -> None:
    done = run(photos, "-o", tmp_path / "report", "--metrics", "psnr", "--vary", "dtype", "--limit", 1)
    assert done.exit_code == 0, done.output
    found = read_results(tmp_path / "report").candidates
    assert {"fp32", "bf16"} <= {candidate.dtype for candidate in found}


def test_the_difference_is_explained(run: Run, photos: Path) -> None:
    done = run(photos, "--explain-difference", "--metrics", "psnr,ssim", "--recipe", "imagenet-256", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["num_images"] == 2
    uniform = found["rivals"]["SSIM as scikit-image's default"]
    assert uniform["psnr"] == found["means"]["psnr"]
    assert uniform["ssim"] != found["means"]["ssim"]
    assert found["rivals"]["float, not 8-bit"]["psnr"] != found["means"]["psnr"]
    assert found["rivals"]["latents: sample"]["psnr"] != found["means"]["psnr"]
    assert found["rivals"]["bilinear, no antialias"]["psnr"] != found["means"]["psnr"]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        ((), 2, "--explain-difference"),
        (("-o", "r", "--explain-difference"), 2, "--explain-difference"),
        (("-o", "r", "--metrics", "psim"), 1, "no metric 'psim'"),
        (("-o", "r", "--metrics", "lpips_vgg"), 1, "vgg16-397923af.pth (sha256 397923af...)"),
        (("-o", "r", "--metrics", "rfid"), 1, "pt_inception-2015-12-05-6726825d.pth"),
    ],
)
def test_bad_requests_are_told(
    run: Run,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    exit_code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDVAE_NETWORKS", str(tmp_path))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    done = run(photos, *arguments)
    assert done.exit_code == exit_code, done.output
    assert message in done.stderr
    assert not (tmp_path / "r").exists()


def test_a_folder_without_photos_and_photos_that_are_broken_are_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    done = run(tmp_path / "photos", "-o", tmp_path / "report", "--metrics", "psnr")
    assert done.exit_code == 1
    assert "holds no photos" in done.stderr
    (tmp_path / "photos" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    done = run(tmp_path / "photos", "-o", tmp_path / "report", "--metrics", "psnr")
    assert done.exit_code == 1
    assert "none of the 1 photos" in done.stderr


def test_a_vae_of_another_downscale_is_judged_beside(run: Run, photos: Path, tmp_path: Path) -> None:
    import torch

    from sdvae.config import VAEConfig
    from tests.conftest import random_model

    config = VAEConfig(
        block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    VAE(random_model(config), torch.device("cpu"), torch.float32, "f4").save(tmp_path / "f4")
    done = run(photos, "--vae", tmp_path / "f4", "-o", tmp_path / "report", "--metrics", "psnr")
    assert done.exit_code == 0, done.output
    assert [one.downscale for one in read_results(tmp_path / "report").candidates] == [8, 4]


def test_every_recipe_can_be_chosen() -> None:
    """The command lists them itself: their module imports torch."""
    from sdvae.cli.eval import _RECIPES
    from sdvae.evaluate.recipes import RECIPES

    assert tuple(RECIPES) == _RECIPES
