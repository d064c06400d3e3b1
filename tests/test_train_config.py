"""Configs of training: TOML to typed values and back; what is wrong is named."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from sdvae.errors import ConfigError
from sdvae.train.config import (
    DataConfig,
    LossConfig,
    ModelConfig,
    Rung,
    TrainConfig,
    load_config,
    ready_configs,
    to_toml,
)  # fmt: skip

LEAST = "steps = 10\n[model]\nfamily = 'small'\n"


def load(folder: Path, text: str, *settings: str) -> TrainConfig:
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, settings)


def test_a_config_is_read_and_what_it_leaves_out_has_a_default(tmp_path: Path) -> None:
    config = load(tmp_path, LEAST + "[data]\nladder = [{size_px = 64, batch_size = 2}]\n[loss]\nsquared = 4\n")
    assert config == TrainConfig(
        10, ModelConfig("small"), data=DataConfig(ladder=(Rung(64, 2),)), loss=LossConfig(squared=4.0)
    )
    assert isinstance(config.loss.squared, float)


@pytest.mark.parametrize("name", ready_configs())
def test_ready_configs_load_by_name_and_survive_toml(name: str, tmp_path: Path) -> None:
    settings = ["teacher.start=TAESD"] if name == "small" else []
    config = load_config(name, settings)
    assert config == load_config(f"{name}.toml", settings)
    assert load(tmp_path, to_toml(config)) == config


def test_the_ready_configs_are_these() -> None:
    assert ready_configs() == ["finetune_decoder", "photos_kl_f8", "small"]


def test_a_file_wins_over_a_ready_config_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(LEAST)
    assert load_config("small.toml").steps == 10


def test_texts_of_every_kind_survive_toml(tmp_path: Path) -> None:
    for text in ('a "b" \\c', "Grüße 写真 \U0001f600", "tab\tline\nbell\x07\x7f", "''' \"\"\""):
        config = TrainConfig(1, ModelConfig("small"), data=DataConfig(source=text))
        assert load(tmp_path, to_toml(config)) == config
        assert tomllib.loads(to_toml(config))["data"]["source"] == text


def test_settings_change_single_keys(tmp_path: Path) -> None:
    config = load(
        tmp_path, LEAST, "steps=5", "data.source=my photos/*.jpg", "loss.kl=1e-3", "model.sample=false",
        "data.ladder=[{size_px=32, batch_size=8}, {size_px=64, batch_size=2, first_step=3}]", "loss.absolute=1",
        "optimizer.betas=[0.5, 0.9]",
    )  # fmt: skip
    assert (config.steps, config.data.source, config.loss.kl) == (5, "my photos/*.jpg", 1e-3)
    assert config.model.sample is False
    assert config.data.ladder == (Rung(32, 8), Rung(64, 2, 3))
    assert config.optimizer.betas == (0.5, 0.9)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("optimizer.learning_rat=1", "optimizer.learning_rat; did you mean optimizer.learning_rate"),
        ("stepz=1", "unknown key stepz; did you mean steps"),
        ("data.ladder=[{size=32, batch_size=8}]", "data.ladder[0].size; did you mean data.ladder[0].size_px"),
        ("steps=many", "steps is 'many'; it is a whole number"),
        ("steps=1.5", "steps is 1.5; it is a whole number"),
        ("steps=true", "steps is True; it is a whole number"),
        ("steps=0", "numbers of steps; 0 is none"),
        ("loss.kl=nan", "loss.kl is nan; it is a number"),
        ("loss.kl=-1.0", "loss.kl is -1.0; it is not below 0"),
        ("model.sample=yes", "model.sample is 'yes'; it is a true or false"),
        ("model.freeze=all", "it is one of nothing, encoder, decoder"),
        ("model=small", "model is 'small'; it is a table of keys"),
        ("steps.more=1", "has no keys"),
        ("optimizer.betas=[0.9]", "it is a list of 2 values"),
        ("data.ladder=[]", "they begin at 0 and rise"),
        ("data.ladder=[{size_px=32, batch_size=8, first_step=1}]", "they begin at 0 and rise"),
        ("data.ladder=[{size_px=32}]", "lacks data.ladder[0].batch_size"),
        ("data.micro_batches=3", "splits into 3 equal parts"),
        ("data.micro_batches=0", "1 or more"),
        ("data.max_shrink=0.5", "1.0 or more"),
        ("output.save_every=0", "output.save_every is 0; it is 1 step or more"),
        ("model.family=smal", "did you mean small"),
        ("loss.absolute=0", "no reconstruction term"),
        ("teacher.pull=1", "name the VAE that teaches"),
        ("steps", "sets nothing; write --set name.key=value"),
        (".steps=1", "sets nothing"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(setting: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, LEAST + "[loss]\nabsolute = 1.0", setting)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_terms_that_teach_what_is_frozen_are_refused() -> None:
    config = load_config("finetune_decoder")
    with pytest.raises(ConfigError, match="teach the encoder, which is frozen"):
        replace(config, teacher=replace(config.teacher, start="x", pull=1.0))
    frozen_decoder = replace(config.model, freeze="decoder")
    with pytest.raises(ConfigError, match="teaches the decoder, which is frozen"):
        replace(config, model=frozen_decoder, adversary=replace(config.adversary, weight=0.5))
    small = load_config("small", ["teacher.start=x"])
    with pytest.raises(ConfigError, match="have no halves"):
        replace(small, data=replace(small.data, ladder=(Rung(96, 3),)))


def test_files_that_are_no_config_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give a TOML file, or a ready one: finetune_decoder, photos_kl_f8, small"):
        load_config("tiny")
    with pytest.raises(ConfigError, match="is no TOML"):
        load(tmp_path, "steps == 1")
    with pytest.raises(ConfigError, match="lacks model"):
        load(tmp_path, "steps = 1")
    (tmp_path / "config.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "config.toml")
