"""The formats that are read, and why a file in none of them is refused."""

from PIL import Image

# Pillow's names. Its other decoders (EPS runs Ghostscript, many are unfuzzed) are never tried.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "AVIF", "JPEG2000", "ICO")
_SPELLING = {"WEBP": "WebP", "PPM": "PNM", "JPEG2000": "JPEG 2000", "MPO": "JPEG", "HEIF": "HEIC", "JXL": "JPEG XL"}


def spelled(pillow_format: str) -> str:
    """A format's usual spelling, for Pillow's name of it."""
    return _SPELLING.get(pillow_format, pillow_format)


def why_unidentified(head: bytes) -> str:
    """The reason to refuse a file that no decoder accepted, from its first bytes; 1 KB is enough."""
    if not head:
        return "the file is empty"
    names = [spelled(name) for name in FORMATS if (accepts := Image.OPEN[name][1]) and accepts(head[:16]) is True]
    if names:
        kinds = "colours of 12 bits or in float, ..." if names[0] == "TIFF" else "12 bits, lossless, ..."
        return f"the {names[0]} header is corrupt, or of a kind that cannot be decoded ({kinds})"
    text = head.lstrip().lower()
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    known = {
        "AVIF of a kind that cannot be decoded": brand in (b"avif", b"avis"),
        "SVG": b"<svg" in text,
        "HTML, perhaps a page saved in place of the image": text.startswith((b"<!doctype html", b"<html")),
        "a Git LFS pointer; fetch the file with `git lfs pull`": text.startswith(b"version https://git-lfs"),
        "PDF": text.startswith(b"%pdf"),
        "Photoshop": head.startswith(b"8BPS"),
    }
    for name, is_so in known.items():
        if is_so:
            return f"not an image in a format sdvae reads ({name})"
    return f"not an image in a format sdvae reads: {', '.join(map(spelled, (*FORMATS, 'HEIF', 'JXL')))}"
