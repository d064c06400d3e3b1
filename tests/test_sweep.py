"""The sweep compares before it times, ends its busy processes, and puts each ratio in its place."""

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import sweep
from benchmarks.sweep import Cell
from sdvae.bench.contenders import Contender


def test_cells_are_measured_beside_busy_processes_that_end_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(sweep, "_SMALL_PAIRS", 1)
    monkeypatch.setattr(subprocess, "Popen", start)
    cells: Iterator[Cell] = sweep.sweep(["embedded", "taesd"], [32], [1, 2], "fp32", 1, 2)
    first = next(cells)
    assert len(started) == 2 and all(process.poll() is None for process in started)
    found = [first, *cells]
    assert all(process.poll() is not None for process in started)
    assert [(cell.network, cell.direction, cell.batch_size) for cell in found] == [
        (name, direction, batch) for name in ("embedded", "taesd") for direction in ("encode", "decode")
        for batch in (1, 2)
    ]  # fmt: skip
    assert all(cell.ratio > 0 and cell.relative_error < 1e-4 and len(cell.our_seconds) == 1 for cell in found)


def test_what_gives_another_result_is_not_timed() -> None:
    ours = Contender("sdvae", "fp32", "channels_last", lambda batch: batch, 1e-3)
    theirs = replace(ours, run=lambda batch: 1.01 * batch)
    with pytest.raises(SystemExit, match="nothing was timed"):
        sweep._measure(ours, [theirs], torch.ones(1, 3, 4, 4), 1)


def test_the_table_has_a_line_for_each_network_and_direction() -> None:
    one = Cell("sd1", "encode", 64, 1, "channels_last", 0.0, (1.0,), (2.0,), 2.0, None)
    cells = [one, replace(one, batch_size=8, ratio=1.5), replace(one, direction="decode", size_px=512, ratio=1.25)]
    header, encode, decode = sweep.table(cells)
    assert header.split() == ["theirs", "/", "ours", "64px", "b1", "64px", "b8", "512px", "b1"]
    assert encode.split() == ["sd1", "encode", "2.00", "1.50"] and decode.split() == ["sd1", "decode", "1.25"]
