"""Real adapters and real offloading on an installed VAE: our network runs them, with diffusers' own results."""

from types import SimpleNamespace
from typing import Any

import accelerate
import diffusers
import peft
import pytest
import torch

import sdvae
from tests.test_integration_diffusers import is_close, latents, make, pixels, plain

CPU = torch.device("cpu")
# Linear layers and convolutions; not the zeros that training begins with.
LORA = peft.LoraConfig(
    r=2, target_modules=["to_q", "to_v", "to_out.0", "conv1", "conv_in"], init_lora_weights=False
)  # fmt: skip


@pytest.fixture
def vae() -> Any:
    model = make(diffusers.AutoencoderKL)
    sdvae.install(SimpleNamespace(vae=model))
    return model


def decoded(vae: Any) -> torch.Tensor:
    with torch.no_grad():
        pixels: torch.Tensor = vae.decode(latents()).sample
    return pixels


def test_a_lora_of_peft_runs_comes_off_and_merges(vae: Any) -> None:
    before = decoded(vae)
    vae.add_adapter(LORA)
    calls = vae.engine.calls
    with_lora = decoded(vae)
    assert vae.engine.calls == calls + 1
    assert is_close(with_lora, decoded(plain(vae)))
    assert not is_close(with_lora, before, 1e-3), "the adapter must show"

    vae.disable_adapters()
    assert is_close(decoded(vae), before)
    vae.enable_adapters()
    vae.fuse_lora()
    assert is_close(decoded(vae), with_lora)
    vae.unfuse_lora()
    vae.delete_adapters("default")
    assert is_close(decoded(vae), before)
    assert vae.engine.calls == calls + 4
    assert vae.engine.departure() is None


def test_a_peft_model_around_the_vae_trains_its_adapters_only(vae: Any) -> None:
    wrapped = peft.get_peft_model(vae, LORA)
    wrapped.decode(latents()).sample.square().mean().backward()
    assert vae.engine.calls == 1
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.grad is not None}
    assert trained == {name for name in wrapped.state_dict() if "lora_" in name and "decoder" in name}


@pytest.mark.parametrize("is_installed_first", [True, False])
@pytest.mark.parametrize("kind", ["sequential", "model", "leaf_level", "block_level"])
def test_offloading_of_every_kind_gives_the_same_results(kind: str, is_installed_first: bool) -> None:
    """Of blocks it hangs on the blocks' own forward: there diffusers' blocks run, and `describe` says so."""
    vae = make(diffusers.AutoencoderKL)
    pipe = SimpleNamespace(vae=vae)
    with torch.no_grad():
        expected = decoded(vae), vae.encode(pixels()).latent_dist.mean
    if is_installed_first:
        sdvae.install(pipe)
    if kind == "sequential":
        accelerate.cpu_offload(vae, execution_device=CPU)
    elif kind == "model":
        accelerate.cpu_offload_with_hook(vae, execution_device=CPU)
    else:
        vae.enable_group_offload(onload_device=CPU, offload_type=kind, num_blocks_per_group=1)
    if not is_installed_first:
        sdvae.install(pipe)
    with torch.no_grad():
        found = decoded(vae), vae.encode(pixels()).latent_dist.mean
    assert all(is_close(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    if kind == "block_level":
        assert vae.engine.calls == 0
        assert vae.engine.describe() == "diffusers' own blocks, because encoder has a forward of its own"
    else:
        assert vae.engine.calls == 2
