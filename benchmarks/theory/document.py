"""The table and the pictures of the theory run in docs/theory.md, and all of its numbers in results/theory.json."""

import shutil
from dataclasses import asdict
from pathlib import Path

from common import RESULTS, write_result

from theory.work import Findings, Work

DOCS = Path(__file__).parents[2] / "docs"
MARKS = ("<!-- scripts/theory --write writes what follows -->\n", "<!-- until here -->\n")


def table(parts: dict[str, Findings], shown: str = "") -> str:
    """The table of all parts, in Markdown, and under it those of their pictures that the text `shown` does not show."""
    lines = ["| what | measured | to reach | beside it |", "|---|---|---|---|"]
    for name, findings in parts.items():
        lines.append(f"| **{name}** | | | |")
        for row in findings.rows:
            missed = " (missed)" if row.reached is False else ""
            lines.append(f"| {row.what} | {row.measured} | {row.to_reach}{missed} | {row.beside} |")
    for name, findings in parts.items():
        for file, text in findings.pictures.items():
            if f"(theory/{name}-{file})" not in shown:
                lines.append(f"\n![{text}](theory/{name}-{file})\n\n{text}")
    return "\n".join(lines) + "\n"


def parts_of(document: str) -> tuple[str, str, str]:
    """What stands before the marks, between them, and after them."""
    before, rest = document.split(MARKS[0])
    between, after = rest.split(MARKS[1])
    return before, between, after


def write_documents(works: dict[str, Work]) -> None:
    """Write all that is done: results/theory.json, docs/theory.md between the marks, docs/theory/*.png."""
    done = {name: findings for name, work in works.items() if (findings := work.findings()) is not None}
    write_result("theory", {"parts": {name: asdict(findings) for name, findings in done.items()}})
    pictures = DOCS / "theory"
    pictures.mkdir(exist_ok=True)
    for name, findings in done.items():
        for file in findings.pictures:
            shutil.copyfile(works[name].folder / file, pictures / f"{name}-{file}")
    document = DOCS / "theory.md"
    before, _, after = parts_of(document.read_text(encoding="utf-8"))
    document.write_text(before + MARKS[0] + table(done, before + after) + MARKS[1] + after, encoding="utf-8")
    print(f"{RESULTS / 'theory.json'}, {document}")
