#!/usr/bin/env python
"""Reconstruction quality on Kodak, by `sdvae eval`: the embedded VAE, the TAESD family, and codecs at equal bits.

    benchmarks/quality.py [--vae SPEC --family NAME] [--recipe kodak|kodak-512] [--output REPORT] [--write]
    benchmarks/quality.py --times [--write]

24 photos, never a training photo. JPEG, WebP and AVIF get the bits per pixel of the first VAE's posterior; a photo
shrunk to an eighth is the floor. The embedded VAE and TAESD also decode each other's latents. `--times` measures
speed and memory alone, on a machine that should do nothing else. With --write, results/quality-*.json, and the table of
both in the documents.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import RESULTS, write_result
from quality_times import EMBEDDED, KODAK, TAESDS, bits_per_pixel, load_taesd, measure_times
from torch import Tensor
from tqdm import tqdm

from sdvae import VAE
from sdvae.amounts import memory_text
from sdvae.evaluate.candidates import VAECandidate
from sdvae.evaluate.codecs import CodecCandidate
from sdvae.evaluate.crops import cut
from sdvae.evaluate.recipes import Recipe, find_recipe
from sdvae.evaluate.results import SCORES_NAME, Candidate, Results
from sdvae.evaluate.run import evaluate
from sdvae.evaluate.table import table
from sdvae.images.read import read_image
from sdvae.sources.open import open_source

METRICS = ("psnr", "ssim", "ms_ssim")
FILES = {"kodak": "quality-kodak-whole", "kodak-512": "quality-kodak"}
TIMES = "quality-times"
DOCUMENTS = ("README.md", "docs/evaluation.md")
MARK = "<!-- benchmarks/quality.py --write writes this table -->\n"

ON_THE_CARD = (  # the rows of sdvae/assets/README.md
    "Lanczos 8x down, bicubic up", "sdvae-small", "sdvae-small latents through TAESD's decoder",
    "TAESD latents through sdvae-small's decoder", "TAESD",
)  # fmt: skip


class Crossed(VAECandidate):
    """The latents of one VAE through the decoder of another."""

    def __init__(self, vae: VAE, decoder: VAE, label: str) -> None:
        super().__init__(vae, label)
        self.decoder = decoder

    def decode(self, latents: Tensor) -> Tensor:
        """Raw latents to pixels, by the other decoder."""
        return self.decoder.decode(latents)


def candidates(vae: VAE, rough: VAE, recipe: Recipe) -> list[VAECandidate | CodecCandidate]:
    """`rough` is the VAE in bf16."""
    tiny = {label: load_taesd(name) for name, label in TAESDS.items()}
    rate = statistics.fmean(bits_per_pixel(vae, cut(read_image(path), recipe)) for path in KODAK.glob("*.png"))
    taesd = tiny["TAESD"]
    return [
        VAECandidate(vae),
        VAECandidate(rough, f"{vae.name} in bf16"),
        *(VAECandidate(one, label) for label, one in tiny.items()),
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
        "colour_shift": [round(shift, 2) for shift in candidate.latents.colour_shift] if candidate.latents else None,
        "psnr_db_after_16_trips": round(candidate.latents.decay.y[-1], 2) if candidate.latents else None,
    }


def markdown(result: dict[str, Any], times: dict[str, Any] | None) -> str:
    """The table of the documents, from the files of results; without `times`, that of quality alone."""
    heads = ["", "parameters", "PSNR, dB (95% interval)", "SSIM", "MS-SSIM", "bits/px"]
    heads += [f"encode, ms ({_device(times['machine'])})", "decode, ms", "peak memory"] if times else []
    lines = [heads, ["---"] * len(heads)]
    for label, found in result["rows"].items():
        if "latents through" in label:
            continue
        (mean, low, high), num, rate = found["psnr"], found["num_parameters"], found["bits_per_pixel"]
        cells = [label, f"{num / 1e6:.1f} M" if num else "", f"{mean:.2f} ({low:.2f} to {high:.2f})"]
        cells += [f"{found[name][0]:.3f}" for name in ("ssim", "ms_ssim")]
        cells.append("" if rate is None else f"{rate:.2f}")
        lines.append(cells + (_times_cells(times["rows"].get(label, {})) if times else []))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _device(machine: dict[str, Any]) -> str:
    return machine["gpu"] or f"{machine['cpu']}, {machine['cpu_capability']}, {machine['threads']} threads"


def _times_cells(found: dict[str, Any]) -> list[str]:
    seconds = [found.get(name) for name in ("encode_s", "decode_s")]
    peak = found.get("peak_bytes")
    return [*("" if one is None else f"{one * 1e3:.0f}" for one in seconds), memory_text(peak) if peak else ""]


def stored_table() -> str:
    """The table of the stored results."""
    times = RESULTS / f"{TIMES}.json"
    result = json.loads((RESULTS / f"{FILES['kodak-512']}.json").read_text(encoding="utf-8"))
    return markdown(result, json.loads(times.read_text(encoding="utf-8")) if times.exists() else None)


def write_documents() -> None:
    """Put the table where the mark is, instead of the one that is there."""
    for name in DOCUMENTS:
        path = RESULTS.parents[1] / name
        before, mark, after = path.read_text(encoding="utf-8").partition(MARK)
        if not mark:
            raise SystemExit(f"{path} has no line {MARK.strip()}")
        while after.startswith("|"):
            after = after.partition("\n")[2]
        path.write_text(f"{before}{mark}{stored_table()}\n{after}", encoding="utf-8")
        print(f"the table of {path} is up to date")


def per_photo(report: Path, results: Results) -> dict[str, list[float]]:
    """PSNR of each photo, by candidate."""
    lines = [json.loads(line) for line in (report / SCORES_NAME).read_text(encoding="utf-8").splitlines()]
    labels = [candidate.label for candidate in results.candidates]
    return {label: [round(line["scores"][label]["psnr"], 3) for line in lines] for label in labels}


def judge(vae: VAE, rough: VAE, recipe: Recipe, output: Path | None) -> dict[str, Any]:
    """The results of all candidates, as the file holds them; the table of `sdvae eval` is printed."""
    with tempfile.TemporaryDirectory() as folder, tqdm(unit=" photos") as bar:
        report = output or Path(folder) / "report"

        def show(phase: str, done: int, total: int) -> None:
            bar.set_description(phase)
            bar.total, bar.n = total, done
            bar.refresh()

        results = evaluate(open_source(KODAK), report, candidates(vae, rough, recipe), recipe, progress=show)
        assert results is not None
        scores = per_photo(report, results)
    print("\n".join(table(results)))
    rows = {candidate.label: row(candidate) for candidate in results.candidates}
    means = {label: found["psnr"][0] for label, found in rows.items() if label in ON_THE_CARD}
    found = {"vae": vae.fingerprint, "caption": results.caption, "rows": rows}
    return found | {"mean_psnr_db": means, "psnr_db": scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vae", help="a folder, file or hub id; the embedded VAE without it")
    parser.add_argument("--family", help="the config of a bare weights file")
    parser.add_argument("--recipe", choices=list(FILES), default="kodak-512")
    parser.add_argument("--output", type=Path, help="keep the report in this folder")
    parser.add_argument("--times", action="store_true", help="measure speed and memory instead of quality")
    parser.add_argument("--write", action="store_true", help="write results/quality-*.json and the documents' table")
    arguments = parser.parse_args()
    if arguments.times:
        name, found = TIMES, measure_times()
        print(json.dumps(found, indent=2))
    else:
        vae, rough = (VAE.load(arguments.vae, "cpu", dtype, arguments.family) for dtype in ("fp32", "bf16"))
        recipe = replace(find_recipe(arguments.recipe), metrics=METRICS)
        name, found = FILES[arguments.recipe], judge(vae, rough, recipe, arguments.output)
        if vae.name != EMBEDDED and arguments.write:
            raise SystemExit("the documents show the embedded VAE; --write goes without --vae")
    if arguments.write:
        print(f"written to {write_result(name, found)}")
        write_documents()


if __name__ == "__main__":
    main()
