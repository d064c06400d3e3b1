"""A million photos, each a small file: listing, scan, roster, and the scan resumed from its journal."""

import resource
import tempfile
import time
from pathlib import Path

import click
from common import write_result

from sdvae.encoding.scan import scan
from sdvae.sources.entries import Entry
from sdvae.store.geometry import Preprocess
from sdvae.store.roster import place, plan_records, roster_lines


class SyntheticSource:
    """Photos of many shapes that cost nothing to read: what is left is the work of the scan itself."""

    name, root, remarks = "synthetic photos", None, ()

    def __init__(self, num_photos: int) -> None:
        self.num_photos = num_photos

    def entries(self) -> list[Entry]:
        """As a listing gives them."""
        return [
            Entry(f"{number // 1000:05d}/{number:09d}.pgm", 1000, 1, caption=f"photo {number} of many", label="photos")
            for number in range(self.num_photos)
        ]

    def read(self, key: str) -> bytes:
        """The shortest image file there is."""
        number = int(key[-13:-4])
        return b"P5 %d %d 255\n%d" % (512 + number % 97 * 16, 512 + number % 89 * 16, number)


@click.command()
@click.option("--photos", "num_photos", default=1_000_000, show_default=True)
@click.option("--write", is_flag=True, help="Write results/roster.json.")
def roster(num_photos: int, write: bool) -> None:
    """Scan and place a million photos; then scan again from the journal."""
    source, preprocess = SyntheticSource(num_photos), Preprocess(None, buckets="sd1")
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "scan.jsonl"
        laps = _Laps(seconds)
        entries = source.entries()
        laps.end("list")
        records = scan(source, entries, 2**27, journal, lambda num_done, num_all: None)
        laps.end("scan")
        tasks = place(plan_records(records, preprocess, downscale=8), lambda bucket_px: 1024)
        laps.end("place")
        num_bytes = sum(map(len, roster_lines(tasks)))
        laps.end("write")
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        assert sum(len(task.records) for task in tasks) == num_photos
        assert all(task.bucket_px for task in tasks)
        del tasks, records
        laps.end("")
        again = scan(source, entries, 2**27, journal, lambda num_done, num_all: None)
        laps.end("scan resumed")
        assert len(again) == num_photos and again[-1].source_sha256
    total_s = sum(value for name, value in seconds.items() if name != "scan resumed")
    for name, value in seconds.items():
        click.echo(f"{value:7.2f} s  {name}")
    click.echo(
        f"{total_s:7.2f} s  in all, without the resumed scan; {len(entries):,} photos, {num_bytes:,} bytes of roster"
    )
    click.echo(f"{peak_bytes / 2**30:7.2f} GiB  peak")
    if write:
        result = {"num_photos": num_photos, "seconds": seconds, "total_s": total_s, "peak_bytes": peak_bytes}
        write_result("roster", result)


class _Laps:
    """Processor time, all threads together: what a busy machine takes from us is not ours."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._last = time.process_time()

    def end(self, name: str) -> None:
        """Give the time since the last end to `name`; to nobody where it is empty."""
        now = time.process_time()
        if name:
            self._seconds[name] = now - self._last
        self._last = now
