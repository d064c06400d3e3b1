import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from diffusers import AutoencoderKL as DiffusersVAE
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from sdvae.config import FAMILIES
from sdvae.engine.precision import DTYPES
from sdvae.errors import ConfigError, UnsafeFileError, WeightsError
from sdvae.images.read import read_image
from sdvae.pixels import to_pixels
from sdvae.vae import VAE
from sdvae.weights.find import CONFIG_NAME, WEIGHTS_NAMES
from sdvae.weights.identity import fingerprint, known_space
from sdvae.weights.load import build_model, empty_model, load_weights, save_folder
from tests.conftest import SMALL
from tests.test_keymap import assert_equal, ldm_state_dict, narrow, to_diffusers
from tests.test_weight_files import peak_rss


@pytest.fixture
def folder(small_vae: VAE, tmp_path: Path) -> Path:
    small_vae.save(tmp_path / "vae")
    return tmp_path / "vae"


def load(spec: object, **arguments: object) -> VAE:
    return VAE.load(spec, device="cpu", dtype="fp32", **arguments)  # type: ignore[arg-type]


def test_a_saved_folder_loads_bit_equal_here_and_in_diffusers(small_vae: VAE, folder: Path) -> None:
    ours = load(folder)
    theirs = DiffusersVAE.from_pretrained(folder)
    assert ours.fingerprint == small_vae.fingerprint == fingerprint(theirs.state_dict())
    assert ours.config == small_vae.config


def test_a_folder_that_diffusers_saved_loads(tmp_path: Path) -> None:
    theirs = DiffusersVAE.from_config(SMALL.to_diffusers())
    theirs.save_pretrained(tmp_path)
    assert load(tmp_path).fingerprint == fingerprint(theirs.state_dict())


def test_a_pipeline_folder_and_a_single_file_load(small_vae: VAE, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert load(tmp_path).fingerprint == small_vae.fingerprint
    assert load(folder / WEIGHTS_NAMES[0]).fingerprint == small_vae.fingerprint


def test_half_precision_files_load_as_fp32(folder: Path) -> None:
    path = folder / WEIGHTS_NAMES[0]
    halved = {key: value.half() for key, value in load_file(path).items()}
    path.unlink()
    save_file(halved, folder / "diffusion_pytorch_model.fp16.safetensors")
    vae = load(folder)
    assert vae.fingerprint == fingerprint(halved)
    assert next(vae.model.parameters()).dtype == torch.float32


def test_a_hub_id_is_served_from_the_cache_offline(
    small_vae: VAE, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    shutil.copytree(folder, repository / "snapshots" / "abc" / "vae")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load("org/name").fingerprint == small_vae.fingerprint
    assert load("org/name/vae").fingerprint == small_vae.fingerprint
    with pytest.raises(WeightsError, match=r"org/other .* hub"):
        load("org/other")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository "org/name", served as huggingface_hub serves one: into a cache, by name, with its own errors."""
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    remote.mkdir()

    def hf_hub_download(
        repo_id: str, filename: str, *, subfolder: str | None = None, local_files_only: bool = False
    ) -> str:
        assert not local_files_only
        if repo_id != "org/name":
            raise RepositoryNotFoundError("401 Client Error.\n\nRepository Not Found", response=Mock())
        name = f"{subfolder}/{filename}" if subfolder else filename
        if not (remote / name).is_file():
            raise RemoteEntryNotFoundError(f"404 Client Error: {name}", response=Mock())
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(remote / name, cache / name)
        return str(cache / name)

    def list_repo_tree(repo_id: str, path_in_repo: str | None = None) -> Iterator[SimpleNamespace]:
        if repo_id != "org/name":
            raise RepositoryNotFoundError("401 Client Error.\n\nRepository Not Found", response=Mock())
        if not (remote / (path_in_repo or "")).is_dir():
            raise RemoteEntryNotFoundError(f"404 Client Error: {path_in_repo}", response=Mock())
        for path in (remote / (path_in_repo or "")).iterdir():
            size = {"size": path.stat().st_size} if path.is_file() else {}
            yield SimpleNamespace(path=path.relative_to(remote).as_posix(), **size)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    monkeypatch.setattr("huggingface_hub.list_repo_tree", list_repo_tree)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", Mock())
    return remote


def test_one_file_on_the_hub_loads_with_what_belongs_to_it(hub: Path, small_vae: VAE, data_dir: Path) -> None:
    small_vae.save(hub / "some" / "where")
    shutil.copytree(hub / "some" / "where", hub / "bare")
    (hub / "bare" / CONFIG_NAME).rename(hub / "bare" / "other.json")
    name = WEIGHTS_NAMES[0]
    (hub / "some" / "where" / name).rename(hub / "some" / "where" / "best.safetensors")
    vae = load("org/name/some/where/best.safetensors")
    assert (vae.fingerprint, vae.config, vae.name) == (
        small_vae.fingerprint, small_vae.config, "org/name/some/where/best.safetensors",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"no config\.json beside it"):
        load(f"org/name/bare/{name}")
    for half in ("encoder", "decoder"):
        shutil.copy(data_dir / "weights" / "taesd_bf16" / f"taesdxl_{half}.safetensors", hub)
    assert load("org/name/taesdxl_decoder.safetensors").latent_space == "sdxl"


def test_shards_on_the_hub_are_all_fetched(hub: Path, small_vae: VAE, tmp_path: Path) -> None:
    small_vae.save(hub / "vae")
    (hub / "vae" / WEIGHTS_NAMES[0]).unlink()
    DiffusersVAE.from_config(SMALL.to_diffusers()).save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    shards = list((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 1
    shutil.copytree(tmp_path / "sharded", hub / "vae", dirs_exist_ok=True)
    expected = load(tmp_path / "sharded").fingerprint
    for spec in ("org/name", "org/name/vae", f"org/name/vae/{WEIGHTS_NAMES[1]}"):
        assert load(spec).fingerprint == expected
        shutil.rmtree(tmp_path / "cache")
    (hub / "vae" / shards[0].name).unlink()
    with pytest.raises(
        WeightsError, match=f"names the shard {shards[0].name}, and the hub gave none: 404 Client Error"
    ):
        load("org/name")


@pytest.mark.parametrize(
    ("place", "name"),
    [("vae", "diffusion_pytorch_model.bf16.safetensors"), ("", "any_name.safetensors"), ("x/vae", "a.pt")],
)
def test_the_weights_of_a_repository_are_found_by_what_is_there(
    hub: Path, small_vae: VAE, place: str, name: str
) -> None:
    small_vae.save(hub / place)
    whole = hub / place / WEIGHTS_NAMES[0]
    if name.endswith(".pt"):
        torch.save(load_file(whole), hub / place / name)
        whole.unlink()
    else:
        whole.rename(hub / place / name)
    (hub / "README.md").write_text("")
    spec = f"org/name/{place.partition('/')[0]}" if "/" in place else "org/name"
    assert load(spec).fingerprint == small_vae.fingerprint
    assert load(f"org/name/{place}/{name}".replace("//", "/")).config == small_vae.config


def test_a_repository_of_several_models_gives_the_one_in_its_vae_folder(hub: Path, small_vae: VAE) -> None:
    for name in ("model.safetensors", "ae.safetensors", "model_index.json"):
        (hub / name).write_text("{}")
    small_vae.save(hub / "vae")
    assert load("org/name").fingerprint == small_vae.fingerprint
    (hub / "model_index.json").unlink()
    assert load("org/name").fingerprint == small_vae.fingerprint
    shutil.rmtree(hub / "vae")
    with pytest.raises(WeightsError, match=r"org/name holds several files of weights \(ae.safetensors, model.safeten"):
        load("org/name")
    (hub / "vae").mkdir()
    (hub / "model_index.json").write_text("{}")
    with pytest.raises(WeightsError, match="org/name holds no weights in vae; name the file: org/name/FILE"):
        load("org/name")


def test_what_the_hub_does_not_have_is_one_sentence(hub: Path) -> None:
    for spec, told in (
        ("org/name", "org/name holds no weights in vae; name the file: org/name/FILE"),
        ("org/name/a/b.safetensors", "the hub gave no VAE for it: 404 Client Error: a$"),
        ("org/name/b.safetensors", "the hub gave no VAE for it: 404 Client Error: b.safetensors$"),
        ("org/other", "org/other is no local path, and the hub refused it: 401 Client Error.$"),
        ("org/other/b.ckpt", "the hub refused it"),
    ):
        with pytest.raises(WeightsError, match=told):
            load(spec)


def test_offline_the_hub_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.socket.connect", Mock(side_effect=AssertionError("the network was asked")))
    with pytest.raises(WeightsError, match=r"the hub gave no VAE for it: .* in the local cache"):
        load("org/name/vae/model.safetensors")


def test_a_hub_that_cannot_be_reached_is_asked_once(
    folder: Path, small_vae: VAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub itself would try each name of a file for a minute."""

    class ConnectError(HfHubHTTPError.__bases__[0]):  # type: ignore[misc]  # httpx's, whichever version the hub uses
        pass

    asked = Mock(side_effect=ConnectError("[Errno -3] Temporary failure in name resolution"))
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", asked)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("socket.socket.connect", Mock(side_effect=AssertionError("the network was asked")))
    with pytest.raises(WeightsError, match=r"cannot be reached \(\[Errno -3\] Temporary failure in name resolution\)"):
        load("org/name")
    assert asked.call_count == 1
    repository = tmp_path / "hub" / "models--org--name"  # what is in the cache is still found
    shutil.copytree(folder, repository / "snapshots" / "abc" / "vae")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert load("org/name").fingerprint == small_vae.fingerprint


@pytest.mark.parametrize("how", [{"variant": "bf16"}, {"variant": "ema"}, {"variant": "fp16", "max_shard_size": "50KB"},
                                 {"safe_serialization": False, "max_shard_size": "50KB"}])  # fmt: skip
def test_a_folder_of_any_variant_is_read(tmp_path: Path, how: dict[str, Any]) -> None:
    vae = DiffusersVAE.from_config(SMALL.to_diffusers())
    vae.save_pretrained(tmp_path / "plain")
    vae.save_pretrained(tmp_path / "variant", **how)
    assert load(tmp_path / "variant").fingerprint == load(tmp_path / "plain").fingerprint


def test_the_only_file_of_weights_in_a_folder_is_meant(folder: Path, small_vae: VAE) -> None:
    path = folder / WEIGHTS_NAMES[0]
    shutil.copy(path.rename(folder / "my_vae.safetensors"), folder / "another.ckpt")
    assert load(folder).fingerprint == small_vae.fingerprint
    shutil.copy(folder / "my_vae.safetensors", folder / "other.safetensors")
    with pytest.raises(WeightsError, match=r"several files of weights \(my_vae.safetensors, other.safetensors\)"):
        load(folder)


def test_a_config_of_another_version_is_read_where_it_changes_nothing(
    folder: Path, small_vae: VAE, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / CONFIG_NAME
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"new": None, "newer": False, "double_z": True, "sample_size": None}))
    assert load(folder).config == replace(small_vae.config, sample_size=32)
    assert "fields that sdvae does not know, unused: new, newer" in caplog.text
    for name in ("scaling_factor", "latent_channels", "force_upcast", "norm_num_groups"):
        path.write_text(json.dumps(whole | {name: None}))
        with pytest.raises(
            ConfigError, match=f"{name} is (None, which no KL-VAE has|null, so nothing tells the scale)"
        ):
            load(folder)


def test_missing_and_unexpected_keys_are_named(folder: Path) -> None:
    path = folder / WEIGHTS_NAMES[0]
    tensors = load_file(path)
    del tensors["decoder.conv_in.bias"]
    tensors["quant_conv.bias"] = torch.zeros(8)
    tensors["encoder.conv_in.bias"] = torch.zeros(9)
    save_file(tensors, path)
    with pytest.raises(WeightsError) as caught:
        load(folder)
    for part in (
        "1 missing: decoder.conv_in.bias",
        "1 unexpected: quant_conv.bias",
        "encoder.conv_in.bias (9,) instead of (8,)",
    ):
        assert part in str(caught.value)
    save_file(tensors | {"decoder.extra": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match=r"1 key that a KL-VAE does not have: decoder\.extra"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "error", "told"),
    [
        (b"hello, these are no weights", WeightsError, "text file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", WeightsError, "Git LFS pointer"),
        (pickle.dumps({"a": 1}), UnsafeFileError, "pickle"),
        (b"PK\x03\x04rest of a zip", UnsafeFileError, "pickle"),
        (b"", WeightsError, "not a readable safetensors file"),
        (bytes(range(128, 256)), WeightsError, "not a readable safetensors file"),
    ],
)
def test_files_that_are_no_weights_are_told_apart(
    folder: Path, content: bytes, error: type[WeightsError], told: str
) -> None:
    path = folder / WEIGHTS_NAMES[0]
    path.write_bytes(content)
    with pytest.raises(error, match=told):
        load(folder)
    assert path.read_bytes() == content


def test_real_files_that_only_look_like_weights_are_refused(data_dir: Path, tmp_path: Path) -> None:
    for name in ("lfs_pointer.diffusion_pytorch_model.safetensors", "plain_text_named.model.pt"):
        with pytest.raises(WeightsError):
            load(data_dir / "weights" / "bad" / name, family="sd1")


def test_a_spec_that_is_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="not a folder, file or hub id"):
        load(tmp_path / "absent")
    with pytest.raises(WeightsError, match=r"holds no diffusion_pytorch_model\.safetensors"):
        load(tmp_path)


def test_the_family_replaces_a_config_that_is_absent(folder: Path) -> None:
    (folder / CONFIG_NAME).unlink()
    with pytest.raises(ConfigError, match="name the family"):
        load(folder)
    with pytest.raises(WeightsError, match=r"family small: block_out_channels \(8, 16, 16, 16\) instead of \(32, "):
        load(folder, family="small")
    with pytest.raises(ConfigError, match="sdxl"):
        load(folder, family="sdx")


def test_a_broken_config_is_refused(folder: Path) -> None:
    for content in ("{", "[]", json.dumps({"_class_name": "VQModel"})):
        (folder / CONFIG_NAME).write_text(content)
        with pytest.raises(ConfigError):
            load(folder)


def test_the_fingerprint_sees_values_keys_and_shapes_but_not_order_or_layout() -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
    same = fingerprint(tensors)
    assert fingerprint(dict(reversed(tensors.items()))) == same
    assert fingerprint({"a": tensors["a"].t().contiguous().t(), "b": tensors["b"].half()}) == same
    assert fingerprint({"a": tensors["a"].view(3, 2), "b": tensors["b"]}) != same
    assert fingerprint({"a": tensors["a"], "c": tensors["b"]}) != same
    assert fingerprint({"a": tensors["a"] + 1e-6, "b": tensors["b"]}) != same


def test_latent_spaces_that_configs_declare() -> None:
    assert known_space(FAMILIES["small"]) == "sd1"
    assert known_space(FAMILIES["sdxl"]) == "sdxl"
    assert known_space(FAMILIES["kl-f4"]) is None


def test_the_spec_is_the_name(folder: Path) -> None:
    assert load_weights(folder).name == str(folder)


# --- Single files and whole checkpoints ---

NEIGHBOURS = {
    "sd1": "cond_stage_model.transformer.text_model.embeddings.position_ids",
    "sdxl": "conditioner.embedders.1.model.ln_final.bias",
    "sd3": "model.diffusion_model.joint_blocks.0.context_block.mlp.fc1.bias",
    "flux1": "model.diffusion_model.double_blocks.0.img_mlp.0.bias",
}


def narrowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every family with an eighth of its channels, so that tests write megabytes and not gigabytes."""
    for name in ("sd1", "sdxl", "sd3", "flux1", "kl-f4", "kl-f16", "x4-upscaler"):
        monkeypatch.setitem(FAMILIES, name, narrow(FAMILIES[name]))


@pytest.mark.parametrize("family", NEIGHBOURS)
@pytest.mark.parametrize("container", ["safetensors", "ckpt"])
def test_a_checkpoint_loads_as_the_family_its_other_tensors_tell(
    family: str, container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    narrowed(monkeypatch)
    ldm = ldm_state_dict(FAMILIES[family])
    prefix = "vae." if family == "flux1" else "first_stage_model."
    checkpoint = {prefix + key: value for key, value in ldm.items()} | {NEIGHBOURS[family]: torch.zeros(3)}
    path = tmp_path / f"model.{container}"
    save_file(checkpoint, path) if container == "safetensors" else torch.save({"state_dict": checkpoint}, path)
    weights = load_weights(path)
    assert weights.config == FAMILIES[family]
    assert_equal(weights.tensors, to_diffusers(ldm))
    assert caplog.records == []


@pytest.mark.parametrize(
    ("family", "expected", "others"),
    [
        ("sdxl", "sd1", "--family sdxl"),
        ("sd3", "flux1", "--family sd3"),
        ("kl-f16", "kl-f16", None),
        ("kl-f4", "kl-f4", None),
        ("x4-upscaler", "x4-upscaler", None),
    ],
)
def test_a_file_whose_family_its_shapes_leave_open_loads_with_a_warning(
    family: str,
    expected: str,
    others: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    narrowed(monkeypatch)
    path = tmp_path / "vae.safetensors"
    tensors = ldm_state_dict(FAMILIES[family])
    save_file(tensors, path)
    assert load_weights(path).config == FAMILIES[expected]
    assert [others in record.message for record in caplog.records] == ([True] if others else [])
    caplog.clear()
    assert load_weights(path, family=family).config == FAMILIES[family]
    save_file(
        tensors, path, metadata={"modelspec.architecture": {"sdxl": "stable-diffusion-xl-v1-base/vae"}.get(family, "")}
    )
    if family == "sdxl":
        assert load_weights(path).config == FAMILIES["sdxl"]
    assert caplog.records == []


def test_a_family_with_other_structure_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrowed(monkeypatch)
    path = tmp_path / "vae.safetensors"
    save_file(ldm_state_dict(FAMILIES["sd3"]), path)
    with pytest.raises(
        WeightsError, match="family sd1: latent_channels 16 instead of 4, use_quant_conv False instead of"
    ):
        load_weights(path, family="sd1")


def test_an_unknown_width_is_derived_with_the_scale_of_its_latents(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(FAMILIES["sd1"], block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    path = tmp_path / "vae.safetensors"
    save_file(ldm_state_dict(config), path)
    assert load_weights(path).config == config
    assert "--family sdxl" in caplog.text
    save_file(ldm_state_dict(replace(config, latent_channels=7)), path)
    with pytest.raises(ConfigError, match="7 latent channels at 1/8 of the size"):
        load_weights(path)


@pytest.mark.parametrize("kind", ["bin", "fp16.safetensors", "sharded safetensors", "sharded bin"])
def test_folders_of_every_kind_load(kind: str, small_vae: VAE, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_NAMES[0])
    (folder / WEIGHTS_NAMES[0]).unlink()
    stem = "diffusion_pytorch_model"
    if kind == "bin":
        torch.save(tensors, folder / f"{stem}.bin")
    elif kind == "fp16.safetensors":
        save_file(tensors, folder / f"{stem}.fp16.safetensors")
    else:
        suffix = kind.split()[1]
        names = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
        parts = [dict(list(tensors.items())[:9]), dict(list(tensors.items())[9:])]
        for part, name in zip(parts, names, strict=True):
            save_file(part, folder / name) if suffix == "safetensors" else torch.save(part, folder / name)
        weight_map = {key: name for part, name in zip(parts, names, strict=True) for key in part}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert load(folder).fingerprint == small_vae.fingerprint


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_tensors_stored_in_few_bits_load_as_what_they_hold(dtype: torch.dtype, folder: Path) -> None:
    path = folder / WEIGHTS_NAMES[0]
    stored = {key: value.to(dtype) for key, value in load_file(path).items()}
    save_file(stored, path)
    assert load(folder).fingerprint == fingerprint({key: value.float() for key, value in stored.items()})


@pytest.mark.parametrize("container", ["safetensors", "zip", "legacy"])
def test_loading_from_a_large_checkpoint_needs_the_memory_of_its_vae(
    container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "sd1", narrow(FAMILIES["sd1"]))
    ldm = {f"first_stage_model.{key}": value for key, value in ldm_state_dict(FAMILIES["sd1"]).items()}
    vae_bytes = sum(value.nbytes for value in ldm.values())
    unet = {f"model.diffusion_model.{i}.weight": torch.zeros(50 << 20, dtype=torch.uint8) for i in range(4)}
    checkpoint = unet | ldm | {NEIGHBOURS["sd1"]: torch.zeros(1)}
    path = tmp_path / f"model.{container}"
    if container == "safetensors":
        save_file(checkpoint, path)
    else:
        torch.save({"state_dict": checkpoint}, path, _use_new_zipfile_serialization=container == "zip")
    del unet, checkpoint
    with peak_rss() as peak_bytes:
        weights = load_weights(path)
    assert sum(value.nbytes for value in weights.tensors.values()) == vae_bytes > 4 << 20
    assert peak_bytes() < vae_bytes + (40 << 20)


_LOAD_AND_TELL = """
import sys
from sdvae.vae import VAE

def read(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

VAE.load(device="cpu", dtype="fp32")  # what is imported on first use is no part of it
before = read("VmRSS")
vae = VAE.load(sys.argv[1], device="cpu", dtype=sys.argv[2])
print(read("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux' /proc")
@pytest.mark.parametrize(
    ("stored", "dtype", "copies"),
    [
        ("fp32", "bf16", 1.5),
        pytest.param("fp32", "fp32", 1.0, marks=pytest.mark.slow),
        pytest.param("fp16", "fp32", 1.0, marks=pytest.mark.slow),
    ],
)
def test_a_loaded_vae_is_in_memory_once_and_beside_it_what_another_dtype_needs(
    stored: str, dtype: str, copies: float, tmp_path: Path
) -> None:
    """In bf16 the fp32 weights stay, for save() and for what overflows. In a process whose heap nobody has cut up."""
    config = replace(FAMILIES["sd1"], block_out_channels=(64, 128, 256, 512), layers_per_block=1)
    tensors = empty_model(config).to_empty(device="cpu").state_dict()
    num_bytes = sum(value.nbytes for value in tensors.values())
    save_folder(
        tmp_path, config, {key: torch.zeros_like(value, dtype=DTYPES[stored]) for key, value in tensors.items()}
    )
    command = [sys.executable, "-c", _LOAD_AND_TELL, str(tmp_path), dtype]
    rise_bytes = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert num_bytes > 150e6
    assert rise_bytes < copies * num_bytes + 80e6  # a second copy in fp32 is 173 MB


def test_the_embedded_vae_stays_within_fp16(data_dir: Path) -> None:
    """What the README says of it. Half of the range is left: other photos go further than this one."""
    largest = 0.0

    def watch(module: torch.nn.Module, inputs: object, output: object) -> None:
        nonlocal largest
        if isinstance(output, torch.Tensor):
            largest = max(largest, float(output.abs().max()))

    model = build_model(load_weights())
    for module in model.modules():
        module.register_forward_hook(watch)
    pixels = to_pixels(read_image(data_dir / "kodak" / "kodim20.png")[None, 100:356, 200:456])
    with torch.no_grad():
        model.decode(model.encode(pixels).mode())
    assert 1000.0 < largest < 65504.0 / 2
