"""Independent pieces of work on threads: where cores are busy, one that is late keeps no other waiting.

Torch splits each operation over its threads, and all wait for the last one before the next operation. Whole images
need not wait for each other.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(num_threads: int) -> Iterator[None]:
    """So many threads of torch's for what the calling thread does inside."""
    before = torch.get_num_threads()
    if num_threads == before:
        yield
        return
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_apart(work: Sequence[Callable[[], None]], num_workers: int, num_threads: int) -> None:
    """Do all the work, so many pieces at a time, each with `num_threads` of torch's threads and without gradients."""

    @torch.no_grad()  # which holds for a thread, as the number of torch's threads does
    def run_each(share: Sequence[Callable[[], None]]) -> None:
        for piece in share:
            piece()

    with torch_threads(num_threads):
        if num_workers == 1:
            run_each(work)
            return
        shares = [work[first::num_workers] for first in range(num_workers)]
        with ThreadPoolExecutor(num_workers - 1, initializer=lambda: torch.set_num_threads(num_threads)) as pool:
            others = [pool.submit(run_each, share) for share in shares[1:]]
            run_each(shares[0])
        for other in others:
            other.result()
