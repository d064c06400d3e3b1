"""What img2dataset could not fetch: it writes `00000_stats.json` beside each of its tars, folders or tables."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from sdvae.sources.entries import PARSER_FAILURES

_STATS = re.compile(r"(?:.*/)?\d+_stats\.json")


def failed_downloads(root: Path, names: Iterable[str]) -> list[str]:
    """What the statistics among these files below `root` say of samples that have no photo: nothing, or a sentence."""
    num_all, num_good, reasons = 0, 0, Counter[str]()
    for name in filter(_STATS.fullmatch, names):
        try:
            told = json.loads((root / name).read_bytes())
            num_all, num_good = num_all + int(told["count"]), num_good + int(told["successes"])
            reasons.update({str(reason): int(number) for reason, number in told["status_dict"].items()})
        except (OSError, *PARSER_FAILURES):
            continue  # of another program
    if num_good == num_all:
        return []
    del reasons["success"]
    why = "; ".join(f"{number} {reason}" for reason, number in reasons.most_common(3))
    return [f"img2dataset fetched {num_good} of {num_all} photos; the others are not there ({why})"]
