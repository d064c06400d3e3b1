"""What fp32 means while a VAE computes."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdvae.engine import precision
from sdvae.engine.precision import choose_dtype, full_precision, served_dtypes


def seen() -> list[object]:
    backends = torch.backends
    return [
        *(part.fp32_precision for part in (backends.cudnn.conv, backends.cuda.matmul)),
        *(part.fp32_precision for part in (backends.mkldnn.conv, backends.mkldnn.matmul)),
        backends.mkldnn.enabled, torch.is_autocast_enabled("cpu"), backends.cuda.flash_sdp_enabled(),
    ]  # fmt: skip


def test_fp32_means_fp32_inside_whatever_is_allowed_outside() -> None:
    backends = torch.backends
    before = seen()[:4]
    parts = backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul
    allowed = ["tf32", "tf32", "bf16", "bf16", False, True, False]
    try:
        for part, precision_allowed in zip(parts, allowed[:4], strict=True):
            part.fp32_precision = precision_allowed
        with (
            backends.mkldnn.flags(enabled=False, allow_tf32=None, fp32_precision=None),
            torch.autocast("cpu", torch.bfloat16),
            sdpa_kernel(SDPBackend.MATH),
        ):
            assert seen() == allowed
            with full_precision():
                assert seen() == ["ieee"] * 4 + [True, False, True]
                assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
            assert seen() == allowed
    finally:
        for part, value in zip(parts, before, strict=True):
            part.fp32_precision = value


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
