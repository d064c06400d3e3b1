"""A page to HTML: one file that sends no request, whose script and style are the only ones that may run."""

import base64
import hashlib
import json
import math
from importlib import resources
from typing import TYPE_CHECKING

from sdvae.errors import ConfigError
from sdvae.report.text import number
from sdvae.report.view import Comparison, Photo, StorePage

if TYPE_CHECKING:
    from jinja2 import Environment


def render(page: Comparison | StorePage) -> str:
    """The HTML of a page."""
    template = "comparison.html" if isinstance(page, Comparison) else "store.html"
    style, script = asset("page.css"), asset("page.js")
    policy = content_policy(style, script)
    return environment().get_template(template).render(page=page, style=style, script=script, policy=policy)


def environment() -> "Environment":
    """Templates that escape every text; `style` and `script` are marked as safe by `asset`."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ConfigError("the page needs jinja2: pip install 'sdvae[report]'") from error
    found = Environment(
        loader=PackageLoader("sdvae.report", ""), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    found.globals |= {"number": number, "values": _values}
    return found


def asset(name: str) -> str:
    """A file of this package, marked as safe to stand in a page."""
    from markupsafe import Markup

    return Markup((resources.files("sdvae.report") / name).read_text(encoding="utf-8"))


def content_policy(style: str, script: str, images: str = "data:", connects: str = "'none'") -> str:
    """A Content-Security-Policy that names style and script by their hashes: nothing else runs, nothing is fetched."""
    return (
        f"default-src 'none'; img-src {images}; style-src {_hash(style)}; script-src {_hash(script)}; "
        f"connect-src {connects}; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _values(photo: Photo) -> str:
    """Its numbers by VAE and metric, for the script that sorts; JSON has no infinity."""
    rows = [[value if value is not None and math.isfinite(value) else None for value in version.values]
            for version in photo.versions]  # fmt: skip
    return json.dumps(rows)
