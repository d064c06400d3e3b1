import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from sdvae.cli.main import cli
from sdvae.config import FAMILIES
from sdvae.errors import StoreError
from sdvae.reading import stats
from sdvae.reading.stats import measure
from sdvae.store.remote import Mirror
from sdvae.store.shard import Shard
from sdvae.store.store import Store
from tests.made_stores import make_store

BUCKETS = {(32, 64): 7, (64, 64): 6}
BROKEN = ("dog/001.png", "cat/009.png")


@pytest.fixture(params=[False, True], ids=["plain", "mirrored"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Store:
    return make_store(tmp_path / "store", BUCKETS, has_flips=request.param, broken=BROKEN)


def everything(store: Store, name: str) -> np.ndarray:
    """All values of mean or logvar, mirrored ones too, as (C, values) in fp64."""
    found = []
    for shard in store.shards():
        for key, values in shard.tensors().items():
            if key.startswith(name):
                found.append(np.moveaxis(values.astype(np.float64), 1, 0).reshape(4, -1))
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("chunk_values", [1, 1000, 2**20])
def test_one_pass_in_chunks_is_exact(store: Store, chunk_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "_CHUNK_VALUES", chunk_values)
    found = measure(store)
    means, variances = everything(store, "mean"), np.exp(everything(store, "logvar"))
    variance = means.var(axis=1) + variances.mean(axis=1)  # the law of total variance
    assert found.mean == pytest.approx(means.mean(axis=1), rel=1e-12)
    assert found.std == pytest.approx(np.sqrt(variance), rel=1e-12)
    assert found.posterior_std == pytest.approx(np.sqrt(variances.mean(axis=1)), rel=1e-12)
    assert found.overall_mean == pytest.approx(means.mean(), rel=1e-12)
    assert found.overall_std == pytest.approx(np.sqrt(means.var() + variances.mean()), rel=1e-12)
    assert found.scaling_factor == pytest.approx(1 / found.overall_std)


def test_samples_scaled_by_the_suggested_factor_have_unit_std(store: Store) -> None:
    random = np.random.default_rng(0)
    means, stds = everything(store, "mean"), np.exp(0.5 * everything(store, "logvar"))
    samples = means + stds * random.standard_normal(means.shape)
    scaled = samples * measure(store).scaling_factor
    assert scaled.std() == pytest.approx(1.0, abs=5 / np.sqrt(samples.size)), "five standard errors"


def test_a_small_spread_far_from_zero_keeps_its_digits(tmp_path: Path) -> None:
    """Where E[x^2] - m^2 in fp32 would be noise: a std of 1e-3 at a mean of 1000."""
    running = stats._Running()
    values = 1000.0 + 1e-3 * np.random.default_rng(0).standard_normal((64, 4, 8, 8))
    for row in values:
        running.add(row[None])
    assert np.sqrt(running.squares / running.count) == pytest.approx(values.std((0, 2, 3)), rel=1e-9)


def test_sizes_and_quarantine_are_counted(store: Store) -> None:
    found = measure(store)
    assert (found.num_written, found.num_quarantined) == (11, 2)
    assert found.buckets == {"64x32": 6, "64x64": 5}
    assert found.quarantined == {"the file is truncated": 2}


def test_photos_that_were_enlarged_are_counted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure(store).num_enlarged == 0
    small = ("cat/003.png", *BROKEN)
    records = Shard.records

    def with_small_photos(self: Shard) -> list[dict[str, object]]:
        lines = records(self)
        return [line | {"original_px": [31, 35]} if line["key"] in small else line for line in lines]

    monkeypatch.setattr(Shard, "records", with_small_photos)
    assert any(line["key"] == small[0] for shard in store.shards() for line in shard.records())
    assert measure(store).num_enlarged == 1  # what is in quarantine has no pixels
    text = CliRunner().invoke(cli, ["stats", str(store.paths.root)], catch_exceptions=False).stdout
    assert "1 enlarged; --max-upscale" in text


def test_the_verb_prints_what_was_measured(store: Store) -> None:
    found = measure(store)
    root = str(store.paths.root)
    result = json.loads(CliRunner().invoke(cli, ["stats", root, "--json"], catch_exceptions=False).stdout)
    assert result["std"] == found.std and result["scaling_factor"] == found.scaling_factor
    assert (result["vae_scaling_factor"], result["num_shards"], result["num_committed_shards"]) == (0.18215, 4, 4)
    text = CliRunner().invoke(cli, ["stats", root], catch_exceptions=False).stdout
    for value in (*found.mean, *found.std, *found.posterior_std, found.scaling_factor):
        assert f"{value:.5f}" in text
    assert "6 of 64x32 px" in text and "2 quarantined: the file is truncated" in text
    assert f"the VAE's own, 0.18215, gives a std of {found.overall_std * 0.18215:.3f}" in text


def test_an_unfinished_store_is_measured_and_said_to_be_one(store: Store) -> None:
    store.paths.done(3).unlink()
    done = CliRunner().invoke(cli, ["stats", str(store.paths.root)], catch_exceptions=False)
    assert done.exit_code == 0 and "it has 3 of 4 shards" in done.stderr


def test_stores_on_object_storage_are_measured_and_exported(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDVAE_CACHE", str(tmp_path / "cache"))
    url = f"memory://{tmp_path.name}/store"
    Mirror(url, store.paths.root).push()
    done = CliRunner().invoke(cli, ["stats", url, "--json"], catch_exceptions=False)
    assert json.loads(done.stdout)["std"] == measure(store).std
    arguments = ["export", url, "--to", "webdataset", "-o", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert json.loads(done.stdout)["num_records"] == 11
    assert len(list((tmp_path / "out").glob("*.tar"))) == 4


def test_a_store_without_latents_is_an_error(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", {(32, 32): 1}, broken=("cat/000.png",))
    with pytest.raises(StoreError, match="holds no latents yet"):
        measure(store)


def test_any_number_of_channels(tmp_path: Path) -> None:
    config = replace(FAMILIES["sd3"], latent_channels=16)
    store = make_store(tmp_path / "store", {(32, 32): 2}, config=config)
    assert len(measure(store).mean) == 16
