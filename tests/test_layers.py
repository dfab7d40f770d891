"""Imports point one way: each layer knows only itself and the layers before it."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import tiltflow

PACKAGE = Path(tiltflow.__file__).parent
LAYERS = [
    "errors types seed context",
    "schedule space potential features distances similarity molecules bonds single_point",
    "delta flow guidance views lora",
    "kernel",
    "sample training",
    "density",
    "ratio analytic transport",
    "functional",
    "utilities divergences",
    "problem",
    "operators",
    "matching",
    "solvers",
    "algorithms",
    "adapters rewards metrics",
    "models registry runfile signatures config tables merge_tables experiment",
    "environment evaluation diagnosis recorder results rundir plots html_page inspection report "
    "report_parts report_training report_molecules molecule_pictures gallery sample_files run "
    "merges",
    "terminal workflow cli cli_parser __main__",
]
RANK = {module: rank for rank, names in enumerate(LAYERS) for module in names.split()}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


def imported(path: Path) -> set[str]:
    """Modules of this package that a file imports at run time, without the package's name."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from tiltflow import experiment` is the module; public names come from their homes.
            whole = node.module == "tiltflow"
            found |= {f"tiltflow.{a.name}" for a in node.names} if whole else {node.module or ""}
        waiting.extend(ast.iter_child_nodes(node))
    return {m.removeprefix("tiltflow.") for m in found if m.startswith("tiltflow.")}


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_no_arrow_points_left(path: Path) -> None:
    own = dotted(path).split(".")[0]
    assert own in RANK, f"give the new module {own!r} a layer"
    for module in imported(path):
        assert RANK[module.split(".")[0]] <= RANK[own], f"{own} must not import {module}"


def test_no_circles() -> None:
    """The imports can be ordered, inside layers too; a file does not import its own subpackage."""
    graph = {dotted(path): imported(path) - {dotted(path)} for path in FILES}
    TopologicalSorter(graph).prepare()


def run(code: str) -> str:
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return out.stdout.strip()


def test_import_of_the_package_is_instant() -> None:
    """`tiltflow --help` must not wait for torch."""
    loaded = "import sys, tiltflow; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    assert run(loaded) == "[]"


def test_public_names_import_no_extra() -> None:
    """Every public name exists, and none of them needs matplotlib or scikit-learn."""
    code = (
        "import sys, tiltflow\n"
        "for name in tiltflow.__all__: getattr(tiltflow, name)\n"
        "print([m for m in ('matplotlib', 'sklearn', 'scipy') if m in sys.modules])"
    )
    assert run(code) == "[]"


def test_public_names_are_listed_once() -> None:
    """`__all__`, the table of homes, and what type checkers see are the same names."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If))
    typed = {
        (alias.name, (node.module or "").removeprefix("tiltflow."))
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == set(tiltflow._HOME.items())
    assert sorted(tiltflow.__all__) == sorted(tiltflow._HOME)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tiltflow.nothing  # type: ignore[attr-defined]
