"""Pickles of torch.save, parsed without executing code.

A name in a pickle becomes a value of this module, or the file is refused; nothing is imported or called. A tensor
becomes its place in a storage.
"""

import io
import pickletools
import struct
import sys
import warnings
from dataclasses import dataclass, replace
from enum import Enum, auto
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sdvae.errors import UnsafeFileError, WeightsError

DAMAGED_PICKLE = (LookupError, ValueError, TypeError, OverflowError, struct.error)  # what a damaged pickle raises here

_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_STORAGES = {  # torch's classes by name -> what they hold
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip
# Bookkeeping of trainers becomes objects that hold and do nothing: the classes of any package, and these of Python's
# own library. Whatever else is asked of that library, other programs would run, and the file is refused.
_INERT_NAMES = {
    "argparse": {"Namespace"},
    "collections": {"defaultdict", "Counter", "deque"},
    "copyreg": {"_reconstructor"},
    "copy_reg": {"_reconstructor"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
    "functools": {"partial"},
    "random": {"Random"},
    "types": {"SimpleNamespace"},
    "uuid": {"UUID"},
    "builtins": {"set", "frozenset", "dict", "list", "tuple", "int", "float", "bool", "str", "complex", "object"}
    | {"slice", "range", "bytearray"},
    "__builtin__": {"set", "dict", "list", "int", "long", "float", "bool", "str", "object"},
    "_codecs": {"encode"},
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "typing": {"Any", "Dict", "List", "Union", "Optional"},
}
_PYTHONS_OWN = sys.stdlib_module_names | {"__builtin__", "copy_reg", "commands", "pip", "setuptools"}
_RUN_CODE = ("torch.hub", "torch.jit", "torch.package", "torch.serialization", "torch.storage", "numpy.testing")
# Opcodes that push the number, text or bytes they carry.
_VALUES = (
    "INT", "INT1", "INT2", "LONG", "LONG1", "LONG4", "FLOAT", "STRING", "UNICODE", "UNICODE8", "BYTES", "BYTES8",
    "BYTEARRAY8",
)  # fmt: skip
_MAX_DEPTH = 3  # of dicts in dicts that hold the tensors
_MAX_STEPS = 500_000  # of one pickle; a full checkpoint with its optimizer has 200,000


@dataclass(frozen=True)
class Storage:
    """Numbers of one dtype that a container holds under `key`."""

    key: str
    dtype: torch.dtype


@dataclass(frozen=True)
class PickledTensor:
    """The arguments of `_rebuild_tensor`, not checked yet; `offset` and `stride` in elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Rebuild(Enum):
    """The functions that a pickle may call: torch's that make a tensor, and the class of a state dict."""

    TENSOR = auto()  # (storage, offset, shape, stride, ...)
    PARAMETER = auto()  # (tensor, ...)
    SUBCLASS = auto()  # (function, class, its arguments, attributes)
    DICT = auto()  # ()


@dataclass(frozen=True)
class _Inert:
    """Stands for an object that is not a tensor, or its class: it accepts any arguments and keeps none.

    `name` is what it was asked for by, where sdvae does not know it; it `had_tensors` where it was made of some, and
    `is_module` where it was given the attributes of a torch.nn.Module.
    """

    name: str | None = None
    had_tensors: bool = False
    is_module: bool = False


_INERT = _Inert()


_CALLS = {
    ("collections", "OrderedDict"): _Rebuild.DICT,
    ("torch._utils", "_rebuild_tensor"): _Rebuild.TENSOR,
    ("torch._utils", "_rebuild_tensor_v2"): _Rebuild.TENSOR,
    ("torch._utils", "_rebuild_tensor_v3"): _Rebuild.TENSOR,
    ("torch._utils", "_rebuild_parameter"): _Rebuild.PARAMETER,
    ("torch._utils", "_rebuild_parameter_with_state"): _Rebuild.PARAMETER,
    ("torch._tensor", "_rebuild_from_type_v2"): _Rebuild.SUBCLASS,
}


class _Machine:
    """Interprets a pickle whose only values are text, numbers, lists, dicts, tensors and inert objects.

    Python's own unpickler is not used: even with every name refused, it crashes on tuples nested deeply enough.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.storages: dict[str, Storage] = {}
        self.unknown: str | None = None  # the first name that sdvae does not know

    def run(self, stream: BinaryIO) -> Any:
        """The value of the pickle at the stream's position; the stream then stands behind the pickle."""
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of odd escapes in texts
            for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
                if number == _MAX_STEPS:
                    raise ValueError(f"it has more than {_MAX_STEPS:,} steps")
                self._step(opcode.name, argument)
        return self.stack.pop()

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "MARK":
                self.marks.append(len(stack))
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._items()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                stack.append(tuple(self._items()))
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                stack.append(self._items())
            case "APPEND":
                self._extend([stack.pop()])
            case "APPENDS":
                self._extend(self._items())
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                items = self._items()
                stack.append({})
                self._update(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._update([key, value])
            case "SETITEMS":
                self._update(self._items())
            case "EMPTY_SET":
                stack.append(_INERT)
            case "ADDITEMS":
                self._items()
            case "FROZENSET":
                self._items()
                stack.append(_INERT)
            case "GLOBAL":
                module, _, attribute = argument.partition(" ")
                stack.append(self._find(module, attribute))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(self._find(str(module), str(attribute)))
            case "INST":
                module, _, attribute = argument.partition(" ")
                stack.append(self._call(self._find(module, attribute), tuple(self._items())))
            case "OBJ":
                function, *arguments = self._items()
                stack.append(self._call(function, tuple(arguments)))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._call(function, arguments))
            case "NEWOBJ_EX":
                _, arguments, function = stack.pop(), stack.pop(), stack.pop()
                stack.append(self._call(function, arguments))
            case "BUILD":  # attributes of an object: none here has any
                attributes = stack.pop()
                if isinstance(stack[-1], _Inert) and isinstance(attributes, dict) and "_modules" in attributes:
                    stack[-1] = replace(stack[-1], is_module=True)
            case "BINPERSID":
                stack.append(self._find_persistent(*stack.pop()))
            case _ if name.endswith(_VALUES):
                stack.append(argument)
            case _:
                raise ValueError(f"torch.save does not write {name}")

    def _items(self) -> list[Any]:
        """What was pushed since the last mark, popped."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def _update(self, items: list[Any]) -> None:
        # Only text can name a tensor, and hashing a deeply nested key can overflow the stack.
        if isinstance(self.stack[-1], dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            self.stack[-1].update((key, value) for key, value in pairs if isinstance(key, str))

    def _find(self, module: str, name: str) -> Any:
        if (module, name) in _CALLS:
            return _CALLS[module, name]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if name in _INERT_NAMES.get(module, ()):
            return _INERT
        asked = f"{module[:99]!a}.{name[:99]!a}"
        if module.partition(".")[0] in _PYTHONS_OWN or f"{module}.{name}".startswith(_RUN_CODE):
            raise needs_code(self.path, asked)
        self.unknown = self.unknown or asked
        return _Inert(asked)

    def _call(self, function: Any, arguments: Any) -> Any:
        match function, arguments:
            case _Inert(), _:
                had_tensors = isinstance(arguments, tuple) and any(map(_has_tensors, arguments))
                return _Inert(function.name, had_tensors) if had_tensors else function
            case _Rebuild.DICT, ():
                return {}
            case _Rebuild.DICT, ([*pairs],):
                return {key: value for key, value in pairs if isinstance(key, str)}
            case _Rebuild.PARAMETER, (tensor, *_):
                return tensor
            case _Rebuild.SUBCLASS, (inner, _, tuple(its_arguments), *_):
                return self._call(inner, its_arguments)
            case _Rebuild.TENSOR, (Storage() as storage, offset, tuple(shape), tuple(stride), *rest):
                dtype = next((value for value in rest if isinstance(value, torch.dtype)), storage.dtype)
                return PickledTensor(storage, dtype, offset, shape, stride)
        raise ValueError("it calls something that is not a function")

    def _find_persistent(self, kind: Any, dtype: Any, key: Any, *_: Any) -> Any:
        """A storage: ("storage", its class, key, ...); or the class of a module: ("module", class, its source...)."""
        if kind == "module" and isinstance(dtype, _Inert):
            return dtype
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise ValueError("an unknown kind of storage")
        return self.storages.setdefault(key, Storage(key, dtype))


@dataclass(frozen=True)
class Unpickled:
    """The value of a pickle, the storages it names, and the first name in it that sdvae does not know."""

    value: Any
    storages: dict[str, Storage]
    unknown: str | None


def unpickle(path: Path, file: BinaryIO, max_bytes: int) -> Unpickled:
    """The pickle at the file's position; the file then stands behind the pickle."""
    start = file.tell()
    machine, stream = _Machine(path), io.BytesIO(file.read(max_bytes))
    try:
        value = machine.run(stream)
    except DAMAGED_PICKLE as error:
        raise WeightsError(f"{path} is a damaged or foreign pickle ({str(error)[:99]}); download it again") from None
    file.seek(start + stream.tell())
    return Unpickled(value, machine.storages, machine.unknown)


def named_tensors(path: Path, found: Unpickled) -> dict[str, PickledTensor]:
    """The tensors of a saved dict by name, or a tensor saved alone, named "".

    Lightning keeps the dict in "state_dict". Other trainers keep one or several in a dict without tensors of its own:
    of several, each gives its tensors the prefix of its key. Raises UnsafeFileError where a class that sdvae does not
    know would have made the tensors.
    """
    value = found.value
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    items = value if isinstance(value, dict) else {"": value}
    for made in items.values():
        if isinstance(made, _Inert) and made.had_tensors and made.name:
            raise needs_code(path, made.name)
    tensors = _tensors_in(items, _MAX_DEPTH, set())
    if not tensors and (module := next((made for made in items.values() if _is_module(made)), None)):
        raise UnsafeFileError(
            f"{path} is refused: it is a whole module that torch.save(model) pickled, which only the code of "
            f"{module.name or 'its class'} can read; save its state_dict() instead, best as safetensors"
        )
    if not tensors and found.unknown:
        raise needs_code(path, found.unknown)
    return tensors


def _tensors_in(items: dict[str, Any], max_depth: int, seen: set[int]) -> dict[str, PickledTensor]:
    tensors = {key: tensor for key, tensor in items.items() if isinstance(tensor, PickledTensor)}
    if tensors or max_depth == 0:
        return tensors
    groups: dict[str, dict[str, PickledTensor]] = {}
    for key, inner in items.items():
        if isinstance(inner, dict) and id(inner) not in seen:  # a hostile pickle names one dict a million times
            seen.add(id(inner))
            groups[key] = _tensors_in(inner, max_depth - 1, seen)
    groups = {key: group for key, group in groups.items() if group}
    if len(groups) == 1:
        return next(iter(groups.values()))
    return {f"{key}.{name}": tensor for key, group in groups.items() for name, tensor in group.items()}


def _is_module(made: Any) -> bool:
    return isinstance(made, _Inert) and made.is_module


def needs_code(path: Path, asked: str) -> UnsafeFileError:
    """The refusal of a file that cannot be read without the code of what it asks for."""
    return UnsafeFileError(
        f"{path} is refused: it asks for {asked}, which could run code; use a .safetensors version of it"
    )


def _has_tensors(argument: Any) -> bool:
    made_of_tensors = isinstance(argument, _Inert) and argument.had_tensors
    return made_of_tensors or isinstance(argument, Storage | PickledTensor)
