"""diffusers' pipelines give the same images before and after `install`: small, random weights, nothing downloaded."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.vae import Decoder, Encoder
from PIL import Image
from torch import Tensor

import sdvae
from sdvae.config import VAEConfig
from sdvae.integrations.diffusers import AutoencoderKL
from tests.conftest import random_model

TOLERANCE = 1e-4  # relative L2 in fp32; attention sums in another order, the rest is the same arithmetic
SIDE_PX = 32
KL = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=SIDE_PX)
FLUX2_KL = replace(KL, scaling_factor=1.0, latents_patch=2, decoder_block_out_channels=(8, 8))


@dataclass(frozen=True)
class Case:
    """A pipeline, the inputs of one run of it, and how often its VAE encodes and decodes meanwhile."""

    build: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    num_encodes: int = 0


def vae(latent_channels: int = 4, shift_factor: float | None = None, scaling_factor: float = 0.18215) -> Any:
    config = VAEConfig(
        **{
            **vars(KL), "latent_channels": latent_channels, "shift_factor": shift_factor,
            "scaling_factor": scaling_factor, "use_quant_conv": latent_channels == 4,
            "use_post_quant_conv": latent_channels == 4,
        }
    )  # fmt: skip
    model = diffusers.AutoencoderKL.from_config(config.to_diffusers())
    model.load_state_dict(random_model(config).state_dict())
    return model.eval()


def unet(**extra: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=16, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=16,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **extra,
    ).eval()  # fmt: skip


def ddim() -> Any:
    return diffusers.DDIMScheduler(steps_offset=1, clip_sample=False, set_alpha_to_one=False)


def stable_diffusion(cls: type[Any], in_channels: int = 4) -> Any:
    return cls(
        vae=vae(), text_encoder=None, tokenizer=None, unet=unet(in_channels=in_channels),
        scheduler=ddim(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl(cls: type[Any]) -> Any:
    # Six numbers of sizes and crops, 8 features each, and the pooled prompt.
    sizes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    return cls(
        vae=vae(scaling_factor=0.13025), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
        unet=unet(projection_class_embeddings_input_dim=6 * 8 + 16, **sizes),
        scheduler=ddim(), add_watermarker=False,
    )  # fmt: skip


def stable_diffusion_3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=16, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=16,
    ).eval()  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(16, shift_factor=0.0609, scaling_factor=1.5305), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae(16, shift_factor=0.1159, scaling_factor=0.3611),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=transformer,
    )  # fmt: skip


def flux2() -> Any:
    model = random_model(FLUX2_KL)
    ours = diffusers.AutoencoderKLFlux2.from_config(model.config.to_diffusers())
    ours.load_state_dict(model.state_dict())
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    ).eval()  # fmt: skip
    return diffusers.Flux2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=ours.eval(), text_encoder=None, tokenizer=None,
        transformer=transformer,
    )  # fmt: skip


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt(is_pooled: bool = False, has_negative: bool = True) -> dict[str, Any]:
    """What text encoders would say."""
    embeds = {"prompt_embeds": noise(1, 7, 16, seed=3)}
    if is_pooled:
        embeds["pooled_prompt_embeds"] = noise(1, 16, seed=4)
    if has_negative:
        embeds |= {f"negative_{name}": -tensor for name, tensor in embeds.items()}
    return {**embeds, "num_inference_steps": 2, "output_type": "pt"}


def size() -> dict[str, Any]:
    return {"height": SIDE_PX, "width": SIDE_PX}


def photo() -> dict[str, Any]:
    return {"image": noise(1, 3, SIDE_PX, SIDE_PX, seed=5).sigmoid(), "strength": 0.9}


def mask() -> dict[str, Any]:
    half = torch.zeros(1, 1, SIDE_PX, SIDE_PX)
    half[..., SIDE_PX // 2 :] = 1.0
    return {"mask_image": half}


CASES = {
    "sd": Case(lambda: stable_diffusion(diffusers.StableDiffusionPipeline), lambda: prompt() | size()),
    "img2img": Case(
        lambda: stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline), lambda: prompt() | photo(), num_encodes=1
    ),
    "inpaint": Case(
        lambda: stable_diffusion(diffusers.StableDiffusionInpaintPipeline, in_channels=9),
        lambda: prompt() | photo() | mask() | size(),
        num_encodes=2,  # the photo, and the photo without what the mask covers
    ),
    "sdxl": Case(
        lambda: stable_diffusion_xl(diffusers.StableDiffusionXLPipeline), lambda: prompt(is_pooled=True) | size()
    ),
    "sdxl img2img": Case(
        lambda: stable_diffusion_xl(diffusers.StableDiffusionXLImg2ImgPipeline),
        lambda: prompt(is_pooled=True) | photo(),
        num_encodes=1,
    ),
    "sd3": Case(stable_diffusion_3, lambda: prompt(is_pooled=True) | size()),
    "flux": Case(flux, lambda: prompt(is_pooled=True, has_negative=False) | size()),
    "flux2": Case(flux2, lambda: prompt(has_negative=False) | size()),
    "flux2 with an image": Case(
        flux2,
        lambda: (
            prompt(has_negative=False) | size() | {"image": Image.radial_gradient("L").resize((64, 64)).convert("RGB")}
        ),
        num_encodes=1,
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads only wait for each other over tensors as small as these."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def picture(pipe: Any, inputs: dict[str, Any]) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    images: Tensor = pipe(**inputs, generator=torch.Generator().manual_seed(6)).images
    assert images.shape == (1, 3, SIDE_PX, SIDE_PX)
    assert images.std() > 0.05, "an even image would compare equal to much"
    return images


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_pipeline_gives_the_same_images(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = case.build()
    original = pipe.vae
    expected = picture(pipe, case.inputs())

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("diffusers' own network ran")

    kind = type(original)
    sdvae.install(pipe)
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "forward", refuse)
        patch.setattr(Decoder, "forward", refuse)
        images = picture(pipe, case.inputs())
        assert pipe.vae.engine.calls == case.num_encodes + 1
    assert (images - expected).norm() <= TOLERANCE * expected.norm()

    sdvae.uninstall(pipe)
    assert pipe.vae is original
    assert type(original) is kind
    assert torch.equal(picture(pipe, case.inputs()), expected)


def test_slightly_other_weights_show() -> None:
    """The comparison above can fail."""
    case = CASES["sd"]
    pipe = case.build()
    expected = picture(pipe, case.inputs())
    sdvae.install(pipe)
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight.mul_(1.01)
    assert (picture(pipe, case.inputs()) - expected).norm() > TOLERANCE * expected.norm()


def test_a_saved_pipeline_needs_no_sdvae(tmp_path: Path) -> None:
    """Installed, or built around the drop-in: what is written names diffusers' class only."""
    case = CASES["sd"]
    pipe = case.build()
    sdvae.install(pipe)
    expected = picture(pipe, case.inputs())
    derived = diffusers.StableDiffusionPipeline(**copy.copy(pipe.components), requires_safety_checker=False)
    derived.save_pretrained(tmp_path)
    assert "sdvae" not in (tmp_path / "model_index.json").read_text()
    absent = {"text_encoder": None, "tokenizer": None, "requires_safety_checker": False}
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, **absent)
    assert type(loaded.vae) is diffusers.AutoencoderKL
    assert (picture(loaded, case.inputs()) - expected).norm() <= TOLERANCE * expected.norm()

    ours = AutoencoderKL.from_pretrained(tmp_path / "vae")
    given = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, vae=ours, **absent)
    assert given.vae is ours
    assert (picture(given, case.inputs()) - expected).norm() <= TOLERANCE * expected.norm()
    assert ours.engine.calls == 1
