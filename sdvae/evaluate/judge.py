"""The numbers of a recipe, with the networks that they need."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sdvae.errors import ReportError
from sdvae.evaluate.recipes import Recipe
from sdvae.evaluate.results import MetricColumn, Network
from sdvae.metrics import METRICS, Metric, psnr_of_levels
from sdvae.perceptual.files import Loaded, MissingNetwork
from sdvae.perceptual.inception import Inception
from sdvae.perceptual.lpips import LPIPS, Net
from sdvae.perceptual.ssim import ms_ssim, ssim

CPU = torch.device("cpu")
Score = Callable[[Tensor, Tensor], float]  # of levels (1, 3, H, W), 0..255 in fp64: reconstruction, original


@dataclass(frozen=True)
class Judge:
    """What gives a reconstruction its scores."""

    columns: tuple[MetricColumn, ...]
    scores: dict[str, Score]
    inception: Inception | None
    remarks: tuple[str, ...]  # on metrics whose network is not on this machine
    device: torch.device = CPU

    def score(self, levels: Tensor, original: Tensor) -> dict[str, float]:
        """Each metric of images that this image is large enough for."""
        side = min(levels.shape[2:])
        levels, original = levels.to(self.device), original.to(self.device)
        large = {name: score for name, score in self.scores.items() if side >= METRICS[name].min_side_px}
        return {name: score(levels, original) for name, score in large.items()}

    def features(self, levels: Tensor) -> Tensor:  # (1, 3, H, W) -> (2048,)
        """What set metrics compare."""
        assert self.inception is not None
        with torch.inference_mode():
            features: Tensor = self.inception(levels.to(self.device).float())
        return features[0].cpu()


def appoint(recipe: Recipe, device: torch.device, *, must_have_all: bool = False) -> Judge:
    """The judge of a recipe; a metric whose network is missing is left out with a remark, or refused."""
    columns: list[MetricColumn] = []
    scores: dict[str, Score] = {}
    absent: dict[str, list[str]] = {}  # what is missing -> the metrics that need it
    networks: dict[str, tuple[torch.nn.Module, tuple[Loaded, ...]]] = {}
    for name in recipe.metrics:
        metric = _find(name)
        try:
            if metric.network and metric.network not in networks:
                networks[metric.network] = _load(metric)
        except MissingNetwork as error:
            if must_have_all:
                raise
            absent.setdefault(str(error), []).append(metric.label)
            continue
        network, files = networks.get(metric.network, (None, ()))
        used = tuple(Network(file.file.partition(".")[0], file.file, file.sha256) for file in files)
        columns.append(MetricColumn(name, metric.label, metric.unit, metric.direction, metric.scope, used))
        if metric.scope == "image":
            scores[name] = _function(metric, recipe, network.to(device) if network else None)
    inception = networks["inception"][0] if "inception" in networks else None
    if not scores:
        raise ReportError(f"no metric of images is left to judge by; there are {', '.join(METRICS)}")
    assert inception is None or isinstance(inception, Inception)
    placed = inception.to(device) if inception else None
    remarks = tuple(f"Left out: {' and '.join(labels)}; {what}" for what, labels in absent.items())
    return Judge(tuple(columns), scores, placed, remarks, device)


def _find(name: str) -> Metric:
    if name not in METRICS:
        raise ReportError(f"there is no metric {name!r}; there are {', '.join(METRICS)}")
    return METRICS[name]


def _load(metric: Metric) -> tuple[torch.nn.Module, tuple[Loaded, ...]]:
    if metric.network == "inception":
        network, file = Inception.load()
        return network, (file,)
    net: Net = "alex" if metric.network == "alex" else "vgg"
    return LPIPS.load(net)


def _function(metric: Metric, recipe: Recipe, network: torch.nn.Module | None) -> Score:
    if network is not None:
        return partial(_lpips, network, recipe.lpips_range)
    functions: dict[str, Score] = {
        "psnr": psnr_of_levels,
        "ssim": partial(ssim, window=recipe.ssim_window),
        "ms_ssim": ms_ssim,
    }
    return functions[metric.name]


def _lpips(network: torch.nn.Module, value_range: str, levels: Tensor, original: Tensor) -> float:
    def pixels(image: Tensor) -> Tensor:
        unit = image.float() / 255
        return unit * 2 - 1 if value_range == "-1..1" else unit

    with torch.inference_mode():
        return float(network(pixels(levels), pixels(original)))
