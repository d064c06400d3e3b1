"""What fp32 means while a VAE computes."""

import pytest
import torch

from sdvae.engine import precision
from sdvae.engine.precision import choose_dtype, full_precision, served_dtypes


def test_fp32_means_fp32_inside_whatever_is_allowed_outside() -> None:
    convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = convolutions.fp32_precision, products.fp32_precision
    try:
        convolutions.fp32_precision = products.fp32_precision = "tf32"
        with full_precision():
            assert convolutions.fp32_precision == products.fp32_precision == "ieee"
            assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
        assert convolutions.fp32_precision == products.fp32_precision == "tf32"
    finally:
        convolutions.fp32_precision, products.fp32_precision = before


@pytest.mark.parametrize(("flags", "expected"), [
    ({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32),
    ({}, torch.float32),
])  # fmt: skip
def test_auto_asks_the_cpu_and_no_clock(
    flags: dict[str, bool], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_cpu_capabilities", lambda: flags)
    assert choose_dtype("auto", torch.device("cpu")).dtype == expected
    assert served_dtypes(torch.device("cpu")) == (["fp32", "bf16"] if expected == torch.bfloat16 else ["fp32"])


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_dtype_may_be_spelled_as_torch_does(name: str | torch.dtype) -> None:
    assert choose_dtype(name, torch.device("cpu")).dtype == torch.bfloat16
