"""A page to HTML: one file that sends no request, whose own scripts and styles are the only ones that may run."""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
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
    styles, scripts = [asset("page.css")], [asset("page.js")]
    policy = content_policy(styles, scripts)
    made = environment().get_template(template)
    return made.render(page=page, styles=styles, scripts=scripts, policy=policy)


def environment(*packages: str) -> "Environment":
    """The templates of this package and of `packages`; every text in them is escaped, but for `asset`s."""
    try:
        from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ConfigError("pages need jinja2; pip install 'sdvae[report]'") from error
    found = Environment(
        loader=ChoiceLoader([PackageLoader(package, "") for package in (__package__, *packages)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals |= {"number": number, "values": _values}
    return found


def asset(name: str, package: str = __package__) -> str:
    """A style or script of a package, marked as safe to stand in a page."""
    try:
        from markupsafe import Markup
    except ImportError as error:
        raise ConfigError("pages need jinja2; pip install 'sdvae[report]'") from error
    return Markup((resources.files(package) / name).read_text(encoding="utf-8"))


def content_policy(styles: Sequence[str], scripts: Sequence[str], connects: str = "'none'") -> str:
    """A Content-Security-Policy that names styles and scripts by their hashes, so that no other runs.

    Pictures are inside the page, and requests go nowhere but to `connects`.
    """
    return (
        f"default-src 'none'; img-src data:; style-src {_hashes(styles)}; script-src {_hashes(scripts)}; "
        f"connect-src {connects}; base-uri 'none'; form-action 'none'"
    )


def _hashes(texts: Sequence[str]) -> str:
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def _values(photo: Photo) -> str:
    """Its numbers by VAE and metric, for the script that sorts; JSON has no infinity."""
    rows = [
        [value if value is not None and math.isfinite(value) else None for value in version.values]
        for version in photo.versions
    ]
    return json.dumps(rows)
