"""Who runs tasks: this process, the ranks of a launcher, or the workers of a Ray cluster.

Ranks talk to nobody: each takes every n-th shard, and whoever finds all of them committed finishes the store.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from sdvae.config import Padding
from sdvae.encoding.manifest import require_same_vae
from sdvae.encoding.tasks import Count, Work, encode_tasks
from sdvae.encoding.times import Times
from sdvae.errors import ConfigError, SdvaeError, StoreError
from sdvae.sources.entries import Source
from sdvae.store.remote import Mirror
from sdvae.store.store import Store
from sdvae.vae import VAE

_MAX_RETRIES = 10  # of a shard whose Ray worker died


class Runner(Protocol):
    """Encodes and commits the shards of these numbers."""

    def __call__(
        self, store: Store, numbers: Sequence[int], source: Source, vae: VAE, work: Work, count: Count
    ) -> Times:
        """Return where the time went; `count` is told the records dealt with so far."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that a launcher started; alone by default."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> "Ranks":
        """What accelerate, torchrun, srun or a Slurm array say; ConfigError where that makes no sense."""
        try:
            ranks = cls._of_torch(environment) or cls._of_slurm(environment)
        except (KeyError, ValueError) as error:
            raise ConfigError(f"the launcher's variables are incomplete or no numbers: {error}") from error
        if not 0 <= ranks.rank < ranks.world_size:
            raise ConfigError(f"the launcher says rank {ranks.rank} of {ranks.world_size}; ranks count from 0")
        return ranks

    @classmethod
    def _of_torch(cls, environment: Mapping[str, str]) -> "Ranks | None":
        """accelerate, torchrun; also by hand, where RANK and WORLD_SIZE are enough."""
        if "RANK" not in environment:
            return None
        names = (("RANK", None), ("WORLD_SIZE", None), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
        return cls(
            *(int(environment[name] if default is None else environment.get(name, default)) for name, default in names)
        )

    @classmethod
    def _of_slurm(cls, environment: Mapping[str, str]) -> "Ranks":
        """The tasks of srun, times the tasks of an array, if there is one."""
        rank, world_size, local_rank, local_world_size = 0, 1, 0, 1
        # A batch script has a SLURM_PROCID, too, but runs alone: only srun, which makes steps, starts several.
        if "SLURM_PROCID" in environment and ("SLURM_STEP_ID" in environment or "SLURM_JOB_ID" not in environment):
            rank, local_rank = int(environment["SLURM_PROCID"]), int(environment.get("SLURM_LOCALID", "0"))
            world_size = int(environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"])
            on_nodes = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")  # such as 4(x2),1
            local_world_size = int(on_nodes.partition("(")[0].partition(",")[0])
        if "SLURM_ARRAY_TASK_ID" in environment:
            number, first, last, step = (
                int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "MAX", "STEP")
            )
            rank += (number - first) // step * world_size
            world_size *= (last - first) // step + 1
        return cls(rank, world_size, local_rank, local_world_size)

    def share(self, numbers: Sequence[int]) -> Sequence[int]:
        """This rank's part: every n-th."""
        return numbers[self.rank :: self.world_size]


def uploading(runner: Runner, mirror: Mirror) -> Runner:
    """`runner`, with each shard pushed to the store that `mirror` mirrors once it is committed."""

    def run(store: Store, numbers: Sequence[int], source: Source, vae: VAE, work: Work, count: Count) -> Times:
        with mirror.pushing() as push:

            def push_and_count(num_records: int) -> None:
                push()
                count(num_records)

            return runner(store, numbers, source, vae, work, push_and_count)

    return run


# --- Ray ---


@dataclass(frozen=True)
class VAESpec:
    """How a Ray worker loads the VAE that the driver has; a spec of a file means a file that all nodes see."""

    spec: str | None
    family: str | None
    padding: Padding | None = None


class RayRunner:
    """Runs tasks on the Ray cluster at `address`, None for one of its own on this machine.

    A shard whose worker died is encoded by another one. Source, store and VAE must be at the same place on all nodes.
    """

    def __init__(self, vae: VAESpec, address: str | None = None) -> None:
        self.vae, self.address = vae, address

    def __call__(
        self, store: Store, numbers: Sequence[int], source: Source, vae: VAE, work: Work, count: Count
    ) -> Times:
        """Encode and commit the shards of these numbers."""
        times = Times()
        begun = time.monotonic()
        with _cluster(self.address) as ray:
            most = max(node["Resources"].get("CPU", 0) for node in ray.nodes())
            encode = ray.remote(
                num_cpus=min(store.manifest["compute"]["num_threads"], most),
                num_gpus=1 if vae.device.type == "cuda" else 0,
                max_retries=_MAX_RETRIES,
            )(_encode_on_worker)
            dtype = store.manifest["compute"]["dtype"]
            shared = ray.put((store.paths.root, source, self.vae, vae.device.type, dtype, work))
            numbers_of = {encode.remote(shared, number): number for number in numbers}
            num_records = 0
            while numbers_of:
                (done,), _ = ray.wait(list(numbers_of))
                number = numbers_of.pop(done)
                try:
                    times += ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    raise (error.cause if isinstance(error.cause, SdvaeError) else error) from None
                except ray.exceptions.RayError as error:  # the worker died, every time
                    raise StoreError(
                        f"Ray could not encode shard {number}: {type(error).__name__} after {_MAX_RETRIES} retries; "
                        "run the same command again to go on"
                    ) from error
                shard = store.shard(number)
                num_records += shard.num_records if shard.bucket_px else 0
                count(num_records)
        times.all = time.monotonic() - begun
        return times


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """The `ray` module, connected."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ConfigError("Ray is not installed; install sdvae[ray]") from error
    ray.init(
        address, log_to_driver=False, include_dashboard=False if address is None else None, logging_level=logging.ERROR
    )
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():  # Ray takes SIGTERM for itself and exits with 15
            signal.signal(number, handler)
    try:
        yield ray
    finally:
        ray.shutdown()


def _encode_on_worker(shared: tuple[Path, Source, VAESpec, str, str, Work], number: int) -> Times:
    """One task, in a Ray worker."""
    root, source, spec, device, dtype, work = shared
    store, vae = Store.open(root), _load_once(spec, device, dtype)
    require_same_vae(store, vae)
    return encode_tasks(store, [number], source, vae, work)


@lru_cache(maxsize=1)
def _load_once(spec: VAESpec, device: str, dtype: str) -> VAE:
    return VAE.load(spec.spec, device, dtype, spec.family, spec.padding)
