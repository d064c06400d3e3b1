"""Photos to batches: processes that read, decode and resize into memory they share with the encoder.

A decoder is native code fed with files from anywhere. It runs where its crash costs one photo and not the run.
"""

import logging
import math
import mmap
import os
import queue
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from types import TracebackType
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from sdvae.encoding.fork_server import ForkServer, pipe
from sdvae.encoding.load_photo import Failure, load
from sdvae.encoding.times import Times
from sdvae.errors import StoreError
from sdvae.sources.entries import Source
from sdvae.store.buckets import Size
from sdvae.store.geometry import Preprocess
from sdvae.store.records import Record

Staged = TypeVar("Staged")
Plan = Iterable[tuple[Size, Sequence[Record]]]  # batches: the size of their images, and whose they are

_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT}  # what broken native code dies of
_MAX_CRASHES = 2  # of processes at work on one record; then it is quarantined
_MAX_KILLS = 3  # by other signals; then the run stops, for they say nothing about the record
_AHEAD = 2  # records a process is given, so that it need not wait for the next


class Decoders(Generic[Staged]):
    """Iterates over the batches of `plan`, in order: what `stage` made of the images, and the failures among them.

    `stage` gets images (rows, H, W, channels) uint8, all zeros where a record failed, and must copy them. It runs on a
    thread, one batch ahead of who iterates. With `times.num_workers` 0 that thread reads and decodes, too.

    A record whose process died of a crash has a second try in a process of its own; if that dies, too, the record has
    failed. StoreError where processes die of anything else.
    """

    def __init__(
        self,
        source: Source,
        preprocess: Preprocess,
        plan: Plan,
        slot_bytes: int,
        stage: Callable[[NDArray[np.uint8]], Staged],
        times: Times,
    ) -> None:
        self._times = times
        self._source, self._preprocess, self._stage = source, preprocess, stage
        self._plan = iter(plan)
        self._num_workers = times.num_workers
        self._slot_bytes = slot_bytes
        self._todo: deque[_Job] = deque()
        self._making: deque[_Batch] = deque()
        self._ready: queue.Queue[tuple[Staged, list[Failure | None]] | None] = queue.Queue()
        self._workers: list[_Worker] = []
        self._fork_server: ForkServer | None = None
        self._is_stopping = False

    def __enter__(self) -> "Decoders[Staged]":
        self._memory = _SharedMemory(self._slot_bytes, num_slots=2 + self._num_workers * _AHEAD)
        self._wake_up, self._woken = pipe()
        self._thread = ThreadPoolExecutor(1, "sdvae-decode")
        self._pump = self._thread.submit(self._run)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_stopping = True
        self._wake_up.send_bytes(b"x")
        self._thread.shutdown()
        for worker in self._workers:
            worker.kill()
        if self._fork_server:
            self._fork_server.close()
        for connection in (self._wake_up, self._woken):
            connection.close()
        self._memory.close()

    def __iter__(self) -> Iterator[tuple[Staged, list[Failure | None]]]:
        while (batch := self._ready.get()) is not None:
            self._wake_up.send_bytes(b"x")  # there is room for the next
            yield batch
        self._pump.result()  # raises what ended it early

    def _run(self) -> None:
        try:
            self._workers += [self._start_worker() for _ in range(self._num_workers)]
            while not self._is_stopping:
                self._deliver()
                if not self._fill():
                    break
                if self._workers:
                    self._dispatch()
                else:
                    self._work_here()
                self._listen()
        finally:
            self._ready.put(None)

    def _fill(self) -> bool:
        """Begin batches while there are free slots; False when all is done."""
        while (slot := self._memory.take()) is not None:
            planned = next(self._plan, None)
            if planned is None:
                self._memory.give_back(slot)
                break
            (height, width), records = planned
            images = self._memory.images(slot, (len(records), height, width, self._preprocess.num_channels))
            batch = _Batch(slot, images, [None] * len(records), len(records))
            self._making.append(batch)
            self._todo += [_Job(batch, row, record) for row, record in enumerate(records)]
        return bool(self._making)

    def _can_deliver(self) -> bool:
        return bool(self._making) and not self._making[0].num_left and self._ready.empty()

    def _deliver(self) -> None:
        while self._can_deliver():
            batch = self._making.popleft()
            begun = time.perf_counter()
            staged = self._stage(batch.images)
            self._times.copy += time.perf_counter() - begun
            self._memory.give_back(batch.slot)
            self._ready.put((staged, batch.failures))

    def _work_here(self) -> None:
        if self._todo:
            job = self._todo.popleft()
            job.finish(load(self._source, self._preprocess, job.record, job.image, self._times))

    def _dispatch(self) -> None:
        for _ in range(_AHEAD):
            for worker in self._workers:
                if self._todo and len(worker.jobs) < _AHEAD and not worker.is_alone:
                    worker.give(self._todo.popleft(), self._memory)

    def _listen(self) -> None:
        """Wait for something to do."""
        has_work_here = self._can_deliver() or (not self._workers and bool(self._todo))
        sources = [self._woken, *(worker.connection for worker in self._workers)]
        heard = wait(sources, timeout=0 if has_work_here else None)
        if self._woken in heard:
            self._woken.recv_bytes()
        for place, worker in enumerate(self._workers):
            if worker.connection in heard:
                try:
                    worker.hear(self._times)
                except (EOFError, ConnectionResetError):
                    self._workers[place] = self._replace(worker)

    def _start_worker(self) -> "_Worker":
        for _ in range(_MAX_KILLS):
            self._fork_server = self._fork_server or ForkServer(
                self._preprocess, self._memory.descriptor, self._memory.num_bytes
            )
            try:
                return _Worker(self._source, self._preprocess, self._fork_server)
            except (EOFError, ConnectionResetError, BrokenPipeError):
                self._require_killed(self._fork_server.close(), "its start")
                self._fork_server = None
        raise StoreError(
            f"decoding processes were killed {_MAX_KILLS} times at their start; should memory be short, give fewer "
            "workers; run the same command again to go on"
        )

    def _replace(self, dead: "_Worker") -> "_Worker":
        """A process for a dead one, with the record it died of, should that be to blame, and no other."""
        exit_code = dead.wait()
        if exit_code >= 0 or not dead.jobs:
            self._require_killed(exit_code, dead.jobs[0].record.key if dead.jobs else "its start")
            return self._start_worker()
        job = dead.jobs.popleft()
        self._todo.extendleft(reversed(dead.jobs))
        died_of = signal.Signals(-exit_code)
        if died_of in _CRASHES and dead.is_ready:
            return self._retry_alone(job, died_of)
        job.num_kills += 1
        if job.num_kills == _MAX_KILLS:
            raise StoreError(
                f"decoding processes were killed {_MAX_KILLS} times by {died_of.name}, at last at {job.record.key}; "
                "should memory be short, give fewer workers; run the same command again to go on"
            )
        self._todo.appendleft(job)
        return self._start_worker()

    def _require_killed(self, exit_code: int, place: str) -> None:
        if exit_code >= 0:
            raise StoreError(
                f"a decoding process of {self._source.name} ended with exit code {exit_code} at {place}, its message "
                "is above; to decode without processes, give 0 workers"
            )

    def _retry_alone(self, job: "_Job", died_of: signal.Signals) -> "_Worker":
        job.num_crashes += 1
        if job.num_crashes == _MAX_CRASHES:
            job.image[...] = 0
            job.finish(Failure("decode", f"its decoder crashed, and again in a process of its own ({died_of.name})"))
            return self._start_worker()
        worker = self._start_worker()
        worker.give(job, self._memory)
        worker.is_alone = True
        return worker


@dataclass
class _Batch:
    slot: int
    images: NDArray[np.uint8]  # (rows, H, W, channels), in shared memory
    failures: list[Failure | None]
    num_left: int


@dataclass
class _Job:
    batch: _Batch
    row: int
    record: Record
    num_crashes: int = 0
    num_kills: int = 0

    @property
    def image(self) -> NDArray[np.uint8]:
        image: NDArray[np.uint8] = self.batch.images[self.row]
        return image

    def finish(self, failure: Failure | None) -> None:
        self.batch.failures[self.row] = failure
        self.batch.num_left -= 1


class _SharedMemory:
    """Slots for batches in memory without a name, which no kill can leave behind.

    Not multiprocessing's SharedMemory: it lies in /dev/shm, which is 64 MB in a container, and needs a process of its
    own to clean up. Pages take memory when they are first written.
    """

    def __init__(self, slot_bytes: int, num_slots: int) -> None:
        self.slot_bytes = slot_bytes
        self.num_bytes = max(1, slot_bytes * num_slots)
        if hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("sdvae")
        else:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        try:
            os.ftruncate(self.descriptor, self.num_bytes)
            self._bytes = np.frombuffer(mmap.mmap(self.descriptor, self.num_bytes), np.uint8)
        except OSError as error:  # the limit of files counts here, too
            os.close(self.descriptor)
            raise StoreError(
                f"cannot have {self.num_bytes:,} bytes of memory that processes share: {error.strerror}; "
                "raise the limits of this shell (ulimit -f and -v), or give fewer --workers or a smaller --batch-size"
            ) from error
        self._free = list(range(num_slots))

    def take(self) -> int | None:
        return self._free.pop() if self._free else None

    def give_back(self, slot: int) -> None:
        self._free.append(slot)

    def images(self, slot: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        start = slot * self.slot_bytes
        return self._bytes[start : start + math.prod(shape)].reshape(shape)

    def offset(self, image: NDArray[np.uint8]) -> int:
        return image.ctypes.data - self._bytes.ctypes.data

    def close(self) -> None:
        """Give up the descriptor; the mapping goes with the last array that looks at it."""
        os.close(self.descriptor)


class _Worker:
    """A decoding process, and the records it was given, in the order in which it works.

    It ends when its connection does, however this process ended.
    """

    def __init__(self, source: Source, preprocess: Preprocess, fork_server: ForkServer) -> None:
        self.jobs: deque[_Job] = deque()
        self.is_ready = False  # a death before says nothing about a record
        self.is_alone = False  # with a record that a process died of
        self._fork_server = fork_server
        self._number, self.connection = fork_server.fork()
        self._send((source, preprocess, logging.getLogger("sdvae").getEffectiveLevel()))

    def give(self, job: _Job, memory: _SharedMemory) -> None:
        self.jobs.append(job)
        self._send((job.record, memory.offset(job.image), job.image.shape))

    def hear(self, times: Times) -> None:
        """Take in one answer; EOFError or ConnectionResetError where the process died."""
        answer = self.connection.recv()
        if not self.is_ready:
            self.is_ready = True
            return
        failure, spent = answer
        self.jobs.popleft().finish(failure)
        times.read += spent.read
        times.decode += spent.decode
        self.is_alone = False

    def wait(self) -> int:
        """The exit code of a process that ended."""
        self.connection.close()
        return self._fork_server.wait(self._number)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._number, signal.SIGKILL)
        self.wait()

    def _send(self, message: object) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # its death will be heard, too
            self.connection.send(message)
