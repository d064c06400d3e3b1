"""Aspect-ratio buckets: the sizes that photos of other shapes are resized to, and which of them a photo gets."""

import difflib
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from sdvae.amounts import size_text
from sdvae.errors import ConfigError

Size = tuple[int, int]  # (height, width) in pixels


def _within(area: int, step: int, shortest: int, longest: int) -> tuple[Size, ...]:
    """For every side the longest other side that keeps the area; both ways round."""
    sides = range(shortest, longest + step, step)
    others = [min(longest, area // side // step * step) for side in sides]
    found = {*zip(sides, others, strict=True), *zip(others, sides, strict=True)}
    return tuple(sorted(found))


# (shorter, longer side) of Stable Diffusion XL's training: the table in its paper, arXiv 2307.01952, appendix I.
_SDXL = (
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600),
    (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152),
    (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024),
)  # fmt: skip

# A store's manifest holds the name: the sizes under it never change.
TABLES: dict[str, tuple[Size, ...]] = {
    "sd1": _within(512 * 512, step=64, shortest=256, longest=1024),  # what SD 1's fine-tuners use, after NovelAI
    "sdxl": tuple(sorted({size for a, b in _SDXL for size in ((a, b), (b, a))})),
}


@lru_cache(maxsize=8)
def bucket_sizes(buckets: str | tuple[Size, ...], downscale: int = 1) -> tuple[Size, ...]:
    """The sizes of a named or given table, by ascending height / width.

    Raises ConfigError for an unknown name, for a size that is no multiple of `downscale`, and for a table that is
    empty or has two sizes of one aspect ratio: nothing could tell which of them a photo belongs to.
    """
    if isinstance(buckets, str):
        if buckets not in TABLES:
            close = difflib.get_close_matches(buckets, TABLES, n=3, cutoff=0.3) or sorted(TABLES)
            raise ConfigError(f"unknown buckets {buckets!r}; did you mean {', '.join(close)}?")
        buckets = TABLES[buckets]
    if not buckets or not all(len(size) == 2 and min(size) >= 1 for size in buckets):
        raise ConfigError(f"buckets {buckets} are no table of sizes (height, width)")
    for height, width in buckets:
        if height % downscale or width % downscale:
            raise ConfigError(
                f"a bucket of {size_text(height, width)} is no multiple of {downscale}, which one latent covers"
            )
    sizes = sorted(buckets, key=lambda size: size[0] / size[1])
    for size, other in pairwise(sizes):
        if size[0] * other[1] == other[0] * size[1]:
            first, second = size_text(*size), size_text(*other)
            raise ConfigError(f"buckets {first} and {second} have one aspect ratio; keep one of them")
    return tuple(sizes)


def nearest_bucket(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """The size whose aspect ratio is nearest on a logarithmic scale, so that portrait and landscape are treated alike.

    `sizes` come from `bucket_sizes`. Of two that are equally near, the wider one.
    """
    low, high = 0, len(sizes) - 1
    while low < high:
        middle = (low + high) // 2
        (below_height, below_width), (above_height, above_width) = sizes[middle], sizes[middle + 1]
        # Between two ratios lies their geometric mean: (height / width)^2 against the product of both, in integers.
        if height * height * below_width * above_width <= width * width * below_height * above_height:
            high = middle
        else:
            low = middle + 1
    return sizes[low]
