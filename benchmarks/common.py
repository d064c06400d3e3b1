"""What every benchmark shares: where data is, and where results go with the card of the machine."""

import json
import os
from pathlib import Path
from typing import Any

from sdvae.bench.machine import machine_card

RESULTS = Path(__file__).parent / "results"


def test_data() -> Path:
    """The folder of photos and TAESD weights that tests use, too."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    return Path(os.environ.get("SDVAE_TEST_DATA", beside))


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write `results/NAME.json` with the machine's card."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine_card()} | result, indent=2) + "\n")
    return path
