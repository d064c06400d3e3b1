"""Recipes: everything that a figure of reconstruction quality depends on besides the photos and the VAE."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from sdvae.amounts import size_text
from sdvae.errors import ConfigError
from sdvae.perceptual.ssim import Window

Crop = Literal["none", "center", "adm"]
Filter = Literal["lanczos", "bicubic", "bilinear"]


@dataclass(frozen=True)
class Published:
    """A figure that somebody published for this recipe, to hold one's own against."""

    vae: str
    metric: str
    value: float
    source: str


@dataclass(frozen=True)
class Recipe:
    """How photos become images, images become reconstructions, and both become numbers.

    `size_px` is the side of the square crop; None keeps every photo whole, in its own size. `metrics` are names of the
    table in `sdvae.metrics`. The fields from `latents` on are the conventions in which evaluations differ.
    """

    name: str
    title: str
    size_px: int | None = None
    crop: Crop = "none"  # "adm": halved by a box filter while twice as large as needed, then bicubic (guided-diffusion)
    resample: Filter = "lanczos"
    is_antialiased: bool = True
    latents: Literal["mode", "sample"] = "mode"
    seed: int = 0  # of samples; each photo draws its own noise, whatever the batch
    rounding: Literal["8-bit", "float"] = "8-bit"  # of the reconstruction, before it is compared; both are clamped
    ssim_window: Window = "gaussian"  # see `sdvae.perceptual.ssim`
    lpips_range: Literal["-1..1", "0..1"] = "-1..1"  # 0..1 is a frequent mistake: LPIPS wants -1..1
    metrics: tuple[str, ...] = ("psnr", "ssim", "ms_ssim", "lpips_alex", "lpips_vgg", "rfid", "rkid")
    max_images: int | None = None  # the first ones, in the order of the source
    num_probed: int = 8  # photos that equivariance and decay are measured on: evenly spaced, from where `seed` says
    probe_px: int = 128  # the side of their central crops
    published: tuple[Published, ...] = ()
    note: str = ""

    def probed(self) -> str:
        """What equivariance and decay are measured on, in words."""
        return f"central crops of {self.probe_px} px of at most {self.num_probed} photos, evenly spaced"

    def caption(self) -> str:
        """The caption of a table: one paragraph that lets a stranger repeat the numbers."""
        square = self.size_px and f"{size_text(self.size_px, self.size_px)} px"
        sizes = square or "Whole photos in their own size"
        crops = {"none": "", "center": ", centre crop", "adm": ", ADM centre crop"}
        filters = "" if self.size_px is None or self.crop == "adm" else f", {self.resample} resize"
        edges = "" if self.is_antialiased else " without antialias"
        draws = "the posterior's mode" if self.latents == "mode" else f"a sample of the posterior, seed {self.seed}"
        rounding = "rounded to 8 bits" if self.rounding == "8-bit" else "not rounded"
        window = _WINDOWS[self.ssim_window]
        first = f", the first {self.max_images:,} photos" if self.max_images else ""
        text = (
            f"Recipe {self.name}: {self.title}. {sizes}{crops[self.crop]}{filters}{edges}{first}; {draws}; "
            f"reconstructions clamped and {rounding}; SSIM on RGB, {window}; LPIPS on {self.lpips_range}; "
            f"equivariance and decay on {self.probed()}."
        )
        return f"{text} {self.note}".rstrip()


_WINDOWS: Mapping[Window, str] = {
    "gaussian": "11 px Gaussian window (std 1.5), where it lies in the image",
    "uniform": "7 px uniform window",
    "reflected": "11 px Gaussian window (std 1.5), borders reflected",
}
_CARD = "huggingface.co/stabilityai/sd-vae-ft-mse and sdxl-vae, model cards"
_TAESD = "measured with TAESD's own files in fp32"

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("native", "the photos as they are"),
        Recipe(
            "kodak", "Kodak's 24 photos, whole", published=(Published("TAESD (SD 1)", "psnr", 24.77, _TAESD),)
        ),
        Recipe(
            "kodak-512", "Kodak's 24 photos, centre crops", 512, "center",
            published=(Published("TAESD (SD 1)", "psnr", 24.58, _TAESD),),
        ),
        Recipe(
            "sd-vae-card", "COCO 2017 val, as Stable Diffusion's VAE cards", 256, "center", "bicubic",
            max_images=5000,
            published=(
                Published("sd-vae-ft-mse", "rfid", 4.70, _CARD), Published("sd-vae-ft-mse", "psnr", 24.5, _CARD),
                Published("sd-vae-ft-mse", "ssim", 0.71, _CARD), Published("sdxl-vae", "rfid", 4.42, _CARD),
                Published("sdxl-vae", "psnr", 24.7, _CARD), Published("sdxl-vae", "ssim", 0.73, _CARD),
            ),
            note="The cards name the photos, their size and their number; crop, filter and sampling are not told.",
        ),
        Recipe(
            "imagenet-256", "ImageNet val, as papers on latent diffusion", 256, "adm", "bicubic", max_images=50_000
        ),
    )
}  # fmt: skip


def sized(recipe: Recipe, size_px: int | None) -> Recipe:
    """The recipe at another size; None leaves it as it is. Whole photos become centre crops."""
    if size_px is None:
        return recipe
    return replace(recipe, size_px=size_px, crop="center" if recipe.crop == "none" else recipe.crop)


def find_recipe(name: str) -> Recipe:
    """The ready recipe of a name; ConfigError, with those there are, for any other."""
    if name not in RECIPES:
        raise ConfigError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def rivals(recipe: Recipe) -> dict[str, Recipe]:
    """The same recipe under each other convention that is in use, one changed at a time."""
    changed: dict[str, Recipe] = {}
    if recipe.size_px is not None:
        changed["bilinear, no antialias"] = replace(recipe, crop="center", resample="bilinear", is_antialiased=False)
        other: Crop = "center" if recipe.crop == "adm" else "adm"
        changed[{"center": "centre crop, bicubic", "adm": "ADM crop"}[other]] = replace(
            recipe, crop=other, resample="bicubic"
        )
    swap = {"mode": "sample", "sample": "mode"}
    changed[f"latents: {swap[recipe.latents]}"] = replace(recipe, latents=swap[recipe.latents])  # type: ignore[arg-type]
    changed["float, not 8-bit"] = replace(recipe, rounding="float")
    if "ssim" in recipe.metrics:
        changed["SSIM as scikit-image's default"] = replace(recipe, ssim_window="uniform")
        changed["SSIM as torchmetrics"] = replace(recipe, ssim_window="reflected")
    if any(name.startswith("lpips") for name in recipe.metrics):
        changed["LPIPS of 0..1"] = replace(recipe, lpips_range="0..1")
    return changed
