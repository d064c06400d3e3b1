"""LPIPS and FID's Inception against transcriptions of the published layers, written in another way; random weights."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvae.errors import WeightsError
from sdvae.perceptual import files
from sdvae.perceptual.files import MissingNetwork
from sdvae.perceptual.inception import Inception, resize_as_tensorflow1
from sdvae.perceptual.lpips import LPIPS, Net

Weights = Mapping[str, Tensor]

# torchvision's `features`: index of each convolution -> (stride, padding); pools; the ends of LPIPS' slices.
TORCHVISION = {
    "alex": ({0: (4, 2), 3: (1, 2), 6: (1, 1), 8: (1, 1), 10: (1, 1)}, {2: 3, 5: 3}, (1, 4, 7, 9, 11)),
    "vgg": (
        dict.fromkeys((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), (1, 1)),
        dict.fromkeys((4, 9, 16, 23), 2),
        (3, 8, 15, 22, 29),
    ),
}


def random_weights(network: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, value in network.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if value.dim() > 1:
            weights[key] = noise * (2 / value[0].numel()) ** 0.5
        else:
            weights[key] = 0.5 + noise.abs() if "var" in key or key.endswith("bn.weight") else 0.2 * noise
    return weights


def lpips_transcribed(w: Weights, net: Net, first: Tensor, second: Tensor) -> Tensor:
    convolutions, pools, ends = TORCHVISION[net]
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    x = (torch.cat([first, second]) - shift) / scale
    total = torch.zeros(len(first))
    for index in range(ends[-1] + 1):
        if index in convolutions:
            stride, padding = convolutions[index]
            x = F.conv2d(x, w[f"features.{index}.weight"], w[f"features.{index}.bias"], stride, padding)
        elif index in pools:
            x = F.max_pool2d(x, pools[index], 2)
        else:
            x = F.relu(x)
        if index in ends:
            unit = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)
            ours, theirs = unit.chunk(2)
            head = w[f"heads.{ends.index(index)}"].flatten()
            total += torch.einsum("nchw,c->nhw", (ours - theirs) ** 2, head).mean((1, 2))
    return total


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_the_published_network(net: Net) -> None:
    network = LPIPS(net)
    weights = random_weights(network)
    network.load_state_dict(weights)
    first, second = torch.rand(2, 2, 3, 65, 71) * 2 - 1
    theirs = lpips_transcribed(weights, net, first, second)
    assert theirs.abs().min() > 1e-3
    torch.testing.assert_close(network(first, second), theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(network(first, first), torch.zeros(2))


def inception_transcribed(w: Weights, x: Tensor) -> Tensor:  # pixels in [-1, 1] of 299 px
    def conv(x: Tensor, name: str, stride: int = 1, padding: int | tuple[int, int] = 0) -> Tensor:
        x = F.conv2d(x, w[f"{name}.conv.weight"], None, stride, padding)
        mean, var = w[f"{name}.bn.running_mean"], w[f"{name}.bn.running_var"]
        scale = w[f"{name}.bn.weight"] / (var + 0.001).sqrt()
        return F.relu((x - mean[:, None, None]) * scale[:, None, None] + w[f"{name}.bn.bias"][:, None, None])

    def mean_pool(x: Tensor) -> Tensor:
        ones = torch.ones_like(x[:, :1])
        return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(ones, 3, 1, 1)

    def a(x: Tensor, n: str) -> Tensor:
        double = conv(conv(x, f"{n}.branch3x3dbl_1"), f"{n}.branch3x3dbl_2", padding=1)
        return torch.cat([
            conv(x, f"{n}.branch1x1"), conv(conv(x, f"{n}.branch5x5_1"), f"{n}.branch5x5_2", padding=2),
            conv(double, f"{n}.branch3x3dbl_3", padding=1), conv(mean_pool(x), f"{n}.branch_pool"),
        ], 1)  # fmt: skip

    def b(x: Tensor, n: str) -> Tensor:
        double = conv(conv(x, f"{n}.branch3x3dbl_1"), f"{n}.branch3x3dbl_2", padding=1)
        return torch.cat(
            [conv(x, f"{n}.branch3x3", 2), conv(double, f"{n}.branch3x3dbl_3", 2), F.max_pool2d(x, 3, 2)], 1
        )

    def c(x: Tensor, n: str) -> Tensor:
        seven = conv(conv(x, f"{n}.branch7x7_1"), f"{n}.branch7x7_2", padding=(0, 3))
        double = conv(conv(x, f"{n}.branch7x7dbl_1"), f"{n}.branch7x7dbl_2", padding=(3, 0))
        double = conv(conv(double, f"{n}.branch7x7dbl_3", padding=(0, 3)), f"{n}.branch7x7dbl_4", padding=(3, 0))
        return torch.cat([
            conv(x, f"{n}.branch1x1"), conv(seven, f"{n}.branch7x7_3", padding=(3, 0)),
            conv(double, f"{n}.branch7x7dbl_5", padding=(0, 3)), conv(mean_pool(x), f"{n}.branch_pool"),
        ], 1)  # fmt: skip

    def d(x: Tensor, n: str) -> Tensor:
        seven = conv(conv(x, f"{n}.branch7x7x3_1"), f"{n}.branch7x7x3_2", padding=(0, 3))
        seven = conv(conv(seven, f"{n}.branch7x7x3_3", padding=(3, 0)), f"{n}.branch7x7x3_4", 2)
        return torch.cat([conv(conv(x, f"{n}.branch3x3_1"), f"{n}.branch3x3_2", 2), seven, F.max_pool2d(x, 3, 2)], 1)

    def e(x: Tensor, n: str, pooled: Tensor) -> Tensor:
        three = conv(x, f"{n}.branch3x3_1")
        double = conv(conv(x, f"{n}.branch3x3dbl_1"), f"{n}.branch3x3dbl_2", padding=1)
        return torch.cat([
            conv(x, f"{n}.branch1x1"),
            conv(three, f"{n}.branch3x3_2a", padding=(0, 1)), conv(three, f"{n}.branch3x3_2b", padding=(1, 0)),
            conv(double, f"{n}.branch3x3dbl_3a", padding=(0, 1)), conv(double, f"{n}.branch3x3dbl_3b", padding=(1, 0)),
            conv(pooled, f"{n}.branch_pool"),
        ], 1)  # fmt: skip

    x = conv(conv(conv(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3"), "Conv2d_2b_3x3", padding=1)
    x = conv(conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1"), "Conv2d_4a_3x3")
    x = F.max_pool2d(x, 3, 2)
    for n in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = a(x, n)
    x = b(x, "Mixed_6a")
    for n in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = c(x, n)
    x = d(x, "Mixed_7a")
    x = e(x, "Mixed_7b", mean_pool(x))
    x = e(x, "Mixed_7c", F.max_pool2d(x, 3, 1, 1))
    return x.mean((2, 3))


@torch.no_grad()
def test_inception_is_the_published_network() -> None:
    network = Inception()
    weights = random_weights(network)
    network.load_state_dict(weights)
    levels = torch.randint(0, 256, (1, 3, 299, 299)).float()
    theirs = inception_transcribed(weights, (levels - 128) / 128)
    assert theirs.shape == (1, 2048)
    assert theirs.std() > 1e-3
    torch.testing.assert_close(network(levels), theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_names_and_sizes_are_those_of_the_published_file() -> None:
    """torch's conversion holds 23,885,392 numbers; 2,065,392 of them are the classifier's, which FID does not use."""
    state = Inception().state_dict()
    learned = sum(value.numel() for key, value in state.items() if "running" not in key)
    assert learned == 21_785_568
    assert state["Mixed_6b.branch7x7dbl_5.conv.weight"].shape == (192, 128, 1, 7)


def test_the_resize_is_tensorflows() -> None:
    row = torch.tensor([0.0, 10.0, 20.0, 30.0]).expand(1, 3, 2, 4)
    resized = resize_as_tensorflow1(row, 8)[0, 0, 0]
    assert resized.tolist() == [0, 5, 10, 15, 20, 25, 30, 30]  # at i / 2; the last stays at the border
    shrunk = resize_as_tensorflow1(torch.arange(9.0).expand(1, 3, 9, 9), 3)[0, 0, 0]
    assert shrunk.tolist() == [0, 3, 6]  # every third pixel: no antialias


def test_a_network_that_is_not_here_is_told_with_file_hash_and_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDVAE_NETWORKS", str(tmp_path))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(MissingNetwork, match=r"vgg16-397923af\.pth \(sha256 397923af\.\.\.\), from https://") as told:
        files.read("vgg16")
    assert "the folder that SDVAE_NETWORKS names" in str(told.value)
    assert str(tmp_path) not in str(told.value)  # a page that is passed on quotes it


def test_a_file_of_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDVAE_NETWORKS", str(tmp_path))
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "alexnet-owt-7be5be79.pth")
    with pytest.raises(WeightsError, match="sha256"):
        files.read("alexnet")


def test_the_published_layout_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file as torchvision's, with the classifier that LPIPS does not use, and the heads that torchmetrics carries."""
    network = LPIPS("alex")
    backbone = {key: value for key, value in random_weights(network).items() if key.startswith("features")}
    path = tmp_path / "alexnet-owt-7be5be79.pth"
    torch.save(backbone | {"classifier.1.weight": torch.zeros(2, 2)}, path)
    monkeypatch.setenv("SDVAE_NETWORKS", str(tmp_path))
    digest = files.read_file(path).sha256
    known = files.PublishedFile("alexnet", path.name, "https://example.org", digest)
    monkeypatch.setattr(files, "FILES", {"alexnet": known})
    loaded, (of_backbone, of_heads) = LPIPS.load("alex")
    assert of_backbone.sha256 == digest
    assert of_heads.file == "alex.pth"
    assert len(of_heads.sha256) == 64
    assert torch.equal(loaded.state_dict()["features.3.weight"], backbone["features.3.weight"])
    assert all(bool((head >= 0).all()) and float(head.sum()) > 0 for head in loaded.heads)


def test_a_file_of_other_layers_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"nothing for features\.0\.weight"):
        files.fill(LPIPS("alex"), {}, "x.pth")
