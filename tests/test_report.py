"""Pages as text: what they hold, what they escape, what they refuse; plots by their numbers."""

import json
import re
from dataclasses import replace
from html import unescape
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner

from sdvae.cli.main import cli
from sdvae.errors import ReportError, StoreError
from sdvae.evaluate.results import RESULTS_NAME, read_results, to_json
from sdvae.report import comparison as pages
from sdvae.report.comparison import comparison, write_report
from sdvae.report.plots import Axis, Line, Point, lines, number, scatter
from sdvae.report.render import render
from sdvae.report.store import store_page
from sdvae.sealed import write_json
from sdvae.vae import VAE
from tests.conftest import SMALL
from tests.made_results import NAMES, make_results
from tests.made_stores import make_store


def test_the_page_says_what_results_say(tmp_path: Path) -> None:
    results = make_results(tmp_path, num_images=6, num_vaes=2)
    page = comparison(tmp_path, results)
    assert page.title == "2 VAEs and 1 codec on 24 photos"
    assert [row.name for row in page.summary.rows] == ["vae-a", "vae-b", "JPEG"]
    psnr = [row.cells[0] for row in page.summary.rows]
    assert [cell.text for cell in psnr] == ["25.00", "26.00", "27.00"]
    assert psnr[0].note == "24.20 – 25.90"
    assert [cell.is_best for cell in psnr] == [False, False, True]
    memory = [row.cells[-1] for row in page.summary.rows]
    assert [cell.text for cell in memory] == ["200", "200", "–"] and not any(cell.is_best for cell in memory)
    assert page.findings.startswith("JPEG is best by PSNR")
    assert {plot.title for plot in page.plots} >= {"Rate against distortion", "Decay over round trips"}
    html = unescape(render(page))
    assert results.caption in html and page.remarks[0] in html and "7be5" * 16 in html


def test_who_reads_the_same_is_not_called_best(tmp_path: Path) -> None:
    results = make_results(tmp_path, num_images=1, num_vaes=2)
    first, second, codec = results.candidates
    equal = replace(codec, summaries=dict(second.summaries) | {"ssim": replace(second.summaries["ssim"], mean=0.8)})
    findings = comparison(tmp_path, replace(results, candidates=(first, second, equal))).findings
    assert "PSNR" not in findings
    assert "JPEG is best by SSIM." in findings


def test_file_names_are_text(tmp_path: Path) -> None:
    make_results(tmp_path, num_images=len(NAMES))
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;.png" in html
    assert html.count("<script>") == 1
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", html)
    assert 'style="' not in html, "the policy of the page forbids it"


def test_pictures_are_bounded_and_each_reason_keeps_its_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = make_results(tmp_path, num_images=6)
    whole = comparison(tmp_path, results)
    of_photo = [sum(len(picture.src) for picture in photo.pictures()) for photo in whole.photos]
    monkeypatch.setattr(pages, "MOST_BYTES", int(sum(sorted(of_photo)[-3:]) * 1.05))
    kept = comparison(tmp_path, results).photos
    assert [photo.tag for photo in kept] == ["Worst", "", "Best"]
    monkeypatch.setattr(pages, "MOST_BYTES", 1)
    assert len(comparison(tmp_path, results).photos) == 1


def test_a_picture_outside_of_the_report_is_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    folder = tmp_path / "report"
    make_results(folder, num_images=1)
    secret.write_bytes((folder / "pictures" / "0000-0-worst-original.png").read_bytes())
    text = json.dumps(to_json(read_results(folder)))
    write_json(folder / RESULTS_NAME, json.loads(text.replace("pictures/0000-original.webp", "../secret.png")))
    with pytest.raises(ReportError, match="outside"):
        write_report(folder)


@pytest.mark.parametrize("content", [None, b"no picture"])
def test_a_lost_or_damaged_picture_is_told(tmp_path: Path, content: bytes | None) -> None:
    make_results(tmp_path, num_images=1)
    path = tmp_path / "pictures" / "0000-0-reconstruction.webp"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ReportError, match=r"0000-0-reconstruction\.webp .*run sdvae eval again"):
        write_report(tmp_path)


def test_the_page_of_a_store(tmp_path: Path, small_vae: VAE) -> None:
    store = make_store(
        tmp_path / "latents", {(64, 64): 5, (64, 96): 3}, latent_space=small_vae.latent_space, config=SMALL,
        broken=("dog/001.png",),
    )  # fmt: skip
    page = store_page(store, small_vae)
    assert page.figures[0].value == "7" and page.figures[1].value == "1"
    assert len(page.decodes) == 7
    assert {decode.size for decode in page.decodes} == {"64 × 64", "96 × 64"}
    assert page.decodes[0].caption == "a cat, 000" and page.decodes[0].latents is not None
    assert page.quarantined == [("the file is truncated", 1, "dog/001.png")]
    assert [row.name for row in page.channels.rows] == ["0", "1", "2", "3", "All"]
    assert {fact.name: fact.value for fact in page.texts}["Words"] == "3 to 3, median 3"
    html = render(page)
    assert "the file is truncated" in html and "another" not in page.remarks


def test_a_store_of_another_space_is_refused(tmp_path: Path, small_vae: VAE) -> None:
    store = make_store(tmp_path / "latents", {(64, 64): 1}, latent_space="sdxl")
    with pytest.raises(StoreError, match="the space sdxl"):
        store_page(store, small_vae)


def test_sdvae_report_writes_beside_its_input(tmp_path: Path) -> None:
    make_results(tmp_path / "report", num_images=1)
    made = CliRunner().invoke(cli, ["report", str(tmp_path / "report")])
    assert made.exit_code == 0, made.output
    assert (tmp_path / "report" / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert CliRunner().invoke(cli, ["report", str(tmp_path / "report"), "-o", str(tmp_path)]).exit_code == 1
    (tmp_path / "empty").mkdir()
    nothing = CliRunner().invoke(cli, ["report", str(tmp_path / "empty")])
    assert nothing.exit_code == 1 and "run sdvae eval first" in nothing.output


@pytest.mark.parametrize(
    ("axis", "marks"),
    [
        (Axis("", 0, 10), ["0", "2", "4", "6", "8", "10"]),
        (Axis("", 23.1, 26.2), ["24", "25", "26"]),
        (Axis("", 0.01, 100, is_log=True), ["0.01", "0.1", "1", "10", "100"]),
        (Axis("", 0.4, 3, is_log=True), ["0.5", "1", "2"]),
    ],
)
def test_axes_have_round_marks(axis: Axis, marks: list[str]) -> None:
    assert [text for _, text in axis.marks()] == marks


def test_numbers_are_short() -> None:
    assert [number(value) for value in (0.0, -1.5, 1e-6, 2e6)] == ["0", "−1.5", "10⁻⁶", "2·10⁶"]


def test_points_lie_where_their_numbers_are() -> None:
    svg = scatter([Point("a", 1, 0), Point("b", 10, 4), Point("c", 100, 2)], Axis("", 1, 100, True), Axis("", 0, 4), "")
    places = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]
    (left, bottom), (middle, top), (right, half) = places
    assert middle == pytest.approx((left + right) / 2, abs=0.2) and half == pytest.approx((top + bottom) / 2, abs=0.2)
    assert top < bottom, "more is higher"


def test_names_at_the_ends_of_lines_do_not_cover_each_other() -> None:
    same = [Line(f"<{place}>", (1, 2), (1.0, 1.0), place) for place in range(6)]
    svg = lines(same, Axis("", 1, 2), Axis("", 0, 2), "summary")
    downs = sorted(float(y) for y in re.findall(r'<text class="label vae" data-vae="\d" x="[\d.]+" y="([\d.]+)"', svg))
    assert len(downs) == 6 and all(after - before > 14 for before, after in pairwise(downs))
    assert "<0>" not in svg and "&lt;0&gt;" in svg
