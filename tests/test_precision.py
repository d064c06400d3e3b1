"""What fp32 means while a VAE computes."""

import torch

from sdvae.engine.precision import full_precision


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
