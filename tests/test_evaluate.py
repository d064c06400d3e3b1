"""An evaluation from photos to results.json."""

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdvae.bench.peak import resident
from sdvae.config import VAEConfig
from sdvae.encoding.runners import Ranks
from sdvae.errors import ReportError, SourceError
from sdvae.evaluate import evaluation, pictures, probes, run
from sdvae.evaluate.candidates import VAECandidate
from sdvae.evaluate.codecs import CodecCandidate
from sdvae.evaluate.recipes import RECIPES, Recipe
from sdvae.evaluate.results import SCORES_NAME, Results, read_results, to_json
from sdvae.evaluate.run import evaluate
from sdvae.perceptual.distances import FeatureStatistics, frechet_distance, kernel_distance
from sdvae.perceptual.files import Loaded
from sdvae.perceptual.inception import Inception
from sdvae.sources.entries import Entry
from sdvae.sources.open import open_source
from sdvae.vae import VAE
from tests.conftest import random_model

RECIPE = replace(RECIPES["native"], metrics=("psnr", "ssim"), num_probed=2)
TINY = VAEConfig(
    block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, mid_block_add_attention=False,
    use_quant_conv=False, use_post_quant_conv=False,
)  # fmt: skip
TIMES = {"encode_s", "decode_s", "peak_bytes"}


@pytest.fixture(scope="module", autouse=True)
def _few() -> Iterator[None]:
    """Less of what takes time: two round trips of two images, three pictured; chunks of two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "TRIPS", (1, 2))
        patch.setattr(pictures, "NUM_PICTURED", 3)
        patch.setattr(evaluation, "CHUNK", 2)
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five small photos of three sizes, one of no whole number of latents: three chunks."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(5):
        height, width = ((48, 64), (64, 48), (45, 52))[number % 3]
        rows, columns = np.mgrid[:height, :width]
        waves = [np.sin(rows / rng.uniform(3, 9) + columns / rng.uniform(3, 9) + c) for c in range(3)]
        image = 127 + 80 * np.stack(waves, -1) + rng.normal(0, 6, (height, width, 3))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def vaes() -> list[VAECandidate]:
    cpu = torch.device("cpu")
    return [VAECandidate(VAE(random_model(TINY, seed), cpu, torch.float32, name=f"vae {seed}")) for seed in (0, 1)]


def judge(photos: Path, report: Path, candidates: list[Any], recipe: Recipe = RECIPE, **options: Any) -> Results | None:
    return evaluate(open_source(photos), report, candidates, recipe, **options)


def without_times(results: Results) -> dict[str, Any]:
    value: dict[str, Any] = to_json(results)
    del value["machine"]
    for candidate in value["candidates"]:
        for name in TIMES:
            del candidate[name]
    return value


def assert_close(first: Any, second: Any, path: str = "") -> None:
    """Equal but for 1e-3 in floats, which dB are the coarsest of."""
    if isinstance(first, float) and isinstance(second, float):
        assert first == pytest.approx(second, abs=1e-3, rel=1e-4), path
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            assert_close(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), path
        for place, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_close(one, other, f"{path}/{place}")
    else:
        assert first == second, path


@pytest.fixture(scope="module")
def judged(photos: Path, vaes: list[VAECandidate], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    report = tmp_path_factory.mktemp("judged") / "report"
    results = judge(photos, report, vaes)
    assert results is not None
    return report, results


def test_the_results_are_written_and_every_picture_is_there(judged: tuple[Path, Results]) -> None:
    report, results = judged
    assert read_results(report) == results
    assert results.num_images == 5
    assert [candidate.label for candidate in results.candidates] == ["vae 0", "vae 1"]
    psnr = results.candidates[0].summaries["psnr"]
    assert psnr.low is not None
    assert psnr.high is not None
    assert psnr.low < psnr.mean < psnr.high
    assert psnr.num_images == sum(psnr.histogram_counts) == 5
    lines = [json.loads(line) for line in (report / SCORES_NAME).read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(5))
    assert np.mean([line["scores"]["vae 0"]["psnr"] for line in lines]) == pytest.approx(psnr.mean, abs=1e-9)
    assert len(results.images) == 3
    assert results.images[0].reasons[0] == "worst"
    for view in (view for image in results.images for view in image.views):
        assert len(view.pictures()) == 7
        for picture in view.pictures():
            with Image.open(report / picture.file) as image:
                assert image.size == (picture.width, picture.height)
        assert view.reconstruction.file.endswith(".webp")
        assert not view.reconstruction.is_lossless
        assert view.worst.reconstruction.is_lossless


def test_pictures_made_at_once_or_in_the_end_are_the_same_and_no_others_are_left(
    judged: tuple[Path, Results],
    photos: Path,
    vaes: list[VAECandidate],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "SHOWN_AT_ONCE", 4)
    report = tmp_path / "report"
    again = judge(photos, report, vaes)
    assert again is not None
    assert again.images == judged[1].images
    shown = {picture.file for image in again.images for view in image.views for picture in view.pictures()}
    for folder in (report, judged[0]):
        found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in (folder / "pictures").iterdir()}
        assert found.keys() == shown
        assert all((report / name).read_bytes() == data for name, data in found.items())


def test_the_scores_are_those_of_the_public_methods(
    judged: tuple[Path, Results], photos: Path, vaes: list[VAECandidate]
) -> None:
    from sdvae.metrics import psnr

    report, _ = judged
    line = json.loads((report / SCORES_NAME).read_text().splitlines()[2])
    photo = np.asarray(Image.open(photos / "02.png"))
    after = np.asarray(vaes[1].vae.roundtrip([photo])[0])
    assert line["scores"]["vae 1"]["psnr"] == pytest.approx(psnr(after, photo), abs=1e-6)


def test_another_batch_size_gives_the_same_results(
    judged: tuple[Path, Results], photos: Path, vaes: list[VAECandidate], tmp_path: Path
) -> None:
    again = judge(photos, tmp_path / "report", vaes, batch_size=4)
    assert again is not None
    assert without_times(again) == without_times(judged[1])


def test_other_strips_give_the_same_results(
    judged: tuple[Path, Results], photos: Path, vaes: list[VAECandidate], tmp_path: Path
) -> None:
    strips = [VAECandidate(one.vae, budget=one.vae.engine.plan("decode", 64, 64, budget=1 << 30).predict_bytes(1))
              for one in vaes]  # fmt: skip
    again = judge(photos, tmp_path / "report", strips)
    assert again is not None
    assert_close(without_times(again), without_times(judged[1]))


def test_two_ranks_give_the_same_results(
    judged: tuple[Path, Results], photos: Path, vaes: list[VAECandidate], tmp_path: Path
) -> None:
    report = tmp_path / "report"
    assert judge(photos, report, vaes, ranks=Ranks(1, 2)) is None
    last = judge(photos, report, vaes, ranks=Ranks(0, 2))
    assert last is not None
    assert without_times(last) == without_times(judged[1])


def test_a_kill_in_the_middle_costs_a_chunk_and_no_digit(
    judged: tuple[Path, Results],
    photos: Path,
    vaes: list[VAECandidate],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = tmp_path / "report"
    judged_chunks: list[int] = []
    real = run.judge_chunk

    def dying(candidate: Any, items: Any, *rest: Any) -> Any:
        if items[0].index >= 2:
            raise KeyboardInterrupt
        return real(candidate, items, *rest)

    def counting(candidate: Any, items: Any, *rest: Any) -> Any:
        judged_chunks.append(items[0].index)
        return real(candidate, items, *rest)

    monkeypatch.setattr(run, "judge_chunk", dying)
    with pytest.raises(KeyboardInterrupt):
        judge(photos, report, vaes)
    with (report / "journal" / "notes-0.jsonl").open("ab") as file:
        file.write(b'{"chunk": 1, "torn')
    monkeypatch.setattr(run, "judge_chunk", counting)
    again = judge(photos, report, vaes)
    assert again is not None
    assert set(judged_chunks) == {2, 4}
    assert without_times(again) == without_times(judged[1])


def test_a_run_over_a_finished_report_judges_nothing_again(
    judged: tuple[Path, Results],
    photos: Path,
    vaes: list[VAECandidate],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = tmp_path / "report"
    shutil.copytree(judged[0], report)
    monkeypatch.setattr(run, "judge_chunk", None)
    again = judge(photos, report, vaes)
    assert again is not None
    assert without_times(again) == without_times(judged[1])


def test_a_sample_is_the_same_in_every_batch_and_differs_from_the_mode(
    judged: tuple[Path, Results], photos: Path, vaes: list[VAECandidate], tmp_path: Path
) -> None:
    recipe = replace(RECIPE, latents="sample", seed=3)
    found = [
        judge(photos, tmp_path / str(size), vaes[:1], recipe, batch_size=size).candidates[0].summaries["psnr"].mean  # type: ignore[union-attr]
        for size in (1, 5)
    ]
    assert found[0] == found[1] != judged[1].candidates[0].summaries["psnr"].mean


def test_codecs_stand_beside_vaes_at_their_rate(photos: Path, vaes: list[VAECandidate], tmp_path: Path) -> None:
    codecs = [CodecCandidate("jpeg", 2.5, "JPEG"), CodecCandidate("bicubic", 0.0, "bicubic 8x")]
    results = judge(photos, tmp_path / "report", [*vaes[:1], *codecs])
    assert results is not None
    jpeg = results.candidates[1]
    assert jpeg.kind == "codec"
    assert jpeg.latents is None
    assert jpeg.bits_per_pixel is not None
    assert 1.0 < jpeg.bits_per_pixel < 3.5
    assert results.images[0].views[1].channels is None
    assert jpeg.summaries["psnr"].mean > results.candidates[2].summaries["psnr"].mean


def test_photos_that_cannot_be_read_are_left_out_and_counted(
    photos: Path, vaes: list[VAECandidate], tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "00.png").write_bytes((folder / "00.png").read_bytes()[:200])
    results = judge(folder, tmp_path / "report", vaes[:1])
    assert results is not None
    assert results.num_images == 4
    assert sum(results.left_out.values()) == 1


def test_one_image_has_no_interval_and_the_remarks_say_so(
    photos: Path, vaes: list[VAECandidate], tmp_path: Path
) -> None:
    results = judge(photos, tmp_path / "report", vaes[:1], replace(RECIPE, max_images=1))
    assert results is not None
    psnr = results.candidates[0].summaries["psnr"]
    assert (psnr.low, psnr.high) == (None, None)
    assert any("no interval" in remark for remark in results.remarks)
    assert set(results.images[0].reasons) == {"worst", "median", "best", "first"}


def test_a_size_is_a_candidate_of_its_own(photos: Path, vaes: list[VAECandidate], tmp_path: Path) -> None:
    sizes = [VAECandidate(vaes[0].vae, f"{size} px", size_px=size) for size in (32, 64)]
    results = judge(photos, tmp_path / "report", sizes)
    assert results is not None
    assert [view.original.width for view in results.images[0].views] == [32, 64]
    assert results.candidates[0].size_px == 32


def test_a_folder_without_photos_or_with_something_else_is_refused(
    photos: Path, vaes: list[VAECandidate], judged: tuple[Path, Results], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="no photos"):
        judge(tmp_path / "empty", tmp_path / "report", vaes)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ReportError, match=r"thesis\.tex"):
        judge(photos, tmp_path / "other", vaes)
    (tmp_path / "album" / "pictures").mkdir(parents=True)
    with pytest.raises(ReportError, match=r"holds files of others \(pictures\)"):
        judge(photos, tmp_path / "album", vaes)
    with pytest.raises(ReportError, match="another recipe"):
        judge(photos, judged[0], vaes, replace(RECIPE, rounding="float"))
    with pytest.raises(ReportError, match="would mix"):
        judge(photos, photos / "report", vaes)
    with pytest.raises(ReportError, match="both called vae 0"):
        judge(photos, tmp_path / "report", [vaes[0], vaes[0]])
    with pytest.raises(ReportError, match="no metric 'psnt'"):
        judge(photos, tmp_path / "report", vaes, replace(RECIPE, metrics=("psnt",)))


def test_missing_networks_are_remarks_or_refused(
    photos: Path, vaes: list[VAECandidate], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdvae.perceptual.files import MissingNetwork

    monkeypatch.setenv("SDVAE_NETWORKS", str(tmp_path))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    recipe = replace(RECIPE, metrics=("psnr", "lpips_alex", "rfid", "rkid"), max_images=2)
    results = judge(photos, tmp_path / "report", vaes[:1], recipe)
    assert results is not None
    assert [column.name for column in results.columns] == ["psnr"]
    alexnet, inception = results.remarks
    assert "alexnet-owt-7be5be79.pth" in alexnet and "7be5be79" in alexnet
    assert inception.startswith("Left out: rFID and rKID; fid-inception needs ")
    with pytest.raises(MissingNetwork, match="https://"):
        judge(photos, tmp_path / "strict", vaes[:1], recipe, must_have_all=True)


class Features(Inception):
    """A stand-in for the network: eight numbers that depend on the image."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    def forward(self, levels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(levels, (2, 4)).mean(1).flatten(1)


def test_distances_between_sets_are_those_of_the_features(
    photos: Path, vaes: list[VAECandidate], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Loaded({}, "features.pth", "ab" * 32)
    monkeypatch.setattr(Inception, "load", classmethod(lambda cls: (Features(), file)))
    recipe = replace(RECIPE, metrics=("psnr", "rfid", "rkid"))
    results = judge(photos, tmp_path / "report", vaes, recipe, batch_size=3)
    assert results is not None
    network = Features()
    images = [np.asarray(Image.open(path)) for path in sorted(photos.glob("*.png"))]
    after = [np.asarray(image) for image in vaes[0].vae.roundtrip(images)]
    sets = [
        torch.cat([network(torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()) for image in group]).numpy()
        for group in (after, images)
    ]
    statistics = [FeatureStatistics(), FeatureStatistics()]
    for one, features in zip(statistics, sets, strict=True):
        one.add(features)
    found = results.candidates[0].summaries
    assert found["rfid"].mean == pytest.approx(frechet_distance(*statistics), rel=1e-3)
    assert found["rkid"].mean == pytest.approx(kernel_distance(*sets), rel=1e-4)
    assert found["rfid"].low is None
    assert results.columns[1].networks[0].sha256 == "ab" * 32
    assert results.ranked_by == "psnr"


class Drawn:
    """Ten thousand photos that are drawn when they are read."""

    name, root, remarks = "drawn", None, ()

    def entries(self) -> list[Entry]:
        return [Entry(f"{number:05}") for number in range(10_000)]

    def read(self, key: str) -> bytes:
        file = io.BytesIO()
        noise = np.random.default_rng(int(key)).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file, "png")
        return file.getvalue()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_photos(vaes: list[VAECandidate], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def watch(phase: str, done: int, total: int) -> None:
        if phase == "judge" and done % 1000 == 0 and done < total:
            seen.append((done, resident("VmRSS")))

    results = evaluate(Drawn(), tmp_path / "report", vaes[:1], replace(RECIPE, metrics=("psnr",)), progress=watch)
    assert results is not None
    assert results.num_images == 10_000
    memory = dict(seen)
    assert memory[9000] - memory[1000] < 30_000_000
