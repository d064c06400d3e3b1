"""Each rewrite of weights alone, against the layers it stands for, in fp64: exact on paper, so 1e-12."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdvae.engine.program import fold_after, fold_attention, fold_before, fold_upsample
from sdvae.engine.scaling import choose_exponents, plan_scales
from sdvae.engine.stages import build_network
from sdvae.model import Attention
from tests.conftest import SMALL


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def is_exact(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() < 1e-12 * theirs.abs().max())


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (6, 3)])
def test_an_upsample_folds_into_2x2_convolutions(height: int, width: int) -> None:
    weight, small = random(5, 3, 3, 3), random(2, 3, height, width)
    expected = F.conv2d(F.interpolate(small, scale_factor=2.0, mode="nearest"), weight, padding=1)
    made = torch.empty_like(expected)
    for parity, row_weight in enumerate(fold_upsample(weight)):
        windows = F.conv2d(small, row_weight, padding=1)[:, :, parity : parity + height]
        even, odd = windows.split(5, 1)
        made[:, :, parity::2, 0::2], made[:, :, parity::2, 1::2] = even[..., :width], odd[..., 1:]
    assert is_exact(made, expected)


def test_a_1x1_convolution_folds_into_the_padded_one_after_it() -> None:
    before, bias, weight, image = random(4, 3, 1, 1), random(4), random(6, 4, 3, 3), random(1, 3, 5, 4)
    expected = F.conv2d(F.conv2d(image, before, bias), weight, padding=1)
    with_ones = torch.cat([image, torch.ones_like(image[:, :1])], 1)
    assert is_exact(F.conv2d(with_ones, fold_before(weight, before, bias), padding=1), expected)
    without = F.conv2d(image, fold_before(weight, before, bias)[:, :-1], padding=1)
    assert not is_exact(without, expected), "the channel of ones is what carries the bias"


def test_a_1x1_convolution_folds_into_the_one_before_it() -> None:
    weight, bias, after, after_bias, image = (
        random(6, 3, 3, 3),
        random(6),
        random(4, 6, 1, 1),
        random(4),
        random(1, 3, 5, 4),
    )
    expected = F.conv2d(F.conv2d(image, weight, bias, padding=1), after, after_bias)
    assert is_exact(F.conv2d(image, *fold_after(weight, bias, after, after_bias), padding=1), expected)


def test_attention_needs_neither_keys_nor_values_of_its_own() -> None:
    attention = Attention(8, 4).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    x = random(1, 8, 3, 5)
    pairs = [(layer.weight, layer.bias) for layer in (attention.to_q, attention.to_k, attention.to_v)]
    queries, out = fold_attention(*pairs, (attention.to_out[0].weight, attention.to_out[0].bias))
    with torch.no_grad():
        tokens = attention.group_norm(x).flatten(2).mT[0]
        weights = (F.linear(tokens, *queries) @ tokens.T).softmax(-1)
        assert weights.max() > 0.5, "far from a plain average"
        assert is_exact(x + F.linear(weights @ tokens, *out).T.view(1, 8, 3, 5), attention(x))


def test_exponents_are_the_smallest_that_hold_and_change_only_at_convolutions_of_the_skip_path() -> None:
    network = build_network(SMALL, "decode")
    peaks = {stage.name: 1.0 for stage in network.stages} | {
        stage.shortcut: 1.0 for stage in network.stages if stage.shortcut
    }
    assert choose_exponents(network, peaks) == {}
    peaks["decoder.mid_block.resnets.1.conv2"] = 2.0**14 * 8  # in the stream that conv_in begins
    peaks["decoder.up_blocks.3.resnets.0.conv1"] = 2.0**14 * 1.5  # in an h
    chosen = choose_exponents(network, peaks)
    assert chosen == {"decoder.conv_in": 3, "decoder.up_blocks.3.resnets.0.conv1": 1}
    scales = {stage.name: scale for stage, scale in zip(network.stages, plan_scales(network, chosen), strict=True)}
    assert scales["decoder.conv_in"].weight == scales["decoder.mid_block.resnets.0.conv2"].bias == 1 / 8
    assert scales["decoder.mid_block.resnets.0.conv1"].eps == 1 / 64
    leaves = scales["decoder.up_blocks.0.upsamplers.0.conv"]
    assert (leaves.weight, leaves.bias) == (8, 1), "the upsampler brings the stream back"
    assert scales["decoder.up_blocks.3.resnets.0.conv2"].eps == 1 / 4
