"""The verbs that use a latent space: pictures, tables, exit codes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from sdvae import VAE, fit_latents
from sdvae.cli.main import cli
from sdvae.cli.pictures import fit_square, read_square
from sdvae.explore.arithmetic import mean_latents
from sdvae.pixels import to_images

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for seed, name in enumerate(("dark/a.png", "dark/b.png", "light/c.png", "light/d.png")):
        (folder / name).parent.mkdir(exist_ok=True)
        low = 0 if name.startswith("dark") else 128
        small = np.random.default_rng(seed).integers(low, low + 128, (4, 4, 3), np.uint8)
        Image.fromarray(small).resize((40, 32), Image.Resampling.BICUBIC).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def run(small_vae: VAE, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("vae")
    small_vae.save(folder)
    environment = {"SDVAE_VAE": str(folder), "SDVAE_DEVICE": "cpu", "SDVAE_DTYPE": "fp32"}

    def run_cli(*arguments: object) -> Result:
        return CliRunner(env=environment).invoke(cli, [str(argument) for argument in arguments], prog_name="sdvae")

    return run_cli


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


# --- sample --from ---


def test_sample_draws_from_what_the_latents_of_photos_are_like(
    run: Run, photos: Path, tmp_path: Path, small_vae: VAE
) -> None:
    sheets = {}
    for name, options in {"a": (), "b": (), "c": ("--seed", 1)}.items():
        result = run("sample", "--from", photos, "-n", 2, "-o", tmp_path / f"{name}.png", "--size", 16, *options)
        assert result.exit_code == 0, result.stderr
        sheets[name] = read(tmp_path / f"{name}.png")
    assert np.array_equal(sheets["a"], sheets["b"]) and not np.array_equal(sheets["a"], sheets["c"])
    paths = sorted(photos.rglob("*.png"))
    latents = small_vae.encode_images([read_square(path, 16) for path in paths]).latents
    posteriors = [small_vae.encode(torch.from_numpy(
        read_square(path, 16).transpose(2, 0, 1)[None] / np.float32(127.5) - 1)) for path in paths]  # fmt: skip
    both = type(posteriors[0])(torch.cat(latents), torch.cat([each.logvar for each in posteriors]))
    drawn = fit_latents(both).sample(1, torch.Generator().manual_seed(0))
    assert np.abs(sheets["a"][8:24, 8:24] - to_images(small_vae.decode(drawn))[0]).max() <= 1


def test_sample_draws_from_a_store_in_its_own_size(run: Run, photos: Path, tmp_path: Path) -> None:
    assert run("encode", photos, tmp_path / "store", "--size", 24).exit_code == 0
    result = run("sample", "--from", tmp_path / "store", "-n", 1, "-o", tmp_path / "x.png", "--json")
    values = json.loads(result.stdout)
    assert (values["width"], values["height"], values["source"]) == (24, 24, str(tmp_path / "store"))
    assert read(tmp_path / "x.png").shape == (24 + 16, 24 + 16, 3)


def test_photos_that_cannot_be_read_are_told_and_give_exit_code_3(run: Run, photos: Path, tmp_path: Path) -> None:
    source = tmp_path / "photos"
    source.mkdir()
    (source / "a.png").write_bytes((photos / "dark" / "a.png").read_bytes())
    (source / "x.png").write_bytes(b"no photo")
    picture = ("-o", tmp_path / "x.png", "--size", 16)
    for arguments in (
        ("sample", "--from", source, "-n", 1, *picture),
        ("anomaly", source, "--clean", photos, *picture),
        ("anomaly", photos, "--clean", source, *picture),
        ("arithmetic", source, photos, photos / "dark" / "a.png", *picture),
        ("augment", source, tmp_path / "out", "--size", 16),
    ):
        result = run(*arguments)
        assert result.exit_code == 3 and "sdvae: left out: " in result.stderr, (arguments, result.stderr)
        assert "x.png" in result.stderr.splitlines()[-1]
        assert result.stdout


def test_components_without_photos_are_wrong_usage(run: Run, tmp_path: Path) -> None:
    result = run("sample", "--components", 2, "-o", tmp_path / "x.png")
    assert result.exit_code == 2 and "give the photos with --from" in result.stderr
    few = run("sample", "--components", 2, "--from", tmp_path, "-o", tmp_path / "x.png")
    assert few.exit_code == 1 and "holds no photos" in few.stderr


# --- interpolate ---


def test_four_photos_make_a_grid(run: Run, photos: Path, tmp_path: Path, small_vae: VAE) -> None:
    corners = sorted(photos.rglob("*.png"))
    result = run("interpolate", *corners, "-o", tmp_path / "grid.png", "--size", 16, "--json")
    assert json.loads(result.stdout)["steps"] == 5, result.stderr
    sheet = read(tmp_path / "grid.png")
    assert sheet.shape == (5 * 24 + 8, 5 * 24 + 8, 3)
    expected = small_vae.interpolate_grid([read_square(path, 16) for path in corners])
    for place in (0, 4, 12, 20, 24):
        top, left = place // 5 * 24 + 8, place % 5 * 24 + 8
        assert np.abs(sheet[top : top + 16, left : left + 16] - np.asarray(expected[place])).max() <= 1


def test_other_numbers_of_photos_and_moving_grids_are_wrong_usage(run: Run, photos: Path, tmp_path: Path) -> None:
    paths = sorted(photos.rglob("*.png"))
    for chosen in (paths[:1], paths[:3], [*paths, paths[0]]):
        result = run("interpolate", *chosen, "-o", tmp_path / "x.png")
        assert result.exit_code == 2 and f"four for a grid, not {len(chosen)}" in result.stderr
    assert run("interpolate", *paths, "-o", tmp_path / "x.gif").exit_code == 2


# --- arithmetic ---


def test_arithmetic_shows_the_sum_beside_its_terms(run: Run, photos: Path, tmp_path: Path, small_vae: VAE) -> None:
    a, b, c, _ = sorted(photos.rglob("*.png"))
    result = run("arithmetic", a, b, c, "-o", tmp_path / "sum.png", "--size", 32)
    assert result.exit_code == 0, result.stderr
    sheet = read(tmp_path / "sum.png")
    cells = [sheet[8:40, 8 + 40 * place : 40 + 40 * place] for place in range(4)]
    images = [read_square(path, 32) for path in (a, b, c)]
    assert all(np.array_equal(cell, image) for cell, image in zip(cells, images, strict=False))
    first, second, third = small_vae.encode_images(images).latents
    expected = to_images(small_vae.decode(first - second + third))[0]
    assert np.abs(cells[3] - expected).max() <= 1 and np.abs(cells[3] - cells[2]).max() > 8


def test_folders_stand_for_the_mean_of_their_latents(run: Run, photos: Path, tmp_path: Path, small_vae: VAE) -> None:
    target = photos / "dark" / "a.png"
    arguments = ("arithmetic", photos / "light", photos / "dark", target, "-o", tmp_path / "x.png", "--size", 32)
    values = json.loads(run(*arguments, "--strength", 0.5, "--json").stdout)
    assert (values["num_a"], values["num_b"], values["strength"]) == (2, 2, 0.5)
    sheet = read(tmp_path / "x.png")
    means = [
        mean_latents(small_vae, [read_square(path, 32) for path in sorted((photos / name).glob("*.png"))])
        for name in ("light", "dark")
    ]
    latents = small_vae.encode_images([read_square(target, 32)]).latents[0] + 0.5 * (means[0] - means[1])
    assert np.abs(sheet[8:40, 8:40] - to_images(small_vae.decode(means[0]))[0]).max() <= 1
    assert np.abs(sheet[8:40, 128:160] - to_images(small_vae.decode(latents))[0]).max() <= 1


# --- anomaly ---


def test_anomaly_prints_a_table_and_writes_scores_and_a_sheet(
    run: Run, photos: Path, tmp_path: Path, small_vae: VAE
) -> None:
    result = run(
        "anomaly", photos, "--clean", photos, "--quantile", 0.5, "--size", 32,
        "-o", tmp_path / "worst.png", "--scores", tmp_path / "scores.jsonl",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [line["is_anomaly"] for line in lines] == [True, True, False, False]
    assert [line["score"] for line in lines] == sorted((line["score"] for line in lines), reverse=True)
    head, *rows, last = result.stdout.splitlines()
    assert head.split(maxsplit=1)[0] == "mean" and len(rows) == 4
    assert rows[0].split()[0] == "1" and f"{lines[0]['score']:.6f}  {lines[0]['key']}, an anomaly" in rows[0]
    assert rows[3].endswith(lines[3]["key"])
    assert last == f"2 of 4 photos above the threshold of {lines[2]['score']:.6f}"
    sheet = read(tmp_path / "worst.png")
    before = read_square(photos / lines[0]["key"], 32)
    assert np.array_equal(sheet[8:136, 8:136], fit_square(before, 128))


def test_anomaly_without_clean_photos_has_no_threshold(run: Run, photos: Path) -> None:
    values = json.loads(run("anomaly", photos, "--by", "elbo", "--size", 16, "--samples", 1, "--json").stdout)
    assert values["threshold"] is None and values["num_anomalies"] is None and values["noise_std"] > 0
    assert len(values["worst"]) == 4 and values["worst"][0]["is_anomaly"] is None
    told = run("anomaly", photos, "--crop", "none").stdout
    assert told.endswith("4 photos scored; give --clean for a threshold\n")


def test_anomaly_refuses_a_file_of_scores_it_cannot_write_before_it_works(
    run: Run, photos: Path, tmp_path: Path
) -> None:
    result = run("anomaly", photos, "--scores", tmp_path / "gone" / "x.jsonl", "--vae", "gone")
    assert result.exit_code == 1 and "there is no folder" in result.stderr


# --- augment ---


def test_augment_writes_what_the_python_entry_writes(run: Run, photos: Path, tmp_path: Path) -> None:
    result = run("augment", photos, tmp_path / "out", "--copies", 2, "--size", 32)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"8 images of 4 photos written to {tmp_path / 'out'}\n"
    assert len(list((tmp_path / "out" / "dark").glob("a-[01].png"))) == 2
    again = run("augment", photos, tmp_path / "out", "--copies", 2, "--size", 32)
    assert again.exit_code == 1 and "holds dark, light, metadata.jsonl; nothing was touched" in again.stderr
