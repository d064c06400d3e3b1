"""The self-check of a GPU's kernels, in Triton's interpreter: sound kernels pass, broken ones are found and told."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sdvae.cli import doctor
from sdvae.config import VAEConfig
from sdvae.encoding import manifest
from sdvae.encoding.manifest import EncodeSettings
from sdvae.engine import graphs, ops, selfcheck
from sdvae.engine import program as programs
from sdvae.engine.execute import execute
from sdvae.engine.plan import Plan
from sdvae.engine.precision import choose_dtype, inference
from sdvae.engine.program import Program, triton_obstacle
from sdvae.engine.session import DeviceSession
from sdvae.errors import DeviceError
from tests import triton_interpreter

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CONFIG = VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=2)
SIZE = 2, 1


@pytest.fixture
def kernels() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        yield triton_interpreter.triton_ops(patch)


def find(kernels: Any) -> str | None:
    """In fp32 alone: the interpreter takes seconds for each dtype."""
    with inference(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(selfcheck, "_MOST_APART", {torch.float32: selfcheck._MOST_APART[torch.float32]})
        return selfcheck.find_fault(kernels, DeviceSession(CPU), CONFIG, SIZE)


def changed(kernels: ModuleType, **functions: Any) -> SimpleNamespace:
    return SimpleNamespace(**(vars(kernels) | functions))


def test_sound_kernels_pass(kernels: ModuleType) -> None:
    assert find(kernels) is None


def wrong_eps(kernels: ModuleType) -> SimpleNamespace:
    def normalise(rows: Tensor, out: Tensor, norm: Any, mean: Tensor, variance: Tensor, *, has_silu: bool) -> None:
        kernels.normalise(rows, out, norm, mean, variance + 1e-5, has_silu=has_silu)

    return changed(kernels, normalise=normalise)


def one_row_short(kernels: ModuleType) -> SimpleNamespace:
    def write(made: Tensor, bias: Any, target: Tensor, *, adds: bool, statistics: Any) -> None:
        last = target[:, :, -1:].clone()
        kernels.write(made, bias, target, adds=adds, statistics=statistics)
        if target.shape[2] > 1:
            target[:, :, -1:] = last

    return changed(kernels, write=write)


def not_a_number(kernels: ModuleType) -> SimpleNamespace:
    def attend(queries: Tensor, keys: Tensor) -> Tensor:
        made: Tensor = kernels.attend(queries, keys)
        return made / 0.0

    return changed(kernels, attend=attend)


@pytest.mark.parametrize("broken", [wrong_eps, one_row_short, pytest.param(not_a_number, marks=pytest.mark.slow)])
def test_broken_kernels_are_found(kernels: ModuleType, broken: Callable[[ModuleType], SimpleNamespace]) -> None:
    fault = find(broken(kernels))
    assert fault is not None and fault.startswith("a decode in float32, launched, differs by ")


@pytest.mark.parametrize("is_stale", [True, False])
def test_a_stale_graph_is_found(monkeypatch: pytest.MonkeyPatch, is_stale: bool) -> None:
    class Graph:
        def __init__(self, program: Program, plan: Plan, image: Tensor) -> None:
            self.run = lambda image: execute(program, plan, image[None])[0]
            self.first = image

        def replay(self, image: Tensor, out: Tensor) -> None:
            out.copy_(self.run(self.first if is_stale else image))

    monkeypatch.setattr(graphs.ImageGraph, "capture", lambda session, program, plan, image: Graph(program, plan, image))
    fault = find(ops)
    assert (fault or "").startswith("a decode in float32, replayed, differs by ") is is_stale


class Machine:
    """A machine with one GPU, whose self-check finds what it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.fault: str | None = None
        self.num_checks = 0
        self.driver, self.capability = 13000, (9, 0)
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: self.capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: self.driver, raising=False)
        monkeypatch.setattr(selfcheck, "examine", self.examine)
        self.restart()

    def examine(self, index: int) -> str | None:
        self.num_checks += 1
        return self.fault

    def restart(self) -> None:
        """As in another process."""
        selfcheck._fault.cache_clear()


@pytest.fixture
def machine(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(monkeypatch, tmp_path)
    yield machine
    machine.restart()


def test_the_verdict_is_kept_until_a_version_changes(machine: Machine, kernels: ModuleType) -> None:
    for _ in range(3):
        assert selfcheck.trusted_kernels(GPU) is kernels
    assert selfcheck.why_torch(GPU) is None
    machine.restart()
    assert selfcheck.trusted_kernels(GPU) is kernels and machine.num_checks == 1
    machine.driver, machine.fault = 13010, "wrong"
    machine.restart()
    assert selfcheck.trusted_kernels(GPU) is ops and machine.num_checks == 2
    machine.driver = 13000
    machine.restart()
    assert selfcheck.trusted_kernels(GPU) is kernels and machine.num_checks == 2


def test_a_fault_is_told_once_and_torch_runs(
    machine: Machine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.fault = "a decode in float16, replayed, differs by 0.9 from torch's; 0.02 is allowed"
    with caplog.at_level(logging.WARNING):
        assert all(selfcheck.trusted_kernels(GPU) is ops for _ in range(3))
    assert [record.getMessage() for record in caplog.records] == [
        f"the kernels for cuda:0 failed their self-check ({machine.fault}); torch's operations run instead, several "
        "times slower"
    ]
    assert selfcheck.why_torch(GPU) == machine.fault
    monkeypatch.setenv("SDVAE_STRICT", "1")
    with pytest.raises(DeviceError, match=r"failed their self-check .*unset SDVAE_STRICT to run torch's operations"):
        selfcheck.trusted_kernels(GPU)


@pytest.mark.parametrize("content", [None, b"{", b"[]"])
def test_a_lost_or_damaged_verdict_is_found_again(machine: Machine, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "sdvae" / "kernels.json"
    if content is None:
        path.parent.write_bytes(b"a file where the folder should be")
    else:
        path.parent.mkdir()
        path.write_bytes(content)
    assert selfcheck.kernels_fault(GPU) is None and machine.num_checks == 1
    assert content is None or list(json.loads(path.read_text()).values()) == [None]


@pytest.mark.parametrize(
    ("capability", "hip", "says"),
    [((7, 5), None, "compute capability 8.0, and this GPU has 7.5"), ((9, 0), "6.4", "ROCm")],
)
def test_some_gpus_run_torchs_operations_without_being_asked(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, says: str
) -> None:
    machine.capability = capability
    monkeypatch.setattr(torch.version, "hip", hip)
    assert programs.choose_kernels(GPU) is ops
    assert says in (triton_obstacle(GPU) or "")
    assert selfcheck.trusted_kernels(GPU) is ops and machine.num_checks == 0
    assert says in (selfcheck.why_torch(GPU) or "")


def test_a_gpu_without_triton_runs_torchs_operations(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "find_spec", lambda name: None)
    assert programs.choose_kernels(GPU) is ops and triton_obstacle(GPU) == "Triton is not installed"


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_bf16_is_chosen_by_the_device_that_is_meant(
    machine: Machine, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    machine.capability = capability
    assert choose_dtype("auto", torch.device("cuda", 1)).dtype == dtype


@pytest.mark.parametrize(
    ("command", "status", "says"),
    [
        ("print('null')", "ok", "Triton's, which decode as torch's operations do"),
        ("print('\"it differs by 0.9\"')", "warning", "it differs by 0.9"),
        ("import os; os.abort()", "broken", "it ended with code -6"),
    ],
)
def test_doctor_checks_in_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, command: str, status: str, says: str
) -> None:
    run = doctor.subprocess.run

    def instead(arguments: list[str], **options: Any) -> Any:
        assert arguments[-3:] == ["-m", "sdvae.engine.selfcheck", "0"]
        return run([arguments[0], "-c", command], **options)

    monkeypatch.setattr(doctor.subprocess, "run", instead)
    finding = doctor._check_kernels(0)
    assert finding.status == status and says in finding.value + finding.advice


def test_what_a_compiler_raises_is_the_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify")

    monkeypatch.setattr(selfcheck, "choose_kernels", fail)
    monkeypatch.setattr(DeviceSession, "guard", lambda session: torch.no_grad())
    assert selfcheck.examine(0) == "RuntimeError: Failed to find C compiler."


def test_a_store_begun_on_a_gpu_tells_its_kernels(machine: Machine, kernels: ModuleType) -> None:
    """One that was begun before this was told goes on without it."""
    vae: Any = SimpleNamespace(device=GPU, dtype=torch.float16)
    begun = manifest._identify_compute(vae, EncodeSettings(), {}, 1)
    assert begun["kernels"] == kernels.NAME == "Triton"
    machine.fault = "wrong"
    machine.driver += 1
    machine.restart()
    assert manifest._identify_compute(vae, EncodeSettings(), begun, 1)["kernels"] == "torch"
    older = {name: value for name, value in begun.items() if name != "kernels"}
    assert manifest._identify_compute(vae, EncodeSettings(), older, 1) == older
