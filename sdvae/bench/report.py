"""What was measured, as JSON (benchmarks/README.md describes it) and as a table."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from sdvae.amounts import count, size_text
from sdvae.bench.machine import machine_card
from sdvae.bench.throughput import Measurement, Row, measure_roofline
from sdvae.vae import VAE

SCHEMA = 2  # of the JSON


def report(vae: VAE, measurements: Sequence[Measurement]) -> dict[str, Any]:
    """All that was measured; the roofline is measured now, in each dtype that was timed."""
    dtypes = sorted({row.dtype for measurement in measurements for row in measurement.rows if row.seconds})
    peaks = {dtype: measure_roofline(vae.device, dtype) for dtype in dtypes}
    return {
        "schema": SCHEMA,
        "machine": machine_card(),
        "vae": vae.name,
        "device": str(vae.device),
        "roofline_tflops": peaks,
        "measurements": [
            asdict(measurement.settings)
            | {
                "gflop": measurement.flops / 1e9,
                "predicted_bytes": measurement.predicted_bytes,
                "rows": [_values(row, measurement, peaks) for row in measurement.rows],
            }
            for measurement in measurements
        ],
    }


def table(result: dict[str, Any]) -> Iterator[str]:
    """The lines that a person reads."""
    card = result["machine"]
    yield (
        f"{card['gpu'] or card['cpu']}; {card['usable_cores']} cores, {card['threads']} threads, "
        f"{card['cpu_capability']}; torch {card['torch']}, diffusers {card['diffusers']}"
    )
    yield f"{result['vae']} on {result['device']}; medians of runs in turns, their spread beside"
    for dtype, tflops in result["roofline_tflops"].items():
        yield f"roofline: {tflops:.3g} TFLOP/s, a large matrix product in {dtype}"
    for one in result["measurements"]:
        yield ""
        size, batch = size_text(one["height"], one["width"]), count(one["batch_size"], "image")
        yield f"{one['direction']} {size} px, {batch}, {count(one['rounds'], 'round')}"
        yield (
            f"  {'':<44}{'median s':>10}{'spread':>9}{'error':>10}{'images/s':>10}{'TFLOP/s':>9}{'roofline':>10}"
            f"{'times ours':>12}{'peak MB':>9}"
        )
        yield from (_line(row) for row in one["rows"])
        yield f"  sdvae's plan predicts {one['predicted_bytes'] / 1e6:.0f} MB"


def _values(row: Row, measurement: Measurement, peaks: dict[str, float]) -> dict[str, Any]:
    median_s, our_median_s = row.median_s, measurement.rows[0].median_s
    tflops = measurement.flops / median_s / 1e12 if median_s else None
    return asdict(row) | {
        "median_s": median_s,
        "images_per_s": measurement.settings.batch_size / median_s if median_s else None,
        "tflops": tflops,
        "roofline_fraction": tflops / peaks[row.dtype] if tflops else None,
        "times_as_long": median_s / our_median_s if median_s and our_median_s else None,
    }


def _line(row: dict[str, Any]) -> str:
    title = f"  {row['name']} ({row['dtype']}, {row['memory_format']})".ljust(46)
    if row["refused"]:
        return f"{title}   {row['refused']}"
    spread = (max(row["seconds"]) - min(row["seconds"])) / row["median_s"]
    ratio = "" if row["times_as_long"] is None else f"{row['times_as_long']:.2f}"
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
    return (
        f"{title}{row['median_s']:>10.4g}{spread:>9.0%}{row['relative_error']:>10.2g}{row['images_per_s']:>10.3g}"
        f"{row['tflops']:>9.3g}{row['roofline_fraction']:>10.0%}{ratio:>12}{peak:>9}"
    )
