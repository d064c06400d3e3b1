"""Decoding processes, forked from one process that has imported what they need."""

import gc
import importlib
import logging
import math
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle

import numpy as np
from numpy.typing import NDArray

from sdvae.encoding.load_photo import load
from sdvae.encoding.times import Times
from sdvae.store.geometry import Preprocess


class ForkServer:
    """A process that has imported what decoding takes, and forks the processes that decode.

    So they start at once and share what the import of torch costs: a second, and 150 MB. They are no forks of this
    process, for they would hold the locks of threads they do not have, and none of multiprocessing, which would run the
    user's script again. It ends when its connection does, however this process ended.
    """

    def __init__(self, preprocess: Preprocess, memory_descriptor: int, num_bytes: int) -> None:
        self._connection, theirs = pipe()
        modules = ["sdvae.images.read", *(["torch"] if preprocess.resizer == "torch" else [])]
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from sdvae.encoding.fork_server import serve; "
            f"serve({theirs.fileno()}, {memory_descriptor}, {num_bytes}, {modules})"
        )
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), memory_descriptor),
                env=os.environ | {"OMP_NUM_THREADS": "1"},  # the processes themselves share the cores
                process_group=0,  # Ctrl-C is for the encoder, which then ends the processes
            )

    def fork(self) -> tuple[int, Connection]:
        """The number of a new process, and the connection to it; EOFError or an OSError where none is made any more."""
        ours, theirs = pipe()
        with theirs:
            self._connection.send(None)
            send_handle(self._connection, theirs.fileno(), self._process.pid)
        return self._connection.recv(), ours

    def wait(self, number: int) -> int:
        """The exit code of a process that ended; that of a kill where nobody knows it any more."""
        try:
            self._connection.send(number)
            return int(self._connection.recv())
        except (EOFError, OSError):
            return -signal.SIGKILL

    def close(self) -> int:
        """End the process, whose forks have ended; the exit code, should it have ended before."""
        self._connection.close()
        self._process.kill()
        return self._process.wait()


def pipe() -> tuple[Connection, Connection]:
    """The two ends of a new connection."""
    one, other = socket.socketpair()
    return Connection(one.detach()), Connection(other.detach())


# --- In the processes ---


def serve(connection_descriptor: int, memory_descriptor: int, num_bytes: int, modules: Sequence[str]) -> None:
    """Fork a process for each None that comes, and wait for each number, until nobody is left who could send."""
    for told in (signal.SIGINT, signal.SIGTERM):  # by a launcher, to everyone; the encoder decides
        signal.signal(told, signal.SIG_IGN)
    connection = Connection(connection_descriptor)
    memory = np.frombuffer(mmap.mmap(memory_descriptor, num_bytes), np.uint8)
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # a collection in a fork would write to, and so copy, what all of them share
    with suppress(EOFError, ConnectionResetError, BrokenPipeError):
        while True:
            number = connection.recv()
            if number is not None:
                connection.send(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]))
                continue
            descriptor = recv_handle(connection)
            number = os.fork()
            if not number:
                connection.close()
                return work(Connection(descriptor), memory)
            os.close(descriptor)
            connection.send(number)


def work(connection: Connection, memory: NDArray[np.uint8]) -> None:
    """Decode what comes, until nobody is left who could send."""
    threading.Thread(target=_end_with, args=(connection.fileno(),), daemon=True).start()
    _mute_native_code()
    with suppress(EOFError, ConnectionResetError, BrokenPipeError):
        source, preprocess, level = connection.recv()
        logging.getLogger("sdvae").setLevel(level)
        connection.send("ready")
        while True:
            record, offset, shape = connection.recv()
            times = Times()
            out = memory[offset : offset + math.prod(shape)].reshape(shape)
            connection.send((load(source, preprocess, record, out, times), times))


def _mute_native_code() -> None:
    """Leave standard error to Python: libtiff would print 150 lines for one bad file, which Python tells in one."""
    if sys.stderr is not None:
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _end_with(descriptor: int) -> None:
    """End the process when the other side of the connection is gone, even in the middle of a photo."""
    poll = select.poll()
    poll.register(descriptor, 0)  # reports a hang-up, asked or not
    poll.poll()
    os._exit(0)
