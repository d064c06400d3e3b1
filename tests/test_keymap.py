import re
from dataclasses import replace

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor

from sdvae.config import FAMILIES, VAEConfig
from sdvae.errors import WeightsError
from sdvae.model import AutoencoderKL
from sdvae.weights.keymap import PREFIXES, find_vae, fit_layout, ldm_names
from tests.conftest import random_model

# CompVis' names and shapes of a KL-VAE of two levels, one block a level, attention at the lower level: the state dict
# of ldm.models.autoencoder.AutoencoderKL with ddconfig ch=8, ch_mult=(1, 2), num_res_blocks=1, z_channels=3.
TINY = VAEConfig(
    block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=3, attention_levels=(1,)
)
WRITTEN = """
encoder.conv_in 8 3 3 3
encoder.down.0.block.0.norm1 8
encoder.down.0.block.0.conv1 8 8 3 3
encoder.down.0.block.0.norm2 8
encoder.down.0.block.0.conv2 8 8 3 3
encoder.down.0.downsample.conv 8 8 3 3
encoder.down.1.block.0.norm1 8
encoder.down.1.block.0.conv1 16 8 3 3
encoder.down.1.block.0.norm2 16
encoder.down.1.block.0.conv2 16 16 3 3
encoder.down.1.block.0.nin_shortcut 16 8 1 1
encoder.down.1.attn.0.norm 16
encoder.down.1.attn.0.q 16 16 1 1
encoder.down.1.attn.0.k 16 16 1 1
encoder.down.1.attn.0.v 16 16 1 1
encoder.down.1.attn.0.proj_out 16 16 1 1
encoder.mid.block_1.norm1 16
encoder.mid.block_1.conv1 16 16 3 3
encoder.mid.block_1.norm2 16
encoder.mid.block_1.conv2 16 16 3 3
encoder.mid.attn_1.norm 16
encoder.mid.attn_1.q 16 16 1 1
encoder.mid.attn_1.k 16 16 1 1
encoder.mid.attn_1.v 16 16 1 1
encoder.mid.attn_1.proj_out 16 16 1 1
encoder.mid.block_2.norm1 16
encoder.mid.block_2.conv1 16 16 3 3
encoder.mid.block_2.norm2 16
encoder.mid.block_2.conv2 16 16 3 3
encoder.norm_out 16
encoder.conv_out 6 16 3 3
decoder.conv_in 16 3 3 3
decoder.mid.block_1.norm1 16
decoder.mid.block_1.conv1 16 16 3 3
decoder.mid.block_1.norm2 16
decoder.mid.block_1.conv2 16 16 3 3
decoder.mid.attn_1.norm 16
decoder.mid.attn_1.q 16 16 1 1
decoder.mid.attn_1.k 16 16 1 1
decoder.mid.attn_1.v 16 16 1 1
decoder.mid.attn_1.proj_out 16 16 1 1
decoder.mid.block_2.norm1 16
decoder.mid.block_2.conv1 16 16 3 3
decoder.mid.block_2.norm2 16
decoder.mid.block_2.conv2 16 16 3 3
decoder.up.1.block.0.norm1 16
decoder.up.1.block.0.conv1 16 16 3 3
decoder.up.1.block.0.norm2 16
decoder.up.1.block.0.conv2 16 16 3 3
decoder.up.1.block.1.norm1 16
decoder.up.1.block.1.conv1 16 16 3 3
decoder.up.1.block.1.norm2 16
decoder.up.1.block.1.conv2 16 16 3 3
decoder.up.1.attn.0.norm 16
decoder.up.1.attn.0.q 16 16 1 1
decoder.up.1.attn.0.k 16 16 1 1
decoder.up.1.attn.0.v 16 16 1 1
decoder.up.1.attn.0.proj_out 16 16 1 1
decoder.up.1.attn.1.norm 16
decoder.up.1.attn.1.q 16 16 1 1
decoder.up.1.attn.1.k 16 16 1 1
decoder.up.1.attn.1.v 16 16 1 1
decoder.up.1.attn.1.proj_out 16 16 1 1
decoder.up.1.upsample.conv 16 16 3 3
decoder.up.0.block.0.norm1 16
decoder.up.0.block.0.conv1 8 16 3 3
decoder.up.0.block.0.norm2 8
decoder.up.0.block.0.conv2 8 8 3 3
decoder.up.0.block.0.nin_shortcut 8 16 1 1
decoder.up.0.block.1.norm1 8
decoder.up.0.block.1.conv1 8 8 3 3
decoder.up.0.block.1.norm2 8
decoder.up.0.block.1.conv2 8 8 3 3
decoder.norm_out 8
decoder.conv_out 3 8 3 3
quant_conv 6 6 1 1
post_quant_conv 3 3 1 1
"""


def ldm_shapes(config: VAEConfig) -> dict[str, tuple[int, ...]]:
    """CompVis' modules and weight shapes, in the order of its constructors; held to WRITTEN below."""
    shapes: dict[str, tuple[int, ...]] = {}
    widths, z = config.block_out_channels, config.latent_channels

    def resnet(name: str, before: int, after: int) -> None:
        shapes[f"{name}.norm1"], shapes[f"{name}.conv1"] = (before,), (after, before, 3, 3)
        shapes[f"{name}.norm2"], shapes[f"{name}.conv2"] = (after,), (after, after, 3, 3)
        if before != after:
            shapes[f"{name}.nin_shortcut"] = (after, before, 1, 1)

    def attention(name: str, width: int) -> None:
        shapes[f"{name}.norm"] = (width,)
        shapes.update({f"{name}.{part}": (width, width, 1, 1) for part in ("q", "k", "v", "proj_out")})

    def middle(name: str) -> None:
        resnet(f"{name}.block_1", widths[-1], widths[-1])
        if config.mid_block_add_attention:
            attention(f"{name}.attn_1", widths[-1])
        resnet(f"{name}.block_2", widths[-1], widths[-1])

    shapes["encoder.conv_in"] = (widths[0], 3, 3, 3)
    before = widths[0]
    for level, width in enumerate(widths):
        for block in range(config.layers_per_block):
            resnet(f"encoder.down.{level}.block.{block}", before, width)
            before = width
            if level in config.attention_levels:
                attention(f"encoder.down.{level}.attn.{block}", width)
        if level < len(widths) - 1:
            shapes[f"encoder.down.{level}.downsample.conv"] = (width, width, 3, 3)
    middle("encoder.mid")
    shapes["encoder.norm_out"], shapes["encoder.conv_out"] = (widths[-1],), (2 * z, widths[-1], 3, 3)
    widths, before = config.decoder_widths, config.decoder_widths[-1]
    shapes["decoder.conv_in"] = (widths[-1], z, 3, 3)
    middle("decoder.mid")
    for level, width in reversed(list(enumerate(widths))):
        for block in range(config.decoder_layers + 1):
            resnet(f"decoder.up.{level}.block.{block}", before, width)
            before = width
            if level in config.attention_levels:
                attention(f"decoder.up.{level}.attn.{block}", width)
        if level > 0:
            shapes[f"decoder.up.{level}.upsample.conv"] = (width, width, 3, 3)
    shapes["decoder.norm_out"], shapes["decoder.conv_out"] = (widths[0],), (3, widths[0], 3, 3)
    inner = ("encoder.", "decoder.") if config.latents_patch > 1 else ("", "")  # as black-forest-labs' FLUX.2 has them
    if config.use_quant_conv:
        shapes[f"{inner[0]}quant_conv"] = (2 * z, 2 * z, 1, 1)
    if config.use_post_quant_conv:
        shapes[f"{inner[1]}post_quant_conv"] = (z, z, 1, 1)
    return shapes


def ldm_state_dict(config: VAEConfig, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, shape in ldm_shapes(config).items():
        tensors[f"{module}.weight"] = torch.randn(shape, generator=generator)
        tensors[f"{module}.bias"] = torch.randn(shape[:1], generator=generator)
    if config.latents_patch > 1:  # of FLUX.2, which knows no narrower latents
        std = torch.tensor(FAMILIES["flux2"].latents_std)
        tensors["bn.running_mean"] = torch.tensor(FAMILIES["flux2"].latents_mean)
        tensors["bn.running_var"] = std.square() - config.batch_norm_eps
        tensors["bn.num_batches_tracked"] = torch.tensor(1000)
    return tensors


def narrow(config: VAEConfig) -> VAEConfig:
    """The family with an eighth of its channels: every key as in full size, in a small fraction of the bytes."""
    decoder = config.decoder_block_out_channels
    return replace(
        config, block_out_channels=tuple(w // 8 for w in config.block_out_channels), norm_num_groups=4,
        decoder_block_out_channels=decoder and tuple(w // 8 for w in decoder),
    )  # fmt: skip


def to_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: fit_layout(name, tensors[key], "diffusers") for key, name in find_vae(tensors).names.items()}


def to_ldm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {ldm: fit_layout(name, tensors[name], "ldm") for name, ldm in ldm_names(tensors).items()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


def test_the_state_dict_of_these_tests_is_the_written_list() -> None:
    written = {line.split()[0]: tuple(map(int, line.split()[1:])) for line in WRITTEN.strip().splitlines()}
    assert ldm_shapes(TINY) == written
    assert len(written) == 77
    assert 2 * len(ldm_shapes(FAMILIES["sd1"])) == 248  # tensors in every published SD VAE


SMALL_DECODER = replace(FAMILIES["flux2"], decoder_block_out_channels=(96, 192, 384, 384))
ASYMMETRIC = replace(
    FAMILIES["sd1"], decoder_block_out_channels=(256, 512, 1024, 1024), decoder_layers_per_block=5, force_upcast=False
)
SHAPES = {**FAMILIES, "flux2 small decoder": SMALL_DECODER, "asymmetric": ASYMMETRIC}


@pytest.mark.parametrize("family", SHAPES)
def test_there_and_back_is_bit_equal_and_fits_the_model(family: str) -> None:
    config = SHAPES[family] if family == "small" else narrow(SHAPES[family])
    theirs = ldm_state_dict(config)
    ours = to_diffusers(theirs)
    expected = AutoencoderKL(config).state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {key: t.shape for key, t in expected.items()}
    assert_equal(to_ldm(ours), theirs)
    assert_equal(to_diffusers(ours), ours)


def check_against_diffusers(config: VAEConfig) -> None:
    theirs = ldm_state_dict(config)
    assert_equal(to_diffusers(theirs), convert_ldm_vae_checkpoint(dict(theirs), config.to_diffusers()))
    ours = random_model(config).state_dict()
    assert_equal(convert_ldm_vae_checkpoint(to_ldm(ours), config.to_diffusers()), dict(ours))


# diffusers' converter leaves out the attention of kl-f16's levels, and what black-forest-labs' FLUX.2 has of its own.
CONVERTED = sorted(set(FAMILIES) - {"kl-f16", "flux2"})


@pytest.mark.parametrize("family", CONVERTED)
def test_each_direction_equals_diffusers_converter(family: str) -> None:
    check_against_diffusers(FAMILIES[family] if family == "small" else narrow(FAMILIES[family]))


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(CONVERTED) - {"cogview4"}))  # which has four times as many weights
def test_each_direction_equals_diffusers_converter_in_full_size(family: str) -> None:
    check_against_diffusers(FAMILIES[family])


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_the_vae_of_a_checkpoint_is_found_under_its_prefix(prefix: str, layout: str) -> None:
    tensors = ldm_state_dict(TINY)
    expected = to_diffusers(tensors)
    inside = {prefix + key: value for key, value in (tensors if layout == "ldm" else expected).items()}
    others = {"model.diffusion_model.out.2.bias": torch.zeros(4), "cond_stage_model.x": torch.zeros(1)}
    found = find_vae(inside | others if prefix else inside)
    assert (found.prefix, found.layout) == (prefix, layout)
    assert found.names.keys() == inside.keys()
    assert set(found.names.values()) == expected.keys()


def test_legacy_attention_names_and_linear_ldm_attention_are_read() -> None:
    ldm = ldm_state_dict(TINY)
    ours = to_diffusers(ldm)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    legacy = {
        re.sub(r"to_q|to_k|to_v|to_out\.0", lambda match: old[match[0]], key): value for key, value in ours.items()
    }
    assert sum(key.endswith("proj_attn.weight") for key in legacy) == 5
    assert_equal(to_diffusers(legacy), ours)
    linear = {
        key: value.flatten(1) if value.shape[2:] == (1, 1) and ".attn" in key else value for key, value in ldm.items()
    }
    assert linear["encoder.mid.attn_1.q.weight"].dim() == 2
    assert_equal(to_diffusers(linear), ours)


def test_training_state_beside_the_vae_is_passed_over() -> None:
    tensors = ldm_state_dict(TINY)
    extra = {
        "loss.logvar": torch.zeros(()),
        "loss.discriminator.main.0.weight": torch.zeros(1),
        "model_ema.decay": torch.ones(()),
    }
    assert find_vae(tensors | extra).names.keys() == tensors.keys()


def test_leftovers_are_listed_by_name() -> None:
    tensors = ldm_state_dict(TINY)
    wrong = ["decoder.up.9.block.0.conv1.weight", "encoder.conv_in.scale", "encoder.mid.block_3.conv1.bias", "surprise"]
    with pytest.raises(WeightsError) as caught:
        find_vae(tensors | dict.fromkeys(wrong, torch.zeros(1)))
    assert "4 keys that a KL-VAE does not have" in str(caught.value)
    assert all(key in str(caught.value) for key in wrong)
    with pytest.raises(WeightsError, match="old and new names at once"):
        ours = to_diffusers(tensors)
        find_vae(ours | {"encoder.mid_block.attentions.0.query.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    "keys", [[], ["conv_in.weight", "down_blocks.0.resnets.0.norm1.weight"], ["0.weight", "1.bias"]]
)
def test_a_file_without_a_vae_is_told(keys: list[str]) -> None:
    with pytest.raises(WeightsError, match=r"no KL-VAE among its .*; is it another model\?$"):
        find_vae(keys)


@pytest.mark.parametrize(
    ("keys", "network"),
    [
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "lora_te_x.alpha"], "a LoRA"),
        (["unet.mid_block.attentions.0.proj_in.lora_A.weight"], "a LoRA"),
        (["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"], "a LoRA"),
        (["lora_unet_mid_block_attentions_0_proj_in.hada_w1_a"], "a LoRA"),
        (["controlnet_cond_embedding.conv_in.weight", "time_embedding.linear_1.weight"], "a ControlNet"),
        (["model.diffusion_model.time_embed.0.weight", "cond_stage_model.transformer.text_model.encoder.x"], "a UNet"),
        (["time_embedding.linear_1.weight", "mid_block.attentions.0.transformer_blocks.0.norm1.weight"], "a UNet"),
        (["double_blocks.0.img_attn.qkv.weight"], "a diffusion transformer"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "a diffusion transformer"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "a text encoder"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"], "a text encoder"),
        (["model.layers.0.self_attn.q_proj.weight"], "a language model"),
        (["emb_params"], "a textual inversion"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight", "quantize.embedding.weight"], "a VQ-VAE"),
        (["encoder.conv_in.conv.weight", "decoder.conv_in.conv.weight"], "a video VAE"),
    ],
)
def test_another_network_is_named(keys: list[str], network: str) -> None:
    with pytest.raises(WeightsError, match=rf"; it is {network}, give a VAE or a checkpoint with one in it$"):
        find_vae(keys)


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module.",
        "module._orig_mod.",
        "first_stage_model._orig_mod.",
        "model.",
        "model.first_stage_model.",
        "vae.module.",
        "state.vae._orig_mod.",
        "x.y.",
    ],
)
@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_a_vae_is_found_under_the_names_of_wrappers_and_of_other_modules(prefix: str, layout: str) -> None:
    state = ldm_state_dict(TINY) if layout == "ldm" else AutoencoderKL(TINY).state_dict()
    expected = find_vae(state)
    found = find_vae({prefix + key for key in state})
    assert {key.removeprefix(prefix): name for key, name in found.names.items()} == expected.names
    assert found.layout == expected.layout


def test_a_compiled_half_is_found() -> None:
    state = AutoencoderKL(TINY).state_dict()
    found = find_vae({key.replace("decoder.", "decoder._orig_mod.") for key in state})
    assert set(found.names.values()) == set(state)


def test_two_vaes_under_other_names_are_told_apart_by_the_user() -> None:
    state = AutoencoderKL(TINY).state_dict()
    with pytest.raises(WeightsError, match=r"several VAEs, under a\., b\."):
        find_vae({prefix + key for key in state for prefix in ("a.", "b.")})


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
@pytest.mark.parametrize("spelling", range(3))
def test_attention_is_found_under_any_of_its_names_in_either_layout(layout: str, spelling: int) -> None:
    own = {"ldm": ("q", "k", "v", "proj_out"), "diffusers": ("to_q", "to_k", "to_v", "to_out.0")}[layout]
    others = [("q", "k", "v", "proj_out"), ("to_q", "to_k", "to_v", "to_out.0"), ("query", "key", "value", "proj_attn")]
    state = ldm_state_dict(TINY) if layout == "ldm" else AutoencoderKL(TINY).state_dict()
    renamed = {}
    for key in state:
        block, _, kind = key.rpartition(".")
        part = next((number for number, name in enumerate(own) if block.endswith(f".{name}")), None)
        renamed[key] = key if part is None else f"{block.removesuffix(own[part])}{others[spelling][part]}.{kind}"
    found = find_vae(set(renamed.values()))
    assert {key: found.names[renamed[key]] for key in state} == find_vae(state).names
