"""Packed convolutions: weights lie in the order that oneDNN reads for each size, and no order changes a bit."""

import ctypes

import pytest
import torch
from torch import Tensor

from sdvae.engine import ops
from sdvae.engine.convolutions import OneDnnConvolution, pack

pytestmark = pytest.mark.skipif(not ops.has_onednn(), reason="this torch has no oneDNN")

SIZES = [(3, 8), (10, 8), (18, 16), (34, 32), (66, 64), (130, 128)]


def bytes_of(packed: Tensor) -> bytes:
    return ctypes.string_at(torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed))


@pytest.mark.parametrize("num_channels", [8, 64, 128])
def test_weights_lie_as_the_kernel_for_each_size_reads_them(num_channels: int) -> None:
    weight, bias = torch.randn(num_channels, num_channels, 3, 3), torch.randn(num_channels)
    convolution = pack(weight, bias, ops, stride=1, zeros_px=(1, 1), adds=False)
    assert isinstance(convolution, OneDnnConvolution)
    for rows, width in SIZES + SIZES[::-1]:
        strip = torch.randn(1, num_channels, rows, width).to(memory_format=torch.channels_last)
        made, _ = convolution.make(strip)
        expected = torch.nn.functional.conv2d(strip, weight, bias, padding=(0, 1))
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-3)  # sums of 1,152 products, in another order
        liked = torch.ops.mkldnn._reorder_convolution_weight(weight, [0, 1], [1, 1], [1, 1], 1, list(strip.shape))
        assert bytes_of(convolution._weight_for(strip, [0, 1])) == bytes_of(liked)


def test_sizes_of_one_order_share_their_weights_and_few_orders_are_kept() -> None:
    convolution = pack(torch.randn(64, 64, 3, 3), torch.zeros(64), ops, stride=1, zeros_px=(1, 1), adds=False)
    assert isinstance(convolution, OneDnnConvolution)
    for rows, width in SIZES:
        convolution.make(torch.randn(1, 64, rows, width).to(memory_format=torch.channels_last))
        orders = {bytes_of(packed) for packed in convolution._packed}
        assert len(orders) == len(convolution._packed) <= 2
        assert {id(packed) for packed in convolution._packed_for.values()} == set(map(id, convolution._packed))
    assert len(convolution._packed_for) > len(convolution._packed)
