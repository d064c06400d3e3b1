"""VAE: what users hold. Weights, their identity, and a device and dtype to run them in."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sdvae import latents as latent_scaling
from sdvae.amounts import count, size_text
from sdvae.config import Padding, VAEConfig
from sdvae.engine.plan import IMAGES_AT_ONCE
from sdvae.engine.precision import choose_device, choose_dtype, inference
from sdvae.engine.run import Budget, Engine
from sdvae.engine.tiny_run import TinyEngine
from sdvae.errors import LatentsError, ShapeError
from sdvae.images.read import BACKGROUND, from_pil
from sdvae.notebook import card
from sdvae.pixels import fit_channels, pad_to_multiple, to_images, to_pixels
from sdvae.posterior import DiagonalGaussian
from sdvae.tiny import AutoencoderTiny
from sdvae.weights import identity
from sdvae.weights.evidence import Evidence, Verdict, judge, known_bytes, told_by_config
from sdvae.weights.load import AnyModel, build_model, load_weights, save_folder

AnyImage = Image.Image | NDArray[np.uint8]

Blend = Literal["lerp", "slerp"]

_BLENDS = {"lerp": latent_scaling.lerp, "slerp": latent_scaling.slerp}
_MOST_PIXEL = 16.0  # noise and interpolation leave [-1, 1], images of 0..255 are far outside


@dataclass(frozen=True)
class Encoded:
    """Latents of images of any size: one raw (1, C, h, w) each, and the (height, width) to crop back to."""

    latents: list[Tensor]
    sizes: list[tuple[int, int]]

    def __repr__(self) -> str:
        sizes = ", ".join(size_text(*size) for size in self.sizes[:5]) + ", ..." * (len(self.sizes) > 5)
        return f"Encoded({count(len(self.latents), 'image')}: {sizes})"


class VAE:
    """A KL-VAE or TAESD ready to run; inference only (train through `vae.model`, the weights as loaded).

    Results are fp32 whatever the compute dtype. An image that overflows in a reduced one is computed again in fp32, and
    the log says so. One call at a time.
    """

    def __init__(
        self,
        model: AnyModel,
        device: torch.device,
        dtype: torch.dtype,
        name: str,
        *,
        is_private: bool = False,
        path: Path | None = None,
        told: Sequence[Evidence] | None = None,
    ) -> None:
        """A model is neither copied nor changed: its weights are packed for `device` and `dtype` when they are used.

        `is_private`: nobody else holds it, so that it cannot change until `model` is asked for. `path` is the file
        that it came from, and `told` what that says of its latent space; its config where None.
        """
        self.name = name
        self.config: VAEConfig = model.config
        self.device = device
        self.dtype = dtype
        of_weights = identity.fingerprint(model.state_dict())
        self.fingerprint = identity.padded_fingerprint(of_weights, model.config.padding)
        self._model = model
        self._path = path
        self._told = (told_by_config(model.config, "its config"),) if told is None else tuple(told)
        self.engine: Engine | TinyEngine = (
            TinyEngine(model, device, dtype)
            if isinstance(model, AutoencoderTiny)
            else Engine(model, self.config, device, dtype, is_private=is_private)
        )

    @cached_property
    def verdict(self) -> Verdict:
        """Which latent space it has, how that is known (proved, declared, unknown), and why.

        The first to ask waits for its encoder to run on one image of 128x128 px, on the CPU.
        """
        known = known_bytes(self._path) if self._path else []
        return judge(self.config, self._model.state_dict(), [*known, *self._told])

    @property
    def latent_space(self) -> str:
        """The name of its latent space; "vae-" and 16 digits of its encoder's fingerprint where it is unknown."""
        return self.verdict.name

    @property
    def told_space(self) -> str:
        """The name of its latent space, for notes in passing: the probe runs only where nothing else tells one."""
        if "verdict" not in vars(self):
            told = judge(self.config, self._model.state_dict(), self._told, can_run=False)
            if told.space is not None:
                return told.space
        return self.verdict.name

    @property
    def model(self) -> AnyModel:
        """The weights as loaded. Who asks for them may change them: from then on each run of a KL-VAE looks first."""
        return cast(AnyModel, self.engine.source)

    @property
    def num_parameters(self) -> int:
        """Of encoder and decoder together."""
        return sum(values.numel() for values in self._model.parameters())

    @classmethod
    def load(
        cls,
        spec: str | Path | None = None,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        family: str | None = None,
        padding: Padding | None = None,
    ) -> "VAE":
        """The embedded VAE, or the one `spec` names: a diffusers folder, a VAE's file, a checkpoint, a hub id.

        A TAESD, too: in diffusers' form, or either of its author's two files beside the other. `device` and `dtype`
        are "auto" or names ("cuda:1", "bf16"); `family` overrides the config, and `padding` what it says of that:
        "zeros", "reflect", or for textures and panoramas without a seam "circular", "circular-x", "circular-y".
        Raises WeightsError, ConfigError or DeviceError.

        >>> vae = VAE.load(device="cpu", dtype="fp32")
        >>> vae.encode(torch.zeros(1, 3, 64, 64)).mode().shape
        torch.Size([1, 4, 8, 8])
        """
        place = choose_device(device)
        choice = choose_dtype(dtype, place)
        with torch.inference_mode(False):  # whose tensors can never be trained
            weights = load_weights(spec, family, padding)
            return cls(
                build_model(weights), place, choice.dtype, weights.name,
                is_private=True, path=weights.path, told=weights.told,
            )  # fmt: skip

    def save(self, folder: str | Path) -> None:
        """Write the weights as loaded, in fp32, as a folder that diffusers' `from_pretrained` reads."""
        save_folder(Path(folder), self.config, self._model.state_dict())

    def in_float32(self) -> "VAE":
        """This VAE computing in fp32 on the same device, on the fp32 twin of its engine; itself if it does already."""
        if self.dtype == torch.float32:
            return self
        exact = copy.copy(self)
        exact.dtype, exact.engine = torch.float32, self.engine.in_float32()
        return exact

    def encode(self, pixels: Tensor, budget: Budget = None) -> DiagonalGaussian:
        """(N, 3, H, W) in [-1, 1] -> the posterior over raw latents (N, C, H/8, W/8).

        `budget` is the memory it may take beside the weights, "6GiB" or bytes; by default, what the device has free.
        The result is always that of the whole image.
        ShapeError for sizes that are no multiple of the downscale, BudgetError before anything is allocated.
        """
        self._check_pixels(pixels)
        with inference():
            return DiagonalGaussian.from_moments(self.engine.encode_moments(pixels, budget))

    def decode(self, latents: Tensor, budget: Budget = None) -> Tensor:
        """Raw (N, C, h, w) -> pixels (N, 3, 8h, 8w), about [-1, 1]; `unscale` scaled latents first.

        `budget` is that of `encode`. LatentsError for other channels, NaN or infinity.
        """
        self._check_latents(latents)
        with inference():
            return self.engine.decode(latents, budget)

    @contextmanager
    def deterministic(self, images_at_once: int = IMAGES_AT_ONCE) -> Iterator[None]:
        """Inside, results have the same bits whatever the batch and whatever memory is free.

        Stores are encoded with it. A budget that needs another plan is refused (BudgetError). With another number of
        threads, another library or CPU, the last bits may differ; and with another `images_at_once`, the most small
        images that a CPU runs together (0: each runs alone, in strips).
        """
        engines = self.engine, self.engine.in_float32()
        before = self.engine.is_deterministic, self.engine.images_at_once
        for engine in engines:
            engine.is_deterministic, engine.images_at_once = True, images_at_once
        try:
            yield
        finally:
            for engine in engines:
                engine.is_deterministic, engine.images_at_once = before

    def encode_images(self, images: Sequence[AnyImage], budget: Budget = None) -> Encoded:
        """Latents (the posterior's mode) of images of any size, each padded by reflection to a whole number of latents.

        Takes PIL images of any mode and uint8 arrays (H, W, 3); one at a time, so memory follows the largest. A VAE of
        one channel gets them in grey. One of four gets their alpha, too, also that of arrays (H, W, 4); any other gets
        images over white.
        """
        if isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim == 3):
            raise ShapeError("encode_images takes a list of images, this is one; write encode_images([image])")
        channels = self.config.in_channels
        arrays = [_as_image(image, has_alpha=channels == 4) for image in images]
        padded = (pad_to_multiple(image, self.config.downscale) for image in arrays)
        latents = [self.encode(fit_channels(to_pixels(image[None]), channels), budget).mode() for image in padded]
        return Encoded(latents, [(image.shape[0], image.shape[1]) for image in arrays])

    def decode_images(self, encoded: Encoded, budget: Budget = None) -> list[Image.Image]:
        """Images of `encode_images`' latents (or edited ones of the same sizes), cropped back to their sizes."""
        images = []
        for latents, (height, width) in zip(encoded.latents, encoded.sizes, strict=True):
            image = to_images(self.decode(latents, budget))[0]
            images.append(Image.fromarray(image[:height, :width]))
        return images

    def roundtrip(self, images: Sequence[AnyImage], budget: Budget = None) -> list[Image.Image]:
        """What the images look like after this VAE: encoded and decoded, same sizes."""
        return self.decode_images(self.encode_images(images, budget), budget)

    def sample(
        self, num_images: int, height: int = 512, width: int = 512, seed: int = 0, budget: Budget = None
    ) -> list[Image.Image]:
        """Images decoded from the prior, N(0, I) over scaled latents, one after the other.

        The prior knows nothing of space: expect the texture of this VAE's decoder. Pictures need the
        diffusion model that this VAE was made for.
        """
        downscale = self.config.scaled_downscale
        if height % downscale or width % downscale:
            raise ShapeError(
                f"cannot sample {size_text(height, width)} px: both sides must be multiples of {downscale}"
            )
        shape = (1, self.config.scaled_channels, height // downscale, width // downscale)
        generator = torch.Generator().manual_seed(seed)
        images = []
        for _ in range(num_images):
            latents = self.unscale(torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu"))
            images.append(Image.fromarray(to_images(self.decode(latents, budget))[0]))
        return images

    def interpolate(
        self, start: AnyImage, end: AnyImage, steps: int = 8, mode: Blend = "slerp", budget: Budget = None
    ) -> list[Image.Image]:
        """`steps` images from `start` to `end` through the latent space; both must have one size."""
        (first, last), size = self._encode_alike([start, end], budget)
        blend = _BLENDS[mode]
        frames = [blend(first, last, position) for position in _positions(steps)]
        return self.decode_images(Encoded(frames, [size] * steps), budget)

    def interpolate_grid(
        self, corners: Sequence[AnyImage], steps: int = 5, mode: Blend = "slerp", budget: Budget = None
    ) -> list[Image.Image]:
        """`steps` x `steps` images between four of one size, row by row.

        The corners are top left, top right, bottom left, bottom right. Each row goes from a point of the left edge to
        one of the right edge. ShapeError for another number of corners, or several sizes.
        """
        if len(corners) != 4:
            raise ShapeError(f"a grid has four corners, these are {count(len(corners), 'image')}")
        (top_left, top_right, bottom_left, bottom_right), size = self._encode_alike(corners, budget)
        blend, positions = _BLENDS[mode], _positions(steps)
        frames = [
            blend(blend(top_left, bottom_left, down), blend(top_right, bottom_right, down), right)
            for down in positions
            for right in positions
        ]
        return self.decode_images(Encoded(frames, [size] * steps**2), budget)

    def _encode_alike(self, images: Sequence[AnyImage], budget: Budget) -> tuple[list[Tensor], tuple[int, int]]:
        """Latents of images that must have one size, and that size."""
        encoded = self.encode_images(images, budget)
        sizes = list(dict.fromkeys(encoded.sizes))
        if len(sizes) > 1:
            first, second = (size_text(*size) for size in sizes[:2])
            raise ShapeError(f"cannot interpolate between {first} and {second} px; resize one")
        return encoded.latents, sizes[0]

    def scale(self, latents: Tensor) -> Tensor:  # raw -> scaled
        """Raw latents to the scaled ones a diffusion model is trained on."""
        return latent_scaling.scale(latents, self.config)

    def unscale(self, scaled_latents: Tensor) -> Tensor:  # scaled -> raw
        """A diffusion model's scaled latents to the raw ones `decode` takes."""
        return latent_scaling.unscale(scaled_latents, self.config)

    def latent_error(self) -> float:
        """Relative L2 error of the mean in the compute dtype against fp32, on fixed synthetic pixels."""
        if self.dtype == torch.float32:
            return 0.0
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn((1, 3, 32, 32), generator=generator, dtype=torch.float32, device="cpu")
        pixels = F.interpolate(noise, scale_factor=8.0, mode="bicubic").clamp(-1.0, 1.0)
        exact = self.in_float32().encode(pixels).mean
        return float((self.encode(pixels).mean - exact).norm() / exact.norm())

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"VAE({self.name!r}, {self.config.latent_channels} latent channels, {dtype} on {self.device})"

    def _repr_html_(self) -> str:
        config = self.config
        return card(
            f"VAE {self.name}",
            {
                "latent space": f"{self.verdict.name}, {self.verdict.certainty}",
                "latents": f"{config.latent_channels} channels at 1/{config.downscale}",
                "scaling factor": config.scaling_factor,
                "parameters": f"{self.num_parameters:,}",
                "computes in": f"{str(self.dtype).removeprefix('torch.')} on {self.device}",
                "fingerprint": self.fingerprint,
            },
        )

    def _check_pixels(self, pixels: Tensor) -> None:
        channels, downscale = self.config.in_channels, self.config.downscale
        if not isinstance(pixels, Tensor):
            raise ShapeError(f"encode takes a tensor of pixels, not {_kind(pixels)}; use encode_images for images")
        if pixels.dim() != 4 or pixels.shape[1] != channels or not pixels.is_floating_point():
            raise ShapeError(
                f"encode takes float pixels (N, {channels}, H, W) in [-1, 1], not {_described(pixels)}; "
                "use encode_images for uint8 images"
            )
        height, width = pixels.shape[2:]
        if height % downscale or width % downscale or not pixels.numel():
            raise ShapeError(
                f"encode takes sizes that are multiples of {downscale}, not {size_text(height, width)} px; "
                "encode_images pads and decode_images crops back"
            )

        least, most = pixels.aminmax()
        if not (least >= -_MOST_PIXEL and most <= _MOST_PIXEL):  # also where they are NaN
            raise ShapeError(
                f"encode takes pixels in [-1, 1], these are from {float(least):.4g} to {float(most):.4g}; "
                "for images of 0..255 use encode_images, for 0..1 give 2 * pixels - 1"
            )

    def _check_latents(self, latents: Tensor) -> None:
        channels = self.config.latent_channels
        if not isinstance(latents, Tensor):
            hint = "; give it posterior.mode() or .sample()" if isinstance(latents, DiagonalGaussian) else ""
            raise LatentsError(f"decode takes a tensor of latents, not {_kind(latents)}{hint}")
        if latents.dim() != 4 or latents.shape[1] != channels or not latents.is_floating_point():
            raise LatentsError(f"{self.name} decodes float latents (N, {channels}, h, w), not {_described(latents)}")
        if not latents.isfinite().all():
            raise LatentsError("the latents hold NaN or infinity; the model that made them overflowed, run it in fp32")


def _positions(steps: int) -> list[float]:
    positions: list[float] = torch.linspace(0.0, 1.0, steps, dtype=torch.float32, device="cpu").tolist()
    return positions


def _as_image(image: AnyImage, has_alpha: bool) -> NDArray[np.uint8]:  # (H, W, 3), or (H, W, 4)
    if isinstance(image, Image.Image):
        image = from_pil(image, background=None if has_alpha else BACKGROUND)
    if not isinstance(image, np.ndarray):
        raise ShapeError(f"an image is a Pillow image or a uint8 array (H, W, 3), not {_kind(image)}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 3 + has_alpha):
        raise ShapeError(f"an image is a uint8 array (H, W, 3), not {image.dtype} {image.shape}")
    if has_alpha and image.shape[2] == 3:
        return np.dstack([image, np.full_like(image[..., :1], 255)])
    return image


def _kind(value: object) -> str:
    return f"a {type(value).__module__}.{type(value).__name__}".replace("a builtins.", "a ")


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
