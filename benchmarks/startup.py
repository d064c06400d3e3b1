#!/usr/bin/env python
"""How long `import sdvae` and `sdvae --help` take: medians of fresh processes, beside an empty Python.

benchmarks/startup.py
"""

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "an empty Python": ["-c", ""],
    "import sdvae": ["-c", "import sdvae"],
    "sdvae --help": ["-m", "sdvae", "--help"],
}
NUM_RUNS = 11


def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(NUM_RUNS):  # in turns, so that a busy moment hits all
        for name, arguments in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        print(f"{statistics.median(values):.3f} s  {name}")


if __name__ == "__main__":
    main()
