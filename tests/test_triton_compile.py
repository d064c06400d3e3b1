"""Every kernel compiles for GPUs that are not there, into what it was laid out for."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

HOPPER = 90
CAPABILITIES = [HOPPER, *(pytest.param(other, marks=pytest.mark.slow) for other in (80, 100))]
KERNELS = {"_write_rows", "_merge_rows", "_normalise_tile", "_attend_block", "_merge_splits"}


@pytest.fixture(scope="module", params=CAPABILITIES)
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One of each kernel and variant; compiled in a process of its own, for this one may have the interpreter."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    cache = tmp_path_factory.mktemp("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.compile_kernels", str(request.param)],
        cwd=Path(__file__).parents[1],
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads(line) for line in ran.stdout.splitlines()]


def test_every_kernel_compiles(reports: list[dict[str, Any]]) -> None:
    assert {report["kernel"] for report in reports} == KERNELS


def test_shared_memory_is_not_exceeded(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["shared_bytes"] <= report["max_shared_bytes"], report


def test_registers_suffice(reports: list[dict[str, Any]]) -> None:
    """The attention reloads some addresses in its loop; with half as many keys at a time it would not."""
    for report in reports:
        limit = 64 if report["kernel"] == "_attend_block" and report["capability"] == HOPPER else 0
        assert report["spilled_bytes"] <= limit, report


def test_attention_runs_on_the_tensor_cores_of_hopper(reports: list[dict[str, Any]]) -> None:
    if reports[0]["capability"] != HOPPER:
        pytest.skip("only Hopper has these instructions")
    attention = [each for each in reports if each["kernel"] == "_attend_block"]
    assert {tuple(each["types"]): each["has_wgmma"] for each in attention} == {
        ("*bf16", "*fp32"): True,
        ("*fp16", "*fp32"): True,
        ("*fp32",): False,  # whose products are exact
    }


def test_memory_is_read_and_written_16_bytes_at_a_time(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        if report["kernel"] in ("_write_rows", "_normalise_tile"):
            assert report["num_wide_loads"] and report["num_wide_stores"], report
            assert report["num_narrow_halves"] == 0, report
