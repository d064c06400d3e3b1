"""Runs the parts, one after the other; those that are done are skipped, and one that was interrupted goes on.

scripts/theory [PART ...] [-o FOLDER] [--mnist FOLDER] [--write]
"""

import argparse
import time
from pathlib import Path

import torch
from common import test_data

from theory.document import write_documents
from theory.parts import PARTS
from theory.work import Work

parser = argparse.ArgumentParser(prog="scripts/theory", description="Train and judge the models of docs/theory.md.")
parser.add_argument("parts", nargs="*", metavar="PART", help=f"all of {', '.join(PARTS)}")
parser.add_argument("-o", "--output", type=Path, default=Path("theory"), help="where models and findings are kept")
parser.add_argument("--mnist", type=Path, default=test_data() / "mnist", help="the folder of MNIST's four files")
parser.add_argument("--write", action="store_true", help="write the table and the pictures of docs/theory.md")
arguments = parser.parse_args()
if unknown := set(arguments.parts) - set(PARTS):
    parser.error(f"no part is called {min(unknown)}; there are {', '.join(PARTS)}")

torch.set_num_threads(1)  # sums in one order: the same numbers on every machine of a kind
for name in arguments.parts or PARTS:
    work = Work(arguments.output / name, arguments.mnist)
    if (findings := work.findings()) is None:
        started = time.monotonic()
        findings = PARTS[name](work)
        findings.numbers["minutes"] = round((time.monotonic() - started) / 60.0, 1)
        work.finish(findings)
    for row in findings.rows:
        print(f"{name}: {row.what}: {row.measured}" + (f" (to reach: {row.to_reach})" if row.to_reach else ""))
if arguments.write:
    write_documents({name: Work(arguments.output / name, arguments.mnist) for name in PARTS})
