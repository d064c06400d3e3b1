"""What a program sets for all of torch changes no bit of what sdvae computes."""

import ast
import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from importlib.resources import as_file, files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sdvae
from sdvae.config import FAMILIES, VAEConfig
from sdvae.encoding.tasks import Work
from sdvae.latents import scale, unscale
from sdvae.reading.export import export
from sdvae.reading.stats import measure
from sdvae.store.store import Store
from sdvae.tiny import AutoencoderTiny, TinyConfig
from sdvae.vae import VAE
from sdvae.weights import probe
from sdvae.weights.identify import identify
from tests.conftest import random_model
from tests.made_stores import make_store

CPU = torch.device("cpu")
CONFIG = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)  # with attention, downscale 2
PLAYGROUND = VAEConfig(scaling_factor=0.5, latents_mean=(-1.6574, 1.886, -1.383, 2.5155), latents_std=(8.4, 6.9, 6, 4))

Operation = Callable[[Path], Any]


# --- What is set ---


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")  # for "cuda": what lands there has no bits at all
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # which fills all that is not initialised with NaN, too
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def low_matmul_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def no_onednn() -> Iterator[None]:
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = True


STATES: Mapping[str, Callable[[], AbstractContextManager[Any]]] = {
    "default dtype bf16": partial(default_dtype, torch.bfloat16),
    "default dtype fp16": partial(default_dtype, torch.float16),
    "default dtype fp64": partial(default_dtype, torch.float64),
    "default device": default_device,
    "autocast bf16": partial(torch.autocast, "cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "deterministic algorithms": deterministic_algorithms,
    "matmul precision": low_matmul_precision,
    "no oneDNN": no_onednn,
    "attention by hand": partial(sdpa_kernel, SDPBackend.MATH),
}


# --- What is done: each makes its VAE anew, so that its weights are packed under the state, too ---


@cache
def model() -> sdvae.AutoencoderKL:
    return random_model(CONFIG)


@cache
def tiny_model() -> AutoencoderTiny:
    torch.manual_seed(3)
    return AutoencoderTiny(TinyConfig(block_out_channels=(8, 8), layers_per_block=1)).eval()


@cache
def theirs() -> Any:
    vae = diffusers.AutoencoderKL.from_config(CONFIG.to_diffusers())
    vae.load_state_dict(random_model(CONFIG).state_dict())
    return vae.eval().requires_grad_(False)


PIXELS = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
LATENTS = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(2))
PHOTOS = [Image.fromarray(np.random.default_rng(number).integers(0, 256, (19, 14, 3), np.uint8)) for number in range(5)]


def vae(dtype: torch.dtype = torch.float32) -> VAE:
    return VAE(model(), CPU, dtype, "random")


def tiny(dtype: torch.dtype = torch.float32) -> VAE:
    return VAE(tiny_model(), CPU, dtype, "random TAESD")


def loads(_: Path) -> Any:
    loaded = VAE.load(device="cpu", dtype="fp32")
    return loaded.model.state_dict(), loaded.fingerprint, loaded.decode(LATENTS[:1, :, :4, :4])


def encodes_and_decodes(make: Callable[[torch.dtype], VAE], dtype: torch.dtype, _: Path) -> Any:
    made = make(dtype)
    posterior = made.encode(PIXELS)
    return posterior.mean, posterior.logvar, posterior.sample(torch.Generator().manual_seed(5)), made.decode(LATENTS)


def steps_aside(_: Path) -> Any:
    altered = copy.deepcopy(model())
    altered.get_submodule("decoder.conv_in").register_forward_hook(lambda module, inputs, out: out * 2)
    made = VAE(altered, CPU, torch.float32, "hooked")
    return made.decode(LATENTS), made.encode(PIXELS).mean


def handles_images(_: Path) -> Any:
    made = vae()
    encoded = made.encode_images(PHOTOS[:2])
    return encoded.latents, *map(
        np.asarray,
        [
            *made.decode_images(encoded),
            *made.roundtrip(PHOTOS[:1]),
            *made.sample(1, 16, 24),
            *made.interpolate(*PHOTOS[:2], steps=3),
            *made.interpolate(*PHOTOS[:2], steps=3, mode="lerp"),
        ],
    )


def scales(_: Path) -> Any:
    found = []
    for config in (CONFIG, PLAYGROUND, FAMILIES["flux1"]):
        latents = torch.cat([LATENTS] * (config.latent_channels // 4), 1)
        found += [scale(latents, config), unscale(latents, config)]
    return found


def measures_posteriors(_: Path) -> Any:
    one, two = (sdvae.DiagonalGaussian(LATENTS + shift, LATENTS - shift) for shift in (0.0, 0.5))
    return one.kl(), one.kl(two), one.nll(LATENTS), one.std, one.var


def stands_in_for_diffusers(_: Path) -> Any:
    pipe = SimpleNamespace(vae=copy.deepcopy(theirs()))
    sdvae.install(pipe)
    whole = pipe.vae.decode(LATENTS).sample, pipe.vae.encode(PIXELS).latent_dist.parameters
    pipe.vae.enable_tiling()
    return whole, pipe.vae.decode(torch.cat([LATENTS] * 8, 3)).sample


def probes(_: Path) -> Any:
    probe._SEEN.clear()  # else it runs once in a process
    probe._pixels.cache_clear()
    with as_file(files("sdvae") / "assets" / "small.safetensors") as path:
        found = identify(path)
    return found.latent_space, [str(evidence) for evidence in found.evidence]


def encodes_a_dataset(num_workers: int, out: Path) -> Any:
    preprocess = sdvae.Preprocess(size_px=16, flip=True, resizer="torch")
    settings = sdvae.EncodeSettings(preprocess, shard_rows=3, batch_rows=2, num_threads=1)
    sdvae.encode_dataset(PHOTOS, out, vae(), settings, work=Work(num_workers=num_workers, audit=1.0))
    stored = contents(out)
    statistics = json.dumps(measure(Store.open(out)).__dict__, default=str)
    sdvae.decode_dataset(out, out.with_name("decoded"), vae())
    return stored, statistics, contents(out.with_name("decoded"))


def reads_a_dataset(out: Path) -> Any:
    make_store(out, {(64, 64): 5, (64, 128): 2}, has_flips=True)
    found = []
    for options in ({}, {"sample": False}, {"preload": "ram"}):
        dataset = sdvae.LatentDataset(out, **options)
        dataset.set_epoch(1)
        found += [dataset[0], dataset[[0, 1, 2]], dataset.__getitems__([(5, 2), (6, 3)])]
    return found


def exports(form: str, out: Path) -> Any:
    make_store(out, {(64, 64): 3}, has_flips=form == "webdataset")
    export(out, form, out.with_name("exported"))
    return contents(out.with_name("exported"))


def contents(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith("journal/")}


OPERATIONS: dict[str, Operation] = {
    "load": loads,
    "fp32": partial(encodes_and_decodes, vae, torch.float32),
    "bf16": partial(encodes_and_decodes, vae, torch.bfloat16),
    "fp16": partial(encodes_and_decodes, vae, torch.float16),
    "tiny fp32": partial(encodes_and_decodes, tiny, torch.float32),
    "tiny bf16": partial(encodes_and_decodes, tiny, torch.bfloat16),
    "hooked": steps_aside,
    "images": handles_images,
    "scaling": scales,
    "posterior": measures_posteriors,
    "drop-in": stands_in_for_diffusers,
    "probe": probes,
    "dataset": reads_a_dataset,
    "encode a dataset": partial(encodes_a_dataset, 0),
    "encode by processes": partial(encodes_a_dataset, 1),
    "export for fast-DiT": partial(exports, "fast-dit"),
    "export WebDataset": partial(exports, "webdataset"),
}
# Diffusers' modules obey autocast, and so does what stands in for them (test_integration_diffusers.py).
BY_DESIGN = {("autocast bf16", "drop-in")}
SLOW = {(state, "encode by processes") for state in STATES if not state.startswith(("default d", "autocast"))}
PAIRS = sorted({(state, operation) for state in STATES for operation in OPERATIONS} - BY_DESIGN - SLOW)


def bits(value: Any) -> Any:
    """What two results must agree in."""
    if isinstance(value, Tensor):
        dense = value.detach().contiguous()
        return (
            str(value.dtype),
            str(value.device),
            tuple(value.shape),
            dense.view(-1).view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: bits(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [bits(inner) for inner in value]
    return value


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    @cache
    def run(operation: str) -> Any:
        return bits(OPERATIONS[operation](tmp_path_factory.mktemp("plain") / "out"))

    return run


@pytest.mark.parametrize(("state", "operation"), PAIRS)
def test_no_bit_depends_on(state: str, operation: str, plain: Callable[[str], Any], tmp_path: Path) -> None:
    expected = plain(operation)
    with STATES[state]():
        found = OPERATIONS[operation](tmp_path / "out")
    assert bits(found) == expected


@pytest.mark.parametrize("make", [vae, tiny])
def test_a_vae_loaded_and_packed_in_inference_mode_runs_and_trains_outside(make: Callable[[], VAE]) -> None:
    expected = make().decode(LATENTS)
    with torch.inference_mode():
        made = make()
        first = made.decode(LATENTS)
    assert torch.equal(first, expected) and torch.equal(made.decode(LATENTS), expected)
    assert not first.is_inference()
    with torch.inference_mode():
        loaded = VAE.load(device="cpu", dtype="fp32")
    loaded.model.train()
    loaded.model.decode(LATENTS[:1, :, :4, :4]).square().mean().backward()
    assert all(parameter.grad is not None for parameter in loaded.model.decoder.parameters())


def test_a_dataset_opened_in_inference_mode_changes_its_epoch_outside(tmp_path: Path) -> None:
    make_store(tmp_path, {(64, 64): 2})
    with torch.inference_mode():
        dataset = sdvae.LatentDataset(tmp_path)
    dataset.set_epoch(1)
    assert torch.equal(dataset[0]["latents"], dataset[0, 1]["latents"])


# What makes a tensor out of nothing takes dtype and device from globals where it is not told.
_FACTORIES = {
    "zeros", "ones", "empty", "full", "arange", "linspace", "logspace", "eye", "tensor", "as_tensor", "asarray",
    "rand", "randn", "randint", "randperm", "normal", "scalar_tensor", "empty_strided", "hann_window",
}  # fmt: skip


def untold(source: str) -> list[str]:
    """The calls of torch's factories that leave dtype or device to the globals: line and name."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        f"{call.lineno}: {ast.unparse(call.func)}"
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and ast.unparse(call.func.value) == "torch"
        and call.func.attr in _FACTORIES
        and not {"dtype", "device"} <= {keyword.arg for keyword in call.keywords}
    ]


def test_no_tensor_is_made_without_dtype_and_device() -> None:
    assert untold("x = torch.zeros(3, dtype=torch.int64)\ny = torch.ones_like(x)") == ["1: torch.zeros"]
    package = Path(sdvae.__file__).parent
    sources = {path.relative_to(package): path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    found = {str(path): untold(code) for path, code in sources.items()}
    assert {path: calls for path, calls in found.items() if calls} == {}
