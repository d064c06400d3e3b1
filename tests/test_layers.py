"""A file imports only files above it: docs/design.md, section 3, says the order; this reads every import."""

import ast
import graphlib
import math
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FACADE, ENTRY = "sdvae", "sdvae.__main__"  # the public names and `python -m sdvae` stand outside the order
FREE_FACADE_NAMES = {"__version__"}  # what the package itself may take from the facade


def documented_order(design: str) -> tuple[list[str], set[str]]:
    """Modules and packages in the order of the layout, and the packages described in prose ("one file a verb").

    Files of the latter that the layout does not name come after those it names, in no order among themselves.
    """
    block = re.search(r"^## 3\. Layout.*?^```\nsdvae/\n(.*?)^\S", design, re.DOTALL | re.MULTILINE)
    assert block is not None, "docs/design.md has no layout in section 3"
    order: list[str] = []
    open_packages: set[str] = set()
    package = FACADE
    for line in block.group(1).splitlines():
        if re.match(r"  \S", line):
            package = FACADE
        if opened := re.match(r"  (\w+)/ *(.*)", line):
            package = f"{FACADE}.{opened.group(1)}"
            order.append(package)
            if opened.group(2) and not re.match(r"\w+\.py\b", opened.group(2)):
                open_packages.add(package)
        order += [f"{package}.{file}" for file in re.findall(r"\b(\w+)\.py\b", line)]
    return order, open_packages


def read_sources() -> dict[str, str]:
    """Source text by module name, a package's __init__.py under the package's name."""
    sources = {}
    for path in sorted((ROOT / "sdvae").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        sources[".".join(parts).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return sources


def imports(source: str, modules: set[str]) -> Iterator[str]:
    """What a file imports of sdvae, at the top or inside functions: modules, or `sdvae:name` for a public name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == FACADE)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield f"{FACADE}:a relative import"
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == FACADE:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in modules:
                    yield submodule
                elif node.module == FACADE:
                    yield f"{FACADE}:{alias.name}"
                else:
                    yield node.module


def violations(sources: Mapping[str, str], order: list[str], open_packages: set[str]) -> list[str]:
    """Every import that goes down or sideways, and every file the document does not name."""
    rank = {module: float(index) for index, module in enumerate(order)}
    for package in open_packages:
        last_named = max(rank[module] for module in order if f"{module}.".startswith(f"{package}."))
        unnamed = [module for module in sources if module.rpartition(".")[0] == package and module not in rank]
        rank |= dict.fromkeys(unnamed, last_named + 0.5)
    rank |= {FACADE: math.inf, ENTRY: math.inf}
    found = [f"{module} is not in the layout" for module in sources if module not in rank]
    for module in sources.keys() & rank.keys():
        for target in imports(sources[module], set(sources)):
            if target.startswith(f"{FACADE}:"):
                is_allowed = target.removeprefix(f"{FACADE}:") in FREE_FACADE_NAMES
            else:
                is_unordered = rank.get(target) == rank[module] and rank[module] % 1 == 0.5
                is_allowed = rank.get(target, math.inf) < rank[module] or is_unordered
            if not is_allowed:
                found.append(f"{module} imports {target}")
    return sorted(found)


@pytest.fixture(scope="module")
def layout() -> tuple[list[str], set[str]]:
    return documented_order((ROOT / "docs" / "design.md").read_text(encoding="utf-8"))


def test_the_layout_is_read_from_the_document(layout: tuple[list[str], set[str]]) -> None:
    order, open_packages = layout
    assert order[:4] == ["sdvae.errors", "sdvae.amounts", "sdvae.progress", "sdvae.atomic"]
    assert (
        order.index("sdvae.store")
        < order.index("sdvae.weights.load")
        < order.index("sdvae.vae")
        < order.index("sdvae.encoding")
    )
    assert order.index("sdvae.store.buckets") + 1 == order.index("sdvae.store.geometry"), "two files on one row"
    assert order.index("sdvae.integrations.diffusers") < order.index("sdvae.cli")
    assert {"sdvae.app", "sdvae.cli"} <= open_packages
    assert (
        not {
            "sdvae.sources",
            "sdvae.store",
            "sdvae.encoding",
            "sdvae.report",
            "sdvae.reading",
            "sdvae.engine",
            "sdvae.weights",
        }
        & open_packages
    )
    assert len(order) == len(set(order)) > 40


def test_every_import_goes_up(layout: tuple[list[str], set[str]]) -> None:
    sources = read_sources()
    assert {"sdvae", "sdvae.model", "sdvae.weights", "sdvae.cli.main"} <= sources.keys()
    assert violations(sources, *layout) == []


def test_sources_and_store_import_no_torch() -> None:
    found = {
        module: node.lineno
        for module, source in read_sources().items()
        if module.startswith(("sdvae.sources", "sdvae.store"))
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "torch" for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch")
    }
    assert found == {}


def test_the_report_knows_results_and_not_how_they_were_made() -> None:
    sources = read_sources()
    found = {
        target
        for module in sources
        if module.startswith("sdvae.report.")
        for target in imports(sources[module], set(sources))
        if target.startswith("sdvae.evaluate")
    }
    assert found == {"sdvae.evaluate.results"}


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("sdvae.posterior", "from sdvae.model import Encoder", "sdvae.posterior imports sdvae.model"),
        ("sdvae.errors", "import sdvae.config", "sdvae.errors imports sdvae.config"),
        ("sdvae.config", "def f():\n    from sdvae import model", "sdvae.config imports sdvae.model"),
        ("sdvae.weights.files", "from sdvae.weights import load", "sdvae.weights.files imports sdvae.weights.load"),
        ("sdvae.weights", "from sdvae.weights.load import f", "sdvae.weights imports sdvae.weights.load"),
        ("sdvae.weights.load", "from sdvae.vae import VAE", "sdvae.weights.load imports sdvae.vae"),
        ("sdvae.model", "from .config import VAEConfig", "sdvae.model imports sdvae:a relative import"),
        ("sdvae.vae", "from sdvae import VAEConfig", "sdvae.vae imports sdvae:VAEConfig"),
        ("sdvae.vae", "import sdvae", "sdvae.vae imports sdvae"),
        ("sdvae.vae", "from sdvae.cli.main import main", "sdvae.vae imports sdvae.cli.main"),
        ("sdvae.cli.shared", "from sdvae.cli.encode import f", "sdvae.cli.shared imports sdvae.cli.encode"),
        ("sdvae.helpers", "", "sdvae.helpers is not in the layout"),
        ("sdvae.store.helpers", "", "sdvae.store.helpers is not in the layout"),
    ],
)
def test_a_planted_violation_is_named(
    layout: tuple[list[str], set[str]], module: str, source: str, message: str
) -> None:
    clean = {
        "sdvae": "", "sdvae.errors": "", "sdvae.config": "from sdvae.errors import ConfigError", "sdvae.model": "",
        "sdvae.weights": "", "sdvae.weights.files": "", "sdvae.weights.load": "", "sdvae.vae": "",
        "sdvae.cli.main": "from sdvae import __version__\nfrom sdvae.cli.encode import encode",
        "sdvae.cli.encode": "from sdvae.cli.shared import f",
        "sdvae.cli.shared": "",
        "sdvae.__main__": "from sdvae.cli.main import main",
    }  # fmt: skip
    assert violations(clean, *layout) == []
    assert violations(clean | {module: source}, *layout) == [message]


def test_no_import_is_circular() -> None:
    """The order rules circles out between layers; this does inside packages whose files have no order."""
    sources = read_sources()
    modules = set(sources) - {FACADE}  # its imports serve type checkers alone
    graph = {module: modules.intersection(imports(sources[module], modules)) - {module} for module in modules}
    assert sum(map(len, graph.values())) > 20
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


# Imports at start-up.

LIBRARIES = {"torch", "numpy", "PIL", "diffusers", "accelerate", "safetensors", "einops", "huggingface_hub", "tqdm"}


def loaded_libraries(statements: str) -> set[str]:
    """Which of our dependencies a fresh interpreter holds after `statements`."""
    script = f"{statements}\nimport sys\nprint('loaded:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return (LIBRARIES | {"click"}) & set(done.stdout.rpartition("loaded:")[2].split())


def test_importing_sdvae_loads_no_library() -> None:
    assert loaded_libraries("import sdvae, sdvae.config, sdvae.errors") == set()


def test_a_public_name_loads_what_it_needs() -> None:
    """The control of the test above: the same look at a fresh interpreter sees torch when it is there."""
    assert "torch" in loaded_libraries("from sdvae import AutoencoderKL")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["encode", "--help"], ["decode", "--help"]])
def test_help_loads_no_library_but_click(arguments: list[str]) -> None:
    statements = f"""
import sys
from sdvae.cli.main import main
sys.argv = ["sdvae", *{arguments}]
try:
    main()
except SystemExit as end:
    assert end.code in (0, None), end.code
else:
    raise AssertionError("main() returned")
"""
    assert loaded_libraries(statements) == {"click"}
