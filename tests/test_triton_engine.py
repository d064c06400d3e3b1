"""The engine as it runs on a GPU, in Triton's interpreter: kernels, plans, arenas on the host, repeated runs."""

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sdvae.config import FAMILIES, Padding
from sdvae.engine import arena, graphs, ops, selfcheck
from sdvae.engine import calibrate as calibrating
from sdvae.engine import plan as planning
from sdvae.engine import program as programs
from sdvae.engine.execute import execute
from sdvae.engine.kernels import Norm
from sdvae.engine.plan import Plan, make_plan
from sdvae.engine.precision import full_precision
from sdvae.engine.program import Program
from sdvae.engine.run import Engine
from sdvae.engine.session import DeviceSession
from sdvae.engine.stages import Direction
from sdvae.model import AutoencoderKL
from tests import triton_interpreter
from tests.parity.test_model import quiet_model
from tests.test_execute import CONFIGS, MODELS, compiled, error, inputs, reference

HEIGHT, WIDTH = 3, 2  # of latents: the interpreter takes a second for a hundred programs


@pytest.fixture(autouse=True)
def kernels() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        module = triton_interpreter.triton_ops(patch)
        for place in (programs, selfcheck):
            patch.setattr(place, "choose_kernels", lambda device: module)
        patch.setattr(planning, "GPU_STRIP_BYTES", 0)
        yield module


def gpu_plan(program: Program, images: Tensor, num_strips: int | None = None, **arguments: Any) -> Plan:
    element_bytes, (height, width) = program.dtype.itemsize, images.shape[2:]
    return make_plan(program.network, height, width, element_bytes, num_strips=num_strips, is_gpu=True, **arguments)


@pytest.mark.parametrize("name", ["all parts", pytest.param("odd widths", marks=pytest.mark.slow)])
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_the_network_is_the_reference_in_any_number_of_strips(name: str, direction: Direction) -> None:
    images = inputs(name, direction, HEIGHT, WIDTH)
    program = compiled(name, direction)
    whole, parts = (execute(program, gpu_plan(program, images, num), images) for num in (1, HEIGHT))
    assert program.kernels is not ops
    assert error(whole, reference(name, direction, images)) <= 2e-5
    assert parts.equal(whole)


@pytest.mark.parametrize(
    "padding", ["circular", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("reflect", "circular-x"))]
)
def test_padding_is_the_references(padding: Padding) -> None:
    model = quiet_model(replace(CONFIGS["all parts"], padding=padding))
    latents = inputs("all parts", "decode", HEIGHT, WIDTH)
    program = programs.compile_program(model.config, "decode", model.state_dict(), torch.float32, latents.device)
    parts = execute(program, gpu_plan(program, latents, HEIGHT), latents)
    assert program.kernels is not ops
    with torch.no_grad():
        assert error(parts, model.decode(latents)) <= 2e-5


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.slow), torch.float16])
def test_half_precision_is_no_worse_than_by_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = inputs("all parts", "decode", HEIGHT, WIDTH)
    program = compiled("all parts", "decode", dtype)
    ours = execute(program, gpu_plan(program, latents), latents)
    monkeypatch.setattr(programs, "choose_kernels", lambda device: ops)
    program = compiled("all parts", "decode", dtype)
    theirs = execute(program, gpu_plan(program, latents), latents)
    exact = reference("all parts", "decode", latents)
    assert error(ours, exact) <= 1.2 * error(theirs, exact)


@pytest.mark.parametrize("direction", [pytest.param("encode", marks=pytest.mark.slow), "decode"])
def test_an_arena_on_the_host_changes_no_bit(direction: Direction, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "_pin", lambda num_bytes: torch.full((num_bytes,), 255, dtype=torch.uint8))  # NaN
    monkeypatch.setattr(arena, "_unpin", lambda memory: None)
    images = inputs("odd widths", direction, HEIGHT, WIDTH)
    program = compiled("odd widths", direction)
    near = gpu_plan(program, images)
    far = gpu_plan(program, images, budget_bytes=near.predict_bytes() - 1, host_bytes=2**30, is_deterministic=True)
    assert far.is_on_host and far.predict_bytes() < near.predict_bytes()
    assert execute(program, far, images).equal(execute(program, near, images))


def test_the_engine_mends_what_overflows(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrating, "_SIZE", 4)
    model = MODELS["plain"]
    loud = {
        name: values * (3e4 if name.endswith("conv_out.weight") else 1) for name, values in model.state_dict().items()
    }
    source = type(model)(model.config)
    source.load_state_dict(loud)
    engine = Engine(source, model.config, torch.device("cpu"), torch.float16)
    latents = inputs("plain", "decode", 1, 1)
    with torch.no_grad():
        out = engine.decode(latents)
        assert error(out, source.decode(latents)) <= 1e-4, "in fp32, in the end"
    assert "overflowed in float16" in caplog.text


def test_the_second_run_of_a_shape_is_captured_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[Plan] = []

    class Graph:
        def __init__(self, program: Program, plan: Plan) -> None:
            self._program, self._plan = program, plan

        @classmethod
        def capture(cls, session: DeviceSession, program: Program, plan: Plan, image: Tensor) -> "Graph":
            captured.append(plan)
            return cls(program, plan)

        def replay(self, image: Tensor, out: Tensor) -> None:
            out.copy_(execute(self._program, self._plan, image[None])[0])

    monkeypatch.setattr(graphs, "ImageGraph", Graph)
    monkeypatch.setattr(graphs, "_is_repeatable", lambda session, program, plan: True)
    monkeypatch.setattr(programs, "choose_kernels", lambda device: ops)  # any will do
    small, large = (inputs("plain", "decode", 1, width, batch=2) for width in (1, 2))
    program = compiled("plain", "decode")
    executor, session = graphs.Executor(), DeviceSession(torch.device("cpu"))

    def run(images: Tensor, **precision: bool) -> Tensor:
        with full_precision(**precision):
            return executor.run(session, program, gpu_plan(program, images), images)

    first = run(small)
    assert captured == []
    assert run(small).equal(first) and run(small).equal(first)
    assert len(captured) == 1, "captured once, then replayed"
    run(large)
    assert run(small).equal(first) and len(captured) == 1, "another shape has taken its place"
    run(small)
    assert len(captured) == 2
    run(small, is_tuned=True, is_deterministic=False)
    assert len(captured) == 2, "other algorithms would give other bits"
    executor.make_room(small.shape[2:])
    run(small, is_tuned=True, is_deterministic=False)
    assert len(captured) == 3
    executor.make_room(large.shape[2:])
    run(small, is_tuned=True, is_deterministic=False)
    assert len(captured) == 3, "its memory was given back"


def test_a_graph_is_only_for_triton_on_a_gpu() -> None:
    program = compiled("plain", "decode")
    plan = gpu_plan(program, inputs("plain", "decode", 1, 1))
    on_gpu = replace(program, device=torch.device("cuda"))
    session = DeviceSession(on_gpu.device)
    assert graphs._is_repeatable(session, on_gpu, plan)
    assert not graphs._is_repeatable(DeviceSession(program.device), program, plan)
    assert not graphs._is_repeatable(session, replace(on_gpu, kernels=ops), plan)
    assert not graphs._is_repeatable(session, on_gpu, replace(plan, is_on_host=True))


def test_a_run_asks_the_host_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device no value can be asked for, and all tensors must lie there: what a CUDA graph needs."""
    calls: list[str] = []

    def require(*tensors: Tensor | None) -> None:
        assert all(tensor is None or tensor.is_meta for tensor in tensors)

    class Statistics:
        def __init__(self, row_block: int) -> None:
            self._num_channels = 0

        def add(self, rows: Tensor) -> None:
            require(rows)
            self._num_channels = rows.shape[1]

        def merge(self, num_groups: int) -> tuple[Tensor, Tensor]:
            assert self._num_channels % num_groups == 0 < self._num_channels
            mean, variance = torch.empty(2, self._num_channels, device="meta")
            return mean, variance

    def write(made: Tensor, bias: Any, target: Tensor, *, adds: bool, statistics: Any) -> None:
        require(made, bias, target)
        assert made.shape == target.shape and made.dtype == target.dtype
        if statistics is not None:
            statistics.add(target)
        calls.append("write")

    def write_upsampled(even: Tensor, odd: Tensor, bias: Any, target: Tensor, *, statistics: Any) -> None:
        require(even, odd, bias, target)
        assert even.shape == odd.shape
        _, channels, rows, width = target.shape
        assert even.shape == (1, 2 * channels, rows // 2, width // 2 + 1)
        if statistics is not None:
            statistics.add(target)
        calls.append("write_upsampled")

    def normalise(rows: Tensor, out: Tensor, norm: Norm, mean: Tensor, variance: Tensor, *, has_silu: bool) -> None:
        require(rows, out, norm.weight, norm.bias, mean, variance)
        assert rows.shape == out.shape
        calls.append("normalise")

    def attend(queries: Tensor, keys: Tensor) -> Tensor:
        require(queries, keys)
        calls.append("attend")
        return torch.empty_like(queries)

    stub = SimpleNamespace(
        Statistics=Statistics, write=write, write_upsampled=write_upsampled, normalise=normalise, attend=attend
    )
    monkeypatch.setattr(programs, "choose_kernels", lambda device: stub)
    shapes: dict[Direction, tuple[int, ...]] = {"encode": (2, 3, 128, 136), "decode": (2, 4, 16, 17)}
    for way, shape in shapes.items():
        with torch.device("meta"):
            weights = AutoencoderKL(FAMILIES["sd1"]).state_dict()
        program = programs.compile_program(FAMILIES["sd1"], way, weights, torch.float16, torch.device("meta"))
        images = torch.empty(shape, device="meta")
        out = execute(program, gpu_plan(program, images), images)
        assert out.is_meta and len(out) == 2
    assert set(calls) == {"write", "write_upsampled", "normalise", "attend"}
