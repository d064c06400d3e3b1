import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import diffusers
import pytest
import torch

from sdvae.config import FAMILIES, VAEConfig
from sdvae.errors import ConfigError


def diffusers_config(config: VAEConfig) -> dict[str, object]:
    """What diffusers itself records for a model built of our mapping: of its own bookkeeping, the class alone."""
    with torch.device("meta"):  # a config needs no weights
        mapping = config.to_diffusers()
        recorded = dict(getattr(diffusers, mapping["_class_name"]).from_config(mapping).config)
    return {"_class_name": mapping["_class_name"]} | {key: recorded[key] for key in recorded if key[0] != "_"}


def plain(values: object) -> object:
    """JSON's view of a value: tuples are lists."""
    return json.loads(json.dumps(values))


# Written out once more: a slip in one of these numbers makes grey or garish pictures, and no error.
@pytest.mark.parametrize(
    ("family", "latent_channels", "downscale", "scaling_factor", "shift_factor", "has_quant_convs"),
    [
        ("sd1", 4, 8, 0.18215, None, True),
        ("sdxl", 4, 8, 0.13025, None, True),
        ("sd3", 16, 8, 1.5305, 0.0609, False),
        ("flux1", 16, 8, 0.3611, 0.1159, False),
        ("flux2", 32, 8, 1.0, None, True),
        ("cogview4", 16, 8, 1.0, None, False),
        ("playground", 4, 8, 0.5, None, True),
        ("kl-f4", 3, 4, 1.0, None, True),
        ("kl-f16", 16, 16, 1.0, None, True),
        ("x4-upscaler", 4, 4, 0.08333, None, True),
        ("small", 4, 8, 0.18215, None, False),
    ],
)
def test_families(
    family: str, latent_channels: int, downscale: int, scaling_factor: float, shift_factor: float | None,
    has_quant_convs: bool,
) -> None:  # fmt: skip
    config = VAEConfig.from_family(family)
    assert config is FAMILIES[family]
    assert config.latent_channels == latent_channels
    assert config.downscale == downscale
    assert config.scaling_factor == scaling_factor
    assert config.shift_factor == shift_factor
    assert config.use_quant_conv == config.use_post_quant_conv == has_quant_convs


def test_every_family_is_pinned_above() -> None:
    assert set(FAMILIES) == {
        "sd1", "sdxl", "sd3", "flux1", "flux2", "cogview4", "playground", "kl-f4", "kl-f16", "x4-upscaler", "small"
    }  # fmt: skip


# Configs of classes other than AutoencoderKL, as huggingface.co has them (names of their repositories).
PUBLISHED: dict[str, tuple[dict[str, object], VAEConfig]] = {
    "black-forest-labs/FLUX.2-dev": (
        {
            "_class_name": "AutoencoderKLFlux2", "act_fn": "silu", "batch_norm_eps": 0.0001, "batch_norm_momentum": 0.1,
            "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
            "force_upcast": True, "in_channels": 3, "latent_channels": 32, "layers_per_block": 2,
            "mid_block_add_attention": True, "norm_num_groups": 32, "out_channels": 3, "patch_size": [2, 2],
            "sample_size": 1024, "up_block_types": ["UpDecoderBlock2D"] * 4, "use_post_quant_conv": True,
            "use_quant_conv": True,
        },
        replace(FAMILIES["flux2"], latents_mean=None, latents_std=None),
    ),
    "black-forest-labs/FLUX.2-small-decoder": (
        {
            "_class_name": "AutoencoderKLFlux2", "block_out_channels": [128, 256, 512, 512],
            "decoder_block_out_channels": [96, 192, 384, 384], "latent_channels": 32, "patch_size": [2, 2],
        },
        replace(
            FAMILIES["flux2"], latents_mean=None, latents_std=None, decoder_block_out_channels=(96, 192, 384, 384)
        ),
    ),
    "cross-attention/asymmetric-autoencoder-kl-x-2": (
        {
            "_class_name": "AsymmetricAutoencoderKL", "act_fn": "silu", "down_block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3, "latent_channels": 4,
            "layers_per_down_block": 2, "layers_per_up_block": 5, "norm_num_groups": 32, "out_channels": 3,
            "sample_size": 32, "scaling_factor": 0.18215, "up_block_out_channels": [256, 512, 1024, 1024],
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        },
        VAEConfig(
            decoder_block_out_channels=(256, 512, 1024, 1024), decoder_layers_per_block=5, sample_size=32,
            force_upcast=False,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_of_other_classes(name: str) -> None:
    mapping, config = PUBLISHED[name]
    assert VAEConfig.from_diffusers(mapping) == config
    assert VAEConfig.from_diffusers(json.loads(json.dumps(config.to_diffusers()))) == config
    with torch.device("meta"):
        theirs = getattr(diffusers, str(mapping["_class_name"])).from_config(mapping)
    assert VAEConfig.from_diffusers({**theirs.config, "_class_name": mapping["_class_name"]}) == config
    ours = {key: value for key, value in config.to_diffusers().items() if key != "_class_name"}
    assert plain(ours) == plain({key: theirs.config[key] for key in ours})


def test_a_decoder_that_enlarges_and_patches_of_another_kind_are_a_sentence() -> None:
    mapping = PUBLISHED["cross-attention/asymmetric-autoencoder-kl-x-2"][0]
    five = {"up_block_out_channels": [128, 128, 256, 512, 512], "up_block_types": ["UpDecoderBlock2D"] * 5}
    with pytest.raises(ConfigError, match="levels"):  # AiArtLab/simplevae2x
        VAEConfig.from_diffusers(mapping | five)
    mapping = PUBLISHED["black-forest-labs/FLUX.2-dev"][0]
    for patch in ([1, 1], [2, 4], 2):
        with pytest.raises(ConfigError, match=r"patch_size is .*; sdvae knows square patches"):
            VAEConfig.from_diffusers(mapping | {"patch_size": patch})
    with pytest.raises(ConfigError, match="a variance that is not 0 or above"):
        FAMILIES["flux2"].with_batch_norm([0.0] * 128, [-1.0] * 128)


@pytest.mark.parametrize("family", FAMILIES)
def test_to_diffusers_and_back(family: str) -> None:
    config = without_statistics(FAMILIES[family])
    assert VAEConfig.from_diffusers(config.to_diffusers()) == config
    through_json = json.loads(json.dumps(config.to_diffusers()))
    assert VAEConfig.from_diffusers(through_json) == config


def without_statistics(config: VAEConfig) -> VAEConfig:
    """What a config.json tells: FLUX.2's statistics lie among the weights."""
    return replace(config, latents_mean=None, latents_std=None) if config.latents_patch > 1 else config


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_reads_our_mapping_as_we_mean_it(family: str) -> None:
    """Every key is one that diffusers knows, none is left to its default, and reading its config gives ours back."""
    config = without_statistics(FAMILIES[family])
    ours = config.to_diffusers()
    assert plain(ours) == plain(diffusers_config(config))
    assert VAEConfig.from_diffusers(diffusers_config(config)) == config


def test_fields_left_out_get_the_defaults_of_diffusers() -> None:
    with_defaults = VAEConfig.from_diffusers({"_class_name": "AutoencoderKL"})
    assert VAEConfig.from_diffusers(diffusers.AutoencoderKL().config) == with_defaults
    assert with_defaults.block_out_channels == (64,)
    assert with_defaults != VAEConfig()


def test_values_that_are_no_default_survive_the_round_trip() -> None:
    config = VAEConfig(
        in_channels=1, out_channels=2, latent_channels=2, block_out_channels=(8, 16), layers_per_block=3,
        norm_num_groups=4, attention_levels=(0,), mid_block_add_attention=False, use_quant_conv=False,
        use_post_quant_conv=False, sample_size=64, scaling_factor=0.5, shift_factor=0.25, latents_mean=(0.1, 0.2),
        latents_std=(1.5, 2.5), force_upcast=False, padding="reflect", unused={"use_tiling": True},
    )  # fmt: skip
    differing = {name for name in vars(config) if getattr(config, name) != getattr(VAEConfig(), name)}
    of_other_classes = {"decoder_block_out_channels", "decoder_layers_per_block", "latents_patch", "batch_norm_eps"}
    assert differing == set(vars(config)) - of_other_classes, "every field must be tried"
    assert VAEConfig.from_diffusers(json.loads(json.dumps(config.to_diffusers()))) == config
    assert plain(diffusers_config(config)) == plain(config.to_diffusers())


@pytest.mark.parametrize(("file", "sample_size"), [("sd15_vae_config.json", 512), ("sd21base_vae_config.json", 768)])
def test_real_configs_of_stable_diffusion(data_dir: Path, file: str, sample_size: int) -> None:
    """Both are SD 1's network; SD 1.5's own file names the Flax class."""
    mapping = json.loads((data_dir / "weights" / "configs" / file).read_text(encoding="utf-8"))
    assert mapping["_class_name"] == ("FlaxAutoencoderKL" if file.startswith("sd15") else "AutoencoderKL")
    assert VAEConfig.from_diffusers(mapping) == replace(FAMILIES["sd1"], sample_size=sample_size)


def test_the_flax_class_is_the_same_network() -> None:
    mapping = FAMILIES["sd1"].to_diffusers() | {"_class_name": "FlaxAutoencoderKL"}
    assert VAEConfig.from_diffusers(mapping) == FAMILIES["sd1"]


def test_attention_levels_are_block_types() -> None:
    mapping = FAMILIES["kl-f16"].to_diffusers()
    assert mapping["down_block_types"] == ["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"]
    assert mapping["up_block_types"] == ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 4


def test_a_sample_size_of_two_sides_is_its_height() -> None:
    mapping = FAMILIES["sd1"].to_diffusers() | {"sample_size": [512, 768]}
    assert VAEConfig.from_diffusers(mapping).sample_size == 512


# What is refused, and what the message tells.


@pytest.mark.parametrize(("typo", "meant"), [("sd", "sd1"), ("sdlx", "sdxl"), ("flux", "flux1"), ("klf16", "kl-f16")])
def test_an_unknown_family_names_the_close_ones(typo: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        VAEConfig.from_family(typo)
    assert repr(typo) in str(caught.value)
    suggested = str(caught.value).removesuffix("?").partition("did you mean ")[2].split(", ")
    assert meant in suggested
    assert len(suggested) <= 3 < len(FAMILIES), "the close ones, not all"


def test_a_family_like_no_other_lists_all() -> None:
    with pytest.raises(ConfigError) as caught:
        VAEConfig.from_family("####")
    assert all(name in str(caught.value) for name in FAMILIES)


def refusal(**changes: object) -> str:
    with pytest.raises(ConfigError) as caught:
        VAEConfig.from_diffusers(FAMILIES["sd1"].to_diffusers() | changes)
    return str(caught.value)


def test_unknown_keys_are_named() -> None:
    message = refusal(temporal_layers=2, bottleneck="wide")
    assert "bottleneck='wide', temporal_layers=2; if the weights do not depend" in message


def test_keys_with_an_underscore_are_bookkeeping() -> None:
    mapping = FAMILIES["sd1"].to_diffusers() | {"_diffusers_version": "0.42.1", "_name_or_path": "x"}
    assert VAEConfig.from_diffusers(mapping) == FAMILIES["sd1"]


@pytest.mark.parametrize("name", ["AutoencoderTiny", "AutoencoderKLWan", "UNet2DConditionModel"])
def test_another_class_is_refused(name: str) -> None:
    assert name in refusal(_class_name=name)


def test_our_own_field_is_not_read_from_diffusers() -> None:
    assert "attention_levels" in refusal(attention_levels=[0])


def test_another_activation_is_refused() -> None:
    assert "'gelu'" in refusal(act_fn="gelu")
    same = FAMILIES["sd1"].to_diffusers() | {"act_fn": "swish"}  # another name of SiLU
    assert VAEConfig.from_diffusers(same) == FAMILIES["sd1"]


@pytest.mark.parametrize(
    ("key", "types"),
    [
        ("down_block_types", ["DownEncoderBlock2D"] * 3 + ["CrossAttnDownBlock2D"]),
        ("down_block_types", ["DownEncoderBlock2D"] * 3),
        ("down_block_types", ["DownEncoderBlock2D"] * 5),
        ("down_block_types", ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]),  # the decoder has none there
        ("up_block_types", ["UpDecoderBlock2D"] * 3),
        ("up_block_types", ["DownEncoderBlock2D"] * 4),
    ],
)
def test_other_block_types_are_refused(key: str, types: list[str]) -> None:
    assert "4 levels" in refusal(**{key: types})


def test_groups_must_divide_the_widths() -> None:
    with pytest.raises(ConfigError, match="norm_num_groups=32"):
        VAEConfig(block_out_channels=(128, 200))
    with pytest.raises(ConfigError, match="block_out_channels"):
        VAEConfig(block_out_channels=())


@pytest.mark.parametrize("levels", [(4,), (-1,)])
def test_attention_levels_must_exist(levels: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"0\.\.3"):
        VAEConfig(attention_levels=levels)


@pytest.mark.parametrize("name", ["latents_mean", "latents_std"])
def test_statistics_of_latents_are_one_a_channel(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} has 3 values for 4"):
        VAEConfig(**{name: (0.0, 0.0, 0.0)})


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        FAMILIES["sd1"].latent_channels = 16  # type: ignore[misc]
