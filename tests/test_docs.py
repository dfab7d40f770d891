"""The pages under docs: their code runs, and their tables are complete."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import test_functional
import tiltflow.utilities
from oracles import FUNCTIONALS, GATEAUX_P, GATEAUX_PRIOR, GATEAUX_REWARD
from oracles.gateaux import P, gateaux
from tiltflow.functional import Functional
from tiltflow.potential import BlackBox
from tiltflow.types import Access

DOCS = Path(__file__).resolve().parent.parent / "docs"
UTILITIES = (DOCS / "utilities.md").read_text(encoding="utf-8")


def code_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def rows(page: str) -> list[list[str]]:
    """Cells of the lines of tables that begin with code."""
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    return [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def own_utility() -> Any:
    """The class that the page defines, from its very lines."""
    (block,) = [b for b in code_blocks(UTILITIES) if "class " in b]
    lines = [line for line in block.splitlines() if line.strip()]
    assert len(lines) < 20, "the page promises a short example"
    scope: dict[str, Any] = {}
    exec(compile(block, "utilities.md", "exec"), scope)
    return scope["LogExceedance"]


def test_own_utility_keeps_the_contract() -> None:
    """The example's first variation is the derivative of its value; its errors are right."""
    make = own_utility()
    example: Functional = make(GATEAUX_REWARD, 0.5, 0.2)
    numeric, predicted = gateaux(example)
    assert abs(predicted) > 1e-3
    assert numeric == pytest.approx(predicted, rel=1e-6)
    out, exact = example.value(GATEAUX_P), example.value(P)
    assert exact.standard_error == 0
    assert 0 < out.standard_error < 0.1
    assert abs(out.value - exact.value) < 4.5 * out.standard_error
    assert example.offers(Access.NONE) is Access.BOTH
    assert make(BlackBox(lambda x: x[:, 0]), 0.5, 0.2).offers(Access.NONE) is Access.VALUE


def test_one_line_puts_it_under_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's line for FUNCTIONALS, and every contract of test_functional on it."""
    (line,) = [b for b in code_blocks(UTILITIES) if b.startswith('"LogExceedance"')]
    for name, make in eval("{" + line + "}", {"LogExceedance": own_utility()}).items():
        monkeypatch.setitem(FUNCTIONALS, name, make)
    contracts = [
        f
        for key, f in vars(test_functional).items()
        if key.startswith("test_") and list(inspect.signature(f).parameters) == ["name"]
    ]
    for contract in contracts:
        if "prior" not in (contract.__doc__ or ""):  # that one is about divergences
            contract("LogExceedance")
    assert len(contracts) >= 5


def test_every_utility_has_a_row_with_its_curvature() -> None:
    """One row per example of the contract: none is missing, and none says another shape."""
    table = rows(UTILITIES)
    named = {re.match(r"`(\w+)", row[0]).group(1) for row in table}  # type: ignore[union-attr]
    assert named == set(tiltflow.utilities.__all__)
    for name, make in FUNCTIONALS.items():
        if name.split()[0] not in named:
            continue
        shape = make(GATEAUX_REWARD, GATEAUX_PRIOR).curvature
        own = [row for row in table if row[0].startswith(f"`{name.split()[0]}(")]
        assert any(shape in row[4] for row in own), name
