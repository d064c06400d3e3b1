"""How work that takes long tells its caller how far it is."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # (phase, done, all), as in ("scan", 3, 100)


def silent(phase: str, num_done: int, num_all: int) -> None:
    """Tell nobody."""
