"""JSON that carries its own sha256, so that one flipped bit is noticed."""

import hashlib
import json
from pathlib import Path
from typing import Any

from sdvae import atomic
from sdvae.errors import StoreError, VerifyError


def canonical_json(value: object) -> bytes:
    """The one way to write `value`: UTF-8, keys sorted, no spaces, a newline at the end, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def seal(value: dict[str, Any]) -> bytes:
    """The canonical JSON of `value` with its own sha256 added under "digest"."""
    return canonical_json(value | {"digest": hashlib.sha256(canonical_json(value)).hexdigest()})


def unseal(data: bytes) -> dict[str, Any] | None:
    """The object that `seal` made these bytes of, without its digest; None if one bit of them differs."""
    try:
        value = json.loads(data)
    except ValueError:  # JSONDecodeError and UnicodeDecodeError alike
        return None
    if not isinstance(value, dict):
        return None
    value.pop("digest", None)
    # Comparing bytes, not values: JSON can spell one value in several ways.
    return value if _is_sealed_as(value, data) else None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Seal `value` under `path`."""
    atomic.write_bytes(path, seal(value))


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote; VerifyError when its digest disagrees, StoreError when it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    value = unseal(data)
    if value is None:
        raise VerifyError(f"{path} is damaged: its bytes do not agree with the digest inside it")
    return value


def _is_sealed_as(value: dict[str, Any], data: bytes) -> bool:
    try:
        return seal(value) == data
    except ValueError:  # NaN, or a lone surrogate: `seal` never wrote this
        return False
