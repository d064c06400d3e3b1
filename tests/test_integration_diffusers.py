"""The drop-in does what diffusers' AutoencoderKL does, and runs on our network while it does."""

import copy
import io
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput, DecoderOutput
from diffusers.models.autoencoders.vae import Decoder, Encoder
from safetensors.torch import save_file
from torch import Tensor, nn

import sdvae
from sdvae.config import VAEConfig
from sdvae.errors import ConfigError
from sdvae.integrations.diffusers import AutoencoderKL, AutoencoderKLFlux2
from tests.conftest import random_model

# Every block kind; a downscale of 2, so that 32 px are four tiles.
CONFIG = VAEConfig(
    block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_levels=(1,), sample_size=16
)  # fmt: skip
# Attention sums in another memory order; the rest is bit-equal. A wrong eps or a stale weight is far above.
TOLERANCE = 1e-5
CLASSES = {"diffusers": diffusers.AutoencoderKL, "sdvae": AutoencoderKL}


def make(cls: type[Any], seed: int = 0) -> Any:
    vae = cls.from_config(CONFIG.to_diffusers())
    vae.load_state_dict(random_model(CONFIG, seed).state_dict())
    return vae.eval()


def plain(vae: Any) -> Any:
    """A copy of the VAE as it is now that runs diffusers' own code: what every result is compared with."""
    twin = copy.deepcopy(vae)
    sdvae.uninstall(SimpleNamespace(vae=twin))
    assert type(twin) is diffusers.AutoencoderKL
    return twin


def pixels(height: int = 16, width: int = 16, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2.0 - 1.0


def latents(height: int = 8, width: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(2))


def is_close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Relative L2; the same shape and dtype."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype or not ours.isfinite().all():
        return False
    return bool((ours.double() - theirs.double()).norm() <= tolerance * theirs.double().norm())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads only wait for each other over tensors as small as these."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def _no_blocks_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"diffusers' {type(self).__name__} ran")

    monkeypatch.setattr(Encoder, "forward", refuse)
    monkeypatch.setattr(Decoder, "forward", refuse)


# --- Behaviours of diffusers' class, each held by both -----------------------------------------------------------


def encodes_to_a_posterior(vae: Any, folder: Path) -> None:
    output = vae.encode(pixels(16, 24))
    assert type(output) is AutoencoderKLOutput
    assert output.latent_dist.mean.shape == (2, 4, 8, 12)
    assert is_close(output.latent_dist.parameters, plain(vae).encode(pixels(16, 24)).latent_dist.parameters)


def encodes_to_a_tuple(vae: Any, folder: Path) -> None:
    output = vae.encode(pixels(), return_dict=False)
    assert type(output) is tuple
    assert len(output) == 1
    assert torch.equal(output[0].mode(), vae.encode(pixels()).latent_dist.mode())


def decodes_to_an_output(vae: Any, folder: Path) -> None:
    output = vae.decode(latents(8, 12))
    assert type(output) is DecoderOutput
    assert output.sample.shape == (2, 3, 16, 24)
    assert is_close(output.sample, plain(vae).decode(latents(8, 12)).sample)


def decodes_to_a_tuple(vae: Any, folder: Path) -> None:
    output = vae.decode(latents(), return_dict=False, generator=torch.Generator())
    assert type(output) is tuple
    assert torch.equal(output[0], vae.decode(latents()).sample)


def runs_forward(vae: Any, folder: Path) -> None:
    drawn = [vae(pixels(), sample_posterior=True, generator=torch.Generator().manual_seed(7)).sample for _ in range(2)]
    assert torch.equal(*drawn)
    assert not is_close(drawn[0], vae(pixels()).sample)
    assert is_close(vae(pixels(), return_dict=False)[0], plain(vae)(pixels()).sample)


def takes_arguments_by_name(vae: Any, folder: Path) -> None:
    assert torch.equal(vae.encode(x=pixels()).latent_dist.mode(), vae.encode(pixels()).latent_dist.mode())
    assert torch.equal(vae.decode(z=latents()).sample, vae.decode(latents()).sample)


def is_deterministic(vae: Any, folder: Path) -> None:
    assert torch.equal(vae.decode(latents()).sample, vae.decode(latents()).sample)


def floors_odd_sizes(vae: Any, folder: Path) -> None:
    moments = vae.encode(pixels(17, 31)).latent_dist.parameters
    assert moments.shape == (2, 8, 8, 15)
    assert is_close(moments, plain(vae).encode(pixels(17, 31)).latent_dist.parameters)


def keeps_logvar_unclamped_in_parameters(vae: Any, folder: Path) -> None:
    with torch.no_grad():
        vae.quant_conv.bias[4:] += 50.0
    assert vae.encode(pixels()).latent_dist.parameters.max() > 30.0, "the posterior clamps its logvar, not its moments"


def saves_and_loads(vae: Any, folder: Path) -> None:
    vae.save_pretrained(folder)
    loaded = type(vae).from_pretrained(folder)
    assert type(loaded) is type(vae)
    assert dict(loaded.config) | {"_name_or_path": ""} == dict(vae.config) | {"_name_or_path": ""}
    assert torch.equal(loaded.decode(latents()).sample, vae.decode(latents()).sample)


def is_loaded_by_the_other_class(vae: Any, folder: Path) -> None:
    vae.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    assert written["_class_name"] == "AutoencoderKL"
    assert written["force_upcast"] is True
    for cls in CLASSES.values():
        assert is_close(cls.from_pretrained(folder).decode(latents()).sample, vae.decode(latents()).sample)


def loads_in_half_precision(vae: Any, folder: Path) -> None:
    vae.save_pretrained(folder, variant="fp16")
    loaded = type(vae).from_pretrained(folder, variant="fp16", torch_dtype=torch.bfloat16)
    assert loaded.dtype == loaded.decode(latents().bfloat16()).sample.dtype == torch.bfloat16


def loads_a_single_file(vae: Any, folder: Path) -> None:
    vae.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in vae.state_dict().items()}, folder / "single.safetensors")
    loaded = type(vae).from_single_file(str(folder / "single.safetensors"), config=str(folder))
    assert type(loaded) is type(vae)
    assert torch.equal(loaded.decode(latents()).sample, vae.decode(latents()).sample)


def rebuilds_from_its_config(vae: Any, folder: Path) -> None:
    rebuilt = type(vae).from_config(vae.config)
    assert rebuilt.state_dict().keys() == vae.state_dict().keys()
    assert vae.config.scaling_factor == CONFIG.scaling_factor
    assert vae.config["latent_channels"] == 4
    assert vae.config.force_upcast is True


def starts_on_the_meta_device(vae: Any, folder: Path) -> None:
    with accelerate.init_empty_weights():
        empty = type(vae).from_config(vae.config)
    assert empty.device.type == "meta"
    empty.load_state_dict(vae.state_dict(), assign=True)
    assert torch.equal(empty.eval().decode(latents()).sample, vae.decode(latents()).sample)


def loads_state_dicts_strictly(vae: Any, folder: Path) -> None:
    state = vae.state_dict()
    del state["decoder.conv_in.weight"]
    with pytest.raises(RuntimeError, match=r"decoder\.conv_in\.weight"):
        vae.load_state_dict(state)
    assert set(dict(vae.named_modules())) == set(dict(plain(vae).named_modules()))


def changes_dtype(vae: Any, folder: Path) -> None:
    exact = vae.decode(latents()).sample
    for dtype, tolerance in ((torch.bfloat16, 3e-2), (torch.float16, 4e-3), (torch.float64, 1e-6)):
        out = vae.to(dtype).decode(latents().to(dtype)).sample
        assert vae.dtype == out.dtype == dtype
        assert is_close(out, plain(vae).decode(latents().to(dtype)).sample, tolerance)
        vae.float()
    assert is_close(vae.decode(latents()).sample, exact, 3e-2)


def obeys_autocast(vae: Any, folder: Path) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = vae.decode(latents()).sample, plain(vae).decode(latents()).sample
    assert out.dtype == torch.bfloat16
    assert is_close(out, expected, 3e-2)


def slices(vae: Any, folder: Path) -> None:
    whole = vae.decode(latents(batch=3)).sample
    moments = vae.encode(pixels(batch=3)).latent_dist.parameters
    vae.enable_slicing()
    seen: list[int] = []
    vae.decoder.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    assert is_close(vae.decode(latents(batch=3)).sample, whole)
    assert is_close(vae.encode(pixels(batch=3)).latent_dist.parameters, moments)
    assert seen == [1, 1, 1]
    vae.disable_slicing()
    vae.decode(latents(batch=3))
    assert seen == [1, 1, 1, 3]


def tiles(vae: Any, folder: Path) -> None:
    whole = vae.decode(latents(16, 20)).sample
    vae.enable_tiling()
    assert vae.use_tiling
    tiled = vae.decode(latents(16, 20)).sample
    assert not is_close(tiled, whole, 1e-3), "no tile was cut"
    assert is_close(tiled, plain(vae).decode(latents(16, 20)).sample)
    moments = vae.encode(pixels(32, 40)).latent_dist.parameters
    assert is_close(moments, plain(vae).encode(pixels(32, 40)).latent_dist.parameters)
    vae.disable_tiling()
    assert torch.equal(vae.decode(latents(16, 20)).sample, whole)
    assert not is_close(vae.encode(pixels(32, 40)).latent_dist.parameters, moments, 1e-3), "no tile was cut"


def tiles_on_request(vae: Any, folder: Path) -> None:
    vae.tile_sample_min_size, vae.tile_latent_min_size, vae.tile_overlap_factor = 8, 4, 0.5
    twin = plain(vae)
    assert is_close(vae.tiled_decode(latents()).sample, twin.tiled_decode(latents()).sample)
    assert torch.equal(vae.tiled_decode(latents(), return_dict=False)[0], vae.tiled_decode(latents()).sample)
    with pytest.warns(FutureWarning, match="tiled_encode"):
        ours, theirs = vae.tiled_encode(pixels()), twin.tiled_encode(pixels())
    assert is_close(ours.latent_dist.parameters, theirs.latent_dist.parameters)


def gives_gradients(vae: Any, folder: Path) -> None:
    check_gradients(vae)


def gives_gradients_with_checkpointing(vae: Any, folder: Path) -> None:
    vae.train()
    vae.enable_gradient_checkpointing()
    assert vae.is_gradient_checkpointing
    runs = []
    vae.decoder.mid_block.resnets[0].conv1.register_forward_hook(lambda *_: runs.append(1))
    vae.decode(latents()).sample.sum().backward()
    assert len(runs) == 2, "a checkpointed block runs again in the backward pass"
    vae.zero_grad()
    vae.disable_gradient_checkpointing()
    check_gradients(vae)


def check_gradients(vae: Any) -> None:
    """Gradients of the input and of every weight are those of diffusers' own code."""
    results = []
    for each in (vae, plain(vae)):
        x = pixels().requires_grad_()
        moments = each.encode(x).latent_dist
        loss = (each.decode(moments.mode()).sample - x).square().mean() + moments.kl().mean() * 1e-3
        loss.backward()
        results.append({"input": x.grad, **{name: weight.grad for name, weight in each.named_parameters()}})
    ours, theirs = results
    assert ours.keys() == theirs.keys()
    # A key's bias shifts all scores alike and has no gradient but rounding.
    odd = [name for name in ours if "to_k.bias" not in name and not is_close(ours[name], theirs[name], 1e-4)]
    assert not odd


def records_nothing_without_gradients(vae: Any, folder: Path) -> None:
    with torch.no_grad():
        assert not vae.decode(latents()).sample.requires_grad
    with torch.inference_mode():
        assert vae.decode(latents()).sample.is_inference()
    assert vae.decode(latents()).sample.requires_grad
    assert not vae.requires_grad_(False).decode(latents()).sample.requires_grad


def copies_deeply(vae: Any, folder: Path) -> None:
    before = vae.decode(latents()).sample
    twin = copy.deepcopy(vae)
    with torch.no_grad():
        twin.decoder.conv_out.weight.mul_(2.0)
        twin.decoder.conv_out.bias.mul_(2.0)
    assert is_close(twin.decode(latents()).sample, 2.0 * before)
    assert torch.equal(vae.decode(latents()).sample, before)


def copies_shallowly(vae: Any, folder: Path) -> None:
    """What torch's DataParallel does: another object, other weights, a copied `__dict__`."""
    before = vae.decode(latents()).sample
    twin = copy.copy(vae)
    twin._modules = {**vae._modules, "decoder": make(type(vae), seed=5).decoder}
    assert is_close(twin.decode(latents()).sample, plain(twin).decode(latents()).sample)
    assert not is_close(twin.decode(latents()).sample, before, 1e-2)
    assert torch.equal(vae.decode(latents()).sample, before)


def is_pickled(vae: Any, folder: Path) -> None:
    before = vae.decode(latents()).sample
    thawed = pickle.load(io.BytesIO(pickle.dumps(vae)))
    assert type(thawed) is type(vae)
    assert torch.equal(thawed.decode(latents()).sample, before)


def calls_hooks(vae: Any, folder: Path) -> None:
    calls = []
    vae.register_forward_hook(lambda *_: calls.append("vae"))
    vae.decoder.conv_out.register_forward_hook(lambda *_: calls.append("layer"))
    vae(pixels())
    assert calls == ["layer", "vae"]


def calls_hooks_inside(vae: Any, folder: Path) -> None:
    features: list[Tensor] = []
    expected = vae.decode(latents()).sample
    handle = vae.decoder.mid_block.register_forward_hook(lambda _, __, out: features.append(out))
    assert is_close(vae.decode(latents()).sample, expected)
    assert [tuple(feature.shape) for feature in features] == [(2, 16, 8, 8)]
    handle.remove()
    assert is_close(vae.decode(latents()).sample, expected)
    assert len(features) == 1


def offloads_whole(vae: Any, folder: Path) -> None:
    expected = vae.decode(latents()).sample
    arrivals = []

    class Arrival(accelerate.hooks.CpuOffload):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            arrivals.append(module)
            return super().pre_forward(module, *args, **kwargs)

    accelerate.hooks.add_hook_to_module(vae, Arrival(torch.device("cpu")))
    assert torch.equal(vae.decode(latents()).sample, expected)
    vae.encode(pixels())
    assert arrivals == [vae, vae], "encode and decode bring the weights to their device"
    accelerate.hooks.remove_hook_from_module(vae)
    vae.encode(pixels())
    assert len(arrivals) == 2


def offloads_layer_by_layer(vae: Any, folder: Path) -> None:
    expected = vae.decode(latents()).sample
    moments = vae.encode(pixels()).latent_dist.parameters
    accelerate.cpu_offload(vae, execution_device=torch.device("cpu"))
    assert vae.decoder.conv_in.weight.is_meta
    with torch.no_grad():
        assert torch.equal(vae.decode(latents()).sample, expected)
        assert torch.equal(vae.encode(pixels()).latent_dist.parameters, moments)
        assert is_close(vae(pixels()).sample, vae.decode(vae.encode(pixels()).latent_dist.mode()).sample)


def casts_layer_by_layer(vae: Any, folder: Path) -> None:
    expected = vae.decode(latents()).sample
    vae.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert vae.decoder.conv_out.weight.dtype == torch.bfloat16
    assert is_close(vae.decode(latents()).sample, expected, 3e-2)
    assert not torch.equal(vae.decode(latents()).sample, expected)


def changes_attention_processors(vae: Any, folder: Path) -> None:
    expected = vae.decode(latents()).sample
    vae.set_default_attn_processor()
    assert {type(processor).__name__ for processor in vae.attn_processors.values()} == {"AttnProcessor"}
    assert is_close(vae.decode(latents()).sample, expected)
    calls = []

    class Counting(diffusers.models.attention_processor.AttnProcessor2_0):
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            calls.append(1)
            return super().__call__(*args, **kwargs)

    vae.set_attn_processor(Counting())
    assert is_close(vae.decode(latents()).sample, expected)
    assert calls


def fuses_projections(vae: Any, folder: Path) -> None:
    expected = vae.decode(latents()).sample
    vae.fuse_qkv_projections()
    assert is_close(vae.decode(latents()).sample, expected)
    vae.unfuse_qkv_projections()
    assert is_close(vae.decode(latents()).sample, expected)


def takes_any_memory_format(vae: Any, folder: Path) -> None:
    expected = vae.decode(latents()).sample
    vae.to(memory_format=torch.channels_last)
    assert is_close(vae.decode(latents().to(memory_format=torch.channels_last)).sample, expected)


def refuses_wrong_channels(vae: Any, folder: Path) -> None:
    with pytest.raises(RuntimeError, match="channels"):
        vae.decode(torch.zeros(1, 5, 8, 8))


def tells_its_size(vae: Any, folder: Path) -> None:
    assert vae.num_parameters() == plain(vae).num_parameters() > 10_000
    assert vae.device == torch.device("cpu")
    assert vae.dtype == torch.float32


BEHAVIOURS: tuple[Callable[[Any, Path], None], ...] = (
    encodes_to_a_posterior, encodes_to_a_tuple, decodes_to_an_output, decodes_to_a_tuple, runs_forward,
    takes_arguments_by_name, is_deterministic, floors_odd_sizes, keeps_logvar_unclamped_in_parameters, saves_and_loads,
    is_loaded_by_the_other_class, loads_in_half_precision, loads_a_single_file, rebuilds_from_its_config,
    starts_on_the_meta_device, loads_state_dicts_strictly, changes_dtype, obeys_autocast, slices, tiles,
    tiles_on_request, gives_gradients, gives_gradients_with_checkpointing, records_nothing_without_gradients,
    copies_deeply, copies_shallowly, is_pickled, calls_hooks, calls_hooks_inside, offloads_whole,
    offloads_layer_by_layer, casts_layer_by_layer, changes_attention_processors, fuses_projections,
    takes_any_memory_format, refuses_wrong_channels, tells_its_size,
)  # fmt: skip


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.__name__)
def test_behaviour(cls: type[Any], behaviour: Callable[[Any, Path], None], tmp_path: Path) -> None:
    behaviour(make(cls), tmp_path)


# --- Who runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def vae() -> AutoencoderKL:
    return make(AutoencoderKL)


@pytest.mark.usefixtures("_no_blocks_of_diffusers")
def test_each_encode_and_decode_runs_on_the_engine(vae: AutoencoderKL) -> None:
    counts = [vae.engine.calls]
    for run in (lambda: vae.encode(pixels()), lambda: vae.decode(latents()), lambda: vae(pixels())):
        run()
        counts.append(vae.engine.calls)
    assert counts == [0, 1, 2, 4]
    assert vae.engine.describe() == "sdvae's reference network, float32 on cpu, because gradients are wanted"
    with torch.no_grad():
        vae.decode(latents())
    assert vae.engine.describe().startswith("sdvae's engine, float32 on cpu"), "what ran, not what would run now"


@pytest.mark.usefixtures("_no_blocks_of_diffusers")
def test_tiles_and_slices_run_on_the_engine(vae: AutoencoderKL) -> None:
    vae.enable_tiling()
    vae.enable_slicing()
    vae.decode(latents(12, 12, batch=2))
    assert vae.engine.calls == 2 * 4, "four tiles for each of two images"
    vae.encode(pixels(24, 24, batch=2))
    assert vae.engine.calls == 4 * 4


@pytest.mark.usefixtures("_no_blocks_of_diffusers")
@pytest.mark.parametrize(
    "behaviour", [calls_hooks, gives_gradients_with_checkpointing, casts_layer_by_layer], ids=lambda b: b.__name__
)
def test_layers_under_hooks_run_in_our_network(
    behaviour: Callable[[Any, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "check_gradients", lambda vae: vae.decode(latents()))  # it runs diffusers' too
    behaviour(make(AutoencoderKL), tmp_path)


@pytest.mark.usefixtures("_no_blocks_of_diffusers")
def test_offloaded_layers_run_in_our_network(vae: AutoencoderKL) -> None:
    accelerate.cpu_offload(vae, execution_device=torch.device("cpu"))
    with torch.no_grad():
        vae.decode(latents())
    assert vae.engine.calls == 1


class Adapter(nn.Module):
    """A LoRA layer as peft's: it takes a linear layer's place and keeps it inside."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + self.lora_B(self.lora_A(x))
        return out


def edit_in_place(vae: Any) -> None:
    with torch.no_grad():
        vae.decoder.up_blocks[0].resnets[1].conv2.weight.add_(0.3)


def edit_under_data(vae: Any) -> None:
    vae.decoder.mid_block.resnets[0].norm1.weight.data += 1.0  # torch does not count this as a version


def edit_post_quant_conv(vae: Any) -> None:
    with torch.no_grad():
        vae.post_quant_conv.weight.mul_(-1.0)


def replace_data(vae: Any) -> None:
    vae.decoder.conv_in.weight.data = vae.decoder.conv_in.weight.data.flip(0)


def replace_a_parameter(vae: Any) -> None:
    vae.decoder.conv_out.bias = nn.Parameter(torch.tensor([3.0, -1.0, 2.0]))


def change_dtype(vae: Any) -> None:
    vae.to(torch.bfloat16).to(torch.float32)


def load_another_state(vae: Any) -> None:
    vae.load_state_dict(random_model(CONFIG, seed=3).state_dict())


def assign_another_state(vae: Any) -> None:
    vae.load_state_dict(random_model(CONFIG, seed=3).state_dict(), assign=True)


def replace_a_layer(vae: Any) -> None:
    vae.decoder.conv_out = nn.Conv2d(8, 3, 3, padding=1)


def replace_the_decoder(vae: Any) -> None:
    vae.decoder = make(diffusers.AutoencoderKL, seed=4).decoder


def swap_two_blocks(vae: Any) -> None:
    resnets = vae.decoder.mid_block.resnets
    resnets[0], resnets[1] = resnets[1], resnets[0]


def add_an_adapter(vae: Any) -> None:
    attention = vae.decoder.mid_block.attentions[0]
    attention.to_v = Adapter(attention.to_v)
    attention.to_out[0] = Adapter(attention.to_out[0])


def step_an_optimizer(vae: Any) -> None:
    optimizer = torch.optim.SGD(vae.parameters(), lr=0.1)
    vae.decode(latents()).sample.square().mean().backward()
    optimizer.step()


def parametrize_a_layer(vae: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(vae.decoder.conv_in)
    with torch.no_grad():
        vae.decoder.conv_in.parametrizations.weight.original0.mul_(2.0)


EDITS = (
    edit_in_place, edit_under_data, edit_post_quant_conv, replace_data, replace_a_parameter, change_dtype,
    load_another_state, assign_another_state, replace_a_layer, replace_the_decoder, swap_two_blocks, add_an_adapter,
    step_an_optimizer, parametrize_a_layer,
)  # fmt: skip


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_no_result_is_stale(vae: AutoencoderKL, edit: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    before = vae.decode(latents()).sample.detach()
    edit(vae)
    expected = plain(vae).decode(latents()).sample
    calls = vae.engine.calls
    for cls in (Encoder, Decoder):
        monkeypatch.setattr(cls, "forward", None)  # calling it would raise
    after = vae.decode(latents()).sample
    assert vae.engine.calls == calls + 1
    assert is_close(after, expected)
    assert not is_close(after, before, 1e-3), "the edit must show"


class Doubled(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: Any) -> Tensor:
        out: Tensor = 2.0 * self.block(*inputs)
        return out


def wrap_a_block(vae: Any) -> None:
    vae.decoder.mid_block.resnets[0] = Doubled(vae.decoder.mid_block.resnets[0])


def patch_forward(vae: Any) -> None:
    resnet = vae.decoder.mid_block.resnets[0]
    original = resnet.forward
    resnet.forward = lambda *args: 0.5 * original(*args)


def hook_a_block(vae: Any) -> None:
    vae.decoder.up_blocks[0].register_forward_hook(lambda _, __, out: 2.0 * out)


def hook_an_activation(vae: Any) -> None:
    vae.decoder.conv_act.register_forward_pre_hook(lambda _, inputs: (2.0 * inputs[0],))


def append_a_block(vae: Any) -> None:
    block = diffusers.models.resnet.ResnetBlock2D(in_channels=16, groups=4, temb_channels=None)
    vae.decoder.mid_block.resnets.append(block)
    vae.decoder.mid_block.attentions.append(copy.deepcopy(vae.decoder.mid_block.attentions[0]))


def remove_attention(vae: Any) -> None:
    vae.decoder.mid_block.attentions[0] = None


def drop_activations(vae: Any) -> None:
    vae.decoder.mid_block.resnets[0].dropout.p = 1.0
    vae.train()


def process_attention(vae: Any) -> None:
    class Half(diffusers.models.attention_processor.AttnProcessor2_0):
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            return 0.5 * super().__call__(*args, **kwargs)

    vae.set_attn_processor(Half())


DEPARTURES = {
    wrap_a_block: "decoder.mid_block.resnets.0 is a Doubled",
    patch_forward: "decoder.mid_block.resnets.0 has a forward of its own",
    hook_a_block: "decoder.up_blocks.0 has a hook",
    hook_an_activation: "decoder.conv_act has a hook",
    append_a_block: "decoder.mid_block.attentions.1",
    remove_attention: "decoder.mid_block.attentions.0.group_norm is not there",
    drop_activations: "decoder.mid_block.resnets.0.dropout drops activations",
    process_attention: "has a Half",
}


@pytest.mark.parametrize("depart", DEPARTURES, ids=lambda depart: depart.__name__)
def test_diffusers_blocks_run_where_something_sits_in_them(
    vae: AutoencoderKL, depart: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    before = vae.decode(latents()).sample
    depart(vae)
    out, again = vae.decode(latents()).sample, vae.decode(latents()).sample
    assert vae.engine.calls == 1, "our network ran before the departure only"
    assert torch.equal(out, again)
    assert torch.equal(out, plain(vae).decode(latents()).sample)
    assert not is_close(out, before, 1e-3), "the departure must show"
    assert DEPARTURES[depart] in vae.engine.describe()
    said = [record.getMessage() for record in caplog.records if record.name.startswith("sdvae")]
    assert [DEPARTURES[depart] in message for message in said] == [True], "said, and once"


# --- install and uninstall -------------------------------------------------------------------------------------------


@pytest.fixture
def pipe() -> SimpleNamespace:
    return SimpleNamespace(vae=make(diffusers.AutoencoderKL))


def test_install_and_uninstall_leave_the_object_as_it_was(pipe: SimpleNamespace) -> None:
    original, attributes = pipe.vae, dict(vars(pipe.vae))
    weights = {name: weight.data_ptr() for name, weight in original.named_parameters()}
    for _ in range(2):
        sdvae.install(pipe)
        assert isinstance(pipe.vae, AutoencoderKL)
        pipe.vae.decode(latents())
        assert {name: weight.data_ptr() for name, weight in pipe.vae.named_parameters()} == weights
    assert pipe.vae.engine.calls == 2, "a second install changes nothing"
    for _ in range(2):
        sdvae.uninstall(pipe)
        assert pipe.vae is original
        assert type(original) is diffusers.AutoencoderKL
    assert vars(original) == attributes
    calls = []
    original.decoder.mid_block.register_forward_hook(lambda *_: calls.append(1))
    original.decode(latents())
    assert calls, "diffusers' own blocks run again"


def test_force_upcast_is_off_where_fp16_runs_on_the_engine(pipe: SimpleNamespace, tmp_path: Path) -> None:
    sdvae.install(pipe)
    vae = pipe.vae.requires_grad_(False)
    assert vae.config.force_upcast is True
    exact = vae.decode(latents()).sample
    with torch.no_grad():
        for name, weight in vae.named_parameters():
            if "conv2" in name:
                weight.mul_(3e4)  # loud as SDXL's: beyond fp16, but for the scaled range
    loud = vae.decode(latents()).sample
    vae.half()
    assert vae.config.force_upcast is False
    scaled = vae.decode(latents().half()).sample
    assert scaled.dtype == torch.float16 and scaled.isfinite().all()
    assert float((scaled - loud).norm() / loud.norm()) < 0.02 < float((exact - loud).norm() / loud.norm())
    assert vae.engine._float32 is None, "not run again in fp32"
    vae.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["force_upcast"] is True
    vae.decoder.register_forward_hook(lambda *_: None)
    assert vae.config.force_upcast is True, "diffusers' own blocks would overflow"


class OtherVAE(diffusers.AutoencoderKL):
    """Somebody's subclass, whose methods must not be lost."""


@pytest.mark.parametrize("other", [None, nn.Identity(), make(OtherVAE)], ids=["none", "no VAE", "a subclass"])
def test_install_refuses_another_vae(other: Any) -> None:
    with pytest.raises(ConfigError, match=f"{type(other).__name__}"):
        sdvae.install(SimpleNamespace(vae=other))
    sdvae.uninstall(SimpleNamespace(vae=other))


def test_install_refuses_a_network_that_ours_is_not() -> None:
    vae = diffusers.AutoencoderKL.from_config({**CONFIG.to_diffusers(), "act_fn": "relu"})
    with pytest.raises(ConfigError, match="relu"):
        sdvae.install(SimpleNamespace(vae=vae))
    assert type(vae) is diffusers.AutoencoderKL


def test_a_compiled_decode_is_followed_from_its_first_call() -> None:
    vae = make(AutoencoderKL)
    expected = plain(vae).decode(latents()).sample
    with torch.no_grad():  # the engine is made inside
        found = torch.compile(vae.decode, backend="eager")(latents()).sample
    assert is_close(found, expected)


# --- FLUX.2's class ---


def make_flux2(cls: type[Any]) -> Any:
    config = replace(CONFIG, scaling_factor=1.0, latents_patch=2, decoder_block_out_channels=(16, 16))
    model = random_model(config)
    vae = cls.from_config(model.config.to_diffusers())
    vae.load_state_dict(model.state_dict())
    return vae.eval()


@torch.no_grad()
def test_flux2s_class_runs_on_the_engine_and_saves_as_diffusers(tmp_path: Path) -> None:
    theirs, ours = make_flux2(diffusers.AutoencoderKLFlux2), make_flux2(AutoencoderKLFlux2)
    assert is_close(ours.encode(pixels()).latent_dist.mean, theirs.encode(pixels()).latent_dist.mean)
    assert is_close(ours.decode(latents()).sample, theirs.decode(latents()).sample)
    assert ours.engine.calls == 2 and "sdvae's engine" in ours.engine.describe()
    for vae in (theirs, ours):
        vae.enable_tiling()
    assert is_close(ours.encode(pixels(32, 32)).latent_dist.mean, theirs.encode(pixels(32, 32)).latent_dist.mean)
    assert is_close(ours.decode(latents(16, 16)).sample, theirs.decode(latents(16, 16)).sample)
    assert ours.engine.calls > 4, "one a tile"
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "AutoencoderKLFlux2"
    again = diffusers.AutoencoderKLFlux2.from_pretrained(tmp_path)
    assert torch.equal(again.bn.running_mean, ours.bn.running_mean)
    assert AutoencoderKLFlux2.from_pretrained(tmp_path).engine.calls == 0


@torch.no_grad()
def test_flux2s_class_is_installed_and_taken_back() -> None:
    pipe = SimpleNamespace(vae=make_flux2(diffusers.AutoencoderKLFlux2))
    vae, expected = pipe.vae, pipe.vae.decode(latents()).sample
    sdvae.install(pipe)
    sdvae.install(pipe)
    assert type(vae) is AutoencoderKLFlux2 and is_close(vae.decode(latents()).sample, expected)
    assert vae.engine.calls == 1
    vae.bn.register_forward_hook(lambda *_: None)
    assert "bn has a hook" in str(vae.engine.departure())
    sdvae.uninstall(pipe)
    assert type(vae) is diffusers.AutoencoderKLFlux2 and torch.equal(vae.decode(latents()).sample, expected)
    half = make_flux2(AutoencoderKLFlux2).half()
    assert half.config.batch_norm_eps == 1e-4
    assert is_close(half.decode(latents().half()).sample.float(), expected, 5e-3)
    assert half.engine.calls == 1
