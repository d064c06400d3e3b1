"""A made-up report for tests of what reads one: results.json and every picture it names, in milliseconds."""

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image

from sdvae.evaluate.recipes import RECIPES
from sdvae.evaluate.results import (
    PICTURES_NAME,
    Candidate,
    Channel,
    Curve,
    Equivariance,
    ImageResult,
    LatentReport,
    MetricColumn,
    Network,
    Picture,
    Reason,
    Results,
    Summary,
    View,
    WorstRegion,
    write_results,
)

NAMES = ("alpine.png", "<script>alert(1)</script>.png", 'quotes "and" & ampersands.jpg', "Ærø/日本語.webp")
_EDGES = tuple(float(level) for level in range(20, 33))


def make_results(folder: Path, num_images: int = 6, num_vaes: int = 2, size_px: tuple[int, int] = (96, 64)) -> Results:
    """Write a report of made-up numbers into `folder`: `num_vaes` VAEs and JPEG, images of (width, height)."""
    (folder / PICTURES_NAME).mkdir(parents=True, exist_ok=True)
    labels = [*(f"vae-{chr(97 + number)}" for number in range(num_vaes)), "JPEG"]
    recipe = RECIPES["kodak"]
    results = Results(
        recipe=recipe,
        caption=recipe.caption(),
        source="photos",
        machine={"cpu": "made up", "usable_cores": 2, "gpu": None, "torch": "2.13.0", "sdvae": "0.1"},
        columns=(
            MetricColumn("psnr", "PSNR", "dB", "higher", "image"),
            MetricColumn("ssim", "SSIM", "", "higher", "image"),
            MetricColumn(
                "lpips_alex", "LPIPS (alex)", "", "lower", "image", (Network("alexnet", "a.pth", "7be5" * 16),)
            ),
            MetricColumn("rfid", "rFID", "", "lower", "set"),
        ),
        candidates=tuple(_candidate(number, label) for number, label in enumerate(labels)),
        images=tuple(_image(folder, index, num_images, labels, size_px) for index in range(num_images)),
        num_images=24,
        left_out={"a truncated file": 1},
        remarks=("Left out: LPIPS (vgg); vgg16 needs vgg16-397923af.pth.",),
    )
    write_results(folder, results)
    return results


def _candidate(number: int, label: str) -> Candidate:
    is_vae = label != "JPEG"
    summaries = {
        "psnr": Summary(25.0 + number, 24.2 + number, 25.9 + number, 24, (21, 22, 24, 25, 26, 28, 30),
                        _EDGES, (0, 1, 2, 4, 6, 5, 3, 2, 1, 0, 0, 0)),
        "ssim": Summary(0.70 + 0.02 * number, 0.66, 0.75, 24, (0.5, 0.55, 0.65, 0.7, 0.75, 0.8, 0.9)),
        "lpips_alex": Summary(0.21 - 0.03 * number, 0.19, 0.23, 24),
        "rfid": Summary(9.5 - number, None, None, 24),
    }  # fmt: skip
    if not is_vae:
        return Candidate(label, "codec", summaries=summaries, bits_per_pixel=0.5)
    return Candidate(
        label, "vae", name=label, fingerprint=f"{number}" * 64, latent_space="sd1", latent_channels=4, downscale=8,
        summaries=summaries, num_parameters=5_000_000 * (number + 1), dtype="fp32", encode_s=0.1 + number,
        decode_s=0.2 + number, peak_bytes=200_000_000, bits_per_pixel=0.9 + 0.1 * number, latents=_latents(number),
    )  # fmt: skip


def _latents(number: int) -> LatentReport:
    frequencies = tuple(0.02 * step for step in range(1, 26))
    trips = (1.0, 2.0, 4.0, 8.0, 16.0)
    return LatentReport(
        channels=tuple(Channel(0.1 * c, 1.0 - 0.3 * c, 0.02, 30.0 - c, 5.0, c == 3) for c in range(4)),
        correlation=tuple(tuple(1.0 if a == b else 0.1 * (a - b) for b in range(4)) for a in range(4)),
        dead_share=0.25,
        bits_per_pixel=0.31,
        spectrum=Curve(frequencies, tuple(0.05 / frequency for frequency in frequencies)),
        photo_spectrum=Curve(frequencies, tuple(0.01 / frequency**2 for frequency in frequencies)),
        equivariance=(Equivariance("half size", 0.4, 22.0, 8), Equivariance("quarter turn", 0.6, 20.0, 8)),
        colour_shift=(0.5, -1.2, 0.1),
        contrast_gain=(0.98, 0.97, 1.01),
        decay=Curve(trips, tuple(25.0 + number - 2 * math.log2(trip) for trip in trips)),
        num_decayed=8,
    )


def _image(folder: Path, index: int, num_images: int, labels: list[str], size_px: tuple[int, int]) -> ImageResult:
    width, height = size_px
    rng = np.random.default_rng(index)
    ramp = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3)) * rng.uniform(0.3, 1.0, 3)
    photo = ramp.astype(np.uint8)
    original = _picture(folder, f"{index:04}-original.webp", photo)
    views = []
    for place, label in enumerate(labels):
        noisy = np.clip(ramp + rng.normal(0, 8, ramp.shape), 0, 255).astype(np.uint8)
        is_vae = label != "JPEG"
        stem = f"{index:04}-{place}"
        small = (height // 8, width // 8)
        views.append(
            View(
                {"psnr": 22.0 + index + place, "ssim": 0.6 + 0.01 * index, "lpips_alex": 0.3 - 0.01 * index},
                original,
                _picture(folder, f"{stem}-reconstruction.webp", noisy),
                _picture(folder, f"{stem}-error.png", rng.integers(0, 255, (height // 4, width // 4), dtype=np.uint8)),
                64.0,
                WorstRegion(
                    0, 8, 32, _picture(folder, f"{stem}-worst-original.png", photo[:32, 8:40]),
                    _picture(folder, f"{stem}-worst-reconstruction.png", noisy[:32, 8:40]),
                ),
                _picture(folder, f"{stem}-channels.png", rng.integers(0, 255, (small[0], 4 * small[1]), dtype=np.uint8))
                if is_vae else None,
                4 if is_vae else 0,
                ((-2.0, 2.0),) * 4 if is_vae else (),
                _picture(folder, f"{stem}-std.png", rng.integers(0, 255, small, dtype=np.uint8)) if is_vae else None,
                (0.0, 0.1) if is_vae else None,
            )
        )  # fmt: skip
    reasons: tuple[Reason, ...] = ("worst",) if index == 0 else ("best",) if index == num_images - 1 else ("first",)
    return ImageResult(NAMES[index % len(NAMES)], index, reasons, tuple(views))


def _picture(folder: Path, name: str, image: np.ndarray) -> Picture:
    file = io.BytesIO()
    is_lossless = name.endswith(".png")
    Image.fromarray(image).save(file, "png" if is_lossless else "webp", **({} if is_lossless else {"quality": 75}))
    (folder / PICTURES_NAME / name).write_bytes(file.getvalue())
    return Picture(f"{PICTURES_NAME}/{name}", image.shape[1], image.shape[0], is_lossless)
