"""The classes of diffusers that are a VAEConfig: their field names in its own, and back."""

from collections.abc import Callable
from typing import Any

from sdvae.errors import ConfigError

Fields = dict[str, Any]

_FLUX2_DEFAULTS: Fields = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 32, "sample_size": 1024,
}  # fmt: skip
_ASYMMETRIC = {  # diffusers' name -> VAEConfig's
    "down_block_out_channels": "block_out_channels",
    "layers_per_down_block": "layers_per_block",
    "up_block_out_channels": "decoder_block_out_channels",
    "layers_per_up_block": "decoder_layers_per_block",
}
_ASYMMETRIC_DEFAULTS: Fields = {
    "decoder_block_out_channels": (64,), "decoder_layers_per_block": 1, "force_upcast": False,
}  # fmt: skip
_ASYMMETRIC_FIELDS = {  # what it has in common with AutoencoderKL
    "in_channels", "out_channels", "latent_channels", "norm_num_groups", "sample_size", "scaling_factor", "act_fn",
    "down_block_types", "up_block_types",
}  # fmt: skip
_OF_FLUX2 = {"latents_patch", "batch_norm_eps"}
_OF_DECODER = {"decoder_block_out_channels", "decoder_layers_per_block"}
_NOT_OF_FLUX2 = {
    "latents_patch", "decoder_layers_per_block", "scaling_factor", "shift_factor", "latents_mean", "latents_std",
    "force_upcast",
}  # fmt: skip


def as_class(values: Fields) -> tuple[str, Fields]:
    """The name of the class that has these fields of a VAEConfig, and the fields in the names of that class."""
    if values["latents_patch"] > 1:
        own = {"patch_size": [values["latents_patch"]] * 2, "batch_norm_momentum": 0.1}
        return "AutoencoderKLFlux2", {key: value for key, value in values.items() if key not in _NOT_OF_FLUX2} | own
    if all(values[key] is None for key in _OF_DECODER):
        return "AutoencoderKL", {key: value for key, value in values.items() if key not in _OF_FLUX2 | _OF_DECODER}
    values = values | {
        "decoder_block_out_channels": values["decoder_block_out_channels"] or values["block_out_channels"],
        "decoder_layers_per_block": values["decoder_layers_per_block"] or values["layers_per_block"],
    }
    own = {theirs: values[ours] for theirs, ours in _ASYMMETRIC.items()}
    return "AsymmetricAutoencoderKL", {key: values[key] for key in _ASYMMETRIC_FIELDS} | own


def _of_flux2(given: Fields) -> Fields:
    patch = given.pop("patch_size", (2, 2))
    if not (isinstance(patch, list | tuple) and len(patch) == 2 and patch[0] == patch[1] and patch[0] != 1):
        raise ConfigError(f"patch_size is {patch!r:.40}; sdvae knows square patches, as FLUX.2's (2, 2)")
    given.pop("batch_norm_momentum", None)  # of training
    return _FLUX2_DEFAULTS | given | {"latents_patch": patch[0], "scaling_factor": 1.0}


def _of_asymmetric(given: Fields) -> Fields:
    given.pop("block_out_channels", None)  # diffusers repeats the decoder's there
    own = {ours: given.pop(theirs) for theirs, ours in _ASYMMETRIC.items() if theirs in given}
    return _ASYMMETRIC_DEFAULTS | given | own


# The name in a config.json -> what makes a VAEConfig's fields of the given ones.
CLASSES: dict[str, Callable[[Fields], Fields]] = {
    "AutoencoderKL": dict,
    "FlaxAutoencoderKL": dict,  # as SD 1.5's own config.json says
    "AutoencoderKLFlux2": _of_flux2,
    "AsymmetricAutoencoderKL": _of_asymmetric,
}
