"""How sure a mean is: the bootstrap's 95% interval."""

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000
_MOST_DRAWS = 2**22  # at once: of resamples times images
_LEVEL = 0.95
_MANY = 20_000  # images, from which the mean is normal and nothing needs to be drawn


def bootstrap_interval(
    values: NDArray[np.float64],  # (N,)
    seed: int = 0,
) -> tuple[float, float] | None:
    """The 95% interval of the mean; None for fewer than two values.

    Percentiles of the means of resamples, at levels widened as Student's t asks (Hesterberg 2015, "expanded percentile
    interval"): plain percentiles are too narrow by a factor of sqrt((n - 1) / n) and more for few images.
    """
    num = len(values)
    if num < 2:
        return None
    if num > _MANY:
        half = NormalDist().inv_cdf(0.5 + _LEVEL / 2) * float(values.std(ddof=1)) / math.sqrt(num)
        return float(values.mean()) - half, float(values.mean()) + half
    rng = np.random.default_rng(seed)
    rows = max(1, _MOST_DRAWS // num)
    means = np.concatenate(
        [
            values[rng.integers(0, num, (min(rows, NUM_RESAMPLES - start), num))].mean(1)
            for start in range(0, NUM_RESAMPLES, rows)
        ]
    )
    tail = NormalDist().cdf(-math.sqrt(num / (num - 1)) * _student(num - 1))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _student(freedom: int) -> float:
    """Student's t at 97.5%, by the Cornish-Fisher expansion: to 0.2% from 5 degrees of freedom on."""
    z = NormalDist().inv_cdf(0.5 + _LEVEL / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + float(sum(term / freedom**power for power, term in enumerate(terms, 1)))
