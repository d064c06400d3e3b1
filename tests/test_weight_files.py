"""Readers of weights files: bit-equal with torch's and safetensors', and one sentence for a broken or hostile file."""

import codecs
import ctypes
import gc
import io
import json
import os
import pickle
import struct
import sys
import time
import types
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor

from sdvae.cli.main import cli
from sdvae.errors import UnsafeFileError, WeightsError
from sdvae.weights.files import DTYPES, open_weights
from sdvae.weights.load import load_weights
from tests.test_keymap import TINY, assert_equal, ldm_state_dict

MIB = 1 << 20
SAVE_AS: dict[str, dict[str, Any]] = {
    "zip.ckpt": {},
    "legacy.ckpt": {"_use_new_zipfile_serialization": False},
    "zip5.bin": {"pickle_protocol": 5},
}


def read(path: Path) -> dict[str, Tensor]:
    return {key: entry.read() for key, entry in open_weights(path).entries.items()}


def every_dtype() -> dict[str, Tensor]:
    numbers = torch.arange(24).view(2, 3, 4) % 2
    return {f"a.{name}": numbers.to(dtype) for name, dtype in DTYPES.items()}


# --- Sound files ---


@pytest.mark.parametrize("how", ["file.safetensors", *SAVE_AS])
def test_every_dtype_reads_bit_equal(how: str, tmp_path: Path) -> None:
    tensors = every_dtype() | {"scalar": torch.tensor(3.5), "none": torch.zeros(0, 4)}
    path = tmp_path / how
    if how in SAVE_AS:
        torch.save(tensors, path, **SAVE_AS[how])
    else:
        save_file(tensors, path, metadata={"a": "b"})
        assert open_weights(path).metadata == {"a": "b"}
    found = read(path)
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        # as bytes: torch.equal knows no fp8
        assert found[key].flatten().view(torch.uint8).tolist() == tensor.flatten().view(torch.uint8).tolist(), key


@pytest.mark.parametrize("how", SAVE_AS)
def test_views_parameters_and_shared_storages_read_as_torch_reads_them(how: str, tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    state = {
        "whole": base,
        "transposed": base.t(),
        "row": base[2],
        "column": base[:, 3],
        "every_second": base[::2, 1::3],
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "one": base[:1, :1].expand(1, 1),
    }
    path = tmp_path / how
    torch.save(OrderedDict(state), path, **SAVE_AS[how])
    theirs = torch.load(path, weights_only=how != "zip5.bin")  # which reads no protocol 5
    assert_equal(read(path), {key: tensor.detach() for key, tensor in theirs.items()})


@contextmanager
def module(name: str, **members: Any) -> Iterator[types.ModuleType]:
    """A module that exists while a file is written, and no more when it is read."""
    packages = [name[: index or None] for index in (*(i for i, c in enumerate(name) if c == "."), 0)]
    made = types.ModuleType(name)
    for key, value in members.items():
        value.__module__ = name
        setattr(made, key, value)
    for package in packages:
        sys.modules[package] = made if package == name else types.ModuleType(package)
    try:
        yield made
    finally:
        for package in packages:
            del sys.modules[package]


@pytest.mark.parametrize("how", SAVE_AS)
def test_a_lightning_checkpoint_reads_bit_equal(how: str, tmp_path: Path) -> None:
    """What Stable Diffusion's own .ckpt files hold beside the tensors: callbacks by class, loops, numbers of numpy."""
    import argparse

    import numpy as np

    class ModelCheckpoint:
        def __init__(self) -> None:
            self.best = torch.ones(2)

    class DictConfig(dict[str, Any]):
        pass

    state = ldm_state_dict(TINY)
    path = tmp_path / how
    with (
        module("pytorch_lightning.callbacks.model_checkpoint", ModelCheckpoint=ModelCheckpoint),
        module("omegaconf.dictconfig", DictConfig=DictConfig),
    ):
        ModelCheckpoint.__qualname__, DictConfig.__qualname__ = "ModelCheckpoint", "DictConfig"
        saved = {
            "epoch": 3,
            "callbacks": {ModelCheckpoint: {"best_model_score": np.float64(0.1), "path": Path("a/b")}},
            "objects": [ModelCheckpoint(), DictConfig(a=1), argparse.Namespace(lr=1e-4), np.arange(3)],
            "optimizer_states": [{"state": defaultdict(dict, {0: {"exp_avg": torch.zeros(5)}}), "seen": {1, 2}}],
            "hyper_parameters": {"betas": (0.9, 0.99), "size": torch.Size([1]), "dtype": torch.bfloat16},
            "state_dict": OrderedDict({f"first_stage_model.{key}": value for key, value in state.items()}),
        }
        torch.save(saved, path, **SAVE_AS[how])
    with recorded() as events:
        found = read(path)
    assert events == []
    assert_equal({key.removeprefix("first_stage_model."): value for key, value in found.items()}, state)


@pytest.mark.parametrize("how", ["zip.ckpt", "legacy.ckpt"])
def test_bookkeeping_of_any_trainer_is_passed_over(how: str, tmp_path: Path) -> None:
    """Classes of packages that sdvae has never heard of, beside tensors: they are never made, and nothing is lost."""
    import datetime

    import numpy as np

    class Schedule:
        pass

    class Logger:
        def __reduce__(self) -> Any:
            return Schedule, ()

    state, path = ldm_state_dict(TINY), tmp_path / how
    with module("somebodys.trainer", Schedule=Schedule, Logger=Logger):
        Schedule.__qualname__, Logger.__qualname__ = "Schedule", "Logger"
        schedule = Schedule()
        schedule.__dict__.update(last=np.float32(3.0), ema=torch.ones(2))
        saved = {
            "hparams": types.SimpleNamespace(lr=1e-4, begun=datetime.datetime(2024, 1, 1)),
            "schedule": schedule, "logger": Logger(), "epoch": np.int64(3), "rng": np.arange(5),
            "size": torch.Size([2]),
            "device": torch.device("cpu"),
        }  # fmt: skip
        torch.save(saved | {"state_dict": state}, path, **SAVE_AS[how])
        torch.save(saved | state, tmp_path / f"flat-{how}", **SAVE_AS[how])
    with recorded() as events:
        assert_equal(read(path), state)
        assert_equal(read(tmp_path / f"flat-{how}"), state)
    assert events == []


def test_tensors_that_only_unknown_code_can_make_are_refused(tmp_path: Path) -> None:
    class Packed:
        def __reduce__(self) -> Any:
            return unpack, (torch.ones(2), 3)

    def unpack(*parts: Any) -> None:
        pass

    with module("somebodys.quantiser", unpack=unpack):
        unpack.__qualname__ = "unpack"
        torch.save(ldm_state_dict(TINY) | {"decoder.extra.weight": Packed()}, tmp_path / "model.ckpt")
    refuses(tmp_path / "model.ckpt", UnsafeFileError, "is refused: it asks for 'somebodys.quantiser'.'unpack'")


def test_metadata_may_hold_pictures(tmp_path: Path) -> None:
    save_file(
        every_dtype(), tmp_path / "a.safetensors", {"modelspec.thumbnail": "data:image/png;base64," + "A" * 20_000_000}
    )
    assert open_weights(tmp_path / "a.safetensors").entries.keys() == every_dtype().keys()


def test_only_the_tensors_asked_for_are_read(tmp_path: Path) -> None:
    tensors = {"big": torch.zeros(100 * MIB, dtype=torch.uint8), "small": torch.arange(5.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "b.ckpt")
    torch.save(tensors, tmp_path / "c.ckpt", _use_new_zipfile_serialization=False)
    del tensors
    for name in ("a.safetensors", "b.ckpt", "c.ckpt"):
        with peak_rss() as peak_bytes:
            small = open_weights(tmp_path / name).entries["small"].read()
        assert small.tolist() == [0, 1, 2, 3, 4]
        assert peak_bytes() < 32 * MIB, name
    with peak_rss() as peak_bytes:  # the control: the meter sees what is read
        open_weights(tmp_path / "c.ckpt").entries["big"].read()
    assert peak_bytes() > 90 * MIB


def test_shards_read_as_one(tmp_path: Path) -> None:
    for container in ("safetensors", "bin"):
        tensors = every_dtype()
        halves = dict(list(tensors.items())[:5]), dict(list(tensors.items())[5:])
        names = [f"model-0000{i + 1}-of-00002.{container}" for i in range(2)]
        for half, name in zip(halves, names, strict=True):
            save_file(half, tmp_path / name) if container == "safetensors" else torch.save(half, tmp_path / name)
        weight_map = {key: name for half, name in zip(halves, names, strict=True) for key in half}
        index = tmp_path / f"model.{container}.index.json"
        index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
        assert read(index).keys() == tensors.keys()


# --- Hostile and broken files ---

_EVENTS: list[str] | None = None
_DANGEROUS = (
    "pickle.find_class", "exec", "compile", "import", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn",
    "subprocess.Popen", "socket.connect", "ctypes.dlopen", "os.remove", "os.rename",
)  # fmt: skip


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _EVENTS is not None and event in _DANGEROUS:
        _EVENTS.append(f"{event} {arguments!r:.80}")


@contextmanager
def recorded() -> Iterator[list[str]]:
    """What Python did meanwhile that a reader of weights has no business doing."""
    global _EVENTS
    if not getattr(sys, "_sdvae_audited", False):
        sys.addaudithook(_audit)
        sys._sdvae_audited = True  # type: ignore[attr-defined]  # hooks stay for good: one is enough
    for codec in ("cp437", "raw_unicode_escape"):  # zip names and old pickles: loaded when first used
        codecs.lookup(codec)
    _EVENTS = found = []
    try:
        yield found
    finally:
        _EVENTS = None


_give_back_memory = getattr(ctypes.CDLL(None), "malloc_trim", lambda keep: None)  # glibc's


@contextmanager
def peak_rss() -> Iterator[Callable[[], int]]:
    """How far resident memory rose above where it began."""

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from Linux' /proc")
    gc.collect()
    _give_back_memory(0)  # or what earlier tests freed would be taken again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    yield lambda: status("VmHWM") - before


class Reduce:
    """Pickles to a call."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.call


def call(module_name: str, name: str, *arguments: str, opcode: bytes = b"c") -> bytes:
    """A pickle that calls by name, without the module at hand: GLOBAL, STACK_GLOBAL, INST or OBJ."""
    texts = b"".join(b"X" + struct.pack("<I", len(text)) + text.encode() for text in arguments)
    where = f"{module_name}\n{name}\n".encode()
    match opcode:
        case b"c":
            body = b"c" + where + b"(" + texts + b"tR"
        case b"i":
            body = b"(" + texts + b"i" + where
        case b"o":
            body = b"(c" + where + texts + b"o"
        case _:
            pushed = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module_name, name))
            body = pushed + b"\x93(" + texts + b"tR"
    return b"\x80\x04" + body + b"."


CANARY = "canary-was-here"
TOUCH = f"touch {CANARY}"
ROUTES: dict[str, bytes] = {
    "os.system": pickle.dumps(Reduce(os.system, TOUCH)),
    "posix by INST": call("posix", "system", TOUCH, opcode=b"i"),
    "popen by OBJ": call("os", "popen", TOUCH, opcode=b"o"),
    "eval by STACK_GLOBAL": call("builtins", "eval", f"open('{CANARY}', 'w').close()", opcode=b"\x93"),
    "exec": pickle.dumps(Reduce(exec, f"open('{CANARY}', 'w').close()")),
    "old __builtin__": call("__builtin__", "eval", f"open('{CANARY}', 'w').close()"),
    "getattr": call("builtins", "getattr", "os", "system"),
    "importlib": call("importlib", "import_module", "antigravity"),
    "runpy": call("runpy", "run_path", CANARY),
    "numpy's runstring": call("numpy.testing._private.utils", "runstring", f"open('{CANARY}', 'w').close()"),
    "nested pickle": pickle.dumps(Reduce(pickle.loads, pickle.dumps(Reduce(os.system, TOUCH)))),
    "torch.load": call("torch.serialization", "load", CANARY),
    "torch.hub": call("torch.hub", "load", "owner/name"),
    "a dotted name": call("torch", "serialization.os.system", TOUCH, opcode=b"\x93"),
    "storage's loader": call("torch.storage", "_load_from_bytes", TOUCH),
    "a whole module": call("ldm.models.autoencoder", "AutoencoderKL"),
    "state of an unknown object": pickle.dumps({"state_dict": Reduce(Path.home, state={"a": 1})}),
    "code beside tensors": pickle.dumps({"epoch": 1, "hook": Reduce(os.system, TOUCH)}),
}


def in_zip(data: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in ({"version": b"3\n"} | records).items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def in_legacy(data: bytes) -> bytes:
    return b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {})) + data + pickle.dumps([], 2)


@pytest.mark.parametrize("container", ["bare", "zip", "legacy"])
@pytest.mark.parametrize("route", ROUTES)
def test_no_route_runs_code(route: str, container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.ckpt"
    path.write_bytes({"bare": bytes, "zip": in_zip, "legacy": in_legacy}[container](ROUTES[route]))
    refuses(path, UnsafeFileError, "is refused: it asks for ")
    assert not (tmp_path / CANARY).exists()


def test_the_routes_would_run_code_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: canary and audit hook see what they are to see."""
    monkeypatch.chdir(tmp_path)
    for route in ("os.system", "posix by INST", "eval by STACK_GLOBAL", "exec", "nested pickle"):
        with recorded() as events:
            pickle.loads(ROUTES[route])
        assert (tmp_path / CANARY).exists(), route
        assert any(event.startswith("pickle.find_class") for event in events)
        (tmp_path / CANARY).unlink()


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def described(**tensors: tuple[str, list[int], list[int]]) -> dict[str, Any]:
    return {key: dict(zip(("dtype", "shape", "data_offsets"), value, strict=True)) for key, value in tensors.items()}


def saved(how: str = "zip.ckpt") -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(300.0)}, buffer, **SAVE_AS[how])
    return buffer.getvalue()


def rebuilt(shape: str = "(I1\nt", stride: str = "(I1\nt", offset: str = "I0\n", count: str = "I4\n") -> bytes:
    """A pickle of {"a": tensor} over the storage "0", with numbers of one's own."""
    tensor = (
        "}Va\nctorch._utils\n_rebuild_tensor_v2\n(((Vstorage\nctorch\nFloatStorage\nV0\nVcpu\n"
        f"{count}tQ{offset}{shape}{stride}I00\nccollections\nOrderedDict\n)RtRs."
    ).replace("(((", "((")
    return b"\x80\x02" + tensor.encode()


F4 = ("F32", [1], [0, 4])
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "seven bytes": (b"1234567", "text file"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "a web page": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
    "an indented web page": (b"\n\n   <html>", "web page"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(60), "gzip"),
    "noise": (bytes(range(128, 256)) * 9, "not a readable safetensors file"),
    "zeros": (bytes(4096), "not a readable safetensors file"),
    "tar of torch 0.1": (b"storages" + bytes(504), "not a readable safetensors file"),
    "header longer than the file": (safetensors(described(a=F4), bytes(4), length=1 << 40), "header should have"),
    "header of 20 MB": (safetensors(b"{" + b" " * (20 * MIB)), "unreadable header"),
    "header of a million lists": (safetensors(b'{"a":[' + b"[]," * MIB + b"[]]}"), "more parts than any model needs"),
    "a shape of a thousand axes": (safetensors(described(a=("F32", [1] * 1000, [0, 4])), bytes(4)), "contradict"),
    "header cut off": (safetensors(described(a=F4), bytes(4))[:40], "header should have"),
    "header not JSON": (safetensors(b"{'a': 1}"), "unreadable header"),
    "header of nested lists": (safetensors(b'{"a":' + b"[" * 200_000), "unreadable header"),
    "header not UTF-8": (safetensors(b'{"\xff": 1}'), "unreadable header"),
    "a name twice": (safetensors(b'{"a":1,"a":2}'), "a name occurs twice"),
    "metadata of numbers": (safetensors({"__metadata__": {"a": 1}}), "not strings"),
    "no dtype": (safetensors({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)), "describe a fully"),
    "a list for a tensor": (safetensors({"a": []}), "describe a fully"),
    "shape of text": (safetensors(described(a=("F32", ["1"], [0, 4])), bytes(4)), "contradict"),  # type: ignore[list-item]
    "negative shape": (safetensors(described(a=("F32", [-1, -1], [0, 4])), bytes(4)), "contradict"),
    "shape larger than its bytes": (safetensors(described(a=("F32", [2], [0, 4])), bytes(4)), "contradict"),
    "shape beyond 64 bits": (safetensors(described(a=("F32", [1 << 40, 1 << 40], [0, 4])), bytes(4)), "contradict"),
    "end before begin": (safetensors(described(a=("X9", [1], [4, 0])), bytes(4)), "contradict"),
    "tensors overlap": (safetensors(described(a=F4, b=("F32", [1], [2, 6])), bytes(6)), "does not begin where"),
    "two tensors in one place": (safetensors(described(a=F4, b=F4), bytes(4)), "does not begin where"),
    "a hole": (safetensors(described(a=F4, b=("F32", [1], [8, 12])), bytes(12)), "does not begin where"),
    "data cut off": (safetensors(described(a=("F32", [9], [0, 36])), bytes(20)), "is truncated"),
    "bytes behind": (safetensors(described(a=F4), bytes(99)), "belong to no tensor"),
    "zip cut off": (saved()[:-40], "damaged or truncated"),
    "zip of photos": (in_zip(b"").replace(b"data.pkl", b"data.jpg"), "not one of torch.save"),
    "zip of a torn pickle": (in_zip(b"\x80\x02}q"), "damaged or foreign pickle"),
    "zip bomb": (in_zip(bytes(50 * MIB), zipfile.ZIP_DEFLATED), "compresses nothing"),
    "bomb beside a good pickle": (
        in_zip(rebuilt(), zipfile.ZIP_DEFLATED, **{"data/0": bytes(90 * MIB)}),
        "compresses nothing",
    ),
    "big-endian": (in_zip(rebuilt(), byteorder=b"big", **{"data/0": bytes(16)}), "big-endian"),
    "storage absent": (in_zip(rebuilt()), "cannot be found"),
    "tensor beyond its storage": (
        in_zip(rebuilt("(I4\nt", offset="I1\n"), **{"data/0": bytes(16)}),
        "reaches out of its storage",
    ),
    "negative offset": (in_zip(rebuilt(offset="I-4\n"), **{"data/0": bytes(16)}), "impossible shape"),
    "expanded to terabytes": (
        in_zip(rebuilt("(I1000000\nI1000000\nt", "(I0\nI0\nt"), **{"data/0": bytes(16)}),
        "reaches out of its storage",
    ),
    "strides for another shape": (in_zip(rebuilt("(I1\nI1\nt"), **{"data/0": bytes(16)}), "impossible shape"),
    "no tensors": (in_zip(pickle.dumps({"epoch": 1}, 2)), "no tensors by name"),
    "a list": (in_zip(pickle.dumps([1, 2], 2)), "no tensors by name"),
    "legacy cut off": (saved("legacy.ckpt")[:-100], "truncated"),
    "legacy without storages": (saved("legacy.ckpt")[:-1300], "damaged"),
    "a pickle of a million steps": (b"\x80\x02" + b"]" * MIB + b".", "damaged or foreign pickle"),
    "any pickle": (pickle.dumps({"a": 1}), "not one of torch.save"),
    "a memo of 16 GB": (b"\x80\x02]r\xff\xff\xff\x7f.", "not one of torch.save"),
    "an extension code": (b"\x80\x02\x82\x01.", "torch.save does not write EXT1"),
    "ends without STOP": (b"\x80\x02]", "damaged or foreign pickle"),
    "a string longer than the file": (
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 50) + b"x.",
        "damaged or foreign pickle",
    ),
    "a deep tuple as a key": (in_zip(b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"Ns."), "no tensors by name"),
}


def refuses(path: Path, error: type[WeightsError], says: str, **arguments: Any) -> None:
    """`load_weights` refuses in one sentence, in little time and memory, and runs nothing."""
    with recorded() as events, peak_rss() as peak_bytes, pytest.raises(error) as caught:
        start = time.process_time()
        load_weights(path, **arguments)
    assert time.process_time() - start < 5  # of this process; no clock on the wall
    assert peak_bytes() < 64 * MIB
    assert events == []
    message = str(caught.value)
    assert type(caught.value) is error
    assert says in message
    assert str(path.parent) in message
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_sentence(name: str, tmp_path: Path) -> None:
    content, says = BROKEN[name]
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    refuses(path, WeightsError, says)
    assert path.read_bytes() == content


def test_a_pickle_under_a_safe_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for content in (saved(), saved("legacy.ckpt"), ROUTES["os.system"]):
        path.write_bytes(content)
        refuses(path, UnsafeFileError, "is a pickle, which can run code")


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(in_zip(rebuilt(), **{"constants.pkl": pickle.dumps(()), "data/0": bytes(16)}))
    refuses(path, UnsafeFileError, "TorchScript program")


def test_the_hand_made_tensor_is_sound_but_for_what_the_tests_spoil(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(in_zip(rebuilt("(I2\nt", offset="I2\n"), **{"data/0": struct.pack("<4f", 1, 2, 3, 4)}))
    assert_equal(read(path), {"a": torch.tensor([3.0, 4.0])})


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"weight_map": {"a": "../secret.safetensors"}}, "no weights file beside it"),
        ({"weight_map": {"a": "/etc/passwd.bin"}}, "no weights file beside it"),
        ({"weight_map": {"a": "..\\secret.safetensors"}}, "no weights file beside it"),
        ({"weight_map": {"a": "config.json"}}, "no weights file beside it"),
        ({"weight_map": {"a": 7}}, "no weights file beside it"),
        ({"weight_map": {"a": "absent.safetensors"}}, "does not exist"),
        ({"weight_map": {"b": "one.safetensors"}}, "does not hold it"),
        ({"weight_map": []}, "no weight_map"),
        ({}, "no weight_map"),
        ([], "no JSON object"),
    ],
)
def test_a_hostile_index_is_refused(index: Any, says: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, folder / "one.safetensors")
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index))
    refuses(folder, WeightsError, says)


def test_sound_files_with_wrong_contents_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = ldm_state_dict(TINY)
    for spoiled, says in (
        ({"conv_in.weight": torch.zeros(4), "down_blocks.0.resnets.0.conv1.weight": torch.zeros(4)}, "holds no KL-VAE"),
        ({key: value for key, value in tensors.items() if key.startswith("decoder")}, "half a VAE"),
        (tensors | {"encoder.mid.block_2.conv2.weight": torch.zeros(0, 7)}, "empty tensors"),
        (tensors | {"decoder.conv_in.weight": torch.zeros(16)}, "half a VAE"),
        (tensors | {"bn.weight": torch.zeros(16)}, "a KL-VAE does not have: bn.weight"),
    ):
        save_file(spoiled, path)
        refuses(path, WeightsError, says)
    save_file(tensors, path)
    refuses(path, WeightsError, "do not fit their family sd1", family="sd1")


@pytest.mark.parametrize(
    ("content", "exit_code"),
    [(in_zip(ROUTES["os.system"]), 4), (BROKEN["zip bomb"][0], 1), (BROKEN["a web page"][0], 1)],
)
def test_the_command_line_refuses(content: bytes, exit_code: int, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    done = CliRunner().invoke(cli, ["sample", "--vae", str(path), "-o", str(tmp_path / "out.png")], prog_name="sdvae")
    assert done.exit_code == exit_code
    assert done.stderr.startswith(f"sdvae: {path} is ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out.png").exists()
