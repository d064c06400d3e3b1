#!/usr/bin/env python
"""Reconstruction quality on Kodak, by `sdvae eval`: the embedded VAE, the TAESD family, and codecs at equal bits.

    benchmarks/quality.py [--vae SPEC --family NAME] [--recipe kodak|kodak-512] [--output REPORT] [--write]

fp32, 24 photos, never a training photo. JPEG, WebP and AVIF get the bits per pixel of the first VAE's posterior; a
photo shrunk to an eighth is the floor. The embedded VAE and TAESD also decode each other's latents.
"""

import argparse
import json
import math
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import test_data, write_result
from torch import Tensor
from tqdm import tqdm

from sdvae import VAE
from sdvae.evaluate.candidates import VAECandidate, padded_pixels
from sdvae.evaluate.codecs import CodecCandidate
from sdvae.evaluate.crops import cut
from sdvae.evaluate.recipes import Recipe, find_recipe
from sdvae.evaluate.results import SCORES_NAME, Candidate, Results
from sdvae.evaluate.run import evaluate
from sdvae.evaluate.table import table
from sdvae.images.read import read_image
from sdvae.sources.open import open_source

METRICS = ("psnr", "ssim", "ms_ssim")
TAESDS = {"taesd": "TAESD", "taesdxl": "TAESDXL", "taesd3": "TAESD3", "taef1": "TAEF1"}
FILES = {"kodak": "quality-kodak-whole", "kodak-512": "quality-kodak"}


class Crossed(VAECandidate):
    """The latents of one VAE through the decoder of another."""

    def __init__(self, vae: VAE, decoder: VAE, label: str) -> None:
        super().__init__(vae, label)
        self.decoder = decoder

    def decode(self, latents: Tensor) -> Tensor:
        """Raw latents to pixels, by the other decoder."""
        return self.decoder.decode(latents)


def bits_per_pixel(vae: VAE, photos: Path, recipe: Recipe) -> float:
    """The rate of a VAE: the KL of its posterior to the prior, of scaled latents, a photo pixel."""
    candidate, rates = VAECandidate(vae), []
    for path in sorted(photos.glob("*.png")):
        image = cut(read_image(path), recipe)
        nats = candidate.scaled(candidate.encode(padded_pixels([image], vae.config.downscale))).kl()
        rates.append(float(nats) / math.log(2) / (image.shape[0] * image.shape[1]))
    return statistics.fmean(rates)


def candidates(vae: VAE, photos: Path, recipe: Recipe) -> list[VAECandidate | CodecCandidate]:
    folder = test_data() / "weights" / "taesd_bf16"
    tiny = {name: VAE.load(folder / f"{name}_encoder.safetensors", "cpu", "fp32") for name in TAESDS}
    rate = bits_per_pixel(vae, photos, recipe)
    taesd = tiny["taesd"]
    return [
        VAECandidate(vae),
        *(VAECandidate(one, TAESDS[name]) for name, one in tiny.items()),
        Crossed(vae, taesd, f"{vae.name} latents through TAESD's decoder"),
        Crossed(taesd, vae, f"TAESD latents through {vae.name}'s decoder"),
        CodecCandidate("jpeg", rate, "JPEG"),
        CodecCandidate("webp", rate, "WebP"),
        CodecCandidate("avif", rate, "AVIF"),
        CodecCandidate("bicubic", 0.0, "Lanczos 8x down, bicubic up"),
    ]


def row(candidate: Candidate) -> dict[str, Any]:
    """One row of the table, rounded so that another machine writes the same."""
    found: dict[str, Any] = {
        name: [round(value, 4) for value in (one.mean, one.low, one.high) if value is not None]
        for name, one in candidate.summaries.items()
    }
    rate = candidate.bits_per_pixel
    return found | {
        "bits_per_pixel": None if rate is None else round(rate, 3),
        "num_parameters": candidate.num_parameters,
        "encode_s": candidate.encode_s,
        "decode_s": candidate.decode_s,
        "peak_bytes": candidate.peak_bytes,
        "colour_shift": [round(shift, 2) for shift in candidate.latents.colour_shift] if candidate.latents else None,
        "psnr_db_after_16_trips": round(candidate.latents.decay.y[-1], 2) if candidate.latents else None,
    }


def markdown(result: dict[str, Any]) -> str:
    """The table of the README, from a file of results."""
    lines = ["| | PSNR dB | SSIM | MS-SSIM | bits/px |", "|---|---|---|---|---|"]
    for label, found in result["rows"].items():
        if "latents through" in label:
            continue
        (mean, low, high), rate = found["psnr"], found["bits_per_pixel"]
        numbers = f"{mean:.2f} ({low:.2f} to {high:.2f}) | {found['ssim'][0]:.3f} | {found['ms_ssim'][0]:.3f}"
        lines.append(f"| {label} | {numbers} | {'' if rate is None else f'{rate:.2f}'} |")
    return "\n".join(lines)


def per_photo(report: Path, results: Results) -> dict[str, list[float]]:
    """PSNR of each photo, by candidate."""
    lines = [json.loads(line) for line in (report / SCORES_NAME).read_text(encoding="utf-8").splitlines()]
    labels = [candidate.label for candidate in results.candidates]
    return {label: [round(line["scores"][label]["psnr"], 3) for line in lines] for label in labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vae", help="a folder, file or hub id; the embedded VAE without it")
    parser.add_argument("--family", help="the config of a bare weights file")
    parser.add_argument("--recipe", choices=list(FILES), default="kodak-512")
    parser.add_argument("--output", type=Path, help="keep the report in this folder")
    parser.add_argument("--write", action="store_true", help="write results/quality-kodak*.json")
    arguments = parser.parse_args()
    recipe = replace(find_recipe(arguments.recipe), metrics=METRICS)
    photos = test_data() / "kodak"
    vae = VAE.load(arguments.vae, device="cpu", dtype="fp32", family=arguments.family)
    with tempfile.TemporaryDirectory() as folder, tqdm(unit=" photos") as bar:
        report = arguments.output or Path(folder) / "report"

        def show(phase: str, done: int, total: int) -> None:
            bar.set_description(phase)
            bar.total, bar.n = total, done
            bar.refresh()

        results = evaluate(open_source(photos), report, candidates(vae, photos, recipe), recipe, progress=show)
        assert results is not None
        scores = per_photo(report, results)
    print("\n".join(table(results)))
    if arguments.write:
        rows = {candidate.label: row(candidate) for candidate in results.candidates}
        means = {label: found["psnr"][0] for label, found in rows.items()}
        path = write_result(
            FILES[arguments.recipe],
            {
                "vae": vae.fingerprint,
                "caption": results.caption,
                "rows": rows,
                "mean_psnr_db": means,
                "psnr_db": scores,
            },
        )
        print(f"written to {path}")


if __name__ == "__main__":
    main()
