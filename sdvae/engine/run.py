"""Engine: encodes and decodes with the weights of a module that is alive, be it ours or diffusers'."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sdvae.config import PADDINGS, Padding, VAEConfig
from sdvae.engine import ops
from sdvae.engine.blueprint import Blueprint, padding_modes
from sdvae.engine.calibrate import calibrate
from sdvae.engine.describe import describe_plan
from sdvae.engine.graphs import Executor
from sdvae.engine.memory import free_bytes, parse_bytes
from sdvae.engine.plan import IMAGES_AT_ONCE, Plan, make_plan
from sdvae.engine.precision import full_precision, inference
from sdvae.engine.program import Program, compile_program
from sdvae.engine.selfcheck import trusted_kernels, why_torch
from sdvae.engine.session import DeviceSession
from sdvae.engine.stages import Direction, build_network
from sdvae.errors import BudgetError
from sdvae.model import AutoencoderKL

logger = logging.getLogger(__name__)

Budget = int | str | None  # bytes, "6GiB", or what the device has free

_DESCRIBED_PX = 512
_MOST_PLANS = 64  # that are kept
_ALWAYS_FREE = 2**24  # bytes for which the device is not asked: that would take 1% of so small a run
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Engine:
    """Encodes and decodes with the layers of `source`, whose names are those of `AutoencoderKL`.

    For inference their weights are rewritten and packed into a program (`program.py`), which runs under a plan. Before
    each run the weights are compared with what was packed, bit sum by bit sum, so that nothing packed is ever stale:
    but not while nobody else holds the module (`is_private`). An image that overflows in a reduced dtype runs again in
    fp32.

    Where gradients are wanted, or a layer is more than its weights (adapters, offload hooks, another stride), the
    layers themselves run in the reference network; `obstacle` says why. `blueprint` tells what is known of each. Only
    `padding_mode`, where all layers have one that is known, becomes that of `config`.

    `calls` counts the runs of a network: one for each encode and decode, or for each tile of diffusers'.
    One call at a time: the engine holds no lock.
    """

    def __init__(
        self,
        source: nn.Module,
        config: VAEConfig,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        is_private: bool = False,
    ) -> None:
        """`device` and `dtype` are what it computes in; those of the weights where None.

        `is_private`: nobody else holds `source`, which therefore cannot change until someone asks the engine for it.
        """
        self._source = source
        self._is_private = is_private
        self.config = config
        self.calls = 0
        # Whether results have the same bits whatever memory is free; a budget that would change them is refused.
        self.is_deterministic = False
        self.images_at_once = IMAGES_AT_ONCE  # small images that run at once; 0: all run in strips
        self._device, self._dtype = device, dtype
        with torch.device("meta"):
            self._model, blueprint = AutoencoderKL(config), self._build()
        self.layer_names = frozenset(
            name for name, module in self._model.named_modules() if any(True for _ in module.parameters(recurse=False))
        )
        self.blueprint = Blueprint(blueprint, self.layer_names)
        self._layers: dict[str, nn.Module] = {}
        self._programs: dict[Direction, tuple[object, Program]] = {}
        self._executors: dict[Direction, Executor] = {}
        self._session: DeviceSession | None = None  # on the device of the last run
        self._float32: Engine | None = None  # the twin that runs what overflows
        self._original: Engine | None = None  # whose twin this is
        self._plans: dict[tuple[object, ...], Plan] = {}  # those that no budget changed
        self._in_layers: str | None = None  # the obstacle that was found there
        self._is_checked = False
        self._last_obstacle: str | None = None  # to the last call

    def _build(self) -> nn.Module:
        """The source as its config builds it."""
        return AutoencoderKL(self.config)

    def departure(self) -> str | None:
        """What of the blocks around the layers our network would pass by, or None."""
        return self.blueprint.foreign_block(self._source)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy starts with: packed weights cannot be copied, and are made again when they are needed."""
        return vars(self) | {"_programs": {}, "_executors": {}, "_session": None, "_float32": None}

    @property
    def source(self) -> nn.Module:
        """The module with the weights. Who asks for it may change it: from now on it is looked at before each run."""
        (self._original or self)._is_private = False
        return self._source

    @property
    def _is_watched(self) -> bool:
        """Whether the module may have changed since it was packed."""
        return not (self._original or self)._is_private

    def encode_moments(self, pixels: Tensor, budget: Budget = None) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, 2C, H/8, W/8), sizes floored: the encoder's output, after `quant_conv`."""
        return self._run("encode", pixels, budget)

    def decode(self, latents: Tensor, budget: Budget = None) -> Tensor:  # raw (N, C, h, w) -> (N, 3, 8h, 8w)
        """Pixels of raw latents."""
        return self._run("decode", latents, budget)

    def in_float32(self) -> "Engine":
        """The twin that computes in fp32, as deterministic as this engine is now; itself if it computes in fp32."""
        device, dtype = self._place()
        if dtype == torch.float32:
            return self
        if self._float32 is None:
            self._float32 = Engine(self._source, self.config, device, torch.float32)
            self._float32._original = self
        self._float32.is_deterministic, self._float32.images_at_once = self.is_deterministic, self.images_at_once
        return self._float32

    def plan(self, direction: Direction, height: int, width: int, num_images: int = 1, budget: Budget = None) -> Plan:
        """The plan for inputs of this size; BudgetError where no plan keeps the budget."""
        device, dtype = self._place()
        num_threads = torch.get_num_threads()
        make = partial(
            make_plan,
            build_network(self.config, direction),
            height,
            width,
            dtype.itemsize,
            num_images=num_images,
            is_deterministic=self.is_deterministic,
            is_gpu=device.type != "cpu",
            images_at_once=self.images_at_once,
            num_threads=num_threads,
        )
        share = None if self.is_deterministic else min(-(-num_images // num_threads), self.images_at_once)
        key = direction, height, width, device, dtype, self.images_at_once, num_threads, share
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) == _MOST_PLANS:
                self._plans.clear()
            plan = self._plans[key] = make()
        num_bytes = plan.predict_bytes(num_images)
        if budget is None and num_bytes < _ALWAYS_FREE:
            return plan
        budget_bytes = self._free_bytes(device, direction) if budget is None else parse_bytes(budget)
        if budget_bytes is None or num_bytes <= budget_bytes:
            return plan
        return make(budget_bytes=budget_bytes, host_bytes=self._host_bytes(device))

    def _free_bytes(self, device: torch.device, direction: Direction) -> int | None:
        """What a run may take: a graph's memory too, which is its own, or is given back before another size runs."""
        free, executor = free_bytes(device), self._executors.get(direction)
        return free if free is None or executor is None else free + executor.held_bytes

    def _host_bytes(self, device: torch.device) -> int:
        """What of the host's memory a plan may take: only Triton's kernels reach into it."""
        if trusted_kernels(device) is ops:
            return 0
        return free_bytes(torch.device("cpu")) or 0

    def program(self, direction: Direction) -> Program:
        """The packed weights of one direction, packed anew if the source's have changed."""
        known = self._programs.pop(direction, None)
        if known is not None and not self._is_watched:
            self._programs[direction] = known
            return known[1]
        device, dtype = self._place()
        weights = self._weights(direction)
        state = self._state(weights)
        if known is None or known[0] != state:
            known = None  # before the new one is made
            is_scaled = dtype == torch.float16
            with inference(), self._on(device).guard():
                kernels = trusted_kernels(device)
                exponents = calibrate(self.config, direction, weights, device, kernels) if is_scaled else {}
                known = state, compile_program(self.config, direction, weights, dtype, device, exponents, kernels)
        self._programs[direction] = known
        return known[1]

    def _state(self, weights: dict[str, Tensor]) -> tuple[object, ...]:
        """What a program was made of; equal if nothing has changed since."""
        return (*self._place(), _bit_sums(weights))

    def release(self) -> None:
        """Forget what is packed and captured; it will be packed again when it is needed."""
        self._programs.clear()
        self._executors.clear()
        if self._session is not None:
            self._session.release()
        self._float32 = None

    def obstacle(self, batch: Tensor | None = None) -> str | None:
        """Why the reference network would run (on `batch`), or None."""
        if torch.is_grad_enabled():
            tensors = self._source.parameters() if batch is None else (batch, *self._source.parameters())
            if any(tensor.requires_grad for tensor in tensors):
                return "gradients are wanted"
        if torch.compiler.is_compiling():
            return "torch.compile is at work"
        if self._is_watched or not self._is_checked:
            self._in_layers, self._is_checked = self._obstacle_within(), True
        if self._in_layers is not None:
            return self._in_layers
        if self._dtype is None and torch.is_autocast_enabled(self._place()[0].type):  # a VAE computes in its own
            return "autocast is at work"
        return None

    def _obstacle_within(self) -> str | None:
        """What the source is beside its weights, or how these are kept, that the engine cannot run; or None."""
        if isinstance(self._source, AutoencoderKL) and (reason := self.departure()):  # else `stands_in` has asked
            return reason
        layers = dict(self._borrowed())
        for name, layer in layers.items():
            if reason := self.blueprint.foreign_layer(name, layer):
                return f"{name} {reason}"
        modes = padding_modes(layers.values())
        if len(modes) > 1 or not modes <= set(PADDINGS):
            return f"the padding_mode of its convolutions is {' and '.join(sorted(modes))}"
        self._set_padding(next(mode for mode in PADDINGS if mode in modes))
        parameters = list(self._source.parameters())
        dtypes = {parameter.dtype for parameter in parameters}
        if len(dtypes) > 1 or not dtypes <= set(_DTYPES) or any(parameter.is_meta for parameter in parameters):
            return f"the weights are {', '.join(sorted(map(str, dtypes)))}, or not here"
        return None

    def _set_padding(self, padding: Padding) -> None:
        if padding != self.config.padding:
            self.config = replace(self.config, padding=padding)
            self._plans.clear()
            self.release()

    def describe(self) -> str:
        """What ran in the last call, or would run in a first: stages, strips, kernels and memory at 512x512 pixels."""
        obstacle = self._last_obstacle or self._present_obstacle()
        device, dtype = self._place() if obstacle is None else self._weights_place()
        where = f"{str(dtype).removeprefix('torch.')} on {device}"
        if obstacle is not None:
            return f"sdvae's reference network, {where}, because {obstacle}"
        reason = why_torch(device)
        lines = [f"sdvae's engine, {where}" + (f", by torch's operations, because {reason}" if reason else "")]
        sides: dict[Direction, int] = {"encode": _DESCRIBED_PX, "decode": _DESCRIBED_PX // self.config.downscale}
        for direction, side in sides.items():
            lines.append(describe_plan(self.plan(direction, side, side), self.program(direction)))
        return "\n".join(lines)

    def _present_obstacle(self) -> str | None:
        """What keeps the engine from running; gradients count before the first call, which told whether they do."""
        is_inference = self._dtype is not None or self.calls > 0  # only a VAE has a dtype of its own
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_inference):
            return self.obstacle()

    def _run(self, direction: Direction, batch: Tensor, budget: Budget) -> Tensor:
        self.calls += 1
        self._last_obstacle = obstacle = self.obstacle(batch) or self._misfit(direction, batch)
        if obstacle is not None:
            if budget is not None:
                raise BudgetError(f"no budget can be kept while the reference network runs, because {obstacle}")
            return self._step_aside(direction, batch)
        height, width = batch.shape[2:]
        self._executors.setdefault(direction, Executor()).make_room(batch.shape[2:])
        plan = self.plan(direction, height, width, len(batch), budget)
        is_free = budget is None and not self.is_deterministic
        with torch.no_grad(), full_precision(is_deterministic=self.is_deterministic, is_tuned=is_free):
            out = self._execute(direction, plan, batch)
        if self._place()[1] != torch.float32:
            self._mend(out, direction, batch, budget)
        return out if self._dtype is not None else out.to(batch.dtype)

    def _step_aside(self, direction: Direction, batch: Tensor) -> Tensor:
        """What the layers themselves make of a batch: in the dtype and on the device of the weights."""
        model = self._reference()
        run = model.encode_moments if direction == "encode" else model.decode
        if self._dtype is None:  # as diffusers' modules do
            return run(batch)
        device, dtype = self._weights_place()
        parts = torch.split(batch.to(device, dtype), 1 if self.is_deterministic else len(batch))
        return torch.cat([run(part) for part in parts]).to(self._place()[0], torch.float32)

    def _execute(self, direction: Direction, plan: Plan, batch: Tensor) -> Tensor:
        executor, session = self._executors[direction], self._on(self._place()[0])
        packed = self._programs.get(direction)
        with session.guard():
            if packed is not None and packed[1].device.type == "cuda":
                # It is compared with the weights while it runs: the host would wait as long for the answer.
                out = executor.run(session, packed[1], plan, batch)
                if not self._is_watched or packed[0] == self._state(self._weights(direction)):
                    return out
            return executor.run(session, self.program(direction), plan, batch)

    def _on(self, device: torch.device) -> DeviceSession:
        """What this engine owns on a device; that on another one is given back."""
        if self._session is None or self._session.device != device:
            if self._session is not None:
                self._session.release()
            self._session = DeviceSession(device)
        return self._session

    def _mend(self, out: Tensor, direction: Direction, batch: Tensor, budget: Budget) -> None:
        """Compute the images again in fp32 that overflowed, and say so."""
        if out.sum().isfinite():  # of any that is not, the sum is not either
            return
        is_finite = torch.stack([image.isfinite().all() for image in out]).tolist()
        for index, (image, source) in enumerate(zip(out, batch, strict=True)):
            if is_finite[index] or not source.isfinite().all():
                continue
            dtype = str(self._place()[1]).removeprefix("torch.")
            logger.warning("image %d of the batch overflowed in %s and runs again in fp32", index, dtype)
            image.copy_(self.in_float32()._run(direction, batch[index : index + 1], budget)[0])

    def _misfit(self, direction: Direction, batch: Tensor) -> str | None:
        """Why the engine cannot take such a batch, or None; torch's own layers say what is wrong with it."""
        device, dtype = self._place()
        if self._dtype is None and (batch.dtype != dtype or batch.device != device):
            return f"the input is {batch.dtype} on {batch.device}, and the weights are {dtype} on {device}"
        network = build_network(self.config, direction)
        is_image = batch.dim() == 4 and batch.shape[1] == network.in_channels and batch.numel() > 0
        if not is_image or not all(network.sizes(*batch.shape[2:])[-1]):
            return f"the shape {tuple(batch.shape)} is none that it can {direction}"
        return None

    def _place(self) -> tuple[torch.device, torch.dtype]:
        if self._device is not None and self._dtype is not None:
            return self._device, self._dtype
        device, dtype = self._weights_place()
        return self._device or device, self._dtype or dtype

    def _weights_place(self) -> tuple[torch.device, torch.dtype]:
        parameter = next(self._source.parameters())
        return parameter.device, parameter.dtype

    def _weights(self, direction: Direction) -> dict[str, Tensor]:
        halves = ("encoder.", "quant_conv.") if direction == "encode" else ("decoder.", "post_quant_conv.")
        return {
            f"{name}.{key}": values
            for name, layer in self._borrowed()
            if f"{name}.".startswith(halves)
            for key, values in layer.named_parameters(recurse=False)
        }

    def _reference(self) -> AutoencoderKL:
        if isinstance(self._source, AutoencoderKL):
            return self._source
        layers = dict(self._borrowed())
        if layers != self._layers:  # modules compare by identity: an adapter or another module took a layer's place
            for name, layer in layers.items():
                self._model.set_submodule(name, layer)
            self._layers = layers
        for ours, theirs in ((self._model.encoder, "encoder"), (self._model.decoder, "decoder")):
            ours.gradient_checkpointing = bool(self._source.get_submodule(theirs).gradient_checkpointing)
        return self._model

    def _borrowed(self) -> Iterator[tuple[str, nn.Module]]:
        modules = dict(self._source.named_modules(remove_duplicate=False))
        return ((name, modules[name]) for name in self.layer_names)


def _bit_sums(weights: dict[str, Tensor]) -> tuple[int, ...]:
    """For each tensor the sum of its bits, which changes with any one value.

    Version and address of a tensor do not: LoRA merges write `weight.data += x`, which changes neither.
    """
    return tuple(torch.stack([_bits(values.detach()).sum() for _, values in sorted(weights.items())]).tolist())


def _bits(values: Tensor) -> Tensor:
    """The values in the order of memory, as integers that torch adds fast: eight bytes each, where they fit."""
    if values.dim() == 4 and not values.is_contiguous():
        values = values.permute(0, 2, 3, 1)  # the order of channels_last
    flat = values.reshape(-1)  # no copy in either order
    if flat.nbytes % 8 == 0 and flat.storage_offset() * flat.itemsize % 8 == 0:
        return flat.view(torch.int64)
    return flat.view({2: torch.int16, 4: torch.int32}[flat.itemsize])
