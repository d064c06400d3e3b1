"""A layer or block that is more than its weights runs itself, and `describe` says why: in a VAE and in the drop-in."""

import copy
import re
from collections.abc import Callable
from types import MethodType, SimpleNamespace

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import sdvae
from sdvae.vae import VAE
from tests.test_integration_diffusers import CONFIG, is_close, latents, make, pixels, random_model

CPU = torch.device("cpu")
RESNET = "decoder.mid_block.resnets.0"
CONV, NORM, LINEAR = f"{RESNET}.conv2", f"{RESNET}.norm1", "decoder.mid_block.attentions.0.to_q"


class OwnConvolution(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OwnNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OwnTensor(Tensor):
    pass


def swapped(name: str, kind: type[nn.Module]) -> Callable[[nn.Module], None]:
    def alter(model: nn.Module) -> None:
        model.get_submodule(name).__class__ = kind

    return alter


def put(name: str, **values: object) -> Callable[[nn.Module], None]:
    def alter(model: nn.Module) -> None:
        for key, value in values.items():
            setattr(model.get_submodule(name), key, value)

    return alter


def replicating(model: nn.Module) -> None:
    """The one padding mode of torch's that the engine does not know."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "replicate"


def grouped(model: nn.Module) -> None:
    convolution = model.get_submodule(CONV)
    convolution.groups, convolution.weight = 2, nn.Parameter(convolution.weight[:, ::2].detach().clone())  # type: ignore[assignment, index]


def dilated(model: nn.Module) -> None:
    put(CONV, dilation=(2, 2), padding=(2, 2))(model)


def wider(model: nn.Module) -> None:
    convolution = model.get_submodule(CONV)
    put(
        CONV,
        kernel_size=(5, 5),
        padding=(2, 2),
        weight=nn.Parameter(F.pad(convolution.weight.detach(), [1] * 4) + 0.01),
    )(  # type: ignore[arg-type]
        model
    )


def asymmetric(model: nn.Module) -> None:
    def convolve(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(F.pad(F.pad(x, (1, 1, 0, 0), "circular"), (0, 0, 1, 1)), weight, bias)

    convolution = model.get_submodule(CONV)
    convolution._conv_forward = MethodType(convolve, convolution)  # type: ignore[assignment]


def doubled(model: nn.Module) -> None:
    layer = model.get_submodule(CONV)
    before = layer.forward
    layer.forward = lambda x: 2 * before(x)


def hooked(name: str) -> Callable[[nn.Module], None]:
    def alter(model: nn.Module) -> None:
        model.get_submodule(name).register_forward_hook(lambda module, inputs, out: 2 * out)

    return alter


def weight_normed(model: nn.Module) -> None:
    parametrizations.weight_norm(model.get_submodule(CONV))
    model.get_submodule(CONV).parametrizations.weight.original0.data *= 2  # type: ignore[union-attr]


def unaffine(model: nn.Module) -> None:
    model.set_submodule(NORM, nn.GroupNorm(4, 16, 1e-6, affine=False))


def unbiased(model: nn.Module) -> None:
    model.get_submodule(CONV).register_parameter("bias", None)


def subclassed_weight(model: nn.Module) -> None:
    layer = model.get_submodule(LINEAR)
    layer.weight = nn.Parameter((2 * layer.weight.detach()).as_subclass(OwnTensor))  # type: ignore[operator]


# What is altered, and what `describe` says of it.
LAYERS: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "padding mode": (replicating, "padding_mode of its convolutions is replicate"),
    "mixed padding": (put(CONV, padding_mode="circular"), "padding_mode of its convolutions is circular and zeros"),
    "dilation": (dilated, r"has (dilation|padding) \(2, 2\) instead of \(1, 1\)"),
    "groups": (grouped, "has groups 2 instead of 1"),
    "kernel size": (wider, r"has (kernel_size \(5, 5\)|padding \(2, 2\)) instead of "),
    "_conv_forward": (asymmetric, "has a _conv_forward of its own"),
    "forward": (doubled, "has a forward of its own"),
    "hook": (hooked(CONV), "has a hook"),
    "weight norm": (weight_normed, "is a ParametrizedConv2d"),
    "subclass of Conv2d": (swapped(CONV, OwnConvolution), "is a OwnConvolution"),
    "subclass of GroupNorm": (swapped(NORM, OwnNorm), "is a OwnNorm"),
    "eps": (put(NORM, eps=0.5), "has eps 0.5 instead of 1e-06"),
    "affine": (unaffine, "has affine False instead of True"),
    "no bias": (unbiased, r"has no bias of shape \(16,\)"),
    "tensor of another class": (subclassed_weight, "has a weight that is a OwnTensor"),
}
BLOCKS = {
    "hook on a block": (hooked(RESNET), f"{RESNET} has a hook"),
    "forward of a block": (put(RESNET, forward=lambda x, *more: 2 * x), f"{RESNET} has a forward of its own"),
    "another block": (put("decoder", conv_act=nn.Identity()), "decoder.conv_act is a Identity"),
    "a number of a block": (
        put(RESNET, output_scale_factor=2.0), f"{RESNET} has output_scale_factor 2.0 instead of 1"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
def test_a_vae_runs_its_own_layers(kind: str) -> None:
    alter, reason = LAYERS[kind]
    model = random_model(CONFIG)
    alter(model)
    vae = VAE(model, CPU, torch.float32, "altered")
    ours = vae.decode(latents())
    with torch.no_grad():
        assert is_close(ours, model.decode(latents()))
        assert not is_close(ours, random_model(CONFIG).decode(latents()), 1e-3), "it must show"
    assert re.fullmatch(rf"sdvae's reference network, float32 on cpu, because [\w.]+ {reason}.*", vae.engine.describe())


@pytest.mark.parametrize("kind", [*LAYERS, *BLOCKS])
def test_the_drop_in_gives_diffusers_results(kind: str) -> None:
    alter, reason = (LAYERS | BLOCKS)[kind]
    vae = make(diffusers.AutoencoderKL)
    alter(vae)
    vae.requires_grad_(False)
    expected = vae.decode(latents()).sample, vae.encode(pixels()).latent_dist.mean
    sdvae.install(SimpleNamespace(vae=vae))
    assert reason_is_told(vae.engine.describe(), reason)
    found = vae.decode(latents()).sample, vae.encode(pixels()).latent_dist.mean
    assert all(is_close(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert not is_close(found[0], make(diffusers.AutoencoderKL).decode(latents()).sample, 1e-3), "it must show"


def reason_is_told(described: str, reason: str) -> bool:
    whose = "(sdvae's reference network, float32 on cpu|diffusers' own blocks)"
    return re.fullmatch(rf"{whose}, because ([\w.]+ )?{reason}.*", described) is not None


@pytest.mark.parametrize("name", [RESNET, "decoder", "encoder.down_blocks.0"])
def test_a_hook_on_a_block_of_a_vae_runs(name: str) -> None:
    model = random_model(CONFIG)
    hooked(name)(model)
    vae = VAE(model, CPU, torch.float32, "hooked")
    with torch.no_grad():
        assert is_close(vae.decode(latents()), model.decode(latents()))
        assert is_close(vae.encode(pixels()).mean, model.encode(pixels()).mean)
    assert vae.engine.describe() == f"sdvae's reference network, float32 on cpu, because {name} has a hook"


def test_a_hook_for_all_modules_runs() -> None:
    seen: list[nn.Module] = []
    vae = VAE(random_model(CONFIG), CPU, torch.float32, "random")
    expected = vae.decode(latents())
    with nn.modules.module.register_module_forward_hook(lambda module, inputs, out: seen.append(module)):
        found = vae.decode(latents())
        assert "because a hook is set for all modules" in vae.engine.describe()
    assert is_close(found, expected)
    assert vae.model.decoder.conv_in in seen
    vae.decode(latents())
    assert vae.engine.describe().startswith("sdvae's engine")


def test_whoever_runs_itself_is_deterministic_and_gives_fp32() -> None:
    model = random_model(CONFIG)
    hooked(CONV)(model)
    vae = VAE(model, CPU, torch.bfloat16, "hooked")
    with vae.deterministic():
        together = vae.decode(latents(batch=3))
        alone = torch.cat([vae.decode(one[None]) for one in latents(batch=3)])
    assert together.dtype == torch.float32 and torch.equal(together, alone)


def test_what_changes_no_result_is_no_obstacle() -> None:
    model = copy.deepcopy(random_model(CONFIG))
    model.train()
    model.get_submodule(CONV).name = "mine"  # type: ignore[assignment]
    vae = VAE(model, CPU, torch.float32, "tagged")
    vae.decode(latents())
    assert vae.engine.describe().startswith("sdvae's engine")
