"""Drop-ins for diffusers' AutoencoderKL and AutoencoderKLFlux2 whose encode and decode run on sdvae's engine.

    from sdvae.integrations.diffusers import AutoencoderKL      # for diffusers.AutoencoderKL, or
    sdvae.install(pipe)                                          # for a pipeline that is there already

Everything around the network (files, tiling, slicing, offload, output types) is diffusers' own code.
"""

import logging
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Self

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as TheirAutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2 as TheirAutoencoderKLFlux2
from torch import Tensor, nn

from sdvae.config import VAEConfig
from sdvae.engine.run import Engine
from sdvae.errors import ConfigError

logger = logging.getLogger(__name__)


class DropInEngine(Engine):
    """The engine of a diffusers VAE, which knows when something sits in that VAE that our network would pass by."""

    _reported: str | None = None

    def departure(self) -> str | None:
        """What keeps our network from standing in for diffusers' blocks, or None.

        Layers may be anything that takes their place (adapters, quantised or offloaded ones), with hooks of their own.
        The blocks around them must be diffusers' own: a hook on one, a patched `forward`, a custom attention processor
        or another block would never run in our network.
        """
        for name, module in self._source.named_modules():
            if isinstance(module, nn.Dropout) and module.p and module.training:
                return f"{name} drops activations"
            if type(module) is Attention and type(module.processor) not in (AttnProcessor, AttnProcessor2_0):
                return f"{name} has a {type(module.processor).__name__}"
        return super().departure()

    def _build(self) -> nn.Module:
        source: Any = self._source
        built: nn.Module = source._theirs.from_config(source._internal_dict)
        return built

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it would compile again for each block that is looked at
    def stands_in(self) -> bool:
        """Whether our network runs now; where diffusers' blocks must, the log says why, once for each reason."""
        reason = self.departure()
        if reason is not None and reason != self._reported:
            logger.warning("diffusers' own blocks run instead of sdvae's: %s", reason)
        self._reported = reason
        return reason is None

    def describe(self) -> str:
        """What ran in the last call, or would run in a first, in words; why, where that is not ours."""
        reason = self._reported if self._reported or self.calls else self.departure()
        return super().describe() if reason is None else f"diffusers' own blocks, because {reason}"


class _OnEngine(nn.Module):
    """What encodes and decodes for a VAE of diffusers' class `_theirs`, of which the whole is a subclass."""

    _theirs: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """A VAE that is saved under diffusers' name."""
        vae: Any = super().__new__(cls)
        _sign(vae)
        return vae  # type: ignore[no-any-return]

    @property
    def engine(self) -> DropInEngine:
        """What encodes and decodes; made when it is first asked for."""
        engine: DropInEngine | None = vars(self).get("_engine")
        if engine is None or engine.source is not self:  # a shallow copy (torch's replicate) needs its own
            engine = vars(self)["_engine"] = _make_engine(self)
        return engine

    @property
    def config(self) -> Any:
        """The config; without `force_upcast` where fp16 runs on the engine, which scales its range and cannot overflow.

        What is saved is the original.
        """
        config: Any = self._internal_dict
        if config.get("force_upcast") and self.dtype == torch.float16 and self.engine.departure() is None:
            return FrozenDict(config | {"force_upcast": False})  # type: ignore[no-untyped-call]
        return config

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if "_engine" in vars(self):
            self.engine.release()  # what is packed must not stay on a device that the weights leave
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _encode(self, x: Tensor) -> Tensor:
        moments: Tensor = self._theirs._encode(self._inside(), x)
        return moments

    def _decode(self, z: Tensor, return_dict: bool = True) -> Any:  # DecoderOutput or (pixels,)
        return self._theirs._decode(self._inside(), z, return_dict)

    def _tiled_encode(self, x: Tensor) -> Tensor:
        moments: Tensor = self._theirs._tiled_encode(self._inside(), x)
        return moments

    def tiled_encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Encode tile by tile; deprecated by diffusers."""
        return self._theirs.tiled_encode(self._inside(), x, return_dict)

    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> Any:  # DecoderOutput or (pixels,)
        """Decode tile by tile, blending the overlaps."""
        return self._theirs.tiled_decode(self._inside(), z, return_dict)

    def _inside(self) -> Any:
        return _Inside(self) if self.engine.stands_in() else self


class AutoencoderKL(_OnEngine, TheirAutoencoderKL):  # type: ignore[misc]  # diffusers' bases disagree
    """`diffusers.AutoencoderKL`, running on sdvae's engine: same files, same arguments, same results to rounding.

    `vae.engine.calls` counts its runs and `vae.engine.describe()` says what runs. Tiles (`enable_tiling`) and slices
    (`enable_slicing`) are cut and blended by diffusers, each computed by the engine. With gradients wanted the network
    is differentiable as ever. `force_upcast` reads False in fp16: the engine scales the range of what it carries, and
    what overflows all the same runs again in fp32.
    """

    _theirs = TheirAutoencoderKL


class AutoencoderKLFlux2(_OnEngine, TheirAutoencoderKLFlux2):  # type: ignore[misc]  # as above
    """`diffusers.AutoencoderKLFlux2`, running on sdvae's engine as `AutoencoderKL` does.

    Its BatchNorm, by which pipelines scale latents, is left to them.
    """

    _theirs = TheirAutoencoderKLFlux2


_OURS: dict[type, Any] = {ours._theirs: ours for ours in (AutoencoderKL, AutoencoderKLFlux2)}


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it cannot follow how a network is built
def _make_engine(vae: Any) -> DropInEngine:
    return DropInEngine(vae, _read_config(vae._theirs, vae._internal_dict))


def _read_config(theirs: type, values: Mapping[str, Any]) -> VAEConfig:
    return VAEConfig.from_diffusers({**values, "_class_name": theirs.__name__})


class _Inside:
    """A VAE as diffusers' methods see it from inside, with our encoder and decoder (quant convolutions included)."""

    quant_conv = post_quant_conv = None
    config = SimpleNamespace(use_quant_conv=False, use_post_quant_conv=False)

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.encoder, self.decoder = vae.engine.encode_moments, vae.engine.decode

    def __getattr__(self, name: str) -> Any:
        return getattr(self.vae, name)


def install(pipe: Any) -> None:
    """Let a pipeline's own VAE run on sdvae's engine; its weights, hooks and settings stay where they are.

    `pipe.vae` remains the same object, so whatever else holds it (another pipeline, an offload hook) runs on the
    engine too. Raises ConfigError for a pipeline without a plain `diffusers.AutoencoderKL` or `AutoencoderKLFlux2`.
    """
    vae: Any = getattr(pipe, "vae", None)
    kind = type(vae)
    if kind in _OURS.values():
        return
    if kind not in _OURS:
        raise ConfigError(
            "install needs a pipeline whose vae is a diffusers.AutoencoderKL or AutoencoderKLFlux2, and this one's is "
            f"of type {kind.__name__}; leave it as it is"
        )
    _read_config(kind, vae.config)  # refused now, not in the middle of a picture
    vae.__class__ = _OURS[kind]
    _sign(vae)


def uninstall(pipe: Any) -> None:
    """Give a pipeline's VAE its diffusers code back; a VAE that `install` has not changed is left alone."""
    vae: Any = getattr(pipe, "vae", None)
    if type(vae) in _OURS.values():
        vae.__class__ = vae._theirs
        for name in ("_engine", "__module__"):
            vars(vae).pop(name, None)


def _sign(vae: Any) -> None:
    # diffusers writes this name into a pipeline's model_index.json: saved pipelines load where there is no sdvae.
    vars(vae)["__module__"] = vae._theirs.__module__
