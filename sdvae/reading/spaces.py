"""Whether a VAE reads latents: those of a store, whose space is recorded, and those of files, which seldom tell one."""

import logging

from sdvae.errors import StoreError
from sdvae.store.store import Store
from sdvae.tiny import TinyConfig
from sdvae.vae import VAE
from sdvae.weights.evidence import Relation, Verdict, relate

_LOG = logging.getLogger(__name__)


def require_space(store: Store, vae: VAE, told: str | None = None) -> None:
    """Refuse a VAE that is not proved to decode latents of the store's space, with StoreError.

    The VAE that made the store is never refused. `told` names a space that a user says both have: it stands in for
    a proof, and not against one.
    """
    writer = store.manifest["vae"]
    is_scaled_alike = store.latent_scaling == vae.config.latent_scaling  # a TAESD's raw latents depend on it
    if writer["fingerprint"] == vae.fingerprint and (is_scaled_alike or not isinstance(vae.config, TinyConfig)):
        return
    theirs, ours = Verdict.from_json(writer), vae.verdict
    found = relate(theirs, ours)
    if told is not None:
        _require_possible(store, vae, told, theirs, ours)
    elif not (found.is_same and found.certainty == "proved"):
        raise StoreError(
            f"{store.paths.root} holds latents of the space {theirs.name} ({theirs}), but {vae.name} decodes those of "
            f"{ours.name} ({ours}); {_next_step(found, theirs, ours)}"
        )
    _LOG.warning(
        "%s was encoded by another VAE (%.12s) than %s (%.12s); %s",
        store.paths.root, writer["fingerprint"], vae.name, vae.fingerprint, f"--space {told}" if told else found.reason,
    )  # fmt: skip


def warn_of_denied(vae: VAE, told: str | None = None) -> None:
    """Say before latents of files are decoded, which tell no space, that this VAE has not the one it declares."""
    if told is None and vae.verdict.contradictions:
        wrong = "; ".join(item.reason for item in vae.verdict.contradictions)
        _LOG.warning(
            "%s: %s, but %s. Latents of a diffusion model for another space give wrong images; --space %s says that "
            "these are meant", vae.name, wrong, vae.verdict.saw, vae.latent_space,
        )  # fmt: skip


def _require_possible(store: Store, vae: VAE, told: str, theirs: Verdict, ours: Verdict) -> None:
    """Refuse a space that is neither the store's nor the VAE's, or that another one is proved against."""
    if told not in (theirs.name, ours.name):
        raise StoreError(
            f"--space {told} is neither the space of {store.paths.root}, {theirs.name}, nor that of {vae.name}, "
            f"{ours.name}"
        )
    for what, verdict in ((str(store.paths.root), theirs), (vae.name, ours)):
        if verdict.certainty == "proved" and verdict.name != told:
            raise StoreError(f"{what} is {verdict}; that is proved, so --space {told} cannot be; give another --vae")


def _next_step(found: Relation, theirs: Verdict, ours: Verdict) -> str:
    if theirs.certainty == ours.certainty == "proved":
        return f"give --vae one of {theirs.name}"
    space = ours.name if ours.certainty == "proved" else theirs.name
    return f"that is not proved to be one space. If both have {space} latents, give --space {space}; else another --vae"
