"""Datasets that live: what a changed source makes of a store, and what older views still say."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from sdvae import atomic, sealed
from sdvae.cli.main import cli
from sdvae.encoding import encode
from sdvae.encoding.attach import attach
from sdvae.encoding.compact import compact
from sdvae.encoding.manifest import EncodeSettings
from sdvae.encoding.repair import repair
from sdvae.encoding.tasks import Work
from sdvae.errors import StoreError, VerifyError
from sdvae.posterior import DiagonalGaussian
from sdvae.reading.dataset import LatentDataset
from sdvae.store.generations import Change, Known, compare, fold, parse_changes, viewed
from sdvae.store.geometry import Preprocess
from sdvae.store.records import Record, written
from sdvae.store.store import Store
from sdvae.store.verify import verify
from sdvae.vae import VAE
from tests.conftest import SMALL, random_model
from tests.faults.conftest import flip, read_store, store_files

SETTINGS = EncodeSettings(Preprocess(size_px=32), shard_rows=3, batch_rows=2, num_threads=1)
NO_CHANGE = {"added": 0, "changed": 0, "vanished": 0, "renamed": 0, "texts": 0}


class CountingVAE(VAE):
    """Counts the images that go through the network."""

    num_images = 0

    def encode(self, pixels: Tensor, budget: Any = None) -> DiagonalGaussian:
        self.num_images += len(pixels)
        return super().encode(pixels, budget)


@pytest.fixture(scope="module")
def vae() -> CountingVAE:
    return CountingVAE(random_model(SMALL), torch.device("cpu"), torch.float32, name="small random VAE")


encode_dataset = partial(encode.encode_dataset, settings=SETTINGS, work=Work(num_workers=0))


def draw(path: Path, seed: int) -> None:
    """A photo; of one seed in six, a file that only looks like one."""
    rows = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), np.uint8)
    Image.fromarray(rows).save(path)
    if seed % 6 == 5:
        path.write_bytes(path.read_bytes()[:300])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five photos with captions, of which one is broken."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, seed in zip("abcde", (0, 1, 2, 3, 5), strict=True):
        draw(folder / f"{name}.png", seed)
        (folder / f"{name}.txt").write_text(f"photo {name}")
    return folder


def records(root: Path, generation: int | None = None) -> dict[str, tuple[Any, ...]]:
    """What a view says of each record: texts, and the bytes of its latents or why there are none."""
    found = {}
    for shard in Store.open(root).shards(generation):
        tensors = shard.tensors()
        for line in shard.records():
            row = line["row"]
            latents = None if row is None else b"".join(tensors[name][row].tobytes() for name in sorted(tensors))
            assert line["key"] not in found
            found[line["key"]] = (line["uri"], line["caption"], line["label"], line["reason"], latents)
    return found


def shard_bytes(root: Path) -> dict[str, bytes]:
    return {name: data for name, data in read_store(root).items() if name.startswith(("shards", "index", "done"))}


# --- The fold and the comparison ---


def change(record: int, key: str, caption: str | None = None, is_retired: bool = False) -> Change:
    return Change(0, record, key, key, caption, None, is_retired)


def test_a_view_is_the_fold_of_the_changes_the_newest_holds() -> None:
    lines = [{"key": key, "uri": key, "caption": None, "label": None, "row": row} for row, key in enumerate("abcd")]
    first, second = [change(0, "x"), change(1, "b", "two"), change(2, "c", is_retired=True)], [
        change(0, "x", is_retired=True), change(2, "y"),
    ]  # fmt: skip
    assert fold([]) == {}
    assert [line["key"] for line in viewed(lines, fold(first)[0])] == ["x", "b", "d"]
    found = viewed(lines, fold([*first, *second])[0])
    assert [(line["key"], line["caption"], line["row"]) for line in found] == [
        ("b", "two", 1), ("y", None, 2), ("d", None, 3),
    ]  # fmt: skip
    assert lines[0]["key"] == "a", "an index stays as it is"


def test_a_change_is_read_as_it_was_written() -> None:
    changes = [change(1, "a\n", "é\u2028"), change(2, "b", is_retired=True)]
    assert parse_changes(b"".join(one.line() for one in changes)) == changes


def test_a_rename_is_known_by_the_bytes_and_a_swap_too() -> None:
    def record(key: str, content: int, caption: str | None = None) -> Record:
        return Record(key, 1, str(content), (8, 8), caption=caption)

    def known(*records: Record) -> list[Known]:
        return [Known((0, number), record, record.label == "retired") for number, record in enumerate(records)]

    def has_latents(place: tuple[int, int]) -> bool:
        return place != (0, 9)

    before = [record("a", 1), record("b", 2), record("c", 3), replace(record("z", 9), label="retired")]
    find = partial(compare, known(*before), has_latents=has_latents)
    assert not find([record("a", 1), record("b", 2), record("c", 3)])
    found = find([record("b", 1), record("a", 2), record("new", 3), record("back", 9), record("copy", 1)])
    assert (found.changed, found.renamed, found.added, found.vanished) == (["a", "b"], ["new"], ["back", "copy"], [])
    assert [one.key for one in found.to_encode] == ["copy"], "no record speaks for two photos"
    assert [(one.record, one.key, one.is_retired) for one in found.changes] == [
        (0, "b", False), (1, "a", False), (2, "new", False), (3, "back", False),
    ]  # fmt: skip
    found = find([record("a", 1, "text")], is_kept=lambda key: key == "c")
    assert (found.texts, found.vanished, len(found.to_encode)) == (["a"], ["b"], 0)
    found = compare(known(*before), [record("y", 2)], lambda place: False)
    assert (found.renamed, [one.key for one in found.to_encode]) == ([], ["y"]), "nothing to take up is there yet"


# --- A changed source ---


def test_new_captions_change_no_byte_of_a_shard(photos: Path, tmp_path: Path, vae: CountingVAE) -> None:
    out = tmp_path / "out"
    encode_dataset(photos, out, vae)
    before, num_images = shard_bytes(out), vae.num_images
    (photos / "a.txt").write_text("another")
    (photos / "e.txt").unlink()
    report = encode_dataset(photos, out, vae)
    assert (report.changes, vae.num_images) == (NO_CHANGE | {"texts": 2}, num_images)
    assert shard_bytes(out) == before and not verify(out).damages
    assert {key: found[1] for key, found in records(out).items()} == {
        "a.png": "another", "b.png": "photo b", "c.png": "photo c", "d.png": "photo d", "e.png": None,
    }  # fmt: skip
    assert records(out, 0)["a.png"][1] == "photo a"
    dataset = LatentDataset(out, sample=False)
    assert [dataset[number]["caption"] for number in range(4)] == ["another", "photo b", "photo c", "photo d"]
    assert LatentDataset(out, generation=0)[0]["caption"] == "photo a"
    with pytest.raises(StoreError, match="has the generations 0 to 1, not 2"):
        LatentDataset(out, generation=2)


def test_renamed_photos_do_not_see_the_vae(photos: Path, tmp_path: Path, vae: CountingVAE) -> None:
    out = tmp_path / "out"
    encode_dataset(photos, out, vae)
    before, num_images = records(out), vae.num_images
    (photos / "cats").mkdir()
    (photos / "a.png").rename(photos / "cats" / "z.png")
    (photos / "b.png").rename(photos / "swap")
    (photos / "c.png").rename(photos / "b.png")
    (photos / "swap").rename(photos / "c.png")
    report = encode_dataset(photos, out, vae)
    assert (report.changes, vae.num_images) == (NO_CHANGE | {"changed": 2, "renamed": 1}, num_images)
    after = records(out)
    assert after["cats/z.png"] == ("cats/z.png", None, "cats", None, before["a.png"][-1]) and "a.png" not in after
    assert (after["b.png"][-1], after["c.png"][-1]) == (before["c.png"][-1], before["b.png"][-1])
    assert after["b.png"][1] == "photo b", "the caption follows the name, as the files do"
    assert records(out, 0) == before and not verify(out).damages


def test_a_photo_that_is_back_is_not_encoded_again(photos: Path, tmp_path: Path, vae: CountingVAE) -> None:
    out = tmp_path / "out"
    encode_dataset(photos, out, vae)
    before, num_images = records(out), vae.num_images
    (photos / "a.png").rename(tmp_path / "a.png")
    report = encode_dataset(photos, out, vae, keep_vanished=True)
    assert records(out) == before and report.changes == NO_CHANGE
    report = encode_dataset(photos, out, vae)
    assert (report.changes, report.num_written) == (NO_CHANGE | {"vanished": 1}, 3)
    assert "a.png" not in records(out) and len(LatentDataset(out)) == 3
    (tmp_path / "a.png").rename(photos / "a.png")
    assert encode_dataset(photos, out, vae).changes == NO_CHANGE | {"added": 1}
    assert (records(out), vae.num_images) == (before, num_images)
    assert len(Store.open(out).rosters) == 3


def test_a_limit_retires_nothing_that_lies_beyond_it(photos: Path, tmp_path: Path, vae: CountingVAE) -> None:
    encode_dataset(photos, tmp_path / "out", vae)
    before = read_store(tmp_path / "out")
    encode_dataset(photos, tmp_path / "out", vae, limit=2)
    assert read_store(tmp_path / "out") == before


def test_another_source_is_refused(photos: Path, tmp_path: Path, vae: CountingVAE) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    encode_dataset(photos, out, vae)
    before = read_store(out)
    other.mkdir()
    draw(other / "x.png", 10)
    with pytest.raises(StoreError, match=r"none of the 5 photos of .*out is in this source; .* --keep-vanished"):
        encode_dataset(other, out, vae)
    assert read_store(out) == before
    assert encode_dataset(other, out, vae, keep_vanished=True).num_written == 5


def test_a_survey_tells_the_changes_and_writes_nothing(photos: Path, tmp_path: Path, vae: CountingVAE) -> None:
    out = tmp_path / "out"
    encode_dataset(photos, out, vae)
    before = read_store(out)
    draw(photos / "a.png", 10)
    draw(photos / "new.png", 11)
    (photos / "b.png").rename(photos / "z.png")
    (photos / "c.png").unlink()
    (photos / "d.txt").write_text("another")
    found = encode.survey(photos, out, vae, SETTINGS)
    expected = {"added": 1, "changed": 1, "vanished": 1, "renamed": 1, "texts": 1}
    assert (found.changes, sum(found.sizes.values())) == (expected, 2)
    assert read_store(out) == before
    assert encode_dataset(photos, out, vae).changes == expected


def test_a_generation_that_is_not_encoded_yet_is_not_read(
    photos: Path, tmp_path: Path, vae: CountingVAE, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    encode_dataset(photos, out, vae)
    before = records(out)
    draw(photos / "a.png", 10)
    (photos / "b.png").unlink()
    with pytest.raises(StoppedError):
        encode_dataset(photos, out, vae, progress=stop_in_the_encoding)
    assert "1 changed (a.png), 1 vanished (b.png); 1 photo to encode" in caplog.text
    assert records(out) == before and verify(out).is_unfinished
    assert len(LatentDataset(out)) == 4 and "generation 1 is not encoded yet" in caplog.text
    with pytest.raises(StoreError, match="is not finished"):
        LatentDataset(out, generation=1)
    assert encode_dataset(photos, out, vae).changes == NO_CHANGE
    assert len(LatentDataset(out)) == 3 and records(out)["a.png"] != before["a.png"]


class StoppedError(Exception):
    pass


def stop_in_the_encoding(phase: str, num_done: int, num_all: int) -> None:
    if phase == "encode" and num_all:
        raise StoppedError


# --- Any history ---

EDITS: dict[str, Callable[[Path, int], None]] = {
    "draw": lambda path, number: draw(path, number),
    "drop": lambda path, number: path.unlink(missing_ok=True),
    "caption": lambda path, number: None if not path.exists() else caption(path, f"caption {number}"),
    "rename": lambda path, number: None if not path.exists() else move(path, path.with_name(f"{number % 12:02d}.png")),
}


def caption(path: Path, text: str) -> None:
    path.with_suffix(".txt").write_text(text)


def move(path: Path, to: Path) -> None:
    """With its caption; to a taken name, it takes the place."""
    path.replace(to)
    if path.with_suffix(".txt").exists():
        path.with_suffix(".txt").replace(to.with_suffix(".txt"))


edits = st.tuples(st.sampled_from(sorted(EDITS)), st.integers(0, 11), st.integers(0, 40))
steps = st.lists(st.tuples(st.lists(edits, max_size=6), st.booleans()), min_size=1, max_size=4)


@pytest.mark.parametrize("num_examples", [5, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(0)])])
def test_any_history_ends_in_the_view_of_a_fresh_store(
    tmp_path_factory: pytest.TempPathFactory, vae: CountingVAE, num_examples: int
) -> None:
    check = partial(check_history, tmp_path_factory, vae)
    settings(max_examples=num_examples)(given(steps)(lambda history: check(history)))()


def check_history(
    tmp_path_factory: pytest.TempPathFactory, vae: CountingVAE, history: list[tuple[list[Any], bool]]
) -> None:
    folder = tmp_path_factory.mktemp("history")
    photos, out = folder / "photos", folder / "out"
    photos.mkdir()
    draw(photos / "always.png", 100)  # a source that shares no photo with its store is refused
    for number in range(4):
        draw(photos / f"{number:02d}.png", number)
    views: list[dict[str, Any]] = []
    for todo, is_interrupted in [([], False), *history]:
        for name, number, seed in todo:
            EDITS[name](photos / f"{number:02d}.png", seed)
        if is_interrupted:
            try:
                encode_dataset(photos, out, vae, progress=stop_in_the_encoding)
            except StoppedError:
                continue  # and the source changes again before it is encoded
        encode_dataset(photos, out, vae)
        views += [records(out)] * (len(Store.open(out).rosters) - len(views))
    encode_dataset(photos, out, vae)
    encode_dataset(photos, folder / "fresh", vae)
    newest = records(out)
    assert newest == records(folder / "fresh")
    assert read_store(out)["quarantine.jsonl"] == read_store(folder / "fresh")["quarantine.jsonl"]
    assert not verify(out).damages
    for generation, view in enumerate(views):
        is_last_of_its_run = generation + 1 == len(views) or views[generation + 1] is not view
        if is_last_of_its_run:
            assert records(out, generation) == view
    dataset = LatentDataset(out, sample=False)
    fresh = LatentDataset(folder / "fresh", sample=False)
    compact(out, folder / "compact")
    assert read_store(folder / "compact") == read_store(folder / "fresh")
    ours, theirs = ({one[n]["key"]: one[n] for n in range(len(one))} for one in (dataset, fresh))
    assert ours.keys() == theirs.keys() == {key for key, found in newest.items() if found[-1] is not None}
    for key, example in ours.items():
        assert torch.equal(example["latents"], theirs[key]["latents"]) and example["caption"] == theirs[key]["caption"]


def test_one_history_has_the_same_bytes_whoever_interrupts_it(photos: Path, tmp_path: Path, vae: CountingVAE) -> None:
    def edit(number: int) -> None:
        draw(photos / "a.png", 20 + number)
        draw(photos / f"new-{number}.png", 30 + number)
        (photos / "b.txt").write_text(f"text {number}")
        move(photos / ("c.png" if number == 0 else f"c{number - 1}.png"), photos / f"c{number}.png")

    for number in range(3):
        for name in ("plain", "stopped"):
            if name == "stopped":
                with pytest.raises(StoppedError):
                    encode_dataset(photos, tmp_path / name, vae, progress=stop_in_the_encoding)
            encode_dataset(photos, tmp_path / name, vae)
        edit(number)
    assert read_store(tmp_path / "plain") == read_store(tmp_path / "stopped")


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory, vae: CountingVAE) -> Path:
    """A store of three generations: the second has shards and changes, the third changes alone."""
    folder = tmp_path_factory.mktemp("lived")
    photos = folder / "photos"
    photos.mkdir()
    for name, seed in zip("abcde", (0, 1, 2, 3, 5), strict=True):
        draw(photos / f"{name}.png", seed)
    encode_dataset(photos, folder / "out", vae)
    draw(photos / "a.png", 10)
    (photos / "b.png").rename(photos / "z.png")
    encode_dataset(photos, folder / "out", vae)
    (photos / "c.png").unlink()
    caption(photos / "d.png", "another")
    encode_dataset(photos, folder / "out", vae)
    return folder / "out"


def test_a_flip_in_any_new_file_is_found(lived: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(lived, tmp_path / "out"))
    files = [path for path in store_files(root) if path.parent.name == "roster"]
    assert len(files) == 6
    for path in files:
        data = path.read_bytes()
        for byte in range(0, len(data), 43):
            flip(path, 8 * byte + byte % 8)
            assert [(one.path, one.state) for one in verify(root).damages] == [(path, "damaged")], byte
            path.write_bytes(data)
        path.unlink()
        assert [(one.path, one.state) for one in verify(root).damages] == [(path, "missing")]
        path.write_bytes(data)
    assert not verify(root).damages


def test_lost_records_have_the_names_of_the_newest_view(lived: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(lived, tmp_path / "out"))
    assert verify(root).num_records == len(records(root)) == 4
    flip(root / "index" / "00000.jsonl", 100)
    assert verify(root).lost == ["z.png"], "its other records are retired or changed"


def test_changes_come_back_from_the_journal(lived: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(lived, tmp_path / "out"))
    before = read_store(root)
    for path in store_files(root):
        if path.parent.name == "roster":
            flip(path, 8 * path.stat().st_size // 3)
            found = repair(root)
            assert (found.restored, found.verdict.damages) == ([path], [])
            assert read_store(root) == before
    for name in ("index/00000.jsonl", "done/00000.json", "index/00002.jsonl"):
        (root / name).unlink()
        assert repair(root).verdict.damages == [] and read_store(root) == before, name
    (root / "journal" / "changes-00002.jsonl").unlink()
    flip(root / "roster" / "00002.jsonl", 0)
    assert [one.path.name for one in repair(root).verdict.damages] == ["00002.jsonl"], "nothing is guessed"


def test_the_lines_of_a_generation_are_those_of_the_specification(lived: Path) -> None:
    header, *lines = map(json.loads, (lived / "roster" / "00002.jsonl").read_bytes().splitlines())
    assert (header["generation"], header["num_shards"], header["changes"]["num_changes"]) == (2, 0, 2)
    assert lines == [
        {"caption": None, "is_retired": True, "key": "c.png", "label": None, "record": 2, "shard": 0, "uri": "c.png"},
        {"caption": "another", "is_retired": False, "key": "d.png", "label": None, "record": 0, "shard": 1}
        | {"uri": "d.png"},
    ]
    rows = [line["row"] for shard in Store.open(lived).shards() for line in written(shard.records())]
    assert rows == [1, 0, 0]


# --- Compaction ---


def test_a_compaction_that_is_killed_goes_on(lived: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compact(lived, tmp_path / "expected")
    assert not verify(tmp_path / "expected").damages
    out, num_kills = tmp_path / "out", 0

    def die(operation: str, path: Path) -> None:
        nonlocal num_left
        num_left -= 1
        if num_left < 0:
            raise StoppedError

    while True:
        num_left = 7 + num_kills  # each run comes a little further
        with monkeypatch.context() as patch:
            patch.setattr(atomic, "hook", die)
            try:
                compact(lived, out)
                break
            except StoppedError:
                num_kills += 1
    assert num_kills > 5 and read_store(out) == read_store(tmp_path / "expected")


def test_what_cannot_be_compacted_is_refused(lived: Path, photos: Path, tmp_path: Path, vae: CountingVAE) -> None:
    with pytest.raises(StoppedError):
        encode_dataset(photos, tmp_path / "begun", vae, progress=stop_in_the_encoding)
    with pytest.raises(StoreError, match="is not finished; run sdvae encode to its end, then compact it"):
        compact(tmp_path / "begun", tmp_path / "out")
    encode_dataset(photos, tmp_path / "begun", vae)
    with pytest.raises(StoreError, match="holds other records than the newest generation"):
        compact(lived, tmp_path / "begun")
    root = Path(shutil.copytree(lived, tmp_path / "lived"))
    path = next((root / "shards").glob("00002-*"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x7b")
    with pytest.raises(VerifyError, match=r"the latents of a\.png are damaged"):
        compact(root, tmp_path / "out")


def test_a_compaction_says_that_it_leaves_streams_behind(
    lived: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = Path(shutil.copytree(lived, tmp_path / "lived"))
    keys = [line["key"] for shard in Store.open(root).shards() for line in written(shard.records())]
    attach(root, "text", [(key, np.ones((2, 3), np.float32)) for key in keys])
    assert LatentDataset(root)[0]["text"].shape == (2, 3)
    compact(root, tmp_path / "new")
    assert f"the new store has none of the streams of {root} (text): make them again" in caplog.text
    assert not (tmp_path / "new" / "streams").exists() and len(LatentDataset(tmp_path / "new")) == len(keys)


def test_degraded_shards_stay_marked(lived: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(lived, tmp_path / "lived"))
    done = root / "done" / "00001.json"
    done.write_bytes(sealed.seal(sealed.read_json(done) | {"degraded": 1}))
    compact(root, tmp_path / "out")
    assert [shard.degraded for shard in Store.open(tmp_path / "out").shards()] == [1, None]


# --- The commands ---


def test_the_commands_say_what_they_will_do(photos: Path, tmp_path: Path, vae: CountingVAE) -> None:
    def run(*arguments: object) -> Result:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="sdvae")

    vae.save(tmp_path / "vae")
    out = tmp_path / "out"
    arguments = ("encode", photos, out, "--size", 32, "--workers", 0, "--vae", tmp_path / "vae", "--dtype", "fp32")
    assert run(*arguments).exit_code == 3, "one photo is broken"
    (photos / "a.txt").write_text("another")
    (photos / "b.png").unlink()
    before = read_store(out)
    told = run(*arguments, "--dry-run")
    table = [line for line in told.stderr.splitlines() if line.removeprefix("sdvae:").strip()[:1].isdecimal()]
    assert [line.split(maxsplit=1)[1].strip() for line in table] == [
        "0 added", "0 changed", "1 vanished", "0 renamed", "1 with another caption or label",
    ]  # fmt: skip
    assert told.stdout.startswith("would encode 0 photos of 4 into") and read_store(out) == before
    done = run(*arguments, "--json")
    assert (
        "differs from the store: 1 vanished (b.png), 1 with another caption or label (a.png); nothing to" in done.stderr
    )
    assert json.loads(done.stdout)["changes"] == NO_CHANGE | {"vanished": 1, "texts": 1}
    done = run("compact", out, "-o", tmp_path / "new")
    assert done.stdout == f"4 records of {out} written to {tmp_path / 'new'}\n"
    assert records(tmp_path / "new") == records(out)
