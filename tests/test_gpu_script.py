"""scripts/gpu runs to its end whatever its steps do, and keeps its results when cut off; with a stub of Python."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
STEPS = ["check", "tests", "sanitizer", "memory", "profile", "strips", "diffusers", "host"]
PATIENCE_S = 120  # only a hang takes as long

STUB = """#!/usr/bin/env bash
case "$*" in
    *pytest*) echo "2 failed"; exit 1 ;;
    *memory*) echo "half of it"; exec sleep 1000 ;;
    *profile*) echo "$$" >"$STUB_PID.new"; mv "$STUB_PID.new" "$STUB_PID"; exec sleep "$STUB_PROFILE_S" ;;
    *) echo "ran $*" ;;
esac
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Here the tests fail and `memory` hangs; `profile` tells its process id."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {"python": STUB, "compute-sanitizer": '#!/usr/bin/env bash\necho "$@"\nexit 9\n'}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return {
        "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python"), "WHEELS": str(tmp_path / "none"),
        "STUB_PID": str(tmp_path / "pid"), "STUB_PROFILE_S": "0", "LIMIT_memory": "1", "TMPDIR": str(tmp_path),
    }  # fmt: skip


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_every_step_runs_and_leaves_a_line_and_a_log(tmp_path: Path, environment: dict[str, str]) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [ROOT / "scripts" / "gpu", out], env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    found = lines(out)
    assert [line["step"] for line in found] == STEPS
    failed = {line["step"]: line["rc"] for line in found if line["rc"]}
    assert failed == {"tests": 1, "sanitizer": 9, "memory": 124}
    assert done.returncode == 1 and done.stderr == ""
    assert [json.loads(line) for line in done.stdout.splitlines()] == found
    assert all(line.keys() == {"step", "rc", "seconds", "log"} and line["seconds"] >= 0 for line in found)
    assert [line["log"] for line in found] == [f"{number}-{step}.log" for number, step in enumerate(STEPS, 1)]
    logs = {line["step"]: (out / line["log"]).read_text() for line in found}
    assert logs["memory"] == "half of it\n" and logs["tests"] == "2 failed\n"
    assert logs["check"] == "ran benchmarks/gpu_steps.py check\n"
    assert "gpu_steps.py decode" in logs["sanitizer"]


def test_a_run_without_failures_says_so(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "tools" / "python").write_text("#!/usr/bin/env bash\n")
    (tmp_path / "tools" / "compute-sanitizer").write_text("#!/usr/bin/env bash\n")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    command = [ROOT / "scripts" / "gpu"]
    done = subprocess.run(
        command, env=environment | {"OUT": str(tmp_path / "out"), "WHEELS": str(wheels)}, timeout=PATIENCE_S,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0
    assert [line["step"] for line in lines(tmp_path / "out")] == ["wheels", *STEPS]


def test_what_is_known_stays_when_it_is_cut_off(tmp_path: Path, environment: dict[str, str]) -> None:
    out, pid_file = tmp_path / "out", tmp_path / "pid"
    script = subprocess.Popen(
        [ROOT / "scripts" / "gpu", out], env=environment | {"STUB_PROFILE_S": "1000"}, stdout=subprocess.DEVNULL
    )
    wait_for(pid_file.exists)
    script.send_signal(signal.SIGTERM)
    assert script.wait(PATIENCE_S) == 143
    assert [(line["step"], line["rc"]) for line in lines(out)] == [
        ("check", 0), ("tests", 1), ("sanitizer", 9), ("memory", 124), ("profile", 143),
    ]  # fmt: skip
    wait_for(lambda: not Path(f"/proc/{pid_file.read_text().strip()}").exists())  # what the step ran has ended, too


def wait_for(is_so: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)
