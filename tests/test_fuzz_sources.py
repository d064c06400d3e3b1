"""Parsers of strangers' files, fed with mutated ones: each ends in photos, or in one sentence.

SDVAE_FUZZ is the number of inputs for each parser: a hundred by default, 20,000 by hand.
"""

import gzip
import json
import os
import random
import resource
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdvae.errors import SdvaeError
from sdvae.sources.open import open_source
from sdvae.sources.tables import read_table
from tests.test_sources import FEATURES, photo, tar, zipped

NUM_INPUTS = int(os.environ.get("SDVAE_FUZZ", "100"))
MAX_S, MAX_GROWTH = 5, 200 * 2**20  # of one input, of all: a hang and a leak, not a slow machine
FILES = {f"s{number}/a.png": photo(number + 1) for number in range(3)} | {
    f"s{number}/a.txt": b"a cat" for number in range(3)
}
FILES["metadata.jsonl"] = b'{"file_name": "s0/a.png", "label": 5}\n'
ROWS = [
    {"path": f"{number}.png", "caption": f"a \u00e9 {number}", "label": number, "n": {"x": [1.5]}}
    for number in range(4)
]
SPICES = [
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b'"',
    b"\r",
    b"\n",
    b",",
    b"\\ud83d",
    b"[" * 3000,
    b"9" * 5000,
    b"NaN",
    b"-1",
    b"\xff\xff\xff\xff",
]


def _table() -> pa.Table:
    table = pa.table(
        {
            "image": [{"bytes": photo(number % 7), "path": f"{number}.png"} for number in range(1, 9)],
            "label": [0, 1, -1, 0, 1, 0, None, 1],
            "caption": ["a", None, "\u00e9", "d", "", "f", "g", "h"],
        }
    )
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": FEATURES}})})


def _parquet(path: Path) -> None:
    pq.write_table(_table(), path, row_group_size=3, compression="zstd")


def _arrow(path: Path) -> None:
    with pa.ipc.new_stream(path, _table().schema) as writer:
        writer.write_table(_table(), 3)


def _arrow_file(path: Path) -> None:
    with pa.ipc.new_file(path, _table().schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(_table(), 3)


def _csv(path: Path) -> None:
    path.write_text("path,caption,label\n" + "".join(f'{n}.png,"a ""\u00e9"" {n}",{n}\n' for n in range(4)))


def _idx(path: Path) -> None:
    digits = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + np.array(digits.shape, ">u4").tobytes() + digits.tobytes()))


def _stored(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)


PARSERS: dict[str, Callable[[Path], object]] = {
    "a.csv": _csv,
    "a.tsv": lambda path: path.write_text("path\tcaption\n1.png\ta cat\n2.png\ttwo\n"),
    "a.jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS)),
    "a.parquet": _parquet,
    "a.arrow": _arrow,
    "b.arrow": _arrow_file,
    "a.zip": lambda path: zipped(path, FILES),
    "b.zip": _stored,
    "a.tar": lambda path: tar(path, FILES),
    "t-images-idx3-ubyte": lambda path: (_idx(path), path.write_bytes(gzip.decompress(path.read_bytes()))),
    "t-images-idx3-ubyte.gz": _idx,
}


def mutate(data: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, cut out, doubled, moved or put in."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        place = chance.randrange(len(changed) + 1)
        match chance.randrange(7):
            case 0 | 1 | 2:
                changed[place : place + 1] = bytes([chance.randrange(256)])
            case 3:
                changed[place : place + 1] = (
                    bytes([changed[place] ^ 1 << chance.randrange(8)]) if changed[place:] else b""
                )
            case 4:
                changed[place : place + chance.randrange(1, 64)] = b""
            case 5:
                changed[place:place] = chance.choice(SPICES)
            case 6:
                source = chance.randrange(len(changed) + 1)
                piece = changed[source : source + chance.randrange(1, 64)]
                changed[place : place + len(piece)] = piece
    return bytes(changed[: chance.randrange(len(changed) + 1)] if chance.random() < 0.1 else changed)


def exhaust(path: Path) -> None:
    """Do all that a run does with a source: what goes wrong is of the run or of one photo, and can be stored."""
    try:
        source = open_source(path)
        entries = source.entries()
    except SdvaeError as error:
        assert str(error) and "\n" not in str(error)
        return
    json.dumps(
        [(entry.key, entry.caption, entry.label, entry.reason, *source.remarks) for entry in entries],
        ensure_ascii=False,
    ).encode()
    for entry in entries[:20]:
        try:
            if entry.reason is None:
                source.read(entry.key)
        except OSError as error:
            assert error.strerror, "a reason must be told"


@pytest.mark.parametrize("name", PARSERS)
def test_a_mutated_file_ends_in_photos_or_in_a_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    PARSERS[name](path)
    whole = path.read_bytes()
    exhaust(path)
    chance = random.Random(name)
    before, slowest = _peak_bytes(), 0.0
    for number in range(NUM_INPUTS):
        data = mutate(whole, chance)
        path.unlink()  # not written over: a file that is mapped into memory would change there
        path.write_bytes(data)
        begun = time.monotonic()
        try:
            exhaust(path)
        except Exception as error:
            raise AssertionError(f"input {number} of {name}: {data[:2000]!r}") from error
        slowest = max(slowest, time.monotonic() - begun)
    if NUM_INPUTS > 1000:  # by hand, where a machine is quiet
        print(
            f"\n{name}: {NUM_INPUTS:,} inputs, slowest {slowest:.2f} s, grew {(_peak_bytes() - before) / 2**20:.0f} MB"
        )
        assert slowest < MAX_S
    assert _peak_bytes() - before < MAX_GROWTH


def test_a_mutated_caption_is_a_caption_or_a_reason(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(photo(1))
    chance = random.Random("captions")
    for _ in range(NUM_INPUTS):
        (tmp_path / "a.txt").write_bytes(mutate("\ufeffa \u00e9 fox, \U0001f98a\r\n".encode(), chance))
        (tmp_path / "metadata.csv").write_bytes(mutate(b"file_name,text\na.jpg,a fox\n", chance))
        exhaust(tmp_path)


def test_a_mutated_description_of_a_saved_dataset_is_a_sentence(tmp_path: Path) -> None:
    _arrow(tmp_path / "a.arrow")
    chance = random.Random("state")
    for _ in range(NUM_INPUTS):
        (tmp_path / "state.json").write_bytes(mutate(b'{"_data_files": [{"filename": "a.arrow"}]}', chance))
        exhaust(tmp_path)


def test_a_header_of_many_columns_takes_no_time() -> None:
    table = read_table("a.csv", b"path" + b"," * 100_000 + b"\n")
    assert not table.rows


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
