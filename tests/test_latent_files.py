import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sdvae.config import VAEConfig
from sdvae.errors import LatentsError, SdvaeError, UnsafeFileError
from sdvae.latents import scale
from sdvae.reading import latent_files
from sdvae.reading.declaration import DECLARATION
from sdvae.reading.latent_files import list_latent_files
from sdvae.reading.spread import Spread

SD1 = VAEConfig()
FLUX = VAEConfig.from_family("flux1")


def read_latents(path: Path, config: VAEConfig, told: latent_files.Scaling | None = None) -> torch.Tensor:
    return latent_files.read_latents(path, config, told).raw


def latents(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def save(path: Path, tensor: torch.Tensor) -> Path:
    if path.suffix == ".npy":
        np.save(path, tensor.numpy())
    elif path.suffix in (".pt", ".pth"):
        torch.save(tensor, path)
    else:
        save_file({"latents": tensor}, path)
    return path


@pytest.mark.parametrize("name", ["a.safetensors", "a.npy", "a.pt", "a.pth", "A.NPY"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_each_format_is_read_as_fp32(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    tensor = latents(2, 4, 6, 8, dtype=dtype)
    path = save(tmp_path / name.lower(), tensor).rename(tmp_path / name)
    found = read_latents(path, SD1, "raw")
    assert found.dtype == torch.float32
    assert torch.equal(found, tensor.float())


def test_bfloat16_and_big_endian_numbers_are_read(tmp_path: Path) -> None:
    tensor = latents(1, 4, 6, 8)
    assert torch.equal(
        read_latents(save(tmp_path / "a.safetensors", tensor.bfloat16()), SD1, "raw"), tensor.bfloat16().float()
    )
    np.save(tmp_path / "a.npy", tensor.numpy().astype(">f4"))
    assert torch.equal(read_latents(tmp_path / "a.npy", SD1, "raw"), tensor)


def test_one_image_may_come_without_a_batch(tmp_path: Path) -> None:
    tensor = latents(4, 6, 8)
    assert torch.equal(read_latents(save(tmp_path / "a.npy", tensor), SD1, "raw"), tensor[None])


def test_scaled_latents_are_unscaled_with_the_shift(tmp_path: Path) -> None:
    raw = latents(1, 16, 4, 4)
    path = save(tmp_path / "a.npy", (raw - 0.1159) * 0.3611)
    torch.testing.assert_close(read_latents(path, FLUX, "scaled"), raw)


@pytest.mark.parametrize("says", ["raw", "scaled"])
def test_metadata_says_raw_or_scaled(tmp_path: Path, says: str) -> None:
    tensor = latents(1, 4, 4, 4)
    path = tmp_path / "a.safetensors"
    save_file({"x": tensor}, path, metadata={"latents": says})
    expected = tensor if says == "raw" else tensor / 0.18215
    torch.testing.assert_close(read_latents(path, SD1), expected)
    other = "scaled" if says == "raw" else "raw"  # is for files that do not say it
    torch.testing.assert_close(read_latents(path, SD1, other), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".pt"])
def test_unknown_scaling_is_refused_and_the_option_named(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(LatentsError, match=r"add --latents scaled .* or --latents raw"):
        read_latents(save(tmp_path / f"a{suffix}", latents(1, 4, 4, 4)), SD1)


def test_comfyui_latents_are_raw_when_marked_and_sd1_scaled_when_not(tmp_path: Path) -> None:
    tensor = latents(2, 4, 4, 4)
    save_file({"latent_tensor": tensor, "latent_format_version_0": torch.tensor([])}, tmp_path / "new.latent")
    save_file({"latent_tensor": tensor}, tmp_path / "old.latent")
    sdxl = VAEConfig.from_family("sdxl")  # whose factor is another: ComfyUI divided by SD 1's in any case
    assert torch.equal(read_latents(tmp_path / "new.latent", sdxl), tensor)
    torch.testing.assert_close(read_latents(tmp_path / "old.latent", sdxl), tensor / 0.18215)


@pytest.mark.parametrize("name", ["latents", "samples"])
def test_a_dictionary_is_read_by_the_name_of_its_tensor(tmp_path: Path, name: str) -> None:
    tensor = latents(1, 4, 4, 4)
    torch.save({"step": 3, "noise_mask": latents(1), name: tensor}, tmp_path / "a.pt")
    assert torch.equal(read_latents(tmp_path / "a.pt", SD1, "raw"), tensor)
    torch.save({"x": latents(1), "y": tensor}, tmp_path / "b.pt")
    with pytest.raises(LatentsError, match=r"holds 2 tensors \(x, y\)"):
        read_latents(tmp_path / "b.pt", SD1, "raw")


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((1, 5, 8, 8), r"5 channels \(1, 5, 8, 8\), but this VAE's latents have 4"),
        ((5, 8, 8), "5 channels"),
        ((8, 8), r"has shape \(8, 8\); latents are \(N, 4, h, w\)"),
        ((1, 4, 2, 8, 8), "has shape"),
        ((), "has shape"),
        ((0, 4, 8, 8), "is empty"),
        ((1, 4, 0, 8), "is empty"),
        ((1, 64, 16), "as a FLUX pipeline packs latents; unpack them"),
    ],
)
def test_wrong_shapes_are_named(tmp_path: Path, shape: tuple[int, ...], says: str) -> None:
    for suffix in (".npy", ".safetensors", ".pt"):
        with pytest.raises(LatentsError, match=says):
            read_latents(save(tmp_path / f"a{suffix}", latents(*shape)), SD1, "raw")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_latents_that_are_not_finite_are_refused_and_counted(tmp_path: Path, bad: float) -> None:
    tensor = latents(3, 4, 8, 8, dtype=torch.float64)
    tensor[1, 2, 3, 4] = bad
    with pytest.raises(LatentsError, match=r"NaN or infinite latents \(image 1 of 3\)"):
        read_latents(save(tmp_path / "a.npy", tensor), SD1, "raw")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_numbers_that_are_no_latents_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(LatentsError, match=str(dtype)):
        read_latents(save(tmp_path / "a.pt", torch.zeros(1, 4, 8, 8, dtype=dtype)), SD1, "raw")


def test_strings_in_an_npy_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array(["four", "words"]))
    with pytest.raises(LatentsError, match="does not hold numbers"):
        read_latents(tmp_path / "a.npy", SD1, "raw")


class Payload:
    """What a hostile pickle is: reading it calls a function."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "inside a dict", "npy", "module"])
def test_no_file_runs_code(tmp_path: Path, kind: str, protocol: int) -> None:
    canary = tmp_path / "canary"
    payload: object = Payload(canary)
    path = tmp_path / "a.pt"
    match kind:
        case "zip" | "legacy":
            torch.save(payload, path, _use_new_zipfile_serialization=kind == "zip", pickle_protocol=protocol)
        case "pickle":
            path.write_bytes(pickle.dumps(payload, protocol))
        case "inside a dict":
            torch.save({"latents": latents(1, 4, 8, 8), "x": payload}, path, pickle_protocol=protocol)
        case "npy":
            path = tmp_path / "a.npy"
            np.save(path, np.array([payload, payload], dtype=object), allow_pickle=True)
        case "module":  # harmless, but made by naming a class of torch
            torch.save(torch.nn.Linear(1, 1), path, pickle_protocol=protocol)
    with pytest.raises(UnsafeFileError, match=r"is refused") as caught:
        read_latents(path, SD1, "raw")
    assert caught.value.exit_code == 4
    assert not canary.exists()


def test_what_a_pickle_asks_for_is_named(tmp_path: Path) -> None:
    torch.save(Payload(tmp_path / "canary"), tmp_path / "a.pt")
    with pytest.raises(UnsafeFileError, match=r"it asks for 'posix'.'mkdir', which could run code"):
        read_latents(tmp_path / "a.pt", SD1, "raw")


def test_a_tuple_nested_without_end_is_one_sentence(tmp_path: Path) -> None:
    """torch.load(weights_only=True), whose unpickler hashes keys, ends in a segmentation fault."""
    pickled = b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"Ns."
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/version", "3\n")
    with pytest.raises(LatentsError, match="holds no tensors"):
        read_latents(tmp_path / "a.pt", SD1, "raw")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", ["latents", "latents_8x8"])
def test_what_sd_scripts_caches_is_raw(tmp_path: Path, name: str, compressed: bool) -> None:
    tensor = latents(4, 8, 8)
    ending = name.removeprefix("latents")
    arrays = {name: tensor.numpy(), f"latents_flipped{ending}": -tensor.numpy()}
    arrays |= {f"original_size{ending}": np.array([64, 64]), f"crop_ltrb{ending}": np.array([0, 0, 64, 64])}
    (np.savez_compressed if compressed else np.savez)(tmp_path / "a_sd.npz", allow_pickle=False, **arrays)
    assert torch.equal(read_latents(tmp_path / "a_sd.npz", SD1), tensor[None])
    np.savez(tmp_path / "b.npz", allow_pickle=False, latents=tensor.numpy())
    with pytest.raises(LatentsError, match="raw or scaled"):
        read_latents(tmp_path / "b.npz", SD1)


def test_what_sd_scripts_caches_for_flux_is_scaled(tmp_path: Path) -> None:
    scaled = latents(16, 8, 8)
    np.savez(
        tmp_path / "a_0064x0064_flux.npz", allow_pickle=False, latents_8x8=scaled.numpy(), crop_ltrb_8x8=np.zeros(4)
    )
    raw = scaled[None] / 0.3611 + 0.1159
    assert (read_latents(tmp_path / "a_0064x0064_flux.npz", FLUX) - raw).abs().max() < 1e-5


@pytest.mark.parametrize(
    "declared", ["{", "[]", '{"latent_files": {"pattern": "../*", "scaling": "raw", "has_std": false}}']
)
def test_a_damaged_declaration_is_told(tmp_path: Path, declared: str) -> None:
    (tmp_path / DECLARATION).write_text(declared)
    with pytest.raises(LatentsError, match=r"sdvae-export\.json is damaged"):
        list_latent_files(tmp_path)


def test_a_packed_array_of_gigabytes_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", allow_pickle=False, latents=np.zeros(1 << 28, np.uint8))
    with pytest.raises(LatentsError, match="would take 268,435,"):
        read_latents(tmp_path / "a.npz", SD1, "raw")


def test_what_trainers_save_in_a_pt_is_read(tmp_path: Path) -> None:
    tensor = latents(1, 4, 8, 8)
    for number, saved in enumerate((
        {"latents": tensor.bfloat16(), "metadata": {"file": "a.jpg", "score": np.float32(1)}},
        tensor.clone().requires_grad_(), torch.nn.Parameter(tensor.clone()),
        tensor.to(memory_format=torch.channels_last),
    )):  # fmt: skip
        torch.save(saved, tmp_path / f"{number}.pt")
        found = read_latents(tmp_path / f"{number}.pt", SD1, "raw")
        assert torch.equal(found, tensor.bfloat16().float() if number == 0 else tensor)
    torch.save([tensor, tensor], tmp_path / "list.pt")
    with pytest.raises(LatentsError, match="holds no tensors by name"):
        read_latents(tmp_path / "list.pt", SD1, "raw")


@pytest.mark.parametrize("suffix", [".safetensors", ".latent", ".npy", ".pt", ".pth"])
@pytest.mark.parametrize(
    "content", [b"", b"some text\n" * 20, b"\x89PNG\r\n\x1a\n" + bytes(90), b"PK\x03\x04", b"\x80\x02"]
)
def test_files_of_another_kind_are_one_sentence(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(SdvaeError) as caught:
        read_latents(path, SD1, "raw")
    message = str(caught.value)
    assert message.startswith(str(path))
    assert len(message) < 300
    assert "\n" not in message


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".pt"])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, suffix: str) -> None:
    whole = save(tmp_path / f"whole{suffix}", latents(1, 4, 4, 4)).read_bytes()
    path = tmp_path / f"cut{suffix}"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(SdvaeError):
            read_latents(path, SD1, "raw")


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".pt"])
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_damage_gives_latents_or_our_error(tmp_path: Path, suffix: str, edits: list[tuple[int, int]]) -> None:
    damaged = bytearray(save(tmp_path / f"whole{suffix}", latents(1, 4, 4, 4)).read_bytes())
    for place, byte in edits:
        # half of the edits aim at the first 200 bytes, where headers are
        damaged[place % (200 if place % 2 else len(damaged))] = byte
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(damaged)
    try:
        found = read_latents(path, SD1, "raw")
    except SdvaeError:
        return
    assert found.isfinite().all()
    assert found.shape[1] == 4


def test_odd_escapes_in_a_pickle_are_no_warning(tmp_path: Path) -> None:
    (tmp_path / "odd.pt").write_bytes(b"\x80\x02S'\\o'\n.")
    with pytest.raises(SdvaeError, match=r"odd\.pt"):
        read_latents(tmp_path / "odd.pt", SD1, "raw")


def test_a_folder_lists_its_latent_files(tmp_path: Path) -> None:
    for name in ("b.npy", "a.latent", "sub/c.PT", "notes.txt", ".hidden.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in list_latent_files(tmp_path)] == [
        "a.latent",
        "b.npy",
        "sub/c.PT",
    ]
    assert list_latent_files(tmp_path / "b.npy") == [tmp_path / "b.npy"]


def test_nothing_to_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(LatentsError, match="holds no latents"):
        list_latent_files(tmp_path)
    with pytest.raises(LatentsError, match="does not exist"):
        list_latent_files(tmp_path / "gone")
    (tmp_path / "a.txt").touch()
    with pytest.raises(LatentsError, match=r"its name ends with none of .safetensors"):
        read_latents(tmp_path / "a.txt", SD1, "raw")


# --- FLUX.2, whose scaled latents are patches ---

FLUX2 = VAEConfig.from_family("flux2")


@pytest.mark.parametrize("told", [None, "raw", "scaled"])
def test_latents_of_flux2_tell_by_their_channels_what_they_are(
    tmp_path: Path, told: latent_files.Scaling | None
) -> None:
    raw = latents(1, 32, 4, 6)
    files = {"raw": raw, "scaled": scale(raw, FLUX2)}
    for says, tensor in files.items():
        path = save(tmp_path / f"{says}.npy", tensor)
        if told in (None, says):
            found = latent_files.read_latents(path, FLUX2, told)
            assert (found.scaling, found.raw.shape) == (says, raw.shape)
            assert (found.raw - raw).abs().max() < 1e-5
            spread = Spread(FLUX2)
            spread.add(found)
            assert spread.doubts() == []
        else:
            with pytest.raises(LatentsError, match=f"channels, so its latents are {says}, not {told}"):
                read_latents(path, FLUX2, told)


def test_latents_of_flux2_of_other_shapes_are_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(LatentsError, match=r"16 channels .* this VAE's latents have 32 \(raw\) or 128 \(scaled\)"):
        read_latents(save(tmp_path / "a.npy", latents(1, 16, 4, 6)), FLUX2)
    with pytest.raises(LatentsError, match=r"FLUX pipeline packs latents; unpack them to \(N, 128, h, w\) first"):
        read_latents(save(tmp_path / "b.npy", latents(1, 6, 128)), FLUX2)
