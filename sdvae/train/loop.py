"""The loop: step after step from where the run stands, until it is done, stopped, or broken."""

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from sdvae import atomic
from sdvae.engine.precision import choose_device
from sdvae.errors import ConfigError, OutputError, TrainError
from sdvae.progress import Progress, silent
from sdvae.sources.entries import Source, some_of
from sdvae.sources.open import open_source
from sdvae.train import losses, terms
from sdvae.train.build import build_state
from sdvae.train.config import TrainConfig, load_config, to_toml
from sdvae.train.data import Batch, Loader, Photos, Sampler, find_photos, write_photos
from sdvae.train.optimise import gradients, mean_over_ranks, rate_share, update_average
from sdvae.train.report import Log, RunPaths, write_card, write_picture, write_plots
from sdvae.train.state import State
from sdvae.train.terms import Terms
from sdvae.train.validate import Image, appoint_judge, load_held_out, strip, validate
from sdvae.weights.load import save_folder

_LOG = logging.getLogger(__name__)

_KEYS_TOLD = 64  # of a batch that broke a run


@dataclass(frozen=True)
class TrainReport:
    """What a run came to."""

    step: int
    num_photos: int
    psnr_db: float | None  # of the last validation
    steps_per_s: float  # of this call; 0 where nothing was left to do
    waiting: float  # share of this call's time in which the network waited for photos


def train(
    config: TrainConfig,
    out: str | Path,
    device: str = "auto",
    progress: Progress = silent,
) -> TrainReport:
    """Train in the folder `out`, or go on where a run there stands; afterwards `VAE.load(out)` loads the result.

    On a CPU the weights are the same bits however often the run was interrupted. Several ranks (accelerate launch,
    torchrun) train as one does with the same batch.

    Raises TrainError where the loss is not finite, and the state of the last save is kept; ConfigError for another
    network than the run's; SourceError and OutputError for photos and disks. SIGINT and SIGTERM save, then pass on.
    """
    from accelerate import PartialState

    place = choose_device(device)
    ranks = PartialState(cpu=place.type == "cpu")
    if ranks.num_processes > 1:
        place = ranks.device
    if config.data.source is None:
        raise ConfigError("data.source is missing; name the photos, as in --set data.source=PHOTOS")
    source = open_source(config.data.source)
    paths = RunPaths(Path(out))
    if ranks.is_main_process:
        _begin(paths, config, source, progress)
    ranks.wait_for_everyone()
    run = _Run(config, paths, source, place, ranks.process_index, ranks.num_processes)
    return run.go(progress)


def _begin(paths: RunPaths, config: TrainConfig, source: Source, progress: Progress) -> None:
    """Make the folders, fix the photos, note the config; refuse a folder that is something else."""
    if paths.root.exists() and not paths.config.exists() and any(paths.root.iterdir()):
        raise OutputError(f"{paths.root} holds files, but no training run; give the run a folder of its own")
    for folder in (paths.working, paths.figures):
        atomic.make_folder(folder)
    atomic.sweep(paths.root)
    if not paths.photos.exists():
        write_photos(paths.photos, find_photos(source, config.data, config.seed, paths.scan, progress))
    if paths.state.exists():
        _require_same_networks(paths, load_config(paths.config), config)
    atomic.write_bytes(paths.config, to_toml(config).encode())


def _require_same_networks(paths: RunPaths, before: TrainConfig, now: TrainConfig) -> None:
    """ConfigError for what no state survives; a warning for what else has changed."""
    old, new = _flat(asdict(before)), _flat(asdict(now))
    changed = {name: (old.get(name), new.get(name)) for name in old | new if old.get(name) != new.get(name)}
    told = [f"{name} {was!r} is now {value!r}" for name, (was, value) in sorted(changed.items())]
    fixed = {"seed", "model.family", "model.start", "model.freeze"}
    if before.adversary.weight and now.adversary.weight:
        fixed |= {"adversary.width", "adversary.num_layers"}
    if fixed & changed.keys():
        raise ConfigError(f"{paths.root} was begun with another network: {'; '.join(told)}; begin another run")
    if told:
        _LOG.warning("from here on %s differs: %s", paths.root, "; ".join(told))


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


class _Run:
    """One call of `train` on one rank."""

    def __init__(
        self,
        config: TrainConfig,
        paths: RunPaths,
        source: Source,
        device: torch.device,
        rank: int,
        world_size: int,
    ) -> None:
        self.config, self.paths, self.source, self.device = config, paths, source, device
        self.rank, self.world_size = rank, world_size
        self.photos = Photos.from_file(paths.photos)
        self.state: State = build_state(config, device)
        self.network = self.state.networks.model.config
        self.sampler = Sampler(self.photos.train, config.data, config.seed, self.network.downscale)
        if paths.state.exists():
            self.state.load(paths.state)
        self.saved_step = self.state.step
        self.log = Log(paths, config.output.tensorboard, self.state.step) if rank == 0 else None
        size_px = max(rung.size_px for rung in config.data.ladder)
        self.held_out: list[Image] = load_held_out(source, self.photos.held_out, size_px, self.network.downscale)
        self.judge = appoint_judge(device)
        self.psnr_db: float | None = None

    def go(self, progress: Progress) -> TrainReport:
        """All steps that are left."""
        config, state = self.config, self.state
        first, begun = state.step, time.monotonic()
        progress("train", first, config.steps)
        steps = range(first, config.steps)
        loader = Loader(self.source, self.sampler, config.data, steps, self.device, self.rank, self.world_size)
        waited = 0.0
        with _stop_signals() as stopped, loader:
            if not first:
                self._validate()  # while the loader's processes start
            batches = iter(loader)
            for step in steps:
                asked = time.monotonic()
                parts = [next(batches) for _ in range(config.data.micro_batches)]
                waited += time.monotonic() - asked
                is_stopping = self._step(step, parts, stopped)
                state.step = step + 1
                progress("train", state.step, config.steps)
                is_last = state.step == config.steps
                if state.step % config.output.validate_every == 0 or is_last:
                    self._validate()
                if state.step % config.output.save_every == 0 or is_last or is_stopping:
                    self._save()
                if is_stopping:
                    break
        seconds = time.monotonic() - begun
        num_steps = state.step - first
        speed, waiting = (num_steps / seconds, waited / seconds) if num_steps else (0.0, 0.0)
        return TrainReport(state.step, len(self.photos.train), self.psnr_db, speed, waiting)

    def _step(self, step: int, parts: list[Batch], stopped: list[int]) -> bool:
        """Train one step; whether any rank was told to stop."""
        state, config = self.state, self.config
        rate = self._set_rates(step)
        found: dict[str, float | Tensor] = {}
        for batch in parts:
            for name, value in self._backward(batch, step).items():
                found[name] = found.get(name, 0.0) + value.detach() / len(parts)
        optimizers = [state.optimizer]
        if state.discriminator_optimizer is not None and step >= config.adversary.start_step:
            optimizers.append(state.discriminator_optimizer)
        norms = []
        for optimizer in optimizers:
            shared = gradients(optimizer)
            mean_over_ranks(shared)
            norms.append(_clip(shared, config.optimizer.clip))
        numbers = torch.stack(
            [torch.as_tensor(value, dtype=torch.float32, device=self.device) for value in (*found.values(), *norms)]
        )
        numbers = torch.cat([numbers.float(), numbers.new_tensor([float(bool(stopped))])])
        mean_over_ranks([numbers])
        *values, stop = numbers.tolist()  # the one place where the host waits for the device
        told = dict(zip([*found, "norm", "discriminator_norm"], values, strict=False))
        if not all(map(math.isfinite, values)):
            raise TrainError(self._explain(step, told))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_average(state.average, state.networks.model, step, config.optimizer.ema)
        if self.log is not None and ((step + 1) % config.output.log_every == 0 or step == 0):
            self.log.add(step + 1, told | {"learning_rate": rate, "epoch": self.sampler.epoch(step + 1)})
        return bool(stop > 0.0)

    def _backward(self, batch: Batch, step: int) -> Terms:
        """The gradients of a micro-batch, added to those that are there: of the autoencoder, and of its adversary."""
        networks, adversary = self.state.networks, self.config.adversary
        forward = terms.forward(networks, self.config, batch, step)
        found = dict(forward.terms)
        has_adversary = networks.discriminator is not None and step >= adversary.start_step
        if has_adversary:
            assert networks.discriminator is not None
            networks.discriminator.requires_grad_(False)  # this loss teaches the autoencoder alone
            term = terms.generator_term(networks, self.config, forward.decoded)
            weight = self._adaptive_weight(forward.reconstruction, term) if adversary.adaptive else 1.0
            found["adversarial"] = adversary.weight * weight * term
        loss = torch.stack(list(found.values())).sum()
        torch.autograd.backward(loss / self.config.data.micro_batches)
        if has_adversary:
            assert networks.discriminator is not None
            networks.discriminator.requires_grad_(True)
            theirs = terms.discriminator_terms(networks, self.config, forward.decoded, forward.pixels, step)
            torch.autograd.backward(torch.stack(list(theirs.values())).sum() / self.config.data.micro_batches)
            found |= theirs
        return found

    def _adaptive_weight(self, reconstruction: Tensor, adversarial: Tensor) -> Tensor:
        """From the gradients of all ranks at the last layer."""
        last = self.state.networks.model.decoder.conv_out.weight
        both = [torch.autograd.grad(term, last, retain_graph=True)[0] for term in (reconstruction, adversarial)]
        mean_over_ranks(both)
        return losses.adaptive_weight(*both)

    def _set_rates(self, step: int) -> float:
        share = rate_share(step, self.config.steps, self.config.optimizer)
        rate = self.config.optimizer.learning_rate * share
        self.state.optimizer.param_groups[0]["lr"] = rate
        if self.state.discriminator_optimizer is not None:
            self.state.discriminator_optimizer.param_groups[0]["lr"] = self.config.adversary.learning_rate * share
        return rate

    def _explain(self, step: int, told: dict[str, float]) -> str:
        keys = [crop.record.key for crop in self.sampler.batch(step)]
        more = f" and {len(keys) - _KEYS_TOLD} more" if len(keys) > _KEYS_TOLD else ""
        broken = ", ".join(f"{name} is {value}" for name, value in told.items() if not math.isfinite(value))
        kept = f"the state of step {self.saved_step} is kept" if self.saved_step else "nothing was saved yet"
        return (
            f"step {step + 1} gave no finite loss ({broken}) on the photos {', '.join(keys[:_KEYS_TOLD])}{more}; "
            f"{kept} in {self.paths.root}: look at these photos, or lower optimizer.learning_rate, and run again"
        )

    def _validate(self) -> None:
        """Metrics of the held-out photos, and a picture of some of them."""
        if not self.held_out:
            return
        model, step = self.state.average, self.state.step
        found = validate(model, self.held_out, self.judge, self.rank, self.world_size)
        self.psnr_db = found["psnr"]
        if self.log is not None:
            self.log.add(step, found)
            if self.config.output.pictures:
                write_picture(self.paths.picture(step), strip(model, self.held_out[: self.config.output.pictures]))
            write_plots(self.paths, self.log.lines)

    def _save(self) -> None:
        """Where the run stands, then what others load: the averaged weights and their card."""
        if self.log is not None:
            self.state.save(self.paths.state)
            save_folder(self.paths.root, self.network, self.state.average.state_dict())
            write_card(
                self.paths, self.config, self.network, self.photos, self._source_name(), self.state.step, self.log.lines
            )
        self.saved_step = self.state.step

    def _source_name(self) -> str:
        """What the card calls the photos: no path of this machine."""
        name = self.source.name
        return name if "://" in name else Path(name).name or some_of([name])


def _clip(gradients: list[Tensor], most: float) -> Tensor:
    """Scale gradients so that their norm is `most` or less; the norm before."""
    norm = torch.nn.utils.get_total_norm(gradients)
    scale = (most / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, scale)
    return norm


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Signals that ask to stop, kept until the body has ended in order; then whoever would have had them gets them."""
    told: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def note(signum: int, frame: FrameType | None) -> None:
        told.append(signum)
        if len(told) > 1:  # whoever asks twice does not wait for the step
            restore()
            signal.raise_signal(signum)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        restore()
    if told:
        signal.raise_signal(told[0])
