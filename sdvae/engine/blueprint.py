"""What the engine knows of a module: what its config builds. Of anything else the module itself has to make use."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_ALL_HOOKS = (*_FORWARD_HOOKS, "_backward_hooks", "_backward_pre_hooks")
_PLAIN_VALUES = (bool, int, float, str, tuple, type(None), torch.dtype)
# Change no result, or are obeyed.
_FREE = {"training", "gradient_checkpointing", "_compiled_call_impl", "padding_mode"}


class Blueprint:
    """A network as it was built, which a live one is compared with.

    Layers hold the weights; they may be reached by any path. Blocks are the modules around them.
    """

    def __init__(self, built: nn.Module, layer_names: frozenset[str]) -> None:
        self._layer_names = layer_names
        self._built = dict(built.named_modules())
        self._settings = {name: _settings(module) for name, module in self._built.items()}

    def foreign_block(self, source: nn.Module) -> str | None:
        """What of the blocks of `source` another network of this blueprint would pass by, or None."""
        if torch_module._has_any_global_hook():  # type: ignore[no-untyped-call]
            return "a hook is set for all modules"
        found = set()
        for name, module in _inner(source, "", self._layer_names):
            if name in self._layer_names:
                found.add(name)
            elif reason := self._foreign(name, module, _ALL_HOOKS):
                return f"{name} {reason}"
        absent = sorted(self._layer_names - found)
        return f"{absent[0]} is not there" if absent else None

    def foreign_layer(self, name: str, layer: nn.Module) -> str | None:
        """What of a layer its weights do not tell, or None."""
        if reason := self._foreign(name, layer, _FORWARD_HOOKS):  # without gradients, none runs backward
            return reason
        for key, known in self._built[name].named_parameters(recurse=False):
            values = layer._parameters.get(key)
            if values is None or values.shape != known.shape:
                return f"has no {key} of shape {tuple(known.shape)}"
            if type(values) not in (nn.Parameter, Tensor) or values.layout != torch.strided:
                return f"has a {key} that is a {type(values).__name__}, {values.layout}"
        return None

    def _foreign(self, name: str, module: nn.Module, hooks: tuple[str, ...]) -> str | None:
        kind = type(module)
        if name not in self._built or kind is not type(self._built[name]):
            return f"is a {kind.__name__}"
        if any(getattr(module, each) for each in hooks):
            return "has a hook"
        values = vars(module)
        for key in values.keys() - vars(self._built[name]).keys() - _FREE:
            if callable(getattr(kind, key, None)):
                return f"has a {key} of its own"
        for key, known in self._settings[name].items():
            if values.get(key) != known:
                return f"has {key} {values.get(key)!r} instead of {known!r}"
        return None


def padding_modes(layers: Iterable[nn.Module]) -> set[str]:
    """What the convolutions among the layers pad with; of a downsampler, which pads nothing itself, it says nothing."""
    return {layer.padding_mode for layer in layers if isinstance(layer, nn.Conv2d) and layer.padding != (0, 0)}


def _settings(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if isinstance(value, _PLAIN_VALUES) and key not in _FREE}


def _inner(module: nn.Module, prefix: str, layer_names: frozenset[str]) -> Iterator[tuple[str, nn.Module]]:
    """All modules below `module`, but not those inside of layers."""
    for child_name, child in module.named_children():
        name = prefix + child_name
        yield name, child
        if name not in layer_names:
            yield from _inner(child, f"{name}.", layer_names)
