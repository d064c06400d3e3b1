"""Images to a device and back while it computes: on a GPU, copies have streams of their own and pinned memory.

images = download(vae.decode(vae.encode(pixels).mode()) for pixels in upload(batches, vae.device))
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdvae.errors import ImageError
from sdvae.pixels import from_levels, to_device, to_images, to_levels


def upload(
    batches: Iterable[NDArray[np.uint8]], device: torch.device
) -> Iterator[Tensor]:  # (N, H, W, 3) -> (N, 3, H, W) fp32 in [-1, 1]
    """The pixels of each batch of images, on `device`; a GPU is sent the next batch before it is given this one."""
    if device.type != "cuda":
        yield from (to_device(images, device) for images in batches)
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    sent: tuple[Tensor, torch.cuda.Event] | None = None
    for images in batches:
        last = sent
        with torch.cuda.stream(stream):
            levels = torch.from_numpy(images).pin_memory().to(device, non_blocking=True)
            sent = levels, stream.record_event()
        if last is not None:
            yield _arrived(*last)
    if sent is not None:
        yield _arrived(*sent)


def _arrived(levels: Tensor, event: torch.cuda.Event) -> Tensor:
    current = torch.cuda.current_stream(levels.device)
    current.wait_event(event)
    levels.record_stream(current)  # its memory was allocated on the other stream
    return from_levels(levels)


def download(
    batches: Iterable[Tensor],
) -> Iterator[NDArray[np.uint8]]:  # (N, 3, H, W) in [-1, 1] -> (N, H, W, 3)
    """The images of each batch of pixels; a GPU is given the next batch before this one is waited for.

    Raises ImageError for NaN or infinity, as `to_images` does.
    """
    streams: dict[torch.device, torch.cuda.Stream] = {}
    fetched: tuple[Tensor, Tensor, torch.cuda.Event] | None = None
    for pixels in batches:
        if not pixels.is_cuda:
            yield to_images(pixels)
            continue
        last = fetched
        if pixels.device not in streams:
            streams[pixels.device] = torch.cuda.Stream(pixels.device)  # type: ignore[no-untyped-call]
        fetched = _fetch(pixels, streams[pixels.device])
        if last is not None:
            yield _finished(*last)
    if fetched is not None:
        yield _finished(*fetched)


def _fetch(pixels: Tensor, stream: torch.cuda.Stream) -> tuple[Tensor, Tensor, torch.cuda.Event]:
    """Levels and whether they are finite, on their way to the host, and when they will be there."""
    results = to_levels(pixels).contiguous(), pixels.isfinite().flatten(1).all(1)
    stream.wait_stream(torch.cuda.current_stream(pixels.device))
    copies = []
    with torch.cuda.stream(stream):
        for result in results:
            copies.append(
                torch.empty(result.shape, dtype=result.dtype, device="cpu", pin_memory=True).copy_(
                    result, non_blocking=True
                )
            )
            result.record_stream(stream)
        return copies[0], copies[1], stream.record_event()


def _finished(levels: Tensor, is_finite: Tensor, event: torch.cuda.Event) -> NDArray[np.uint8]:
    event.synchronize()
    if not is_finite.all():
        index = is_finite.tolist().index(False)
        raise ImageError(f"image {index} of the batch holds NaN or infinite pixels; a wider dtype may help")
    return levels.numpy()
