"""Numbers and lists as a page writes them."""

import math
from collections.abc import Sequence


def number(value: float | None, digits: int) -> str:
    """A number with a typographic minus; an en dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    return f"{value:,.{digits}f}".replace("-", "−")


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)
