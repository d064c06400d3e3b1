import re
import subprocess
import sys

import pytest
import torch

from sdvae import VAE
from sdvae.amounts import memory_text
from sdvae.config import VAEConfig
from sdvae.engine.describe import describe_plan, plan_values
from sdvae.engine.plan import make_plan
from sdvae.engine.program import compile_program
from sdvae.engine.stages import Direction, build_network
from tests.conftest import SMALL, random_model

WITH_ATTENTION = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_every_stage_has_a_row_with_its_size_and_strips(direction: Direction) -> None:
    network = build_network(WITH_ATTENTION, direction)
    size = (48, 32) if direction == "encode" else (24, 16)
    plan = make_plan(network, *size, 4, num_strips=3)
    text = describe_plan(plan)
    rows = {row.split()[0]: row for row in text.splitlines() if "coder." in row}
    assert list(rows) == [stage.name for stage in network.stages]
    assert "mid_block.attentions.0" in text
    for stage in network.stages:
        height, width = network.sizes(*size)[stage.level]
        channels = f"{stage.in_channels} > {stage.out_channels}"
        found = re.search(rf"{stage.kind} +{channels} +(\d+)x(\d+) +(\d+) ", rows[stage.name])
        assert found is not None, rows[stage.name]
        assert found.groups() == (str(width), str(height), str(plan.num_strips(stage)))
    assert text.splitlines()[-1].endswith(f"= {memory_text(plan.predict_bytes())}")


def test_the_parts_of_the_memory_add_up() -> None:
    plan = make_plan(build_network(SMALL, "decode"), 8, 8, 2)
    values = plan_values(plan, num_images=3)
    assert values["predicted_bytes"] == plan.predict_bytes(3)
    assert values["arena_bytes"] + values["strip_bytes"] + values["images_bytes"] == plan.predict_bytes(3)  # type: ignore[operator]
    assert sum(stage["gflop"] for stage in values["stages"]) == pytest.approx(values["gflop"])  # type: ignore[attr-defined]


def test_a_program_names_the_kernel_of_each_stage() -> None:
    model = random_model(WITH_ATTENTION)
    program = compile_program(WITH_ATTENTION, "decode", model.state_dict(), torch.float32, torch.device("cpu"))
    plan = make_plan(program.network, 4, 4, 4)
    rows = [row for row in describe_plan(plan, program).splitlines() if row.startswith("decoder.")]
    kernels = [packed.convolution.kernel for packed in program.stages if packed.convolution]
    assert len(rows) == len(kernels) + 1
    assert [row.endswith("torch's scaled_dot_product_attention") for row in rows].count(True) == 1
    assert all(f"{kernels[0]}, torch" in row for row in rows if "attention" not in row) and len(set(kernels)) == 1
    assert f"weights: {memory_text(program.num_bytes)}, packed" in describe_plan(plan, program)


def test_the_engine_describes_both_directions(small_vae: VAE) -> None:
    first, *lines = small_vae.engine.describe().splitlines()
    assert first == "sdvae's engine, float32 on cpu"
    assert [line.split(",")[0] for line in lines if line[:6] in ("encode", "decode") and ": " in line] == [
        "encode: 512x512x3 to 64x64x8",
        "decode: 64x64x4 to 512x512x3",
    ]
    assert sum(line.startswith("memory beside the weights") for line in lines) == 2


def test_plans_are_described_without_torch() -> None:
    script = (
        "import sys; from sdvae.config import VAEConfig; from sdvae.engine.stages import build_network;"
        "from sdvae.engine.plan import make_plan; from sdvae.engine.describe import describe_plan;"
        "print(describe_plan(make_plan(build_network(VAEConfig(), 'decode'), 64, 64, 2)));"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2123.7 GFLOP" in done.stdout
