"""Kodak by the command: the figures that TAESD's files are known for, and the page of 24 photos and 5 VAEs."""

from html import unescape
from pathlib import Path

import pytest
from click.testing import CliRunner

import sdvae
from sdvae.cli.main import cli
from sdvae.evaluate.results import Results, read_results

WHOLE_DB = {"taesd": 24.77, "taesdxl": 24.90, "taesd3": 29.02, "taef1": 27.76}
CROP_DB = 24.58  # TAESD, centre crops of 512 px
EMBEDDED = Path(sdvae.__file__).parent / "assets" / "small.safetensors"


def judge(photos: Path, vaes: list[Path], report: Path, recipe: str) -> Results:
    chosen = [argument for vae in vaes for argument in ("--vae", str(vae))]
    done = CliRunner().invoke(
        cli, ["eval", str(photos), *chosen, "-o", str(report), "--recipe", recipe, "--device", "cpu"]
    )
    assert done.exit_code == 0, done.output
    return read_results(report)


def taesd(data_dir: Path, name: str) -> Path:
    return data_dir / "weights" / "taesd_bf16" / f"{name}_encoder.safetensors"


@pytest.mark.slow
def test_taesd_has_its_figure_on_crops(data_dir: Path, tmp_path: Path) -> None:
    results = judge(data_dir / "kodak", [taesd(data_dir, "taesd")], tmp_path / "report", "kodak-512")
    assert results.candidates[0].summaries["psnr"].mean == pytest.approx(CROP_DB, abs=0.05)


@pytest.mark.slow
@pytest.mark.timeout(7200)  # a quarter of an hour on a quiet core
def test_24_photos_and_5_vaes_have_their_figures_and_a_small_page(data_dir: Path, tmp_path: Path) -> None:
    vaes = [*(taesd(data_dir, name) for name in WHOLE_DB), EMBEDDED]
    results = judge(data_dir / "kodak", vaes, tmp_path / "report", "kodak")
    found = [candidate.summaries["psnr"].mean for candidate in results.candidates[:4]]
    assert found == pytest.approx(list(WHOLE_DB.values()), abs=0.05)
    assert results.num_images == 24
    for view in (view for image in results.images for view in image.views):
        assert view.worst.original.is_lossless
        assert view.worst.reconstruction.is_lossless
        assert not view.reconstruction.is_lossless
    page = tmp_path / "report" / "report.html"
    assert page.stat().st_size < 15_000_000
    html = unescape(page.read_text(encoding="utf-8"))
    assert html.count("Compressed view. The detail beside it is lossless.") == html.count('<article class="photo"') > 4
