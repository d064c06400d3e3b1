"""The kernels of the GPU, on one or in Triton's interpreter, against formulas in fp64; the rest of memory is NaN."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdvae.engine import ops
from sdvae.engine.kernels import Norm
from sdvae.errors import ShapeError
from tests import triton_interpreter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# rows, width, channels: less than a tile, one more than a tile, no multiple of one
SIZES = [(1, 1, 1), (1, 3, 5), (3, 65, 40), (2, 130, 6)]
of_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
of_size = pytest.mark.parametrize("size", SIZES, ids=str)


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    if torch.cuda.is_available():
        from sdvae.engine import triton_ops

        with torch.device("cuda"):
            yield triton_ops
    else:
        with pytest.MonkeyPatch.context() as patch:
            yield triton_interpreter.triton_ops(patch)


def room(rows: int, width: int, channels: int, dtype: torch.dtype) -> Tensor:
    """A strip in memory full of NaN, with a channel, a column and a row to spare."""
    memory = torch.full((1, rows + 1, width + 1, channels + 1), torch.nan, dtype=dtype)
    return memory.permute(0, 3, 1, 2)[:, :channels, :rows, :width]


def filled(rows: int, width: int, channels: int, dtype: torch.dtype) -> Tensor:
    return room(rows, width, channels, dtype).copy_(torch.randn(1, channels, rows, width))


def is_filled_exactly(strip: Tensor) -> bool:
    """Whether all that is in the memory of a `room`, and is a number, is in the strip."""
    memory = torch.as_strided(strip, (strip.untyped_storage().nbytes() // strip.element_size(),), (1,), 0)
    return not strip.isnan().any() and int((~memory.isnan()).sum()) == strip.numel()


def total(made: Tensor, bias: Tensor | None, target: Tensor | None) -> Tensor:
    """The formula of `write`, in fp32."""
    exact = made.float()
    if bias is not None:
        exact = exact + bias.float()[:, None, None]
    return exact if target is None else exact + target.float()


def group_statistics(strip: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    groups = strip.double().reshape(num_groups, -1)
    repeats = strip.shape[1] // num_groups
    return groups.mean(1).repeat_interleave(repeats), groups.var(1, correction=0).repeat_interleave(repeats)


def assert_statistics(found: tuple[Tensor, Tensor], strip: Tensor, num_groups: int) -> None:
    mean, variance = group_statistics(strip, num_groups)
    # A mean of fp32 numbers is off by some of their ulps; so is a variance, relatively.
    torch.testing.assert_close(found[0].double(), mean, rtol=0, atol=4e-7 * float(strip.abs().max()))
    torch.testing.assert_close(found[1].double(), variance, rtol=2e-6, atol=1e-12)


@of_dtype
@of_size
@pytest.mark.parametrize("adds", [False, True])
def test_write_is_one_rounding_of_the_sum(
    kernels: ModuleType, dtype: torch.dtype, size: tuple[int, int, int], adds: bool
) -> None:
    made, channels = filled(*size, dtype), size[2]
    for bias in (None, torch.randn(channels), torch.randn(channels).to(dtype)):
        target = filled(*size, dtype) if adds else room(*size, dtype)
        expected = total(made, bias, target if adds else None).to(dtype)
        kernels.write(made, bias, target, adds=adds, statistics=None)
        assert is_filled_exactly(target)
        assert torch.equal(target, expected)


@of_dtype
@of_size
def test_write_counts_what_it_wrote(kernels: ModuleType, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    made, target, channels = filled(*size, dtype), filled(*size, dtype), size[2]
    statistics = kernels.Statistics(1)
    kernels.write(made, torch.randn(channels), target, adds=True, statistics=statistics)
    assert_statistics(statistics.merge(1), target, 1)
    assert_statistics(statistics.merge(channels), target, channels)


@of_dtype
@pytest.mark.parametrize(("rows", "width", "channels"), [(1, 1, 1), (1, 3, 5), (3, 65, 33)])
def test_write_upsampled_interleaves_columns(
    kernels: ModuleType, dtype: torch.dtype, rows: int, width: int, channels: int
) -> None:
    bias = torch.randn(channels)
    image = room(2 * rows, 2 * width, channels, dtype)
    statistics = kernels.Statistics(1)
    both = [filled(rows, width + 1, 2 * channels, dtype) for _ in range(2)]
    kernels.write_upsampled(*both, bias, image, statistics=statistics)
    for parity, made in enumerate(both):
        target = image[:, :, parity::2]
        assert torch.equal(target[..., 0::2], total(made[:, :channels, :, :-1], bias, None).to(dtype))
        assert torch.equal(target[..., 1::2], total(made[:, channels:, :, 1:], bias, None).to(dtype))
    assert is_filled_exactly(image)
    assert_statistics(statistics.merge(channels), image, channels)


def test_even_and_odd_rows_lie_alike_or_are_refused(kernels: ModuleType) -> None:
    even, odd = filled(1, 3, 4, torch.float32), filled(1, 3, 4, torch.float32).contiguous()
    with pytest.raises(ShapeError, match="make"):
        kernels.write_upsampled(even, odd, None, room(2, 4, 2, torch.float32), statistics=None)


def cancelling_variance(strip: Tensor) -> Tensor:
    """What `Statistics` must not do."""
    values = strip.flatten(2)[0]
    return values.square().mean(1) - values.mean(1).square()


def test_a_large_mean_does_not_cancel(kernels: ModuleType) -> None:
    values = 1000 + 0.1 * torch.randn(1, 3, 5, 200)
    statistics = kernels.Statistics(1)
    statistics.add(values.contiguous(memory_format=torch.channels_last))
    exact = group_statistics(values, 3)[1]
    # Numbers near 1000 are 6e-5 apart, and so are the means of rows, which themselves are some 0.01 apart.
    tolerance = 2e-4 * exact.max()
    assert (statistics.merge(3)[1] - exact).abs().max() < tolerance
    assert (cancelling_variance(values) - exact).abs().max() > 100 * tolerance


@pytest.mark.parametrize(("channels", "num_groups"), [(1, 1), (12, 4), (64, 1), (21, 3)])
def test_groups_of_any_width_over_more_rows_than_a_tile(kernels: ModuleType, channels: int, num_groups: int) -> None:
    """2048 numbers are merged at a time: 32 rows of 64 channels."""
    offsets = torch.linspace(-3, 3, channels)[:, None, None]  # so that the channels of a group differ
    rows = (torch.randn(1, channels, 45, 2) + offsets).contiguous(memory_format=torch.channels_last)
    statistics = kernels.Statistics(1)
    for first in range(0, 45, 15):
        statistics.add(rows[:, :, first : first + 15])
    assert_statistics(statistics.merge(num_groups), rows, num_groups)


def statistics_of_strips(kernels: ModuleType, image: Tensor, bounds: list[int]) -> tuple[Tensor, Tensor]:
    statistics = kernels.Statistics(1)
    for first, last in pairwise(bounds):
        target = room(last - first, image.shape[3], image.shape[1], image.dtype)
        kernels.write(image[:, :, first:last], None, target, adds=False, statistics=statistics)
    merged: tuple[Tensor, Tensor] = statistics.merge(2)
    return merged


def statistics_of_upsampled_strips(kernels: ModuleType, image: Tensor, bounds: list[int]) -> tuple[Tensor, Tensor]:
    statistics = kernels.Statistics(1)
    _, channels, num_rows, width = image.shape
    result = room(2 * num_rows, 2 * width - 2, channels // 2, image.dtype)
    for first, last in pairwise(bounds):
        made, target = image[:, :, first:last], result[:, :, 2 * first : 2 * last]
        kernels.write_upsampled(made, made + 1, None, target, statistics=statistics)
    merged: tuple[Tensor, Tensor] = statistics.merge(2)
    return merged


@of_dtype
@pytest.mark.parametrize("count", [statistics_of_strips, statistics_of_upsampled_strips])
def test_strips_change_no_bit_of_statistics(
    kernels: ModuleType, dtype: torch.dtype, count: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    image = (torch.randn(1, 8, 7, 21) * torch.logspace(-3, 3, 7)[:, None]).to(dtype)
    image = image.contiguous(memory_format=torch.channels_last)
    whole = count(kernels, image, [0, 7])
    for bounds in ([0, 2, 4, 6, 7], [0, 1, 5, 7]):
        assert all(map(torch.equal, whole, count(kernels, image, bounds)))


@of_dtype
@of_size
@pytest.mark.parametrize("has_silu", [False, True])
def test_normalise_is_one_rounding(
    kernels: ModuleType, dtype: torch.dtype, size: tuple[int, int, int], has_silu: bool
) -> None:
    channels = size[2]
    rows, out = filled(*size, dtype), room(*size, dtype)
    norm = Norm(1 + 0.3 * torch.randn(channels), torch.randn(channels), 0.1, 1)
    mean, variance = torch.randn(channels), torch.rand(channels) + 0.1
    kernels.normalise(rows, out, norm, mean, variance, has_silu=has_silu)
    assert is_filled_exactly(out)
    exact = F.batch_norm(
        rows.double(), mean.double(), variance.double(), norm.weight.double(), norm.bias.double(), eps=norm.eps
    )
    exact = F.silu(exact) if has_silu else exact
    # Half an ulp for the rounding, and for the arithmetic before it some ulps of fp32 of sums that partly cancel.
    torch.testing.assert_close(out.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-5)


def test_normalise_keeps_small_deviations_from_a_large_mean(kernels: ModuleType) -> None:
    rows = (1000 + 0.1 * torch.randn(1, 4, 2, 9)).contiguous(memory_format=torch.channels_last)
    out = torch.full_like(rows, torch.nan)
    norm = Norm(torch.ones(4), torch.randn(4), 1e-6, 1)
    kernels.normalise(rows, out, norm, torch.full((4,), 1000.0), torch.full((4,), 0.01), has_silu=False)
    exact = (rows.double() - 1000) / (0.01 + 1e-6) ** 0.5 + norm.bias.double()[:, None, None]
    # The difference is exact; scaled by 10 first, 1000 would leave an error of 6e-4.
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of numpy: exp(200) is infinite, as it should be
def test_silu_ends_at_zero(kernels: ModuleType) -> None:
    rows = torch.tensor([-1e30, -200.0, -88.0, 0.0, 200.0, 1e30]).view(1, 1, 1, 6)
    out = torch.full_like(rows, torch.nan)
    norm = Norm(torch.ones(1), torch.zeros(1), 0.0, 1)
    kernels.normalise(rows, out, norm, torch.zeros(1), torch.ones(1), has_silu=True)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.0, 0.0, 0.0, 0.0, 200.0, 1e30]), rtol=1e-6, atol=1e-36)


def attention(queries: Tensor, keys: Tensor) -> Tensor:
    return torch.softmax(queries.double() @ keys.double().T, 1) @ keys.double()


@of_dtype
@pytest.mark.parametrize(("n", "m", "channels"), [(1, 1, 1), (3, 65, 24), (65, 31, 16), (130, 200, 40), (2, 40, 512)])
def test_attention(kernels: ModuleType, dtype: torch.dtype, n: int, m: int, channels: int) -> None:
    queries = (2 * torch.randn(n, channels) * channels**-0.5).to(dtype)
    memory = torch.full((m + 70, channels), torch.nan, dtype=dtype)  # what lies behind the keys is no key
    keys = memory[:m].copy_(torch.randn(m, channels))
    found = kernels.attend(queries, keys)
    # Shares are rounded for the tensor cores, and the mean once more: half an ulp each of the largest key.
    tolerance = (1.1 if dtype != torch.float32 else 16) * torch.finfo(dtype).eps * keys.abs().max()
    assert (found.double() - attention(queries, keys)).abs().max() < tolerance


@pytest.mark.parametrize("m", [1024, 2500])
def test_attention_split_over_keys(kernels: ModuleType, m: int) -> None:
    queries, keys = torch.randn(5, 8), torch.randn(m, 8)
    keys[m // 2 :] *= 3  # so that the parts weigh differently
    found = kernels.attend(queries, keys)
    # Scores are up to 50 here, and so are the ulps of their exponents.
    torch.testing.assert_close(found.double(), attention(queries, keys), rtol=0, atol=3e-5)


def test_attention_to_one_key_among_large_scores(kernels: ModuleType) -> None:
    """Neither exp of 1e4 nor of -1e4 is a number that one can add."""
    keys = torch.randn(300, 16)
    queries = 1e3 * F.normalize(keys[[7, 150, 299]], dim=1)
    exact = attention(queries, keys)
    assert kernels.attend(queries, keys).isfinite().all()
    torch.testing.assert_close(kernels.attend(queries, keys).double(), exact, rtol=0, atol=5e-3)


@of_dtype
def test_kernels_do_as_their_twins(kernels: ModuleType, dtype: torch.dtype) -> None:
    """The same bits where a sum is rounded once; else as near as two roundings are."""
    made, odd, bias = filled(4, 9, 16, dtype), filled(4, 9, 16, dtype), torch.randn(16)
    norm = Norm(1 + 0.3 * torch.randn(8), torch.randn(8), 1e-6, 4)
    keys = torch.randn(100, 8).to(dtype)
    results = []
    for module in (ops, kernels):
        wide, image, normed = (torch.zeros(1, *shape, dtype=dtype) for shape in [(16, 4, 9), (8, 8, 16), (8, 8, 16)])
        wide, image, normed = (each.contiguous(memory_format=torch.channels_last) for each in (wide, image, normed))
        statistics = module.Statistics(2)
        module.write(made, bias, wide, adds=False, statistics=None)
        module.write(made, None, wide, adds=True, statistics=None)
        module.write_upsampled(made, odd, bias[:8], image, statistics=statistics)
        mean, variance = statistics.merge(4)
        module.normalise(image, normed, norm, mean, variance, has_silu=True)
        results.append((wide, image, mean, variance, normed, module.attend(keys[:5], keys)))
    (*equal, mean, variance, normed, attended), twins = results[1], results[0]
    assert all(map(torch.equal, equal, twins))
    torch.testing.assert_close((mean, variance), twins[2:4], rtol=1e-5, atol=1e-6)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close((normed, attended), twins[4:], rtol=4 * eps, atol=8 * eps)


@pytest.fixture
def only_touch(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Names the tensors that kernels may touch; what points elsewhere fails the test before it breaks the process."""
    if torch.cuda.is_available():
        pytest.skip("only the interpreter shows where kernels point")
    from triton.runtime.interpreter import _interpreter

    load, store = _interpreter.load, _interpreter.store
    allowed: list[Tensor] = []

    def check(pointers: Any, mask: Any) -> None:
        starts = torch.tensor([tensor.data_ptr() for tensor in allowed])
        ends = starts + torch.tensor([tensor.nbytes for tensor in allowed])
        aimed = torch.from_numpy(pointers[mask].astype("int64"))[:, None]
        assert ((aimed >= starts) & (aimed < ends)).any(1).all(), "a kernel points beyond its tensors"

    def checked_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return load(pointers, mask, *rest)

    def checked_store(pointers: Any, values: Any, mask: Any) -> None:
        check(pointers, mask)
        store(pointers, values, mask)

    monkeypatch.setattr(_interpreter, "load", checked_load)
    monkeypatch.setattr(_interpreter, "store", checked_store)
    return lambda *tensors: allowed.extend(tensors)


def test_rows_may_lie_further_apart_than_32_bits_count(
    kernels: ModuleType, only_touch: Callable[..., None], tmp_path: Path
) -> None:
    """The third of three rows that are 2^30 elements apart, in a file of holes, is beyond integers of 32 bits."""
    memory = torch.from_file(str(tmp_path / "holes"), shared=True, size=2**31 + 40, dtype=torch.float16)
    far = memory.as_strided((1, 8, 3, 5), (len(memory), 1, 2**30, 8))
    near, ones, zeros = torch.randn(1, 3, 5, 8).half().permute(0, 3, 1, 2), torch.ones(8), torch.zeros(8)
    out = torch.zeros_like(near)
    only_touch(*far[0].permute(1, 2, 0), near, out, ones, zeros)
    kernels.write(near, None, far, adds=False, statistics=None)
    assert torch.equal(far, near)
    kernels.write(near, None, far, adds=True, statistics=None)
    kernels.normalise(far, out, Norm(ones, zeros, 0.0, 1), zeros, ones, has_silu=False)
    assert torch.equal(out, 2 * near)
    kernels.normalise(near, far, Norm(ones, zeros, 0.0, 1), zeros, ones, has_silu=False)
    kernels.write(far, None, out, adds=False, statistics=None)
    assert torch.equal(out, near)


def test_channels_apart_are_refused(kernels: ModuleType) -> None:
    with pytest.raises(ShapeError, match="channels_last"):
        kernels.write(torch.zeros(1, 2, 3, 3), None, torch.zeros(1, 2, 3, 3), adds=False, statistics=None)
