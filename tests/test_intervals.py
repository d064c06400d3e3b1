import numpy as np
import pytest

from sdvae.evaluate import intervals
from sdvae.evaluate.intervals import bootstrap_interval


@pytest.mark.parametrize("num_images", [12, 24, 200])
def test_the_interval_covers_the_mean_in_93_to_97_percent(num_images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores as photos have them: spread over some dB, a little skewed."""
    monkeypatch.setattr(intervals, "NUM_RESAMPLES", 600)
    rng = np.random.default_rng(0)
    num_trials = 1500
    covered = 0
    for trial in range(num_trials):
        values = 25.0 + 2.0 * rng.normal(size=num_images) + 0.3 * rng.exponential(size=num_images)
        low, high = bootstrap_interval(values, seed=trial) or (0.0, 0.0)
        covered += low <= 25.3 <= high
    assert 0.93 < covered / num_trials < 0.97


def test_students_t_is_that_of_the_tables() -> None:
    for freedom, value in ((5, 2.5706), (11, 2.2010), (23, 2.0687), (199, 1.9720)):
        assert intervals._student(freedom) == pytest.approx(value, rel=2e-3)


def test_one_value_has_no_interval() -> None:
    assert bootstrap_interval(np.array([25.0])) is None


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert bootstrap_interval(np.full(5, 25.0)) == (25.0, 25.0)


def test_the_normal_interval_of_many_images_continues_the_bootstraps(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).exponential(size=3000)
    drawn = bootstrap_interval(values)
    monkeypatch.setattr(intervals, "_MANY", 1000)
    assert bootstrap_interval(values) == pytest.approx(drawn, abs=0.003)
