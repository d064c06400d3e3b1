"""A latent store as a page: what its latents decode to, what is in it, what was left out."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sdvae.latents import gain, standardise
from sdvae.pixels import to_images
from sdvae.progress import Progress, silent
from sdvae.reading.decode import without_padding
from sdvae.reading.spaces import require_space
from sdvae.reading.stats import StoreStats, measure
from sdvae.report import pictures
from sdvae.report.plots import bars
from sdvae.report.text import number
from sdvae.report.view import Cell, Decode, Fact, Latents, Metric, Plot, Row, StorePage, Table
from sdvae.store.records import Line, written
from sdvae.store.shard import Shard
from sdvae.store.store import Store
from sdvae.vae import VAE
from sdvae.weights.evidence import Verdict

NUM_DECODES = 24
_DECODE_PX = 512  # the longer side on the page
_MOST_BARS = 12
_MOST_TEXT = 300  # characters of a caption
_MOST_KEYS = 3


@dataclass
class _Texts:
    """What the records say of their photos."""

    captions_words: list[int]
    labels: Counter[str]
    num_records: int


def store_page(store: Store, vae: VAE, progress: Progress = silent, space: str | None = None) -> StorePage:
    """The page of a store; StoreError where it is empty, or its latents are not proved to be those `vae` decodes.

    `space` is what a user says of both instead.
    """
    require_space(store, vae, space)
    stats = measure(store)
    shards = [shard for shard in store.shards() if shard.rows]
    texts = _texts(shards)
    remarks = []
    if not store.is_finished:
        remarks.append(
            f"The store is not complete: {len(store.paths.committed()):,} of its {store.num_shards:,} shards are there."
        )
    if store.manifest["vae"]["fingerprint"] != vae.fingerprint:
        remarks.append(f"Decoded by {vae.name}, which is not the VAE that encoded the store.")
    decodes = list(_decodes(store, shards, stats.num_written, vae, progress))
    return StorePage(
        title=store.paths.root.name,
        caption=_caption(stats, store),
        figures=_figures(stats, store),
        decodes=decodes,
        decodes_note=f"{len(decodes)} of {stats.num_written:,} records, evenly spaced, decoded by {vae.name} from the "
        "posterior's mode. Below each: its latent channels and the posterior's std. Compressed views.",
        channels=_channels(stats),
        plots=_plots(stats, texts),
        quarantined=_quarantined(store),
        texts=_told(texts),
        remarks=remarks,
        facts=_facts(store),
        footer="This page is one file and sends no request.",
    )


def _caption(stats: StoreStats, store: Store) -> str:
    space = store.manifest["vae"]["latent_space"]
    own = store.latent_scaling.overall_factor * stats.overall_std
    return (
        f"{stats.num_written:,} records in the latent space {space}. {stats.num_quarantined:,} more were quarantined. "
        f"Scaled by the VAE's own factor, the latents have a std of {own:.3f}."
    )


def _figures(stats: StoreStats, store: Store) -> list[Fact]:
    return [
        Fact("records written", f"{stats.num_written:,}"),
        Fact("quarantined", f"{stats.num_quarantined:,}"),
        Fact("enlarged", f"{stats.num_enlarged:,}"),
        Fact("sizes", f"{len(stats.buckets):,}"),
        Fact("shards", f"{len(store.shards()):,}"),
        Fact("scaling factor for a std of 1", f"{stats.scaling_factor:.5f}"),
    ]


def _decodes(store: Store, shards: Sequence[Shard], num_written: int, vae: VAE, progress: Progress) -> Iterator[Decode]:
    count = min(NUM_DECODES, num_written)
    wanted = [place * num_written // count for place in range(count)]
    first = done = 0
    progress("decode", 0, count)
    for shard in shards:
        rows = shard.rows
        places = [place - first for place in wanted if first <= place < first + len(rows)]
        first += len(rows)
        if not places:
            continue
        lines = list(written(shard.records()))
        mean, logvar = shard.moments()
        for place in places:
            row = rows[place]
            yield _decode(lines[place], mean[row].astype(np.float32), logvar[row].astype(np.float32), vae)
            done += 1
            progress("decode", done, count)


def _decode(line: Line, mean: NDArray[np.float32], logvar: NDArray[np.float32], vae: VAE) -> Decode:
    latents = torch.from_numpy(mean)[None]
    height, width = without_padding(line["resized_px"], line["crop_px"])
    image = to_images(vae.decode(latents))[0, :height, :width]
    scaled = standardise(latents, vae.config)[0].numpy()
    unit = gain(latents, vae.config).expand_as(latents)[0].numpy()
    return Decode(
        key=line["key"],
        caption=_shortened(line["caption"] or line["label"] or ""),
        size=f"{width} × {height}",
        picture=pictures.whole(image, f"Decode of {line['key']}", _DECODE_PX),
        latents=Latents(
            pictures.channels(scaled, line["key"]),
            std=pictures.std_map(np.exp(logvar / 2) * unit, line["key"]),
        ),
    )


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_TEXT else text[: _MOST_TEXT - 1] + "…"


def _channels(stats: StoreStats) -> Table:
    columns = [Metric(name, name, digits=5) for name in ("Mean", "Std", "Posterior std")]
    values = list(zip(stats.mean, stats.std, stats.posterior_std, strict=True))
    rows = [Row(str(channel), "", [Cell(number(value, 5)) for value in line]) for channel, line in enumerate(values)]
    overall = [Cell(number(stats.overall_mean, 5)), Cell(number(stats.overall_std, 5)), Cell("")]
    return Table(columns, [*rows, Row("All", "", overall)])


def _plots(stats: StoreStats, texts: _Texts) -> list[Plot]:
    plots = [_bars("Sizes", "px, height x width", Counter(stats.buckets))]
    if texts.labels:
        plots.append(_bars("Labels", "labels", texts.labels))
    return plots


def _bars(title: str, of: str, counts: Counter[str]) -> Plot:
    total = counts.total()
    shown = counts.most_common(_MOST_BARS)
    rest = total - sum(count for _, count in shown)
    values = [(_cut(name), float(count), f"{count:,}") for name, count in shown]
    caption = f"Records by {of}."
    if rest:
        caption += f" {rest:,} more have one of {len(counts) - len(shown):,} others."
    return Plot(title, bars(values, f"{title}: " + ", ".join(f"{name} {text}" for name, _, text in values)), caption)


def _cut(name: str) -> str:
    return name if len(name) <= 40 else name[:39] + "…"


def _quarantined(store: Store) -> list[tuple[str, int, str]]:
    """Reason, records and the first keys, the most frequent reason first."""
    keys: defaultdict[str, list[str]] = defaultdict(list)
    for line in store.quarantined():
        keys[line["reason"]].append(line["key"])
    rows = sorted(keys.items(), key=lambda item: (-len(item[1]), item[0]))
    return [
        (reason, len(found), ", ".join(found[:_MOST_KEYS]) + (", …" if len(found) > _MOST_KEYS else ""))
        for reason, found in rows
    ]


def _texts(shards: Sequence[Shard]) -> _Texts:
    words: list[int] = []
    labels: Counter[str] = Counter()
    num_records = 0
    for shard in shards:
        for line in written(shard.records()):
            num_records += 1
            if line["caption"] is not None:
                words.append(len(line["caption"].split()))
            if line["label"] is not None:
                labels[line["label"]] += 1
    return _Texts(words, labels, num_records)


def _told(texts: _Texts) -> list[Fact]:
    words, labels = texts.captions_words, texts.labels
    facts = [Fact("With a caption", f"{len(words):,} of {texts.num_records:,}")]
    if words:
        facts.append(Fact("Words", f"{min(words)} to {max(words)}, median {median(words):g}"))
    facts.append(Fact("With a label", f"{labels.total():,} of {texts.num_records:,}"))
    return facts + ([Fact("Labels", f"{len(labels):,}")] if labels else [])


def _facts(store: Store) -> list[Fact]:
    vae = store.manifest["vae"]
    facts = [Fact("Latent space", str(Verdict.from_json(vae))), Fact("Fingerprint", vae["fingerprint"])]
    facts += [Fact(name, _plain(value)) for name, value in store.manifest["preprocess"].items() if value is not None]
    return [*facts, Fact("store_dtype", store.manifest["store_dtype"])]


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
