"""Seconds of a call on any device, and of several in turns."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Run = Callable[[], object]


def seconds_of(run: Run, device: torch.device) -> float:
    """How long one call takes, until its result is there: by events on a GPU, by the clock elsewhere."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    with torch.cuda.device(device):  # events are recorded on the current one
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) / 1e3


def in_turns(runs: Mapping[str, Run], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each run in each round: A B A B, so that a busy moment or a warm machine serves all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(seconds_of(run, device))
    return seconds


def median_seconds(run: Run, device: torch.device, rounds: int) -> float:
    """The median of `rounds` calls, after one that warms up."""
    run()
    return statistics.median(in_turns({"": run}, rounds, device)[""])
