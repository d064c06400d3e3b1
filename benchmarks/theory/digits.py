"""MNIST as tensors, and a small classifier that knows its digits."""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvae.sources.mnist import MnistSource
from theory.fit import Schedule, fit, seeded
from theory.work import Work

SIDE = 28
FILES = {"train": "train-images-idx3-ubyte.gz", "test": "t10k-images-idx3-ubyte.gz"}


@cache
def digits(folder: Path, split: str) -> tuple[Tensor, Tensor]:  # (N, 784) grey values in [0, 1], (N,) labels
    """All images of a split, "train" or "test"."""
    source = MnistSource(folder / FILES[split])
    entries = source.entries()
    header = len(source.read(entries[0].key)) - SIDE * SIDE
    levels = torch.frombuffer(bytearray(b"".join(source.read(e.key)[header:] for e in entries)), dtype=torch.uint8)
    labels = torch.tensor([int(entry.label or 0) for entry in entries], dtype=torch.int64)
    return levels.reshape(-1, SIDE * SIDE).to(torch.float32) / 255.0, labels


def binarised(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each pixel black or white, white as often as its grey value says (Salakhutdinov and Murray 2008)."""
    return (torch.rand(images.shape, generator=generator) < images).to(images.dtype)


class Classifier(nn.Module):
    """Two convolutions and two dense layers; `features` are the 128 numbers before the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(24, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(48 * (SIDE // 4) ** 2, 128), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(128, 10)

    def features(self, images: Tensor) -> Tensor:  # (N, 784) in [0, 1] -> (N, 128)
        """What a Frechet distance is taken of."""
        features: Tensor = self.body(images.reshape(-1, 1, SIDE, SIDE))
        return features

    def forward(self, images: Tensor) -> Tensor:  # (N, 784) -> (N, 10) logits
        """The logits of the ten digits."""
        logits: Tensor = self.head(self.features(images))
        return logits


def train_classifier(
    work: Work, name: str, images: Tensor, labels: Tensor, schedule: Schedule, seed: int = 0
) -> Classifier:
    """A classifier of these images; kept as NAME in the folder of `work`."""
    classifier = seeded(Classifier, seed)
    fit(work, name, classifier, (images, labels), lambda batch, _: F.cross_entropy(classifier(batch[0]), batch[1]),
        schedule, seed)  # fmt: skip
    return classifier


def digit_classifier(work: Work, num_epochs: int = 5) -> Classifier:
    """The one of all training images, which several parts share: it lies in the folder of part `classifier`."""
    images, labels = digits(work.digits, "train")
    return train_classifier(work.beside("classifier"), "digits", images, labels, Schedule(num_epochs))


@torch.inference_mode()
def accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of images whose most probable digit is their label."""
    found = torch.cat([classifier(part).argmax(1) for part in images.split(1000)])
    return (found == labels).to(torch.float32).mean().item()
