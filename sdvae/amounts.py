"""Amounts as people read them: sizes as width x height, memory in GiB, counts with their noun."""

_DECIMAL = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "bytes"))
_BINARY = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))


def size_text(height: int, width: int) -> str:
    """A size, 1024x768, as files and cameras say it: the width first."""
    return f"{width}x{height}"


def count(number: int, what: str) -> str:
    """A number and its noun: 1 image, 2 images."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def memory_text(num_bytes: int, *, like: int | None = None, is_limit: bool = False) -> str:
    """Memory with three digits, 2.15 GiB: rounded up as what is needed, or down as what is there (`is_limit`).

    What is a whole number of MB, and not of MiB, was given in them and keeps them; so does what is to be `like` it.
    """
    given = num_bytes if like is None else like
    units = _DECIMAL if given and given % 10**6 == 0 and given % 2**20 else _BINARY
    size, unit = next(((size, unit) for size, unit in units if num_bytes >= size), units[-1])
    scale = 1 if size == 1 else next((scale for scale in (100, 10) if num_bytes * scale < 1000 * size), 1)
    rounded = num_bytes * scale // size if is_limit else -(-num_bytes * scale // size)
    number = f"{rounded / scale:.2f}".rstrip("0").rstrip(".")
    return f"{number} {unit}"
