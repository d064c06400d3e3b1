import hashlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL as DiffusersVAE
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdvae import __version__, atomic
from sdvae.config import FAMILIES, VAEConfig
from sdvae.errors import ConfigError, OutputError, WeightsError
from sdvae.weights.edit import Written, convert, extract, swap
from sdvae.weights.files import DTYPES, open_weights
from sdvae.weights.identity import fingerprint
from sdvae.weights.load import load_weights, save_folder
from tests.test_keymap import assert_equal, ldm_state_dict, narrow, to_diffusers, to_ldm
from tests.test_weight_files import SAVE_AS, peak_rss

NARROW = narrow(FAMILIES["sd1"])
PREFIX = "first_stage_model."
MODELSPEC = {"modelspec.title": "a model", "modelspec.architecture": "stable-diffusion-v1"}
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _narrow_families(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sd1", "sdxl", "sd3"):
        monkeypatch.setitem(FAMILIES, name, narrow(FAMILIES[name]))


def others() -> dict[str, Tensor]:
    """What an SD 1 checkpoint holds beside its VAE, in every way of storing it."""
    generator = torch.Generator().manual_seed(9)
    return {
        "cond_stage_model.transformer.x.weight": torch.randn(7, 5, generator=generator).half(),
        "model.diffusion_model.out.2.weight": torch.randn(3, 4, 1, 1, generator=generator),
        "model.diffusion_model.fp8.weight": torch.randn(6, generator=generator).to(torch.float8_e4m3fn),
        "model.diffusion_model.time_ids": torch.arange(3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "alphas_cumprod": torch.rand(9, generator=generator).bfloat16(),
    }


def checkpoint(path: Path, vae: dict[str, Tensor], prefix: str = PREFIX) -> Path:
    tensors = others() | {prefix + key: value for key, value in vae.items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata=MODELSPEC)
    else:
        torch.save({"state_dict": tensors, "epoch": 1}, path, **SAVE_AS.get(path.name, {}))
    return path


def vae_file(path: Path, seed: int = 5, config: VAEConfig = NARROW, family: str | None = None) -> dict[str, Tensor]:
    tensors = ldm_state_dict(config, seed)
    save_file(tensors, path, metadata={"sdvae.family": family} if family else None)
    return tensors


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def raw(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Tensors as comparable bytes, fp8 too."""
    return {
        key: (value.dtype, tuple(value.shape), value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for key, value in tensors.items()
    }


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        found: dict[str, str] = file.metadata()
    return found


# --- convert ---


def test_an_ldm_file_becomes_a_folder_that_diffusers_reads(tmp_path: Path) -> None:
    tensors = vae_file(tmp_path / "a.safetensors", family="sdxl")
    written = convert(tmp_path / "a.safetensors", tmp_path / "folder")
    theirs = DiffusersVAE.from_pretrained(tmp_path / "folder")
    assert_equal(dict(theirs.state_dict()), to_diffusers(tensors))
    assert theirs.config.scaling_factor == 0.13025
    assert load_weights(tmp_path / "folder").config == FAMILIES["sdxl"]
    num_bytes = sum(value.nbytes for value in tensors.values())
    target = tmp_path / "folder" / "diffusion_pytorch_model.safetensors"
    assert written == Written(target, 248, 248, num_bytes, "diffusers", "sdxl")


@pytest.mark.parametrize("how", ["in.safetensors", *SAVE_AS])
def test_there_and_back_is_bit_equal(how: str, tmp_path: Path) -> None:
    tensors = {key: value.bfloat16() for key, value in ldm_state_dict(NARROW).items()}
    source = tmp_path / how
    save_file(tensors, source) if how == "in.safetensors" else torch.save(tensors, source, **SAVE_AS[how])
    before = sha256(source)
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert convert(source, one, "diffusers", family="sd1").layout == "diffusers"
    assert_equal(load_file(one), to_diffusers(tensors))
    assert convert(one, two, "ldm").layout == "ldm"
    assert_equal(load_file(two), tensors)
    assert sha256(source) == before
    told = metadata(one)
    assert told["sdvae.source_sha256"] == before
    assert (told["sdvae.version"], told["sdvae.verb"], told["sdvae.family"]) == (__version__, "convert", "sd1")
    assert metadata(two)["sdvae.source_sha256"] == sha256(one)
    assert metadata(two)["sdvae.family"] == "sd1"


def test_layout_and_dtype_stay_where_they_are_not_given(tmp_path: Path) -> None:
    source, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensors = vae_file(source)
    convert(source, output, family="sd1")
    assert raw(load_file(output)) == raw(tensors)
    convert(source, output, dtype=torch.float16, family="sd1", force=True)
    assert raw(load_file(output)) == raw({key: value.half() for key, value in tensors.items()})


def test_the_same_input_gives_the_same_bytes_and_aligned_tensors(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "a.safetensors", ldm_state_dict(NARROW))
    vae_file(tmp_path / "vae.safetensors", family="sd1")
    for name in ("one", "two"):
        swap(source, tmp_path / "vae.safetensors", tmp_path / f"{name}.safetensors")
    assert sha256(tmp_path / "one.safetensors") == sha256(tmp_path / "two.safetensors")
    for key, entry in open_weights(tmp_path / "one.safetensors").entries.items():
        assert entry.offset % DTYPES[entry.dtype].itemsize == 0, key


def test_numbers_too_large_for_the_dtype_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    source, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensors = ldm_state_dict(NARROW)
    tensors["decoder.conv_out.bias"][1] = 7e4
    save_file(tensors, source)
    with pytest.raises(WeightsError, match=r"too large for torch\.float16"):
        convert(source, output, dtype=torch.float16, family="sd1")
    assert list(tmp_path.iterdir()) == [source]
    convert(source, output, dtype=torch.bfloat16, family="sd1")


# --- extract ---


@pytest.mark.parametrize("name", ["model.safetensors", "zip.ckpt", "legacy.ckpt"])
def test_the_vae_comes_out_of_a_checkpoint_bit_equal(name: str, tmp_path: Path) -> None:
    tensors = {key: value.half() for key, value in ldm_state_dict(NARROW).items()}
    source = checkpoint(tmp_path / name, tensors)
    output = tmp_path / "vae.safetensors"
    written = extract(source, output)
    assert raw(load_file(output)) == raw(tensors)
    assert (written.num_tensors, written.layout, written.family) == (248, "ldm", "sd1")
    told = metadata(output)
    assert told["sdvae.verb"] == "extract"
    assert not told.keys() & MODELSPEC.keys(), "what describes the checkpoint does not describe its VAE"
    extract(source, tmp_path / "folder")
    assert_equal(load_weights(tmp_path / "folder").tensors, to_diffusers(tensors))
    with pytest.raises(WeightsError, match="is a VAE already"):
        extract(output, tmp_path / "again.safetensors")


# --- swap ---


@pytest.mark.parametrize("name", ["model.safetensors", "zip.ckpt", "legacy.ckpt"])
@pytest.mark.parametrize("prefix", [PREFIX, "vae."])
@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_swap_changes_the_vae_and_nothing_else(name: str, prefix: str, layout: str, tmp_path: Path) -> None:
    old, new = ldm_state_dict(NARROW, 1), ldm_state_dict(NARROW, 2)
    source = checkpoint(tmp_path / name, old if layout == "ldm" else to_diffusers(old), prefix)
    save_folder(tmp_path / "vae", FAMILIES["sd1"], to_diffusers(new))
    before = sha256(source)
    output = tmp_path / "out.safetensors"
    vae = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    written = swap(source, vae, output)
    expected = others() | {
        prefix + key: value for key, value in (new if layout == "ldm" else to_diffusers(new)).items()
    }
    found = load_file(output)
    assert raw(found) == raw(expected)
    assert (written.num_tensors, written.num_vae, written.family) == (len(expected), 248, "sd1")
    assert sha256(source) == before
    told = metadata(output)
    assert told["sdvae.source_sha256"] == before
    assert told["sdvae.vae_sha256"] == sha256(vae)
    if name == "model.safetensors":
        assert MODELSPEC.items() <= told.items()
    extract(output, tmp_path / "back.safetensors")
    back = to_diffusers(load_file(tmp_path / "back.safetensors"))
    assert fingerprint(back) == fingerprint(to_diffusers(new))


def test_swap_keeps_names_shapes_and_dtypes_of_the_checkpoint(tmp_path: Path) -> None:
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    legacy = {}
    for key, value in to_diffusers(ldm_state_dict(NARROW, 1)).items():
        for new_name, old_name in old_names.items():
            key = key.replace(f".{new_name}.", f".{old_name}.")
        legacy[key] = value.half()
    source = checkpoint(tmp_path / "model.safetensors", legacy, "vae.")
    new = vae_file(tmp_path / "vae.safetensors", seed=2, family="sd1")
    swap(source, tmp_path / "vae.safetensors", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    before = load_file(source)
    assert {k: (v.dtype, v.shape) for k, v in found.items()} == {k: (v.dtype, v.shape) for k, v in before.items()}
    assert_equal(
        load_weights(tmp_path / "out.safetensors").tensors, {k: v.half() for k, v in to_diffusers(new).items()}
    )
    swap(source, tmp_path / "vae.safetensors", tmp_path / "out.safetensors", dtype=torch.float32, force=True)
    assert_equal(load_weights(tmp_path / "out.safetensors").tensors, to_diffusers(new))


def test_swap_refuses_what_would_not_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = checkpoint(tmp_path / "model.safetensors", ldm_state_dict(NARROW))
    vae, output = tmp_path / "vae.safetensors", tmp_path / "out.safetensors"
    vae_file(vae, config=FAMILIES["sd3"])
    with pytest.raises(WeightsError, match=r"another structure .*: latent_channels 16 instead of 4, "):
        swap(source, vae, output)
    vae_file(vae, family="sdxl")
    with pytest.raises(WeightsError, match=r"has sd1 latents and .* has sdxl latents"):
        swap(source, vae, output)
    vae_file(vae)
    with pytest.raises(WeightsError, match=r"must be named \.safetensors"):
        swap(source, vae, tmp_path / "out.ckpt")
    assert not output.exists()
    swap(source, vae, output)
    assert "--family sd1" in caplog.text
    caplog.clear()
    swap(source, vae, output, family="sd1", force=True)
    assert "--family" not in caplog.text
    assert "is not proved to have the latents of" in caplog.text, "both are random, whatever is said of them"


def test_files_whose_number_of_groups_nothing_tells_can_be_copied_not_run(tmp_path: Path) -> None:
    config = replace(NARROW, block_out_channels=(8, 8, 16, 24), norm_num_groups=8)
    source = checkpoint(tmp_path / "model.safetensors", ldm_state_dict(config))
    vae, output = tmp_path / "vae.safetensors", tmp_path / "out.safetensors"
    new = vae_file(vae, config=config)
    for refused in (lambda: load_weights(source), lambda: extract(source, tmp_path / "folder")):
        with pytest.raises(ConfigError, match=r"do not tell the number of its groups"):
            refused()
    swap(source, vae, output, family=None)
    assert_equal(load_file(output), others() | {PREFIX + key: value for key, value in new.items()})
    extract(output, tmp_path / "back.safetensors")
    assert_equal(load_file(tmp_path / "back.safetensors"), new)
    assert convert(vae, tmp_path / "named.safetensors", layout="diffusers").num_vae == len(new)


def test_a_swapped_fp8_vae_is_the_rounded_one(tmp_path: Path) -> None:
    stored = {key: value.to(torch.float8_e4m3fn) for key, value in ldm_state_dict(NARROW).items()}
    source = checkpoint(tmp_path / "model.safetensors", stored)
    new = vae_file(tmp_path / "vae.safetensors", seed=3, family="sd1")
    swap(source, tmp_path / "vae.safetensors", tmp_path / "out.safetensors")
    expected = others() | {PREFIX + key: value.to(torch.float8_e4m3fn) for key, value in new.items()}
    assert raw(load_file(tmp_path / "out.safetensors")) == raw(expected)


# --- Outputs ---


def test_an_output_that_is_an_input_is_refused_under_any_name(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model.safetensors", ldm_state_dict(NARROW))
    vae_file(tmp_path / "vae.safetensors", family="sd1")
    (tmp_path / "link.safetensors").symlink_to(source)
    (tmp_path / "hard.safetensors").hardlink_to(source)
    before = sha256(source)
    for name in ("model", "link", "hard", "vae"):
        with pytest.raises(WeightsError, match="is the input, too"):
            swap(source, tmp_path / "vae.safetensors", tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match="is the input, too"):
        extract(source, tmp_path / "." / "model.safetensors")
    convert(tmp_path / "vae.safetensors", tmp_path / "folder")
    with pytest.raises(WeightsError, match="is the input, too"):
        convert(tmp_path / "folder" / "diffusion_pytorch_model.safetensors", tmp_path / "folder")
    assert sha256(source) == before


@pytest.mark.parametrize("is_dry_run", [False, True])
def test_an_output_that_is_there_is_written_over_only_by_force(tmp_path: Path, is_dry_run: bool) -> None:
    source = checkpoint(tmp_path / "model.safetensors", ldm_state_dict(NARROW))
    vae = tmp_path / "vae.safetensors"
    vae_file(vae, family="sd1")
    (tmp_path / "folder").mkdir()  # an empty folder is no output yet
    (tmp_path / "configured").mkdir()
    (tmp_path / "configured/config.json").write_text("mine")
    (tmp_path / "out.safetensors").write_text("mine")
    for write in (convert, extract, partial(swap, vae=vae)):
        given = vae if write is convert else source
        with pytest.raises(OutputError, match=r"out\.safetensors is there already; give -o another name, or --force"):
            write(given, output=tmp_path / "out.safetensors", is_dry_run=is_dry_run)
    with pytest.raises(OutputError, match=r"configured/config\.json is there already"):
        extract(source, tmp_path / "configured", is_dry_run=is_dry_run)
    extract(source, tmp_path / "folder", is_dry_run=is_dry_run)
    assert (tmp_path / "out.safetensors").read_text() == (tmp_path / "configured/config.json").read_text() == "mine"
    extract(source, tmp_path / "configured", force=True)
    assert load_weights(tmp_path / "configured").config == FAMILIES["sd1"]


def test_what_convert_leaves_out_is_counted_by_its_names(tmp_path: Path) -> None:
    """As CompVis' trainer saves a VAE: with LPIPS, the discriminator, averages."""
    training = {f"loss.perceptual.{number}": torch.zeros(2) for number in range(5)} | {"model_ema.decay": torch.ones(1)}
    save_file(ldm_state_dict(NARROW) | training, tmp_path / "trained.safetensors")
    written = convert(tmp_path / "trained.safetensors", tmp_path / "out.safetensors", family="sd1")
    assert written.left_out == {"loss.*": 5, "model_ema.*": 1}
    assert (written.num_tensors, written.num_vae) == (248, 248)
    assert convert(tmp_path / "out.safetensors", tmp_path / "again.safetensors", family="sd1").left_out == {}


def test_outputs_that_cannot_be_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    vae_file(source, family="sd1")
    (tmp_path / "file").write_text("")
    (tmp_path / "dir.safetensors").mkdir()
    for output, layout, says in (
        (tmp_path / "absent" / "b.safetensors", None, "there is no folder"),
        (tmp_path / "b.ckpt", None, "sdvae writes nothing else"),
        (tmp_path / "file", None, "sdvae writes nothing else"),
        (tmp_path / "dir.safetensors", None, "is a folder"),
        (tmp_path / "folder", "ldm", "diffusers folder"),
    ):
        with pytest.raises(WeightsError, match=says):
            convert(source, output, layout)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "dir.safetensors", "file"]


def test_a_dry_run_says_the_same_and_writes_nothing(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model.safetensors", ldm_state_dict(NARROW))
    vae = tmp_path / "vae.safetensors"
    vae_file(vae, family="sd1")
    before = sorted(tmp_path.iterdir())
    dry = [
        swap(source, vae, tmp_path / "a.safetensors", is_dry_run=True),
        extract(source, tmp_path / "b", is_dry_run=True),
        convert(vae, tmp_path / "c.safetensors", "diffusers", torch.float16, is_dry_run=True),
    ]
    assert sorted(tmp_path.iterdir()) == before
    wet = [
        swap(source, vae, tmp_path / "a.safetensors"),
        extract(source, tmp_path / "b"),
        convert(vae, tmp_path / "c.safetensors", "diffusers", torch.float16),
    ]
    assert dry == wet
    for written in wet:
        size = written.output.stat().st_size
        header_bytes = int.from_bytes(written.output.read_bytes()[:8], "little")
        assert size == 8 + header_bytes + written.num_bytes


def test_a_failing_disk_leaves_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae_file(tmp_path / "a.safetensors", family="sd1")
    output = tmp_path / "b.safetensors"
    output.write_text("old")
    writes = []

    def hook(operation: str, path: Path) -> None:
        writes.append(operation)
        if len(writes) == 20:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "hook", hook)
    with pytest.raises(OutputError, match=r"cannot write .*b\.safetensors.*free some space"):
        convert(tmp_path / "a.safetensors", output, force=True)
    assert output.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def swap_in_little_memory(tmp_path: Path, config: VAEConfig, checkpoint_mib: int) -> int:
    """Swap a VAE of `config` into a checkpoint of that size; the peak above where it began, in MiB."""
    vae = ldm_state_dict(config)
    save_file(vae, tmp_path / "vae.safetensors", metadata={"sdvae.family": "sd1"})
    generator = torch.Generator().manual_seed(1)
    blocks = {
        f"model.diffusion_model.{i}": torch.randint(256, (50 * MIB,), dtype=torch.uint8, generator=generator)
        for i in range(2)
    }
    for i in range(2, checkpoint_mib // 50):
        blocks[f"model.diffusion_model.{i}"] = blocks["model.diffusion_model.0"].roll(i)
    save_file(blocks | {PREFIX + key: value.half() for key, value in vae.items()}, tmp_path / "model.safetensors")
    del blocks, vae
    with peak_rss() as peak_bytes:
        swap(tmp_path / "model.safetensors", tmp_path / "vae.safetensors", tmp_path / "out.safetensors")
    peak = peak_bytes() // MIB
    extract(tmp_path / "out.safetensors", tmp_path / "back.safetensors", family="sd1")
    new, back = load_file(tmp_path / "vae.safetensors"), load_file(tmp_path / "back.safetensors")
    assert_equal(back, {key: value.half() for key, value in new.items()})
    before, after = open_weights(tmp_path / "model.safetensors"), open_weights(tmp_path / "out.safetensors")
    kept = [key for key in before.entries if not key.startswith(PREFIX)]
    assert len(kept) == checkpoint_mib // 50
    for key in kept:
        for left, right in zip(before.entries[key].chunks(), after.entries[key].chunks(), strict=True):
            assert left == right
    return peak


def test_swap_needs_little_memory(tmp_path: Path) -> None:
    assert swap_in_little_memory(tmp_path, NARROW, checkpoint_mib=150) < 48


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_mib", [500, 1500])
def test_swap_of_a_full_vae_needs_little_memory(
    checkpoint_mib: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "sd1", VAEConfig())
    assert swap_in_little_memory(tmp_path, VAEConfig(), checkpoint_mib) <= 300


def test_the_header_is_sorted_out_as_the_format_asks(tmp_path: Path) -> None:
    vae_file(tmp_path / "a.safetensors", family="sd1")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    content = (tmp_path / "b.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert header["__metadata__"]["format"] == "pt"
    assert_equal(to_ldm(to_diffusers(load_file(tmp_path / "b.safetensors"))), load_file(tmp_path / "a.safetensors"))
