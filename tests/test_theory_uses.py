"""The second half of the theory run: sprites, arithmetic, anomalies, interpolation, augmentation, a game of catch."""

import gzip
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from theory import (
    agent,
    anomaly,
    arithmetic,
    augmentation,
    bernoulli,
    catch,
    cross_entropy_search,
    draw_sprites,
    interpolation,
    likelihood,
    sprites,
)
from theory.fit import Schedule
from theory.grey import Shape
from theory.work import Findings, Work
from torch import Tensor

TINY, ONCE = Shape(num_latents=3, width=8), Schedule(1, batch_size=64)
FEW_DIGITS = likelihood.Settings(bernoulli.Shape(3, 8), ONCE)


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as MNIST's, of a few images: a square whose place is the label."""
    folder = tmp_path_factory.mktemp("mnist")
    rng = np.random.default_rng(0)
    for stem, number in (("train", 120), ("t10k", 60)):
        labels = np.arange(number, dtype=np.uint8) % 10
        images = rng.integers(0, 40, (number, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            top, left = 4 + 12 * (label // 5), 1 + 5 * (label % 5)
            image[top : top + 8, left : left + 5] = 255
        header = struct.pack(">iiii", 0x803, number, 28, 28)
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        header = struct.pack(">ii", 0x801, number)
        (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))
    return folder


def require_whole(work: Work, findings: Findings) -> None:
    """Rows to print, numbers that JSON holds, pictures that lie there."""
    work.finish(findings)
    assert work.findings() == findings
    assert findings.rows
    assert findings.pictures
    for picture in findings.pictures:
        assert (work.folder / picture).stat().st_size > 1000


# --- Sprites ---


@pytest.mark.parametrize("shape", range(3), ids=draw_sprites.SHAPES)
def test_sprites_have_the_area_and_the_centre_that_their_factors_say(shape: int) -> None:
    factors = torch.tensor([[shape, size, angle, x, y] for size in (5.0, 10.0) for angle in (0.0, 0.7, 2.0)
                            for x, y in ((9.5, 22.5), (15.2, 11.9))])  # fmt: skip
    images = draw_sprites.draw(factors).double()
    area = images.sum((1, 2))
    middle = torch.arange(draw_sprites.SIDE) + 0.5
    torch.testing.assert_close(area, factors[:, 1].double().square(), rtol=0.05, atol=0.0)
    for axis, place in ((1, factors[:, 3]), (2, factors[:, 4])):
        found = (images.sum(axis) * middle).sum(1) / area
        torch.testing.assert_close(found, place.double(), rtol=0.0, atol=0.126)  # half a step of sampling


def test_sprites_turn_counter_clockwise() -> None:
    placed = torch.tensor([[2.0, 10.0, 0.0, 16.0, 16.0]])
    turned = placed + torch.tensor([0.0, 0.0, math.pi / 2, 0.0, 0.0])
    heart = draw_sprites.draw(placed)[0]
    assert heart.sum(1).argmax() < 16  # its wide part is above
    torch.testing.assert_close(draw_sprites.draw(turned)[0], heart.rot90(), atol=0.2, rtol=0.0)


def test_every_sprite_is_there_once() -> None:
    factors = torch.tensor([[0.0, 5.0, 0.0, 9.5, 9.5]])
    images, all_factors = draw_sprites.every_sprite()
    assert len(images) == len(all_factors.unique(dim=0)) == 28_224
    torch.testing.assert_close(images[0], draw_sprites.draw(factors)[0])


def test_the_gap_is_1_of_a_perfect_code_and_0_of_one_that_says_it_twice() -> None:
    factors = np.stack(np.meshgrid(np.arange(4.0), np.arange(3.0), np.arange(5)), -1).reshape(-1, 3)[:, :2]
    rng = np.random.default_rng(0)
    factors = factors.astype(np.float32)
    noise = np.zeros((len(factors), 1), np.float32)
    perfect = np.concatenate([-factors[:, 1:], noise, 0.1 * factors[:, :1]], 1)
    np.testing.assert_allclose(sprites.gaps(sprites.information(perfect, factors)), 1.0, atol=1e-9)
    twice = np.concatenate([factors, factors], 1)
    np.testing.assert_allclose(sprites.gaps(sprites.information(twice, factors)), 0.0, atol=1e-9)
    tied = np.repeat(factors, 40, 0)  # (a + b, a - b): each latent tells a part of both factors
    turned = np.stack([tied.sum(1), tied[:, 0] - tied[:, 1]], 1) + 1e-3 * rng.normal(size=tied.shape).astype(np.float32)
    assert sprites.gaps(sprites.information(turned.astype(np.float32), tied)).max() < 0.1


def test_sprites_run(tmp_path: Path) -> None:
    work = Work(tmp_path / "sprites", tmp_path)
    findings = sprites.run(work, sprites.Settings(TINY, ONCE, num_seeds=1, every=101))
    require_whole(work, findings)
    assert {"beta 1, seed 0", "beta 4, seed 0"} == set(findings.numbers)


def test_arithmetic_runs(tmp_path: Path) -> None:
    work = Work(tmp_path / "arithmetic", tmp_path)
    findings = arithmetic.run(
        work, arithmetic.Settings(TINY, ONCE, classifier=ONCE, num_drawn=40, num_sums=16, every=37)
    )
    require_whole(work, findings)
    assert {"latents", "attribute", "pixels", "drawn"} <= findings.numbers["found"].keys()


class _Straight:
    """A VAE whose latents are the pixels: what it adds is known."""

    def encode(self, images: Tensor) -> "_Straight":
        self.images = images
        return self

    def mode(self) -> Tensor:
        return self.images

    def mean_image(self, latents: Tensor) -> Tensor:
        return latents


def test_terms_share_their_place_and_the_sum_has_the_signs_of_its_name() -> None:
    big, small, heart, aim = arithmetic.terms(3, torch.Generator().manual_seed(0))
    for images, area in zip((big, small, heart, aim), (100.0, 49.0, 49.0, 100.0), strict=True):
        torch.testing.assert_close(images.sum(1), torch.full((3,), area), rtol=0.05, atol=0.0)
    assert (small > big).sum() == 0
    made = arithmetic.sums(_Straight(), big, small, heart)
    torch.testing.assert_close(made["latents"], big - small + heart)
    torch.testing.assert_close(made["attribute"][1], (big - small).mean(0) + heart[1])
    torch.testing.assert_close(made["pixels"], made["latents"].clamp(0.0, 1.0))


# --- Anomalies ---


def test_auroc_is_1_where_all_strange_images_score_higher() -> None:
    is_normal = torch.tensor([True, True, False, False])
    assert anomaly.auroc(torch.tensor([0.1, 0.2, 0.3, 0.4]), is_normal) == 1.0
    assert anomaly.auroc(torch.tensor([0.4, 0.3, 0.2, 0.1]), is_normal) == 0.0
    assert anomaly.auroc(torch.tensor([0.1, 0.3, 0.2, 0.4]), is_normal) == 0.75


def test_an_error_is_shared_out_over_the_ink() -> None:
    """The same shape half as bright, of a VAE that draws black: the squared error is a quarter, its share a half."""
    black = anomaly.DenseVAE(4, 2, 4)
    torch.nn.init.constant_(black.decoder[-1].bias, -40.0)
    torch.nn.init.zeros_(black.decoder[-1].weight)
    image = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    found = anomaly.scores(black, image, 2, torch.Generator().manual_seed(0))
    assert found["error"].tolist() == [2.0, 0.5]
    assert found["share"].tolist() == [1.0, 0.5]
    assert (found["likelihood"] <= found["elbo"] + 1e-4).all()


def test_anomalies_run_and_score_noise_above_what_was_learned(tmp_path: Path, mnist: Path) -> None:
    work = Work(tmp_path / "anomaly", mnist)
    settings = anomaly.Settings((0, 7), Shape(num_latents=3, width=16), Schedule(60, batch_size=4), num_samples=5)
    findings = anomaly.run(work, settings)
    require_whole(work, findings)
    assert len(findings.rows) == 4
    assert min(findings.numbers["mean"].values()) > 0.9
    by_digit = findings.numbers["by_digit"]
    assert set(by_digit) == {"0", "7"}


# --- Interpolation and augmentation ---


def test_pairs_are_of_two_labels_and_paths_lie_between_their_ends() -> None:
    labels = torch.arange(50) % 3
    chosen = interpolation.pairs(labels, 20, torch.Generator().manual_seed(0))
    assert chosen.shape == (20, 2)
    assert (labels[chosen[:, 0]] != labels[chosen[:, 1]]).all()
    blended = interpolation.paths(_straight_vae(), torch.zeros(2, 5), torch.ones(2, 5))["pixels"]
    torch.testing.assert_close(blended[1, :, 2], torch.tensor(interpolation.POSITIONS))


def _straight_vae() -> interpolation.DenseVAE:
    return interpolation.DenseVAE(5, 2, 4)


def test_interpolation_and_augmentation_run(tmp_path: Path, mnist: Path) -> None:
    work = Work(tmp_path / "interpolation", mnist)
    findings = interpolation.run(work, interpolation.Settings(FEW_DIGITS, 1, 12))
    require_whole(work, findings)
    assert 0.1 <= min(findings.numbers["by_position"]["pixels"]) <= 1.0
    work = Work(tmp_path / "augmentation", mnist)
    settings = augmentation.Settings(2, 2, shape=TINY, vae=ONCE, classifier=ONCE, num_seeds=2, start=FEW_DIGITS)
    findings = augmentation.run(work, settings)
    require_whole(work, findings)
    assert {name: len(values) for name, values in findings.numbers["accuracy"].items()} == {
        "alone": 2, "the same 100": 2, "unlabelled": 2,
    }  # fmt: skip


def test_few_images_are_as_many_of_each_digit_with_their_labels() -> None:
    labels = torch.arange(100) % 10
    images, found = augmentation.few(labels[:, None].float(), labels, 3, torch.Generator().manual_seed(0))
    assert found.bincount().tolist() == [3] * 10
    assert torch.equal(images[:, 0].long(), found)


# --- The game ---


def test_the_ball_falls_the_paddle_moves_by_one_and_stays_inside() -> None:
    states = torch.tensor([[4, 0, 3], [4, 5, 0], [4, 5, catch.SIDE - catch.PADDLE]])
    assert catch.step(states, torch.tensor([0, 0, 2])).tolist() == [
        [4, 1, 2], [4, 6, 0], [4, 6, catch.SIDE - catch.PADDLE],
    ]  # fmt: skip
    assert catch.step(states[:1], torch.tensor([1])).tolist() == [[4, 1, 3]]


def test_a_ball_is_caught_where_its_middle_is_above_the_paddle() -> None:
    balls = torch.tensor([[ball, catch.NUM_STEPS, 10] for ball in range(7, 16)])
    assert catch.is_caught(balls).tolist() == [False, False, True, True, True, True, True, False, False]


def test_frames_show_ball_and_paddle() -> None:
    frame = catch.frames(torch.tensor([[4, 6, 10]]))[0]
    assert frame[6:9, 4:7].sum() == catch.BALL**2
    assert frame[catch.SIDE - 1, 10:15].sum() == catch.PADDLE
    assert frame.sum() == catch.BALL**2 + catch.PADDLE
    states = catch.every_state()
    assert torch.equal(catch.number_of(states), torch.arange(len(states)))
    last = catch.frames(states[-1:] + torch.tensor([0, 1, 0]))[0]
    assert last[catch.SIDE - 2].sum() == catch.BALL  # the ball lies on the paddle's row when the game ends


def test_who_follows_the_ball_catches_it_from_every_start() -> None:
    """A linear policy on the true state: by the sign of (middle of the ball) - (middle of the paddle)."""
    follow = torch.tensor([[[-2.0, 0.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0], [2.0, 0.0, -2.0, -3.0]]])
    seen = catch.every_state().float()
    assert agent.share_caught(follow.flatten(1), seen, catch.every_start()).item() == 1.0
    still = torch.zeros(1, 12)
    still[0, 7] = 1.0
    share = catch.is_caught(catch.every_start()).float().mean()
    assert agent.share_caught(still, seen, catch.every_start()).item() == pytest.approx(share.item())
    assert share < 0.4


def test_the_search_finds_a_planted_linear_policy() -> None:
    planted = torch.tensor([1.5, -2.0, 0.5, 3.0])

    def score(tried: Tensor, _: torch.Generator) -> Tensor:
        return -(tried - planted).square().sum(1)

    search = cross_entropy_search.Search(num_rounds=40, population=60, num_best=10)
    found = cross_entropy_search.cross_entropy_search(score, 4, torch.Generator().manual_seed(0), search)
    torch.testing.assert_close(found, planted, atol=0.05, rtol=0.0)


def test_the_agent_runs(tmp_path: Path) -> None:
    work = Work(tmp_path / "agent", tmp_path)
    settings = agent.Settings(
        10, TINY, ONCE, cross_entropy_search.Search(num_rounds=2, population=6, num_best=2), num_games=4, num_seeds=1
    )
    findings = agent.run(work, settings)
    require_whole(work, findings)
    assert set(findings.numbers["caught"]) == {"latents", "the true state", "pixels"}
