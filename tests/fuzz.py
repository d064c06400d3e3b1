"""Damaged and hostile files for each parser of strangers' data. By hand: python -m tests.fuzz 20000

Whatever comes, a parser gives a value or an SdvaeError of one line; by hand, also in time and memory.
"""

import io
import json
import logging
import pickle
import pickletools
import random
import resource
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms
from safetensors.torch import save

from sdvae.config import FAMILIES, VAEConfig, read_config
from sdvae.errors import ImageError, SdvaeError, WeightsError
from sdvae.images.formats import FORMATS
from sdvae.images.provenance import Provenance, read_facts
from sdvae.images.read import read_image, read_size
from sdvae.reading.latent_files import read_latents
from sdvae.weights.beside import read_beside
from sdvae.weights.files import open_weights
from sdvae.weights.keymap import VAEKeys, find_vae

MAX_SECONDS, MAX_GROWTH_BYTES = 5, 200 << 20
_NUMBERS = [
    b"\0",
    b"\xff",
    b"\x80",
    b"\xff\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    struct.pack("<Q", 1 << 62),
    b"-1",
    b"1e9",
]
_ODD: list[Any] = [
    None, True, False, -1, 0, 1, 2**31, 2**63, 10**400, 1e300, float("nan"), float("inf"), "", "x", "\ud800", "\0",
    [], {}, [[]], [None], ["a", 1], {"a": {}}, "F32", "BF16", [4, 4], "../../etc/passwd",
]  # fmt: skip
_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
_LATENTS = torch.arange(64.0).view(1, 4, 4, 4) / 64


def _tensors() -> dict[str, torch.Tensor]:
    half = torch.arange(6).half().view(2, 3)
    return {"encoder.conv_in.weight": _LATENTS, "b": half.t(), "c": half[1:], "latents": _LATENTS.clone()}


def _torch(legacy: bool, value: Any = None) -> bytes:
    buffer = io.BytesIO()
    torch.save(_tensors() if value is None else value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def _numpy(packed: str = "") -> bytes:
    buffer = io.BytesIO()
    if packed:
        arrays = {"latents": _LATENTS[0].numpy(), "crop_ltrb": np.arange(4)}
        (np.savez if packed == "npz" else np.savez_compressed)(buffer, allow_pickle=False, **arrays)
    else:
        np.save(buffer, _LATENTS.numpy())
    return buffer.getvalue()


def _photo(format: str, draw: random.Random) -> bytes:
    """A photo of noise with EXIF and a colour profile where the format holds them, in a mode that it writes."""
    modes = {"JPEG": ["RGB", "L", "CMYK"], "BMP": ["RGB", "L", "P"], "PPM": ["RGB", "L"]}
    mode = draw.choice(modes.get(format, ["RGB", "L", "RGBA"]))
    image = Image.frombytes("RGB", (24, 17), draw.randbytes(24 * 17 * 3)).convert(mode)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = draw.randint(1, 8)
    options: dict[str, Any] = {}
    if format in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
        options = {"exif": exif.tobytes(), "icc_profile": _PROFILE if mode in ("RGB", "RGBA") else None}
    if format == "TIFF":
        options["compression"] = draw.choice([None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
    if format == "JPEG":
        options["progressive"] = draw.random() < 0.5
    if format in ("JPEG", "WEBP"):
        options["xmp"] = Provenance("ab" * 32, "sd1").to_xmp().encode()
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


# --- What is done to a sound file ---


def damage(data: bytes, draw: random.Random) -> bytes:
    """Bytes flipped, cut, doubled, moved or replaced, mostly near the beginning, where headers are."""
    damaged = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 4, 16])):
        end = max(1, min(len(damaged), draw.choice([16, 200, 1000, len(damaged) or 1])))
        start, stop = sorted((draw.randrange(end), draw.randrange(end)))
        match draw.randrange(6):
            case 0 if damaged:
                damaged[start] ^= 1 << draw.randrange(8)
            case 1:
                del damaged[start : start + draw.choice([1, 4, 100])]
            case 2:
                damaged[start:start] = damaged[start:stop]
            case 3:
                damaged[start : start + len(number)] = (number := draw.choice(_NUMBERS))
            case 4:
                damaged[start:start] = draw.randbytes(draw.choice([1, 4, 40]))
            case 5 if draw.random() < 0.2:
                del damaged[stop:]
    return bytes(damaged)


def alter(value: Any, draw: random.Random) -> Any:
    """A JSON value with some of its parts replaced by odd ones, removed or added."""
    if draw.random() < 0.08:
        return draw.choice(_ODD)
    if isinstance(value, dict):
        altered = {key: alter(member, draw) for key, member in value.items() if draw.random() > 0.02}
        return altered | ({draw.choice(["a", "", "\ud800", *value]): draw.choice(_ODD)} if draw.random() < 0.1 else {})
    if isinstance(value, list):
        return [alter(member, draw) for member in value] * draw.choice([1, 1, 1, 2])
    return value


def _odd_json(value: Any, draw: random.Random) -> bytes:
    text = json.dumps(alter(value, draw)).encode()
    if draw.random() < 0.05:
        text = draw.choice([b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"", b"9" * 5000, b"[" * 2_000_000])
    return damage(text, draw) if draw.random() < 0.2 else text


def _odd_safetensors(draw: random.Random) -> bytes:
    tensors = {key: tensor.contiguous().clone() for key, tensor in _tensors().items()}
    whole = save(tensors, metadata={"format": "pt"} | draw.choice([{}, {"latents": "raw"}]))
    if draw.random() < 0.5:
        return damage(whole, draw)
    (length,) = struct.unpack("<Q", whole[:8])
    header = _odd_json(json.loads(whole[8 : 8 + length]), draw)
    return struct.pack("<Q", len(header)) + header + whole[8 + length :]


_GLOBALS = (
    "os system", "posix system", "builtins eval", "builtins dict", "collections OrderedDict", "torch FloatStorage",
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch._tensor _rebuild_from_type_v2",
    "numpy._core.multiarray scalar", "torch.nn Linear", "a.b C", "torch float16",
)  # fmt: skip


def odd_pickle(draw: random.Random) -> bytes:
    """Opcodes in any order, or a sound pickle with some of them put in, left out or repeated."""
    if draw.random() < 0.5:
        steps = [_opcode(draw) for _ in range(draw.randrange(60))]
    else:
        with zipfile.ZipFile(io.BytesIO(_torch(legacy=False))) as archive:
            sound = archive.read("archive/data.pkl")
        places = [place for _, _, place in pickletools.genops(sound) if place is not None]
        steps = [sound[a:b] for a, b in pairwise(places)]
        for _ in range(draw.choice([1, 2, 8])):
            place = draw.randrange(len(steps))
            match draw.randrange(3):
                case 0:
                    del steps[place]
                case 1:
                    steps.insert(place, _opcode(draw))
                case 2:
                    steps[place:place] = steps[place : place + draw.choice([1, 10])] * draw.choice([1, 2, 50])
    return b"\x80\x02" + b"".join(steps) + b"."


def _opcode(draw: random.Random) -> bytes:
    opcode = draw.choice(pickletools.opcodes)
    code = opcode.code.encode("latin-1")
    if opcode.name in ("GLOBAL", "INST"):
        return code + draw.choice(_GLOBALS).replace(" ", "\n").encode() + b"\n"
    if opcode.name in ("BINGET", "BINPUT"):
        return code + bytes([draw.randrange(8)])
    if opcode.arg is None:
        return code
    if opcode.arg.n == pickletools.UP_TO_NEWLINE:
        return code + draw.choice([b"1", b"-5", b"'a'", b"x", b"9" * 5000]) + b"\n"
    if opcode.arg.n < 0:  # a length, then so many bytes
        width = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT8U: 8}.get(opcode.arg.n, 4)
        content = draw.choice([b"", b"a", b"storage", b"\xff" * 9, bytes(300_000)])[: 255 if width == 1 else None]
        return code + len(content).to_bytes(width, "little") + content
    return code + draw.randbytes(opcode.arg.n)


def _odd_photo(format: str, draw: random.Random) -> bytes:
    return damage(_photo(format, draw), draw)


def _odd_zip(draw: random.Random) -> bytes:
    sound = _torch(legacy=False, value=_LATENTS if draw.random() < 0.2 else None)
    if draw.random() < 0.5:
        return damage(sound, draw)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(sound)) as before, zipfile.ZipFile(buffer, "w") as after:
        for name in before.namelist():
            after.writestr(name, odd_pickle(draw) if name == "archive/data.pkl" else before.read(name))
    return buffer.getvalue()


def _odd_legacy(draw: random.Random) -> bytes:
    if draw.random() < 0.5:
        return damage(_torch(legacy=True), draw)
    parts = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    parts += [odd_pickle(draw), pickle.dumps(["0"], 2), struct.pack("<q", 64), _LATENTS.numpy().tobytes()]
    if draw.random() < 0.2:
        parts[draw.randrange(len(parts))] = odd_pickle(draw)
    return b"".join(parts)


# --- The parsers ---


def _read_weights(path: Path) -> None:
    file = open_weights(path)
    for entry in file.entries.values():
        entry.read()
    with suppress(WeightsError):
        find_vae(file.entries)


def _read_latents(path: Path) -> None:
    read_latents(path, VAEConfig(), "raw")


def _read_ldm_config(path: Path) -> None:
    read_beside(path.with_suffix(".ckpt"), VAEKeys("", "ldm", {}), {})


def _read_photo(path: Path) -> None:
    with suppress(ImageError):
        read_size(path)
    with suppress(ImageError):
        assert all(text.isprintable() for item in read_facts(path).texts.items() for text in item)
    read_image(path, max_pixels=2**22)


_INDEX = {"metadata": {"total_size": 1}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.bin"}}
_CONFIG = FAMILIES["kl-f16"].to_diffusers() | {"latents_mean": [0.5] * 16, "shift_factor": 0.1}
_LDM_CONFIG = b"""
model:
  params: {scale_factor: 0.18215, linear_start: 0.00085, unet_config: {params: {attention: &a [4, 2, 1], again: *a}}}
  first_stage_config:
    embed_dim: 4
    lossconfig: {target: torch.nn.Identity}
    ddconfig:
      double_z: true
      z_channels: 4
      resolution: 256
      in_channels: 3
      out_ch: 3
      ch: 128
      ch_mult: [1, 2, 4, 4]
      num_res_blocks: 2
      attn_resolutions: []
      dropout: 0.0
"""
PARSERS: dict[str, tuple[str, Callable[[random.Random], bytes], Callable[[Path], object]]] = {
    "safetensors": ("a.safetensors", _odd_safetensors, _read_weights),
    "zip of torch": ("a.ckpt", _odd_zip, _read_weights),
    "legacy torch": ("b.ckpt", _odd_legacy, _read_weights),
    "bare pickle": ("c.ckpt", odd_pickle, _read_weights),
    "sharded index": ("a.safetensors.index.json", lambda draw: _odd_json(_INDEX, draw), _read_weights),
    "config.json": ("config.json", lambda draw: _odd_json(_CONFIG, draw), read_config),
    "LDM's config": ("kl.yaml", lambda draw: damage(_LDM_CONFIG, draw), _read_ldm_config),
    "npy": ("a.npy", lambda draw: damage(_numpy(), draw), _read_latents),
    "npz": ("a.npz", lambda draw: damage(_numpy(draw.choice(["npz", "packed"])), draw), _read_latents),
    "latents of torch": ("a.pt", _odd_zip, _read_latents),
    "latents in safetensors": ("a.latent", _odd_safetensors, _read_latents),
    **{name: (f"a.{name.lower()}", partial(_odd_photo, name), _read_photo) for name in FORMATS},
}


def fuzz(name: str, count: int, folder: Path, *, seed: int = 0, is_timed: bool = False) -> Counter[str]:
    """Feed `count` odd files to a parser; returns how often it read one, or refused it with which error."""
    file_name, make, parse = PARSERS[name]
    path, found = folder / file_name, Counter[str]()
    (folder / "model-1.safetensors").write_bytes(save({"a": torch.zeros(2)}))
    (folder / "model-2.bin").write_bytes(_torch(legacy=False, value={"b": torch.zeros(2)}))
    for number in range(count):
        data = make(random.Random(f"{seed} {name} {number}"))
        path.write_bytes(data)
        begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            parse(path)
        except SdvaeError as error:
            assert "\n" not in str(error) and len(str(error)) < 1500, (name, number, str(error)[:2000])
            found[type(error).__name__] += 1
        except Exception as error:
            error.add_note(f"{name}, input {number} of seed {seed}")
            raise
        else:
            found["read"] += 1
        if is_timed:
            assert time.perf_counter() - begun < MAX_SECONDS, (name, number)
            assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MAX_GROWTH_BYTES, (
                name,
                number,
            )
    return found


if __name__ == "__main__":
    logging.disable()
    for name in sys.argv[2:] or PARSERS:
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            found = fuzz(name, int(sys.argv[1]), Path(folder), seed=1, is_timed=True)
            peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(f"{name}: {dict(found)}, {time.perf_counter() - begun:.0f} s, peak {peak_mb:.0f} MB", flush=True)
